"""A manifest is what a stranger may have written: it is taken as it must be, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from backupcore.errors import IntegrityError, UnsupportedOperation
from backupcore.manifest import LIMIT, parse
from backupcore.model import Type

SUMS = {"name": "sums.vda", "size": 32, "digest": "b" * 64}
DISK = {
    "id": "vda",
    "artifact": "disk.vda.qcow2",
    "virtual_size": 1 << 20,
    "size": 300,
    "whole": True,
    "tables_digest": "a" * 64,
    "sums_digest": "b" * 64,
}
WHOLE: dict[str, Any] = {
    "format": 1,
    "image": "1" * 32,
    "vm": {"uuid": "00000000-0000-0000-0000-000000000001", "name": "web1"},
    "host": "here",
    "point": "2" * 32,
    "parent": None,
    "number": 0,
    "type": "FULL",
    "date": "2026-11-29T04:00:00+00:00",
    "reason": "",
    "consistency": "crash",
    "frozen_seconds": 0,
    "versions": {"backupcore": "0.1.0"},
    "disks": [DISK],
    "artifacts": [SUMS],
}


def read(data: object) -> Any:
    return parse(data if isinstance(data, bytes) else json.dumps(data).encode(), "source 1")


def test_what_is_not_known_is_passed_over_and_what_may_be_missing_has_its_value():
    manifest = read({**WHOLE, "of a later version": [1], "disks": [{**DISK, "more": 1}]})
    assert (manifest.type, manifest.date) == (Type.FULL, datetime(2026, 11, 29, 4, tzinfo=UTC))
    assert (manifest.disks[0].order, manifest.left_out, manifest.stands_for, manifest.began) == (
        "guest",
        (),
        None,
        None,
    )
    assert read({**WHOLE, "began": "2026-11-29T04:00:00Z"}).began == manifest.date
    assert (manifest.installation, read({**WHOLE, "installation": "e" * 32}).installation) == (None, "e" * 32)


@pytest.mark.parametrize("data", [{"format": 2}, {**WHOLE, "format": 2}, {"format": 1 << 70}])
def test_a_newer_format_is_named(data):
    with pytest.raises(UnsupportedOperation, match="format"):
        read(data)


def with_disk(**change: object) -> dict[str, Any]:
    return {**WHOLE, "disks": [{**DISK, **change}]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1, "format": ' + b"[" * 100_000,
        b" " * (LIMIT + 1),
        b"null",
        b"[]",
        b'"manifest"',
        json.dumps(WHOLE).encode()[:-1],
        json.dumps(WHOLE).encode() + b"{}",
        json.dumps(WHOLE).replace("web1", "\udcff").encode("utf-8", "surrogateescape"),
        {},
        {**WHOLE, "format": "1"},
        {**WHOLE, "format": True},
        {**WHOLE, "format": 0},
        {**WHOLE, "format": 1.5},
        {key: value for key, value in WHOLE.items() if key != "point"},
        {**WHOLE, "point": "2" * 32 + "\n"},
        {**WHOLE, "point": "2" * 31},
        {**WHOLE, "image": "G" * 32},
        {**WHOLE, "image": 11111111111111111111111111111111},
        {**WHOLE, "number": -1},
        {**WHOLE, "number": True},
        {**WHOLE, "number": "0"},
        {**WHOLE, "type": "INCREMENT"},
        {**WHOLE, "type": "full"},
        {**WHOLE, "parent": {"point": "3" * 32, "digest": "c" * 64}},
        {**WHOLE, "type": "INCREMENT", "parent": {"point": "3" * 32}},
        {**WHOLE, "date": "yesterday"},
        {**WHOLE, "date": 0},
        {**WHOLE, "consistency": "good"},
        {**WHOLE, "frozen_seconds": "0"},
        {**WHOLE, "versions": ["0.1.0"]},
        {**WHOLE, "vm": "web1"},
        {**WHOLE, "disks": {"vda": DISK}},
        {**WHOLE, "disks": [DISK, DISK]},
        {**WHOLE, "artifacts": []},
        {**WHOLE, "artifacts": [SUMS, SUMS]},
        {**WHOLE, "artifacts": [SUMS, {**SUMS, "name": "manifest.json"}]},
        {**WHOLE, "artifacts": [SUMS, {**SUMS, "name": "../x"}]},
        {**WHOLE, "artifacts": [SUMS, {**SUMS, "name": "x\n"}]},
        {**WHOLE, "artifacts": [SUMS, {**SUMS, "name": "domain.xml", "size": -1}]},
        {**WHOLE, "replaces": ["2" * 31]},
        {**WHOLE, "stands_for": "d" * 63},
        {**WHOLE, "installation": "../" + "e" * 29},
        with_disk(id="../vda"),
        with_disk(id="vda\n"),
        with_disk(artifact="disk.vdb.qcow2"),
        with_disk(sums_digest="c" * 64),
        {
            **WHOLE,
            "artifacts": [
                {**one, **({"size": 1 << 40} if one["name"] == "sums.vda" else {})} for one in WHOLE["artifacts"]
            ],
        },
        {
            **WHOLE,
            "artifacts": [{**one, **({"size": 33} if one["name"] == "sums.vda" else {})} for one in WHOLE["artifacts"]],
        },
        with_disk(whole=False),
        with_disk(whole=1),
        with_disk(size=-1),
        with_disk(size=1 << 63),
        with_disk(size=1.5),
        with_disk(virtual_size=1 << 80),
        with_disk(order="any"),
    ],
    ids=lambda data: str(data)[-40:],
)
def test_whatever_is_not_as_it_must_be_is_refused(data):
    with pytest.raises(IntegrityError, match="^source 1: ") as refused:
        read(data)
    assert len(refused.value.message) < 300


def test_what_a_stranger_wrote_does_not_reach_the_terminal_as_it_is():
    with pytest.raises(IntegrityError) as refused:
        read({**WHOLE, "consistency": "\x1b[2J" + "x" * 10_000})
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 300


_AT_ONCE = """
import sys, threading
from backupcore.manifest import parse
sys.setswitchinterval(1e-6)
data, threads = sys.stdin.buffer.read(), 8
together = threading.Barrier(threads)
def work():
    together.wait()
    parse(data, "a manifest")
for thread in [threading.Thread(target=work) for _ in range(threads)]:
    thread.start()
"""


def test_threads_that_read_their_first_manifests_at_once():
    """As for a listing. In one of three processes, or more, that ended in a segmentation fault of msgspec."""
    command = [sys.executable, "-c", _AT_ONCE]
    tried = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(12)]
    data = json.dumps(WHOLE).encode()
    ended = [(one.communicate(data)[1], one.returncode) for one in tried]
    assert {code for _, code in ended} == {0}, ended
