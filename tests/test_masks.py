"""Masks are a function of seed and position, are of all kinds, and are never empty."""

import numpy as np
import torch

from train.data.images.masks import BOX_SHARE, FULL_SHARE, draw_masks

SIZE = (48, 32)  # width, height


def test_a_mask_is_a_function_of_seed_and_position():
    together = draw_masks(3, range(100, 140), SIZE)
    assert together.shape == (40, 1, 32, 48)
    separately = torch.cat([draw_masks(3, [p], SIZE) for p in reversed(range(100, 140))]).flip(0)
    assert torch.equal(together, separately)
    assert not torch.equal(together, draw_masks(4, range(100, 140), SIZE))


def test_masks_are_of_all_kinds_and_none_is_empty():
    masks = draw_masks(0, range(3000), SIZE)[:, 0].numpy()
    assert set(np.unique(masks)) == {0, 1}
    cover = masks.mean((1, 2))
    assert cover.min() > 0
    full = cover == 1
    rows, columns = masks.any(2).sum(1), masks.any(1).sum(1)
    box = (rows * columns == masks.sum((1, 2))) & ~full
    error = 3 * (0.25 / 3000) ** 0.5
    assert abs(full.mean() - FULL_SHARE) < error
    assert BOX_SHARE - error < box.mean() < BOX_SHARE + 0.05  # a short thick stroke can be a rectangle
    assert 0.02 < cover[~full & ~box].mean() < 0.5
    assert (cover[~full & ~box] < 0.02).any()  # thin strokes are among them


def test_every_place_is_sometimes_masked_and_sometimes_unmasked():
    masks = draw_masks(1, range(2000), SIZE)[:, 0]
    often = masks.mean(0)
    assert often.min() > 0.15
    assert often.max() < 0.6
