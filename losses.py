"""The losses of CARP, CARL and DINO, Sinkhorn-Knopp and KoLeo.

    z_s (V, B, K)   student logits of V views of B images; views 0 and 1 are the global ones
    z_t (2, B, K)   teacher logits of the global views
                    view i of z_s and of z_t is the same crop, and the pair i == j is skipped

The functions are the mathematics: tensors in, named scalars out. A loss of the training loop is one
class, a subclass of Loss, and one entry of the table LOSSES at the end of this file. Above 2^24
student logits, fast/losses.py computes the same without holding them all.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from support import ddp
from support.entries import loaded

EPS = torch.finfo(torch.float32).eps  # clamp of CARP's official code: 1.19e-7 on both ends
MOST_LOGITS = 2 ** 24  # student logits V B K of a micro-batch that the plain losses may hold


# ---- the mathematics ---------------------------------------------------------------------------
def other_crop(V, device):
    """(V, 2), True where student view i and teacher view j are two crops: 2V - 2 pairs (i, j)."""
    return ~torch.eye(V, 2, dtype=torch.bool, device=device)


def carp(z_s, z_t, partition_size, perm=None, mean_over_ranks=None):
    """CARP (Silva and Ramirez Rivera 2023), as its official code computes it.

    z_s (V, B, K), z_t (2, B, K): logits, without a temperature. perm (K,): the random order in
    which the prototypes are cut into K / partition_size blocks; None: as they come. partition_size
    = K is CARL. mean_over_ranks: makes a mean over all processes of a mean over this one's images.
    Returns {"consistency", "entropy"}, 0-dim, whose sum is minimised. Raises ValueError if K is not
    a multiple of partition_size.
    """
    (V, B, K), P = z_s.shape, partition_size
    if K % P:
        raise ValueError(f"the number of prototypes ({K}) must be a multiple of the partition size "
                         f"({P})")
    if perm is not None:
        # this is z[..., perm]; on a CPU its gradient takes a fifth of the time by gather
        z_s, z_t = (z.gather(-1, perm.expand_as(z)) for z in (z_s, z_t))
    p = z_s.float().reshape(V, B, K // P, P).softmax(-1)  # (V, B, K/P, P)
    q = z_t.detach().float().reshape(2, B, K // P, P).softmax(-1)  # (2, B, K/P, P)
    # consistency = mean over pairs i != j, images and blocks of -log sum_c p_ic q_jc
    agree = torch.einsum("ibnc,jbnc->bnij", p, q)  # (B, K/P, V, 2)
    agree = agree[..., other_crop(V, p.device)]  # (B, K/P, 2V-2)
    consistency = -agree.clamp(EPS, 1 - EPS).log().mean()
    # entropy = mean over blocks of log P - H(p_bar), with p_bar the mean over the views of student
    # and teacher, the images and the processes
    p_bar = (p.sum((0, 1)) + q.sum((0, 1))) / ((V + 2) * B)  # (K/P, P)
    p_bar = mean_over_ranks(p_bar) if mean_over_ranks else p_bar
    entropy = (math.log(P) + (p_bar * p_bar.clamp(EPS, 1 - EPS).log()).sum(-1)).mean()
    return {"consistency": consistency, "entropy": entropy}


def dino(z_s, p_t, tau=0.1, bias=0.0):
    """DINO's cross-entropy of logits z_s (V, B, K) with the teacher's probabilities p_t (2, B, K).

    tau: temperature of the student; bias (K,): vMF's log-normaliser, or 0. Returns
    {"cross_entropy"}: the mean over the 2V - 2 pairs i != j and the images of -sum_k p_t log
    softmax(z_s / tau + bias).
    """
    log_p = (z_s.float() / tau + bias).log_softmax(-1)  # (V, B, K)
    agree = torch.einsum("ibk,jbk->bij", log_p, p_t.detach())  # (B, V, 2)
    return {"cross_entropy": -agree[:, other_crop(len(z_s), log_p.device)].mean()}


@torch.no_grad()
def sinkhorn(z, tau, iters=3, all_reduce=None):
    """Balanced assignments of teacher logits z (N, ..., K) of this process; rows sum to 1 (SwAV).

    Each round scales every prototype to the same total over the N vectors of all processes, and
    then every vector to 1. Dimensions between the first and the last, such as CAPI's places, are
    balanced each on its own. What all logits of a prototype have in common makes no difference,
    such as the log-normaliser of vMF.
    all_reduce(x, op): sums ("sum") or takes the maximum ("max") over the processes.
    """
    reduce = all_reduce or (lambda x, op: x)
    log_q = z.float() / tau  # (N, ..., K); in the log domain, where no vector is lost to rounding
    for _ in range(iters):
        # prototypes: equal totals. A process may have no vector
        largest = log_q.amax(0) if len(z) else z.new_full(z.shape[1:], -torch.inf).float()
        largest = reduce(largest, "max")  # (..., K)
        total = reduce((log_q - largest).exp().sum(0), "sum")  # (..., K)
        log_q = log_q - largest - total.log()
        log_q = log_q.log_softmax(-1)  # vectors: one each
    return log_q.exp()


def koleo(C, block=2 ** 26):
    """KoLeo on prototypes C (K, D): -mean_k log min_{i != k} ||c_k - c_i||, c_k of length one.

    KoLeo-Proto of Sec. 2.1. The nearest neighbour is found without gradient, in blocks of rows,
    since the K x K matrix of 65,536 prototypes is 17 GB. The distance is differentiated through
    both ends. Exact duplicates feel no force, having no direction. K = 1 gives 0.
    """
    with torch.autocast(C.device.type, enabled=False):
        c = F.normalize(C.float(), dim=1)  # (K, D)
        if len(c) < 2:
            return c.sum() * 0
        with torch.no_grad():
            nearest = []
            for ks in torch.arange(len(c), device=c.device).split(max(1, block // len(c))):
                cos = c[ks] @ c.T  # (|ks|, K)
                cos[torch.arange(len(ks), device=c.device), ks] = -2  # not its own neighbour
                nearest.append(cos.argmax(1))
        d = (c - c[torch.cat(nearest)]).norm(dim=1)  # (K,)
        return -(d + 1e-8).log().mean()  # 1e-8: a duplicate costs 18 nats, not infinity


# ---- as the loop calls them --------------------------------------------------------------------
class Loss(nn.Module):
    """What the training loop calls. A loss defines two methods, and `from_args` if its constructor
    has arguments:

    targets(h_t, protos_t, step)
        once a step: teacher vectors (2, B, D) -> what the student has to agree with, a tensor whose
        dimension 1 is B
    forward(h_s, targets, protos_s, protos_t, step)
        once a micro-batch: student vectors (V, B, D) -> {name: scalar}. The sum is minimised, and
        each name is a column of log.csv

    Its constructor may set
    uniform   value of its first term while the student's output is uniform: the log then shows how
              far below that the term is
    tau       temperature of the student's softmax (--student-temp, where it reads that)
    and the class may say
    only_with the name of the only prototypes it works with
    reads_bias  whether it adds `bias` of a prototype set to logits over a temperature
    and what a flag is where nobody types it:
    unit_h              --head-norm: h of length one
    teacher_momentum    --momentum and --momentum-end
    teacher_temp        --teacher-temp
    """

    uniform = None
    tau = 1.0
    only_with = None
    reads_bias = False
    unit_h = False
    teacher_momentum = (0.98, 1.0)
    teacher_temp = (0.025, 0.025)  # ours: DINO's 0.04 learns less on the built-in images

    @classmethod
    def from_args(cls, args, steps_per_epoch):
        return cls()

    def tau_and_centre(self):
        """(tau, centre (K,) or 0) of softmax(logits / tau + bias - centre), which says how much
        each prototype answers for a teacher's vector; see Frozen.assign."""
        return self.tau, 0.0


def fast_losses(K, h_s, protos_s, protos_t):
    """fast/losses.py if h_s (V, B, D) has more logits than plain losses may hold, else None."""
    V, B, _ = h_s.shape
    if V * B * K <= MOST_LOGITS:
        return None
    for protos in (protos_s, protos_t):
        if not protos.logits_are_products():
            name = type(protos).__name__
            ddp.print_once(f"{name} overrides `logits`, or trains its scale: the plain loss runs, "
                           f"with all {V * B * K} logits of a micro-batch")
            return None
    ddp.print_once("more than 2^24 logits in a micro-batch: fast/losses.py computes the loss, from "
                   "blocks of prototypes. What you change in losses.dino or Frozen.logits has to "
                   "be changed there too; what you change in losses.carp counts within a block")
    from fast import losses
    return losses


class CARPLoss(Loss):
    """CARP and CARL. The random order of the prototypes is a function of (seed, step)."""

    def __init__(self, K, partition_size, seed=0):
        super().__init__()
        self.K, self.partition_size, self.seed = K, partition_size, seed
        self.uniform = math.log(partition_size)

    @classmethod
    def from_args(cls, args, steps_per_epoch):
        return cls(args.num_prototypes, args.partition_size, args.seed)

    def targets(self, h_t, protos_t, step):
        return h_t

    def forward(self, h_s, h_t, protos_s, protos_t, step):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        perm = torch.randperm(self.K, generator=generator).to(h_s.device, non_blocking=True)  # (K,)
        if fast := fast_losses(self.K, h_s, protos_s, protos_t):
            return fast.carp(carp, h_s, h_t, protos_s, protos_t, self.partition_size, perm,
                             ddp.mean_over_ranks)
        z_s = protos_s.logits(h_s)  # (V, B, K)
        z_t = protos_t.logits(h_t)  # (2, B, K)
        return carp(z_s, z_t, self.partition_size, perm, ddp.mean_over_ranks)


class DINOLoss(Loss):
    """DINO. The teacher's probabilities are sharpened, and one of three ways keeps them from all
    falling on one prototype:

    "center"    softmax((z - centre) / tau + bias), centre: running mean of z over views, images,
                processes
    "prob"      softmax(z / tau + bias - centre), centre: running log of the mean probability (vMF)
    "sinkhorn"  Sinkhorn-Knopp over both views of all images (DINOv2; Table C.3 when decoupled)
    """

    reads_bias = True
    unit_h = True
    # at 0.98 a run on the built-in images fell back to uniform assignments
    teacher_momentum = (0.99, 1.0)

    def __init__(self, K, steps_per_epoch, targets="center", temps=(0.04, 0.04), temp_epochs=0,
                 tau=0.1, momentum=0.9):
        super().__init__()
        self.how, self.tau, self.momentum = targets, tau, momentum
        self.steps_per_epoch, self.temps, self.temp_epochs = steps_per_epoch, temps, temp_epochs
        self.register_buffer("centre", torch.zeros(K))  # (K,)
        self.uniform = math.log(K)

    @classmethod
    def from_args(cls, args, steps_per_epoch):
        return cls(args.num_prototypes, steps_per_epoch, args.targets, args.teacher_temp,
                   args.teacher_temp_epochs, args.student_temp)

    def centre_at(self, tau):
        """(K,), what the teacher takes off logits / tau."""
        # the centre of "prob" is the logarithm of a probability, so no temperature divides it; that
        # of "sinkhorn" is always 0
        return self.centre if self.how == "prob" else self.centre / tau

    def tau_and_centre(self):
        # the teacher's softmax with its last temperature; Sinkhorn-Knopp is no softmax, and there
        # the student's temperature is taken
        tau = self.tau if self.how == "sinkhorn" else self.temps[1]
        return tau, self.centre_at(tau)

    def temperature(self, step):
        """tau of the teacher: a line over temp_epochs passes, one value a pass, and then flat."""
        start, end = self.temps
        if not self.temp_epochs:
            return end
        epoch = step // self.steps_per_epoch
        return start + (end - start) * min(1, epoch / max(1, self.temp_epochs - 1))

    @torch.no_grad()
    def targets(self, h_t, protos_t, step):
        """Teacher vectors (2, B, D) -> p_t (2, B, K)."""
        tau = self.temperature(step)
        z = protos_t.logits(h_t).flatten(0, -2)  # (N, K), N = 2B vectors
        z_tau = z / tau + protos_t.bias(tau)  # (N, K)
        if self.how == "sinkhorn":
            p_t = sinkhorn(z_tau, 1.0, all_reduce=ddp.all_reduce)  # (N, K)
        else:
            p_t = (z_tau - self.centre_at(tau)).softmax(-1)  # (N, K)
            # the centre moves after it has served, as in the official code
            self.move_centre(z_tau.softmax(-1) if self.how == "prob" else z)
        return p_t.view(*h_t.shape[:-1], z.shape[1])  # (2, B, K)

    def move_centre(self, x):
        """x (N, K): logits, or with "prob" probabilities, of the vectors of this process."""
        now = ddp.mean_over_ranks(x.mean(0))  # (K,)
        if self.how == "prob":
            now = now.clamp_min(torch.finfo(x.dtype).tiny).log()
        self.centre.lerp_(now, 1 - self.momentum)

    def forward(self, h_s, p_t, protos_s, protos_t, step):
        # fast/losses.py has no gradient for a temperature that a fork trains
        trains_tau = torch.is_tensor(self.tau) and self.tau.requires_grad
        if not trains_tau and (fast := fast_losses(p_t.shape[-1], h_s, protos_s, protos_t)):
            return fast.dino(other_crop, h_s, p_t, protos_s, self.tau)
        z_s = protos_s.logits(h_s)  # (V, B, K)
        return dino(z_s, p_t, self.tau, protos_s.bias(self.tau))


# name of --method: the class, or "module.Class" of one that is loaded when it is asked for
LOSSES = {
    "carp": CARPLoss,
    "carl": CARPLoss,  # one block of K prototypes
    "dino": DINOLoss,
    "swav": "zoo.swav.SwAV",
    "deepcluster": "zoo.kmeans.DeepCluster",
    "sop": "zoo.bank.SOP",
    "carp-uniform": "zoo.uniformity.UniformCARP",
    "supervised": "zoo.supervised.Supervised",
}


def loss_class(name):
    """The class that the table has under a name; Loss for a name that is not in the table."""
    return loaded(LOSSES.get(str(name), Loss))


def loss(args, steps_per_epoch=1):
    """The loss that --method names; steps_per_epoch: steps of one pass over the images."""
    return loss_class(args.method).from_args(args, steps_per_epoch)
