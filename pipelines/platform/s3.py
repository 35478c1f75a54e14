"""S3 as this product uses it: one set of options, two clients, errors in the user's words.

Arrow's client moves the data; boto3 does what Arrow cannot. Both ask again, after growing pauses,
where an answer may pass (500, 503 SlowDown, timeouts, lost connections), and both take their keys
from the AWS chain (environment, profile, role) of the process they run in, which renews them where
it can. Keys are never given to another process: what travels to workers are the options.
"""

import dataclasses
import email.utils
import functools
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, cast
from urllib.parse import urlsplit

import pyarrow
import pyarrow.fs

from partialhn.errors import InputError
from pipelines.platform.local_files import Entry

ATTEMPTS = 8
"""Requests sent before giving up; the pauses between them grow to 20 s, half a minute in all."""
CONNECT_SECONDS = 5
SMALL = 1024 ** 2
"""Bytes up to which an object is fetched by one request when it is opened."""
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
    """How to reach an S3 service. None: what the AWS environment or profile says."""

    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False
    timeout: float = 30.0
    """Seconds without a byte after which a request is sent again."""

    def __str__(self) -> str:
        return self.endpoint or f"AWS S3 ({self.region or 'region of the AWS profile'})"


class KeylessS3(pyarrow.fs.S3FileSystem):  # type: ignore[misc]
    """Arrow's S3 filesystem, made anew from its options, and the keys there, in every process.

    Arrow's own would carry the keys of the process that made it in its pickle, and from there into
    task arguments, trial files and dumps.
    """

    def __init__(self, options: S3Options) -> None:
        self.options = options
        if options.endpoint:  # other services refuse the checksum trailers of newer clients
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        arguments: dict[str, Any] = {
            "force_virtual_addressing": not options.path_style,
            "allow_delayed_open": True,  # one PUT for a small file instead of three requests
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
        if bundle := os.environ.get("AWS_CA_BUNDLE"):  # boto3 reads it by itself
            arguments["tls_ca_file_path"] = bundle
        super().__init__(**arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return KeylessS3, (self.options,)

    def open_input_file(self, path: str) -> pyarrow.NativeFile:
        """As Arrow's, but reading is patient (`_again`). Small files are fetched here and now."""
        file = super().open_input_file(path)
        if file.size() <= SMALL:
            return pyarrow.BufferReader(_again(lambda: file.read_at(file.size(), 0)))
        return pyarrow.PythonFile(_PatientFile(file), mode="r")

    def open_input_stream(self, path: str, compression: str | None = None,  # noqa: ARG002
                          buffer_size: int | None = None) -> pyarrow.NativeFile:  # noqa: ARG002
        """As `open_input_file`: nothing is decompressed for its name."""
        return self.open_input_file(path)


def _again(read: Callable[[], bytes]) -> bytes:
    """Reads, again after a pause where a 500 or 503 met a read of few bytes.

    Arrow writes any answer's body, also an error's, to a buffer as large as the bytes asked for.
    An error's text that does not fit fails there, and Arrow's own retries never see the error.
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
    """A large S3 object as a Python file whose reads are patient."""

    def __init__(self, file: pyarrow.NativeFile) -> None:
        self._file, self._place = file, 0
        self.size = file.size()

    def read(self, count: int = -1) -> bytes:
        left = self.size - self._place
        count = left if count is None or count < 0 else min(count, left)
        place = self._place
        content = _again(lambda: self._file.read_at(count, place)) if count else b""
        self._place += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

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
    """The boto3 client for what pyarrow cannot do; made once a process.

    Raises: InputError where the AWS chain of this process finds no keys.
    """
    import boto3
    from botocore.config import Config

    style = "path" if options.path_style else "auto"
    config = Config(s3={"addressing_style": style}, connect_timeout=CONNECT_SECONDS,
                    read_timeout=options.timeout, max_pool_connections=32,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required")
    session = boto3.session.Session()  # the default one is not made for several threads
    if session.get_credentials() is None:
        raise InputError(_NO_KEYS)
    return session.client("s3", endpoint_url=options.endpoint, region_name=options.region,
                          config=config)


class S3Files:
    """Objects of an S3 service as a place that several processes write to.

    Paths are bucket/key, as in Arrow's filesystem.
    """

    def __init__(self, options: S3Options) -> None:
        self.options = options

    def write(self, path: str, content: bytes) -> None:
        """Writes or replaces an object, which appears whole."""
        bucket, _, key = path.partition("/")
        self._client.put_object(Bucket=bucket, Key=key, Body=content)

    def put_if_absent(self, path: str, content: bytes) -> bool:
        """Writes an object unless one is there; of several writers exactly one gets True.

        Where an answer was lost and the request sent again, the object that is there may be ours:
        its content tells.
        """
        bucket, _, key = path.partition("/")
        for attempt in range(ATTEMPTS):
            try:
                self._client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
                return True
            except self._client.exceptions.ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 409 and attempt + 1 < ATTEMPTS:  # undecided: another one is writing
                    time.sleep(0.05 * 2 ** attempt)
                    continue
                if status != 412:
                    raise
                retried = attempt or error.response["ResponseMetadata"].get("RetryAttempts", 0)
                return bool(retried) and self._read(bucket, key) == content
        raise AssertionError("unreachable")

    def stat(self, path: str) -> Entry | None:
        """One object, or None."""
        bucket, _, key = path.partition("/")
        try:
            found = self._client.head_object(Bucket=bucket, Key=key)
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise
        return Entry(path, found["ContentLength"], found["LastModified"].timestamp(),
                     found["ETag"].strip('"'))

    def list(self, path: str) -> Iterator[Entry]:
        """Every object below a folder."""
        bucket, _, folder = path.partition("/")
        for found in self._pages(bucket, Prefix=f"{folder}/" if folder else ""):
            for item in found.get("Contents", ()):
                if not item["Key"].endswith("/"):  # Arrow's marks of folders
                    yield Entry(f"{bucket}/{item['Key']}", item["Size"],
                                item["LastModified"].timestamp(), item["ETag"].strip('"'))

    def folders(self, path: str) -> tuple[str, ...]:
        """Names of the folders directly below a folder."""
        bucket, _, folder = path.partition("/")
        prefix = f"{folder}/" if folder else ""
        return tuple(sorted(common["Prefix"][len(prefix):].strip("/")
                            for found in self._pages(bucket, Prefix=prefix, Delimiter="/")
                            for common in found.get("CommonPrefixes", ())))

    def delete(self, path: str) -> None:
        """Deletes an object, and all objects below it as a folder; nothing there is no error."""
        bucket, _, folder = path.partition("/")
        self._client.delete_object(Bucket=bucket, Key=folder)
        for found in self._pages(bucket, Prefix=f"{folder}/"):
            keys = [{"Key": item["Key"]} for item in found.get("Contents", ())]
            if keys:
                answer = self._client.delete_objects(Bucket=bucket, Delete={"Objects": keys,
                                                                            "Quiet": True})
                for failed in answer.get("Errors", ()):
                    raise OSError(f"{bucket}/{failed['Key']} could not be deleted: "
                                  f"{failed['Code']} {failed.get('Message', '')}")

    def now(self, path: str) -> float:
        """The clock of `Entry.modified`, in seconds since 1970; asks the service."""
        return server_time(self._client.head_bucket(Bucket=path.partition("/")[0]))

    def check(self, path: str, write: bool) -> None:
        """Raises: InputError where the bucket cannot be used, saying why and what to do."""
        bucket, _, folder = path.partition("/")
        self._answer(bucket, "list_objects_v2", Prefix=folder, MaxKeys=1)
        self._check_region(bucket)
        if write:
            key = f"{folder}/.check-{uuid.uuid4().hex}".lstrip("/")
            self._answer(bucket, "put_object", Key=key, Body=b"")
            self._answer(bucket, "delete_object", Key=key)

    def _answer(self, bucket: str, operation: str, **arguments: Any) -> Any:
        """One request: at once an error where nobody answers, patient with a busy service."""
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
        """boto3 follows a bucket to its region; Arrow does not."""
        if self.options.endpoint:
            return
        found = self._answer(bucket, "head_bucket").get("BucketRegion")
        ours = self.options.region or self._client.meta.region_name
        if found and found != ours:
            raise InputError(f"bucket {bucket!r} is in region {found}, not {ours}; give "
                             f"?region={found} after the s3:// URI, or set AWS_REGION")

    @property
    def _client(self) -> Any:
        return s3_client(self.options, ATTEMPTS)

    def _read(self, bucket: str, key: str) -> bytes:
        """A small object, asked for again where its body broke off: no client retries that."""
        from botocore.exceptions import ReadTimeoutError, ResponseStreamingError

        for attempt in range(ATTEMPTS):
            try:
                answer = self._client.get_object(Bucket=bucket, Key=key)
                return cast(bytes, answer["Body"].read())
            except (ResponseStreamingError, ReadTimeoutError):
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(0.05 * 2 ** attempt)
        raise AssertionError("unreachable")

    def _pages(self, bucket: str, **arguments: Any) -> Any:
        return self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, **arguments)


def server_time(answer: Any) -> float:
    """When the service answered by its own clock, in seconds since 1970."""
    date = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
    return email.utils.parsedate_to_datetime(date).timestamp()


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError

    if isinstance(error, ClientError):
        status = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        return status >= 500 or status == 429
    return isinstance(error, ConnectionClosedError | ReadTimeoutError)


def explain(error: Exception, options: S3Options, bucket: str) -> str:
    """What an error of boto3 means to a user, and what to do about it; never shows a key."""
    from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

    if not isinstance(error, ClientError):
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return _NO_KEYS
        if type(error).__name__ in _EXPIRED or "expired" in str(error).lower():
            return f"AWS credentials have expired ({error}); renew them and run the same command"
        return (f"S3 service {options} does not answer ({error}); allowed: an endpoint that "
                "listens, as ?endpoint=http://host:port after the s3:// URI")
    code = str(error.response.get("Error", {}).get("Code", ""))
    says = f"{options} says {code} for bucket {bucket!r}"
    if code in _MISSING:
        at = f" --endpoint-url {options.endpoint}" if options.endpoint else ""
        return (f"bucket {bucket!r} does not exist at {options}; make it (aws s3 mb "
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
