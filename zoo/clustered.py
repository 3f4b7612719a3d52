"""--prototypes clustered: the teacher's rule of CAPI (Darcet et al. 2025) under any loss.

The prototypes are the rows of a linear layer on the teacher's unit vectors. They have a loss and an
optimiser of their own, so the encoder's loss never touches them:

    CL.1  u_i = h_i / |h_i|,   l_i = W u_i + b                          (N, K)
    CL.2  a = Sinkhorn-Knopp of l / 0.06: every prototype gets the same total over the N vectors
    CL.3  L_C = mean_i -sum_k a_ik log softmax(l_i / 0.12)_k, the loss of Eq. 3
    CL.4  one step of AdamW on W and b, from half of the student's peak rate on (see `lr`)

The logits that reach the encoder's loss are l / 0.12. With `--student-prototypes joint` the student
has a set of its own, which the encoder's loss trains, as in CAPI: what Sec. 3 of the paper calls
partial decoupling. A loss that has temperatures of its own divides these logits again. Under DINO,
--teacher-temp 0.5 0.5 --student-temp 1 gives the temperatures of CL.2 and CL.3, and with a joint
student --teacher-temp 0.5 0.5 --student-temp 0.12 does; with the defaults DINO does not learn
(docs/space.md).

Sinkhorn-Knopp gives every prototype N / K of a vector. With K above N no vector can belong to one
prototype, and the entropy of a is at least ln(K / N).

    N vectors of a step, of all processes; K prototypes in D dimensions
"""
import math

import torch
from torch.nn import functional as F

from heads import Frozen
from losses import sinkhorn

TAU_TARGETS, TAU = 0.06, 0.12


class Clustered(Frozen):
    """W (K, D) and b (K,), moved by CL.1 to CL.4.

    lr      peak of the learning rate, which falls along the first 0.8 of a half cosine in `total`
            steps, as in CAPI: to a tenth of the peak
    differs: in CAPI these prototypes move after the student, which therefore meets the ones of the
    step before; here they move first, as Eq. 3 comes before Eq. 4. Rows of W start at equal length,
    and there is no warm-up.
    """

    def __init__(self, K, D, scale=1.0, seed=0, *, lr, total):
        super().__init__(K, D, scale, seed)
        self.lr, self.total = lr, total
        # of length sqrt(D), so that l has standard deviation 1 at the start for every D
        self.register_buffer("W", self.start * D ** 0.5)  # (K, D)
        self.register_buffer("b", torch.zeros(K))
        self.optimizer = None  # made at the first step, when W is on its device
        self.restored = None  # state of the optimiser from a checkpoint

    @classmethod
    def from_args(cls, args, begin=0):
        return cls(args.num_prototypes, args.bottleneck_dim, args.logit_scale, args.seed,
                   lr=args.lr * args.batch_size / 256 / 2, total=args.data_seen["steps"])

    def vectors(self):
        return F.normalize(self.W, dim=1)

    def logits(self, h, ks=None):
        # CL.1, over the temperature of CL.3; float32 also under autocast
        with torch.autocast(h.device.type, enabled=False):
            l = F.linear(F.normalize(h.float(), dim=-1), self.W, self.b)  # (..., K)
        z = self.scale / TAU * l  # (..., K)
        return z if ks is None else z[..., ks]

    @torch.no_grad()
    def step(self, h, step, beta=0.5):
        # Eq. 3; every process has all vectors, and gets the same W and b
        h = h[torch.isfinite(h).all(1)].float()  # (N, D), as the run skips what is not finite
        if len(h) == 0:
            return {}
        # CL.1 and CL.2
        u = F.normalize(h, dim=1)  # (N, D)
        l = F.linear(u, self.W, self.b)  # (N, K)
        a = sinkhorn(l, TAU_TARGETS)  # (N, K)
        # CL.3
        log_p = (l / TAU).log_softmax(1)  # (N, K)
        loss = -(a * log_p).sum(1).mean()
        # CL.4; a is a constant of the loss, whose gradient in l is therefore (p - a) / (0.12 N)
        gradient = (log_p.exp() - a) / (TAU * len(h))  # (N, K)
        self.W.grad = gradient.T @ u  # (K, D)
        self.b.grad = gradient.sum(0)  # (K,)
        self.adamw().param_groups[0]["lr"] = self.learning_rate(step)
        self.adamw().step()
        return {"clustering_loss": loss, "mixture_used": len(a.argmax(1).unique())}

    def learning_rate(self, step):
        return self.lr * (1 + math.cos(0.8 * math.pi * step / self.total)) / 2

    def adamw(self):
        """The optimiser of W and b; made when it is first needed, as W has its device by then."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW([self.W, self.b], betas=(0.9, 0.95),
                                               weight_decay=0.01)
            if self.restored:
                self.optimizer.load_state_dict(self.restored)
        return self.optimizer

    def get_extra_state(self):
        return self.optimizer.state_dict() if self.optimizer else {}

    def set_extra_state(self, state):
        self.optimizer, self.restored = None, state
