"""The losses of losses.py over blocks of prototypes: the same values and gradients, without ever holding the logits.

At the paper's scale (K 65,536; 12 crops of 128 images on each GPU) the student's logits are 400 MB, and autograd keeps
several such tensors. Here a group of prototypes is in memory at a time. A loss is a scalar, so its gradients are formed
in the forward pass, while the group's probabilities are at hand, and kept instead of logits: (V, B, D) for h, and
(K, D) for prototypes that are trained. Nothing is computed twice, except where one softmax runs over all K.

    h_s (V, B, D)  student vectors of V views of B images          C_s (K, D)  the student's prototypes
    h_t (2, B, D)  teacher vectors of the two global views         C_t (K, D)  the teacher's; the same if not trained
    unit           whether prototypes count at length one: that too is done to a group at a time, forwards and backwards

losses.carp and losses.dino are the readable form, and the oracle of the tests.
"""
import math

import torch
from torch.nn import functional as F

EPS = torch.finfo(torch.float32).eps  # clamp of CARP's official code, as in losses.carp


def room(device):
    """(a, b): student logits in memory at a time. Groups of prototypes are made to have about a of them, which on a CPU
    fit its caches; what cannot be cut without work done twice may have b. About five tensors of that size are alive."""
    return (2 ** 18, 2 ** 22) if device.type == "cpu" else (2 ** 24, 2 ** 24)


class Known(torch.autograd.Function):
    """A loss () whose gradients with respect to `inputs` are known already: backward only scales them, in place, as a
    second (K, D) tensor would cost as much as the first. Hence one backward for each forward."""

    @staticmethod
    def forward(ctx, loss, gradients, *inputs):
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a loss over blocks can be asked for once; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(G if G is None else G.mul_(g) for G in gradients)


def others(V, device):
    """(V, 2): 1 where student view i meets teacher view j, 0 for the same crop."""
    return 1 - torch.eye(V, 2, device=device)


class Rows:
    """Some rows of C (K, D) as they meet h: .c is scale * C[ks], at length one if `unit`, and pull(d loss/d c) gives
    d loss/d C[ks]. trained: whether pull will be called."""

    def __init__(self, C, ks, unit, scale, trained):
        self.leaf = C[ks].detach().requires_grad_(trained)  # (|ks|, D)
        with torch.set_grad_enabled(trained):
            tiny = torch.finfo(C.dtype).tiny  # rows may be float64 and of any length above it
            self.graph = scale * (F.normalize(self.leaf, dim=1, eps=tiny) if unit else self.leaf)  # (|ks|, D)
        self.c = self.graph.detach().float()

    def pull(self, G):
        return torch.autograd.grad(self.graph, self.leaf, G)[0]


def carp_blocks(h_s, h_t, C_s, C_t, partition_size, perm=None, mean_over_ranks=None, scale=1.0, unit=False,
                budget=None):
    """losses.carp of the logits scale * h C: {"consistency", "entropy"}, 0-dim.

    perm (K,) as there; budget: student logits at a time, None: see room(). The gradient is that of the SUM, and hangs
    on "consistency" ("entropy" carries none): to weigh the terms differently, use losses.carp. Under several ranks all
    must hold equally many images. Raises ValueError if K is not a multiple of partition_size.
    """
    (V, B, D), K, P = h_s.shape, len(C_s), partition_size
    if K % P:
        raise ValueError(f"the number of prototypes ({K}) must be a multiple of the partition size ({P})")
    with torch.no_grad(), torch.autocast(h_s.device.type, enabled=False):
        total, entropy, gradients = _carp(h_s.detach().float(), h_t.detach().float(), C_s, None if C_t is C_s else C_t,
                                          P, torch.arange(K, device=h_s.device) if perm is None else perm,
                                          mean_over_ranks or (lambda x: x), scale, unit,
                                          (budget, budget) if budget else room(h_s.device))
    return {"consistency": Known.apply(total, gradients, h_s, C_s) - entropy, "entropy": entropy}


def _carp(h_s, h_t, C_s, C_t, P, perm, mean, scale, unit, budget):
    """The sum of both terms, the entropy term, and the gradients of the sum for h_s and (if trained) C_s."""
    (V, B, D), N, trained = h_s.shape, len(perm) // P, C_s.requires_grad  # N partitions
    h_s, h_t = (h.transpose(0, 1).contiguous() for h in (h_s, h_t))  # (B, V, D) (B, 2, D)
    G_h, G_C = torch.zeros_like(h_s), torch.empty_like(C_s) if trained else None
    consistency, entropy, other = h_s.new_zeros(()), h_s.new_zeros(()), others(V, h_s.device)
    # a group is of whole partitions; if one alone is too large (CARL), the images are taken in parts, twice
    images = range(0, B, part := max(1, min(B, budget[1] // (V * P))))

    def probabilities(b):
        return [(h[b:b + part].flatten(0, 1) @ c.mT).softmax(-1) for h, c in ((h_s, c_s), (h_t, c_t))]

    for ks in perm.split(max(1, budget[0] // (V * B * P)) * P):
        rows = Rows(C_s, ks, unit, scale, trained)
        c_s = rows.c.view(-1, P, D)  # (n, P, D)
        c_t = c_s if C_t is None else Rows(C_t, ks, unit, scale, False).c.view(-1, P, D)  # (n, P, D)
        n, p_bar, G = len(c_s), 0, 0
        for b in images:
            p, q = probabilities(b)  # (n, bV, P) (n, 2b, P)
            p_bar = p_bar + (p.sum(1) + q.sum(1)) / ((V + 2) * B)  # (n, P)
        # entropy = mean over partitions of log P - H(p_bar); the clamp has no gradient where it cuts
        p_bar = mean(p_bar)
        inside = p_bar.clamp(EPS, 1 - EPS)
        entropy += (math.log(P) + (p_bar * inside.log()).sum(-1)).sum() / N
        slope = (inside.log() + (inside == p_bar)) / (N * (V + 2) * B)  # (n, P), d entropy/d p
        for b in images:
            if len(images) > 1:
                p, q = probabilities(b)
            pairs = p.view(-1, V, P), q.view(-1, 2, P)  # (n b, V, P) (n b, 2, P)
            # consistency = mean over pairs i != j, images and partitions of -log agree, agree = sum_c p_ic q_jc
            agree = pairs[0] @ pairs[1].mT  # (n b, V, 2)
            inside = agree.clamp(EPS, 1 - EPS)
            weight = other / ((2 * V - 2) * B * N)  # (V, 2)
            consistency -= (weight * inside.log()).sum()
            weight = -weight * (inside == agree) / inside  # (n b, V, 2), d consistency/d agree
            # through the softmax: d/dz = p (g - sum_c p g), g = d/dp = weight q + slope
            mean_g = (weight * agree).sum(-1).view(n, -1, 1) + p @ slope[:, :, None]  # (n, bV, 1)
            g = torch.bmm(weight, pairs[1]).view_as(p).add_(slope[:, None]).sub_(mean_g).mul_(p)  # (n, bV, P)
            G_h[b:b + part] += torch.bmm(g, c_s).sum(0).view(-1, V, D)
            if trained:
                G = G + (g.mT @ h_s[b:b + part].flatten(0, 1)).view(-1, D)  # (|ks|, D)
        if trained:
            G_C[ks] = rows.pull(G)
    return consistency + entropy, entropy, (G_h.transpose(0, 1), G_C)


def dino_blocks(h_s, p_t, C, bias=None, tau=0.1, scale=1.0, unit=False, budget=None):
    """losses.dino's cross-entropy () of the logits scale * h C with the teacher's probabilities p_t (2, B, K).

    bias (K,): what comes on top of logits / tau, or None. Gradients reach h_s, C and bias. The softmax runs over all K:
    a block's share is rescaled whenever a larger logit turns up, as in attention that streams over its keys, since
    d/dh needs just that, the softmax's mean of the prototypes. budget: student logits at a time, None: see room().
    """
    with torch.no_grad(), torch.autocast(h_s.device.type, enabled=False):
        loss, gradients = _dino(h_s.detach().float(), p_t.detach().float(), C, None if bias is None else bias.detach(),
                                scale / tau, unit, budget or 2 * room(h_s.device)[0],
                                bias is not None and bias.requires_grad)
    return Known.apply(loss, gradients, h_s, C, bias)


def _dino(h_s, p_t, C, bias, scale, unit, budget, with_bias):
    """The loss, and its gradients for h_s, C (if trained) and bias (if it is there and trained)."""
    (V, B, D), K, trained = h_s.shape, len(C), C.requires_grad
    h, other = h_s.reshape(V * B, D), others(V, h_s.device)  # (VB, D) (V, 2)
    top, Z, mean_c = h.new_full((V * B, 1), -torch.inf), 0, 0
    target, on_bias = h.new_zeros(2, B, D), h.new_zeros(2, B)  # sums of p_t c, p_t bias over K
    blocks = [slice(k, k + max(1, budget // (V * B))) for k in range(0, K, max(1, budget // (V * B)))]

    def logits(c, ks):
        return h @ c.T if bias is None else torch.addmm(bias[ks], h, c.T)  # (VB, |ks|)

    for ks in blocks:
        c = Rows(C, ks, unit, scale, False).c  # (|ks|, D)
        z = logits(c, ks)
        old, top = top, torch.maximum(top, z.amax(1, keepdim=True))  # (VB, 1)
        e, shrink = z.sub_(top).exp_(), (old - top).exp()  # (VB, |ks|) (VB, 1)
        Z, mean_c = Z * shrink + e.sum(1, keepdim=True), mean_c * shrink + e @ c  # (VB, 1) (VB, D)
        target += p_t[..., ks] @ c
        if bias is not None:
            on_bias += p_t[..., ks] @ bias[ks]
    log_Z, mean_c, mass = top + Z.log(), (mean_c / Z).view(V, 1, B, D), p_t.sum(-1)  # (VB, 1) (V, 1, B, D) (2, B)
    # -sum_k p_t log softmax = log Z * mass - h . sum p_t c - sum p_t bias, mean over pairs and images
    weight = other / ((2 * V - 2) * B)  # (V, 2)
    pair = log_Z.view(V, 1, B) * mass - (h_s[:, None] * target).sum(-1) - on_bias  # (V, 2, B)
    loss = (weight[..., None] * pair).sum()
    G_h = (weight[..., None, None] * (mass[..., None] * mean_c - target)).sum(1)  # (V, B, D)
    G_C, G_b = torch.empty_like(C) if trained else None, torch.empty_like(bias) if with_bias else None
    if trained or with_bias:  # the probabilities themselves are needed: once more over the blocks
        row = (weight.T[..., None] * mass[:, None]).sum(0).view(V * B, 1)  # (VB, 1)
        partner = (weight.T @ h_s.flatten(1)).view(2 * B, D)  # (2B, D), what p_t meets
        for ks in blocks:
            rows, q = Rows(C, ks, unit, scale, trained), p_t[..., ks].flatten(0, 1)  # (2B, |ks|)
            p = logits(rows.c, ks).sub_(log_Z).exp_().mul_(row)  # (VB, |ks|)
            if trained:
                G_C[ks] = rows.pull(p.T @ h - q.T @ partner)
            if with_bias:
                G_b[ks] = p.sum(0) - q.sum(0) / (2 * B)  # weight sums to 1 / (2B) over the views
    return loss, (G_h, G_C, G_b)
