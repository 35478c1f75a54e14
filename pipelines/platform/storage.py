"""The storage behind a URI: one filesystem for Ray Data, Ray Train, the feature store and MLflow.

`/path`, `file:///path` and `s3://bucket/prefix` become a pyarrow filesystem and a root path in
it. pyarrow cannot write conditionally, list with etags, or explain what is wrong; `local_files`
does that for disks and `s3` for S3.
"""

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow.fs

from partialhn.errors import InputError, IntegrityError
from partialhn.folders import folder_entries
from pipelines.platform.local_files import LocalFiles, StoredFile
from pipelines.platform.s3 import KeylessS3, S3Files, S3Options

_DENIED = re.compile(r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH"
                     r"|HTTP status 40\d|NoCredentialsError")
_SLIPPED = re.compile(r"(s3[an]?|gs|gcs|abfss?|file|https?):", re.IGNORECASE)
"""The start of a URI whose two slashes were forgotten, which is also that of a relative path."""
_QUERY_KEYS = ("endpoint", "region", "path_style", "timeout")
MAX_READ = 64 * 1024 ** 2
"""Largest size in bytes that `read_bytes` and `read_text` accept by default."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """The storage of a stream's data, models and logs. Can be pickled to workers, without keys.

    The methods take paths in `filesystem`, as `path()` returns them.
    """

    uri: str
    """Absolute local path or s3://bucket/prefix, without the query."""
    filesystem: pyarrow.fs.FileSystem
    root: str
    """The same folder as a path in `filesystem`."""
    s3: S3Options | None = None

    @property
    def is_local(self) -> bool:
        return self.s3 is None

    def path(self, *parts: str) -> str:
        """A path below the root, in `filesystem`."""
        return "/".join([self.root, *(part.strip("/") for part in parts)])

    def uri_of(self, *parts: str) -> str:
        """The same as `path`, but as a URI for users."""
        return "/".join([self.uri, *(part.strip("/") for part in parts)])

    def exists(self, path: str) -> bool:
        """Whether a file or folder exists."""
        info = self.filesystem.get_file_info([path])[0]
        return bool(info.type != pyarrow.fs.FileType.NotFound)

    def stat(self, path: str) -> StoredFile | None:
        """Size, time of writing and etag of a file; None if it does not exist."""
        return self._files.stat(path)

    def list(self, path: str) -> Iterator[StoredFile]:
        """Every file below a folder, in no particular order; nothing if there is no folder."""
        return self._files.list(path)

    def folders(self, path: str) -> tuple[str, ...]:
        """Names of the folders directly below a folder, sorted."""
        return self._files.folders(path)

    def files(self, path: str) -> tuple[str, ...]:
        """Names of the files directly below a folder, sorted."""
        return tuple(sorted(info.base_name for info in folder_entries(self.filesystem, path)
                            if info.type == pyarrow.fs.FileType.File))

    def now(self) -> float:
        """The storage's own clock, the clock of `StoredFile.modified`: seconds since 1970."""
        return self._files.now(self.root)

    def read_bytes(self, path: str, limit: int = MAX_READ) -> bytes:
        """Content of a small file. Raises: FileNotFoundError; IntegrityError if it is too large."""
        with self.filesystem.open_input_file(path) as source:
            if source.size() > limit:
                raise IntegrityError(f"{path} has {source.size()} bytes; expected at most {limit}")
            return bytes(source.readall())

    def read_text(self, path: str) -> str:
        """Content of a small UTF-8 file. Raises: as `read_bytes`."""
        return self.read_bytes(path).decode()

    def write_text(self, path: str, text: str) -> None:
        """Writes or replaces a small UTF-8 file; readers see the old content or the new one."""
        self._files.write(path, text.encode())

    def put_if_absent(self, path: str, content: bytes) -> bool:
        """Writes a file unless it exists; of several writers exactly one gets True."""
        return self._files.put_if_absent(path, content)

    def path_of(self, uri: str) -> str | None:
        """The path, in `filesystem`, of what a URI names; None where that is another filesystem."""
        if self.is_local:
            path = unquote(urlsplit(uri).path) if uri.startswith("file:") else uri
            return path if path.startswith("/") else None
        return uri.removeprefix("s3://") if uri.startswith(f"{self.uri}/") else None

    def download(self, path: str, target: Path) -> None:
        """Copies a file, or a folder with everything in it, to a local path.

        Raises: FileNotFoundError if there is neither.
        """
        files = [path] if self.stat(path) else [file.path for file in self.list(path)]
        if not files:
            raise FileNotFoundError(path)
        for file in files:
            copy = target / file[len(path):].lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            with self.filesystem.open_input_stream(file) as source, copy.open("wb") as sink:
                shutil.copyfileobj(source, sink)

    def delete(self, path: str) -> None:
        """Deletes a file, or a folder with everything in it; does nothing if there is none."""
        self._files.delete(path)

    def check(self, write: bool = True) -> None:
        """Checks whether the storage can be used, and leaves nothing behind.

        Raises: InputError that names what is wrong (bucket, credentials, permissions, region or
        endpoint) and what to do; within seconds if nothing listens at the endpoint.
        """
        self._files.check(self.root, write)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """A context in which errors of S3 are explained to the user, as in `check`."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            if self.s3 and says_s3(error):
                self.check()
                if denied := _DENIED.search(str(error)):
                    raise InputError(
                        f"S3 denies access to a worker ({denied[0]}) but not to this process: the "
                        "AWS credentials of a Ray node are missing or differ; run partialhn "
                        "doctor, which shows the node") from error
            raise

    @property
    def _files(self) -> LocalFiles | S3Files:
        return S3Files(self.s3) if self.s3 else LocalFiles()


def says_s3(error: BaseException) -> bool:
    """Whether an error comes from S3, through Arrow or boto3."""
    return any(sign in str(error) for sign in ("AWS Error", "botocore"))


def check_buckets(error: BaseException, words: Iterable[str]) -> None:
    """Looks, after an error of S3, whether the buckets that a command's words name can be read.

    Raises: InputError for one that cannot, with the reason and what to do.
    """
    if says_s3(error):
        for word in words:
            uri = word.partition("=")[2] if word.startswith("--") else word
            if uri.startswith("s3://"):
                open_storage(uri).check(write=False)


def open_storage(uri: str, endpoint: str | None = None, region: str | None = None,
                 path_style: bool | None = None) -> Storage:
    """The storage behind a URI; reads, creates and contacts nothing.

    An S3 endpoint, region and addressing style come from the arguments, else from the URI's
    query, else from AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION, AWS_DEFAULT_REGION.
    Keys come from the AWS environment, profile or role of each process, never from the URI.

    Raises: InputError for a scheme, a query key or a bucket that cannot be used.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
        if found := _SLIPPED.match(uri):
            raise InputError(f"storage {uri!r} lacks a slash; allowed: {found[1].lower()}://..., "
                             f"or ./{uri} for a folder of this name")
        scheme = "path"
    if scheme == "s3":
        return _open_s3(uri, endpoint, region, path_style)
    if scheme not in ("path", "file"):
        raise InputError(f"storage {uri!r} has scheme {scheme!r}; allowed: a folder, file:///path, "
                         "s3://bucket/prefix")
    if scheme == "file" and urlsplit(uri).netloc not in ("", "localhost"):
        raise InputError(f"storage {uri!r} names a host; allowed: file:///path (three slashes)")
    text = unquote(urlsplit(uri).path) if scheme == "file" else uri
    if not text:
        raise InputError(f"storage is {uri!r}; allowed: a folder, file:///path, s3://bucket/prefix")
    root = str(Path(text).absolute())
    return Storage(root, pyarrow.fs.LocalFileSystem(), root)


def _open_s3(uri: str, endpoint: str | None, region: str | None,
             path_style: bool | None) -> Storage:
    parts = urlsplit(uri)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    host = parts.netloc.rpartition("@")[2]
    shown = f"s3://{host}{parts.path}"  # the text before @ and the query may hold a key
    for key in query:
        if key not in _QUERY_KEYS:
            raise InputError(f"storage {shown!r} has the unknown option {key!r}; allowed: "
                             + ", ".join(_QUERY_KEYS))
    if not parts.netloc or "@" in parts.netloc:
        raise InputError(f"storage {shown!r} names no bucket, or a key with it; allowed: "
                         "s3://bucket/prefix (keys come from the AWS environment or profile)")
    endpoint = (endpoint or query.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3")
                or os.environ.get("AWS_ENDPOINT_URL"))
    region = (region or query.get("region") or os.environ.get("AWS_REGION")
              or os.environ.get("AWS_DEFAULT_REGION"))
    if path_style is None:  # services other than AWS rarely have a host name for each bucket
        path_style = _boolean(query.get("path_style", "true" if endpoint else "false"), shown)
    options = S3Options(endpoint, region or ("us-east-1" if endpoint else None), path_style,
                        _seconds(query.get("timeout", str(S3Options.timeout)), shown))
    root = "/".join([parts.netloc, *filter(None, parts.path.split("/"))])
    return Storage(f"s3://{root}", KeylessS3(options), root, options)


def _boolean(value: str, uri: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise InputError(f"storage {uri!r} has path_style={value!r}; allowed: true, false")
    return value.lower() == "true"


def _seconds(value: str, uri: str) -> float:
    with contextlib.suppress(ValueError):
        if 1 <= float(value) <= 3600:
            return float(value)
    raise InputError(f"storage {uri!r} has timeout={value!r}; allowed: 1 to 3600 seconds")
