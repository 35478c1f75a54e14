"""JSON files that hold one object, and what is said where they do not."""

import pytest

from partialhn.errors import IntegrityError
from partialhn.json_files import parse_object, read_object


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_object(tmp_path / "a.json", "the file") == parse_object(b'{"a": [1]}', "it")


@pytest.mark.parametrize(("content", "message"), [
    (b"{", "the file cannot be read"), (b"\xff\xfe\x00", "the file cannot be read"),
    (b"[1]", "the file holds list; expected a JSON object"),
    (b"[" * 100_000, "the file cannot be read")])
def test_anything_else_is_an_error_that_names_the_file(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=message):
        read_object(tmp_path / "a.json", "the file")


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(IntegrityError, match=r"^the run cannot be read: a\.json: No such file or "):
        read_object(path, "the run")
    with pytest.raises(IntegrityError, match=r"a\.json cannot be read: No such file or directory$"):
        read_object(path, str(path))
