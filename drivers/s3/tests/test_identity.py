"""What a prefix is known by: a small object, made once; and a listing that shows nothing for once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from s3_proxy import Answer, Proxy

from backupcore.errors import TargetUnavailable

EMPTY = b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"


@pytest.fixture
def proxy(seaweed) -> Iterator[Proxy]:
    made = Proxy(seaweed.url)
    yield made
    made.stop()


def list_nothing(proxy: Proxy, times: int = 1) -> None:
    """Answer a listing as one of an empty bucket."""
    proxy._rule("list-type=2", lambda _: Answer(200, [("Content-Type", "application/xml")], EMPTY), times)


def test_a_prefix_gets_its_marker_when_it_is_told_to_and_keeps_it(driver, options, bucket, client, keys, ctx):
    assert driver.identity(False, ctx) is None
    assert driver.check(ctx)
    assert keys(client, bucket) == [], "what only reads has written"
    made = driver.identity(True, ctx)
    assert keys(client, bucket) == ["backups/_datastore"]
    assert [driver.identity(make, ctx) for make in (True, False)] == [made, made]
    assert options(bucket, prefix="others").identity(False, ctx) is None
    assert list(driver.sources(ctx)) == []


def test_several_at_once_agree(driver, bucket, client, keys, ctx):
    with ThreadPoolExecutor(8) as several:
        assert len(set(several.map(lambda _: driver.identity(True, ctx), range(8)))) == 1
    assert keys(client, bucket) == ["backups/_datastore"]


@pytest.mark.parametrize("body", [b"", b"../../etc/passwd", b"0" * 32 + b"\n" + b"x" * 100_000])
def test_a_marker_that_is_none(driver, bucket, client, ctx, body):
    client.put_object(Bucket=bucket, Key="backups/_datastore", Body=body)
    for make in (False, True):
        with pytest.raises(TargetUnavailable, match="does not say which"):
            driver.identity(make, ctx)
    assert client.get_object(Bucket=bucket, Key="backups/_datastore")["Body"].read() == body


def test_it_is_one_request(proxy, options, bucket, ctx):
    driver = options(bucket, endpoint_url=proxy.url)
    driver.identity(True, ctx)
    before = len(proxy.seen)
    driver.identity(False, ctx)
    assert len(proxy.seen) == before + 1


def test_one_empty_listing_is_not_believed(proxy, options, bucket, ctx, make_run, make_artifacts):
    driver = options(bucket, endpoint_url=proxy.url)
    driver.identity(True, ctx)
    run = make_run()
    source = driver.backup(make_artifacts(1000), run, ctx).source
    again = make_run(run.vm.uuid, (source,))
    for ask in (
        lambda: list(driver.sources(ctx)),
        lambda: driver.restore(source, ctx),
        lambda: driver.prebackup(again, ctx),
    ):
        list_nothing(proxy)
        with pytest.raises(TargetUnavailable, match="which is there"):
            ask()
        ask()
