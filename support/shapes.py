"""
shapes: a built-in set of 32x32 images that self-supervision can learn in minutes on a CPU.

25 classes as a Latin square: shape s, palette p, texture (s + p) mod 5; any two of the three name the class. All crops
of one image share its colours and its background, and a method learns what crops share, whether or not it is the class.
So here colour comes from the class, the background is nearly grey, and what varies within a class (place, size,
rotation, phase, light, noise) is what cropping and colour jitter destroy anyway.
"""
import math

import torch

SHAPES = ("disc", "square", "triangle", "star", "cross")
PALETTES = ("red", "lime", "green", "blue", "purple")  # hues 0, .2, .4, .6, .8
TEXTURES = ("stripes", "checks", "dots", "plain", "fine stripes")


def make(n, seed):
    """x (n, 3, 32, 32) uint8, y (n,) int64, the 25 names: balanced (n a multiple of 25), shuffled, fixed by `seed`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.cat([draw(c, n // 25, g) for c in range(25)])  # (n, 3, 32, 32)
    y, order = torch.arange(25).repeat_interleave(n // 25), torch.randperm(n, generator=g)  # (n,)
    classes = [f"{SHAPES[s]}-{PALETTES[p]}-{TEXTURES[(s + p) % 5]}" for s in range(5) for p in range(5)]
    return x[order], y[order], classes


def draw(c, n, g):
    """n images of class c = 5 s + p."""
    s, p = divmod(c, 5)
    shape, texture = SHAPES[s], TEXTURES[(s + p) % 5]

    def rand(low, high):
        return low + (high - low) * torch.rand(n, 1, generator=g)

    def slope():  # a linear ramp over the image in a random direction
        a = rand(0, 2 * math.pi)
        return X * a.cos() + Y * a.sin()

    def colour(hue, saturation, value):  # HSV to RGB, (n, 3, 1)
        k = (torch.tensor([5., 3., 1.]) + 6 * hue) % 6
        return (value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))[..., None]

    at = (torch.arange(32) * 2 + 1) / 32 - 1  # pixel centres; one pixel is 1/16
    X, Y = at.repeat(32)[None], at.repeat_interleave(32)[None]  # (1, 1024)
    dx, dy, a, size = X - rand(-.45, .45), Y - rand(-.45, .45), rand(0, 2 * math.pi), rand(.7, 1.2)
    U, V = dx * a.cos() + dy * a.sin(), dy * a.cos() - dx * a.sin()  # (n, 1024)
    u, v = U / size, V / size
    if shape == "disc":  # d: distance to the outline, negative inside
        d = (u * u + v * v).sqrt() - .85
    elif shape == "square":
        d = torch.maximum(u.abs(), v.abs()) - .75
    elif shape == "triangle":
        d = torch.maximum(-v, .5 * v + .75 ** .5 * u.abs()) - .55
    elif shape == "cross":
        d = torch.maximum(torch.minimum(u.abs(), v.abs()) - .28, torch.maximum(u.abs(), v.abs()) - 1)
    else:  # a half-arm of the star, the others folded onto it
        fold = ((torch.atan2(v, u) % (.4 * math.pi)) - .2 * math.pi).abs()
        r, ex, ey = (u * u + v * v).sqrt(), .45 * math.cos(.2 * math.pi), .45 * math.sin(.2 * math.pi)
        d = ((r * fold.cos() - 1) * ey + r * fold.sin() * (1 - ex)) / math.hypot(ey, 1 - ex)
    inside = (.5 - 16 * size * d).clamp(0, 1)  # the edge is a pixel wide

    U, V, turn = U * 12 + rand(0, 8), V * 12 + rand(0, 8), 2 * math.pi  # units of 4/3 pixels, whatever the size
    tone = {"stripes": lambda: (U * turn / 8).sin(), "fine stripes": lambda: (U * turn / 4).sin(),
            "checks": lambda: 2 * (U * turn / 8).sin() * (V * turn / 8).sin(), "plain": lambda: -torch.ones_like(U),
            "dots": lambda: (U * turn / 6).cos() + (V * turn / 6).cos() - .6}[texture]()
    tone = (.5 + 1.2 * tone).clamp(0, 1) * inside  # share of the second colour
    light, dark, swap = rand(.75, 1), rand(.05, .3), rand(0, 1) < .5
    light, dark = light.where(~swap, dark), dark.where(~swap, light)
    hue, hue2 = p / 5 + .04 * torch.randn(2, n, 1, generator=g)
    one, two = colour(hue, rand(.3, .8), light), colour(hue2, rand(.3, .8), dark)  # (n, 3, 1)
    back = colour(rand(0, 1), rand(0, .1), rand(.4, .6)) + .08 * slope()[:, None]  # (n, 3, 1024)
    x = back + inside[:, None] * (one - back) + tone[:, None] * (two - one)
    x = x * (1 + .2 * slope())[:, None] + .15 * torch.randn(n, 3, 1024, generator=g)
    return (x.clamp_(0, 1) * 255).round_().to(torch.uint8).view(n, 3, 32, 32)
