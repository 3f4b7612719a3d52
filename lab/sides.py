"""What bench.py compares: the sides of each item, ours, the plain way and the floor.

item(side, a) prepares one side at the sizes in the namespace a, and returns a function that does the work once and
returns what the sides can be checked by against each other. The floor is the matrix products alone.
"""
import time
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import fast.losses as blocks
import collapse
import data as sets
import eval_knn
import losses
import models
from support import shapes
import views
from gmm import OnlineGMM


def gmm(side, a):
    """One update of the mixture (A.1 to A.6) with N vectors."""
    gen, eta, beta = torch.Generator().manual_seed(0), 0.9, 0.3
    h = torch.randn(a.N, a.D, generator=gen).to(a.device)  # (N, D)
    if side == "floor":  # A.1 and A.2, one product each with [h, h^2]
        x, w = torch.cat([h, h * h], 1), torch.randn(a.K, 2 * a.D, generator=gen).to(a.device)  # (N, 2D) (K, 2D)
        T = torch.empty_like(w)  # (K, 2D)

        def products():
            for rows, out in zip(w.split(2048), T.split(2048)):
                torch.mm((x @ rows.T).T, x, out=out)
            return T
        return products
    mix = OnlineGMM(a.K, a.D, resurrect=None).to(a.device)
    mix.init_from(h)
    if side != "plain":
        return lambda: mix.update(h, beta, eta, keep=2 ** 25 if side == "streaming" else 2 ** 40) and mix.S_mu
    params = [mix.mu, mix.var]

    def plain():  # the equations as printed, one after the other
        mu, var = params
        log_p = -0.5 * ((h * h) @ (1 / var).T - 2 * h @ (mu / var).T + (mu * mu / var).sum(1) + var.log().sum(1))
        gamma = (mix.log_pi + beta * log_p).softmax(1)  # (N, K)
        w = eta ** gamma.double().mean(0)  # (K,)
        mix.S_pi = w * mix.S_pi + (1 - w) * gamma.sum(0)
        mix.S_mu = w[:, None] * mix.S_mu + (1 - w)[:, None] * (gamma.T @ h)
        mix.S_sig = w[:, None] * mix.S_sig + (1 - w)[:, None] * (gamma.T @ (h * h))
        params[0] = (mix.S_mu / mix.S_pi[:, None]).float()
        params[1] = (mix.S_sig / mix.S_pi[:, None] - params[0].double() ** 2).float()
        mix.log_pi = (mix.S_pi / mix.S_pi.sum()).log().float()
        return mix.S_mu
    return plain


def loss(side, a):
    """CARP's loss, forward and backward, on V views of B images, against prototypes brought to length one; joint: they
    have a gradient, and the teacher has a set of its own."""
    gen = torch.Generator().manual_seed(0)
    h_s, h_t = (torch.randn(v, a.B, a.D, generator=gen).to(a.device) for v in (a.V, 2))
    W_s = torch.randn(a.K, a.D, generator=gen).to(a.device)  # (K, D)
    W_t = torch.randn(a.K, a.D, generator=gen).to(a.device) if a.joint else W_s  # (K, D)
    perm = torch.randperm(a.K, generator=gen).to(a.device)

    def floor():  # logits of student and teacher, gradients of h and (joint) C
        h, t = h_s.flatten(0, 1), h_t.flatten(0, 1)
        for k in range(0, a.K, 2048):
            z = h @ W_s[k:k + 2048].T
            t @ W_t[k:k + 2048].T, z @ W_s[k:k + 2048], z.T @ h if a.joint else None
    if side == "floor":
        return floor
    h_s.requires_grad_(), W_s.requires_grad_(a.joint)

    def run():
        h_s.grad = W_s.grad = None
        if side == "ours":
            terms = blocks.carp_blocks(h_s, h_t, W_s, W_t, a.P, perm, unit=True)
        else:
            C_s = F.normalize(W_s, dim=1)
            C_t = F.normalize(W_t, dim=1) if a.joint else C_s
            terms = losses.carp(h_s @ C_s.T, h_t @ C_t.T, a.P, perm)
        sum(terms.values()).backward()
        return (h_s.grad, W_s.grad) if a.joint else h_s.grad
    return run


def dino(side, a):
    """DINO's cross-entropy, forward and backward, against given teacher probabilities; prototypes as in `loss`."""
    gen = torch.Generator().manual_seed(0)
    h_s = F.normalize(torch.randn(a.V, a.B, a.D, generator=gen), dim=-1).to(a.device).requires_grad_()
    W = torch.randn(a.K, a.D, generator=gen).to(a.device).requires_grad_(a.joint)  # (K, D)
    p_t = torch.randn(2, a.B, a.K, generator=gen).to(a.device).softmax(-1)  # (2, B, K)

    def run():
        h_s.grad = W.grad = None
        if side == "ours":
            blocks.dino_blocks(h_s, p_t, W, unit=True).backward()
        else:
            losses.dino(h_s @ F.normalize(W, dim=1).T, p_t)["cross_entropy"].backward()
        return (h_s.grad, W.grad) if a.joint else h_s.grad
    return run


def unique(side, a):
    """Unique prototypes of Def. 2.1 at eps 0.025, K random directions: all distinct, the most work there is."""
    C = torch.randn(a.unique, a.D, generator=torch.Generator().manual_seed(0))  # (K, D)
    X = F.normalize(C, dim=1)

    def plain():  # each row against the representatives so far
        kept, n, found = torch.empty_like(X), 0, []
        for i, x in enumerate(X):
            if n == 0 or (kept[:n] @ x).max() <= 1 - 0.025:
                kept[n], n = x, n + 1
                found.append(i)
        return torch.tensor(found)

    def floor():  # every pair once: half the symmetric product
        for i in range(0, len(X), 2048):
            for j in range(0, i + 1, 2048):
                X[i:i + 2048] @ X[j:j + 2048].T
    return {"ours": lambda: collapse.unique_prototypes(C, 0.025), "plain": plain, "floor": floor}[side]


def knn(side, a):
    """Scores of the weighted k-NN, k 20, 384 dimensions."""
    gen = torch.Generator().manual_seed(0)
    bank, test = (F.normalize(torch.randn(n, 384, generator=gen), dim=1) for n in (a.bank, a.queries))
    y = torch.randint(0, 100, (a.bank,), generator=gen)

    def plain():  # DINO's script: all similarities of 100 queries, topk, one-hot votes
        out = []
        for part in test.split(100):
            sim, index = (part @ bank.T).topk(20)
            out.append((F.one_hot(y[index], 100) * (sim / 0.07).exp()[..., None]).sum(1))
        return torch.cat(out)

    def floor():
        for part in test.split(1024):
            for rows in bank.split(16384):
                part @ rows.T
    return {"ours": lambda: eval_knn.knn_scores(bank, y, test, num_classes=100), "plain": plain, "floor": floor}[side]


def data(side, a):
    """Multi-crop views of 32 images of the default preset."""
    x, _, _ = shapes.make(200, 0)
    recipe = views.Recipe(32, 16, 4, (0.4, 1.0), (0.15, 0.5), (0.4, 0.4, 0.4, 0.2), 0.8, 0.3, (0, 0, 0), (0, 0, 0))
    if side == "ours":
        images = sets.Images(x, None, [], "shapes")
        steps = views.batches(images, recipe, batch_size=32, seed=0, start=0, stop=10 ** 9)
        return lambda: next(steps)[0]
    crops = views.Crops(SimpleNamespace(read=lambda i: (x[i], None)), recipe, 0)
    return lambda: views.collate([crops[i, 0, i] for i in range(32)])[0][0]


def lightly_loop(workers):
    """images/s of lightly's DINO on the model, crops and batch of the default preset, with that many processes for the
    crops; None if it is not installed."""
    try:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import update_momentum
        from lightly.transforms.dino_transform import DINOTransform
    except ImportError:
        return None
    from torchvision.transforms.functional import to_pil_image
    x, _, _ = shapes.make(400, 0)
    crops = DINOTransform(global_crop_size=32, local_crop_size=16, n_local_views=4, global_crop_scale=(0.4, 1.0),
                          local_crop_scale=(0.15, 0.5), gaussian_blur=(0, 0, 0), solarization_prob=0)
    images = [to_pil_image(image) for image in x]
    nets = [torch.nn.ModuleList([models.build("vit_nano", patch_size=8, img_size=32),
                                 DINOProjectionHead(96, 256, 128, 1024, batch_norm=True)]) for _ in range(2)]
    (student, teacher), criterion = nets, DINOLoss(output_dim=1024)
    teacher.load_state_dict(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(range(1280), 32, num_workers=workers, collate_fn=lambda ids: [
        torch.stack(view) for view in zip(*(crops(images[i % 400]) for i in ids))])
    best, ticks = 0.0, [time.perf_counter()]
    for batch in loader:
        update_momentum(student, teacher, 0.99)
        with torch.no_grad():
            t = [teacher[1](teacher[0](view)[0]) for view in batch[:2]]
        criterion(t, [student[1](student[0](view)[0]) for view in batch], epoch=0).backward()
        optimizer.step()
        optimizer.zero_grad()
        ticks.append(time.perf_counter())
        if len(ticks) > 10:  # the best ten steps in a row, as the log of ours has ten
            best = max(best, 320 / (ticks[-1] - ticks[-11]))
    return best
