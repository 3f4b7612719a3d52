"""Images with the label of each of their pixels: a named set that has label maps, or a folder.

A folder must be laid out as PASCAL VOC: JPEGImages/NAME.jpg, SegmentationClass/NAME.png with the
class of each pixel as its palette index or grey value, and the names of the images, one a line, in
ImageSets/Segmentation/train.txt and val.txt.

Letters: n images of S x S pixels, C classes.
"""
import os
from dataclasses import dataclass

import torch
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import data
from support import evaluation, pixels, transfer
from support.files import TEXT

# Named sets that have no label maps: one must not be downloaded to be refused.
WITHOUT_MAPS = ("cifar10", "cifar100", "stl10", "inat18")
VOC = ["background", *transfer.VOC]


@dataclass(eq=False)
class Segmented:
    """Images and the label of each of their pixels."""
    x: torch.Tensor  # (n, 3, S, S) uint8
    maps: torch.Tensor  # (n, S, S) uint8: class, or pixels.IGNORED

    def __len__(self):
        return len(self.x)


def squeeze(x, maps, size):
    """(x (..., 3, size, size), maps (..., size, size)), uint8 both: images x (..., 3, H, W) by
    bicubic interpolation, label maps (..., H, W) by their nearest pixel. The aspect is lost."""
    if x.shape[-2:] != (size, size):
        x = v2.functional.resize(x, [size, size], InterpolationMode.BICUBIC, antialias=True)
        maps = v2.functional.resize(maps[..., None, :, :], [size, size],
                                    InterpolationMode.NEAREST_EXACT)[..., 0, :, :]
    return x, maps


def named_set(name, args, size, most):
    """(train, test, class names) of a named set that has label maps; size None: as they are.

    args: of the run, see evaluation.load_images. most: (training, test) images, spread evenly over
    the set. ValueError where the set has no label maps.
    """
    refusal = f"--data {name} has no label maps; give shapes, or a folder in VOC layout"
    if name in WITHOUT_MAPS:
        raise ValueError(refusal)
    *splits, _ = evaluation.load_images(name, args)
    if any(images is None or getattr(images, "label_map", None) is None for images in splits):
        raise ValueError(refusal)
    sets = []
    for images, count in zip(splits, most):
        images = data.subset(images, count)
        sets.append(Segmented(*squeeze(images.x, images.label_map, size or images.x.shape[-1])))
    return *sets, ["background", *splits[0].classes]


def voc_folder(folder, size, most):
    """(train, test, class names) of a folder in VOC layout, images and masks squeezed to `size`.

    most: (training, test) images, spread evenly over the lists. The classes are those up to the
    largest label in the masks that were read; they get VOC's names where they are 21. ValueError,
    one sentence that names the file, for what is missing, damaged or does not fit.
    """
    folder = os.path.expanduser(folder)
    lists = {}  # {split: names}
    for split in ("train", "val"):
        path = os.path.join(folder, "ImageSets", "Segmentation", f"{split}.txt")
        if not os.path.isfile(path):
            raise ValueError(f"--data {folder} is neither shapes nor a folder in VOC layout: "
                             f"there is no {path}")
        with open(path, **TEXT) as file:
            lists[split] = [line.strip() for line in file if line.strip()]
        if not lists[split]:
            raise ValueError(f"{path} names no images")
    if both := set(lists["train"]) & set(lists["val"]):
        raise ValueError(f"--data {folder}: the image {min(both)} is in train.txt and in val.txt, "
                         "and a probe is tested on images that it was not fitted to")
    sets = []
    for (split, names), count in zip(lists.items(), most):
        n = min(count, len(names))
        x = torch.empty(n, 3, size, size, dtype=torch.uint8)  # (n, 3, S, S)
        maps = torch.empty(n, size, size, dtype=torch.uint8)  # (n, S, S)
        for i in tqdm(range(n), desc=f"reading {split}", unit="img", leave=False, disable=None):
            x[i], maps[i] = voc_image(folder, names[i * len(names) // n], size)
        sets.append(Segmented(x, maps))
    labels = torch.cat([part.maps[part.maps != pixels.IGNORED] for part in sets])
    C = int(labels.max()) + 1 if len(labels) else 0
    return *sets, VOC if C == len(VOC) else [f"class {c}" for c in range(C)]


def voc_image(folder, name, size):
    """(image (3, size, size), label map (size, size)), uint8, of an image of a folder in VOC
    layout."""
    image = os.path.join(folder, "JPEGImages", f"{name}.jpg")
    mask = os.path.join(folder, "SegmentationClass", f"{name}.png")
    x, labels = pixels.read(image), pixels.read_mask(mask)  # (3, H, W), (H, W)
    if x.shape[1:] != labels.shape:
        (h, w), (H, W) = labels.shape, x.shape[1:]
        raise ValueError(f"{mask} has {w} x {h} pixels, and its image has {W} x {H}")
    return squeeze(x, labels, size)
