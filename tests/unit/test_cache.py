"""The shared cache of remote shards: bounded, one download for all, nothing in use evicted."""

import errno
import hashlib
import io
import multiprocessing
import os
import time

import pytest

from partialhn.errors import IntegrityError
from partialhn.features import cache as module
from partialhn.features.cache import ShardCache, locked

KIB = 1024


def shard(number, size=100 * KIB):
    """(name, size, sha256, content) of a shard whose content says which it is."""
    content = bytes([number % 256]) * size
    return f"part-{number:05d}-x.arrow", size, hashlib.sha256(content).hexdigest(), content


class Remote:
    """Counts the downloads of each shard."""

    def __init__(self, content):
        self.content, self.opened = content, 0

    def __call__(self):
        self.opened += 1
        return io.BytesIO(self.content)


def fetch(cache, number, size=100 * KIB):
    name, size, digest, content = shard(number, size)
    remote = Remote(content)
    found = cache.fetch("key", name, size, digest, remote)
    assert found.to_pybytes() == content
    return found, remote.opened


def copies(cache):
    return sorted(int(path.name[5:10]) for path in cache.folder.glob("*/*.arrow"))


@pytest.fixture
def cache(tmp_path):
    """Room for three shards."""
    return ShardCache(tmp_path / "cache", 320 * KIB)


def test_a_shard_is_downloaded_and_hashed_once(cache, monkeypatch):
    assert fetch(cache, 1)[1] == 1
    name, size, digest, content = shard(1)
    monkeypatch.setattr(module.hashlib, "sha256", None)
    found = cache.fetch("key", name, size, digest, lambda: pytest.fail("downloaded again"))
    assert found.to_pybytes() == content


def test_a_copy_that_was_changed_is_fetched_again(cache):
    fetch(cache, 1)
    path = cache.folder / "key" / shard(1)[0]
    path.write_bytes(b"x" * 100 * KIB)
    os.utime(path, (1, 1))
    assert fetch(cache, 1)[1] == 1
    path.unlink()
    assert fetch(cache, 1)[1] == 1


def test_what_was_used_longest_ago_makes_way(cache):
    for number in (1, 2, 3):
        fetch(cache, number)
        time.sleep(0.02)
    fetch(cache, 1)
    time.sleep(0.02)
    fetch(cache, 4)
    assert copies(cache) == [1, 3, 4]
    assert sum(path.stat().st_size for path in cache.folder.glob("*/*.arrow")) <= cache.limit


def test_what_is_in_use_stays(cache):
    held, _ = fetch(cache, 1)
    for number in (2, 3, 4, 5):
        fetch(cache, number)
        time.sleep(0.02)
    assert copies(cache) == [1, 4, 5]
    part = held.slice(50)
    del held
    fetch(cache, 6)
    assert 1 in copies(cache), "a part of it is still used"
    del part
    fetch(cache, 7)
    assert 1 not in copies(cache)


def test_without_room_it_is_read_into_memory_with_a_warning(cache):
    with pytest.warns(UserWarning, match=r"no room for shard part-00009-x\.arrow of 409600"):
        found, opened = fetch(cache, 9, 400 * KIB)
    assert (found.size, opened) == (400 * KIB, 1)
    held = [fetch(cache, number) for number in (1, 2, 3)]
    with pytest.warns(UserWarning, match="give the cache more room"):
        fetch(cache, 4)
    assert copies(cache) == [1, 2, 3]
    del held


@pytest.mark.parametrize("full", ["once", "always"])
def test_a_full_disk_evicts_and_then_reads_into_memory(cache, monkeypatch, full):
    fetch(cache, 1)
    real, calls = module._download, []

    def download(*arguments):
        calls.append(1)
        if full == "always" or len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(module, "_download", download)
    if full == "always":
        with pytest.warns(UserWarning, match="no room"):
            fetch(cache, 2)
    else:
        assert fetch(cache, 2)[1] == 1
        assert 2 in copies(cache)
    assert not list(cache.folder.glob("*/.*.draft"))
    assert len(calls) == 2


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"x",
                                    lambda content: b"\1" + content[1:], lambda content: b""])
@pytest.mark.filterwarnings("ignore:the cache .* has no room")
@pytest.mark.parametrize("room", [1, 1 << 20])
def test_a_damaged_remote_shard_is_named_and_not_kept(tmp_path, change, room):
    cache = ShardCache(tmp_path, room)
    name, size, digest, content = shard(2)
    with pytest.raises(IntegrityError, match=f"shard {name} is damaged.*expected .* of {size}"):
        cache.fetch("key", name, size, digest, Remote(change(content)))
    assert not list(tmp_path.glob("*/*.arrow"))
    assert not list(tmp_path.glob("*/.*"))


def test_a_copy_of_a_killed_process_is_swept(cache):
    fetch(cache, 1)
    left = cache.folder / "key" / ".part-00005-x.arrow.0123.draft"
    left.write_bytes(b"x" * 250 * KIB)
    fetch(cache, 2)
    assert not left.exists()
    assert copies(cache) == [1, 2]


def _reader(folder, seed, log):
    """Reads shards in an order of its own through a cache that holds three of eight."""
    cache = ShardCache(folder, 320 * KIB)
    for step in range(40):
        number = (seed * 7 + step * (3 + 2 * seed)) % 8
        name, size, digest, content = shard(number)

        def opener(content=content, number=number):
            with locked(folder / "log.lock"), log.open("a") as lines:
                lines.write(f"{number}\n")
            return io.BytesIO(content)
        found = cache.fetch("key", name, size, digest, opener)
        assert found.to_pybytes() == content


def test_processes_share_it(tmp_path):
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=_reader, args=(tmp_path, seed, tmp_path / "log"))
               for seed in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert len(list(tmp_path.glob("key/*.arrow"))) <= 3
    assert not list(tmp_path.glob("key/.*.draft"))


def _one(folder, barrier, log):
    cache = ShardCache(folder, 1 << 30)
    name, size, digest, content = shard(3, 4 << 20)

    def opener():
        with log.open("a") as lines:
            lines.write("x")
        time.sleep(0.2)
        return io.BytesIO(content)
    barrier.wait()
    assert cache.fetch("key", name, size, digest, opener).size == size


def test_one_process_downloads_for_all(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    readers = [context.Process(target=_one, args=(tmp_path, barrier, tmp_path / "log"))
               for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert (tmp_path / "log").read_text() == "x"
