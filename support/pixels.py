"""From an image file to its pixels: upright, RGB, 8 bits, and no larger than needed; and from a
mask to the labels in it.

Pillow reads most files so that 0 is black and 255 is white. Files of one channel with more than 8
bits (16-bit PNG, 32-bit or float TIFF) do not say which value is white: a camera of 12 bits leaves
4,095 in a file that could hold 65,535. `white_of_files` finds it from the values of a set.
"""
import contextlib
import logging
import re
import threading
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

# What can be white: 1 for fractions, 255, and the largest value of 10, 12, 14, 16, 24 and 32 bits
WHITES = (1, 255, 1023, 4095, 16383, 65535, 2 ** 24 - 1, 2 ** 32 - 1)
LARGE = 2 ** 26  # pixels; of images with more, one at a time is decoded
one_large_image = threading.Lock()
IGNORED = 255  # in a mask: the label of a pixel that is not counted
# `opened` says itself what is wrong with a file. Pillow warns above 89 million pixels, which is
# nothing wrong, and refuses above twice as many, which `opened` says too
logging.getLogger("PIL").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read(path, limit=None, white=None):
    """(3, H, W) uint8 RGB of the first picture in a file.

    limit: in pixels; an image whose shorter side is longer than that is shrunk to it.
    white: the value of a deep file that stands for white; None: from this file's own values.
    ValueError, one sentence, where the file cannot be read.
    """
    with opened(path) as image:
        if image.width * image.height > LARGE:
            with one_large_image:
                return pixels(image, limit, white)
        return pixels(image, limit, white)


def read_mask(path):
    """(H, W) uint8: the palette indices or grey values of a PNG. ValueError, one sentence, where it
    cannot be read, or has neither."""
    with opened(path) as image:
        mode = image.mode
        if mode in ("P", "L"):
            return torch.from_numpy(np.array(image))  # (H, W)
    raise ValueError(f"{path} is a picture of mode {mode}, and a mask has a palette or 8 bits of "
                     "grey, whose values are the classes")


@contextlib.contextmanager
def opened(path):
    """The image in a file, as Pillow opens it. Whatever goes wrong until it is closed is a
    ValueError, one sentence with the file's name."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow has a dozen error types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason})") from None


def raw_mode(tile):
    """How a part of an image lies in its file, in Pillow's words, such as "RGB;16B"."""
    args = tile[3]  # of the decoder: that word, or a tuple that begins with it
    return str(args[0] if isinstance(args, tuple) and args else args)


def pixels(image, limit, white):
    """`read` for an image that Pillow has opened. ValueError where it has values that are not
    those of a picture."""
    bands = image.tag_v2.get(277, 1) if image.format == "TIFF" else 1  # TIFF: samples per pixel
    if bands > 4:
        raise ValueError(f"it has {bands} bands, and grey, RGB, RGBA and CMYK are read")
    # Pillow keeps the upper 8 of the 16 bits of a colour
    drops_bits = image.mode.startswith("RGB") and any(
        re.match("RGB[AX]?;16", raw_mode(tile)) for tile in image.tile)
    if limit:  # a JPEG can be decoded at a half, a fourth or an eighth of its size
        image.draft("RGB", (2 * limit, 2 * limit))
    # differs: torchvision's reader leaves pictures as the camera held them
    ImageOps.exif_transpose(image, in_place=True)
    if is_deep(image):
        values = np.asarray(image)
        own_white = white_of(values)  # ValueError for values that are not those of a picture
        values = values / (white or own_white) * 255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if drops_bits and max(most for _, most in image.getextrema()[:3]) < 16:
        raise ValueError("its colours use at most 12 of their 16 bits, of which Pillow keeps the "
                         "upper 8; scale them to 16 bits, or convert the file to 8")
    if image.mode == "P":  # straight to RGB, Pillow would warn if the palette is transparent
        image = image.convert("RGBA")
    shorter = min(image.size)
    if limit and shorter > limit:
        size = [round(side * limit / shorter) for side in image.size]
        image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3)
    return x.permute(2, 0, 1).contiguous()  # (3, H, W)


def is_deep(image):
    """Whether a file has one channel of more than 8 bits: I;16 and its kin, I of 32 bits, F."""
    return image.mode.startswith(("I", "F"))


def white_of(values):
    """The smallest of WHITES that no value exceeds. 1 is white where the values are fractions, also
    if some of them lie a little above it; whole numbers of at most 1 are 8 bits.

    ValueError for negative values, NaN, infinity and larger values.
    """
    least, most = values.min(), values.max()
    if not (least >= 0 and most <= WHITES[-1]):
        raise ValueError(f"its values run from {least:g} to {most:g}, and not from 0 for black to "
                         "1, 255 or 65,535 for white")
    if values.dtype.kind == "f" and most < 2:
        return 1
    return next(white for white in WHITES[1:] if most <= white)


def white_of_files(paths):
    """(white, number of deep files) of up to 64 files spread over a set; (None, 0) where none of
    them is deep. The brightest file decides, so that all keep their brightness to each other."""
    whites = []
    n = min(64, len(paths))
    for path in (paths[i * len(paths) // n] for i in range(n)):
        try:
            with Image.open(path) as image:
                if is_deep(image):
                    whites.append(white_of(np.asarray(image)))
        except Exception:  # `read` will say why
            continue
    return (max(whites) if whites else None), len(whites)
