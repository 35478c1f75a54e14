"""A disk that is full, or too small for what a run is about to write."""

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from partialhn.errors import InputError
from pipelines.cli import main
from pipelines.platform.disk import check_room, full_disk, refused_path
from pipelines.platform.storage import open_storage

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("error", [
    FULL, OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    SafetensorError("I/O error: No space left on device (os error 28)"),
    sqlite3.OperationalError("database or disk is full")])
def test_a_full_disk_is_one_sentence_that_names_the_folder(error, tmp_path):
    wrapped = RuntimeError("the task failed")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        text = full_disk(each, [tmp_path / "not" / "there"])
        assert text.startswith("the disk is full: ")
        assert f"are free at {tmp_path}" in text


def test_the_file_of_the_error_names_the_folder_and_other_errors_are_left_alone(tmp_path):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "a" / "part"))
    assert f"are free at {tmp_path};" in full_disk(error, ["/"])
    for other in (OSError(errno.EACCES, "denied"), ValueError("full of mistakes")):
        assert full_disk(other, [tmp_path]) is None


def test_a_command_ends_with_that_sentence(monkeypatch, capsys, tmp_path):
    def fill(_):
        raise FULL

    monkeypatch.setattr(main.Show, "run", fill)
    assert main.run(["show", "--storage", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the disk is full: ")
    assert str(tmp_path) in err
    assert "Traceback" not in err


def test_a_path_that_the_system_refuses_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "deeper"
    for error in (NotADirectoryError(errno.ENOTDIR, "Not a directory", str(below)),
                  FileExistsError(errno.EEXIST, "File exists", str(tmp_path / "file"))):
        wrapped = RuntimeError("failed")
        wrapped.__cause__ = error
        assert "cannot be used: a file is where a folder should be; allowed" in (
            refused_path(wrapped))
    denied = PermissionError(errno.EACCES, "Permission denied", b"/root/x")
    assert refused_path(denied).startswith("/root/x cannot be used: Permission denied; allowed: ")
    for other in (PermissionError(errno.EACCES, "denied"), ValueError("x"),
                  FileNotFoundError(errno.ENOENT, "gone", "/x")):
        assert refused_path(other) is None


def test_a_command_whose_output_is_below_a_file_says_so(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("x")

    def export(*_):
        (tmp_path / "file").mkdir(exist_ok=True)

    monkeypatch.setattr("pipelines.export_model.export_version", export)
    words = ["export", "--model", "models:/a@champion", "--task", "0", "--output",
             f"{tmp_path}/file/a.onnx"]
    assert main.run(words) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/file cannot be used: a file is where a folder should be; allowed: "
        "paths that you may read, and write to where the command writes\n")


def test_what_is_needed_and_free_is_said_first(tmp_path):
    storage = open_storage(str(tmp_path / "new"))
    assert check_room(storage, 1_000_000, "the features").startswith(
        "disk: the features need 1.0 MB, ")
    with pytest.raises(InputError, match=rf"are free at {tmp_path}; allowed: free some disk"):
        check_room(storage, 1 << 60, "the features")
    assert not (tmp_path / "new").exists()
    assert check_room(open_storage("s3://bucket/prefix"), 1 << 60, "the features") == ""


SMALL_DISK = """
import sys
sys.path.insert(0, {root!r})
from pipelines.platform.storage import open_storage
from pipelines.platform.disk import full_disk
storage = open_storage({folder!r})
try:
    for number in range(100):
        storage.put_if_absent(storage.path("a", str(number)), bytes(1 << 20))
except OSError as error:
    print(number, [file.size for file in storage.list(storage.root)] == [1 << 20] * number)
    print(full_disk(error, [storage.root]))
"""


def test_on_a_real_disk_that_fills_nothing_half_written_is_found(tmp_path):
    """A file system of 4 MiB in a namespace of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    script = SMALL_DISK.format(root=str(Path(__file__).parents[2]), folder=str(folder))
    mounted = f"mount -t tmpfs -o size=4m none {folder} && exec {sys.executable} -c \"$0\""
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mounted, script], capture_output=True,
                          text=True, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no namespace with a file system of its own: {done.stderr.strip()}")
    first, second = done.stdout.splitlines()
    assert first.endswith(" True"), done
    assert 1 <= int(first.split()[0]) <= 4
    assert second.startswith("the disk is full: ")
    assert str(folder) in second
