"""Which patches of a crop are hidden: the block masks of iBOT, and the inverse blocks of CAPI.

A mask is a function of (seed, step, view, position in the global batch). So it does not depend on
the number of processes or on a resumed run, and it draws from a stream of its own: turning masks on
does not change a crop.

    H x W patches of a crop; n = H W
"""
import math
import random

import torch

from views import seed_of

MASKS = 4  # first number of a seed, beside those of views.py


def rng_of(seed, step, view, position):
    return random.Random(seed_of(MASKS, seed, step, view, position))


def block_mask(H, W, most, rng):
    """iBOT's mask, (H, W) bool: rectangles until `most` patches are covered, or until ten in a row
    did not fit.

    most: a real number, and the mask never covers more. A rectangle is drawn up to ten times: its
    area between a ninth of the grid and the room that is left, its height over width between .3
    and 1 / .3, its place anywhere. It counts if it is shorter than both sides of the grid, and if
    what it newly covers is at least one patch and fits. The mask ends where ten in a row do not.
    """
    mask = torch.zeros(H, W, dtype=torch.bool)
    least_area = (min(H, W) // 3) ** 2
    covered = 0
    while covered < most:
        room = most - covered
        for _ in range(10):
            area = rng.uniform(least_area, room)  # as in iBOT's code, also if room is less
            ratio = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (h < H and w < W):
                continue
            top, left = rng.randint(0, H - h), rng.randint(0, W - w)
            new = h * w - int(mask[top:top + h, left:left + w].sum())
            if 0 < new <= room:
                mask[top:top + h, left:left + w] = True
                covered += new
                break
        else:
            break
    return mask


def inverse_block_mask(H, W, visible, rng):
    """CAPI's mask, (H, W) bool: all is hidden but one rectangle of exactly `visible` patches, which
    is shifted cyclically by random rows and columns, so that every place is hidden equally
    often."""
    low = max(math.log(0.5), math.log(visible / W ** 2))
    high = min(math.log(2), math.log(H ** 2 / (visible + 1e-5)))
    ratio = math.exp(rng.uniform(low, high))
    h = min(H, math.ceil(math.sqrt(visible * ratio)))
    w = min(W, math.ceil(math.sqrt(visible / ratio)))
    top, left = rng.randint(0, H - h), rng.randint(0, W - w)
    shown = torch.zeros(H, W, dtype=torch.bool)
    shown[top:top + h, left:left + w] = True
    shown = shown.flatten()
    shown[shown.nonzero().squeeze(1)[visible:]] = False  # surplus ones of its last rows
    shown = shown.view(H, W).roll((rng.randrange(H), rng.randrange(W)), (0, 1))
    return ~shown


def capi_masks(positions, H, W, seed, step, hidden_share=0.65, predicted_share=0.05):
    """(visible (B, v), predicted (B, q)) int64: places for these `positions` in the global batch.

    visible: the patches that the student sees, in row-major order. predicted: those of the hidden
    ones that it has to guess, drawn evenly, in random order. Both numbers are the same for every
    image, so that tensors stay rectangular.
    """
    n = H * W
    n_hidden = math.floor(hidden_share * n)
    # differs: at least one; CAPI's 0.05 of the 10 hidden patches of a 4 x 4 grid are none
    n_predicted = max(1, math.floor(predicted_share * n_hidden))
    visible, predicted = [], []
    for position in positions:
        rng = rng_of(seed, step, 0, position)
        hidden = inverse_block_mask(H, W, n - n_hidden, rng).flatten()  # (n,)
        visible.append((~hidden).nonzero()[:, 0])
        places = hidden.nonzero()[:, 0].tolist()
        predicted.append(torch.tensor(rng.sample(places, n_predicted)))
    return torch.stack(visible), torch.stack(predicted)


def ibot_masks(positions, H, W, seed, step, view, ratio=(0.1, 0.5), share=0.5):
    """(B, n) bool, the masks of a view for these `positions` in the global batch.

    share: of the crops that are masked at all; each is a coin of its own. ratio: a masked crop
    hides at most a share of its patches that is uniform in this range.
    """
    masks = []
    for position in positions:
        rng = rng_of(seed, step, view, position)
        most = rng.uniform(*ratio) * H * W if rng.random() < share else 0
        masks.append(block_mask(H, W, most, rng).flatten())
    return torch.stack(masks)
