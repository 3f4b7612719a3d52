"""
Multi-crop views: `batches` for training, `eval_batches` without augmentation. A set is anything with `len` and either
`.x` (N, 3, H, W) uint8, augmented a batch at a time on the training device, or `.read(i)`, decoded in worker processes
and augmented one image at a time by torchvision. Where the batched form is not what torchvision does, a line starting
with `# differs:` says so.

Every random number is a function of (seed, step, view) or (seed, step, position in the global batch), so the number of
ranks or workers, or starting again in the middle, does not change a pixel.
"""
import functools
import hashlib
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
GREY = (0.299, 0.587, 0.114)  # luma of ITU-R 601, as in PIL
THREADS = min(8, os.cpu_count() or 1)
ORDER, AUGMENT, LONG_TAIL = 1, 2, 3  # first number of a seed: one stream per purpose


@dataclass(frozen=True)
class Recipe:
    """The views of an image: 2 global and n_local local crops. As in DINO and CARP (scales: CARP, Table B.1)."""
    global_size: int = 224  # pixels
    local_size: int = 96
    n_local: int = 6
    global_scale: tuple = (0.32, 1.0)  # share of the image's area
    local_scale: tuple = (0.05, 0.32)
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue (in turns)
    jitter_p: float = 0.8  # probabilities from here on
    gray_p: float = 0.2
    blur_p: tuple = (1.0, 0.1, 0.5)  # first global, second global, local crops
    solarize_p: tuple = (0.0, 0.2, 0.0)
    flip_p: float = 0.5

    def views(self):
        """(size, scale, blur_p, solarize_p) of each view."""
        two = [(self.global_size, self.global_scale, self.blur_p[v], self.solarize_p[v]) for v in (0, 1)]
        return two + [(self.local_size, self.local_scale, self.blur_p[2], self.solarize_p[2])] * self.n_local


def seed_of(*ints):
    """One 63-bit seed from several integers, different for different tuples of any length."""
    return int.from_bytes(hashlib.sha256(repr([int(i) for i in ints]).encode()).digest()[:8], "big") >> 1


def generator(*ints):
    return torch.Generator().manual_seed(seed_of(*ints))


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=generator(ORDER, seed, epoch))  # (n,)


def indices(n, batch_size, seed, step):
    """(batch_size,) images of a step: each epoch of n // batch_size steps is a new permutation, its rest dropped."""
    epoch, k = divmod(step, n // batch_size)
    return epoch_order(n, seed, epoch)[k * batch_size:(k + 1) * batch_size]


def batches(images, recipe, *, batch_size, seed, start, stop, rank=0, world=1, device="cpu", workers=0):
    """Iterates over steps start..stop-1: lists of 2 + n_local normalised float32 (batch_size / world, 3, s, s).

    batch_size counts all `world` ranks. workers: processes that decode, used only where the set is not in memory.
    ValueError if the set is smaller than a batch, or a batch cannot be shared out equally.
    """
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"--batch-size {batch_size} must be between 1 and the {len(images)} images of the set")
    if batch_size % world:
        raise ValueError(f"--batch-size {batch_size} must be divisible by the {world} processes")
    own = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    if hasattr(images, "x"):
        return from_memory(images, recipe, batch_size, seed, range(start, stop), own, device)
    return from_disk(images, recipe, batch_size, seed, range(start, stop), own, device, workers)


# ---- a set in memory: a batch at a time ------------------------------------------------------------------------------

def from_memory(images, recipe, batch_size, seed, steps, own, device):
    data = images.x.to(device)  # at most 2 GiB: copied once, not a batch per step
    for step in steps:
        x = data[indices(len(data), batch_size, seed, step)[own].to(device)].float() / 255  # (B, 3, H, W)
        # drawn for all ranks and then cut, on the CPU: the same crops on any number of ranks, on any device
        u = torch.stack([torch.rand(batch_size, 32, generator=generator(AUGMENT, seed, step, v))[own]
                         for v in range(2 + recipe.n_local)])  # (V, B, 32)
        yield [*augment(x, u[:2], recipe, recipe.views()[:2]), *augment(x, u[2:], recipe, recipe.views()[2:])]


def augment(x, u, recipe, kinds):
    """V views of one size: x (B, 3, H, W) in [0, 1], u (V, B, 32) uniform on the CPU -> V tensors (B, 3, s, s)."""
    if not kinds:
        return []
    size, scale = kinds[0][:2]
    blur_p, solarize_p = torch.tensor([k[2:] for k in kinds]).T[..., None]  # (V, 1) each
    flip, jittered, *factors, hue, grey, blurred, sigma, solarized = u[..., 22:].unbind(-1)  # (V, B) each
    jittered = jittered < recipe.jitter_p
    factors = [(max(0, 1 - j) + (1 + j - max(0, 1 - j)) * f).where(jittered, 1) for f, j in zip(factors, recipe.jitter)]
    hue = ((2 * hue - 1) * recipe.jitter[3]).where(jittered, 0)
    # a bilinear sample covers 2 pixels, so further apart they alias: then take several per output pixel, and average
    H, W = x.shape[2:]
    taps = math.ceil(min(max(H, W), math.sqrt(scale[1] * H * W * 4 / 3)) / size / 2)
    x = crop(x, crop_boxes(u[..., :22], scale, H, W), flip < recipe.flip_p, size, taps)  # (V*B, 3, s, s)
    x = colour(x, *(t.flatten() for t in (*factors, hue, grey < recipe.gray_p)))
    rows = (blurred < blur_p).flatten().nonzero()[:, 0]
    x[rows.to(x.device)] = blur(x[rows.to(x.device)], 0.1 + 1.9 * sigma.flatten()[rows])
    rows = (solarized < solarize_p).flatten().nonzero()[:, 0].to(x.device)
    x[rows] = solarize(x[rows])
    return normalise(x).view(len(u), -1, 3, size, size).unbind()


def crop_boxes(u, scale, H, W):
    """RandomResizedCrop's boxes (..., 4) = top, left, height, width in pixels, from uniform numbers u (..., 22)."""
    # differs: torchvision rounds a box to whole pixels.
    area = H * W * (scale[0] + (scale[1] - scale[0]) * u[..., :10])  # (..., 10)
    ratio = torch.exp(math.log(3 / 4) + math.log(16 / 9) * u[..., 10:20])  # 3/4 to 4/3
    h, w = (area / ratio).sqrt(), (area * ratio).sqrt()
    fits = (h <= H) & (w <= W)
    first = fits.int().argmax(-1, keepdim=True)  # ten tries; the first that fits
    h, w = h.gather(-1, first)[..., 0], w.gather(-1, first)[..., 0]
    h, w = h.where(fits.any(-1), min(H, W * 4 / 3)), w.where(fits.any(-1), min(W, H * 4 / 3))
    top, left = (torch.where(fits.any(-1), t, 0.5).mul(s) for t, s in ((u[..., 20], H - h), (u[..., 21], W - w)))
    return torch.stack([top, left, h, w], -1)


def crop(x, box, flip, size, taps=1):
    """x (B, 3, H, W), box (V, B, 4), flip (V, B) bool -> (V*B, 3, size, size), view-major; all V in one grid_sample."""
    # differs: bilinear (mean of taps^2 samples), where the papers' recipe is bicubic with antialiasing.
    V, B, S = *flip.shape, size * taps
    H, W = x.shape[2:]
    top, left, h, w = box[..., None].unbind(2)  # (V, B, 1)
    at = (torch.arange(S) * 2 + 1) / S - 1  # pixel centres of the crop in [-1, 1]
    gy = (2 * top + h) / H - 1 + h / H * at  # (V, B, S)
    gx = (2 * left + w) / W - 1 + w / W * at * (1 - 2 * flip[..., None].float())  # (V, B, S)
    gx, gy = (t.clamp(1 / n - 1, 1 - 1 / n).to(x.device) for t, n in ((gx, W), (gy, H)))  # the border is repeated
    grid = torch.stack(torch.broadcast_tensors(gx[..., None, :], gy[..., None]), -1)  # (V, B, S, S, 2)
    grid = grid.transpose(0, 1).reshape(B, V * S, S, 2)  # the views of an image below one another
    x = F.grid_sample(x, grid, mode="bilinear", align_corners=False)  # (B, 3, V*S, S)
    x = x.view(B, 3, V, S, S).permute(2, 0, 1, 3, 4).reshape(V * B, 3, S, S)
    return F.avg_pool2d(x, taps) if taps > 1 else x


def colour(x, brightness, contrast, saturation, hue, grey):
    """x (N, 3, h, w), factors (N,), hue in turns, grey bool: all as one affine map of RGB per image."""
    # differs: fixed order (as written), where torchvision shuffles; values are cut to [0, 1] once, not after each step.
    # differs: hue is a rotation about the grey axis; torchvision's shift in HSV keeps max and min of RGB instead.
    N, luma, ones, one = len(x), torch.tensor([GREY]), torch.ones(3, 3), torch.eye(3)
    b, c, s, a, g = (t.view(N, 1, 1) for t in (brightness, contrast, saturation, 2 * math.pi * hue, grey.float()))
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = a.cos() * one + (1 - a.cos()) / 3 * ones + a.sin() * cross  # (N, 3, 3)
    to_grey = luma.expand(3, 3)  # every row the luma
    M = ((1 - g) * one + g * to_grey) @ turn @ (s * one + (1 - s) * to_grey) * (c * b)  # (N, 3, 3)
    # contrast pulls towards the mean grey; saturation, hue and grey leave a grey as it is, so it is added at the end
    M, pull, luma = M.to(x.device), ((1 - c) * b).to(x.device), luma.to(x.device)
    mean = luma @ x.mean((2, 3))[..., None]  # (N, 1, 1)
    return torch.baddbmm(pull * mean, M, x.flatten(2)).clamp_(0, 1).view_as(x)


def blur_radius(size):
    return min(6, size - 1)  # 3 sigma at the largest, 2.0 pixels


def blur(x, sigma):
    """Gaussian blur of x (N, 3, h, w) with a standard deviation sigma (N,) in pixels for each image."""
    # differs: a true Gaussian cut at 6 pixels; PIL's is three box filters.
    if len(x) == 0:
        return x
    (N, _, h, w), r = x.shape, blur_radius(min(x.shape[2:]))
    k = torch.exp(-torch.arange(-r, r + 1) ** 2 / (2 * sigma[:, None] ** 2))  # (N, 2r+1)
    k = (k / k.sum(1, keepdim=True)).repeat_interleave(3, 0).to(x.device)  # (3N, 2r+1)
    x = F.pad(x, (r, r, r, r), mode="reflect").view(1, 3 * N, h + 2 * r, w + 2 * r)
    x = F.conv2d(F.conv2d(x, k[:, None, None], groups=3 * N), k[:, None, :, None], groups=3 * N)
    return x.view(N, 3, h, w)


def solarize(x):
    return torch.where(x >= 0.5, 1 - x, x)


def normalise(x):
    """In place: x (N, 3, h, w) float in [0, 1] to the mean and deviation of ImageNet."""
    mean, std = (torch.tensor(t, device=x.device).view(3, 1, 1) for t in (MEAN, STD))
    return x.sub_(mean).div_(std)


# ---- a set on disk: an image at a time -------------------------------------------------------------------------------

class Crops(torch.utils.data.Dataset):
    """(image, step, position) -> ([(3, s, s)] * V, path if damaged): the recipe as the papers' code writes it."""

    def __init__(self, images, recipe, seed):
        self.images, self.seed = images, seed
        self.views = [v2.Compose([
            v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(recipe.flip_p),
            v2.RandomApply([v2.ColorJitter(*recipe.jitter)], recipe.jitter_p),
            v2.RandomGrayscale(recipe.gray_p),
            v2.RandomApply([v2.GaussianBlur(2 * blur_radius(size) + 1, (0.1, 2.0))], blur_p),
            v2.RandomSolarize(128, solarize_p),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD)]) for size, scale, blur_p, solarize_p in recipe.views()]

    def __getitem__(self, key):
        image, step, position = key
        x, damaged = self.images.read(image)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: lent to it
            torch.random.default_generator.manual_seed(seed_of(AUGMENT, self.seed, step, position))
            return [view(x) for view in self.views], damaged


def collate(samples):
    return [torch.stack(view) for view in zip(*(views for views, _ in samples))], [p for _, p in samples if p]


def deaf(worker):
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group: the run finishes its step, so workers go on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def from_disk(images, recipe, batch_size, seed, steps, own, device, workers):
    keys = ([(int(i), step, p) for p, i in enumerate(indices(len(images), batch_size, seed, step)[own], own.start)]
            for step in steps)
    loader = torch.utils.data.DataLoader(
        Crops(images, recipe, seed), batch_sampler=keys, num_workers=workers, collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda", prefetch_factor=2 if workers else None,
        generator=torch.Generator(),  # else it would draw from the global one
        worker_init_fn=deaf)
    for views, damaged in loader:
        images.note_broken(damaged)
        yield [v.to(device, non_blocking=True) for v in views]


# ---- evaluation ------------------------------------------------------------------------------------------------------

def eval_batches(images, img_size, *, batch_size=512, device="cpu"):
    """Iterates over all images in order: (n, 3, img_size, img_size) float32, normalised, without augmentation.

    As in DINO's eval_knn.py: shorter side to 256/224 of img_size, bicubic, then the centre; a set in memory that has
    that size already is taken as it is.
    """
    spans = [range(a, min(a + batch_size, len(images))) for a in range(0, len(images), batch_size)]
    if hasattr(images, "x"):
        for s in spans:
            x = images.x[s.start:s.stop].to(device)
            yield normalise((x if tuple(x.shape[2:]) == (img_size, img_size) else fit(x, img_size)).float() / 255)
        return

    def one(i):
        x, damaged = images.read(i)
        return fit(x, img_size), damaged

    with ThreadPoolExecutor(THREADS) as pool:  # decoding and resizing release Python's lock
        ahead = pool.map(one, spans[0])
        for s in [*spans[1:], ()]:
            got, ahead = list(ahead), pool.map(one, s)  # the next batch is read while this one is used
            images.note_broken([p for _, p in got if p])
            yield normalise(torch.stack([x for x, _ in got]).to(device).float() / 255)


def fit(x, size):
    """uint8 (..., 3, H, W) to (..., 3, size, size)."""
    x = v2.functional.resize(x, [round(size * 256 / 224)], InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(x, [size, size])
