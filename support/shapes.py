"""
shapes: a built-in set of 32x32 images that self-supervision can learn in minutes on a CPU.

An image shows five objects of one class on a grey background. A class is a texture and a shape.
Six of the eight textures belong to one class alone. Stripes and bands belong to two each, which
only the shape tells apart: with labels a network sees it, and without them it does so in part.
Every shape belongs to two classes.

A method learns what the crops of an image share, whether or not it is the class. So all that does
not belong to the class is drawn anew for each object: place, size, rotation, colours, and where its
texture begins. Two crops mostly show different objects, and what these share is their class. Only
the brightness of the background belongs to the image.

Coordinates run over [-1, 1] on both axes, so a pixel is 1/16 wide. Letters: n images.
"""
import math

import torch

# Another version draws other images. 1: 25 classes with one object in an image; 2: ten textures
VERSION = 3
CLASSES = (  # shape and texture
    ("disc", "stripes"), ("square", "bands"), ("triangle", "diagonals"), ("star", "checks"),
    ("cross", "plain"), ("disc", "fine bands"), ("square", "fine diagonals"),
    ("triangle", "fine stripes"), ("cross", "stripes"), ("star", "bands"))
OBJECTS = 5  # in an image; later ones may cover earlier ones
NOISE = .1  # standard deviation of each pixel's noise; white is 1


def make(n, seed):
    """n images of 10 classes, shuffled, all fixed by `seed`; n must be a multiple of 10.

    Returns x (n, 3, 32, 32) uint8, y (n,) int64, the class names, and label_map (n, 32, 32) uint8:
    class + 1 of the object that a pixel shows, 0 for background. Every class has n / 10 images.
    """
    C = len(CLASSES)
    generator = torch.Generator().manual_seed(seed)
    images, label_maps = zip(*(draw(c, n // C, generator) for c in range(C)))
    x, label_map = torch.cat(images), torch.cat(label_maps)  # (n, 3, 32, 32) (n, 32, 32)
    y = torch.arange(C).repeat_interleave(n // C)  # (n,)
    order = torch.randperm(n, generator=generator)  # (n,)
    names = [f"{shape}-{texture}" for shape, texture in CLASSES]
    return x[order], y[order], names, label_map[order]


def draw(c, n, generator):
    """n images (n, 3, 32, 32) uint8 of class c, and their label maps (n, 32, 32) uint8.

    The order of the random draws is part of the set: another order gives other images.
    """
    shape, texture = CLASSES[c]

    def rand(low, high):
        return low + (high - low) * torch.rand(n, 1, generator=generator)  # (n, 1)

    centres = (torch.arange(32) * 2 + 1) / 32 - 1  # of pixels
    X = centres.repeat(32)[None]  # (1, 1024)
    Y = centres.repeat_interleave(32)[None]  # (1, 1024)
    x = rand(.4, .6)[:, None].expand(n, 3, 1024)  # background
    covered = torch.zeros(n, 1024, dtype=torch.bool)

    for _ in range(OBJECTS):
        # place, rotation and size; u, v are coordinates in which the radius is about 1
        dx = X - rand(-.8, .8)
        dy = Y - rand(-.8, .8)
        angle = rand(-.25, .25)
        size = rand(.3, .5)
        U = dx * angle.cos() + dy * angle.sin()  # (n, 1024)
        V = dy * angle.cos() - dx * angle.sin()  # (n, 1024)
        distance = outline_distance(shape, U / size, V / size)  # (n, 1024)
        inside = (.5 - 16 * size * distance).clamp(0, 1)  # (n, 1024); the edge is a pixel wide

        # the texture turns with the object, but is as fine on a large one; in units of 2/3 pixels
        U = U * 24 + rand(0, 24)
        V = V * 24 + rand(0, 24)
        tone = (.5 + 1.2 * wave(texture, U, V)).clamp(0, 1)
        tone = tone * inside  # (n, 1024): share of the second colour

        # two colours of any hue: one light, one dark, either may be the first
        light, dark = rand(.7, 1), rand(0, .3)
        swap = rand(0, 1) < .5
        first = hsv_to_rgb(rand(0, 1), rand(.3, .8), light.where(~swap, dark))  # (n, 3, 1)
        second = hsv_to_rgb(rand(0, 1), rand(.3, .8), dark.where(~swap, light))  # (n, 3, 1)
        x = x + inside[:, None] * (first - x) + tone[:, None] * (second - first)  # (n, 3, 1024)
        covered |= inside > .5

    x = x + NOISE * torch.randn(n, 3, 1024, generator=generator)
    x = (x.clamp(0, 1) * 255).round().to(torch.uint8).view(n, 3, 32, 32)
    return x, (covered * (c + 1)).to(torch.uint8).view(n, 32, 32)


def outline_distance(shape, u, v):
    """Distance of the points (u, v) to the outline of a shape of CLASSES, negative inside it."""
    radius = (u * u + v * v).sqrt()
    if shape == "disc":
        return radius - .85
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - .75
    if shape == "triangle":
        return torch.maximum(-v, .5 * v + .75 ** .5 * u.abs()) - .55
    if shape == "cross":
        arm_width = torch.minimum(u.abs(), v.abs()) - .28
        arm_length = torch.maximum(u.abs(), v.abs()) - 1
        return torch.maximum(arm_width, arm_length)
    # star: the ten half-arms are folded onto one, whose edge runs from its tip (1, 0) to (ex, ey)
    fold = ((torch.atan2(v, u) % (.4 * math.pi)) - .2 * math.pi).abs()
    ex = .45 * math.cos(.2 * math.pi)
    ey = .45 * math.sin(.2 * math.pi)
    along, across = radius * fold.cos(), radius * fold.sin()
    return ((along - 1) * ey + across * (1 - ex)) / math.hypot(ey, 1 - ex)


def wave(texture, U, V):
    """A texture of CLASSES at the points (U, V), -1 to 1, of checks -2 to 2; lengths are 2/3
    pixels."""
    def sin(length, along):
        return (along * 2 * math.pi / length).sin()

    length = 4.2 if texture.startswith("fine") else 9
    if texture.endswith("stripes"):
        return sin(length, U)
    if texture.endswith("bands"):
        return sin(length, V)
    if texture.endswith("diagonals"):
        return sin(length, (U + V) / 2 ** .5)
    if texture.endswith("checks"):
        return 2 * sin(length, U) * sin(length, V)
    return -torch.ones_like(U)  # plain


def hsv_to_rgb(hue, saturation, value):
    """(n, 3, 1) from three tensors (n, 1), the hue in turns."""
    k = (torch.tensor([5., 3., 1.]) + 6 * hue) % 6  # (n, 3)
    rgb = value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)
    return rgb[..., None]
