"""Where a model predicts: what is asked for, and what there is."""

import pytest
import torch

from partialhn.errors import InputError
from pipelines.label_images import predict_to_parquet
from pipelines.serving.model import served_on


@pytest.mark.parametrize(("wanted", "gpus", "device"), [
    ("cpu", 2, "cpu"), ("auto", 0, "cpu"), ("auto", 0.5, "cpu"), ("auto", 1, "gpu"),
    ("gpu", 1, "gpu")])
def test_a_server_takes_a_gpu_where_the_cluster_has_one(wanted, gpus, device):
    assert served_on(wanted, gpus) == device


def test_a_server_without_the_gpu_that_it_needs_says_so():
    with pytest.raises(InputError, match="device is 'gpu', but the cluster has no GPU; allowed"):
        served_on("gpu", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="no machine without a CUDA device here")
def test_predict_without_the_gpu_that_it_needs_says_so_before_anything_else(tmp_path):
    with pytest.raises(InputError, match="device is 'gpu', but CUDA finds no GPU"):
        predict_to_parquet("models:/a@champion", "0", str(tmp_path / "none"), "o", device="gpu")
