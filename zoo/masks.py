"""Which patches of a crop are hidden, and which are drawn: the block masks of iBOT, the inverse
blocks of CAPI, the random places whose vectors move prototypes, and how far prototypes stand for
places.

A mask is a function of (seed, step, view, position in the global batch). So it does not depend on
the number of processes or on a resumed run, and it draws from a stream of its own: turning masks on
does not change a crop. The same holds of random places.

    H x W patches of a crop; n = H W; B images on this process
"""
import math
import random

import numpy as np
import torch

from support import ddp
from views import generator, seed_of

# The first number of a seed says what is drawn, so that no two purposes share random numbers: these
# three here, and 1, 2, 3 and 7 in views.py
MASKS, IBOT_PLACES, CAPI_PLACES = 4, 5, 6


def rng_of(seed, step, view, position):
    return random.Random(seed_of(MASKS, seed, step, view, position))


def positions(B):
    """Those of this process's images in the global batch."""
    return range(ddp.RANK * B, (ddp.RANK + 1) * B)


# ---- iBOT --------------------------------------------------------------------------------------
def block_mask(H, W, most, rng):
    """iBOT's mask, (H, W) bool: rectangles until `most` patches are covered, or until ten in a row
    did not fit.

    most: a real number, and the mask never covers more. A rectangle is drawn up to ten times: its
    area between that of a square a third as long as the grid's shorter side, rounded down, and the
    room that is left; its height over width between .3 and 1 / .3; its place anywhere. It counts if
    it is less high and less wide than the grid, and if what it newly covers is at least one patch
    and fits. The mask ends where ten in a row do not.
    """
    mask = np.zeros((H, W), dtype=bool)  # NumPy, as torch takes three times as long for so few
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
    return torch.from_numpy(mask)


def ibot_masks(positions, H, W, seed, step, view, ratio, share):
    """(B, n) bool, the masks of a view for these `positions` in the global batch.

    share: the probability that a crop is masked at all, drawn for each crop. ratio: a masked crop
    hides at most a share of its patches that is uniform in this range.
    """
    masks = []
    for position in positions:
        rng = rng_of(seed, step, view, position)
        most = rng.uniform(*ratio) * H * W if rng.random() < share else 0
        masks.append(block_mask(H, W, most, rng).flatten())
    return torch.stack(masks)


def hidden_patches(args, B, step, grid):
    """(2, B, n) bool: the masks of this process's images in both global crops."""
    return torch.stack([ibot_masks(positions(B), grid, grid, args.seed, step, view,
                                   tuple(args.mask_ratio), args.mask_share) for view in range(2)])


def ibot_places(args, step, n):
    """(2, batch_size, S): the places whose vectors move prototypes, for all processes."""
    return torch.stack([
        torch.randint(n, (args.batch_size, args.patch_rows),
                      generator=generator(IBOT_PLACES, args.seed, step, view))
        for view in range(2)])


def rows_at(places):
    """places (2, b, S) -> rows (2bS, 2), each (crop of the 2b, place)."""
    crop = torch.arange(places.shape[0] * places.shape[1], device=places.device)
    return torch.stack([crop.repeat_interleave(places.shape[2]), places.flatten()], 1)


# ---- CAPI --------------------------------------------------------------------------------------
def inverse_block_mask(H, W, visible, rng):
    """CAPI's mask, (H, W) bool: all is hidden but one rectangle of exactly `visible` patches, which
    is shifted cyclically by random rows and columns, so that every place is hidden equally
    often."""
    # height over width: between 1/2 and 2, and such that h <= H and w <= W
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


def capi_masks(positions, H, W, seed, step, hidden_share, predicted_share):
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


def visible_and_predicted(args, B, step, grid, device):
    """(visible (B, v), predicted (B, q)): places of this process's images."""
    chosen = capi_masks(positions(B), grid, grid, args.seed, step, args.hidden_share,
                        args.predicted_share)
    return [places.to(device) for places in chosen]


def capi_places(args, step, n):
    """(batch_size, S): the places whose tokens move a mixture, for all processes."""
    return torch.randint(n, (args.batch_size, args.patch_rows),
                         generator=generator(CAPI_PLACES, args.seed, step))


# ---- what prototypes say of places -------------------------------------------------------------
@torch.no_grad()
def place_measures(protos, loss, h, places, beta, seed):
    """{"place_nats", "place_nats_shuffled"} of teacher vectors h (N, D) of patches at places (N,).

    The first is the mutual information of a patch's most probable prototype and its place. For a
    finite N it is above 0 even if the two have nothing to do with each other, unless one prototype
    takes every patch. So the second stands beside it: the same with the places shuffled.
    """
    winner = torch.cat([protos.assign(part, beta, *loss.tau_and_centre()).argmax(1)
                        for part in h.split(128)])  # (N,)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))  # (N,)
    shuffled = places[order.to(places.device)]  # (N,)
    return {"place_nats": mutual_information(winner, places),
            "place_nats_shuffled": mutual_information(winner, shuffled)}


def mutual_information(a, b):
    """Mutual information in nats of two labels a, b (N,) int64, from their joint counts."""
    (a_of, b_of), joint = torch.stack([a, b]).unique(dim=1, return_counts=True)  # (pairs,)
    p = joint.double() / len(a)  # (pairs,)
    p_a = torch.bincount(a).double() / len(a)  # (labels of a,)
    p_b = torch.bincount(b).double() / len(b)  # (labels of b,)
    return float((p * (p / (p_a[a_of] * p_b[b_of])).log()).sum())
