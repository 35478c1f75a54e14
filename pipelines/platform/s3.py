"""S3 as this project uses it: one set of options, two clients, and error messages for users.

Arrow's client moves the data; boto3 does what Arrow cannot. Both repeat a request, after growing
pauses, when the error may be temporary (500, 503 SlowDown, timeouts, lost connections). Both take
their keys from the AWS chain (environment, profile, role) of their own process, which renews them
if possible. Keys are never sent to another process: workers get only the options.
"""

import dataclasses
import email.utils
import functools
import os
import random
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any, cast
from urllib.parse import urlsplit

import pyarrow
import pyarrow.fs

from partialhn.errors import InputError
from pipelines.platform.local_files import StoredFile

ATTEMPTS = 8
"""Number of requests before giving up; the pauses grow up to 20 s, half a minute in all."""
CONNECT_SECONDS = 5
"""Seconds to wait for a connection."""
SMALL = 1024 ** 2
"""An object of at most so many bytes is fetched with one request when it is opened."""
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"}
_WRONG_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken",
            "RequestExpired", "UnauthorizedSSOTokenError", "TokenRetrievalError"}
_MISSING = {"NoSuchBucket", "404"}
_NO_KEYS = ("no AWS credentials found; give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or a role of the machine, to this process and to every Ray node")
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "301",
           "IllegalLocationConstraintException"}


@dataclasses.dataclass(frozen=True)
class S3Options:
    """How to reach an S3 service. None means the value of the AWS environment or profile."""

    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False
    timeout: float = 30.0
    """Seconds without a byte after which a request is sent again."""

    def __str__(self) -> str:
        return self.endpoint or f"AWS S3 ({self.region or 'region of the AWS profile'})"


class KeylessS3(pyarrow.fs.S3FileSystem):  # type: ignore[misc]
    """Arrow's S3 filesystem, created in every process from its options and that process's keys.

    A pickle of Arrow's own class contains the keys of its process, and would carry them into task
    arguments, trial files and dumps.
    """

    def __init__(self, options: S3Options) -> None:
        self.options = options
        if options.endpoint:  # other services refuse the checksum trailers of newer clients
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        arguments: dict[str, Any] = {
            "force_virtual_addressing": not options.path_style,
            "allow_delayed_open": True,  # writes a small file with one request instead of three
            "connect_timeout": CONNECT_SECONDS, "request_timeout": options.timeout,
            "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)}
        if options.endpoint:
            endpoint = urlsplit(options.endpoint)
            if endpoint.scheme not in ("http", "https") or not endpoint.netloc:
                raise InputError(f"S3 endpoint is {options.endpoint!r}; allowed: http://host:port "
                                 "or https://host:port")
            arguments |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
        if options.region:
            arguments["region"] = options.region
        if proxy := _proxy(options):  # boto3 reads it by itself
            arguments["proxy_options"] = proxy
        if bundle := os.environ.get("AWS_CA_BUNDLE"):  # boto3 reads it by itself
            arguments["tls_ca_file_path"] = bundle
        super().__init__(**arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return KeylessS3, (self.options,)

    def open_input_file(self, path: str) -> pyarrow.NativeFile:
        """As Arrow's, but failed reads are repeated. A small file is fetched immediately."""
        file = super().open_input_file(path)
        if file.size() <= SMALL:
            return pyarrow.BufferReader(_retried(lambda: file.read_at(file.size(), 0)))
        return pyarrow.PythonFile(_PatientFile(file), mode="r")

    def open_input_stream(self, path: str, compression: str | None = None,  # noqa: ARG002
                          buffer_size: int | None = None) -> pyarrow.NativeFile:  # noqa: ARG002
        """As `open_input_file`: file names do not cause decompression."""
        return self.open_input_file(path)


def _proxy(options: S3Options) -> str | None:
    """The proxy that the environment names for the service, unless NO_PROXY leaves it out."""
    service = options.endpoint or f"https://s3.{options.region or 'us-east-1'}.amazonaws.com"
    parts = urlsplit(service)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def _retried(read: Callable[[], bytes]) -> bytes:
    """Reads; tries again after a pause if the service answered a small read with 500 or 503.

    Arrow writes the body of any response, even of an error, to a buffer of the requested size. An
    error text that does not fit fails there, so Arrow's own retries never see the error.
    """
    for attempt in range(ATTEMPTS):
        try:
            return read()
        except OSError as error:
            if "Failed to flush response stream" not in str(error) or attempt + 1 == ATTEMPTS:
                raise
            time.sleep(random.random() * min(20, 2 ** attempt))
    raise AssertionError("unreachable")


class _PatientFile:
    """A large S3 object as a Python file that repeats failed reads."""

    def __init__(self, file: pyarrow.NativeFile) -> None:
        self._file, self._position = file, 0
        self.size = file.size()

    def read(self, count: int = -1) -> bytes:
        position, remaining = self._position, self.size - self._position
        count = remaining if count is None or count < 0 else min(count, remaining)
        content = _retried(lambda: self._file.read_at(count, position)) if count else b""
        self._position += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()


@functools.cache
def s3_client(options: S3Options, attempts: int = ATTEMPTS) -> Any:
    """The boto3 client for operations that pyarrow lacks; created once in each process.

    Raises: InputError if the AWS chain of this process finds no keys.
    """
    import boto3
    from botocore.config import Config

    style = "path" if options.path_style else "auto"
    config = Config(s3={"addressing_style": style}, connect_timeout=CONNECT_SECONDS,
                    read_timeout=options.timeout, max_pool_connections=32,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    # Arrow does not read the endpoint of an AWS profile: one storage, one service
                    ignore_configured_endpoint_urls=True,
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required")
    session = boto3.session.Session()  # the default session is not safe for several threads
    if session.get_credentials() is None:
        raise InputError(_NO_KEYS)
    return session.client("s3", endpoint_url=options.endpoint, region_name=options.region,
                          config=config)


class S3Files:
    """Objects of an S3 service to which several processes write.

    Paths are bucket/key, as in Arrow's filesystem.
    """

    def __init__(self, options: S3Options) -> None:
        self.options = options

    def write(self, path: str, content: bytes) -> None:
        """Writes or replaces an object; readers see the old content or the new, never a mixture."""
        bucket, _, key = path.partition("/")
        self._client.put_object(Bucket=bucket, Key=key, Body=content)

    def put_if_absent(self, path: str, content: bytes) -> bool:
        """Writes an object unless it exists; of several writers exactly one gets True.

        After a lost response and a second request, the existing object may be ours: then its
        content is the same.
        """
        bucket, _, key = path.partition("/")
        for attempt in range(ATTEMPTS):
            try:
                self._client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
                return True
            except self._client.exceptions.ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 409 and attempt + 1 < ATTEMPTS:  # another writer is not finished yet
                    time.sleep(0.05 * 2 ** attempt)
                    continue
                if status != 412:
                    raise
                retried = attempt or error.response["ResponseMetadata"].get("RetryAttempts", 0)
                return bool(retried) and self._read(bucket, key) == content
        raise AssertionError("unreachable")

    def stat(self, path: str) -> StoredFile | None:
        """Size, time and etag of an object; None if it does not exist."""
        bucket, _, key = path.partition("/")
        try:
            head = self._client.head_object(Bucket=bucket, Key=key)
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise
        written = head["LastModified"].timestamp()
        return StoredFile(path, head["ContentLength"], written, head["ETag"].strip('"'), written)

    def list(self, path: str) -> Iterator[StoredFile]:
        """Every object below a folder."""
        bucket, _, folder = path.partition("/")
        for page in self._pages(bucket, Prefix=f"{folder}/" if folder else ""):
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # Arrow marks folders with such objects
                    written = item["LastModified"].timestamp()
                    yield StoredFile(f"{bucket}/{item['Key']}", item["Size"], written,
                                     item["ETag"].strip('"'), written)

    def folders(self, path: str) -> tuple[str, ...]:
        """Names of the folders directly below a folder."""
        bucket, _, folder = path.partition("/")
        prefix = f"{folder}/" if folder else ""
        return tuple(sorted(common["Prefix"][len(prefix):].strip("/")
                            for page in self._pages(bucket, Prefix=prefix, Delimiter="/")
                            for common in page.get("CommonPrefixes", ())))

    def delete(self, path: str) -> None:
        """Deletes an object, and all objects below a folder; does nothing if there is none."""
        bucket, _, folder = path.partition("/")
        self._client.delete_object(Bucket=bucket, Key=folder)
        for page in self._pages(bucket, Prefix=f"{folder}/"):
            keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
            if keys:
                response = self._client.delete_objects(Bucket=bucket, Delete={"Objects": keys,
                                                                              "Quiet": True})
                for failed in response.get("Errors", ()):
                    raise OSError(f"{bucket}/{failed['Key']} could not be deleted: "
                                  f"{failed['Code']} {failed.get('Message', '')}")

    def now(self, path: str) -> float:
        """The service's clock, the clock of `StoredFile.modified`: seconds since 1970."""
        return server_time(self._client.head_bucket(Bucket=path.partition("/")[0]))

    def check(self, path: str, write: bool) -> None:
        """Raises InputError if the bucket cannot be used, with the reason and what to do."""
        bucket, _, folder = path.partition("/")
        self._request(bucket, "list_objects_v2", Prefix=folder, MaxKeys=1)
        self._check_region(bucket)
        if write:
            key = f"{folder}/.check-{uuid.uuid4().hex}".lstrip("/")
            self._request(bucket, "put_object", Key=key, Body=b"")
            self._request(bucket, "delete_object", Key=key)

    def _request(self, bucket: str, operation: str, **arguments: Any) -> Any:
        """Sends a request; repeats it only for a busy service, not if nothing answers."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            try:
                return getattr(s3_client(self.options, 1), operation)(Bucket=bucket, **arguments)
            except (BotoCoreError, ClientError) as error:
                if not _may_pass(error):
                    raise
                return getattr(self._client, operation)(Bucket=bucket, **arguments)
        except (BotoCoreError, ClientError) as error:
            raise InputError(explain(error, self.options, bucket)) from error

    def _check_region(self, bucket: str) -> None:
        """Raises InputError for a wrong region: boto3 finds the bucket's region, Arrow does not."""
        if self.options.endpoint:
            return
        region = self._request(bucket, "head_bucket").get("BucketRegion")
        ours = self.options.region or self._client.meta.region_name
        if region and region != ours:
            raise InputError(f"bucket {bucket!r} is in region {region}, not {ours}; give "
                             f"?region={region} after the s3:// URI, or set AWS_REGION")

    @property
    def _client(self) -> Any:
        return s3_client(self.options, ATTEMPTS)

    def _read(self, bucket: str, key: str) -> bytes:
        """Content of a small object; read again if its body broke off, as boto3 does not do it."""
        from botocore.exceptions import ReadTimeoutError, ResponseStreamingError

        for attempt in range(ATTEMPTS):
            try:
                response = self._client.get_object(Bucket=bucket, Key=key)
                return cast(bytes, response["Body"].read())
            except (ResponseStreamingError, ReadTimeoutError):
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(0.05 * 2 ** attempt)
        raise AssertionError("unreachable")

    def _pages(self, bucket: str, **arguments: Any) -> Any:
        return self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, **arguments)


def server_time(response: Any) -> float:
    """Time of a response by the service's own clock, in seconds since 1970."""
    date = response["ResponseMetadata"]["HTTPHeaders"]["date"]
    return email.utils.parsedate_to_datetime(date).timestamp()


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed shortly afterwards."""
    from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError

    if isinstance(error, ClientError):
        status = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        return status >= 500 or status == 429
    return isinstance(error, ConnectionClosedError | ReadTimeoutError)


def explain(error: Exception, options: S3Options, bucket: str) -> str:
    """A message for users about an error of boto3, with what to do; never shows a key."""
    from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

    if not isinstance(error, ClientError):
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return _NO_KEYS
        if type(error).__name__ in _EXPIRED or "expired" in str(error).lower():
            return f"AWS credentials have expired ({error}); renew them and run the same command"
        return (f"S3 service {options} does not answer ({error}); allowed: an endpoint that "
                "listens, as ?endpoint=http://host:port after the s3:// URI")
    code = str(error.response.get("Error", {}).get("Code", ""))
    says = f"{options} answers {code} for bucket {bucket!r}"
    if code in _MISSING:
        at = f" --endpoint-url {options.endpoint}" if options.endpoint else ""
        return (f"bucket {bucket!r} does not exist at {options}; create it (aws s3 mb "
                f"s3://{bucket}{at}) or name one that does")
    if code in _EXPIRED:
        return f"AWS credentials have expired: {says}; renew them and run the same command"
    if code in _WRONG_KEY:
        return (f"AWS credentials are not accepted: {says}; check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY or AWS_PROFILE")
    if code in _DENIED:
        return (f"access denied: {says} ({error.operation_name}); the credentials need "
                "s3:ListBucket on the bucket and s3:GetObject, s3:PutObject, s3:DeleteObject "
                "below the prefix")
    if code in _REGION:
        headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
        region = headers.get("x-amz-bucket-region") or error.response["Error"].get("Region")
        return (f"wrong region {options.region}: {says}; give ?region="
                f"{region or 'NAME'} after the s3:// URI, or set AWS_REGION")
    if code == "RequestTimeTooSkewed":
        return f"the clock of this machine is wrong: {says}; set it (chrony, ntpd)"
    return f"{says}: {error.response.get('Error', {}).get('Message') or error}"
