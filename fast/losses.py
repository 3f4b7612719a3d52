"""The losses of losses.py over blocks of prototypes: the same, without ever holding all logits.

At the paper's size (K 65,536; 12 crops of 128 images on each GPU) the student's logits are 400 MB,
and autograd keeps several tensors of that size. Here one block of prototypes is in memory at a
time. Each block contributes a few numbers to the loss: CARP's two terms, or DINO's sums over
prototypes. They are computed without a graph, and computed once more, with one, when the gradient
is asked for.

A prototype set is used by its scale, origin, directions() and bias(), so it must not override
`logits`, nor train its scale or origin.
Letters as in losses.py; ks (|ks|,) are the indices of the prototypes in a block.
"""
import torch


def logits_at_a_time(device):
    """Student logits of one block. On a CPU they should fit its caches."""
    return 2 ** 19 if device.type == "cpu" else 2 ** 24


class PerBlock(torch.autograd.Function):
    """f(h, *(x[ks] for x in cut), ks) of every block ks, stacked (blocks, ...).

    Gradients reach h and the tensors in `cut`, whose first dimension is K. Not differentiable
    twice.
    """

    @staticmethod
    def forward(ctx, f, blocks, h, *cut):
        ctx.f, ctx.blocks = f, blocks
        ctx.save_for_backward(h, *cut)
        return torch.stack([f(h, *(x[ks] for x in cut), ks) for ks in blocks])

    @staticmethod
    def backward(ctx, gradient):
        h, *cut = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]  # for each tensor in `cut`
        h = h.detach().requires_grad_()
        G_h = torch.zeros_like(h)
        G_cut = [torch.zeros_like(x) if w else None for x, w in zip(cut, wanted)]
        for ks, g in zip(ctx.blocks, gradient):
            parts = [x[ks].detach().requires_grad_(w) for x, w in zip(cut, wanted)]
            with torch.enable_grad():
                out = ctx.f(h, *parts, ks)
            inputs = [h] + [part for part in parts if part.requires_grad]
            gradients = iter(torch.autograd.grad(out, inputs, g))
            G_h += next(gradients)
            for G in G_cut:
                if G is not None:
                    G[ks] = next(gradients)
        return None, None, G_h, *G_cut


def carp(plain, h_s, h_t, protos_s, protos_t, partition_size, perm, mean_over_ranks=None):
    """losses.carp of the logits of h_s (V, B, D) and h_t (2, B, D): {"consistency", "entropy"}.

    plain: losses.carp itself, which computes each block; what is changed there is changed here.
    Both terms are means over partitions, so a block of whole partitions gives its share of them.
    A partition that alone has more logits than a block should have (CARL) is a block all the same.
    ValueError as there, of the block that is no multiple of the partition size.
    """
    (V, B, _), K, P = h_s.shape, len(perm), partition_size
    with torch.autocast(h_s.device.type, enabled=False):
        h_s, h_t = h_s.float() - protos_s.origin, (h_t.float() - protos_t.origin).detach()
        C_s = protos_s.directions()  # (K, D)
        C_t = None if protos_t is protos_s else protos_t.directions().detach()  # (K, D)
        names = []  # of the terms

        def share(h, c_s, ks):
            c_t = c_s.detach() if C_t is None else C_t[ks]  # (|ks|, D)
            z_s, z_t = protos_s.scale * (h @ c_s.T), protos_t.scale * (h_t @ c_t.T)
            terms = plain(z_s, z_t, P, mean_over_ranks=mean_over_ranks)
            names[:] = terms
            return torch.stack([*terms.values()]) * len(ks) / K  # (terms,)

        partitions = max(1, logits_at_a_time(h_s.device) // (V * B * P))
        terms = PerBlock.apply(share, perm.split(partitions * P), h_s, C_s).sum(0)  # (terms,)
    # clones, as autograd lets nobody change one of several views in place: terms["entropy"] *= 2
    return {name: term.clone() for name, term in zip(names, terms)}


def dino(other_crop, h_s, p_t, protos_s, tau=0.1):
    """losses.dino of the logits of h_s (V, B, D), with the teacher's p_t (2, B, K); other_crop: of
    losses.py.

    -sum_k p_t log softmax(z)_k = mass log sum_k exp z_k - sum_k p_t z_k, with mass = sum_k p_t: a
    block gives the logarithm of its part of the first sum, and its part of the second.
    """
    (V, B, _), K = h_s.shape, p_t.shape[-1]
    p_t, bias = p_t.detach(), protos_s.bias(tau)
    with torch.autocast(h_s.device.type, enabled=False):
        h_s, C = h_s.float() - protos_s.origin, protos_s.directions()  # (V, B, D) (K, D)

        def sums(h, c, *rest):
            *biases, ks = rest  # biases: [bias of these prototypes (|ks|,)], or []
            z = protos_s.scale / tau * (h @ c.T)  # (V, B, |ks|)
            z = z + biases[0] if biases else z
            cross = torch.einsum("ibk,jbk->bij", z, p_t[..., ks])  # (B, V, 2), sum_k p_t z
            return torch.cat([z.logsumexp(-1).T[..., None], cross], dim=2)  # (B, V, 3)

        size = max(1, logits_at_a_time(h_s.device) // (V * B))
        blocks = torch.arange(K, device=h_s.device).split(size)
        cut = (C, bias) if torch.is_tensor(bias) else (C,)
        parts = PerBlock.apply(sums, blocks, h_s, *cut)  # (blocks, B, V, 3)
        log_Z = parts[..., :1].logsumexp(0)  # (B, V, 1)
        cross, mass = parts[..., 1:].sum(0), p_t.sum(-1)  # (B, V, 2) (2, B)
        pairs = (log_Z * mass.T[:, None] - cross).mean(0)  # (V, 2)
    return {"cross_entropy": pairs[other_crop(V, h_s.device)].mean()}
