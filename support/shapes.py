"""
shapes: a built-in set of 32x32 images that self-supervision can learn in minutes on a CPU.

25 classes as a Latin square: a class has shape s, palette p and texture (s + p) mod 5, so any two
of the three name the class. All crops of one image share its colours and its background, and a
method learns what crops share, whether or not it is the class. So here colour comes from the class,
the background is nearly grey, and what varies within a class (place, size, rotation, phase, light,
noise) is what cropping and colour jitter destroy anyway.

Coordinates run over [-1, 1] on both axes, so a pixel is 1/16 wide. Letters: n images.
"""
import math

import torch

SHAPES = ("disc", "square", "triangle", "star", "cross")
PALETTES = ("red", "lime", "green", "blue", "purple")  # hues 0, .2, .4, .6, .8
TEXTURES = ("stripes", "checks", "dots", "plain", "fine stripes")


def make(n, seed):
    """x (n, 3, 32, 32) uint8, y (n,) int64 and the 25 class names: shuffled, fixed by `seed`.

    n must be a multiple of 25: every class has n / 25 images.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([draw(c, n // 25, generator) for c in range(25)])  # (n, 3, 32, 32)
    y = torch.arange(25).repeat_interleave(n // 25)  # (n,)
    order = torch.randperm(n, generator=generator)  # (n,)
    classes = [f"{SHAPES[s]}-{PALETTES[p]}-{TEXTURES[(s + p) % 5]}"
               for s in range(5) for p in range(5)]
    return x[order], y[order], classes


def draw(c, n, generator):
    """n images (n, 3, 32, 32) uint8 of class c = 5 s + p.

    The order of the random draws is part of the set: another order gives other images.
    """
    s, p = divmod(c, 5)

    def rand(low, high):
        return low + (high - low) * torch.rand(n, 1, generator=generator)  # (n, 1)

    centres = (torch.arange(32) * 2 + 1) / 32 - 1  # of pixels
    X = centres.repeat(32)[None]  # (1, 1024)
    Y = centres.repeat_interleave(32)[None]  # (1, 1024)

    def slope():
        """A linear ramp over the image, in a random direction: (n, 1024)."""
        direction = rand(0, 2 * math.pi)
        return X * direction.cos() + Y * direction.sin()

    # place, rotation and size of the shape; u, v are coordinates in which its radius is about 1
    dx = X - rand(-.45, .45)
    dy = Y - rand(-.45, .45)
    angle = rand(0, 2 * math.pi)
    size = rand(.7, 1.2)
    U = dx * angle.cos() + dy * angle.sin()  # (n, 1024)
    V = dy * angle.cos() - dx * angle.sin()  # (n, 1024)
    distance = outline_distance(SHAPES[s], U / size, V / size)  # (n, 1024)
    inside = (.5 - 16 * size * distance).clamp(0, 1)  # (n, 1024); the edge is a pixel wide

    # the texture turns with the shape, but is as fine on a large one: units of 4/3 pixels
    U = U * 12 + rand(0, 8)
    V = V * 12 + rand(0, 8)
    tone = (.5 + 1.2 * wave(TEXTURES[(s + p) % 5], U, V)).clamp(0, 1)
    tone = tone * inside  # (n, 1024): share of the second colour

    # two colours of the palette: one light, one dark, either may be the first
    light = rand(.75, 1)
    dark = rand(.05, .3)
    swap = rand(0, 1) < .5
    value_1 = light.where(~swap, dark)
    value_2 = dark.where(~swap, light)
    hue_1, hue_2 = p / 5 + .04 * torch.randn(2, n, 1, generator=generator)
    colour_1 = hsv_to_rgb(hue_1, rand(.3, .8), value_1)  # (n, 3, 1)
    colour_2 = hsv_to_rgb(hue_2, rand(.3, .8), value_2)  # (n, 3, 1)

    background = hsv_to_rgb(rand(0, 1), rand(0, .1), rand(.4, .6))  # (n, 3, 1)
    background = background + .08 * slope()[:, None]  # (n, 3, 1024)
    x = background + inside[:, None] * (colour_1 - background) \
        + tone[:, None] * (colour_2 - colour_1)  # (n, 3, 1024)
    x = x * (1 + .2 * slope())[:, None]  # light from one side
    x = x + .15 * torch.randn(n, 3, 1024, generator=generator)
    return (x.clamp_(0, 1) * 255).round_().to(torch.uint8).view(n, 3, 32, 32)


def outline_distance(shape, u, v):
    """Distance of the points (u, v) to the outline of a shape of SHAPES, negative inside it."""
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
    """A texture of TEXTURES at the points (U, V), about -1 to 1; lengths are 4/3 pixels."""
    turn = 2 * math.pi
    if texture == "stripes":
        return (U * turn / 8).sin()
    if texture == "fine stripes":
        return (U * turn / 4).sin()
    if texture == "checks":
        return 2 * (U * turn / 8).sin() * (V * turn / 8).sin()
    if texture == "dots":
        return (U * turn / 6).cos() + (V * turn / 6).cos() - .6
    return -torch.ones_like(U)  # plain


def hsv_to_rgb(hue, saturation, value):
    """(n, 3, 1) from three tensors (n, 1), the hue in turns."""
    k = (torch.tensor([5., 3., 1.]) + 6 * hue) % 6  # (n, 3)
    rgb = value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)
    return rgb[..., None]
