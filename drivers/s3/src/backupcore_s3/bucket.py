"""The bucket, request by request: the part of it below the prefix, with every failure translated."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from botocore import exceptions as boto

from backupcore.errors import BackupError, IntegrityError, TargetUnavailable, text_of
from backupcore_s3.body import Body, Pace, Stopped
from backupcore_s3.client import connect
from backupcore_s3.failures import NoStore, code, is_absent, is_unknown_to_server, translate
from backupcore_s3.keys import clean_prefix

try:
    from isal.isal_zlib import crc32 as _crc32  # a quarter of zlib's time, 0.3 s per GiB less
except ImportError:  # on processors that it does not know
    from zlib import crc32 as _crc32

if TYPE_CHECKING:
    from backupcore_s3.driver import S3

__all__ = ["Bucket", "Object", "again_if_damaged", "crc32"]

_PIECE = 256 << 10  # read from a response at once; urllib3 holds it twice, and malloc keeps that for each thread
_AGAIN = 5  # times that a response which breaks off is gone on with; botocore repeats requests, not their answers
_DAMAGED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_SENT = 3  # times that what arrived damaged is sent in all; botocore does not repeat such a request
_BROKEN = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)

CLEAN_UP = 40.0
"""Seconds after which a failed run leaves the rest of its clean-up to the next one; one request may take 20 more."""

_EMPTY = 100  # pages of a listing without anything in them, one after the other; AWS may give some

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Object:
    """One object as a listing shows it; `key` is without the prefix."""

    key: str
    size: int


def crc32(data: bytes | memoryview) -> str:
    """The checksum as S3 writes it."""
    return base64.b64encode(_crc32(data).to_bytes(4, "big")).decode()


def again_if_damaged(attempt: Callable[[], T]) -> T:
    """What `attempt` returns; tried again where the store says that bytes did not arrive as they were sent."""
    for _ in range(_SENT - 1):
        try:
            return attempt()
        except BackupError as error:
            if code(error) not in _DAMAGED:
                raise
    return attempt()


def _sound(operation: str, answer: Any) -> Any:
    if operation == "create_multipart_upload" and "UploadId" not in answer:
        raise NoStore("its answer has no upload in it")
    return answer


class Bucket:
    """The objects below the prefix. Safe from any threads; pickles as its options, without its client.

    `checksums` is True until a server turns out not to know them.
    """

    def __init__(self, options: S3, *, hurry: bool = False) -> None:
        """`hurry`: for what is tidied up after a failure, in `CLEAN_UP` seconds in all."""
        self.options = options
        self.prefix = clean_prefix(options.prefix)
        self.upload_pace = Pace(options.limit_upload << 10)
        self.download_pace = Pace(options.limit_download << 10)
        self.checksums = options.checksum != "none"
        self._hurry = hurry
        self._end = time.monotonic() + CLEAN_UP if hurry else None
        self._lock = threading.Lock()
        self._client: Any = None

    def __reduce__(self) -> tuple[type[Bucket], tuple[S3]]:
        return Bucket, (self.options,)

    @property
    def name(self) -> str:
        """How messages call it."""
        place = urlsplit(self.options.endpoint_url)
        where = f" at {place.hostname}" if place.hostname else ""
        return f"bucket {self.options.bucket}{where}"

    @property
    def is_encrypted(self) -> bool:
        """Whether requests travel by TLS."""
        return urlsplit(self.options.endpoint_url).scheme != "http"

    @property
    def client(self) -> Any:
        """boto3's client, made at the first use."""
        with self._lock:
            if self._client is None:
                self._client = connect(self.options, self.upload_pace, hurry=self._hurry)
            return self._client

    def call(self, operation: str, what: str, /, **arguments: Any) -> Any:
        """One request. `what` says for messages what it does: "writing disk.vda.qcow2"."""
        if self._end is not None and time.monotonic() > self._end:
            raise TargetUnavailable(f"{self.name}: {what}: not done within {CLEAN_UP:.0f} s")
        client = self.client
        known = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[operation]).input_shape
        extra = {key: value for key, value in self.options.extra_args.items() if key in known.members}
        if "Key" in arguments:
            arguments["Key"] = self.prefix + arguments["Key"]
        try:
            return _sound(operation, getattr(client, operation)(Bucket=self.options.bucket, **{**extra, **arguments}))
        except Stopped as stopped:
            raise stopped.reason from None
        except (boto.ClientError, boto.BotoCoreError, NoStore) as error:
            raise translate(error, f"{self.name}: {what}") from error
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:  # of what botocore makes of an answer
            raise self._nonsense(what, f"its answer cannot be read: {text_of(error)}") from error

    def _nonsense(self, what: str, why: str) -> TargetUnavailable:
        """The error for an answer that no store should give."""
        return TargetUnavailable(
            f"{self.name}: {what}: {why}",
            "The store, or what stands before it, does not answer as S3 does: try again, and look at its version.",
        )

    def checked(self, attempt: Callable[[bool], T]) -> T:
        """`attempt(True)`, which gives the store checksums; `attempt(False)` from when it says that it has none."""
        if self.checksums:
            try:
                return attempt(True)
            except BackupError as error:
                if not is_unknown_to_server(error):
                    raise
                answer = attempt(False)
            self.checksums = False
            return answer
        return attempt(False)

    # Writing

    def how(self, key: str) -> dict[str, str]:
        """How an object is to be kept. Disks only go to another storage class: most charge for 128 KiB at least."""
        options = self.options
        wanted = {
            "StorageClass": options.storage_class if key.rpartition("/")[2].startswith("disk.") else "",
            "ServerSideEncryption": options.sse,
            "SSEKMSKeyId": options.sse_kms_key_id,
        }
        return {name: value for name, value in wanted.items() if value}

    def put(
        self,
        key: str,
        data: bytes | memoryview,
        check: Callable[[], None],
        *,
        only_new: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> Any:
        """Write an object in one request. `only_new`: PreconditionFailed, as `code` says, where it exists."""
        arguments: dict[str, Any] = {"Key": key, "Metadata": dict(metadata or {}), **self.how(key)}
        if only_new:
            arguments["IfNoneMatch"] = "*"

        def attempt(with_checksum: bool) -> Any:
            more = {"ChecksumCRC32": crc32(data)} if with_checksum else {}
            body = self.body(data, check)
            return self.call("put_object", f"writing {key}", Body=body, **arguments, **more)

        return again_if_damaged(lambda: self.checked(attempt))

    def body(self, data: bytes | memoryview, check: Callable[[], None]) -> Body | bytes:
        """Bytes in memory, to be sent."""
        if not data:
            return b""
        # No copies: of this size each would be memory fresh from the kernel, which costs more than sending it.
        view = memoryview(data)
        return Body(len(view), lambda at, count: view[at : at + count], pace=self.upload_pace, check=check)

    # Reading

    def objects(self, folder: str, what: str) -> Iterator[Object]:
        """All objects whose keys begin so, in the order of their keys."""
        for answer in self._pages("list_objects_v2", what, folder, {"ContinuationToken": "NextContinuationToken"}):
            for one in answer.get("Contents", ()):
                key, size = one.get("Key"), one.get("Size")
                if key is None or size is None or size < 0:
                    raise self._nonsense(what, f"it lists {str(key)!r:.200} with size {size}")
                yield Object(key.removeprefix(self.prefix), size)

    def uploads(self, folder: str, what: str) -> Iterator[tuple[str, str]]:
        """(key, upload ID) of the multipart uploads under way whose keys begin so."""
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        for answer in self._pages("list_multipart_uploads", what, folder, markers):
            for one in answer.get("Uploads", ()):
                key, upload = one.get("Key"), one.get("UploadId")
                if key is None or upload is None:
                    raise self._nonsense(what, f"it lists an upload of {str(key)!r:.200} with the ID {upload}")
                if key.startswith(self.prefix + folder):
                    yield key.removeprefix(self.prefix), upload

    def _pages(self, operation: str, what: str, folder: str, marks: Mapping[str, str]) -> Iterator[Any]:
        """The pages of a listing. `marks`: what names the place where the next one begins, here and in the answer.

        A store that gives a page twice, or one empty page after the other, would be asked for ever.
        """
        more: dict[str, str] = {}
        empty = 0
        while True:
            answer = self.call(operation, what, Prefix=self.prefix + folder, **more)
            yield answer
            if not answer.get("IsTruncated"):
                return
            before, more = more, {name: answer.get(mark) for name, mark in marks.items()}
            empty = 0 if answer.get("Contents") or answer.get("Uploads") else empty + 1
            if None in more.values() or more == before or empty > _EMPTY:
                raise self._nonsense(what, "it has listed a part, and does not say where the next one begins")

    def head(self, key: str) -> Any:
        """What the store says of an object, None if there is none."""
        try:
            return self.call("head_object", f"looking at {key}", Key=key)
        except BackupError as error:
            if is_absent(error):
                return None
            raise

    def read(self, key: str, offset: int, length: int, check: Callable[[], None]) -> bytearray:
        """Exactly these bytes of an object."""
        buffer = bytearray(length)
        self.read_into(key, offset, memoryview(buffer), check)
        return buffer

    def read_into(self, key: str, offset: int, buffer: memoryview, check: Callable[[], None]) -> None:
        """Fill `buffer` with the bytes of an object. An answer that breaks off is gone on with where it did."""
        length = len(buffer)
        done = failed = 0
        what = f"reading {key}"
        while done < length:
            first, last = offset + done, offset + length - 1
            answer = self.call("get_object", what, Key=key, Range=f"bytes={first}-{last}")
            if answer["ContentLength"] != length - done:
                answer["Body"].close()
                raise IntegrityError(
                    f"{self.name}: {what}: {answer['ContentLength']} bytes came for {length - done} at {first}",
                    "The object was changed, or the server knows no ranges.",
                )
            try:
                with closing(answer["Body"]) as body:
                    while done < length and (count := body.readinto(buffer[done : done + _PIECE])):
                        check()
                        self.download_pace.take(count, check)
                        done += count
            except _BROKEN as error:
                failed += 1
                if failed > _AGAIN:
                    raise translate(error, f"{self.name}: {what}") from error
                check()

    # Removing

    def delete(self, key: str) -> None:
        """Remove an object; one that is gone already is fine."""
        try:
            self.call("delete_object", f"deleting {key}", Key=key)
        except BackupError as error:
            if not is_absent(error):
                raise

    def abort(self, key: str, upload: str) -> None:
        """Throw a multipart upload away; one that is gone already is fine."""
        try:
            self.call("abort_multipart_upload", f"aborting the upload of {key}", Key=key, UploadId=upload)
        except TargetUnavailable as error:
            if code(error) != "NoSuchUpload":
                raise
