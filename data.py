"""
Images: `load` reads a set, `subset` takes a part of it; `batches` and `eval_batches` (views.py) cut it into views.

A set that fits in memory is one uint8 tensor (`Images`); a larger one a list of paths (`Files`), decoded when needed.
"""
import hashlib
import itertools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support import groups
from support import shapes
from views import LONG_TAIL, MEAN, STD, THREADS, Recipe, batches, eval_batches, generator, indices, seed_of

__all__ = ["MEAN", "STD", "Files", "Images", "Recipe", "batches", "eval_batches", "indices", "load", "seed_of",
           "subset"]  # those of views.py are used as data.Recipe, ...

NAMED = ("shapes", "cifar10", "cifar100", "stl10", "inat18")
LAYOUTS = "train/<class>/* with val/<class>/* or test/<class>/*, or <class>/*, or images without class folders"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif")
IN_MEMORY = 2 << 30  # bytes; a larger folder stays on disk
LAWS = {"exp": lambda c, C: c / max(C - 1, 1),  # sizes fall by one factor from class to class
        "power": lambda c, C: math.log(c + 1) / math.log(max(C, 2))}  # n_c ~ (c+1)^-a: few large classes, a flat tail


@dataclass(eq=False)
class Images:
    """A set in memory: x (N, 3, H, W) uint8; y (N,) int64 or None; paths in the order of x, or None."""
    x: torch.Tensor
    y: torch.Tensor
    classes: list
    name: str
    paths: list = None
    broken: list = field(default_factory=list)  # paths of damaged files, replaced by a neighbour

    def __len__(self):
        return len(self.x)


@dataclass(eq=False)
class Files:
    """A set on disk, decoded when needed: paths; y (N,) int64 or None."""
    paths: list
    y: torch.Tensor
    classes: list
    name: str
    broken: list = field(default_factory=list)

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        """Image i as (3, H, W) uint8, and None; for a damaged file its nearest readable neighbour, and the path."""
        for j in itertools.chain([i], neighbours(i, len(self), self.y)):
            if (image := decode(self.paths[j])) is not None:
                return image, None if j == i else self.paths[i]
        raise ValueError(f"{self.paths[i]} and the images around it cannot be read")

    def note_broken(self, paths):
        """Remembers damaged files; ValueError once they are more than 1 % of the set."""
        new = [p for p in paths if p not in self.broken]
        self.broken += new
        if len(self.broken) > len(self) / 100:
            raise ValueError(f"{len(self.broken)} of {len(self)} images of {self.name} cannot be read, "
                             f"more than 1 %; the first is {self.broken[0]}")
        for path in new:
            tqdm.write(f"{path} cannot be read; a neighbour stands in for it")


# ---- sets ------------------------------------------------------------------------------------------------------------

def load(data, *, root="data", seed=0, img_size=32, imbalance=1.0, imbalance_law="exp"):
    """(train, test): `Images` or `Files` each; test is None for a folder without classes.

    data       "shapes" | "cifar10" | "cifar100" | "stl10" (downloaded to `root` if missing; of STL-10 only the 5,000
               labelled training images) | "inat18" (see there), or a folder laid out as in LAYOUTS. Class folders
               without a test split hold out 10 % of each class, the same ones for every seed; images beside class
               folders are left out.
    img_size   side of the largest crop: images of a folder are kept in memory at no more than 4 times that.
    imbalance  long tail of the train split, largest class over smallest, drawn with `seed`; see `long_tail` for the
    imbalance_law   "exp" or "power". The test split is never cut.
    ValueError for an unknown name, an empty or one-class folder, unreadable images, imbalance < 1, another law.
    """
    if imbalance_law not in LAWS:
        raise ValueError(f"--imbalance-law {imbalance_law} is not one of {', '.join(LAWS)}")
    if not imbalance >= 1:
        raise ValueError(f"--imbalance {imbalance} must be at least 1 (1 leaves the set as it is)")
    if data == "shapes":
        train, test = (Images(*shapes.make(n, s), "shapes") for n, s in ((10_000, 20_261), (2_000, 90_217)))
    elif data == "inat18":
        train, test = inat18(root)
    elif data in NAMED:
        train, test = named(data, root, True), named(data, root, False)
    elif os.path.isdir(os.path.expanduser(data)):
        train, test = folder(os.path.expanduser(data), img_size)
    else:
        raise ValueError(f"--data {data} is neither a folder nor one of the sets {', '.join(NAMED)}")
    return (train if imbalance == 1 else long_tail(train, imbalance, seed, imbalance_law)), test


def named(name, root, train):
    from torchvision import datasets
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    split = {"split": "train" if train else "test"} if name == "stl10" else {"train": train}
    try:
        raw = kind(root, **split)
    except RuntimeError:  # not there, or its checksum is wrong
        try:
            raw = kind(root, **split, download=True)
        except (OSError, RuntimeError) as e:
            raise ValueError(f"--data {name} is not under --data-root {root} and cannot be downloaded: {e}") from None
    x = torch.from_numpy(raw.data)  # CIFAR: (N, H, W, 3); STL-10: (N, 3, H, W)
    y = torch.as_tensor(raw.labels if name == "stl10" else raw.targets, dtype=torch.int64)
    return Images(x if name == "stl10" else x.permute(0, 3, 1, 2).contiguous(), y, list(raw.classes), name)


def inat18(root):
    """(train, val) of iNaturalist-2018, 437,513 and 24,426 images of 8,142 classes, long-tailed by nature (Sec. 4.4).

    torchvision's class knows all images and no split: that is read from val2018.json, the list of the competition.
    ValueError where either is missing, or the classes are not grouped as the published 842 / 3,701 / 3,599."""
    from torchvision import datasets
    listed = os.path.join(root, "val2018.json")
    try:
        raw = datasets.INaturalist(root, version="2018")
        with open(listed) as f:  # file_name: train_val2018/Aves/2820/0123.jpg
            held = {image["file_name"].split("/", 1)[1] for image in json.load(f)["images"]}
    except (OSError, RuntimeError, KeyError, IndexError, ValueError) as e:
        raise ValueError(f"--data inat18 is expected as {root}/2018/<group>/<class>/*.jpg, where torchvision.datasets."
                         f"INaturalist puts it, and {listed}, its list of validation images ({e})") from None
    paths, y = [], []
    for c, name in sorted(raw.index):
        if name.lower().endswith(SUFFIXES):
            paths.append(f"{raw.all_categories[c]}/{name}".replace(os.sep, "/"))
            y.append(c)
    sets = []
    for split in (False, True):
        own = [i for i, path in enumerate(paths) if (path in held) == split]
        sets.append(Files([os.path.join(raw.root, paths[i]) for i in own], torch.tensor([y[i] for i in own]),
                          list(raw.all_categories), "inat18"))
    if len(sets[1]) != len(held):
        raise ValueError(f"{listed} names {len(held)} images, and {len(sets[1])} of them are under {raw.root}")
    groups.check_inat18(sets[0].y.bincount(minlength=len(raw.all_categories)))
    return tuple(sets)


def tree(path):
    """{class folder: sorted image paths} below path; "" holds the images outside any class folder."""
    found = {}
    for base, dirs, names in os.walk(path, followlinks=True):
        dirs[:] = [d for d in dirs if d[0] != "."]
        top = os.path.relpath(base, path).split(os.sep)[0]
        keep = [os.path.join(base, n) for n in names if n[0] != "." and n.lower().endswith(SUFFIXES)]
        if keep:
            found.setdefault("" if top == "." else top, []).extend(keep)
    return {c: sorted(found[c]) for c in sorted(found)}


def folder(path, img_size):
    name, held, top = os.path.basename(os.path.abspath(path)), None, tree(path)
    if "train" in top:  # a split, or a class that happens to be called train
        below = tree(os.path.join(path, "train"))
        held = next((s for s in ("val", "test") if s in top), None)
        top = below if held or set(below) != {""} else top
    loose = top.pop("", [])
    classes = list(top)
    if not top and not loose:
        raise ValueError(f"--data {path} holds no images; expected {LAYOUTS}")
    if not top:
        return read(loose, None, [], name, img_size), None
    if len(top) < 2:
        raise ValueError(f"--data {path} has only one class folder, {classes[0]!r}; give two or more, or name that "
                         "folder itself to train without labels")
    if held:
        test = tree(os.path.join(path, held))
        test.pop("", None)
        if not test or set(test) - set(top):
            raise ValueError(f"--data {path}: the class folders of {held}/ must be among those of train/, "
                             f"got {sorted(set(test) - set(top)) or 'none'}")
    else:
        test = {c: held_out(top[c], path) for c in classes}
        top = {c: sorted(set(top[c]) - set(test[c])) for c in classes}
    train, test = ([(p, k) for k, c in enumerate(classes) for p in s.get(c, [])] for s in (top, test))
    return tuple(read([p for p, _ in s], torch.tensor([k for _, k in s]), classes, name, img_size) if s else None
                 for s in (train, test))


def held_out(paths, base):
    """A tenth of a class (at least 1 image, but never the only one), chosen by a hash of the names."""
    key = {p: hashlib.sha256(os.path.relpath(p, base).replace(os.sep, "/").encode()).hexdigest() for p in paths}
    return sorted(paths, key=key.get)[:max(1, round(len(paths) / 10)) if len(paths) > 1 else 0]


def decode(path, limit=None):
    """(3, H, W) uint8 RGB, or None for a damaged file; sides shrunk until the shorter is at most `limit`."""
    try:
        with Image.open(path) as im:
            if im.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255
                im = Image.fromarray((np.asarray(im).clip(0, 65535) / 257).round().astype(np.uint8))
            im = im.convert("RGB") if im.mode != "P" else im.convert("RGBA").convert("RGB")
            if limit and min(im.size) > limit:
                im = im.resize([round(s * limit / min(im.size)) for s in im.size], Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(im)).permute(2, 0, 1).contiguous()  # (3, H, W)
    except Exception:  # Pillow has a dozen error types for damaged files
        return None


def read(paths, y, classes, name, img_size):
    """`Images` when all have one size and together less than IN_MEMORY bytes, else `Files`."""
    # differs: an image is shrunk at loading to 4 img_size; crops down to 1/16 of its area still lose no detail.
    files, limit = Files(paths, y, classes, name), 4 * img_size
    first = decode(paths[0], limit)
    if first is None:
        raise ValueError(f"the first image, {paths[0]}, cannot be read")
    if len(paths) * first.numel() >= IN_MEMORY:
        return files
    x, bad = torch.empty(len(paths), *first.shape, dtype=torch.uint8), []  # (N, 3, H, W)
    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(paths), desc=f"reading {name}", disable=None) as bar:
        for a in range(0, len(paths), 256):
            for i, image in enumerate(pool.map(lambda p: decode(p, limit), paths[a:a + 256]), a):
                if image is None:
                    bad.append(i)
                elif image.shape != first.shape:
                    return files
                else:
                    x[i] = image
            bar.update(len(paths[a:a + 256]))
    files.note_broken([paths[i] for i in bad])
    for i in bad:
        j = next((j for j in neighbours(i, len(paths), y) if j not in bad), None)
        if j is None:
            raise ValueError(f"{paths[i]} and all other images of its class cannot be read")
        x[i] = x[j]
    return Images(x, y, classes, name, paths, files.broken)


def neighbours(i, n, y):
    """Indices around i, nearest first, of the same class: a stand-in must keep its label true."""
    for j in (j for d in range(1, min(n, 1000)) for j in (i - d, i + d)):
        if 0 <= j < n and (y is None or bool((y[j] == y[i]).all())):  # y (N,), or (N, 20) of VOC2007
            yield j


def long_tail(images, imbalance, seed, law="exp"):
    """Class c of 0..C-1 keeps round(n_max * imbalance^-s) images, at least 1 and at most what it has; n_max images are
    in the largest class now, and s runs from 0 for the first class to 1 for the last as LAWS[law] says.

    Classes stay in their order, so the first one is the largest. The images of a class are drawn with (seed, class):
    every run of a seed keeps the same ones, and a longer tail keeps some of those that a shorter one keeps."""
    if images.y is None:
        raise ValueError(f"--imbalance {imbalance} needs labels, and {images.name} has no class folders")
    C, n_max, keep = len(images.classes), int(images.y.bincount().max()), []
    for c in range(C):
        own = (images.y == c).nonzero()[:, 0]  # (n_c,)
        n = max(1, round(n_max * imbalance ** -LAWS[law](c, C)))
        keep.append(own[torch.randperm(len(own), generator=generator(LONG_TAIL, seed, c))[:n]])
    return subset(images, torch.cat(keep).sort().values)


def subset(images, keep):
    """The images at the indices `keep`, or, for a number, that many spread evenly over the set (at most all)."""
    if isinstance(keep, int):
        n = min(keep, len(images))
        keep = torch.arange(n) * len(images) // max(n, 1)  # (n,)
    new = {"y": None if images.y is None else images.y[keep]}
    if isinstance(images, Images):
        new["x"] = images.x[keep]
    if images.paths:
        new["paths"] = [images.paths[i] for i in keep]
        new["broken"] = sorted(set(images.broken) & set(new["paths"]))
    return replace(images, **new)
