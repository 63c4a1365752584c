"""How bytes travel: TLS, checksums, signatures, the pace, memory; and parts that are too large to lie in it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from s3_proxy import Proxy, Request

from backupcore.context import Context
from backupcore.errors import TargetUnavailable, UnsupportedOperation
from backupcore.model import BackupRun, BytesArtifact
from backupcore_s3 import S3
from backupcore_s3.body import Pace
from backupcore_s3.bucket import Bucket
from backupcore_s3.client import connect
from backupcore_s3.parts import LARGEST, Cut
from backupcore_s3.stored import _Ahead
from backupcore_s3.writer import Writer
from lab.s3_server import SeaweedFS

Options = Callable[..., S3]
Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]

MiB = 1 << 20


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[Proxy]:
    made = Proxy(seaweed.url)
    yield made
    made.stop()


def test_by_tls(
    options: Options, bucket: str, seaweed: SeaweedFS, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    driver = options(bucket, endpoint_url=seaweed.tls_url, ca_file=str(seaweed.ca_file))
    artifacts = make_artifacts(17 * MiB)
    source = driver.backup(artifacts, make_run(), ctx).source
    with driver.restore(source, ctx)[0].open() as file:
        assert file.read() == artifacts[0].data
    with pytest.raises(TargetUnavailable, match="(?i)certificate") as caught:
        options(bucket, endpoint_url=seaweed.tls_url, retries=0).check(ctx)
    assert "ca_file" in caught.value.hint


@pytest.mark.parametrize("tls", [True, False])
def test_parts_that_do_not_fit_into_memory(
    options: Options, bucket: str, seaweed: SeaweedFS, ctx: Context, make_run: Runs, tls: bool
) -> None:
    where = {"endpoint_url": seaweed.tls_url, "ca_file": str(seaweed.ca_file)} if tls else {}
    driver = options(bucket, **where)
    artifact = Counted("disk.vda.qcow2", os.urandom(13 * MiB + 5))
    writer = Writer(Bucket(driver), make_run(), ctx)
    writer.keep_in_parts(artifact, Cut(artifact.size, 6 * MiB, 2, in_memory=False))
    writer.publish(BytesArtifact("manifest.json", b"{}"))
    assert artifact.count == artifact.size, "a guest's disk is read once"
    with driver.restore(writer.place.source, ctx)[0].open() as file:
        assert file.read() == artifact.data


class Counted(BytesArtifact):
    """Counts the bytes that are read of it."""

    count = 0

    def read_at(self, offset: int, length: int) -> bytes:
        data = super().read_at(offset, length)
        object.__setattr__(self, "count", self.count + len(data))
        return data


def test_what_a_part_carries(
    options: Options, bucket: str, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    heard: list[Request] = []
    proxy.listen(heard.append)
    driver = options(bucket, endpoint_url=proxy.url, concurrency=16)
    driver.backup(make_artifacts(11 * MiB), make_run(), ctx)
    writes = [one for one in heard if one.line.startswith("PUT")]
    assert len(writes) == 2 + 1 + 4  # parts of 8 MiB; the mark; four small artifacts
    for one in writes:
        headers = {name.lower(): value for name, value in one.headers.items()}
        assert "x-amz-checksum-crc32" in headers
        assert "x-amz-checksum-crc32" in headers["authorization"], "it is signed"
        assert headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        assert headers.get("if-none-match") == ("*" if "manifest.json" in one.line else None)
        assert ("x-amz-meta-labels" in headers) == ("manifest.json" in one.line)

    heard.clear()
    options(bucket, endpoint_url=proxy.url, checksum="none").backup(make_artifacts(10), make_run(), ctx)
    assert not any("checksum" in name.lower() for one in heard for name in one.headers)


@pytest.mark.parametrize(
    ("url", "signed"),
    [
        ("http://nas:9000", True),
        ("http://10.0.0.1", True),
        ("http://localhost:1", False),
        ("https://nas", False),
        ("", False),
    ],
)
def test_the_payload_is_signed_where_anybody_could_change_it(options: Options, url: str, signed: bool) -> None:
    client = connect(options("bucket", endpoint_url=url), Pace(0))
    assert client.meta.config.s3["payload_signing_enabled"] is signed


def test_a_limited_pace(options: Options, bucket: str, ctx: Context, make_run: Runs, make_artifacts: Artifacts) -> None:
    driver = options(bucket, limit_upload=2048, limit_download=2048)
    started = time.monotonic()
    source = driver.backup(make_artifacts(3 * MiB), make_run(), ctx).source
    assert time.monotonic() - started > 1.3
    started = time.monotonic()
    with driver.restore(source, ctx)[0].open() as file:
        assert len(file.read()) == 3 * MiB
    assert time.monotonic() - started > 1.3


def test_a_stream_fetches_ahead_only_once_it_is_read_that_far(
    options: Options,
    bucket: str,
    proxy: Proxy,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    wait_for: Callable[..., None],
) -> None:
    artifacts = make_artifacts(40 * MiB)
    source = options(bucket).backup(artifacts, make_run(), ctx).source
    heard: list[Request] = []
    proxy.listen(heard.append)
    disk = options(bucket, endpoint_url=proxy.url).restore(source, ctx)[0]

    def ranges() -> set[str]:
        return {value for one in heard for name, value in one.headers.items() if name.lower() == "range"}

    with disk.open() as file:
        assert file.read(MiB) == artifacts[0].data[:MiB]
        with pytest.raises(AssertionError):
            wait_for(lambda: len(ranges()) > 1, 0.5)
    assert ranges() == {f"bytes=0-{MiB - 1}"}, "the tables of a disk, and nothing of its data"
    with disk.open() as file:
        assert file.read() == artifacts[0].data
    whole = {f"bytes={first * MiB}-{last * MiB - 1}" for first, last in pairwise([0, 1, 2, 4, 8, 16, 24, 32, 40])}
    assert ranges() == whole, "as much as before each time, up to 8 MiB"


def test_a_stream_that_is_closed_ends_its_requests_and_keeps_nothing(
    options: Options,
    bucket: str,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    wait_for: Callable[..., None],
) -> None:
    wait_for(lambda: not fetching())  # those of earlier tests
    artifacts = make_artifacts(20 * MiB)
    source = options(bucket).backup(artifacts, make_run(), ctx).source
    disk = options(bucket, limit_download=4096).restore(source, ctx)[0]
    with disk.open() as file:
        assert file.read(4 * MiB + 1) == artifacts[0].data[: 4 * MiB + 1]
        ahead = file.raw
        assert isinstance(ahead, _Ahead)
        assert len(fetching()) == 2
    wait_for(lambda: not fetching(), 1.0)  # the 8 MiB that are under way would take two seconds
    assert not ahead._fetched


def fetching() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("s3-ahead")]


def test_cuts() -> None:
    for size in (17 * MiB, 1 << 30, 156 << 30, 157 << 30, 600 << 30, 700 << 30, 2 << 40, LARGEST):
        for concurrency in (1, 4, 16):
            made = Cut.of("disk", size, concurrency)
            count = -(-size // made.part)
            assert count <= 10_000
            assert made.part >= 8 * MiB
            assert 1 <= made.workers <= concurrency
            if made.in_memory:
                assert made.part * made.workers <= 128 * MiB
            if count < 1000:
                assert [length for _, _, length in made][-1] == size - (count - 1) * made.part
    with pytest.raises(UnsupportedOperation, match="5497558138881 bytes"):
        Cut.of("disk", LARGEST + 1, 4)


MEMORY = """
import pickle, re, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
driver, run, folder, size = pickle.load(sys.stdin.buffer)
from backupcore.context import Context
from backupcore.model import BytesArtifact
from s3_odd import CallingArtifact
with Context(folder) as ctx:
    disk = CallingArtifact("disk.vda.qcow2", size, size, lambda: None)
    source = driver.backup([disk, BytesArtifact("manifest.json", b"{}")], run, ctx).source
    with driver.restore(source, ctx)[0].open() as file:
        while file.read(1 << 20):
            pass
# getrusage would tell the most of the process that started this one
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10)
"""


@pytest.mark.soak
@pytest.mark.parametrize("concurrency", [4, 16])
def test_memory(options: Options, bucket: str, make_run: Runs, tmp_path: Path, concurrency: int) -> None:
    driver = options(bucket, concurrency=concurrency)
    given = pickle.dumps(sys.path) + pickle.dumps((driver, make_run(), tmp_path, 2 << 30))
    done = subprocess.run([sys.executable, "-c", MEMORY], input=given, capture_output=True, check=True)
    assert int(done.stdout) < 300
