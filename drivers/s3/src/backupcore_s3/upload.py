"""A multipart upload: parts in any order, from any threads; nothing is there before `complete`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from backupcore.errors import IntegrityError, TargetUnavailable
from backupcore_s3.body import Body
from backupcore_s3.bucket import Bucket, again_if_damaged, crc32
from backupcore_s3.failures import code

__all__ = ["Upload"]


class Upload:
    """An upload to `key` that the store knows, until it is completed or aborted."""

    def __init__(self, bucket: Bucket, key: str, check: Callable[[], None], *, checksums: bool = True) -> None:
        self.key = key
        self._bucket = bucket
        self._check = check
        self._parts: dict[int, dict[str, Any]] = {}  # every thread writes under a number of its own
        self._checksums = False
        self.id = (bucket.checked(self._create) if checksums else self._create(False))["UploadId"]

    def _create(self, with_checksums: bool) -> Any:
        more = {"ChecksumAlgorithm": "CRC32"} if with_checksums else {}
        how = self._bucket.how(self.key)
        answer = self._bucket.call("create_multipart_upload", f"writing {self.key}", Key=self.key, **how, **more)
        self._checksums = with_checksums
        return answer

    def send(self, number: int, fill: Callable[[], memoryview]) -> None:
        """One part out of memory; `fill` reads it, again where it did not arrive as it was sent."""

        def attempt() -> None:
            data = fill()
            more = {"ChecksumCRC32": crc32(data)} if self._checksums else {}
            self._part(number, self._bucket.body(data, self._check), more)

        again_if_damaged(attempt)

    def stream(self, number: int, body: Callable[[], Body]) -> None:
        """One part that does not fit into memory, read while it is sent; its checksum follows behind it."""
        more = {"ChecksumAlgorithm": "CRC32"} if self._checksums else {}
        again_if_damaged(lambda: self._part(number, body(), more))

    def _part(self, number: int, body: Body | bytes, more: dict[str, str]) -> None:
        what = f"writing part {number} of {self.key}"
        answer = self._bucket.call(
            "upload_part", what, Key=self.key, UploadId=self.id, PartNumber=number, Body=body, **more
        )
        self._done(number, answer)

    def copy(self, number: int, key: str, offset: int, length: int) -> None:
        """One part that the store copies out of another object, on its own side."""
        bucket = self._bucket
        answer = bucket.call(
            "upload_part_copy",
            f"copying part {number} of {self.key}",
            Key=self.key,
            UploadId=self.id,
            PartNumber=number,
            CopySource={"Bucket": bucket.options.bucket, "Key": bucket.prefix + key},
            CopySourceRange=f"bytes={offset}-{offset + length - 1}",
        )
        self._done(number, answer["CopyPartResult"])

    def _done(self, number: int, answer: Any) -> None:
        part = {"PartNumber": number, "ETag": answer["ETag"]}
        if self._checksums and "ChecksumCRC32" in answer:
            part["ChecksumCRC32"] = answer["ChecksumCRC32"]
        self._parts[number] = part

    def complete(self, size: int) -> None:
        """Make the object, of `size` bytes, out of the parts."""
        parts = [self._parts[number] for number in sorted(self._parts)]
        what = f"completing {self.key}"
        gone: TargetUnavailable | None = None
        try:
            self._bucket.call(
                "complete_multipart_upload", what, Key=self.key, UploadId=self.id, MultipartUpload={"Parts": parts}
            )
        except TargetUnavailable as error:
            # botocore sends it again where no answer came; the first one may have done its work.
            if code(error) != "NoSuchUpload":
                raise
            gone = error
        found = self._bucket.head(self.key)
        if found is None and gone is not None:
            raise gone
        there = found["ContentLength"] if found else 0
        if there != size:
            raise IntegrityError(
                f"{self._bucket.name}: {what}: the store has {there} of its {size} bytes", "Run it again."
            )
