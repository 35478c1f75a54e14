"""One URI -> the filesystem that Ray Data, Ray Train, the feature store and MLflow share.

`/path`, `file:///path` and `s3://bucket/prefix` become a pyarrow filesystem and a root path in
it. What pyarrow cannot do (write only where nothing is yet) is done here with a hard link on
local disks and with boto3 (`If-None-Match: *`) on S3.
"""

import contextlib
import dataclasses
import functools
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow.fs

from partialhn.errors import InputError

_QUERY_KEYS = ("endpoint", "region", "path_style")


@dataclasses.dataclass(frozen=True)
class S3Options:
    """How to reach an S3 service. None: what the AWS environment or profile says."""

    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False

    def environment(self) -> dict[str, str]:
        """Variables that every process using the filesystem needs before it does.

        Services other than AWS refuse the checksum trailers that newer clients send.
        """
        return {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"} if self.endpoint else {}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A place for everything a stream leaves behind. Pickles to workers.

    Paths given to the methods are paths in `filesystem`, as `path()` makes them.
    """

    uri: str
    """Absolute local path or s3://bucket/prefix, without the query."""
    filesystem: pyarrow.fs.FileSystem
    root: str
    """The same place as a path in `filesystem`."""
    s3: S3Options | None = None

    @property
    def is_local(self) -> bool:
        return self.s3 is None

    def path(self, *parts: str) -> str:
        """A path below the root, in `filesystem`."""
        return "/".join([self.root, *(part.strip("/") for part in parts)])

    def uri_of(self, *parts: str) -> str:
        """The same as `path`, as a user writes it."""
        return "/".join([self.uri, *(part.strip("/") for part in parts)])

    def environment(self) -> dict[str, str]:
        """Variables for `runtime_env={"env_vars": ...}` of workers that use the filesystem."""
        return self.s3.environment() if self.s3 else {}

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        found = self.filesystem.get_file_info([path])[0]
        return bool(found.type != pyarrow.fs.FileType.NotFound)

    def read_text(self, path: str) -> str:
        """A small UTF-8 file. Raises: FileNotFoundError."""
        with self.filesystem.open_input_stream(path) as stream:
            return bytes(stream.read()).decode()

    def write_text(self, path: str, text: str) -> None:
        """Writes or replaces a small UTF-8 file; readers see the old or the new, never a part."""
        if self.is_local:
            with _complete_file(path, text.encode()) as complete:
                complete.replace(path)
        else:  # an S3 object appears whole when its upload ends
            with self.filesystem.open_output_stream(path) as stream:
                stream.write(text.encode())

    def put_if_absent(self, path: str, content: bytes) -> bool:
        """Writes a file unless one is there; of several writers exactly one gets True."""
        if self.s3 is None:
            with _complete_file(path, content) as complete:
                try:
                    os.link(complete, path)
                except FileExistsError:
                    return False
                return True
        bucket, _, key = path.partition("/")
        client = s3_client(self.s3)
        try:
            client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        except client.exceptions.ClientError as error:
            # 412: there already; 409: another writer of the same key was faster
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                return False
            raise
        return True


@contextlib.contextmanager
def _complete_file(path: str, content: bytes) -> Any:
    """A synced temporary file beside `path`, gone afterwards unless it was moved."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    complete = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with complete.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield complete
    finally:
        complete.unlink(missing_ok=True)


def open_storage(uri: str, endpoint: str | None = None, region: str | None = None,
                 path_style: bool | None = None) -> Storage:
    """The filesystem behind a URI; nothing is read, made or contacted.

    An S3 endpoint, region and addressing style come from the arguments, else from the URI's
    query, else from AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION, AWS_DEFAULT_REGION.
    Keys come from the AWS environment, profile or instance role, never from the URI.

    Raises: InputError for a scheme, a query key or a bucket that cannot be used.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
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
    for key in query:
        if key not in _QUERY_KEYS:
            raise InputError(f"storage {uri!r} has the unknown option {key!r}; allowed: "
                             + ", ".join(_QUERY_KEYS))
    if not parts.netloc or "@" in parts.netloc:
        raise InputError(f"storage {uri!r} names no bucket; allowed: s3://bucket/prefix (keys come "
                         "from the AWS environment or profile)")
    endpoint = (endpoint or query.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3")
                or os.environ.get("AWS_ENDPOINT_URL"))
    region = (region or query.get("region") or os.environ.get("AWS_REGION")
              or os.environ.get("AWS_DEFAULT_REGION"))
    if path_style is None:  # services other than AWS rarely have a host name for each bucket
        path_style = _boolean(query.get("path_style", "true" if endpoint else "false"), uri)
    options = S3Options(endpoint, region or ("us-east-1" if endpoint else None), path_style)
    root = "/".join([parts.netloc, *filter(None, parts.path.split("/"))])
    return Storage(f"s3://{root}", _s3_filesystem(options), root, options)


def _boolean(value: str, uri: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise InputError(f"storage {uri!r} has path_style={value!r}; allowed: true, false")
    return value.lower() == "true"


def _s3_filesystem(options: S3Options) -> pyarrow.fs.FileSystem:
    """The pyarrow filesystem, with the keys of this process so that workers have them too."""
    for key, value in options.environment().items():
        os.environ.setdefault(key, value)
    arguments: dict[str, Any] = {"force_virtual_addressing": not options.path_style}
    if options.endpoint:
        endpoint = urlsplit(options.endpoint)
        if endpoint.scheme not in ("http", "https") or not endpoint.netloc:
            raise InputError(f"S3 endpoint is {options.endpoint!r}; allowed: http://host:port or "
                             "https://host:port")
        arguments |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    if options.region:
        arguments["region"] = options.region
    access, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if access and secret:
        arguments |= {"access_key": access, "secret_key": secret}
        if token := os.environ.get("AWS_SESSION_TOKEN"):
            arguments["session_token"] = token
    return pyarrow.fs.S3FileSystem(**arguments)


@functools.cache
def s3_client(options: S3Options) -> Any:
    """The boto3 client for what pyarrow cannot do; made once a process."""
    import boto3
    from botocore.config import Config

    style = "path" if options.path_style else "auto"
    config = Config(s3={"addressing_style": style}, retries={"mode": "standard"},
                    request_checksum_calculation="when_required")
    return boto3.client("s3", endpoint_url=options.endpoint, region_name=options.region,
                        config=config)
