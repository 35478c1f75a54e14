"""The recorded table of number types (tests/bench/dtypes.py): what fewer bytes cost."""

import json
import typing
from pathlib import Path

import pytest

from partialhn.config import Compression
from partialhn.features.table import OWN

RECORDED = json.loads((Path(__file__).parent / "feature-dtypes.json").read_text(encoding="utf-8"))
ROWS = {(row["dtype"], row["compression"]): row for row in RECORDED["rows"]}


def test_every_number_type_and_compression_was_measured():
    assert ROWS.keys() == {(dtype, compression) for dtype in OWN
                           for compression in typing.get_args(Compression)}
    assert RECORDED["command"].startswith("python tests/bench/dtypes.py")


@pytest.mark.parametrize("dtype", OWN)
def test_fewer_bytes_cost_no_accuracy_that_can_be_told(dtype):
    exact = ROWS["float32", "none"]
    for compression in typing.get_args(Compression):
        row = ROWS[dtype, compression]
        assert row["mean_acc"] == pytest.approx(exact["mean_acc"], abs=0.01)
        assert row["bytes_per_image_and_view"] <= exact["bytes_per_image_and_view"]
    assert ROWS[dtype, "lz4"]["acc"] == ROWS[dtype, "none"]["acc"]
    assert ROWS[dtype, "lz4"]["bytes_per_image_and_view"] < (
        ROWS[dtype, "none"]["bytes_per_image_and_view"])
