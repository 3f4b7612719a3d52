"""The losses of CARP, CARL and DINO, Sinkhorn-Knopp, and KoLeo: tensors in, named scalars out.

    z_s (V, B, K)   student logits of V views of B images; views 0 and 1 are the global ones
    z_t (2, B, K)   teacher logits of the global views; view i of z_s and z_t is the same crop, so i == j is skipped

The functions are the mathematics, to read and to paste; methods.py makes of them what train.py calls, and blocks.py has
CARP's once more, lean. On several ranks a mean over the batch that a logarithm is taken of must be the mean over all:
`mean_over_ranks` and `all_reduce` are passed in.
"""
import math

import torch
from torch.nn import functional as F

EPS = torch.finfo(torch.float32).eps  # CARP's official clamp: 1.19e-7 on both ends


def pairs(V):
    """(i, j): student view i is compared with teacher view j, another crop of the same image; 2V - 2 pairs."""
    return [(i, j) for j in range(2) for i in range(V) if i != j]


def carp(z_s, z_t, partition_size, perm=None, mean_over_ranks=None):
    """CARP (Silva and Ramirez Rivera 2023) as its official code computes it; partition_size = K is CARL.

    z_s (V, B, K), z_t (2, B, K) logits; perm (K,) the random order in which the prototypes are cut into
    K/partition_size blocks (None: as they come). Returns {"consistency", "entropy"}, 0-dim; their sum is the loss.
    There is no temperature.
    Raises ValueError if K is not a multiple of partition_size.
    """
    (V, B, K), P = z_s.shape, partition_size
    if K % P:
        raise ValueError(f"the number of prototypes ({K}) must be a multiple of the partition size ({P})")
    if perm is not None:
        z_s, z_t = z_s[..., perm], z_t[..., perm]
    p = z_s.float().reshape(V, B, K // P, P).softmax(-1)  # (V, B, K/P, P) per block
    q = z_t.detach().float().reshape(2, B, K // P, P).softmax(-1)  # (2, B, K/P, P)
    # consistency = mean over pairs i != j, images and blocks of -log sum_c p_ic q_jc                           Eq. 1
    agree = torch.stack([(p[i] * q[j]).sum(-1) for i, j in pairs(V)])  # (2V-2, B, K/P)
    consistency = -agree.clamp(EPS, 1 - EPS).log().mean()
    # entropy = mean over blocks of log P - H(p_bar), p_bar the mean over student and teacher views, images and ranks
    p_bar = (p.sum((0, 1)) + q.sum((0, 1))) / ((V + 2) * B)  # (K/P, P)
    p_bar = mean_over_ranks(p_bar) if mean_over_ranks else p_bar
    entropy = (math.log(P) + (p_bar * p_bar.clamp(EPS, 1 - EPS).log()).sum(-1)).mean()
    return {"consistency": consistency, "entropy": entropy}


def dino(z_s, p_t, tau=0.1, bias=0.0):
    """DINO's cross-entropy of student logits z_s (V, B, K) with teacher probabilities p_t (2, B, K).

    Returns {"cross_entropy"}: the mean over the 2V - 2 pairs i != j and the images of
    -sum_k p_t log softmax(z_s / tau + bias); tau is the student's temperature, bias (K,) is vMF's log-normaliser or 0.
    """
    log_p = (z_s.float() / tau + bias).log_softmax(-1)  # (V, B, K)
    terms = [-(p_t[j].detach() * log_p[i]).sum(-1).mean() for i, j in pairs(len(z_s))]
    return {"cross_entropy": torch.stack(terms).mean()}


@torch.no_grad()
def sinkhorn(z, tau, iters=3, all_reduce=None):
    """Balanced assignments (N, K) of teacher logits z (N, K) of this rank, rows summing to 1 (SwAV, DINOv2).

    Each round scales every prototype to the same total over the samples of all ranks, then every sample to 1.
    all_reduce(x, op): sums ("sum") or takes the maximum ("max") over the ranks; None on one process.
    """
    reduce = all_reduce or (lambda x, op="sum": x)
    z = z.float() / tau
    q = (z - reduce(z.max(), "max")).exp()  # one shift for all: cancels, and nothing overflows
    for _ in range(iters):
        q = q / reduce(q.sum(0)).clamp_min(torch.finfo(q.dtype).tiny)  # prototypes: equal mass
        q = q / q.sum(1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)  # samples: one each
    return q


def koleo(C, block=2 ** 26):
    """KoLeo on prototypes C (K, D): -mean_k log min_{i != k} ||c_k - c_i||, c of unit length (paper, Sec. 2.1).

    The neighbour is found without gradient in blocks of rows (the K x K matrix of 65,536 prototypes is 17 GB); the
    distance is differentiated through both ends. Exact duplicates feel no force, having no direction. K = 1 gives 0.
    """
    with torch.autocast(C.device.type, enabled=False):
        c = F.normalize(C.float(), dim=1)  # (K, D)
        if len(c) < 2:
            return c.sum() * 0
        with torch.no_grad():
            near = []
            for ks in torch.arange(len(c), device=c.device).split(max(1, block // len(c))):
                cos = c[ks] @ c.T  # (|ks|, K)
                cos[torch.arange(len(ks), device=c.device), ks] = -2  # not its own neighbour
                near.append(cos.argmax(1))
        d = (c - c[torch.cat(near)]).norm(dim=1)  # (K,)
        return -(d + 1e-8).log().mean()  # 1e-8: a duplicate costs 18 nats, not infinity
