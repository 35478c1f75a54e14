"""How numbers are written for people."""

import pytest

from partialhn.numbers import (
    counted,
    duration,
    in_points,
    margin,
    percent,
    percent_with_margin,
    points,
    size,
)


def test_counts():
    assert [counted(number, "image") for number in (0, 1, 2, 1200)] == [
        "0 images", "1 image", "2 images", "1,200 images"]


@pytest.mark.parametrize(("text", "expected"), [
    (percent(0.98349), "98.3 %"), (percent(0.5, 0), "50 %"), (percent(None), "–"),
    (percent(float("nan")), "–"),
    (points(-0.012), "−1.2"), (points(-0.0001, signed=True), "0.0"),
    (points(0.003, signed=True), "+0.3"), (points(None), "–"),
    (in_points(0.061), "6.1 points"), (in_points(0.01), "1.0 point"),
    (in_points(-0.01), "−1.0 points"),
    (margin(0.8, 0.795), " ± 0.5"), (margin(0.8, None), ""),
    (percent_with_margin(0.801, 0.799), "80.1 ± 0.2 %"), (percent_with_margin(0.801, None),
                                                          "80.1 %")])
def test_shares(text, expected):
    assert text == expected


@pytest.mark.parametrize(("n_bytes", "expected"), [
    (None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_449, "99.4 kB"),
    (99_500, "100 kB"), (999_499, "999 kB"), (999_500, "1.0 MB"), (207_000_000, "207 MB"),
    (1_300_000_000, "1.3 GB"), (5e12, "5.0 TB"), (5e15, "5000 TB")])
def test_sizes_are_decimal(n_bytes, expected):
    assert size(n_bytes) == expected


@pytest.mark.parametrize(("seconds", "expected"), [
    (None, "–"), (0, "0.0 s"), (9.94, "9.9 s"), (9.95, "10 s"), (119.4, "119 s"),
    (119.6, "2 min 0 s"), (125, "2 min 5 s"), (7199.4, "119 min 59 s"), (7200, "2 h 0 min"),
    (11_400, "3 h 10 min")])
def test_durations(seconds, expected):
    assert duration(seconds) == expected


def test_only_one_kind_of_space_stands_before_a_unit():
    for text in (percent(0.1), in_points(0.1), size(5e6), duration(500), duration(9000)):
        assert text.split(" ")[0].isdigit() or "." in text.split(" ")[0]
        assert not any(character.isspace() and character != " " for character in text)
