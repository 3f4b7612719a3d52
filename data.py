"""
Images: `load` reads a set, `subset` takes a part of it. views.py cuts the images into views.

A set that fits in memory is one uint8 tensor (`Images`). A larger one is a list of paths (`Files`),
whose images are decoded when they are needed.

A set of your own is one function of --data-root and one entry in SETS:

    def halves(root):
        x, y = torch.load(f"{root}/halves.pt")  # (N, 3, H, W) uint8, (N,) int64
        train = Images(x[::2], y[::2], ["left", "right"], "halves")
        return train, Images(x[1::2], y[1::2], ["left", "right"], "halves")

    SETS["halves"] = halves  # python train.py --data halves

Letters: N images, H x W pixels, C classes, n_c images of class c.
"""
import itertools
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

from support import ddp, shapes
from support.entries import loaded
from support.files import digest
from views import LONG_TAIL, THREADS, generator

IN_MEMORY = 2 << 30  # bytes; a folder with more stays on disk
# differs: an image is shrunk when it is read, so that its shorter side is at most this many times
# the side of the largest crop. So a crop of 1/16 of an image's area (1/256 on disk) still has a
# pixel of the image for each of its own.
SIDES_IN_MEMORY, SIDES_ON_DISK = 4, 16


@dataclass(eq=False)
class Images:
    """A set in memory."""
    x: torch.Tensor  # (N, 3, H, W) uint8
    y: torch.Tensor  # (N,) int64, or None
    classes: list  # their names
    name: str  # of the set
    paths: list = None  # in the order of x, where the images come from files
    broken: list = field(default_factory=list)  # paths of damaged files, replaced by a neighbour
    label_map: torch.Tensor = None  # (N, H, W) uint8: class + 1 of each pixel, 0 for background

    def __post_init__(self):
        """ValueError for tensors of another kind; crops divide by 255."""
        x, y = self.x, self.y
        if not torch.is_tensor(x) or x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"the images of {self.name} must be a tensor (N, 3, H, W) of uint8, "
                             f"got {kind_of(x)}")
        if y is not None and not (torch.is_tensor(y) and len(y) == len(x)):
            raise ValueError(f"the labels of {self.name} must be None or a tensor with one entry "
                             f"for each of the {len(x)} images, got {kind_of(y)}")
        if y is not None and y.dtype != torch.int64:
            raise ValueError(f"the labels of {self.name} must be int64, got {y.dtype}")
        if y is not None and y.ndim == 1 and len(y) and not (
                0 <= int(y.min()) and int(y.max()) < len(self.classes)):
            raise ValueError(f"the labels of {self.name} must lie in 0..{len(self.classes) - 1}, "
                             f"one for each of its {len(self.classes)} classes, got {int(y.min())} "
                             f"to {int(y.max())}")

    def __len__(self):
        return len(self.x)


def kind_of(x):
    if not hasattr(x, "shape"):
        return f"a {type(x).__name__}"
    return f"a {type(x).__name__} {tuple(x.shape)} of {x.dtype}"


@dataclass(eq=False)
class Files:
    """A set on disk, whose images are decoded when needed."""
    paths: list
    y: torch.Tensor  # (N,) int64, or None; (N, 20) for VOC2007
    classes: list
    name: str
    broken: list = field(default_factory=list)  # paths of damaged files that were met so far
    limit: int = None  # pixels: an image whose shorter side is longer is shrunk to it
    white: float = None  # the value of white in files of over 8 bits, see support/pixels.py

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        """Image i as (3, H, W) uint8, and None.

        For a damaged file: its nearest neighbour that can be read, and (path of the damaged one,
        sentence why). ValueError if no neighbour can be read either.
        """
        from support import pixels  # here, as sets in memory need none of it
        damaged = None
        for j in itertools.chain([i], neighbours(i, len(self), self.y)):
            try:
                return pixels.read(self.paths[j], self.limit, self.white), damaged
            except ValueError as error:
                damaged = damaged or (self.paths[i], str(error))
        raise ValueError(f"{damaged[1]}, nor can the images around it")

    def note_broken(self, damaged):
        """Remembers damaged files, [(path, sentence why)], and says so.

        ValueError once they are more than one, and more than 1 % of the set.
        """
        new = {path: why for path, why in damaged if path not in self.broken}
        self.broken += new
        if len(self.broken) > max(1, len(self) / 100):
            why = next(iter(new.values()), self.broken[0])
            raise ValueError(f"{len(self.broken)} of {len(self)} images of {self.name} cannot be "
                             f"read, more than 1 %: {why}")
        for why in new.values():
            tqdm.write(f"{why}; a neighbour stands in for it", file=sys.stderr)


def load(data, *, root="data", seed=0, img_size=32, imbalance=1.0, imbalance_law="exp"):
    """(train, test): `Images` or `Files` each; test is None for a folder without classes, and where
    every class has one image alone.

    data       a name in SETS, or a folder laid out as in support/folders.py. Class folders without
               a test split set 10 % of each class aside for it, the same images for every seed. A
               line on stderr says which folders serve, and counts what is left out.
    root       where the named sets lie, and where those that can be downloaded go.
    img_size   side of the largest crop: larger images are shrunk, see SIDES_IN_MEMORY.
    imbalance, imbalance_law   long tail of the train split, drawn with `seed`; see `long_tail`.
               The test split is never cut.
    ValueError for an unknown name, an empty or one-class folder, unreadable images,
    imbalance < 1, another law.
    """
    if imbalance_law not in LAWS:
        raise ValueError(f"--imbalance-law {imbalance_law} is not one of {', '.join(LAWS)}")
    if not imbalance >= 1:
        raise ValueError(f"--imbalance {imbalance} must be at least 1 (1 leaves the set as it is)")
    path = os.path.expanduser(data)
    if data in SETS:
        splits = loaded(SETS[data])(root)
        if not isinstance(splits, (tuple, list)) or len(splits) != 2:
            raise ValueError(f"the function of --data {data} must return two splits, for training "
                             "and for the test")
        train, test = splits
        if test is not None and (train.y is None) != (test.y is None):
            raise ValueError(f"the function of --data {data} must return labels for both splits, "
                             "or for none")
    elif os.path.isdir(path):
        train, test = folder(path, img_size)
    else:
        raise ValueError(f"--data {data} is neither a folder nor one of the sets {', '.join(SETS)}")
    for images in (train, test):
        if isinstance(images, Files) and images.limit is None:
            images.limit = SIDES_ON_DISK * img_size
    if imbalance > 1:
        train = long_tail(train, imbalance, seed, imbalance_law)
    return train, test


# ---- named sets: each function takes --data-root and returns (train, test) -----------------------

def builtin_shapes(root):
    """The built-in set: 10,000 and 2,000 images of 10 classes. `root` is not needed."""
    splits = []
    for n, seed in ((10_000, 16_180), (2_000, 14_142)):
        x, y, classes, label_map = shapes.make(n, seed)
        splits.append(Images(x, y, classes, "shapes", label_map=label_map))
    return tuple(splits)


# name of --data: the function, or "module.function" of one that is loaded when it is asked for
SETS = {
    "shapes": builtin_shapes,
    "cifar10": "support.named_sets.cifar10",
    "cifar100": "support.named_sets.cifar100",
    "stl10": "support.named_sets.stl10",
    "inat18": "support.named_sets.inat18",
}
VERSIONS = {"shapes": shapes.VERSION}  # of sets that are drawn here: a new version is a new set


# ---- a folder of images --------------------------------------------------------------------------

def folder(path, img_size):
    """(train, test) of a folder laid out as support/folders.py says; test is None where there are
    no classes."""
    from support import folders, pixels  # here, as the built-in images need neither
    found = folders.find(path)
    ddp.print_once(f"--data {path}: {found.about}", sys.stderr)
    name = os.path.basename(os.path.abspath(path))
    train, test = found.train, found.test
    classes = [c for c in train if c]  # "" stands for images without a class
    paths = [p for split in (train, test or {}) for of_class in split.values() for p in of_class]
    white, deep = pixels.white_of_files(paths)
    if deep:
        ddp.print_once(f"--data {path}: in files of more than 8 bits the value {white:,} is taken "
                       "for white", sys.stderr)
    if not classes:
        return open_files(train[""], None, [], name, img_size, white), None
    if test is None:
        test = {c: folders.choose_tenth(train[c], path) for c in classes}
        train = {c: sorted(set(train[c]) - set(test[c])) for c in classes}
    return (open_classes(train, classes, name, img_size, white),
            open_classes(test, classes, name, img_size, white))


def open_classes(images, classes, name, img_size, white):
    """`open_files` with labels: images {class: paths}; None without any image."""
    paths, labels = [], []
    for c, class_name in enumerate(classes):
        of_class = images.get(class_name, [])
        paths += of_class
        labels += [c] * len(of_class)
    if not paths:
        return None
    return open_files(paths, torch.tensor(labels), classes, name, img_size, white)


def open_files(paths, y, classes, name, img_size, white):
    """`Images` when all have one size and together less than IN_MEMORY bytes, else `Files`."""
    on_disk = Files(paths, y, classes, name, white=white)
    shrunk = replace(on_disk, limit=SIDES_IN_MEMORY * img_size)
    first_image, _ = shrunk.read(0)  # (3, H, W)
    if len(paths) * first_image.numel() >= IN_MEMORY:
        return on_disk
    x = torch.empty(len(paths), *first_image.shape, dtype=torch.uint8)  # (N, 3, H, W)
    bar = tqdm(total=len(paths), desc=f"reading {name}", disable=None)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        for begin in range(0, len(paths), 256):
            part = range(begin, min(begin + 256, len(paths)))
            samples = list(pool.map(shrunk.read, part))
            if any(image.shape != first_image.shape for image, _ in samples):
                return on_disk
            x[begin:part.stop] = torch.stack([image for image, _ in samples])
            on_disk.note_broken([damaged for _, damaged in samples if damaged])
            bar.update(len(part))
    return Images(x, y, classes, name, paths, on_disk.broken)


def neighbours(i, n, y):
    """Indices of 0..n-1 around i, nearest first, at most 999 away, of the same class, so that the
    label stays true.

    y: (N,) or None; (N, 20) for VOC2007, where all 20 labels must agree.
    """
    for distance in range(1, min(n, 1000)):
        for j in (i - distance, i + distance):
            if 0 <= j < n and (y is None or bool((y[j] == y[i]).all())):
                yield j


def identity(images, name):
    """What tells a set from others: {"set", "images", "classes", "content"}, plain values.

    name: what --data says; a folder may be moved and renamed, and stays the same. content is a hash
    over the names of the files below the folder that holds them all, their labels and the classes;
    of a set without files, over the pixels.
    """
    if images.paths:
        # what the first and the last in alphabetical order share, all paths share
        shared = os.path.commonprefix([min(images.paths), max(images.paths)])
        below = len(shared.rpartition(os.sep)[0])  # where the names below the common folder begin
        content = "\n".join(path[below:].replace(os.sep, "/") for path in images.paths)
    else:
        content = images.x
    labels = "none" if images.y is None else images.y
    return {"set": name if name in SETS else "folder", "images": len(images),
            "classes": len(images.classes), "content": digest(content, labels, images.classes)}


# ---- a part of a set -----------------------------------------------------------------------------

LAWS = {  # the place of class c of 0..C-1 between the largest class (0) and the smallest (1)
    # the size falls by one factor from class to class
    "exp": lambda c, C: c / max(C - 1, 1),
    # n_c ~ (c + 1)^-a: few large classes and a flat tail
    "power": lambda c, C: math.log(c + 1) / math.log(max(C, 2)),
}


def long_tail(images, imbalance, seed, law="exp"):
    """A long-tailed part of a set, whose largest class is `imbalance` times its smallest.

    Class c of 0..C-1 keeps round(n_max * imbalance^-LAWS[law](c, C)) images, at least 1 and at most
    what it has; n_max images are in the largest class now. Classes stay in their order, so the
    first one is the largest. The images of a class are drawn with (seed, class): every run of a
    seed keeps the same ones, and a longer tail keeps some of those that a shorter one keeps.
    ValueError without labels.
    """
    if images.y is None:
        raise ValueError(f"--imbalance {imbalance} needs labels, and {images.name} has no class "
                         "folders")
    C = len(images.classes)
    n_max = int(images.y.bincount().max())
    chosen = []
    for c in range(C):
        of_class = (images.y == c).nonzero()[:, 0]  # (n_c,)
        order = torch.randperm(len(of_class), generator=generator(LONG_TAIL, seed, c))  # (n_c,)
        n = max(1, round(n_max * imbalance ** -LAWS[law](c, C)))
        chosen.append(of_class[order[:n]])
    return subset(images, torch.cat(chosen).sort().values)


def subset(images, chosen):
    """The images at the indices `chosen`; for a number, that many spread evenly over the set.

    A number larger than the set gives all images.
    """
    if isinstance(chosen, int):
        n = min(chosen, len(images))
        chosen = torch.arange(n) * len(images) // max(n, 1)  # (n,)
    new = {"y": None if images.y is None else images.y[chosen]}
    if isinstance(images, Images):
        new["x"] = images.x[chosen]
        new["label_map"] = None if images.label_map is None else images.label_map[chosen]
    if images.paths:
        new["paths"] = [images.paths[i] for i in chosen]
        new["broken"] = sorted(set(images.broken) & set(new["paths"]))
    return replace(images, **new)
