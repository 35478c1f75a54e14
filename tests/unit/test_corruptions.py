"""Named corruptions: what each does to real digits, and that none is left to chance."""

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

from partialhn.data.corruptions import CORRUPTIONS, corrupt, parse
from partialhn.errors import InputError


@pytest.fixture(scope="module")
def digit():
    """A handwritten digit as a 32x32 image with three different channels."""
    grey_HW = (load_digits().images[4] * 15).astype(np.uint8)
    colour = np.stack([grey_HW, grey_HW // 2, 60 + grey_HW // 4], axis=-1)
    return Image.fromarray(colour).resize((32, 32))


def values(image):
    return np.asarray(image).astype(int)


def apply(image, transform, key=b"key", seed=0):
    return corrupt(image, parse(transform), key, seed)


@pytest.mark.parametrize("name", [*CORRUPTIONS, "grey+blur+autocontrast", "noise+jpeg"])
def test_changes_the_image_but_not_its_form_and_always_alike(digit, name):
    once, again = apply(digit, name), apply(digit.copy(), name)
    assert (once.mode, once.size) == ("RGB", (32, 32))
    assert (values(once) == values(again)).all()
    assert (values(once) != values(digit)).any()


def test_none_changes_nothing(digit):
    assert parse("none") == ()
    assert (values(apply(digit, "none")) == values(digit)).all()


def test_solarise_inverts_from_128(digit):
    before, after = values(digit), values(apply(digit, "solarise"))
    assert (after == np.where(before < 128, before, 255 - before)).all()


def test_grey_is_luma_in_all_channels(digit):
    after = values(apply(digit, "grey"))
    luma = (values(digit) * [0.299, 0.587, 0.114]).sum(-1)
    assert (after[..., 0] == after[..., 2]).all()
    assert abs(after[..., 0] - luma).max() <= 1


def test_autocontrast_uses_the_whole_range(digit):
    after = values(apply(digit, "autocontrast"))
    assert (after.min((0, 1)) == 0).all()
    assert (after.max((0, 1)) == 255).all()


def test_blur_grows_with_the_image(digit):
    large = digit.resize((64, 64))
    assert apply(digit, "blur") == digit.filter(ImageFilter.GaussianBlur(1))
    assert apply(large, "blur") == large.filter(ImageFilter.GaussianBlur(2))


def test_noise_has_its_strength_and_depends_on_image_and_seed():
    plain = Image.new("RGB", (64, 64), (128, 128, 128))
    noise = values(apply(plain, "noise")) - 128
    assert abs(noise.mean()) < 1
    assert 24 < noise.std() < 26
    assert apply(plain, "noise", key=b"other") != apply(plain, "noise")
    assert apply(plain, "noise", seed=1) != apply(plain, "noise")


def test_parts_are_applied_in_the_order_written(digit):
    assert apply(digit, "solarise+autocontrast") == apply(apply(digit, "solarise"), "autocontrast")
    assert apply(digit, "solarise+autocontrast") != apply(digit, "autocontrast+solarise")


@pytest.mark.parametrize("transform", ["fog", "grey+fog", "", "grey+", "none+grey"])
def test_unknown_name_lists_the_allowed_ones(transform):
    with pytest.raises(InputError, match="allowed: none, or solarise, blur, grey, autocontrast, "
                                         "noise, jpeg, several joined by"):
        parse(transform)
