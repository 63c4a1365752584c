"""`qemu-img` and `qemu-io` on images: what their headers say, and the few changes to images that no VM has open."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from backupcore.errors import HypervisorError, from_os_error
from backupcore_libvirt.backing import Backing, backing_of
from backupcore_libvirt.qemu_nbd import is_locked

__all__ = [
    "Extent",
    "Info",
    "commit",
    "info",
    "is_empty",
    "is_open_elsewhere",
    "last_extent",
    "rebase",
    "shrink",
    "to_raw",
]

LOCK_LIMIT = 5.0  # a QEMU that ends holds its lock for a moment


@dataclass(frozen=True, slots=True)
class Info:
    """An image by its header.

    The size that the guest sees, that of a cluster, bytes in use on the host, the file below, its snapshots, whether
    another file holds its data, and whether parts of a cluster can be missing (qcow2's extended L2 entries).
    """

    virtual_size: int
    cluster_size: int
    allocated: int
    backing: Backing | None
    snapshots: tuple[str, ...]
    data_elsewhere: bool
    subclusters: bool


@dataclass(frozen=True, slots=True)
class Extent:
    """Data of an image itself. `offset`: where it lies in its file, in bytes; None where it is compressed."""

    offset: int | None


def last_extent(path: str, start: int, length: int) -> Extent | None:
    """What holds the last `length` bytes of a qcow2 image from `start` on, which is one cluster; None if nothing does.

    What lies in the files below does not count. HypervisorError.
    """
    part = [f"--start-offset={start}", f"--max-length={length}"]
    done = _run(["qemu-img", "map", "--force-share", "-f", "qcow2", "--output=json", *part, path])
    if done.returncode != 0:
        raise _failed(f"find the last cluster of {path}", done)
    found = [one for one in json.loads(done.stdout) if one["depth"] == 0 and one["data"]]
    return Extent(found[0].get("offset")) if found else None


def info(path: str, shape: str) -> Info:
    """What the header of an image of format `shape` says, whether it is in use or not. HypervisorError."""
    done = _run(["qemu-img", "info", "--force-share", "-f", shape, "--output=json", path])
    if done.returncode != 0:
        raise _failed(f"read the header of {path}", done)
    found: Mapping[str, Any] = json.loads(done.stdout)
    special: Mapping[str, Any] = found.get("format-specific", {}).get("data", {})
    return Info(
        virtual_size=int(found["virtual-size"]),
        cluster_size=int(found.get("cluster-size", 1)),
        allocated=int(found.get("actual-size", 0)),
        backing=backing_of(found),
        snapshots=tuple(str(snapshot["name"]) for snapshot in found.get("snapshots", ())),
        data_elsewhere="data-file" in special,
        subclusters=bool(special.get("extended-l2")),
    )


def commit(path: str, check: Callable[[], None]) -> None:
    """Write what an overlay holds into the image right below it, and empty it. Repeatable after a crash.

    HypervisorError, also where one of the two is in use. `check` is called now and then, and raises to give up.
    """
    _changing(f"commit {path}", ["qemu-img", "commit", "-q", "-f", "qcow2", path], check)


def rebase(path: str, below: str, shape: str) -> None:
    """Write another image below an overlay into its header; the contents of both must be the same already."""
    _changing(
        f"put {path} on {below}", ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", shape, "-b", below, path]
    )


def shrink(path: str, shape: str, size: int) -> None:
    """Cut an image to `size` bytes."""
    _changing(f"shrink {path}", ["qemu-img", "resize", "-q", "-f", shape, "--shrink", path, str(size)])


def to_raw(path: str, shape: str, target: str) -> None:
    """Copy what an image holds, in use or not, to a raw file. HypervisorError."""
    done = _run(["qemu-img", "convert", "--force-share", "-f", shape, "-O", "raw", path, target])
    if done.returncode != 0:
        raise _failed(f"read {path}", done)


def is_open_elsewhere(path: str) -> bool:
    """Whether any process has a qcow2 image open, also as part of a chain: QEMU's lock tells."""
    # Without the file below: that one may well be open, and its lock would be taken for the overlay's.
    done = _run(["qemu-io", "-c", "quit", _alone(path)])
    if done.returncode != 0 and not is_locked(done.stderr):
        raise _failed(f"open {path}", done)
    return done.returncode != 0


def is_empty(path: str) -> bool:
    """Whether a qcow2 overlay holds no block of its own, no zeroed one either. HypervisorError."""
    done = _run(["qemu-img", "map", "--force-share", "--output=json", _alone(path)])
    if done.returncode != 0:
        raise _failed(f"see what {path} holds", done)
    # QEMU before 6.1 does not say it: then it is taken for one that holds something.
    return not any(extent.get("present", True) for extent in json.loads(done.stdout))


def _alone(path: str) -> str:
    """A qcow2 image without what lies below it, as QEMU's programs name one."""
    file = {"driver": "file", "filename": path}
    return "json:" + json.dumps({"driver": "qcow2", "file": file, "backing": None})


def _changing(what: str, command: list[str], check: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + LOCK_LIMIT
    while (done := _run(command, check)).returncode != 0:
        if not is_locked(done.stderr) or time.monotonic() > deadline:
            raise _failed(what, done)
        time.sleep(0.1)


def _run(command: list[str], check: Callable[[], None] = lambda: None) -> subprocess.CompletedProcess[str]:
    # Should we be killed it must not go on: the next run would find its lock on the image.
    tied = ["setpriv", "--pdeathsig", "KILL", *command]
    try:
        child = subprocess.Popen(
            tied,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise from_os_error(error, f"run {tied[0]}") from error
    with child:
        while True:
            try:
                out, err = child.communicate(timeout=0.2)
                return subprocess.CompletedProcess(command, child.returncode, out, err)
            except subprocess.TimeoutExpired:
                try:
                    check()
                except BaseException:
                    child.kill()
                    raise


def _failed(what: str, done: subprocess.CompletedProcess[str]) -> HypervisorError:
    said = " ".join(line.removeprefix(f"{done.args[0]}: ") for line in done.stderr.strip().splitlines())
    return HypervisorError(f"{what}: {said or f'it ended with {done.returncode}'}")
