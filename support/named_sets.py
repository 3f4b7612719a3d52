"""Image sets that torchvision or somebody else publishes, by the names that --data takes.

Each function takes --data-root and returns (train, test); `SETS` in data.py names it.
"""
import json
import os

import torch
from torchvision import datasets

import data
from support import folders, groups


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
        splits.append(data.Images(x, y, list(stored.classes), name))
    return tuple(splits)


def stl10(root):
    """STL-10: its 5,000 labelled training images and 8,000 test images of 10 classes, 96 x 96."""
    splits = []
    for split in ("train", "test"):
        stored = from_torchvision("stl10", datasets.STL10, root, split=split)
        x = torch.from_numpy(stored.data)  # (N, 3, H, W)
        y = torch.as_tensor(stored.labels, dtype=torch.int64)  # (N,)
        splits.append(data.Images(x, y, list(stored.classes), "stl10"))
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
        if folders.is_image(name):
            path = f"{classes[c]}/{name}"
            split = "val" if path.replace(os.sep, "/") in val_paths else "train"
            paths[split].append(os.path.join(stored.root, path))
            labels[split].append(c)
    if len(paths["val"]) != len(val_paths):
        raise ValueError(f"{val_list} names {len(val_paths)} images, and {len(paths['val'])} of "
                         f"them are under {stored.root}")
    train = data.Files(paths["train"], torch.tensor(labels["train"]), classes, "inat18")
    test = data.Files(paths["val"], torch.tensor(labels["val"]), list(classes), "inat18")
    groups.check_inat18(train.y.bincount(minlength=len(classes)))
    return train, test
