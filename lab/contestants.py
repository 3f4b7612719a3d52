"""What bench.py compares: an item is one piece of work, and each contestant does it in its own way.

    ours       fast/gmm.py with everything in memory (gmm) and fast/losses.py (loss, dino), whatever
               the size; for other items what this project runs at that size
    streaming  the fast mixture with a part of the vectors in memory at a time
    readable   the mixture of gmm.py, which runs where N K is small
    plain      the equations as printed, or the usual code for that work
    floor      the matrix products alone, which everybody needs

ITEM(way, sizes) prepares one contestant and returns a function that does the work once. `sizes` is
a namespace with the sizes, the device and, for losses, `joint`; see SIZES in bench.py. All
contestants of an item but the floor return the same tensors, which tests/test_bench.py compares;
those of `data` return other crops of the same shape.
"""
import time
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import collapse
import data as image_sets
import eval_knn
import fast.knn  # noqa: F401  loaded now, so that no turn is charged for it; see eval_knn.py
import fast.losses
import fast.unique  # noqa: F401  the same, see collapse.py
import heads
import losses
import models
import views
from fast.gmm import FastGMM
from gmm import OnlineGMM
from support import shapes
from zoo.ibot import PatchLoss, row_weights

BETA, ETA = 0.3, 0.9
# what the fast mixture keeps in memory: everything at once, or 2^25 numbers at a time
KEEP = {"ours": 2 ** 40, "streaming": 2 ** 25}


def random_tensors(sizes):
    """A function (shape) -> random tensor on the device; the same ones in every process."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(sizes.device)


# ---- the mixture -------------------------------------------------------------------------------
def gmm(way, sizes):
    """One update of the mixture (A.1 to A.5) with N vectors. Returns S_mu (K, D)."""
    K, D = sizes.K, sizes.D
    randn = random_tensors(sizes)
    h = randn(sizes.N, D)  # (N, D)
    if way == "floor":
        return mixture_products(h, randn(K, 2 * D))
    if way in KEEP:
        mixture = FastGMM(K, D, keep=KEEP[way], resurrect=None)
    else:
        mixture = OnlineGMM(K, D, resurrect=None)
    mixture = mixture.to(sizes.device)
    mixture.init_from(h)
    if way == "plain":
        mixture = PrintedGMM(mixture)

    def work():
        mixture.update(h, BETA, ETA)
        return mixture.S_mu
    return work


def mixture_products(h, W):
    """The products of A.1 and A.2 with x = [h, h^2] (N, 2D), for weights W (K, 2D)."""
    x = torch.cat([h, h * h], dim=1)  # (N, 2D)
    T = torch.empty_like(W)  # (K, 2D)

    def work():
        for W_ks, T_ks in zip(W.split(2048), T.split(2048)):
            z = x @ W_ks.T  # (N, |ks|)
            torch.mm(z.T, x, out=T_ks)
    return work


class PrintedGMM:
    """The mixture as the paper prints it: one equation after the other, on whole tensors."""

    def __init__(self, mixture):
        self.S_pi, self.S_mu, self.S_sig = mixture.S_pi, mixture.S_mu, mixture.S_sig
        self.log_pi, self.mu, self.var = mixture.log_pi, mixture.mu, mixture.var

    def update(self, h, beta, eta):
        mu, var = self.mu, self.var
        # A.1, up to the factor (2 pi)^(-D / 2), which all components share
        square = (h * h) @ (1 / var).T - 2 * h @ (mu / var).T + (mu * mu / var).sum(1)  # (N, K)
        log_P = -(square + var.log().sum(1)) / 2  # (N, K)
        gamma = (self.log_pi + beta * log_P).softmax(1)  # (N, K)
        # A.2 and A.3
        kept = eta ** gamma.double().mean(0)  # (K,), eta^g
        self.S_pi = kept * self.S_pi + (1 - kept) * gamma.sum(0)
        kept = kept[:, None]  # (K, 1)
        self.S_mu = kept * self.S_mu + (1 - kept) * (gamma.T @ h)
        self.S_sig = kept * self.S_sig + (1 - kept) * (gamma.T @ (h * h))
        # A.5
        n = self.S_pi[:, None]  # (K, 1)
        self.mu = (self.S_mu / n).float()
        self.var = (self.S_sig / n - self.mu.double() ** 2).float()
        self.log_pi = (self.S_pi / self.S_pi.sum()).log().float()


# ---- the losses --------------------------------------------------------------------------------
def prototype_sets(sizes):
    """(student's set, teacher's set) of K prototypes.

    sizes.joint: they are trained, and the teacher has a copy that lags behind. Otherwise it is one
    set without a gradient, as the mixture's means are.
    """
    if not sizes.joint:
        protos = heads.Frozen(sizes.K, sizes.D).to(sizes.device)
        return protos, protos
    protos_s = heads.Joint(sizes.K, sizes.D).to(sizes.device)
    protos_t = protos_s.twin()
    generator = torch.Generator().manual_seed(1)
    lag = torch.randn(sizes.K, sizes.D, generator=generator) * sizes.D ** -0.5  # (K, D)
    protos_t.weight += lag.to(sizes.device)
    return protos_s, protos_t


def loss(way, sizes):
    """CARP's loss of V views of B images. Returns its gradients: of h, and of joint prototypes."""
    K, P = sizes.K, sizes.P
    randn = random_tensors(sizes)
    h_s = randn(sizes.V, sizes.B, sizes.D)  # (V, B, D)
    h_t = randn(2, sizes.B, sizes.D)  # (2, B, D)
    protos_s, protos_t = prototype_sets(sizes)
    if way == "floor":
        return loss_products(h_s, h_t, protos_s, protos_t, sizes.joint)
    perm = torch.randperm(K, generator=torch.Generator().manual_seed(2)).to(sizes.device)  # (K,)
    h_s.requires_grad_()

    def work():
        if way == "ours":
            terms = fast.losses.carp(losses.carp, h_s, h_t, protos_s, protos_t, P, perm)
        else:
            terms = losses.carp(protos_s.logits(h_s), protos_t.logits(h_t), P, perm)
        return torch.autograd.grad(sum(terms.values()), [h_s, *protos_s.parameters()])
    return work


def loss_products(h_s, h_t, protos_s, protos_t, joint):
    """The logits of student and teacher, and the products of the gradients of h and joint C."""
    h_s, h_t = h_s.flatten(0, 1), h_t.flatten(0, 1)  # (V B, D) (2 B, D)
    C_s, C_t = protos_s.directions().detach(), protos_t.directions().detach()  # (K, D) each

    def work():
        for c_s, c_t in zip(C_s.split(2048), C_t.split(2048)):
            z = h_s @ c_s.T  # (V B, |ks|)
            h_t @ c_t.T
            z @ c_s
            if joint:
                z.T @ h_s
    return work


def dino(way, sizes):
    """DINO's cross-entropy with given probabilities of the teacher. Returns what `loss` returns."""
    randn = random_tensors(sizes)
    h_s = F.normalize(randn(sizes.V, sizes.B, sizes.D), dim=-1).requires_grad_()  # (V, B, D)
    p_t = randn(2, sizes.B, sizes.K).softmax(-1)  # (2, B, K)
    protos, _ = prototype_sets(sizes)

    def work():
        if way == "ours":
            terms = fast.losses.dino(losses.other_crop, h_s, p_t, protos)
        else:
            terms = losses.dino(protos.logits(h_s), p_t)
        return torch.autograd.grad(terms["cross_entropy"], [h_s, *protos.parameters()])
    return work


def patches(way, sizes):
    """The head and iBOT's loss of the hidden patches of 2 B crops of 64 patches, of which 15 % are
    hidden. `plain` puts all patches through the head, as the official code does. Returns the
    gradient of the backbone's patches."""
    randn = random_tensors(sizes)
    crops, n, dim = 2 * sizes.B, 64, 192
    x = randn(crops, n, dim).requires_grad_()  # (2B, n, dim)
    hidden = randn(crops, n) > 1.04  # (2B, n), 15 %
    rows = hidden.nonzero()  # (m, 2)
    p_t = randn(len(rows), sizes.K).softmax(-1)  # (m, K)
    protos, _ = prototype_sets(sizes)
    torch.manual_seed(0)  # the same head for both ways
    head = heads.Head(dim, 512, sizes.D, norm=True).to(sizes.device)
    loss = PatchLoss(sizes.K, 1).to(sizes.device)
    weights = row_weights(hidden, rows)  # (m,)

    def work():
        if way == "ours":
            value = loss(head(x[rows[:, 0], rows[:, 1]]), p_t, weights, protos)
        else:
            z = protos.logits(head(x.flatten(0, 1))) / loss.tau  # (2B n, K)
            log_p = z.log_softmax(-1).view(crops, n, -1)[rows[:, 0], rows[:, 1]]  # (m, K)
            value = -(weights * (p_t * log_p).sum(-1)).sum()
        return torch.autograd.grad(value, [x])
    return work


# ---- duplicates and neighbours -----------------------------------------------------------------
def unique(way, sizes):
    """Unique prototypes (Def. 2.1) at eps 0.025 of random directions. Returns their indices.

    All of them are distinct where D is large, which is the most work there is.
    """
    C = random_tensors(sizes)(sizes.unique, sizes.D)  # (K, D)
    X = F.normalize(C, dim=1)  # (K, D)

    def ours():
        return collapse.unique_prototypes(C, 0.025)

    def plain():
        representatives = torch.empty_like(X)  # as many rows of it as there are indices
        indices = []
        for i, x in enumerate(X):
            n = len(indices)
            if n == 0 or (representatives[:n] @ x).max() <= 1 - 0.025:
                representatives[n] = x
                indices.append(i)
        return torch.tensor(indices)

    def floor():  # every pair once: half of the symmetric product
        for i in range(0, len(X), 2048):
            for j in range(0, i + 1, 2048):
                X[i:i + 2048] @ X[j:j + 2048].T

    return {"ours": ours, "plain": plain, "floor": floor}[way]


def knn(way, sizes):
    """Scores (queries, 100) of the weighted k-NN with k 20, in 384 dimensions."""
    randn = random_tensors(sizes)
    bank = F.normalize(randn(sizes.bank, 384), dim=1)  # (N, D)
    queries = F.normalize(randn(sizes.queries, 384), dim=1)  # (M, D)
    y = torch.arange(sizes.bank, device=sizes.device) % 100  # (N,)

    def ours():
        return eval_knn.knn_scores(bank, y, queries, num_classes=100)

    def plain():  # DINO's script: all similarities of 100 queries, topk, one-hot votes
        scores = []
        for q in queries.split(100):
            sim, index = (q @ bank.T).topk(20)  # (100, 20) each
            votes = (sim / 0.07).exp()  # (100, 20)
            scores.append((F.one_hot(y[index], 100) * votes[..., None]).sum(1))
        return torch.cat(scores)

    def floor():
        for q in queries.split(1024):
            for images in bank.split(16384):
                q @ images.T

    return {"ours": ours, "plain": plain, "floor": floor}[way]


# ---- images ------------------------------------------------------------------------------------
def data(way, sizes):
    """The views of 64 images as the default run makes them. Returns the first (64, 3, 32, 32)."""
    x = shapes.make(200, 0)[0]  # (200, 3, 32, 32)
    recipe = views.Recipe(global_size=32, local_size=16, n_local=4,
                          global_scale=(0.4, 1.0), local_scale=(0.15, 0.5),
                          jitter=(0.4, 0.4, 0.4, 0.2), jitter_p=0.8, gray_p=0.3,
                          blur_p=(0, 0, 0), solarize_p=(0, 0, 0))
    images = image_sets.Images(x, None, [], "shapes")
    steps = views.batches(images, recipe, batch_size=64, seed=0, start=0, stop=10 ** 9)
    one_by_one = views.Crops(SimpleNamespace(read=lambda i: (x[i], None)), recipe, 0)

    def ours():
        return next(steps)[0]

    def plain():  # torchvision, an image at a time
        crops, _ = views.collate([one_by_one[i, 0, i] for i in range(64)])
        return crops[0]

    return {"ours": ours, "plain": plain}[way]


# ---- a whole training loop of others -----------------------------------------------------------
def lightly_loop(workers):
    """images/s of lightly's DINO with the network and the batch of the default run.

    Its crops have the sizes and scales of the default run; their colours change as lightly has it.
    workers: processes that make the crops. None if lightly is not installed.
    """
    try:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import update_momentum
        from lightly.transforms.dino_transform import DINOTransform
    except ImportError:
        return None
    from torchvision.transforms.functional import to_pil_image
    x = shapes.make(400, 0)[0]  # (400, 3, 32, 32)
    images = [to_pil_image(image) for image in x]
    crops = DINOTransform(global_crop_size=32, local_crop_size=16, n_local_views=4,
                          global_crop_scale=(0.4, 1.0), local_crop_scale=(0.15, 0.5),
                          gaussian_blur=(0, 0, 0), solarization_prob=0)

    def collate(ids):
        views_of_images = zip(*(crops(images[i % 400]) for i in ids))
        return [torch.stack(view) for view in views_of_images]

    def network():
        backbone = models.build("vit_nano", patch_size=8, img_size=32)
        head = DINOProjectionHead(96, 256, 128, 1024, batch_norm=True)
        return torch.nn.ModuleList([backbone, head])

    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    criterion = DINOLoss(output_dim=1024)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(range(2560), 64, num_workers=workers, collate_fn=collate)
    fastest = 0.0
    times = [time.perf_counter()]  # after each step
    for batch in loader:
        update_momentum(student, teacher, 0.99)
        with torch.no_grad():
            p_t = [teacher[1](teacher[0](view)[0]) for view in batch[:2]]
        p_s = [student[1](student[0](view)[0]) for view in batch]
        criterion(p_t, p_s, epoch=0).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        if len(times) > 10:  # the fastest ten steps in a row, as a row of our log is of ten
            fastest = max(fastest, 640 / (times[-1] - times[-11]))
    return fastest
