"""
The small labelled sets of Table 4, on which frozen features are tried: `load` gives their official splits.

Protocol: Ericsson et al. 2021. The files are read where torchvision puts them and never downloaded from here, CIFAR
aside: `torchvision.datasets.Food101(root, download=True)` and the like fetch what can still be fetched.

Letters: N images, C classes.
"""
import os
from xml.etree import ElementTree

import torch

import data
from views import generator

# name: torchvision's class, splits that stand for training, validation (None: the protocol holds out 20 % of training)
# and test, the metric, where the files are expected below the root
SETS = {
    "aircraft": ("FGVCAircraft", ("train", "val", "test"), "per_class", "fgvc-aircraft-2013b/data"),
    "caltech101": ("Caltech101", None, "per_class", "caltech101/101_ObjectCategories"),
    "cars": ("StanfordCars", ("train", None, "test"), "top1",
             "stanford_cars/{devkit, cars_train, cars_test, cars_test_annos_withlabels.mat}"),
    "cifar10": ("CIFAR10", None, "top1", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", None, "top1", "cifar-100-python"),
    "dtd": ("DTD", ("train", "val", "test"), "top1", "dtd/dtd/{images, labels}"),
    "flowers": ("Flowers102", ("train", "val", "test"), "per_class",
                "flowers-102/{jpg, imagelabels.mat, setid.mat}"),
    "food": ("Food101", ("train", None, "test"), "top1", "food-101/{images, meta}"),
    "pets": ("OxfordIIITPet", ("trainval", None, "test"), "per_class", "oxford-iiit-pet/{images, annotations}"),
    "sun397": ("SUN397", None, "top1", "SUN397/{ClassName.txt, Training_01.txt, Testing_01.txt, a, b, ...}"),
    "voc2007": ("VOCDetection", ("train", "val", "test"), "map11",
                "VOCdevkit/VOC2007/{Annotations, ImageSets/Main, JPEGImages}"),
}
# "top1": share of the test images that are right; "per_class": mean over classes of the share within each;
# "map11": mean over classes of the 11-point average precision of VOC2007
METRIC = {name: metric for name, (_, _, metric, _) in SETS.items()}
VOC = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
       "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
CALTECH, CALTECH_SEED = 30, 0  # training images per class, drawn once for everybody


def load(name, root="data"):
    """(train, val or None, test): `data.Files`, or `data.Images` for CIFAR, of a set named in METRIC.

    val None: there is no official one. y (N,) int64; of voc2007 (N, 20) int64: 1 where an object of the class is in
    the image, -1 where only ones marked difficult are (not to be counted), 0 where none is.
    ValueError for an unknown name, and where files are missing: it says where they are expected.
    """
    if name not in SETS:
        raise ValueError(f"--data {name} is not one of the transfer sets {', '.join(SETS)}")
    if name in ("cifar10", "cifar100"):
        return data.named(name, root, True), None, data.named(name, root, False)
    from torchvision import datasets
    kind, splits, _, where = SETS[name]
    if name in ("cars", "flowers"):
        try:
            import scipy.io  # noqa: F401  torchvision reads their labels with it
        except ImportError:
            raise ValueError(f"--data {name} has labels in .mat files, which need scipy: pip install scipy") from None
    kind = getattr(datasets, kind)
    try:
        if splits:
            read = voc if name == "voc2007" else listed
            sets = [s and read(kind, root, s) for s in splits]
        else:
            train, test = (caltech if name == "caltech101" else sun)(kind, root)
            sets = [train, None, test]
        if any(s and not s[0] for s in sets):
            raise ValueError("a split is empty")
    except (RuntimeError, OSError, KeyError, ValueError, ElementTree.ParseError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--data {name} is expected in {os.path.join(root, where)}, as torchvision.datasets."
                         f"{kind.__name__} lays it out ({reason})") from None
    return tuple(s and data.Files([str(p) for p in s[0]], torch.as_tensor(s[1], dtype=torch.int64), list(s[2]), name)
                 for s in sets)


def listed(kind, root, split):
    """(paths, labels, classes) of a split that torchvision's class knows; it decodes images only when asked for one."""
    raw = kind(root, split=split)
    if hasattr(raw, "_samples"):  # StanfordCars
        paths, labels = zip(*raw._samples)
    else:
        paths, labels = raw._images if hasattr(raw, "_images") else raw._image_files, raw._labels
    return paths, labels, raw.classes


def voc(kind, root, split):
    """A split of VOC2007: the classes of the objects in each image, as its classification task counts them."""
    raw = kind(root, year="2007", image_set=split)
    y = torch.zeros(len(raw), len(VOC), dtype=torch.int64)  # (N, 20)
    for row, path in zip(y, raw.annotations):
        for thing in ElementTree.parse(path).getroot().iter("object"):
            c = VOC.index(thing.findtext("name"))
            row[c] = 1 if thing.findtext("difficult") != "1" else row[c] or -1  # one that is plain to see counts
    return raw.images, y, VOC


def caltech(kind, root):
    """(train, test) of Caltech-101, the folder of background images as a class like the others: 102 classes."""
    raw = kind(root)  # leaves that folder out, and checks that all is there
    base = os.path.join(raw.root, "101_ObjectCategories")
    classes = sorted([*raw.categories, "BACKGROUND_Google"])
    train, test = ([], [], classes), ([], [], classes)
    for c, folder in enumerate(classes):
        files = sorted(f for f in os.listdir(os.path.join(base, folder)) if f.endswith(".jpg"))
        # differs: the protocol's own lists, 30 draws per class with replacement (2,416 images), are not shipped here:
        # 30 different images per class, the same ones for everybody, and all others are tested.
        order = torch.randperm(len(files), generator=generator(CALTECH_SEED, c)).tolist()
        n = min(CALTECH, len(files) - 1)
        for (paths, y, _), chosen in (train, sorted(order[:n])), (test, sorted(order[n:])):
            paths += [os.path.join(base, folder, files[i]) for i in chosen]
            y += [c] * len(chosen)
    return train, test


def sun(kind, root):
    """(train, test) of SUN397: the first of its ten official partitions, which torchvision does not read."""
    raw = kind(root)
    base = os.path.join(root, "SUN397")
    sets = []
    for split in ("Training", "Testing"):
        with open(os.path.join(base, f"{split}_01.txt")) as f:
            names = [line.strip().lstrip("/") for line in f if line.strip()]  # a/abbey/sun_aaalbzqrimafwbiv.jpg
        y = [raw.class_to_idx["/".join(name.split("/")[1:-1])] for name in names]
        sets.append(([os.path.join(base, name) for name in names], y, raw.classes))
    return sets
