"""The conformance kit, on a real server and on Amazon's semantics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3_proxy import Proxy

from backupcore.manifest import NAME as MANIFEST
from backupcore.model import SourceRef, new_id
from backupcore.testing import DriverKit, Target, chosen
from backupcore_s3 import bucket as requests
from lab.s3_server import ACCESS_KEY, SECRET_KEY, SeaweedFS


def tamper(client: Any, bucket: str) -> Callable[[SourceRef, str], None]:
    """Changes one byte of an object."""

    def change(source: SourceRef, artifact: str) -> None:
        key = f"kit/{source.token.replace('.', '/')}/{artifact}"
        data = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
        data[len(data) // 2] ^= 1
        client.put_object(Bucket=bucket, Key=key, Body=bytes(data))

    return change


def lock(client: Any, bucket: str) -> Callable[[SourceRef], AbstractContextManager[None]]:
    """A legal hold on the manifest."""

    @contextmanager
    def locked(source: SourceRef) -> Iterator[None]:
        key = f"kit/{source.token.replace('.', '/')}/{MANIFEST}"
        client.put_object_legal_hold(Bucket=bucket, Key=key, LegalHold={"Status": "ON"})
        yield
        client.put_object_legal_hold(Bucket=bucket, Key=key, LegalHold={"Status": "OFF"})

    return locked


def target(url: str, credentials: Path, *, bucket: str = "conformance", proxy: Proxy | None = None) -> Target:
    """A bucket of the server; behind a proxy it is one with locks, and stalls and fails as the proxy does."""
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY
    )
    client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=proxy is not None)
    url = proxy.url if proxy else url
    options = {
        "bucket": bucket,
        "prefix": "kit",
        "endpoint_url": url,
        "credentials_file": str(credentials),
        "path_style": True,
        "retries": 1,
    }
    return Target(
        driver="s3",
        options=options,
        tamper=tamper(client, bucket),
        secrets=(SECRET_KEY,),
        away={**options, "endpoint_url": "http://127.0.0.1:9"},
        new=lambda: {**options, "prefix": new_id()},
        stall=proxy.stall if proxy else None,
        fail=proxy.fail if proxy else None,
        lock=lock(client, bucket) if proxy else None,
        large=80 << 20,  # a server on this machine takes minutes for 4 GiB
    )


class TestSeaweedFS(DriverKit):
    tidy = False

    @pytest.fixture(scope="class")
    @classmethod
    def target(cls, seaweed: SeaweedFS, credentials: Path) -> Target:
        return target(seaweed.url, credentials)


class TestTroubledSeaweedFS(DriverKit):
    """It refuses, and it locks."""

    tidy = False
    checks = chosen(["refused-writes", "locks"])

    @pytest.fixture(scope="class")
    @classmethod
    def target(cls, seaweed: SeaweedFS, credentials: Path) -> Iterator[Target]:
        proxy = Proxy(seaweed.url)
        yield target(seaweed.url, credentials, bucket="troubled", proxy=proxy)
        proxy.stop()


class TestStalledSeaweedFS(DriverKit):
    """It says nothing."""

    tidy = False
    checks = chosen(["stalled"])

    @pytest.fixture
    def target(self, seaweed: SeaweedFS, credentials: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
        # 20 s and more, for what a stopped backup has written.
        monkeypatch.setattr(requests, "CLEAN_UP", 0.0)
        proxy = Proxy(seaweed.url)
        yield target(seaweed.url, credentials, bucket="stalled", proxy=proxy)
        proxy.stop()


@pytest.mark.soak
class TestAmazonsSemantics(DriverKit):
    tidy = False

    @pytest.fixture(scope="class")
    @classmethod
    def target(cls, credentials: Path) -> Iterator[Target]:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield target(f"http://{host}:{port}", credentials)
        server.stop()
