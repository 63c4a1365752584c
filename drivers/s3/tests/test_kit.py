"""The conformance kit, on a real server and on Amazon's semantics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from backupcore.model import SourceRef
from backupcore.testing import DriverKit, Target
from lab.s3_server import ACCESS_KEY, SECRET_KEY, SeaweedFS


def tamper(client: Any, bucket: str) -> Callable[[SourceRef, str], None]:
    """Changes one byte of an object."""

    def change(source: SourceRef, artifact: str) -> None:
        key = f"kit/{source.token.replace('.', '/')}/{artifact}"
        data = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
        data[len(data) // 2] ^= 1
        client.put_object(Bucket=bucket, Key=key, Body=bytes(data))

    return change


def target(url: str, credentials: Path) -> Target:
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY
    )
    client.create_bucket(Bucket="conformance")
    options = {
        "bucket": "conformance",
        "prefix": "kit",
        "endpoint_url": url,
        "credentials_file": str(credentials),
        "path_style": True,
        "retries": 1,
    }
    return Target(
        driver="s3",
        options=options,
        tamper=tamper(client, "conformance"),
        secrets=(SECRET_KEY,),
        away={**options, "endpoint_url": "http://127.0.0.1:9"},
        large=80 << 20,  # a server on this machine takes minutes for 4 GiB
    )


class TestSeaweedFS(DriverKit):
    tidy = False

    @pytest.fixture(scope="class")
    @classmethod
    def target(cls, seaweed: SeaweedFS, credentials: Path) -> Target:
        return target(seaweed.url, credentials)


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
