"""
The small labelled sets of Table 4, on which frozen features are tried: `load` gives their official
splits.

Protocol: Ericsson et al. 2021. The files are read where torchvision puts them and never downloaded
from here, CIFAR aside: `torchvision.datasets.Food101(root, download=True)` and the like fetch what
can still be fetched.

Letters: N images, C classes.
"""
import os
from typing import NamedTuple
from xml.etree import ElementTree

import torch

import data
from support.entries import loaded
from views import generator


class TransferSet(NamedTuple):
    """What is known of a set before its files are opened."""
    dataset: str  # the class in torchvision.datasets
    splits: tuple  # torchvision's names of training, validation, test; None: no official one
    metric: str  # see METRIC
    where: str  # where the files are expected below the root


OFFICIAL = ("train", "val", "test")
SETS = {
    "aircraft": TransferSet("FGVCAircraft", OFFICIAL, "per_class", "fgvc-aircraft-2013b/data"),
    "caltech101": TransferSet("Caltech101", None, "per_class", "caltech101/101_ObjectCategories"),
    "cars": TransferSet("StanfordCars", ("train", None, "test"), "top1",
                        "stanford_cars/{devkit, cars_train, cars_test, "
                        "cars_test_annos_withlabels.mat}"),
    "cifar10": TransferSet("CIFAR10", None, "top1", "cifar-10-batches-py"),
    "cifar100": TransferSet("CIFAR100", None, "top1", "cifar-100-python"),
    "dtd": TransferSet("DTD", OFFICIAL, "top1", "dtd/dtd/{images, labels}"),
    "flowers": TransferSet("Flowers102", OFFICIAL, "per_class",
                           "flowers-102/{jpg, imagelabels.mat, setid.mat}"),
    "food": TransferSet("Food101", ("train", None, "test"), "top1", "food-101/{images, meta}"),
    "pets": TransferSet("OxfordIIITPet", ("trainval", None, "test"), "per_class",
                        "oxford-iiit-pet/{images, annotations}"),
    "sun397": TransferSet("SUN397", None, "top1",
                          "SUN397/{ClassName.txt, Training_01.txt, Testing_01.txt, a, b, ...}"),
    "voc2007": TransferSet("VOCDetection", OFFICIAL, "map11",
                           "VOCdevkit/VOC2007/{Annotations, ImageSets/Main, JPEGImages}"),
}
# "top1": share of the test images that are right; "per_class": mean over classes of the share
# within each; "map11": mean over classes of the 11-point average precision of VOC2007
METRIC = {name: known.metric for name, known in SETS.items()}
VOC = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
       "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
       "train", "tvmonitor")  # its 20 classes
CALTECH_TRAIN, CALTECH_SEED = 30, 0  # training images per class, drawn once for everybody


def load(name, root="data"):
    """(train, val or None, test): `data.Files`, or `data.Images` for CIFAR, of a set named in
    METRIC.

    val None: there is no official one, and the protocol holds 20 % of the training images out.
    y (N,) int64; of voc2007 (N, 20) int64: 1 where an object of the class is in the image, -1 where
    only ones marked difficult are (not to be counted), 0 where none is.
    ValueError for an unknown name, and where files are missing: it says where they are expected.
    """
    if name not in SETS:
        raise ValueError(f"--data {name} is not one of the transfer sets {', '.join(SETS)}")
    if name in ("cifar10", "cifar100"):
        train, test = loaded(data.SETS[name])(root)
        return train, None, test
    if name in ("cars", "flowers"):
        try:
            import scipy.io  # noqa: F401  torchvision reads their labels with it
        except ImportError:
            raise ValueError(f"--data {name} has labels in .mat files, which need scipy: pip "
                             "install scipy") from None
    from torchvision import datasets
    known = SETS[name]
    dataset = getattr(datasets, known.dataset)
    try:
        splits = read_splits(name, dataset, known.splits, root)
        if any(split and not split[0] for split in splits):
            raise ValueError("a split is empty")
    except (RuntimeError, OSError, KeyError, ValueError, ElementTree.ParseError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--data {name} is expected in {os.path.join(root, known.where)}, as "
                         f"torchvision.datasets.{known.dataset} lays it out ({reason})") from None
    return tuple(split and as_files(name, *split) for split in splits)


def read_splits(name, dataset, splits, root):
    """[train, val or None, test] of (paths, labels, classes), by torchvision's class `dataset`."""
    if name == "caltech101":
        train, test = caltech(dataset, root)
        return [train, None, test]
    if name == "sun397":
        train, test = sun(dataset, root)
        return [train, None, test]
    read = voc if name == "voc2007" else official
    return [split and read(dataset, root, split) for split in splits]


def as_files(name, paths, labels, classes):
    y = torch.as_tensor(labels, dtype=torch.int64)  # (N,), or (N, 20) of voc2007
    return data.Files([str(path) for path in paths], y, list(classes), name)


def official(dataset, root, split):
    """(paths, labels, classes) of a split that torchvision's class knows; it decodes images only
    when asked for one."""
    stored = dataset(root, split=split)
    if hasattr(stored, "_samples"):  # StanfordCars
        paths, labels = zip(*stored._samples)
    elif hasattr(stored, "_images"):
        paths, labels = stored._images, stored._labels
    else:
        paths, labels = stored._image_files, stored._labels
    # torchvision 0.21 has no names for Flowers102, which has 102 classes
    return paths, labels, getattr(stored, "classes", [str(i) for i in range(1, 103)])


def voc(dataset, root, split):
    """A split of VOC2007: the classes of the objects in each image, as its classification task
    counts them."""
    stored = dataset(root, year="2007", image_set=split)
    y = torch.zeros(len(stored), len(VOC), dtype=torch.int64)  # (N, 20)
    for i, path in enumerate(stored.annotations):
        for thing in ElementTree.parse(path).getroot().iter("object"):
            c = VOC.index(thing.findtext("name"))
            if thing.findtext("difficult") != "1":
                y[i, c] = 1
            elif y[i, c] == 0:
                y[i, c] = -1  # until an object of the class that is not difficult comes
    return stored.images, y, VOC


def caltech(dataset, root):
    """(train, test) of Caltech-101, the folder of background images as a class like the others: 102
    classes."""
    stored = dataset(root)  # leaves that folder out, and checks that all is there
    base = os.path.join(stored.root, "101_ObjectCategories")
    classes = sorted([*stored.categories, "BACKGROUND_Google"])
    train = ([], [], classes)  # paths, labels, classes
    test = ([], [], classes)
    for c, folder in enumerate(classes):
        files = sorted(name for name in os.listdir(os.path.join(base, folder))
                       if name.endswith(".jpg"))
        # differs: the protocol's own lists, 30 draws per class with replacement (2,416 images), are
        # not shipped here: 30 different images per class, the same ones for everybody, and all
        # others are tested.
        order = torch.randperm(len(files), generator=generator(CALTECH_SEED, c)).tolist()
        n = min(CALTECH_TRAIN, len(files) - 1)
        for (paths, labels, _), chosen in (train, order[:n]), (test, order[n:]):
            paths += [os.path.join(base, folder, files[i]) for i in sorted(chosen)]
            labels += [c] * len(chosen)
    return train, test


def sun(dataset, root):
    """(train, test) of SUN397: the first of its ten official partitions, which torchvision does not
    read."""
    stored = dataset(root)
    base = os.path.join(root, "SUN397")
    splits = []
    for split in ("Training", "Testing"):
        with open(os.path.join(base, f"{split}_01.txt")) as file:
            lines = [line.strip().lstrip("/") for line in file]  # a/abbey/sun_aaalbzqrimafwbiv.jpg
        names = [line for line in lines if line]
        labels = [stored.class_to_idx["/".join(name.split("/")[1:-1])] for name in names]
        splits.append(([os.path.join(base, name) for name in names], labels, stored.classes))
    return splits
