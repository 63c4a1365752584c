"""Networks that fail, servers that refuse, givers that break: the right error or the right bytes, and nothing left."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from s3_odd import CallingArtifact, broken
from s3_proxy import Proxy

from backupcore.context import Context
from backupcore.errors import (
    AccessDenied,
    BackupError,
    Cancelled,
    ConfigError,
    HypervisorError,
    IntegrityError,
    Locked,
    SourceNotFound,
    TargetFull,
    TargetUnavailable,
    UnsupportedOperation,
)
from backupcore.model import BackupRun, BytesArtifact, SourceRef
from backupcore_s3 import S3
from backupcore_s3 import bucket as requests
from backupcore_s3.unfinished import mark
from lab.s3_server import ACCESS_KEY, SECRET_KEY, SeaweedFS

Options = Callable[..., S3]
Runs = Callable[..., BackupRun]
Artifacts = Callable[..., list[BytesArtifact]]
Keys = Callable[..., list[str]]

MiB = 1 << 20


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[Proxy]:
    made = Proxy(seaweed.url)
    yield made
    made.stop()


@pytest.fixture
def through(options: Options, bucket: str, proxy: Proxy) -> S3:
    """A driver that reaches the server by way of the proxy, with parts of 8 MiB."""
    return options(bucket, endpoint_url=proxy.url, retries=3, timeout=30, concurrency=16)


def restored(driver: S3, source: SourceRef, ctx: Context) -> bytes:
    with driver.restore(source, ctx)[0].open() as file:
        return file.read()


def nothing_left(client: Any, bucket: str) -> bool:
    listed = client.list_objects_v2(Bucket=bucket).get("Contents")
    return not listed and not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


PARTS = r"PUT .*partNumber="


@pytest.mark.parametrize(
    ("trouble", "pattern"),
    [
        ("slow_down", PARTS),
        ("damage", PARTS),
        ("damage", r"PUT .*/(vm.xml|manifest.json)"),
        ("lose_request", PARTS),
        ("lose_answer", PARTS),
        ("lose_answer", r"POST .*\?uploads"),
        ("lose_answer", r"POST .*\?uploadId="),
        ("lose_answer", r"PUT .*/manifest.json"),
        ("slow_down", r"PUT .*/manifest.json"),
    ],
)
def test_what_passes_is_tried_again(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts, trouble: str, pattern: str
) -> None:
    if trouble == "slow_down":
        proxy.answer(pattern, 503, "SlowDown", "Please reduce your request rate.", times=2)
    else:
        getattr(proxy, trouble)(pattern)
    run, artifacts = make_run(), make_artifacts(11 * MiB)
    source = through.backup(artifacts, run, ctx).source
    assert restored(through, source, ctx) == artifacts[0].data
    assert [(one.source, one.labels) for one in through.sources(ctx)] == [(source, run.labels)]


def test_the_answer_to_a_completion_is_lost(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    """Amazon knows the upload no more when it is asked again."""
    proxy.lose_answer_and_forget(r"POST .*\?uploadId=", 404, "NoSuchUpload")
    artifacts = make_artifacts(11 * MiB)
    source = through.backup(artifacts, make_run(), ctx).source
    assert restored(through, source, ctx) == artifacts[0].data
    # And where somebody has aborted it indeed:
    with pytest.raises(TargetUnavailable, match="NoSuchUpload"):
        through.backup(artifacts, make_run(), ctx)
    assert len(list(through.sources(ctx))) == 1


def test_a_store_that_stays_busy(
    options: Options, bucket: str, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any
) -> None:
    driver = options(bucket, endpoint_url=proxy.url, retries=1, concurrency=16)
    proxy.answer(PARTS, 503, "SlowDown", "Please reduce your request rate.")
    with pytest.raises(TargetUnavailable, match="reduce your request rate") as caught:
        driver.backup(make_artifacts(11 * MiB), make_run(), ctx)
    assert "concurrency" in caught.value.hint
    assert nothing_left(client, bucket)


def test_bytes_that_always_arrive_damaged(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str
) -> None:
    proxy.damage(PARTS, times=1000)
    with pytest.raises(BackupError, match="BadDigest"):
        through.backup(make_artifacts(11 * MiB), make_run(), ctx)
    assert nothing_left(client, bucket)


def test_a_read_that_breaks_off_goes_on(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    artifacts = make_artifacts(12 * MiB)
    source = through.backup(artifacts, make_run(), ctx).source
    proxy.cut_answer(r"GET .*/disk.vda.qcow2", 3 * MiB, times=2)
    assert restored(through, source, ctx) == artifacts[0].data
    proxy.cut_answer(r"GET .*/disk.vda.qcow2", 0, times=1000)
    with pytest.raises(TargetUnavailable, match="disk.vda.qcow2"):
        restored(through, source, ctx)


def test_an_object_that_vanished(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str
) -> None:
    source = driver.backup(make_artifacts(9 * MiB), make_run(), ctx).source
    disk = driver.restore(source, ctx)[0]
    client.delete_object(Bucket=bucket, Key=f"backups/{source.token.replace('.', '/')}/disk.vda.qcow2")
    with disk.open() as file, pytest.raises(SourceNotFound, match="disk.vda.qcow2"):
        file.read()
    with pytest.raises(SourceNotFound):
        disk.read_at(0, 10)


REFUSALS = [
    (403, "AccessDenied", "not yours", AccessDenied, "README"),
    (403, "RequestTimeTooSkewed", "The difference is too large", AccessDenied, "clock"),
    (403, "QuotaExceeded", "bucket is full", TargetFull, "Make room"),
    (507, "XMinioStorageFull", "disk is full", TargetFull, "Make room"),
    (400, "InvalidStorageClass", "no such class", ConfigError, "storage_class"),
    (400, "AuthorizationHeaderMalformed", "expecting 'eu-west-1'", ConfigError, "region"),
    (400, "KMS.NotFoundException", "no such key", ConfigError, "sse_kms_key_id"),
    (501, "NotImplemented", "not here", UnsupportedOperation, ""),
    (402, "", "", AccessDenied, "paid"),
    (407, "", "", ConfigError, "proxy"),
    (413, "", "", UnsupportedOperation, "size"),
    (429, "", "", TargetUnavailable, "concurrency"),
    (400, "EntityTooLarge", "too large", UnsupportedOperation, ""),
    (500, "InternalError", "sorry", TargetUnavailable, ""),
    (418, "SomethingNew", "odd", TargetUnavailable, ""),
]


@pytest.mark.parametrize(
    ("status", "code", "message", "error", "hint"), REFUSALS, ids=[one[1] or str(one[0]) for one in REFUSALS]
)
def test_refusals(
    options: Options,
    bucket: str,
    proxy: Proxy,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    client: Any,
    status: int,
    code: str,
    message: str,
    error: type[BackupError],
    hint: str,
) -> None:
    driver = options(bucket, endpoint_url=proxy.url, retries=0)
    proxy.answer(r"PUT .*/disk", status, code, message)
    with pytest.raises(error, match=f"{message}.*{code or status}") as caught:
        driver.backup(make_artifacts(10), make_run(), ctx)
    assert type(caught.value) is error
    assert hint in caught.value.hint
    assert nothing_left(client, bucket)


def test_wrong_keys_and_buckets(options: Options, bucket: str, ctx: Context, seaweed: SeaweedFS, tmp_path: Any) -> None:
    for key, secret, match in (("nobody", "geheim-1", "access key"), ("lab", "geheim-2", "signature")):
        path = seaweed.credentials(tmp_path / key, key=key, secret=secret)
        driver = options(bucket, credentials_file=str(path))
        with pytest.raises(AccessDenied, match=match) as caught:
            driver.check(ctx)
        assert "credentials_file" in caught.value.hint
        for text in (str(caught.value), caught.value.hint, repr(driver), repr(caught.value.__cause__)):
            assert "geheim" not in text
            assert SECRET_KEY not in text
    with pytest.raises(ConfigError, match="does not exist"):
        options("no-such-bucket").check(ctx)
    with pytest.raises(ConfigError, match="/nowhere does not exist"):
        options(bucket, credentials_file="/nowhere").check(ctx)
    with pytest.raises(ConfigError, match="other"):
        options(bucket, profile="other").check(ctx)
    (tmp_path / "empty").write_text("[default]\naws_access_key_id = lab\n")
    with pytest.raises(AccessDenied):
        options(bucket, credentials_file=str(tmp_path / "empty")).check(ctx)


def test_a_server_that_is_away(options: Options, bucket: str, ctx: Context, make_run: Runs) -> None:
    driver = options(bucket, endpoint_url="http://127.0.0.1:9", retries=0)
    for call in (
        lambda: driver.prebackup(make_run(), ctx),
        lambda: driver.check(ctx),
        lambda: list(driver.sources(ctx)),
    ):
        with pytest.raises(TargetUnavailable, match=r"127\.0\.0\.1") as caught:
            call()
        assert "endpoint_url" in caught.value.hint


@pytest.mark.parametrize("at", [0, 1, 11 * MiB, 21 * MiB - 1])
def test_a_giver_that_fails(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str, at: int
) -> None:
    disk = CallingArtifact("disk.vda.qcow2", 21 * MiB, at, broken)
    with pytest.raises(HypervisorError, match="the guest's disk is gone"):
        driver.backup([disk, *make_artifacts(1)[1:]], make_run(), ctx)
    assert nothing_left(client, bucket)


def test_the_guest_is_let_go_of_before_anything_is_tidied_up(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str
) -> None:
    there: list[bool] = []
    ctx.on_release(lambda: there.append(not nothing_left(client, bucket)))
    disk = CallingArtifact("disk.vda.qcow2", 21 * MiB, 11 * MiB, broken)
    with pytest.raises(HypervisorError):
        driver.backup([disk, *make_artifacts(1)[1:]], make_run(), ctx)
    assert there == [True]
    assert nothing_left(client, bucket)


def test_a_clean_up_that_takes_too_long_is_left_to_the_next_run(
    driver: S3,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    client: Any,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(requests, "CLEAN_UP", 0.0)
    disk = CallingArtifact("disk.vda.qcow2", 21 * MiB, 11 * MiB, broken)
    run = make_run()
    with pytest.raises(HypervisorError):
        driver.backup([disk, *make_artifacts(1)[1:]], run, ctx)
    assert f"stays in bucket {bucket}" in caplog.text
    assert f"{run.vm.uuid}/" in caplog.text
    assert "the next backup of this VM from this host removes it" in caplog.text
    assert not nothing_left(client, bucket)
    assert list(driver.sources(ctx)) == []


@pytest.mark.parametrize("at", [0, 11 * MiB, 21 * MiB - 1])
def test_a_cancel(
    driver: S3, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str, at: int
) -> None:
    disk = CallingArtifact("disk.vda.qcow2", 21 * MiB, at, ctx.cancel)
    with pytest.raises(Cancelled):
        driver.backup([disk, *make_artifacts(1)[1:]], make_run(), ctx)
    assert nothing_left(client, bucket)


def test_a_cancel_just_before_the_manifest(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str
) -> None:
    artifacts = make_artifacts(10)
    artifacts[1] = CallingArtifact("manifest.json", 100, 0, ctx.cancel)  # type: ignore[call-overload]
    with pytest.raises(Cancelled):
        through.backup(artifacts, make_run(), ctx)
    assert not any("PUT" in line and "manifest" in line for line in proxy.seen)
    assert nothing_left(client, bucket)


def test_a_cancel_while_the_server_hangs(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts, wait_for: Callable[..., None]
) -> None:
    proxy.hang(PARTS)
    errors: list[BackupError] = []

    def work() -> None:
        try:
            through.backup(make_artifacts(11 * MiB), make_run(), ctx)
        except BackupError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: any("partNumber" in line for line in proxy.seen))
    released: list[float] = []
    ctx.on_release(lambda: released.append(time.monotonic()))
    started = time.monotonic()
    ctx.cancel()
    thread.join(60)
    assert released[0] - started < 3, "the guest does not wait for the server"
    assert not thread.is_alive()
    assert time.monotonic() - started < 55, "the server is given 30 s, and is asked four times"
    assert isinstance(errors[0], Cancelled)


QUESTIONS: dict[str, Callable[[S3, BackupRun, Context], object]] = {
    "prebackup": lambda driver, run, ctx: driver.prebackup(run, ctx),
    "sources": lambda driver, _, ctx: driver.sources(ctx),
    "sources_of": lambda driver, run, ctx: driver.sources_of(run.vm.uuid, ctx),
    "restore": lambda driver, run, ctx: driver.restore(SourceRef(f"{run.vm.uuid}.{run.id}"), ctx),
    "identity": lambda driver, _, ctx: driver.identity(True, ctx),
    "check": lambda driver, _, ctx: driver.check(ctx),
    "usage": lambda driver, _, ctx: driver.usage(ctx),
}


@pytest.mark.parametrize("hook", QUESTIONS)
def test_a_question_that_the_server_does_not_answer_ends_with_a_cancel(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, wait_for: Callable[..., None], hook: str
) -> None:
    cancels: list[float] = []

    def cancel() -> None:
        wait_for(lambda: proxy.seen)
        cancels.append(time.monotonic())
        ctx.cancel()

    thread = threading.Thread(target=cancel)
    with proxy.stall():
        thread.start()
        with pytest.raises(Cancelled):
            QUESTIONS[hook](through, make_run(), ctx)
        assert time.monotonic() - cancels[0] < 5, "the server is given 30 s, and is asked four times"
    thread.join()


def test_a_server_that_knows_no_checksums(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    proxy.refuse_header("", "x-amz-checksum-", 501, "NotImplemented")
    artifacts = make_artifacts(11 * MiB)
    source = through.backup(artifacts, make_run(), ctx).source
    assert restored(through, source, ctx) == artifacts[0].data


def test_a_server_that_refuses_conditional_writes(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.refuse_header("PUT", "if-none-match", 501, "NotImplemented")
    assert through.check(ctx)
    assert "refuses conditional writes" in caplog.text
    artifacts = make_artifacts(10)
    source = through.backup(artifacts, make_run(), ctx).source
    assert restored(through, source, ctx) == artifacts[0].data


def test_a_manifest_that_somebody_else_has_written(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    proxy.answer(r"PUT .*/manifest.json", 412, "PreconditionFailed", "At least one of the pre-conditions failed")
    with pytest.raises(IntegrityError, match="somebody else"):
        through.backup(make_artifacts(10), make_run(), ctx)


def test_a_store_that_loses_an_object(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str
) -> None:
    proxy.pretend(r"PUT .*/sums.vda")
    with pytest.raises(IntegrityError, match="sums.vda"):
        through.backup(make_artifacts(10), make_run(), ctx)
    assert nothing_left(client, bucket)


def test_a_server_without_ranges(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    source = through.backup(make_artifacts(10), make_run(), ctx).source
    proxy.strip_header("range")
    with pytest.raises(BackupError):
        through.restore(source, ctx)[0].read_at(2, 3)


def test_a_delete_that_is_refused(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts
) -> None:
    source = through.backup(make_artifacts(10), make_run(), ctx).source
    proxy.answer(r"DELETE .*/manifest.json", 403, "AccessDenied", "explicit deny in a policy", times=1)
    with pytest.raises(Locked, match="explicit deny in a policy") as caught:
        through.delete([source], ctx)
    assert caught.value.until is None
    assert through.restore(source, ctx)
    # Deletes go by the manifest first: what is interrupted later is no source any more, and the next attempt ends it.
    proxy.answer(r"DELETE .*/disk", 403, "AccessDenied", "explicit deny in a policy", times=1)
    with pytest.raises(AccessDenied):
        through.delete([source], ctx)
    assert list(through.sources(ctx)) == []
    assert through.delete([source], ctx)
    assert through.usage(ctx).used == 0


PAGE = b"<!DOCTYPE html>\n<html><title>Console</title></html>"


@pytest.mark.parametrize(
    ("status", "location", "text"),
    [
        (301, "", r"it sends elsewhere \(HTTP 301\)"),
        (302, "https://nas/login", r"it sends elsewhere \(HTTP 302: https://nas/login\)"),
        (307, "https://me:geheim@nas/", r"HTTP 307: https://\*\*\*@nas/"),
        (200, "", "a web page came"),
    ],
)
def test_what_answers_there_is_no_store(
    through: S3,
    proxy: Proxy,
    ctx: Context,
    make_run: Runs,
    make_artifacts: Artifacts,
    status: int,
    location: str,
    text: str,
) -> None:
    proxy.page(status, PAGE, location)
    run = make_run()
    calls = (
        lambda: through.check(ctx),
        lambda: through.prebackup(run, ctx),
        lambda: through.backup(make_artifacts(10), run, ctx),
        lambda: list(through.sources(ctx)),
    )
    for call in calls:
        with pytest.raises(ConfigError, match=text) as caught:
            call()
        assert "endpoint_url" in caught.value.hint


AN_OBJECT = "<Contents><Key>backups/x</Key><Size>{}</Size></Contents>"
NEXT = "<IsTruncated>true</IsTruncated><NextContinuationToken>{}</NextContinuationToken>"
NO_LISTINGS = {
    "no word of where it goes on": lambda: AN_OBJECT.format(5) + "<IsTruncated>true</IsTruncated>",
    "the same page again": lambda: AN_OBJECT.format(5) + NEXT.format("same"),
    "empty pages without end": lambda: NEXT.format(time.monotonic_ns()),
    "a negative size": lambda: AN_OBJECT.format(-5),
    "a size that is none": lambda: AN_OBJECT.format("much"),
    "no size": lambda: "<Contents><Key>backups/x</Key></Contents>",
    "no key": lambda: "<Contents><Size>5</Size></Contents>",
}


@pytest.mark.parametrize("kind", NO_LISTINGS)
def test_a_listing_as_no_store_should_give_it_ends_and_names_the_store(
    through: S3, proxy: Proxy, ctx: Context, kind: str
) -> None:
    def page() -> bytes:  # anew each time
        return f"<ListBucketResult>{NO_LISTINGS[kind]()}</ListBucketResult>".encode()

    proxy.give(r"GET .*list-type", page)
    with pytest.raises(TargetUnavailable, match="^bucket .* at 127.0.0.1: listing: it") as caught:
        list(through.sources(ctx))
    assert "does not answer as S3 does" in caught.value.hint


@pytest.mark.parametrize(
    ("date", "until"),
    [
        ("2099-01-01T00:00:00", datetime(2099, 1, 1, tzinfo=UTC)),
        ("some day", None),
    ],
)
def test_a_lock_whose_date_is_odd(
    through: S3, proxy: Proxy, ctx: Context, make_run: Runs, make_artifacts: Artifacts, date: str, until: datetime
) -> None:
    source = through.backup(make_artifacts(10), make_run(), ctx).source
    proxy.add_header("HEAD", "x-amz-object-lock-retain-until-date", date)
    if until:
        assert through.locks([source], ctx) == {source: until}
        return
    for call in (lambda: through.locks([source], ctx), lambda: through.delete([source], ctx)):
        with pytest.raises(TargetUnavailable, match=f"manifest.json: its answer cannot be read: .*{date}"):
            call()


def test_tls_that_the_server_does_not_speak(through: S3, ctx: Context, proxy: Proxy, options: Options) -> None:
    wrong = options(through.bucket, endpoint_url=proxy.url.replace("http:", "https:"), retries=0)
    with pytest.raises(ConfigError) as caught:
        wrong.check(ctx)
    assert "http://" in caught.value.hint


def test_a_key_that_may_not_list_uploads(
    through: S3,
    ctx: Context,
    proxy: Proxy,
    make_run: Runs,
    make_artifacts: Artifacts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    proxy.answer(r"GET [^ ]*[?&]uploads", 403, "AccessDenied", "no identity-based policy allows it")
    assert through.check(ctx)
    assert "s3:ListBucketMultipartUploads" in caplog.text
    source = through.backup(make_artifacts(10), make_run(), ctx).source
    assert through.delete([source], ctx), "it has none"
    assert through.usage(ctx).used == 0


def test_a_bucket_that_deletes_nothing(
    through: S3,
    ctx: Context,
    proxy: Proxy,
    client: Any,
    bucket: str,
    make_run: Runs,
    make_artifacts: Artifacts,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every backup leaves its mark there. What that costs, and what is told of it, does not grow night by night."""
    caplog.set_level(logging.WARNING)
    proxy.answer(r"DELETE (?![^ ]*uploadId)", 403, "AccessDenied", "no identity-based policy allows it", times=100)
    assert through.check(ctx)
    assert "s3:DeleteObject" in caplog.text
    caplog.clear()
    run = make_run()
    for _ in range(4):
        token = through.backup(make_artifacts(10), make_run(run.vm.uuid), ctx).source.token
        dead = {**json.loads(mark(run)), "started": "1"}
        key = f"backups/{token.replace('.', '/')}/_unfinished"
        client.put_object(Bucket=bucket, Key=key, Body=json.dumps(dead).encode())
    proxy.seen.clear()
    through.prebackup(make_run(run.vm.uuid), ctx)
    ctx.touch()
    assert len([line for line in proxy.seen if line.startswith("DELETE") and "_unfinished" in line]) == 2, (
        "the upload that was tried, and one mark"
    )
    assert not caplog.records


def test_a_command_for_credentials_that_never_ends(options: Options, bucket: str, ctx: Context, tmp_path: Path) -> None:
    vault = tmp_path / "vault"
    vault.write_text(f'#!/bin/sh\necho $$ > "{tmp_path}/started"\ntrap "" INT TERM\nsleep 600\n')
    vault.chmod(0o755)
    keys = tmp_path / "keys"
    keys.write_text(f"[default]\ncredential_process = {vault} --item geheim\n")
    driver = options(bucket, credentials_file=str(keys), timeout=1)
    with pytest.raises(AccessDenied, match="vault gave none within 1 s") as caught:
        driver.check(ctx)
    assert "geheim" not in str(caught.value)
    assert not Path("/proc", (tmp_path / "started").read_text().strip()).exists()


@pytest.mark.parametrize("answers", [True, False])
def test_a_command_for_credentials_that_leaves_an_agent_behind(
    options: Options, bucket: str, ctx: Context, credentials: Path, tmp_path: Path, answers: bool
) -> None:
    vault = tmp_path / "vault"
    last = f"""echo '{{"Version": 1, "AccessKeyId": "{ACCESS_KEY}", "SecretAccessKey": "{SECRET_KEY}"}}'"""
    agent = tmp_path / "agent"
    begun = f"setsid sh -c 'echo $$ > {agent}; exec sleep 600' &\nwhile ! [ -s {agent} ]; do sleep 0.05; done\n"
    vault.write_text(f"#!/bin/sh\n{begun}{last if answers else 'sleep 600'}\n")
    vault.chmod(0o755)
    keys = tmp_path / "keys"
    keys.write_text(f"[default]\ncredential_process = {vault}\n")
    driver = options(bucket, credentials_file=str(keys), timeout=2)
    try:
        if answers:
            assert driver.check(ctx)
            return
        with pytest.raises(AccessDenied, match="vault gave none within 2 s"):
            driver.check(ctx)
        state = Path("/proc", agent.read_text().strip(), "stat")
        deadline = time.monotonic() + 30
        while state.exists() and ") Z " not in state.read_text():
            assert time.monotonic() < deadline, "what it has started goes on"
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(agent.read_text()), signal.SIGKILL)


def test_a_source_under_object_lock(
    options: Options, ctx: Context, make_run: Runs, make_artifacts: Artifacts, client: Any, bucket: str
) -> None:
    name = f"locked-{bucket}"
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
    lock = {"ObjectLockEnabled": "Enabled", "Rule": rule}
    client.put_object_lock_configuration(Bucket=name, ObjectLockConfiguration=lock)
    driver = options(name)
    before = client.list_object_versions(Bucket=name).get("Versions", [])
    assert driver.check(ctx)
    assert client.list_object_versions(Bucket=name).get("Versions", []) == before, "it could never be removed again"
    run = make_run()
    driver.prebackup(run, ctx)
    source = driver.backup(make_artifacts(10), run, ctx).source
    other = make_run().vm.uuid
    with pytest.raises(AccessDenied, match=r"Object Lock \(COMPLIANCE until 20") as caught:
        driver.delete([SourceRef(f"{other}.{'0' * 32}"), source], ctx)
    assert "Nothing was deleted" in caught.value.hint
    [(locked, until)] = driver.locks([SourceRef(f"{other}.{'0' * 32}"), source], ctx).items()
    assert locked == source
    assert isinstance(caught.value, Locked)
    assert caught.value.until == until
    assert until is not None
    assert timedelta(hours=23) < until - datetime.now(UTC) <= timedelta(days=1)
    assert [one.source for one in driver.sources(ctx)] == [source]
    assert len(driver.restore(source, ctx)) == 5
