"""The boto3 client of a datastore: who we are, where the store is, how often a request is sent again."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import ProcessProvider
from botocore.exceptions import BotoCoreError, CredentialRetrievalError
from botocore.loaders import create_loader

from backupcore.errors import ConfigError
from backupcore.process import children
from backupcore_s3.body import Pace
from backupcore_s3.failures import require_store, translate

if TYPE_CHECKING:
    from backupcore_s3.driver import S3

__all__ = ["connect"]

CONNECTIONS = 32
"""Kept open at most: more than any verb has requests under way."""

_LOOK = 0.2  # seconds between two looks at whether a program has ended


def connect(options: S3, pace: Pace, *, hurry: bool = False) -> Any:
    """A client for these options. `hurry` gives up soon: for what is tidied up after a failure."""
    try:
        return _connect(options, pace, hurry=hurry)
    except BotoCoreError as error:
        raise translate(error, "the options of the datastore") from error
    except ValueError as error:  # botocore's word for an endpoint that is no URL
        raise ConfigError(f"the options of the datastore: {error}", "Check the option endpoint_url.") from error


def _connect(options: S3, pace: Pace, *, hurry: bool) -> Any:
    core = botocore.session.get_session()
    core.register_component("data_loader", _descriptions())
    profile = options.profile or None
    if options.credentials_file is not None:
        path = options.credentials_file.expanduser()
        if not path.is_file():
            raise ConfigError(f"the credentials file {path} does not exist", "Mend the option credentials_file.")
        core.set_config_variable("credentials_file", str(path))
        # A profile that is named makes botocore leave out AWS_ACCESS_KEY_ID: a variable of the user's shell must not
        # send backups elsewhere.
        profile = profile or "default"
    session = boto3.Session(botocore_session=core, profile_name=profile)
    _limit_process(core, profile or "default", 10 if hurry else options.timeout)
    region = options.region or session.region_name or "us-east-1"
    client = session.client(
        "s3",
        region_name=region,
        endpoint_url=options.endpoint_url or None,
        verify=str(options.ca_file.expanduser()) if options.ca_file else None,
        config=Config(
            signature_version="s3v4",
            connect_timeout=10 if hurry else options.timeout,
            read_timeout=10 if hurry else options.timeout,
            retries={"mode": "standard", "total_max_attempts": 2 if hurry else options.retries + 1},
            max_pool_connections=CONNECTIONS,
            ignore_configured_endpoint_urls=True,  # AWS_ENDPOINT_URL of a shell must not send backups elsewhere
            s3={
                "addressing_style": "path" if options.path_style else "auto",
                # Our checksum is in a signed header, and TLS protects the rest; hashing all again costs a core.
                # Over plain HTTP anybody on the way could change both, so there the payload is signed.
                "payload_signing_enabled": _is_open(options.endpoint_url),
            },
            # We give each part its checksum ourselves. botocore's own way ends in a trailer, which servers that are
            # older or smaller than AWS refuse.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    client.meta.events.register("before-parse.s3", partial(_look, bool(options.endpoint_url)))
    if options.limit_upload:
        client.meta.events.register("before-sign.s3", pace.signing)
        client.meta.events.register("before-send.s3", pace.sending)
    return client


def _limit_process(core: Any, profile: str, limit: float) -> None:
    """A profile's ``credential_process`` may wait for a vault that is locked; botocore would wait with it."""
    resolver = core.get_component("credential_provider")
    name = ProcessProvider.METHOD
    if name in {one.METHOD for one in resolver.providers}:
        resolver.insert_before(
            name, ProcessProvider(profile, lambda: core.full_config, popen=partial(_Limited, limit=limit))
        )


class _Limited(subprocess.Popen[bytes]):
    """A program that is ended, with all that it has started, where it gives nothing in time.

    What it leaves behind for good, as a vault's agent, may hold its output open for ever: that ends with the program.
    """

    def __init__(self, command: Sequence[str], *, limit: float, **more: Any) -> None:
        super().__init__(command, start_new_session=True, **more)
        self._name = Path(command[0]).name
        self._limit = limit

    def communicate(self, input: bytes | None = None, timeout: float | None = None) -> tuple[bytes, bytes]:  # noqa: A002
        """What it wrote. CredentialRetrievalError if it has not ended in time."""
        end = time.monotonic() + self._limit
        while True:
            ended = self.poll() is not None
            try:
                return super().communicate(input, _LOOK)
            except subprocess.TimeoutExpired as so_far:
                if ended:
                    self._close()
                    return so_far.output or b"", so_far.stderr or b""
                if time.monotonic() > end:
                    self._kill()
                    raise CredentialRetrievalError(
                        provider=ProcessProvider.METHOD, error_msg=f"{self._name} gave none within {self._limit:.0f} s"
                    ) from None

    def _kill(self) -> None:
        below = children(self.pid)  # those that have made a session of their own are not in its group
        os.killpg(self.pid, signal.SIGKILL)
        for process in below:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        self._close()
        self.wait()

    def _close(self) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()


def _look(own_endpoint: bool, response_dict: Any, **_: Any) -> None:
    # Amazon itself redirects to a bucket's region, which botocore knows how to follow.
    if own_endpoint:
        require_store(response_dict["status_code"], response_dict["headers"], response_dict["body"])


@cache
def _descriptions() -> Any:
    """botocore's description of S3. Read by each session for itself it takes three quarters of making a client."""
    return create_loader()


def _is_open(endpoint: str) -> bool:
    """True for plain HTTP that leaves this host."""
    place = urlsplit(endpoint)
    if place.scheme != "http":
        return False
    try:
        return not ipaddress.ip_address(place.hostname or "").is_loopback
    except ValueError:
        return place.hostname != "localhost"
