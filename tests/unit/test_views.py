"""Augmented views: what they may do, and that seed, view and row alone decide."""

import numpy as np
import pytest
import torch

from partialhn.data.augment import augment

ROWS = np.arange(64)


@pytest.fixture
def pictures():
    return torch.randint(1, 255, (64, 3, 16, 16), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))


def test_the_first_view_is_the_plain_image(pictures):
    assert torch.equal(augment(pictures, ROWS, 64, 0, "crop-flip", 0), pictures)
    assert torch.equal(augment(pictures, ROWS, 64, 3, "none", 0), pictures)


def test_flip_mirrors_about_half(pictures):
    out = augment(pictures, ROWS, 64, 1, "flip", 0)
    mirrored = (out == pictures.flip(3)).flatten(1).all(1)
    plain = (out == pictures).flatten(1).all(1)
    assert (mirrored ^ plain).all()
    assert 16 < mirrored.sum() < 48


def test_crop_shifts_by_up_to_an_eighth_and_fills_with_black(pictures):
    out = augment(pictures, ROWS, 64, 1, "crop", 0)
    seen = set()
    for before, after in zip(pictures, out, strict=True):
        padded = torch.zeros(3, 20, 20, dtype=torch.uint8)
        padded[:, 2:18, 2:18] = before
        fits = [(dy, dx) for dy in range(5) for dx in range(5)
                if torch.equal(after, padded[:, dy:dy + 16, dx:dx + 16])]
        assert len(fits) == 1
        seen.add(fits[0])
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == set(range(5))


def test_an_image_looks_the_same_in_any_company(pictures):
    whole = augment(pictures, ROWS, 64, 2, "crop-flip", 5)
    some = np.array([40, 3, 17])
    assert torch.equal(augment(pictures[some], some, 64, 2, "crop-flip", 5), whole[some])


def test_seed_and_view_change_what_is_drawn(pictures):
    one, two, three = (augment(pictures, ROWS, 64, view, "crop-flip", seed)
                       for view, seed in ((1, 0), (2, 0), (1, 1)))
    assert torch.equal(augment(pictures, ROWS, 64, 1, "crop-flip", 0), one)
    assert not torch.equal(one, two)
    assert not torch.equal(one, three)
    assert one.dtype == torch.uint8
