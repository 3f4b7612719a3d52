"""
Multi-crop views of images: `batches` for training, `eval_batches` without augmentation.

A set is anything with `len` and one of two things. With `.x` (N, 3, H, W) uint8 it is in memory:
a batch at a time is augmented on the training device. With `.read(i)` it is on disk: worker
processes decode its images, and torchvision augments one at a time. Where the batched form is not
what torchvision does, a line starting with `# differs:` says so.

Every random number is a function of (seed, step, view) or (seed, step, position in the global
batch). So the number of ranks or workers, or starting again in the middle, does not change a pixel.

Letters: B images of a batch, H x W pixels of an image, V views of an image, s x s pixels of a view.
"""
import functools
import hashlib
import itertools
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)  # luma of ITU-R 601, as in PIL
THREADS = min(8, os.cpu_count() or 1)
# first number of a seed: one per purpose; zoo/masks.py has 4 to 6
ORDER, AUGMENT, LONG_TAIL, DROP_PATH = 1, 2, 3, 7


class View(NamedTuple):
    """What decides how one view of an image is made, beside what all views share."""
    size: int  # pixels
    scale: tuple  # smallest and largest share of the image's area
    blur_p: float
    solarize_p: float


@dataclass(frozen=True)
class Recipe:
    """The views of an image: 2 global and n_local local crops, as in DINO and CARP.

    The scales are those of CARP, Table B.1. Training gives all of these numbers but flip_p from its
    flags, so the defaults here do not count there (config.recipe).
    """
    global_size: int = 224  # pixels
    local_size: int = 96
    n_local: int = 6
    global_scale: tuple = (0.32, 1.0)  # share of the image's area
    local_scale: tuple = (0.05, 0.32)
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation; hue in full turns
    jitter_p: float = 0.8  # probabilities from here on
    gray_p: float = 0.2
    blur_p: tuple = (1.0, 0.1, 0.5)  # first global, second global, local crops
    solarize_p: tuple = (0.0, 0.2, 0.0)
    flip_p: float = 0.5
    mean: tuple = MEAN  # of red, green and blue in [0, 1]: subtracted from every view
    std: tuple = STD  # every view is divided by it

    def views(self):
        """A list of `View`: the two global crops, then the local ones."""
        views = []
        for blur_p, solarize_p in zip(self.blur_p[:2], self.solarize_p[:2]):
            views.append(View(self.global_size, self.global_scale, blur_p, solarize_p))
        local = View(self.local_size, self.local_scale, self.blur_p[2], self.solarize_p[2])
        return views + [local] * self.n_local


# ---- seeds and the order of the images -----------------------------------------------------------

def seed_of(*ints):
    """One 63-bit seed from several integers, different for different tuples of any length."""
    text = repr([int(i) for i in ints])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*ints):
    """A torch.Generator on the CPU whose seed is `seed_of` these integers."""
    return torch.Generator().manual_seed(seed_of(*ints))


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=generator(ORDER, seed, epoch))  # (n,)


def indices(n, batch_size, seed, step):
    """(batch_size,) int64: which of n images a step sees.

    Each epoch of n // batch_size steps is a new permutation, whose rest is dropped.
    """
    epoch, batch = divmod(step, n // batch_size)
    return epoch_order(n, seed, epoch)[batch * batch_size:(batch + 1) * batch_size]


def batches(images, recipe, *, batch_size, seed, start, stop, rank=0, world=1, device="cpu",
            workers=0):
    """Iterates over steps start..stop-1.

    A step gives a list of 2 + n_local views: normalised float32 (batch_size / world, 3, s, s).
    batch_size counts all `world` ranks. workers: processes that decode, used only where the set is
    not in memory. ValueError if the set is smaller than a batch, or a batch cannot be shared out
    equally.
    """
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"--batch-size {batch_size} must be between 1 and the {len(images)} "
                         "images of the set")
    if batch_size % world:
        raise ValueError(f"--batch-size {batch_size} must be divisible by the {world} processes")
    # the positions of the global batch that this rank sees
    rank_slice = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    steps = range(start, stop)
    if hasattr(images, "x"):
        return from_memory(images, recipe, batch_size, seed, steps, rank_slice, device)
    return from_disk(images, recipe, batch_size, seed, steps, rank_slice, device, workers)


# ---- a set in memory: a batch at a time ----------------------------------------------------------

def from_memory(images, recipe, batch_size, seed, steps, rank_slice, device):
    data = images.x.to(device)  # at most 2 GiB: copied once, not a batch per step
    views = recipe.views()
    for step in steps:
        batch = indices(len(data), batch_size, seed, step)[rank_slice]  # (B,)
        x = data[batch.to(device)].float() / 255  # (B, 3, H, W)
        # Drawn for all ranks and then cut, on the CPU: the crops are the same ones on any number
        # of ranks, and on any device.
        u = [torch.rand(batch_size, 32, generator=generator(AUGMENT, seed, step, v))[rank_slice]
             for v in range(len(views))]
        crops = []
        # consecutive views of one size and scale, their first two fields, are made together
        for _, alike in itertools.groupby(range(len(views)), lambda v: views[v][:2]):
            alike = list(alike)
            numbers = torch.stack([u[v] for v in alike])  # (views alike, B, 32)
            crops += augment(x, numbers, recipe, [views[v] for v in alike])
        yield crops


def augment(x, u, recipe, views):
    """Views of one size and scale: a list of tensors (B, 3, s, s), normalised.

    x (B, 3, H, W) in [0, 1]; u (V, B, 32) uniform in [0, 1), on the CPU; views: V times `View`.
    """
    size, scale = views[0].size, views[0].scale
    V, B = u.shape[:2]
    H, W = x.shape[2:]
    # numbers 0 to 21 place the box, ten more decide what happens to it; (V, B) each
    flip, jitter, brightness, contrast, saturation, hue, grey, blurred, sigma, solarized = \
        u[..., 22:].unbind(-1)

    flip = flip < recipe.flip_p
    box = crop_boxes(u[..., :22], scale, H, W)  # (V, B, 4)
    # A bilinear sample covers 2 pixels. Where output pixels lie further apart than that, they
    # would alias: then several samples are taken for each, and averaged.
    longest = min(max(H, W), math.sqrt(scale[1] * H * W * 4 / 3))  # side of the largest box
    taps = math.ceil(longest / size / 2)
    x = crop(x, box, flip, size, taps)  # (V*B, 3, s, s)

    jitter = jitter < recipe.jitter_p
    factors = []
    for f, j in zip((brightness, contrast, saturation), recipe.jitter):
        low = max(0, 1 - j)
        factors.append((low + (1 + j - low) * f).where(jitter, 1).flatten())  # (V*B,)
    hue = ((2 * hue - 1) * recipe.jitter[3]).where(jitter, 0)
    x = colour(x, *factors, hue.flatten(), (grey < recipe.gray_p).flatten())

    blur_p = torch.tensor([view.blur_p for view in views])[:, None]  # (V, 1)
    chosen = (blurred < blur_p).flatten().nonzero()[:, 0]  # of the V*B images
    sigma = 0.1 + 1.9 * sigma.flatten()[chosen]  # pixels
    chosen = chosen.to(x.device)
    x[chosen] = blur(x[chosen], sigma)

    solarize_p = torch.tensor([view.solarize_p for view in views])[:, None]  # (V, 1)
    chosen = (solarized < solarize_p).flatten().nonzero()[:, 0].to(x.device)
    x[chosen] = solarize(x[chosen])
    return list(normalise(x, recipe.mean, recipe.std).view(V, B, 3, size, size).unbind())


def crop_boxes(u, scale, H, W):
    """RandomResizedCrop's boxes (..., 4) = top, left, height, width in pixels.

    u (..., 22): uniform numbers; scale: smallest and largest share of the image's H x W pixels.
    """
    # differs: torchvision rounds a box to whole pixels.
    area = H * W * (scale[0] + (scale[1] - scale[0]) * u[..., :10])  # (..., 10)
    ratio = torch.exp(math.log(3 / 4) + math.log(16 / 9) * u[..., 10:20])  # 3/4 to 4/3
    h = (area / ratio).sqrt()
    w = (area * ratio).sqrt()
    inside = (h <= H) & (w <= W)  # (..., 10): which of ten tries do not stick out of the image
    any_inside = inside.any(-1)  # (...)
    chosen = inside.int().argmax(-1, keepdim=True)  # the first of them
    # where all ten stick out: the largest box of a ratio in [3/4, 4/3], in the middle
    h = h.gather(-1, chosen)[..., 0].where(any_inside, min(H, W * 4 / 3))
    w = w.gather(-1, chosen)[..., 0].where(any_inside, min(W, H * 4 / 3))
    top = u[..., 20].where(any_inside, 0.5) * (H - h)
    left = u[..., 21].where(any_inside, 0.5) * (W - w)
    return torch.stack([top, left, h, w], -1)


def crop(x, box, flip, size, taps=1):
    """Boxes of images, resized: x (B, 3, H, W), box (V, B, 4), flip (V, B) -> (V*B, 3, size, size).

    The first view of all images comes first, then the second. One grid_sample cuts all views.
    taps: samples per output pixel along each side.
    """
    # differs: bilinear, the mean of taps^2 samples. The papers' recipe is bicubic, antialiased.
    V, B = flip.shape
    S = size * taps
    H, W = x.shape[2:]
    top, left, h, w = box[..., None].unbind(2)  # (V, B, 1)
    centres = (torch.arange(S) * 2 + 1) / S - 1  # of the crop's pixels, in [-1, 1]
    mirror = 1 - 2 * flip[..., None].float()  # -1 or 1
    grid_y = (2 * top + h) / H - 1 + h / H * centres  # (V, B, S)
    grid_x = (2 * left + w) / W - 1 + w / W * centres * mirror  # (V, B, S)
    grid_y = grid_y.clamp(1 / H - 1, 1 - 1 / H).to(x.device)  # the image's border is repeated
    grid_x = grid_x.clamp(1 / W - 1, 1 - 1 / W).to(x.device)
    grid = torch.broadcast_tensors(grid_x[..., None, :], grid_y[..., None])
    grid = torch.stack(grid, -1)  # (V, B, S, S, 2)
    grid = grid.transpose(0, 1).reshape(B, V * S, S, 2)  # an image's views below one another
    x = F.grid_sample(x, grid, mode="bilinear", align_corners=False)  # (B, 3, V*S, S)
    x = x.view(B, 3, V, S, S).permute(2, 0, 1, 3, 4).reshape(V * B, 3, S, S)
    return F.avg_pool2d(x, taps) if taps > 1 else x


def colour(x, brightness, contrast, saturation, hue, grey):
    """x (N, 3, h, w) with all colour changes, as one affine map of RGB for each image.

    brightness, contrast, saturation (N,): factors; hue (N,): turns; grey (N,) bool.
    """
    # differs: always in the order of the parameters, where torchvision shuffles; values are cut to
    # [0, 1] once, not after each step.
    # differs: hue is a rotation about the grey axis; torchvision's shift in HSV keeps max and min
    # of RGB instead.
    def per_image(t):
        return t.view(len(x), 1, 1)

    brightness, contrast, saturation = map(per_image, (brightness, contrast, saturation))
    angle = 2 * math.pi * per_image(hue)
    grey = per_image(grey.float())

    identity = torch.eye(3)
    luma = torch.tensor([GREY])  # (1, 3)
    to_grey = luma.expand(3, 3)  # every row the luma
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    rotate = angle.cos() * identity + (1 - angle.cos()) / 3 * torch.ones(3, 3) \
        + angle.sin() * cross  # (N, 3, 3): Rodrigues' formula for the axis (1, 1, 1) / sqrt(3)
    saturate = saturation * identity + (1 - saturation) * to_grey  # (N, 3, 3)
    M = ((1 - grey) * identity + grey * to_grey) @ rotate @ saturate * (contrast * brightness)
    # Contrast pulls every pixel towards the mean grey. Saturation, hue and grey leave a grey as it
    # is, so the mean grey can be added at the end.
    M = M.to(x.device)  # (N, 3, 3)
    mean = luma.to(x.device) @ x.mean((2, 3))[..., None]  # (N, 1, 1)
    shift = ((1 - contrast) * brightness).to(x.device) * mean  # (N, 1, 1)
    return torch.baddbmm(shift, M, x.flatten(2)).clamp_(0, 1).view_as(x)


def blur_radius(size):
    return min(6, size - 1)  # pixels: 3 sigma of the largest sigma, 2.0


def blur(x, sigma):
    """Gaussian blur of x (N, 3, h, w), by a standard deviation sigma (N,) in pixels per image."""
    # differs: a true Gaussian cut at 6 pixels; PIL's is three box filters.
    if len(x) == 0:
        return x
    N, _, h, w = x.shape
    r = blur_radius(min(h, w))
    kernel = torch.exp(-torch.arange(-r, r + 1) ** 2 / (2 * sigma[:, None] ** 2))  # (N, 2r+1)
    kernel = kernel / kernel.sum(1, keepdim=True)
    kernel = kernel.repeat_interleave(3, 0).to(x.device)  # (3N, 2r+1), one per channel
    x = F.pad(x, (r, r, r, r), mode="reflect").view(1, 3 * N, h + 2 * r, w + 2 * r)
    x = F.conv2d(x, kernel[:, None, None], groups=3 * N)
    x = F.conv2d(x, kernel[:, None, :, None], groups=3 * N)
    return x.view(N, 3, h, w)


def solarize(x):
    """x in [0, 1], where values of 0.5 and more become 1 - x."""
    return torch.where(x >= 0.5, 1 - x, x)


def normalise(x, mean=MEAN, std=STD):
    """In place: (x - mean) / std, for x (N, 3, h, w) float in [0, 1]."""
    mean = torch.tensor(mean, device=x.device).view(3, 1, 1)
    std = torch.tensor(std, device=x.device).view(3, 1, 1)
    return x.sub_(mean).div_(std)


# ---- a set on disk: an image at a time -----------------------------------------------------------

class Crops(torch.utils.data.Dataset):
    """The recipe as the papers' code writes it, with torchvision.

    (image, step, position in the global batch) -> (V views (3, s, s), what Files.read says of a
    damaged file or None).
    """

    def __init__(self, images, recipe, seed):
        self.images = images
        self.seed = seed
        self.transforms = [transform(recipe, view) for view in recipe.views()]

    def __getitem__(self, key):
        image, step, position = key
        x, damaged = self.images.read(image)  # (3, H, W) uint8
        # torchvision draws from the global generator, which is given back as it was
        with torch.random.fork_rng(devices=[]):
            seed = seed_of(AUGMENT, self.seed, step, position)
            torch.random.default_generator.manual_seed(seed)
            return [make_view(x) for make_view in self.transforms], damaged


def transform(recipe, view):
    # differs: blur is a true Gaussian; PIL's, in the papers' code, is three box filters
    return v2.Compose([
        v2.RandomResizedCrop(view.size, view.scale, interpolation=InterpolationMode.BICUBIC,
                             antialias=True),
        v2.RandomHorizontalFlip(recipe.flip_p),
        v2.RandomApply([v2.ColorJitter(*recipe.jitter)], recipe.jitter_p),
        v2.RandomGrayscale(recipe.gray_p),
        v2.RandomApply([v2.GaussianBlur(2 * blur_radius(view.size) + 1, (0.1, 2.0))], view.blur_p),
        v2.RandomSolarize(128, view.solarize_p),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(recipe.mean, recipe.std)])


def collate(samples):
    """B samples of `Crops` -> (V tensors (B, 3, s, s), what Files.note_broken takes)."""
    views_of_images, damaged = zip(*samples)
    views = [torch.stack(view) for view in zip(*views_of_images)]
    return views, [file for file in damaged if file]


def ignore_stop_signals(worker):
    """Ctrl-C and a scheduler's SIGTERM reach workers too, and the run still needs them.

    It finishes its step and ends them itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def from_disk(images, recipe, batch_size, seed, steps, rank_slice, device, workers):
    def keys():
        for step in steps:
            batch = indices(len(images), batch_size, seed, step)[rank_slice].tolist()
            positions = range(rank_slice.start, rank_slice.stop)  # in the global batch
            yield [(image, step, position) for image, position in zip(batch, positions)]

    loader = torch.utils.data.DataLoader(
        Crops(images, recipe, seed),
        batch_sampler=keys(),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda",
        prefetch_factor=2 if workers else None,
        generator=torch.Generator(),  # else it would draw from the global one
        worker_init_fn=ignore_stop_signals)
    for views, damaged in loader:
        images.note_broken(damaged)
        yield [view.to(device, non_blocking=True) for view in views]


# ---- evaluation ----------------------------------------------------------------------------------

def eval_batches(images, img_size, *, batch_size=512, device="cpu", crop=True, mean=MEAN, std=STD):
    """Iterates over all images in order: (n, 3, img_size, img_size) float32, normalised.

    As in DINO's eval_knn.py, nothing random: the shorter side becomes 256/224 of img_size, bicubic,
    and the centre is cut out. A set in memory that has that size already is taken as it is.
    crop False: the shorter side becomes img_size itself, so that less is cut off (Ericsson et al.
    2021, for Table 4).
    """
    shorter = round(img_size * 256 / 224) if crop else img_size

    def read(i):
        x, damaged = images.read(i)  # (3, H, W) uint8
        return resize_and_crop(x, shorter, img_size), damaged

    parts = [range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size)]
    if hasattr(images, "x"):
        for part in parts:
            x = images.x[part.start:part.stop].to(device)  # (n, 3, H, W)
            if tuple(x.shape[2:]) != (img_size, img_size):
                x = resize_and_crop(x, shorter, img_size)
            yield normalise(x.float() / 255, mean, std)
        return

    with ThreadPoolExecutor(THREADS) as pool:  # decoding and resizing release Python's lock
        coming = pool.map(read, parts[0])
        for next_part in [*parts[1:], ()]:
            samples = list(coming)
            coming = pool.map(read, next_part)  # while this batch is used
            images.note_broken([damaged for _, damaged in samples if damaged])
            x = torch.stack([image for image, _ in samples]).to(device)  # (n, 3, s, s)
            yield normalise(x.float() / 255, mean, std)


def resize_and_crop(x, shorter, size):
    """uint8 (..., 3, H, W) -> (..., 3, size, size): the shorter side becomes `shorter` pixels, and
    the centre is cut out."""
    # differs: of an image that is more than 8 times as long as wide only the middle is resized. All
    # but the centre is cut off anyway, and the whole could take gigabytes.
    H, W = x.shape[-2:]
    longest = 8 * min(H, W)
    if max(H, W) > longest:
        x = v2.functional.center_crop(x, [min(H, longest), min(W, longest)])
    x = v2.functional.resize(x, [shorter], InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(x, [size, size])
