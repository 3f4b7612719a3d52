"""zoo/masks.py: statistics of masks beside those of the official code, and what fixes a mask."""
import itertools
import math
import random

import pytest
import torch

import views
from conftest import TINY
from zoo import ibot, masks
from zoo.masks import block_mask, ibot_masks, inverse_block_mask

RATIO = (0.1, 0.5)  # of --mask-ratio


@pytest.mark.parametrize("side, mean, corner, centre, count", [
    (14, 0.295, 0.033, 0.54, 3000), (8, 0.290, 0.090, 0.49, 3000), (4, 0.266, 0.181, 0.36, 3000)])
def test_blocks_cover_what_ibots_official_code_covers(side, mean, corner, centre, count):
    rng = random.Random(0)
    masks = []
    for _ in range(count):
        most = rng.uniform(0.1, 0.5) * side ** 2
        mask = block_mask(side, side, most, rng)
        assert mask.sum() <= most
        masks.append(mask)
    hidden = torch.stack(masks).float().mean(0)  # (side, side)
    assert float(hidden.mean()) == pytest.approx(mean, abs=0.006)
    corners = hidden[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert float(corners) == pytest.approx(corner, abs=0.012)
    middle = hidden[side // 2 - 1:side // 2 + 1, side // 2 - 1:side // 2 + 1].mean()
    assert float(middle) == pytest.approx(centre, abs=0.025)


def test_at_14_patches_a_share_is_nearly_reached():
    rng = random.Random(1)
    for share, low, high, mean in ((0.1, 12, 19, 17.6), (0.3, 50, 58, 57.3), (0.5, 89, 98, 97.5)):
        counts = [int(block_mask(14, 14, share * 196, rng).sum()) for _ in range(300)]
        assert min(counts) >= low - 4 and max(counts) <= high
        assert sum(counts) / 300 == pytest.approx(mean, abs=0.6)


def test_a_share_of_nothing_hides_nothing_and_no_rectangle_spans_a_side():
    assert not block_mask(8, 8, 0, random.Random(0)).any()
    rng = random.Random(2)
    for _ in range(200):  # a single rectangle: what fits is used up by the first one
        mask = block_mask(6, 6, 4.0, rng)
        assert mask.any(0).sum() < 6 and mask.any(1).sum() < 6


def test_half_of_the_crops_are_masked_each_by_a_coin_of_its_own():
    masks = ibot_masks(range(2000), 4, 4, seed=0, step=0, view=0, ratio=RATIO, share=0.5)
    assert float(masks.any(1).float().mean()) == pytest.approx(0.5, abs=0.04)
    assert not ibot_masks(range(50), 4, 4, 0, 0, 0, RATIO, share=0).any()
    assert ibot_masks(range(50), 8, 8, 0, 0, 0, RATIO, share=1).any(1).all()


def test_a_mask_depends_on_seed_step_view_and_position_alone():
    def masks(positions, seed=3, step=5, view=1):
        return ibot_masks(positions, 8, 8, seed, step, view, RATIO, share=0.5)
    whole = masks(range(8))
    parts = [masks(range(4 * rank, 4 * rank + 4)) for rank in range(2)]
    assert torch.equal(whole, torch.cat(parts))
    for other in (dict(seed=4), dict(step=6), dict(view=0)):
        assert not torch.equal(whole, masks(range(8), **other))


@pytest.mark.parametrize("side, hidden, share", [(16, 166, 0.65), (14, 127, 0.65), (8, 41, 0.64),
                                                 (6, 23, 0.64)])
def test_inverse_blocks_hide_the_same_number_everywhere_equally_often(side, hidden, share):
    rng = random.Random(0)
    assert hidden == int(0.65 * side ** 2)
    masks = torch.stack([inverse_block_mask(side, side, side ** 2 - hidden, rng)
                         for _ in range(1500)])
    assert (masks.flatten(1).sum(1) == hidden).all()
    often = masks.float().mean(0)
    assert often.min() > share - 0.06 and often.max() < share + 0.06


def test_an_inverse_block_shows_one_rectangle_around_the_edges():
    """Rolled back, what is shown fills whole rows of a rectangle but the last."""
    rng = random.Random(5)
    for _ in range(50):
        shown = ~inverse_block_mask(8, 8, 23, rng)
        rows = [[r for r in range(8) if shown[r, c]] for c in range(8)]
        assert sum(map(len, rows)) == 23
        assert len({len(r) for r in rows if r}) <= 2  # full columns, and shorter ones at its end


@pytest.mark.parametrize("height, width, hidden", [(4, 2, 0), (2, 4, 0), (3, 2, 6)])
def test_a_block_is_shorter_than_both_sides_of_the_grid(height, width, hidden):
    class Rng:
        """Draws the same block each time, in the first corner."""
        def __init__(self):
            self.draws = itertools.cycle([height * width, math.log(height / width)])

        def uniform(self, low, high):
            return next(self.draws)

        def randint(self, low, high):
            return low
    assert int(block_mask(4, 4, 8, Rng()).sum()) == hidden


def test_no_purpose_of_random_numbers_shares_its_seeds_with_another():
    first = [views.ORDER, views.AUGMENT, views.LONG_TAIL, views.DROP_PATH,
             masks.MASKS, masks.IBOT_PLACES, masks.CAPI_PLACES]
    assert len(set(first)) == len(first)


def args_of(*flags):
    return ibot.parse([*TINY, "--out", "nowhere", *flags])


def test_the_flags_say_how_much_is_hidden_and_the_crops_of_an_image_hide_other_patches():
    few = masks.hidden_patches(args_of("--mask-ratio", "0.1", "0.1", "--mask-share", "1"), 40, 0, 8)
    assert few.shape == (2, 40, 64) and few.any(2).all() and few.sum(2).max() <= 6
    half = args_of("--mask-ratio", "0.5", "0.5", "--mask-share", "1")
    many = masks.hidden_patches(half, 40, 0, 8)
    assert many.sum(2).float().mean() > 20
    assert not torch.equal(many[0], many[1])


def test_places_of_the_two_crops_are_drawn_apart():
    places = ibot.ibot_places(args_of("--patch-rows", "3", "--place-mean"), 5, 16)
    assert not torch.equal(places[0], places[1])


def test_an_inverse_block_is_at_most_twice_as_long_as_wide():
    """90 of 16 x 16 patches: a side has between sqrt(45) and sqrt(180) of them, rounded up."""
    rng = random.Random(1)
    sides = []
    for _ in range(300):
        shown = ~inverse_block_mask(16, 16, 90, rng)
        sides += [int(shown.any(0).sum()), int(shown.any(1).sum())]
    assert (min(sides), max(sides)) == (7, 14)
