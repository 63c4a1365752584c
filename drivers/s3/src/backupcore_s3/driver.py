"""The driver: its options, and the hooks of `backupcore.hookspecs`."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from backupcore import Context, driver, hookimpl, option
from backupcore.errors import ConfigError
from backupcore.model import Artifact, BackupRun, Listed, Merge, SourceRef, Stored, Usage

if TYPE_CHECKING:
    from datetime import datetime

    from backupcore_s3.store import Store

__all__ = ["S3"]

_EXTRA = (
    *("ACL", "GrantFullControl", "GrantRead", "GrantReadACP", "GrantWriteACP", "Tagging", "RequestPayer"),
    *("ExpectedBucketOwner", "SSEKMSEncryptionContext"),
)
_ARCHIVES = ("GLACIER", "DEEP_ARCHIVE")


@driver
class S3:
    """Backups as folders of plain objects in one bucket. The source is ``<VM uuid>.<32 hex>``."""

    bucket: str = option("the bucket; it must exist")
    prefix: str = option("the beginning of every key in it", default="")
    endpoint_url: str = option("the server; empty: Amazon's for the region", default="")
    region: str = option("the region; empty: the profile's, else us-east-1", default="")
    profile: str = option("the profile of the credentials file; empty: default", default="")
    credentials_file: Path | None = option(
        "an AWS credentials file; none: boto3's own search (environment, ~/.aws, the instance's role)", default=None
    )
    path_style: bool = option("name the bucket in the path and not in the host name", default=False)
    ca_file: Path | None = option("certificates of the authorities to trust; none: the usual ones", default=None)
    storage_class: str = option("the storage class of disks; empty: the bucket's default", default="")
    sse: Literal["", "AES256", "aws:kms", "aws:kms:dsse"] = option("encryption by the store", default="")
    sse_kms_key_id: str = option("the key for sse = aws:kms; empty: the account's default", default="")
    extra_args: dict[str, str] = option("further arguments of every request that knows them", default_factory=dict)
    checksum: Literal["crc32", "none"] = option("the checksum that the store is to verify", default="crc32")
    limit_upload: int = option("KiB/s to the store at most; 0: no limit", default=0)
    limit_download: int = option("KiB/s from the store at most; 0: no limit", default=0)
    concurrency: int = option("parts sent or fetched at once, 1 to 16", default=4)
    retries: int = option("how often a request is sent again after a failure that may pass", default=8)
    timeout: int = option("seconds without an answer after which a request has failed", default=60)

    def __post_init__(self) -> None:
        wrong = [
            f"{name}: must not be negative" for name in ("limit_upload", "limit_download") if getattr(self, name) < 0
        ]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/-]{1,254}", self.bucket):
            wrong.append("bucket: no name of a bucket, nor an access point's ARN")
        if any(part in {".", ".."} for part in self.prefix.split("/")) or not self.prefix.isprintable():
            wrong.append("prefix: must not hold . or .. as a folder, nor control characters")
        if "//" in self.prefix.strip("/"):
            wrong.append(
                "prefix: must not hold // : many a store makes one folder of it, and lists other keys than it got"
            )
        if len(self.prefix.encode()) > 500:
            wrong.append("prefix: 500 bytes at most")
        wrong += _wrong_endpoint(self.endpoint_url)
        if self.storage_class in _ARCHIVES:
            wrong.append("storage_class: what lies in an archive cannot be restored at once")
        if self.sse_kms_key_id and not self.sse.startswith("aws:kms"):
            wrong.append("sse_kms_key_id: needs sse = aws:kms")
        unknown = sorted(set(self.extra_args) - set(_EXTRA))
        if unknown:
            wrong.append(f"extra_args.{', extra_args.'.join(unknown)}: not known; there is {', '.join(_EXTRA)}")
        if not 1 <= self.concurrency <= 16:
            wrong.append("concurrency: 1 to 16")
        if not 0 <= self.retries <= 50 or self.timeout < 1:
            wrong.append("retries must be 0 to 50, and timeout at least 1")
        if wrong:
            raise ConfigError("s3: " + "; ".join(wrong))

    @cached_property
    def _store(self) -> Store:
        from backupcore_s3.store import Store  # noqa: PLC0415 - boto3 takes 0.4 s, and options are read without it

        return Store(self)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_store"}

    @hookimpl
    def prebackup(self, run: BackupRun, ctx: Context) -> None:
        """Ask the bucket; look for what the run builds on; sweep what a dead run of this VM and host has left."""
        self._warn(ctx)
        self._store.prepare(run, ctx)

    @hookimpl
    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
        """Disks in parts, straight from the artifacts; the manifest last, and only if there is none yet."""
        return self._store.backup(artifacts, run, ctx)

    @hookimpl
    def flatten(self, merge: Merge, run: BackupRun, ctx: Context) -> Stored | None:
        """The store copies on its own side: next to nothing passes through this host."""
        return self._store.flatten(merge, run, ctx)

    @hookimpl
    def restore(self, source: SourceRef, ctx: Context) -> Sequence[Artifact]:
        """The objects of the source, fetched range by range once they are read."""
        return self._store.restore(source, ctx)

    @hookimpl
    def delete(self, sources: Sequence[SourceRef], ctx: Context) -> bool:
        """The manifest first, so that what is left of an interrupted delete is never restorable."""
        return self._store.delete(sources, ctx)

    @hookimpl
    def locks(self, sources: Sequence[SourceRef], ctx: Context) -> Mapping[SourceRef, datetime | None]:
        """A request for each source, several at once: its manifest's date."""
        return self._store.locks(sources, ctx)

    @hookimpl
    def sources(self, ctx: Context) -> Iterable[Listed]:
        """One listing of the prefix, and a request for the labels of each source, several at once."""
        return self._store.sources(ctx)

    @hookimpl
    def sources_of(self, vm: str, ctx: Context) -> Iterable[Listed]:
        """The same for the keys that begin with this VM."""
        return self._store.sources(ctx, vm)

    @hookimpl
    def identity(self, make: bool, ctx: Context) -> str | None:
        """What the marker below the prefix says: one small object."""
        return self._store.identity(ctx, make=make)

    @hookimpl
    def check(self, ctx: Context) -> bool:
        """List, write and remove. A server that ignores conditional writes is named in a warning."""
        self._warn(ctx)
        return self._store.check(ctx)

    @hookimpl
    def usage(self, ctx: Context) -> Usage:
        """The bytes below the prefix."""
        return self._store.usage(ctx)

    def _warn(self, ctx: Context) -> None:
        path = self.credentials_file
        try:
            shared = path is not None and path.expanduser().stat().st_mode & (stat.S_IROTH | stat.S_IWOTH)
        except OSError:
            return  # the client says what is wrong with it
        if shared:
            ctx.log.warning("%s can be read by everybody; chmod 600 %s", path, path)


def _wrong_endpoint(url: str) -> list[str]:
    if not url:
        return []
    try:
        place = urlsplit(url)
        sound = place.scheme in {"http", "https"} and place.hostname and place.port != 0
    except ValueError:
        sound = False
    if not sound:
        return ["endpoint_url: http://HOST:PORT or https://HOST"]
    if "@" in place.netloc or place.query:
        return ["endpoint_url: no user, password or query here; credentials lie in the credentials_file"]
    return []
