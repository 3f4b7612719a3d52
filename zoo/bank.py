"""--prototypes bank with --method sop: the class stream of SOP (Silva et al. 2025).

SOP stands for self-organising prototypes. zoo/sop.py trains patches in the same way beside it.

There is nothing to collapse here, as nothing is a prototype for longer than a step. A memory holds
the last teacher vectors. Each step draws K of them as anchors, and an anchor with the k vectors
nearest to it is one self-organising prototype (SOP):

    S.1  memory      unit teacher vectors of the second global crop, first in, first out. The
                     vectors of a step enter it after the step has used it
    S.2  members     K vectors of the memory are drawn at random as anchors. Each takes its k
                     nearest among the vectors that are no anchors. These k and the anchor are the
                     members of its SOP. Member m has the similarity s_m = <member, anchor>; the
                     anchor has 0.9
    S.3  share       member m counts s_m for its own SOP and (1 - s_m) / (K - 1) for each other one:
                     these are the rows of Y, and each sums to 1
    S.4  P(u) = softmax_m(scale <u, member_m> / tau) Y   (K,), for a unit vector u; --logit-scale is
                     the scale, 1 in the paper
    S.5  loss = mean over pairs of crops i != j of -sum_k P_j(h_t)_k log P_i(h_s)_k

A count of unique prototypes would say how alike the images are, since the memory consists of
vectors of images. So a run with this set prints the word "memory" in the place of a count.

    python train.py --method sop --prototypes bank --num-prototypes 128

    B images of a step, of all processes; M vectors of D dimensions in the memory
"""
import math

import torch
from torch.nn import functional as F

from heads import Frozen
from losses import Loss, dino

OF_ANCHOR = 0.9  # s of an anchor: its similarity to itself, 1, less a smoothing of 0.1


class Bank(Frozen):
    """A memory of M teacher vectors, and the K SOPs that the current step draws from it.

    k   neighbours of an anchor; 0: an anchor alone is a SOP
    B   vectors of a step that enter the memory, of all processes: one per image, or per patch
    of  "patch-" in a set of patches, whose flags have this in their names
    Raises ValueError for a memory too small for K anchors and k neighbours.
    differs: the memory needs not be a multiple of B long; similarities are held in [0, 1], so that
    no share is negative.
    """

    countable = False
    only_with = "sop"

    def __init__(self, K, D, scale=1.0, seed=0, *, M, k, B, of=""):
        if M < K + k:
            raise ValueError(f"--{of}memory {M} is too small for --num-{of}prototypes {K} anchors "
                             f"and --{of}neighbours {k} others")
        super().__init__(M, D, scale, seed)
        self.K, self.k, self.seed = K, k, seed
        self.register_buffer("memory", self.start.clone())  # (M, D)
        self.register_buffer("place", torch.tensor(0))  # of the oldest vector in the memory
        self.register_buffer("coming", torch.zeros(B, D))  # of the last step; enter at the next one
        self.members = None  # (K, k + 1, D), the anchor last; made by each step
        self.s = None  # (K, k + 1)

    @classmethod
    def from_args(cls, args, begin=0):
        return cls(args.num_prototypes, args.bottleneck_dim, args.logit_scale, args.seed,
                   M=args.memory or 64 * args.batch_size, k=args.neighbours, B=args.batch_size)

    def vectors(self):
        return self.memory

    @torch.no_grad()
    def step(self, h, step, beta=0.5):
        # S.1; a vector of the step before that was not finite left zeros in `coming`
        new = self.coming[self.coming.any(1)]  # (at most B, D)
        places = (self.place + torch.arange(len(new), device=h.device)) % len(self.memory)
        self.memory[places] = new
        self.place.copy_((self.place + len(new)) % len(self.memory))
        second = h.view(2, -1, h.shape[-1])[1].float()  # (B, D), of the second global crop
        finite = torch.isfinite(second).all(1, keepdim=True)  # (B, 1)
        self.coming.copy_(torch.where(finite, F.normalize(second, dim=1), 0))
        self.draw(step)
        return {}

    def draw(self, step):
        """S.2: which vectors are anchors is a function of (seed, step)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(len(self.memory), generator=generator).to(self.memory.device)  # (M,)
        anchors = self.memory[order[:self.K]]  # (K, D)
        others = self.memory[order[self.K:]]  # (M - K, D)
        s, nearest = (anchors @ others.T).topk(self.k, dim=1)  # (K, k) (K, k)
        self.members = torch.cat([others[nearest], anchors[:, None]], 1)  # (K, k + 1, D)
        self.s = F.pad(s.clamp(0, 1), (0, 1), value=OF_ANCHOR)  # (K, k + 1)

    def log_probabilities(self, u, tau):
        """S.4: log P(u) of unit vectors u (..., D), (..., K)."""
        with torch.autocast(u.device.type, enabled=False):
            z = self.scale * u.float() @ self.members.flatten(0, 1).T / tau  # (..., K (k + 1))
            w = z.softmax(-1).unflatten(-1, (self.K, self.k + 1))  # (..., K, k + 1)
        # S.3: a row of Y is s_m at its own SOP and `other` at the rest. So P is the sum of `other`
        # over all members, and (s - other) from the SOP's own members on top
        other = (1 - self.s) / (self.K - 1)  # (K, k + 1)
        P = (w * (self.s - other)).sum(-1) + (w * other).sum((-2, -1))[..., None]  # (..., K)
        return P.clamp_min(torch.finfo(P.dtype).tiny).log()


class SOP(Loss):
    """S.5, with temperature tau of the student and tau_t of the teacher."""

    only_with = "bank"
    unit_h = True
    teacher_temp = (0.04, 0.04)

    def __init__(self, K, tau, tau_t):
        super().__init__()
        self.tau, self.tau_t = tau, tau_t
        self.uniform = math.log(K)

    @classmethod
    def from_args(cls, args, steps_per_epoch):
        return cls(args.num_prototypes, args.student_temp, args.teacher_temp[1])

    @torch.no_grad()
    def targets(self, h_t, protos_t, step):
        return protos_t.log_probabilities(h_t, self.tau_t).exp()  # (2, B, K)

    def forward(self, h_s, P_t, protos_s, protos_t, step):
        # the softmax inside `dino` leaves log P as it is, since P sums to 1
        return dino(protos_s.log_probabilities(h_s, self.tau), P_t, tau=1.0)
