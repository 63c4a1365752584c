"""The options: what is refused, what reaches boto3, and what must never show."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from backupcore.context import Context
from backupcore.errors import BackupError, ConfigError
from backupcore.options import build
from backupcore_s3 import S3
from backupcore_s3.body import Pace
from backupcore_s3.client import connect


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "bucket: required"),
        ({"bucket": ""}, "bucket"),
        ({"bucket": "a b"}, "bucket"),
        ({"bucket": "b", "pasword": "geheim"}, "pasword"),
        ({"bucket": "abc", "prefix": "a/../geheim"}, "prefix"),
        ({"bucket": "abc", "prefix": "a\ngeheim"}, "prefix"),
        ({"bucket": "abc", "prefix": "/lead//geheim/"}, "prefix: must not hold //"),
        ({"bucket": "abc", "prefix": "geheim" * 100}, "prefix: 500"),
        ({"bucket": "abc", "endpoint_url": "geheim"}, "endpoint_url: http"),
        ({"bucket": "abc", "endpoint_url": "ftp://geheim"}, "endpoint_url: http"),
        ({"bucket": "abc", "endpoint_url": "http://[geheim"}, "endpoint_url: http"),
        ({"bucket": "abc", "endpoint_url": "https://me:geheim@nas"}, "no user, password"),
        ({"bucket": "abc", "storage_class": "DEEP_ARCHIVE"}, "archive"),
        ({"bucket": "abc", "sse": "rot13"}, "sse"),
        ({"bucket": "abc", "sse_kms_key_id": "geheim"}, "needs sse"),
        ({"bucket": "abc", "extra_args": {"SSECustomerKey": "geheim"}}, "extra_args.SSECustomerKey"),
        ({"bucket": "abc", "extra_args": {"Tagging": 1}}, "extra_args"),
        ({"bucket": "abc", "concurrency": 0}, "concurrency"),
        ({"bucket": "abc", "concurrency": 17}, "concurrency"),
        ({"bucket": "abc", "concurrency": "4"}, "concurrency"),
        ({"bucket": "abc", "limit_upload": -1}, "limit_upload"),
        ({"bucket": "abc", "limit_download": -1}, "limit_download"),
        ({"bucket": "abc", "retries": -1}, "retries"),
        ({"bucket": "abc", "timeout": 0}, "timeout"),
        ({"bucket": "abc", "checksum": "md5"}, "checksum"),
        ({"bucket": "abc", "path_style": "yes"}, "path_style"),
    ],
)
def test_wrong_options_are_named(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(S3, table)
    assert "geheim" not in f"{caught.value} {caught.value.hint}"


def test_building_does_nothing_and_pickles(options: Callable[..., S3]) -> None:
    driver = options("bucket", endpoint_url="http://127.0.0.1:9", credentials_file="/nowhere")
    again = pickle.loads(pickle.dumps(driver))
    assert repr(again) == repr(driver)


def test_what_reaches_boto3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text(
        "[default]\naws_access_key_id = KEY-1\naws_secret_access_key = geheim-1\n"
        "[other]\naws_access_key_id = KEY-2\naws_secret_access_key = geheim-2\nregion = eu-north-1\n"
    )
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of the user's shell")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the user's shell")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)

    def made(**table: object) -> object:
        return connect(build(S3, {"bucket": "abc", **table}), Pace(0))

    def who(client: object) -> str:
        key: str = client._request_signer._credentials.access_key  # type: ignore[attr-defined]
        return key

    file = {"credentials_file": str(credentials)}
    assert who(made(**file)) == "KEY-1"
    assert who(made(**file, profile="other")) == "KEY-2"
    assert who(made()) == "of the user's shell"
    assert made(**file, profile="other").meta.region_name == "eu-north-1"  # type: ignore[attr-defined]
    assert made(**file).meta.region_name == "us-east-1"  # type: ignore[attr-defined]
    assert made(**file).meta.endpoint_url == "https://s3.amazonaws.com"  # type: ignore[attr-defined]
    config = made(**file, region="eu-west-1", path_style=True, retries=3, timeout=7).meta.config  # type: ignore[attr-defined]
    assert config.region_name == "eu-west-1"
    assert config.s3["addressing_style"] == "path"
    assert config.retries == {"mode": "standard", "total_max_attempts": 4}
    assert config.read_timeout == config.connect_timeout == 7


def test_a_file_that_anybody_can_read_is_pointed_out(
    options: Callable[..., S3], bucket: str, credentials: Path, tmp_path: Path, ctx: Context, caplog: object
) -> None:
    shared = tmp_path / "shared"
    shared.write_text(credentials.read_text())
    shared.chmod(0o644)
    assert options(bucket, credentials_file=str(shared)).check(ctx)
    assert "can be read by everybody" in caplog.text  # type: ignore[attr-defined]
    for driver in (options("bucket", ca_file="/nowhere"), options("bucket", region="no region")):
        with pytest.raises(BackupError):
            driver.check(ctx)
