"""Classifiers on frozen features, by five solvers, and the measures of VOC: tensors in, tensors
out. All but `attentive` are linear.

    solver      protocol                                             method
    lbfgs       Fig. 4b, Table A.1 (Appendix B.1.2)                  full batch, torch.optim.LBFGS
    grid        Tables 3 and C.1 (the light grid of CAPI)            AdamW, every (lr, wd) at once
    attentive   CAPI's attentive probe                               the same, on patches
    sgd         DINO's linear protocol, Table 2                      SGD on the caller's batches
    logistic    Table 4 (Ericsson et al. 2021)                       scikit-learn, a path of C

Letters: N images, B images of a batch, D width of a feature, C classes, H heads, of which each is
one classifier; x (N, D), y (N,) in 0..C-1, W (C, D), b (C,). In `attentive`: n patches of an image
and A looks of a head, each at d = D / A channels (elsewhere these are the "heads" of an attention).
"""
import copy
import itertools
import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from support.pixels import IGNORED
from views import indices

LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)  # per 256 images of a batch
WDS = (5e-4, 1e-3, 5e-2)
GRID = list(itertools.product(LRS, WDS))  # CAPI, F.1: 30 heads
STRENGTHS = 1 / np.logspace(-6, 5, 45)  # scikit-learn's C; Ericsson et al.: 1e6 down to 1e-5
CHUNK = 1024  # rows of a product
BETAS = 0.9, 0.95  # of AdamW in the grids
PART = 2 ** 25  # numbers in the largest tensors of `attentive`


def standardise(x, *others):
    """[x and others], the mean of x's columns subtracted and their deviation divided out. A column
    that is constant in x becomes 0."""
    mean = x.mean(0)  # (D,)
    std = x.std(0, correction=0)  # (D,)
    std = std.where(std > 1e-6 * mean.abs(), torch.inf)
    return [(part - mean) / std for part in (x, *others)]


def split(n, share, order):
    """(training, validation): indices of n images. The first `share` of the permutation `order` is
    for validation, at least one image. ValueError where there is only one."""
    if n < 2:
        raise ValueError(f"{n} training image(s) are too few to hold some out for choosing; use "
                         "--protocol lbfgs")
    order = torch.as_tensor(order)  # (n,)
    n_val = max(1, int(share * n))
    return order[n_val:], order[:n_val]


def predict(x, W, b):
    """(N,) index of the largest logit."""
    return torch.cat([(part @ W.T + b).argmax(1) for part in x.split(CHUNK)])


# ---- L-BFGS --------------------------------------------------------------------------------------

def lbfgs(x, y, C, *, weight_decay=0.0, max_iter=150):
    """Softmax regression by L-BFGS over the full batch: W (C, D), b (C,), and its last loss.

    Appendix B.1.2: max_iter 150, tolerances 1e-5 on the gradient and 1e-9 on the change, history
    10. It leaves the rest open; here the weights start at zero, with a strong Wolfe line search at
    lr 1. "Batch size of 1024" is read as the rows of a product, the closure being the whole set:
    L-BFGS has no meaning on single batches. The loss is the mean cross-entropy +
    weight_decay / 2 |W|^2, so weight_decay = 1 / (C_sklearn N) is scikit-learn's.
    """
    W = x.new_zeros(C, x.shape[1], requires_grad=True)  # (C, D)
    b = x.new_zeros(C, requires_grad=True)  # (C,)
    solver = torch.optim.LBFGS([W, b], lr=1, max_iter=max_iter, tolerance_grad=1e-5,
                               tolerance_change=1e-9, history_size=10,
                               line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = weight_decay / 2 * W.square().sum()
        loss.backward()
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK)):
            share = F.cross_entropy(part @ W.T + b, labels, reduction="sum") / len(x)
            share.backward()
            loss = loss.detach() + share.detach()
        return loss

    solver.step(closure)
    return W.detach(), b.detach(), float(closure().detach())


# ---- grid ----------------------------------------------------------------------------------------

def warm_cosine(step, steps):
    """Factor of the learning rate: linear from 0 over the first tenth, then a cosine to 0."""
    warmup = steps // 10
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def adamw(p, g, moments, rate, wd, step):
    """Step number `step`, from 0, of AdamW: changes p, whose gradient is g, and its two moments.
    rate, wd: numbers, or tensors that broadcast to p."""
    m, v = moments
    p *= 1 - rate * wd
    m.lerp_(g, 1 - BETAS[0])
    v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    m_hat = m / (1 - BETAS[0] ** (step + 1))
    v_hat = v / (1 - BETAS[1] ** (step + 1))
    p -= rate * m_hat / (v_hat.sqrt() + 1e-8)


@torch.no_grad()
def grid(x, y, C, heads=GRID, *, steps=12_500, batch_size=1024, seed=0, progress=False):
    """A softmax regression by AdamW for each (lr, wd) of heads, all at once: W (H, C, D), b (H, C).

    All weights lie beside each other: a step is one product for the logits and one for the
    gradient, H C columns wide. CAPI, F.1: betas (.9, .95), lr batch_size / 256, no decay on the
    bias, warm-up over a tenth, cosine to 0, weights truncated normal .02. A head among many becomes
    what it would become alone. progress: show a bar on a terminal.
    """
    # differs: all heads start from the same weights, so that they differ by (lr, wd) and not by
    # chance.
    N, D = x.shape
    H, device = len(heads), x.device
    batch_size = min(batch_size, N)
    lr, wd = torch.tensor(heads, dtype=x.dtype, device=device).T.repeat_interleave(C, 1)  # (HC,)
    start = torch.empty(D, C, dtype=x.dtype)
    torch.nn.init.trunc_normal_(start, std=0.02, generator=torch.Generator().manual_seed(seed))
    W = start.repeat(1, H).to(device)  # (D, HC)
    b = x.new_zeros(H * C)  # (HC,)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (W, b)]
    bar = tqdm(range(steps), desc=f"{H} heads", leave=False, disable=None if progress else True)
    for step in bar:
        batch = indices(N, batch_size, seed, step).to(device)  # (B,)
        h, labels = x[batch], y[batch]  # (B, D), (B,)
        G = (h @ W + b).view(batch_size, H, C).softmax(2)  # (B, H, C)
        G[torch.arange(batch_size, device=device), :, labels] -= 1  # gradient by the logits
        G = G.view(batch_size, H * C) / batch_size
        rate = lr * batch_size / 256 * warm_cosine(step, steps)  # (HC,)
        adamw(W, h.T @ G, moments[0], rate, wd, step)
        adamw(b, G.sum(0), moments[1], rate, 0, step)
    return W.view(D, H, C).permute(1, 2, 0).contiguous(), b.view(H, C)


def grid_accuracy(x, y, W, b):
    """(H,) top-1 in percent of each head, all heads in one product."""
    H, C, D = W.shape
    hits = 0
    for part, labels in zip(x.split(CHUNK), y.split(CHUNK)):
        logits = (part @ W.reshape(H * C, D).T).view(-1, H, C) + b  # (n, H, C)
        hits = hits + (logits.argmax(2) == labels[:, None]).sum(0)  # (H,)
    return 100 * hits / len(x)


# ---- attentive probe -----------------------------------------------------------------------------

class Attentive(NamedTuple):
    """The weights of H attentive heads; each has its own row of every tensor.

    A head looks at the patches x (n, D) of an image with one learned query. In channels, each of
    its A looks has d of D:

        share of patch i in a look     softmax over i of <query, key x_i> / sqrt(d)
        what the look gives            sum over i of share_i (value x_i + value_bias)
        logits (C,)                    W (the A looks side by side) + b

    The official probe has a bias in its keys too. It adds the same to all patches of a look, which
    the softmax does not notice, so it is left out.
    """
    query: torch.Tensor  # (H, D)
    key: torch.Tensor  # (H, D, D)
    value: torch.Tensor  # (H, D, D)
    value_bias: torch.Tensor  # (H, D)
    W: torch.Tensor  # (H, C, D)
    b: torch.Tensor  # (H, C)


def look_width(D):
    """d, channels of a look at features of width D. ValueError where D is no multiple of it."""
    # differs: CAPI has 64, which would leave one look or none to a small model.
    d = 64 if D >= 384 else 32
    if D % d:
        raise ValueError(f"--protocol attentive looks at the patches with {d} channels each time, "
                         f"and {D}, the width of this backbone, is not a multiple of {d}")
    return d


def images_at_a_time(n, D, H):
    """As many images as keep the largest tensors of attentive_logits, B H A (n + 2 D) numbers,
    within PART."""
    return max(1, PART // (H * D // look_width(D) * (n + 2 * D)))


def attentive_logits(x, heads):
    """Logits (H, B, C) of all heads for the patches x (B, n, D) of B images."""
    H, D = heads.query.shape
    d = look_width(D)
    # Of keys only their product with the one query is needed, and the values of a look are mixed
    # before they are computed, not after: so a head costs A vectors of D and not 2 n.
    query = heads.query.view(H, D // d, 1, d)
    key = heads.key.view(H, D // d, d, D)
    direction = (query @ key / math.sqrt(d)).flatten(0, 2)  # (H A, D)
    share = (x @ direction.T).softmax(1)  # (B, n, H A)
    mixed = (share.transpose(1, 2) @ x).view(len(x), H, D // d, D).permute(1, 2, 0, 3)
    value = heads.value.view(H, D // d, d, D).transpose(2, 3)  # (H, A, D, d)
    looks = (mixed @ value).transpose(1, 2).flatten(2)  # (H, B, D), mixed having been (H, A, B, D)
    looks = looks + heads.value_bias[:, None]
    return looks @ heads.W.transpose(1, 2) + heads.b[:, None]  # (H, B, C)


def attentive(x, y, C, heads=GRID, *, steps=12_500, batch_size=1024, seed=0, device="cpu",
              progress=False):
    """An attentive probe by AdamW for each (lr, wd) of heads, all at once: Attentive.

    x (N, n, D): the patches of N images, on the CPU; a batch of them is on `device` at a time.
    Optimiser, schedule, batches and start as in `grid`; weight decay is not for the biases. A head
    among many becomes what it would become alone.
    """
    N, n, D = x.shape
    H, batch_size = len(heads), min(batch_size, N)
    rows = images_at_a_time(n, D, H)
    generator = torch.Generator().manual_seed(seed)

    def start(*shape):  # the same of every head, as in grid
        weights = torch.empty(shape, dtype=x.dtype)
        torch.nn.init.trunc_normal_(weights, std=0.02, generator=generator)
        return weights.to(device).repeat(H, *[1] * len(shape))

    def zeros(size):
        return torch.zeros(H, size, dtype=x.dtype, device=device)

    probe = Attentive(start(D), start(D, D), start(D, D), zeros(D), start(C, D), zeros(C))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in probe]
    lr, wd = torch.tensor(heads, dtype=x.dtype, device=device).unbind(1)  # (H,) each
    for p in probe:
        p.requires_grad_()
    bar = tqdm(range(steps), desc=f"{H} heads", leave=False, disable=None if progress else True)
    for step in bar:
        for batch in indices(N, batch_size, seed, step).split(rows):
            logits = attentive_logits(x[batch].to(device), probe)  # (H, rows, C)
            labels = y[batch].to(device).repeat(H)  # (H rows,)
            loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            (loss / batch_size).backward()  # gradients of the parts of a batch add up
        rate = lr * batch_size / 256 * warm_cosine(step, steps)  # (H,)
        with torch.no_grad():
            for name, p, moment in zip(probe._fields, probe, moments):
                shape = H, *[1] * (p.ndim - 1)
                decay = 0 if name in ("value_bias", "b") else wd.view(shape)
                adamw(p, p.grad, moment, rate.view(shape), decay, step)
                p.grad = None
    return Attentive(*(p.detach() for p in probe))


@torch.no_grad()
def attentive_predict(batches, heads):
    """(H, M) index of the largest logit of each head, for `batches` (B, n, D) of the patches of M
    images in all, on the CPU."""
    H, D = heads.query.shape
    predicted = []
    for x in batches:
        for part in x.split(images_at_a_time(x.shape[1], D, H)):
            logits = attentive_logits(part.to(heads.query.device), heads)  # (H, rows, C)
            predicted.append(logits.argmax(2).cpu())
    return torch.cat(predicted, 1)


# ---- SGD -----------------------------------------------------------------------------------------

def sgd(batches, D, C, lrs, *, epochs, steps, device="cpu", seed=0):
    """Softmax regressions by SGD over `batches` of (h (B, D), labels (B,)), a head for each rate of
    lrs. Yields [(W (C, D), b (C,))] after each epoch.

    DINO's head: weights N(0, .01), bias 0, momentum .9, no decay, the rate a cosine from lr to 0
    that changes once an epoch. steps: batches of an epoch. All heads start alike and see the same
    batches.
    """
    start = 0.01 * torch.randn(C, D, generator=torch.Generator().manual_seed(seed))  # (C, D)
    heads = []
    for _ in lrs:
        W = start.to(device, copy=True).requires_grad_()  # (C, D)
        b = torch.zeros(C, device=device, requires_grad=True)  # (C,)
        heads.append((W, b))
    solver = torch.optim.SGD([{"params": head} for head in heads], lr=0.0, momentum=0.9,
                             weight_decay=0)
    batches = iter(batches)
    for epoch in range(epochs):
        for group, lr in zip(solver.param_groups, lrs):
            group["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for h, labels in itertools.islice(batches, steps):
            solver.zero_grad()
            sum(F.cross_entropy(h @ W.T + b, labels) for W, b in heads).backward()
            solver.step()
        yield [(W.detach(), b.detach()) for W, b in heads]


# ---- logistic regression -------------------------------------------------------------------------

def fit_logistic(x, y, C, models=None):
    """scikit-learn's logistic regressions at inverse strength C: a list of one, or of one for each
    column of a y (N, classes).

    models: those of another C, which the solver goes on from and leaves as they are. In a
    y (N, classes) of 1 and 0, rows of -1 are left out (VOC's difficult objects). Where only one
    label occurs there is nothing to fit: that label stands in the list. ValueError without
    scikit-learn.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ValueError("--protocol transfer needs scikit-learn (pip install scikit-learn)"
                         ) from None
    columns = y.unbind(1) if y.ndim == 2 else [y]
    fitted = []
    for column, model in zip(columns, models or [None] * len(columns)):
        counted = column >= 0  # (N,)
        labels = column[counted].numpy()
        classes = np.unique(labels)
        if len(classes) < 2:
            fitted.append(int(classes[0]) if len(classes) else 0)
            continue
        if not np.array_equal(getattr(model, "classes_", None), classes):
            model = LogisticRegression(solver="lbfgs", warm_start=True)  # other classes: from zero
        model = copy.deepcopy(model).set_params(C=C)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations are the protocol
            fitted.append(model.fit(x[counted].numpy(), labels))
    return fitted


def apply_logistic(models, x, scores_wanted=False):
    """Predicted labels (M,) of one model. scores_wanted: scores (M, classes), the decision function
    of each binary model."""
    x = x.numpy()
    if not scores_wanted:
        model, = models
        if isinstance(model, int):
            return torch.full((len(x),), model)
        return torch.from_numpy(model.predict(x))
    scores = [np.full(len(x), float(model)) if isinstance(model, int)
              else model.decision_function(x) for model in models]
    return torch.from_numpy(np.stack(scores, 1))  # (M, classes)


# ---- average precision ---------------------------------------------------------------------------

def map11(scores, y):
    """Mean over classes of VOC2007's 11-point average precision, percent.

    scores (M, C); y (M, C) of 1, 0, and -1 for images that do not count. For a class it is the mean
    over the recalls 0, .1, ..., 1 of the best precision at that recall or beyond. Equal scores keep
    their order; a class without positives is left out. ValueError where no class has any.
    """
    precisions = []  # average precision of each class
    for score, truth in zip(scores.unbind(1), y.unbind(1)):
        score, truth = score[truth >= 0], truth[truth >= 0]  # (M',) each
        order = score.argsort(descending=True, stable=True)  # (M',)
        hits = truth[order].double().cumsum(0)  # (M',)
        if not len(hits) or hits[-1] == 0:
            continue
        precision = hits / torch.arange(1, len(hits) + 1)  # (M',)
        # Recall hits / n >= t / 10 in whole numbers: 3 of 10 must count as .3, which floats may
        # deny it.
        n = hits[-1]
        best = [float(precision[10 * hits >= n * t].max()) for t in range(11)]
        precisions.append(sum(best) / 11)
    if not precisions:
        raise ValueError("average precision needs a positive test image of some class, and there "
                         "is none")
    return 100 * sum(precisions) / len(precisions)


# ---- segmentation --------------------------------------------------------------------------------

def confusion(predicted, maps, C):
    """(C, C) int64: pixels by true class (rows) and predicted class, of label maps of any one
    shape (n, ...). Pixels whose true label is IGNORED are not counted."""
    total = torch.zeros(C * C, dtype=torch.int64)
    for guess, truth in zip(predicted.split(64), maps.split(64)):
        counted = truth != IGNORED
        pairs = truth[counted].long() * C + guess[counted].long()
        total += pairs.bincount(minlength=C * C)
    return total.view(C, C)


def segmentation_measures(predicted, maps, C):
    """How far predicted label maps (n, ...) are the true ones, in percent: {"iou": (C,) float64,
    intersection over union of each class, nan for a class that is neither in the truth nor
    predicted; "miou": their mean over the other classes; "pixels": pixels labelled rightly}."""
    counts = confusion(predicted, maps, C)  # (C, C)
    hits = counts.diagonal()  # (C,)
    iou = 100 * hits.double() / (counts.sum(0) + counts.sum(1) - hits)  # (C,)
    return {"miou": float(iou.nanmean()), "pixels": 100 * float(hits.sum() / counts.sum()),
            "iou": iou}
