"""From trouble to a running guest: `python -m benchmarks.release [--rounds 20] [--drivers rsync,s3] [--only killed]`.

A guest writes all the while, and the target of its backup has stopped to answer. What is measured is the time from a
trouble to a guest that runs, with no backup job and nobody connected to it. It stands alone, beside no rival: nothing
else does that. The machine has to be quiet.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from lab import graft, libvirtd
from lab.host import Host, wait_until
from lab.troubles import DRIVERS, Target, Trouble, kill, scratch_is_at_its_reserve, target, writing_vm
from lab.vm import VM

SCRATCH = 16  # MiB; the guest fills it in a moment


def _fills(trouble: Trouble) -> None:
    wait_until(lambda: scratch_is_at_its_reserve(trouble.host), "scratch to fill", 120)


def _stopped(trouble: Trouble) -> None:
    trouble.process.send_signal(signal.SIGSTOP)
    _fills(trouble)


def _nothing(_trouble: Trouble) -> None:
    """No more than what has come before."""


@dataclass(frozen=True)
class Kind:
    """One kind of trouble: the clock runs from `cause`, after `first`. `small` says whether scratch has to be."""

    small: bool = False
    first: Callable[[Trouble], None] = _nothing
    cause: Callable[[Trouble], None] = _nothing


KINDS = {
    "scratch fills": Kind(small=True, first=_fills),
    "scratch fills, vmkeep stopped": Kind(small=True, first=_stopped),
    "cancelled": Kind(cause=lambda trouble: trouble.cancel()),
    "vmkeep killed": Kind(cause=lambda trouble: kill(trouble.process.pid)),
    "guard killed": Kind(cause=lambda trouble: kill(trouble.guard)),
    "guard stopped": Kind(cause=lambda trouble: trouble.stop_guard()),
}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.release", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--drivers", default=",".join(DRIVERS))
    parser.add_argument("--only", default="", help="troubles with this in their names")
    asked = parser.parse_args(arguments)
    print(f"{'driver':<8} {'trouble':<32} {'median':>8} {'worst':>8}  rounds")
    for driver in asked.drivers.split(","):
        for small in (True, False):
            chosen = {name: kind for name, kind in KINDS.items() if kind.small is small and asked.only in name}
            if not chosen:
                continue
            with _site(driver, SCRATCH if small else 0) as (host, where):
                for name, kind in chosen.items():
                    seconds = [_seconds(host, where, kind) for _ in range(asked.rounds)]
                    line = f"{driver:<8} {name:<32} {statistics.median(seconds):>6.2f} s {max(seconds):>6.2f} s"
                    print(f"{line}  {len(seconds)}", flush=True)


def _seconds(host: Host, where: Target, kind: Kind) -> float:
    trouble = Trouble.begin(host, where)
    trouble.go_on()
    kind.first(trouble)
    trouble.time(partial(kind.cause, trouble))
    trouble.end(where)
    host.end(trouble.process)
    return trouble.seconds


@contextmanager
def _site(driver: str, scratch: int) -> Iterator[tuple[Host, Target]]:
    uri = libvirtd.ensure()
    folder = libvirtd.folder_for_vms() / f"release-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o711)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if scratch:
            (folder / "scratch").mkdir()
            graft.mount_tmpfs(folder / "scratch", scratch)  # before the VM: QEMU keeps the mounts of its start
            stack.callback(graft.unmount, folder / "scratch")
        where = stack.enter_context(target(driver, folder))

        def make(disks: Sequence[object], *, label: str) -> VM:
            vm = VM.create(f"{label}-{secrets.token_hex(4)}", disks)  # type: ignore[arg-type]  # as `writing_vm` has them
            stack.callback(vm.remove)
            vm.start()
            return vm

        vm = writing_vm(make, folder)
        yield Host(folder, vm, uri, driver=driver, options=where.options, more=where.extra), where


if __name__ == "__main__":
    main(sys.argv[1:])
