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
from torchvision import datasets
from tqdm import tqdm

from support import shapes
from views import LONG_TAIL, THREADS, generator

LAYOUTS = ("train/<class>/* with val/<class>/* or test/<class>/*, or <class>/*, "
           "or images without class folders")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif")
IN_MEMORY = 2 << 30  # bytes; a folder with more stays on disk


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

    def __len__(self):
        return len(self.x)


@dataclass(eq=False)
class Files:
    """A set on disk, whose images are decoded when needed."""
    paths: list
    y: torch.Tensor  # (N,) int64, or None
    classes: list
    name: str
    broken: list = field(default_factory=list)  # paths of damaged files that were met so far

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        """Image i as (3, H, W) uint8, and None.

        For a damaged file: its nearest neighbour that can be read, and the path of the damaged one.
        ValueError if no neighbour can be read either.
        """
        for j in itertools.chain([i], neighbours(i, len(self), self.y)):
            image = decode(self.paths[j])
            if image is not None:
                return image, None if j == i else self.paths[i]
        raise ValueError(f"{self.paths[i]} and the images around it cannot be read")

    def note_broken(self, paths):
        """Remembers damaged files; ValueError once they are more than 1 % of the set."""
        new = [path for path in paths if path not in self.broken]
        self.broken += new
        if len(self.broken) > len(self) / 100:
            raise ValueError(f"{len(self.broken)} of {len(self)} images of {self.name} cannot be "
                             f"read, more than 1 %; the first is {self.broken[0]}")
        for path in new:
            tqdm.write(f"{path} cannot be read; a neighbour stands in for it")


def load(data, *, root="data", seed=0, img_size=32, imbalance=1.0, imbalance_law="exp"):
    """(train, test): `Images` or `Files` each; test is None for a folder without classes.

    data       a name in SETS, or a folder laid out as in LAYOUTS. Class folders without a test
               split set 10 % of each class aside for it, the same images for every seed; images
               beside class folders are left out.
    root       where the named sets lie, and where those that can be downloaded go.
    img_size   side of the largest crop: images of a folder are kept in memory at no more than
               4 times that.
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
        train, test = SETS[data](root)
    elif os.path.isdir(path):
        train, test = folder(path, img_size)
    else:
        raise ValueError(f"--data {data} is neither a folder nor one of the sets {', '.join(SETS)}")
    if imbalance > 1:
        train = long_tail(train, imbalance, seed, imbalance_law)
    return train, test


# ---- named sets: each function takes --data-root and returns (train, test) -----------------------

def builtin_shapes(root):
    """The built-in set: 10,000 and 2,000 images of 10 classes. `root` is not needed."""
    splits = []
    for n, seed in ((10_000, 31_415), (2_000, 27_182)):
        x, y, classes, label_map = shapes.make(n, seed)
        splits.append(Images(x, y, classes, "shapes", label_map=label_map))
    return tuple(splits)


def cifar10(root):
    """CIFAR-10: 50,000 and 10,000 images of 10 classes, 32 x 32 pixels."""
    return cifar("cifar10", datasets.CIFAR10, root)


def cifar100(root):
    """CIFAR-100: 50,000 and 10,000 images of 100 classes, 32 x 32 pixels."""
    return cifar("cifar100", datasets.CIFAR100, root)


def cifar(name, dataset, root):
    splits = []
    for train in (True, False):
        stored = from_torchvision(name, dataset, root, train=train)
        x = torch.from_numpy(stored.data)  # (N, H, W, 3)
        x = x.permute(0, 3, 1, 2).contiguous()  # (N, 3, H, W)
        y = torch.as_tensor(stored.targets, dtype=torch.int64)  # (N,)
        splits.append(Images(x, y, list(stored.classes), name))
    return tuple(splits)


def stl10(root):
    """STL-10: its 5,000 labelled training images and 8,000 test images of 10 classes, 96 x 96."""
    splits = []
    for split in ("train", "test"):
        stored = from_torchvision("stl10", datasets.STL10, root, split=split)
        x = torch.from_numpy(stored.data)  # (N, 3, H, W)
        y = torch.as_tensor(stored.labels, dtype=torch.int64)  # (N,)
        splits.append(Images(x, y, list(stored.classes), "stl10"))
    return tuple(splits)


def from_torchvision(name, dataset, root, **split):
    """One split of a set that torchvision reads, downloaded to `root` if it is not there."""
    try:
        return dataset(root, **split)
    except RuntimeError:  # the files are not there, or a checksum is wrong
        pass
    try:
        return dataset(root, **split, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--data {name} is not under --data-root {root} and cannot be "
                         f"downloaded: {error}") from None


def inat18(root):
    """iNaturalist-2018, long-tailed by nature: 437,513 and 24,426 images, 8,142 classes (Sec. 4.4).

    torchvision's class knows all images and no split: that is read from val2018.json, the list of
    the competition. ValueError where either is missing, or the classes are not grouped as the
    published 842 / 3,701 / 3,599.
    """
    from support import groups  # here, because no other set needs it
    val_list = os.path.join(root, "val2018.json")
    try:
        stored = datasets.INaturalist(root, version="2018")
        with open(val_list) as f:
            entries = json.load(f)["images"]  # file_name: train_val2018/Aves/2820/0123.jpg
        val_paths = {entry["file_name"].split("/", 1)[1] for entry in entries}
    except (OSError, RuntimeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"--data inat18 is expected as {root}/2018/<group>/<class>/*.jpg, where "
                         f"torchvision.datasets.INaturalist puts it, and {val_list}, its list of "
                         f"validation images ({error})") from None
    classes = list(stored.all_categories)
    paths = {"train": [], "val": []}
    labels = {"train": [], "val": []}
    for c, name in sorted(stored.index):
        if name.lower().endswith(SUFFIXES):
            path = f"{classes[c]}/{name}"
            split = "val" if path.replace(os.sep, "/") in val_paths else "train"
            paths[split].append(os.path.join(stored.root, path))
            labels[split].append(c)
    if len(paths["val"]) != len(val_paths):
        raise ValueError(f"{val_list} names {len(val_paths)} images, and {len(paths['val'])} of "
                         f"them are under {stored.root}")
    train = Files(paths["train"], torch.tensor(labels["train"]), classes, "inat18")
    test = Files(paths["val"], torch.tensor(labels["val"]), list(classes), "inat18")
    groups.check_inat18(train.y.bincount(minlength=len(classes)))
    return train, test


SETS = {
    "shapes": builtin_shapes,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "inat18": inat18,
}
VERSIONS = {"shapes": shapes.VERSION}  # of sets that are made here: another version, other images


# ---- a folder of images --------------------------------------------------------------------------

def folder(path, img_size):
    """(train, test) of a folder laid out as in LAYOUTS; test is None where there are no classes."""
    name = os.path.basename(os.path.abspath(path))
    train = class_folders(path)
    test_folder = None
    if "train" in train:  # a split, or a class that happens to be called train
        test_folder = next((split for split in ("val", "test") if split in train), None)
        below = class_folders(os.path.join(path, "train"))
        if test_folder or set(below) != {""}:
            train = below
    without_class = train.pop("", [])
    classes = list(train)
    if not classes and not without_class:
        raise ValueError(f"--data {path} holds no images; expected {LAYOUTS}")
    if not classes:
        return open_files(without_class, None, [], name, img_size), None
    if len(classes) < 2:
        raise ValueError(f"--data {path} has only one class folder, {classes[0]!r}; give two or "
                         "more, or name that folder itself to train without labels")
    if test_folder:
        test = class_folders(os.path.join(path, test_folder))
        test.pop("", None)
        unknown = sorted(set(test) - set(train))
        if unknown or not test:
            raise ValueError(f"--data {path}: the class folders of {test_folder}/ must be among "
                             f"those of train/, got {unknown or 'none'}")
    else:
        test = {c: choose_tenth(train[c], path) for c in classes}
        train = {c: sorted(set(train[c]) - set(test[c])) for c in classes}
    return (open_classes(train, classes, name, img_size),
            open_classes(test, classes, name, img_size))


def class_folders(path):
    """{class: sorted paths of its images} below path; "" for the images outside class folders."""
    images = {}
    for place, subfolders, names in os.walk(path, followlinks=True):
        # os.walk goes on into those that are left in its own list
        subfolders[:] = [folder for folder in subfolders if folder[0] != "."]
        inside = os.path.relpath(place, path)  # "." for the folder itself
        class_name = "" if inside == "." else inside.split(os.sep)[0]
        for name in names:
            if name[0] != "." and name.lower().endswith(SUFFIXES):
                images.setdefault(class_name, []).append(os.path.join(place, name))
    return {c: sorted(images[c]) for c in sorted(images)}


def choose_tenth(paths, base):
    """A tenth of a class, at least 1 image but never the only one, by a hash of the names."""
    def hash_of(path):
        name = os.path.relpath(path, base).replace(os.sep, "/")
        return hashlib.sha256(name.encode()).hexdigest()

    n = max(1, round(len(paths) / 10)) if len(paths) > 1 else 0
    return sorted(paths, key=hash_of)[:n]


def open_classes(images, classes, name, img_size):
    """`open_files` with labels: images {class: paths}; None without any image."""
    paths, labels = [], []
    for c, class_name in enumerate(classes):
        of_class = images.get(class_name, [])
        paths += of_class
        labels += [c] * len(of_class)
    if not paths:
        return None
    return open_files(paths, torch.tensor(labels), classes, name, img_size)


def open_files(paths, y, classes, name, img_size):
    """`Images` when all have one size and together less than IN_MEMORY bytes, else `Files`."""
    # differs: an image is shrunk at loading to 4 img_size, which leaves every detail that a crop
    # of 1/16 of its area can show.
    limit = 4 * img_size
    files = Files(paths, y, classes, name)
    first_image = decode(paths[0], limit)  # (3, H, W)
    if first_image is None:
        raise ValueError(f"the first image, {paths[0]}, cannot be read")
    if len(paths) * first_image.numel() >= IN_MEMORY:
        return files
    x = torch.empty(len(paths), *first_image.shape, dtype=torch.uint8)  # (N, 3, H, W)
    damaged = []  # indices
    bar = tqdm(total=len(paths), desc=f"reading {name}", disable=None)
    with ThreadPoolExecutor(THREADS) as pool, bar:
        for begin in range(0, len(paths), 256):
            some_paths = paths[begin:begin + 256]
            images = pool.map(lambda path: decode(path, limit), some_paths)
            for i, image in enumerate(images, begin):
                if image is None:
                    damaged.append(i)
                elif image.shape != first_image.shape:
                    return files
                else:
                    x[i] = image
            bar.update(len(some_paths))
    files.note_broken([paths[i] for i in damaged])
    for i in damaged:
        stand_in = next((j for j in neighbours(i, len(paths), y) if j not in damaged), None)
        if stand_in is None:
            raise ValueError(f"{paths[i]} and all other images of its class cannot be read")
        x[i] = x[stand_in]
    return Images(x, y, classes, name, paths, files.broken)


def decode(path, limit=None):
    """(3, H, W) uint8 RGB, or None for a damaged file.

    limit: in pixels; an image whose shorter side is longer than that is shrunk to it.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255
                grey = np.asarray(image).clip(0, 65535) / 257
                image = Image.fromarray(grey.round().astype(np.uint8))
            if image.mode == "P":  # straight to RGB, PIL would warn if the palette is transparent
                image = image.convert("RGBA")
            image = image.convert("RGB")
            shorter = min(image.size)
            if limit and shorter > limit:
                size = [round(side * limit / shorter) for side in image.size]
                image = image.resize(size, Image.Resampling.BICUBIC)
            x = torch.from_numpy(np.array(image))  # (H, W, 3)
            return x.permute(2, 0, 1).contiguous()  # (3, H, W)
    except Exception:  # Pillow has a dozen error types for damaged files
        return None


def neighbours(i, n, y):
    """Indices of 0..n-1 around i, nearest first, of the same class, so that the label stays true.

    y: (N,) or None; (N, 20) for VOC2007, where all 20 labels must agree.
    """
    for distance in range(1, min(n, 1000)):
        for j in (i - distance, i + distance):
            if 0 <= j < n and (y is None or bool((y[j] == y[i]).all())):
                yield j


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
