"""Amazon's own semantics, as moto has them: versions, locks, encryption, classes; and a server without conditions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3_proxy import Proxy

from backupcore.context import Context
from backupcore.errors import AccessDenied, TargetUnavailable
from backupcore.model import BackupRun, BytesArtifact
from backupcore_s3 import S3

Options = Callable[..., S3]
Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]


def plain_client(url: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(moto: str) -> Any:
    made = plain_client(moto)
    made.create_bucket(Bucket="backups")
    yield made
    for one in made.list_object_versions(Bucket="backups").get("Versions", ()):
        made.delete_object(Bucket="backups", Key=one["Key"], VersionId=one["VersionId"])
    for one in made.list_object_versions(Bucket="backups").get("DeleteMarkers", ()):
        made.delete_object(Bucket="backups", Key=one["Key"], VersionId=one["VersionId"])
    made.delete_bucket(Bucket="backups")


@pytest.fixture
def here(options: Options, moto: str, aws: Any) -> Options:
    return lambda **more: options(**{"bucket": "backups", "endpoint_url": moto, **more})


def test_how_objects_are_kept(
    here: Options, aws: Any, ctx: Context, make_run: Runs, make_artifacts: Artifacts, tmp_path: Path
) -> None:
    driver = here(
        sse="aws:kms",
        sse_kms_key_id="arn:aws:kms:us-east-1:1:key/k",
        storage_class="STANDARD_IA",
        extra_args={"Tagging": "kind=backup", "ExpectedBucketOwner": "123456789012"},
    )
    run, artifacts = make_run(), make_artifacts(17 << 20)
    driver.prebackup(run, ctx)
    source = driver.backup(artifacts, run, ctx).source
    folder = f"backups/{source.token.replace('.', '/')}"
    for name, storage in (("disk.vda.qcow2", "STANDARD_IA"), ("sums.vda", None), ("manifest.json", None)):
        found = aws.head_object(Bucket="backups", Key=f"{folder}/{name}")
        assert found["ServerSideEncryption"] == "aws:kms"
        assert found["SSEKMSKeyId"].endswith("key/k")
        assert found.get("StorageClass") == storage
        tags = aws.get_object_tagging(Bucket="backups", Key=f"{folder}/{name}")["TagSet"]
        assert tags == [{"Key": "kind", "Value": "backup"}]
    with driver.restore(source, ctx)[0].open() as file:
        assert file.read() == artifacts[0].data
    assert [one.labels for one in driver.sources(ctx)] == [run.labels]
    assert driver.delete([source], ctx)


def test_a_bucket_that_keeps_versions(
    here: Options, aws: Any, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    aws.put_bucket_versioning(Bucket="backups", VersioningConfiguration={"Status": "Enabled"})
    driver = here()
    assert driver.check(ctx)
    run = make_run()
    driver.prebackup(run, ctx)
    listed = aws.list_object_versions(Bucket="backups")
    assert not listed.get("Versions"), "a check leaves nothing, not even a version"
    assert not listed.get("DeleteMarkers")
    source = driver.backup(make_artifacts(10), run, ctx).source
    assert driver.delete([source], ctx)
    assert list(driver.sources(ctx)) == []


def test_what_is_hidden_in_a_bucket_that_keeps_versions_comes_back_as_the_readme_says(
    here: Options, moto: str, aws: Any, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    aws.put_bucket_versioning(Bucket="backups", VersioningConfiguration={"Status": "Enabled"})
    driver, run, artifacts = here(), make_run(), make_artifacts(10)
    driver.prebackup(run, ctx)
    identity = driver.identity(make=True, ctx=ctx)
    source = driver.backup(artifacts, run, ctx).source
    for one in aws.list_objects_v2(Bucket="backups")["Contents"]:
        aws.delete_object(Bucket="backups", Key=one["Key"])
    assert driver.identity(make=False, ctx=ctx) is None
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    [code] = [one for one in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "DeleteMarkers" in one]
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    given = [moto, "backups", "backups/", "2000-01-01T00:00:00+00:00"]
    subprocess.run([sys.executable, "-c", code, *given], env={**os.environ, **keys}, check=True)
    assert driver.identity(make=False, ctx=ctx) == identity
    with driver.restore(source, ctx)[0].open() as file:
        assert file.read() == artifacts[0].data
    assert not [one for one in aws.list_objects_v2(Bucket="backups")["Contents"] if one["Key"].endswith("_unfinished")]


@pytest.mark.parametrize("name", ["manifest.json", "disk.vda.qcow2"])
def test_a_legal_hold(
    here: Options, moto: str, ctx: Context, make_run: Runs, make_artifacts: Artifacts, name: str
) -> None:
    """Somebody may put it on the whole backup, or on a disk alone, which a delete would hide."""
    aws = plain_client(moto)
    bucket = f"held-{name[:4]}"
    aws.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    driver = here(bucket=bucket)
    first, second = (driver.backup(make_artifacts(10), make_run(), ctx).source for _ in range(2))
    key = f"backups/{second.token.replace('.', '/')}/{name}"
    aws.put_object_legal_hold(Bucket=bucket, Key=key, LegalHold={"Status": "ON"})
    assert driver.locks([first, second], ctx) == {second: None}
    with pytest.raises(AccessDenied, match="a legal hold"):
        driver.delete([first, second], ctx)
    assert {one.source for one in driver.sources(ctx)} == {first, second}
    aws.put_object_legal_hold(Bucket=bucket, Key=key, LegalHold={"Status": "OFF"})
    assert driver.delete([first, second], ctx)
    assert list(driver.sources(ctx)) == []


def test_a_server_that_ignores_conditional_writes_is_named(
    here: Options, moto: str, aws: Any, ctx: Context, make_run: Runs, make_artifacts: Artifacts, caplog: Any
) -> None:
    def warned() -> str:
        return "\n".join(one.message for one in caplog.records if one.name == "backupcore")

    assert here().check(ctx)
    assert not warned()
    proxy = Proxy(moto)
    try:
        proxy.strip_header("if-none-match")
        driver = here(endpoint_url=proxy.url)
        assert driver.check(ctx)
        assert "bucket backups at 127.0.0.1 ignores conditional writes" in warned()
        assert not aws.list_objects_v2(Bucket="backups").get("Contents"), "a check leaves nothing"
        artifacts = make_artifacts(10)
        source = driver.backup(artifacts, make_run(), ctx).source
        assert driver.restore(source, ctx)[0].read_at(0, 10) == artifacts[0].data
    finally:
        proxy.stop()


def test_what_lies_in_an_archive(
    here: Options, moto: str, aws: Any, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    driver = here()
    source = driver.backup(make_artifacts(10), make_run(), ctx).source
    key = f"backups/{source.token.replace('.', '/')}/disk.vda.qcow2"
    aws.copy_object(
        Bucket="backups", Key=key, CopySource={"Bucket": "backups", "Key": key}, StorageClass="DEEP_ARCHIVE"
    )
    with pytest.raises(TargetUnavailable, match="InvalidObjectState") as caught:
        driver.restore(source, ctx)[0].read_at(0, 10)
    assert "restore-object" in caught.value.hint
