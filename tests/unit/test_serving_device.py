"""Where a model predicts: what is asked for, and what there is."""

import asyncio
import json

import pytest
import torch

from partialhn.errors import InputError
from partialhn.networks.device_memory import explained
from pipelines.cli import main
from pipelines.label_images import predict_to_parquet
from pipelines.serving.http import Limits, Metrics, Traffic, build_app
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


def test_predictions_are_not_written_under_the_name_of_another_form(tmp_path):
    with pytest.raises(InputError, match=r"'p\.CSV', but predictions are a Parquet file; allowed"):
        predict_to_parquet("models:/a@champion", "0", str(tmp_path / "none"), "p.CSV")


class WithoutMemory:
    """A service whose trunk finds no memory on its device."""

    def __init__(self):
        self.limits, self.metrics, self.traffic = Limits(), Metrics(), Traffic()

    async def ask(self, image, task):
        with explained("features of 1 images on device far", "fewer images at once"):
            raise torch.OutOfMemoryError("far out of memory. Tried to allocate 8 bytes.")

    def check_task(self, task):
        pass

    def health(self):
        return {"version": "1", "since": 0.0}


def test_a_request_that_finds_no_memory_is_told_so_and_may_come_again():
    """With the code of a server that is busy, and counted."""
    service = WithoutMemory()
    start, reply = ask(service)
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert json.loads(reply["body"])["error"] == (
        "too little memory for features of 1 images on device far: far out of memory. Tried to "
        "allocate 8 bytes; allowed: fewer images at once")
    assert service.metrics.all.get_sample_value("partialhn_errors_total",
                                                {"kind": "no memory"}) == 1


def test_a_command_that_finds_no_memory_says_what_may_be_tried(monkeypatch, capsys):
    """Wherever it was, also where nothing else explains it."""
    class Short:
        def run(self):
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(main, "_parse", lambda words: Short())
    assert main.run(["predict"]) == 2
    assert capsys.readouterr().err == (
        "error: too little memory for this command: CUDA error: out of memory; allowed: device "
        "cpu, or more memory\n")


def test_a_body_of_the_largest_size_is_taken_whatever_may_wait():
    """It would be told to come again for ever."""
    service = WithoutMemory()
    service.limits = Limits(body_bytes=5, waiting_bytes=3)
    assert b"too little memory" in ask(service)[1]["body"]
    service.traffic.bytes = 3
    assert b"too many requests are waiting" in ask(service)[1]["body"]
    assert (service.traffic.requests, service.traffic.bytes) == (0, 3)


def test_a_server_that_stops_refuses_new_requests():
    service = WithoutMemory()
    service.traffic.stopping = True
    start, reply = ask(service)
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert b"the server stops" in reply["body"]


def ask(service):
    """Start and body of the reply to an image of 5 bytes."""
    sent, body = [], {"type": "http.request", "body": b"image", "more_body": False}

    async def receive():
        return body

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"task=a",
             "headers": []}
    asyncio.run(build_app(service)(scope, receive, send))
    return sent
