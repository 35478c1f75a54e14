import multiprocessing
import os
import pickle
import re
import time
from pathlib import Path

import pyarrow.fs
import pytest

from partialhn.errors import InputError, IntegrityError
from pipelines.platform.storage import S3Options, open_storage


@pytest.fixture
def no_aws(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION",
                 "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # set, so that what open_storage adds is undone after the test
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")


def test_one_local_place_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("a b", "./a b", str(tmp_path / "a b"), (tmp_path / "a b").as_uri()):
        storage = open_storage(uri)
        assert storage.uri == storage.root == str(tmp_path / "a b")
        assert storage.is_local
    assert not (tmp_path / "a b").exists(), "opening makes nothing"
    assert storage.path("features", "/k/", "x.json") == f"{tmp_path}/a b/features/k/x.json"


@pytest.mark.parametrize("uri", ["", "file://", "file://host/a", "gs://bucket/a", "s3://",
                                 "s3:///prefix", "s3://key:secret@bucket/a"])
def test_unusable_uris(uri):
    with pytest.raises(InputError, match="allowed: "):
        open_storage(uri)


def test_s3_options_from_query(no_aws, monkeypatch):
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION")
    storage = open_storage("s3://bucket/a/b/?endpoint=http://127.0.0.1:9&region=eu-x-1")
    assert (storage.uri, storage.root) == ("s3://bucket/a/b", "bucket/a/b")
    assert storage.path("c") == "bucket/a/b/c"
    assert storage.uri_of("c") == "s3://bucket/a/b/c"
    assert storage.s3 == S3Options("http://127.0.0.1:9", "eu-x-1", path_style=True, timeout=30)
    assert os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_required"


def test_s3_options_order_arguments_query_environment(no_aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://env:1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "env")
    assert open_storage("s3://b").s3 == S3Options("http://env:1", "env", True)
    uri = "s3://b?endpoint=https://query&region=query&path_style=false"
    assert open_storage(uri).s3 == S3Options("https://query", "query", False)
    assert (open_storage(uri, "http://given:1", "given", True).s3
            == S3Options("http://given:1", "given", True))


@pytest.mark.parametrize(("uri", "meant"), [
    ("s3:/bucket/a", "s3://..."), ("S3:bucket", "s3://..."), ("file:/a", "file://...")])
def test_a_forgotten_slash_is_no_folder(uri, meant, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=f"lacks a slash; allowed: {re.escape(meant)}, or "):
        open_storage(uri)
    monkeypatch.chdir(tmp_path)
    assert open_storage(f"./{uri}").root.startswith(str(tmp_path))


@pytest.mark.parametrize(("query", "message"), [
    ("endpont=x", "unknown option 'endpont'; allowed: endpoint, region, path_style, timeout"),
    ("timeout=0", "timeout='0'; allowed: 1 to 3600 seconds"),
    ("timeout=soon", "timeout='soon'; allowed: 1 to 3600 seconds"),
    ("path_style=maybe", "path_style='maybe'; allowed: true, false"),
    ("endpoint=127.0.0.1:9000", "endpoint is '127.0.0.1:9000'; allowed: http://host:port")])
def test_bad_s3_options(no_aws, query, message):
    with pytest.raises(InputError) as caught:
        open_storage(f"s3://bucket?{query}")
    assert message in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://AKIA:hush@bucket/a", "s3://bucket/a?secret_key=hush"])
def test_keys_in_a_uri_are_refused_and_not_repeated(uri):
    with pytest.raises(InputError, match="allowed: ") as caught:
        open_storage(uri)
    assert "hush" not in str(caught.value)


def test_s3_storage_pickles_without_keys(no_aws, monkeypatch):
    """A worker takes the keys of its own AWS chain."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    storage = open_storage("s3://bucket/a?timeout=7", "http://127.0.0.1:9", "r")
    dump = pickle.dumps(storage)
    assert b"AKIAEXAMPLE" not in dump
    assert b"hush-hush" not in dump
    again = pickle.loads(dump)
    assert again == storage
    assert again.s3.timeout == 7
    assert isinstance(again.filesystem, pyarrow.fs.S3FileSystem)
    assert again.filesystem.options == storage.s3


def test_text_is_written_whole_and_replaced(tmp_path):
    storage = open_storage(str(tmp_path))
    path = storage.path("deep", "er", "note.json")
    assert not storage.exists(path)
    with pytest.raises(FileNotFoundError):
        storage.read_text(path)
    for text in ("one", "zwei ü"):
        storage.write_text(path, text)
        assert storage.exists(path)
        assert storage.read_text(path) == text
    assert [p.name for p in Path(path).parent.iterdir()] == ["note.json"], "no temporary file left"


def test_put_if_absent_keeps_the_first(tmp_path):
    storage = open_storage(str(tmp_path))
    path = storage.path("new", "manifest")
    assert storage.put_if_absent(path, b"first")
    assert not storage.put_if_absent(path, b"second")
    assert storage.read_text(path) == "first"
    assert [p.name for p in Path(path).parent.iterdir()] == ["manifest"]


def _race(root, barrier, number, results):
    storage = open_storage(root)
    barrier.wait()
    won = storage.put_if_absent(storage.path("claim"), str(number).encode() * 10_000)
    results.put((number, won))


def test_of_racing_writers_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), barrier, n, results))
              for n in range(4)]
    for racer in racers:
        racer.start()
    outcomes = dict(results.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join()
    winners = [number for number, won in outcomes.items() if won]
    assert len(winners) == 1
    assert (tmp_path / "claim").read_bytes() == str(winners[0]).encode() * 10_000


def test_what_is_there(tmp_path):
    storage = open_storage(str(tmp_path / "store"))
    assert list(storage.list(storage.path("inbox"))) == []
    assert storage.folders(storage.path("inbox")) == ()
    assert storage.stat(storage.path("inbox", "a")) is None
    before = storage.now()
    storage.write_text(storage.path("inbox", "a", "x.json"), "one")
    storage.write_text(storage.path("inbox", "b", "deep", "y.json"), "four")
    (tmp_path / "store" / "inbox" / ".z.json.123.tmp").write_text("unfinished")
    found = {entry.path: entry for entry in storage.list(storage.path("inbox"))}
    assert sorted(found) == [storage.path("inbox/a/x.json"), storage.path("inbox/b/deep/y.json")]
    assert storage.folders(storage.path("inbox")) == ("a", "b")
    assert storage.stat(storage.path("inbox/a")) is None
    entry = storage.stat(storage.path("inbox/a/x.json"))
    assert entry == found[entry.path]
    assert entry.size == 3
    assert before - 1 < entry.modified < storage.now() + 1
    time.sleep(0.01)
    storage.write_text(entry.path, "two")
    assert storage.stat(entry.path).etag != entry.etag


def test_delete(tmp_path):
    storage = open_storage(str(tmp_path))
    for name in ("a/1", "a/b/2", "c"):
        storage.write_text(storage.path(name), name)
    for name in ("a", "c", "nothing"):
        storage.delete(storage.path(name))
    assert list(tmp_path.iterdir()) == []


def test_only_small_files_are_read_whole(tmp_path):
    storage = open_storage(str(tmp_path))
    storage.write_text(storage.path("a"), "12345")
    assert storage.read_bytes(storage.path("a"), limit=5) == b"12345"
    with pytest.raises(IntegrityError, match="a has 5 bytes; expected at most 4"):
        storage.read_bytes(storage.path("a"), limit=4)


def test_check_makes_nothing_and_names_what_is_wrong(tmp_path):
    storage = open_storage(str(tmp_path / "new" / "store"))
    storage.check()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").write_text("a file")
    with pytest.raises(InputError, match="new is not a folder; allowed: a folder"):
        storage.check()


def _make_folders(root, rounds, ready):
    for number in range(rounds):
        ready.wait(60)
        (Path(root) / str(number) / "inside").mkdir(parents=True)


def test_a_folder_that_is_created_while_it_is_listed(tmp_path):
    """Arrow's own listing fails in some hundreds of so many tries."""
    rounds, context = 1000, multiprocessing.get_context("fork")
    ready = context.Barrier(2)
    maker = context.Process(target=_make_folders, args=(str(tmp_path), rounds, ready),
                            daemon=True)
    maker.start()
    storage = open_storage(str(tmp_path))
    for number in range(rounds):
        ready.wait(60)
        for _ in range(20):
            assert storage.files(storage.path(str(number))) == ()
    maker.join(60)
    assert maker.exitcode == 0
