"""--method carp-uniform: CARP, and a term that spreads the student's vectors over the sphere.

CARP's entropy term asks that the prototypes of a block be used equally. Random directions cannot be
used equally by vectors that lie close together, so with them the term spreads the vectors. For
prototypes that follow the vectors, it is met wherever the vectors lie, and spreads nothing. Here
the spread is asked for outright, with the uniformity of Wang and Isola (2020), whatever the
prototypes do:

    U.1  log mean over pairs of images a != b of exp(-2 |u_a - u_b|^2), u = h / |h| of one view

It is 0 if all vectors are equal, and lowest if they spread evenly. The term must not be strong: at
weight 0.5 the vectors spread, and consistency hardly falls (docs/space.md).

    python train.py --method carp-uniform --prototypes live
"""
import math

from torch.nn import functional as F

from losses import CARPLoss
from support import ddp


class UniformCARP(CARPLoss):
    """CARP's terms, and `uniformity`: U.1 of the first two views, times --uniformity."""

    def __init__(self, K, partition_size, seed=0, weight=0.05):
        super().__init__(K, partition_size, seed)
        self.weight = weight

    @classmethod
    def from_args(cls, args, steps_per_epoch):
        return cls(args.num_prototypes, args.partition_size, args.seed, args.uniformity)

    def forward(self, h_s, h_t, protos_s, protos_t, step):
        terms = super().forward(h_s, h_t, protos_s, protos_t, step)
        spread = sum(uniformity(gathered(h)) for h in h_s[:2]) / 2
        return terms | {"uniformity": self.weight * spread}


def gathered(h):
    """h (B, D) of this process -> (B processes, D) of all of them in turn. Differentiable."""
    blocks = h.new_zeros(ddp.WORLD, *h.shape)  # (processes, B, D), all 0 but for this one's
    blocks[ddp.RANK] = ddp.WORLD * h
    return ddp.mean_over_ranks(blocks).flatten(0, 1)


def uniformity(h):
    """U.1 of h (B, D): a scalar; 0 for a single vector."""
    B = len(h)
    if B < 2:
        return h.sum() * 0
    u = F.normalize(h.float(), dim=1)  # (B, D)
    squared = 2 - 2 * u @ u.T  # (B, B), |u_a - u_b|^2
    squared = squared.fill_diagonal_(math.inf)  # no pairs of an image with itself
    return (-2 * squared).exp().sum().div(B * (B - 1)).log()
