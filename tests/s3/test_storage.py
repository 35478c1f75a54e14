"""The storage block on a real HTTP S3 service."""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time

import pyarrow.fs
import pytest

from partialhn.errors import InputError, IntegrityError
from pipelines.cli.main import run
from pipelines.platform.s3 import s3_client
from pipelines.platform.storage import check_buckets, open_storage


def test_text_is_written_replaced_and_found(storage):
    path = storage.path("deep", "er", "note.json")
    assert not storage.exists(path)
    with pytest.raises(FileNotFoundError):
        storage.read_text(path)
    for text in ("one", "zwei ü"):
        storage.write_text(path, text)
        assert storage.exists(path)
        assert storage.exists(storage.path("deep"))
        assert storage.read_text(path) == text
    with pytest.raises(IntegrityError, match=r"note\.json has 7 bytes; expected at most 6"):
        storage.read_bytes(path, limit=6)


def test_what_is_there(storage):
    assert list(storage.list(storage.path("inbox"))) == []
    assert storage.folders(storage.path("inbox")) == ()
    for name in ("a/x.json", "b/deep/y.json", "c"):
        storage.write_text(storage.path("inbox", name), name)
    storage.write_text(storage.path("inbox-2", "z"), "not below inbox")
    storage.filesystem.create_dir(storage.path("inbox/empty"))
    found = {entry.path: entry for entry in storage.list(storage.path("inbox"))}
    assert sorted(found) == [storage.path("inbox", name) for name in ("a/x.json", "b/deep/y.json",
                                                                      "c")]
    assert storage.folders(storage.path("inbox")) == ("a", "b", "empty")
    entry = storage.stat(storage.path("inbox/a/x.json"))
    assert (entry.size, entry.etag) == (8, found[entry.path].etag)
    assert abs(storage.now() - entry.modified) < 120
    storage.write_text(entry.path, "other")
    assert storage.stat(entry.path).etag != entry.etag
    assert storage.stat(storage.path("inbox/a")) is None


def test_delete_takes_a_folder_and_no_neighbour(storage):
    for name in ("a/1", "a/b/2", "ab/3", "c"):
        storage.write_text(storage.path(name), name)
    storage.filesystem.create_dir(storage.path("a/empty"))
    for name in ("a", "c", "nothing"):
        storage.delete(storage.path(name))
    assert [entry.path for entry in storage.list(storage.root)] == [storage.path("ab/3")]
    assert not storage.exists(storage.path("a"))


def test_lists_and_deletes_more_than_one_answer_holds(storage, monkeypatch):
    """A page has a thousand names at most; here it has two."""
    paginator = type(s3_client(storage.s3).get_paginator("list_objects_v2"))
    whole = paginator.paginate
    monkeypatch.setattr(paginator, "paginate", lambda self, **arguments: whole(
        self, **arguments, PaginationConfig={"PageSize": 2}))
    for number in range(5):
        storage.write_text(storage.path("many", str(number)), "x")
    assert len(list(storage.list(storage.path("many")))) == 5
    storage.delete(storage.path("many"))
    assert list(storage.list(storage.path("many"))) == []


def _race(uri, barrier, number, results):
    storage = open_storage(uri)
    storage.exists(storage.path("warm"))  # connected
    for attempt in range(5):
        barrier.wait(60)
        content = str(number).encode() * 10_000
        results.put((attempt, number, storage.put_if_absent(storage.path(f"claim-{attempt}"),
                                                            content)))


def test_of_racing_writers_one_wins(storage, service):
    if not service.real:
        pytest.skip("moto checks and writes in two steps")
    uri = f"{storage.uri}?endpoint={service.endpoint}&region={service.region}"
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    racers = [context.Process(target=_race, args=(uri, barrier, number, results))
              for number in range(4)]
    for racer in racers:
        racer.start()
    outcomes = [results.get(timeout=120) for _ in range(20)]
    for racer in racers:
        racer.join()
    for attempt in range(5):
        winners = [number for turn, number, won in outcomes if turn == attempt and won]
        assert len(winners) == 1
        assert (storage.read_bytes(storage.path(f"claim-{attempt}"))
                == str(winners[0]).encode() * 10_000)


def test_the_first_content_stays(storage):
    assert storage.put_if_absent(storage.path("new"), b"first")
    assert not storage.put_if_absent(storage.path("new"), b"second")
    assert storage.read_text(storage.path("new")) == "first"


def test_a_worker_makes_its_own_filesystem_of_the_pickle(storage):
    storage.write_text(storage.path("here"), "yes")
    dump = pickle.dumps(storage)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in dump
    code = ("import pickle, sys; storage = pickle.load(sys.stdin.buffer);"
            "print(storage.read_text(storage.path('here')))")
    done = subprocess.run([sys.executable, "-c", code], input=dump, capture_output=True, check=True)
    assert done.stdout == b"yes\n"


def test_a_large_file_goes_up_in_parts(storage):
    content = os.urandom(1 << 20) * 23
    with storage.filesystem.open_output_stream(storage.path("large")) as sink:
        sink.write(content)
    with storage.filesystem.open_input_file(storage.path("large")) as source:
        assert source.readall() == content


# What can be wrong ---------------------------------------------------------------------------


def test_check_leaves_nothing(storage):
    storage.check()
    assert list(storage.list(storage.root)) == []


def test_a_bucket_that_is_not_there(service):
    storage = open_storage("s3://partialhn-never-made/a", service.endpoint, service.region)
    with pytest.raises(InputError, match=r"bucket 'partialhn-never-made' does not exist at http.*"
                                         r"create it \(aws s3 mb s3://partialhn-never-made"):
        storage.check()


def test_nobody_listens(monkeypatch):
    """At once: not after all the pauses that an outage in the middle of a run is given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(InputError, match=f"S3 service {endpoint} does not answer"):
        open_storage("s3://bucket/a", endpoint).check()
    assert time.monotonic() - start < 60


@pytest.fixture
def fresh_clients():
    """boto3 clients keep the keys they were made with."""
    s3_client.cache_clear()
    yield
    s3_client.cache_clear()


def test_keys_that_are_not_accepted(service, storage, monkeypatch, fresh_clients):
    if not service.real:
        pytest.skip("moto checks no signature")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-of-nobody")
    with pytest.raises(InputError, match=r"credentials are not accepted: .* SignatureDoesNotMatch"
                       ) as caught:
        storage.check()
    assert "wrong-secret" not in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOBODY")
    s3_client.cache_clear()
    with pytest.raises(InputError, match=r"credentials are not accepted: .* InvalidAccessKeyId"):
        storage.check()


def test_no_keys_at_all(storage, monkeypatch, fresh_clients, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InputError, match="no AWS credentials found; give AWS_ACCESS_KEY_ID"):
        storage.check()


def test_keys_from_a_profile(storage, monkeypatch, fresh_clients, tmp_path):
    """Both clients, boto3's and Arrow's, in a process of its own."""
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    (tmp_path / "credentials").write_text("[work]\n" + "".join(
        f"{name.lower()} = {value}\n" for name, value in keys.items()))
    environment = {name: value for name, value in os.environ.items() if name not in keys}
    environment |= {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
                    "AWS_PROFILE": "work", "AWS_EC2_METADATA_DISABLED": "true"}
    code = ("import pickle, sys; storage = pickle.load(sys.stdin.buffer); storage.check();"
            "storage.write_text(storage.path('a'), 'yes'); print(storage.read_text("
            "storage.path('a')))")
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(storage),
                          capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"yes\n"


def test_errors_of_a_run_are_explained(storage, service):
    """Arrow's message of a lost bucket is no help; what `check` finds is."""
    gone = open_storage("s3://partialhn-never-made/a", service.endpoint, service.region)

    def write():
        with gone.explained(), gone.filesystem.open_output_stream(gone.path("x")) as sink:
            sink.write(b"x")

    with pytest.raises(InputError, match="bucket 'partialhn-never-made' does not exist"):
        write()
    with pytest.raises(ZeroDivisionError), storage.explained():
        raise ZeroDivisionError
    with pytest.raises(InputError, match="S3 denies access to a worker"), storage.explained():
        raise OSError("RayTaskError: When getting information for key: AWS Error ACCESS_DENIED")
    assert isinstance(storage.filesystem, pyarrow.fs.S3FileSystem)


@pytest.mark.parametrize("words", [
    ("predict", "--model", "models:/s/1", "--task", "0", "--input"),
    ("features", "plan", "--data")])
def test_a_command_explains_the_bucket_it_was_given(service, capsys, words):
    images = f"s3://partialhn-never-made/x?endpoint={service.endpoint}&region={service.region}"
    assert run([*words, images]) == 2
    assert "error: bucket 'partialhn-never-made' does not exist" in capsys.readouterr().err


def test_an_error_of_s3_in_a_command_names_its_bucket(service):
    lost = f"--storage=s3://partialhn-never-made/x?endpoint={service.endpoint}&region=us-east-1"
    with pytest.raises(InputError, match="bucket 'partialhn-never-made' does not exist"):
        check_buckets(OSError("AWS Error NO_SUCH_BUCKET"), ["drift", lost])
    check_buckets(ZeroDivisionError(), ["drift", lost])
