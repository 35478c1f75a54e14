"""Runs without Ray, whatever this pytest session has started before."""

import pytest

from pipelines import cluster


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.setattr(cluster, "_is_started", lambda: False)
