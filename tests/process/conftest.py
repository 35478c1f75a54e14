"""Runs without Ray, whatever this pytest session has started before."""

import pytest

from pipelines.platform import cluster


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.setattr(cluster, "_is_started", lambda: False)


@pytest.fixture(scope="module")
def module_without_ray():
    """The same for fixtures that a whole file shares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_is_started", lambda: False)
        yield
