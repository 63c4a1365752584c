"""Servers, buckets, runs and contexts for the tests of the S3 driver."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from backupcore.context import Context
from backupcore.model import VM, BackupRun, BytesArtifact, SourceRef, Type, new_id
from backupcore.options import build
from backupcore_s3 import S3
from lab.s3_server import ACCESS_KEY, SECRET_KEY, SeaweedFS

# Modules of fakes lie beside the tests; a process that a test starts can import them as well.
sys.path.insert(0, str(Path(__file__).parent))


def new_run(vm: str | None = None, builds_on: tuple[SourceRef, ...] = (), host: str = "host-a") -> BackupRun:
    return BackupRun(
        id=new_id(),
        vm=VM(uuid=vm or str(uuid.uuid4()), name="web"),
        host=host,
        datastore="cloud",
        image=new_id(),
        number=0,
        point=new_id(),
        type=Type.FULL,
        builds_on=builds_on,
        settings={},
        date=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )


def new_artifacts(size: int = 3 << 20) -> list[BytesArtifact]:
    return [
        BytesArtifact("disk.vda.qcow2", os.urandom(size)),
        BytesArtifact("manifest.json", b'{"format": 1}'),
        BytesArtifact("nvram", b""),
        BytesArtifact("sums.vda", os.urandom(96)),
        BytesArtifact("vm.xml", b"<domain/>"),
    ]


@pytest.fixture(scope="session")
def make_run() -> Callable[..., BackupRun]:
    return new_run


@pytest.fixture(scope="session")
def make_artifacts() -> Callable[..., list[BytesArtifact]]:
    return new_artifacts


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedFS]:
    with SeaweedFS() as server:
        yield server


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory, seaweed: SeaweedFS) -> Path:
    return seaweed.credentials(tmp_path_factory.mktemp("secrets") / "credentials")


def plain_client(url: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": "path"}),
    )


@pytest.fixture(scope="session")
def client(seaweed: SeaweedFS) -> Any:
    """Plain boto3, as anybody would use it."""
    return plain_client(seaweed.url)


@pytest.fixture
def bucket(client: Any) -> str:
    """A new bucket of this test's own."""
    name = f"test-{new_id()[:12]}"
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="session")
def options(seaweed: SeaweedFS, credentials: Path) -> Callable[..., S3]:
    """A driver as the core builds it from a table."""

    def make(bucket: str, **more: object) -> S3:
        table = {
            "bucket": bucket,
            "endpoint_url": seaweed.url,
            "credentials_file": str(credentials),
            "path_style": True,
            "prefix": "backups",
            **more,
        }
        return build(S3, table)

    return make


@pytest.fixture
def driver(options: Callable[..., S3], bucket: str) -> S3:
    return options(bucket)


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[Context]:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    with Context(folder) as context:
        yield context


@pytest.fixture(scope="session")
def keys() -> Callable[..., list[str]]:
    def listed(client: Any, bucket: str) -> list[str]:
        return [one["Key"] for one in client.list_objects_v2(Bucket=bucket).get("Contents", ())]

    return listed


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    def wait(condition: Callable[[], object], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come about in time"
            time.sleep(0.01)

    return wait
