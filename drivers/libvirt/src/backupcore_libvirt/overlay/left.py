"""The overlays that runs have left: found by looking, told, and merged back, in any process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from backupcore.context import Context
from backupcore.errors import BackupError, Cancelled, HypervisorError
from backupcore.model import Outcome, RunState
from backupcore.typed import typed
from backupcore_libvirt import qemu_img
from backupcore_libvirt.connection import IO_ERROR, PAUSED, Connection, Domain
from backupcore_libvirt.disks import SourceDisk, located, source_disks
from backupcore_libvirt.folder import RunFolder
from backupcore_libvirt.overlay.files import working
from backupcore_libvirt.overlay.folder import OverlayFolder
from backupcore_libvirt.overlay.merge import Merger, named
from backupcore_libvirt.overlay.stack import (
    Stack,
    base_of,
    files_below,
    is_others,
    is_overlay,
    is_temporary,
    is_whole,
    stacks,
)
from backupcore_libvirt.premade.image import is_untouched
from backupcore_libvirt.qemu_nbd import is_served
from backupcore_libvirt.xml import parse

__all__ = ["lost", "merge_left", "remarks", "settle"]

log = logging.getLogger("backupcore")

_LOOKED_AT = 1.0  # seconds

MERGE_LIMIT = 600.0
"""Seconds that the end of a failed run waits for the merge of a disk; the guest goes on meanwhile, whatever comes."""


class _Left(NamedTuple):
    """The overlays of one VM that are there.

    Those of single runs: of its disks, used or not; those of them on which somebody has put a snapshot of theirs; and
    those of disks that it does not have any more. `lasting` are those that stay between backups, and that are not the
    file which a disk writes to. `noted` are those that a run of this configuration has made.
    """

    of_disks: list[str]
    covered: list[str]
    detached: list[str]
    lasting: list[str]
    noted: list[str]


def _find(domain: Domain, scratch: Path) -> _Left:
    """By names alone as far as it can be, so it is quick; QEMU is not asked: a listing must not, see `vm_state`."""
    folder = OverlayFolder(scratch, domain.uuid)
    xml = domain.live_xml()
    disks = [located(domain, disk) for disk in source_disks(xml)]
    here = [disk for disk in disks if disk.kind in ("file", "block") and disk.path.startswith("/")]
    # Its own file too: a disk on another bus has another ID than its overlay tells.
    own = [disk.path for disk in here if is_temporary(disk.path)]
    beside = [path for disk in here for path in folder.of(base_of(disk.path), disk.id)]
    covered = _covered(domain, xml, here)
    of_disks = [path for path in dict.fromkeys([*own, *beside, *covered]) if is_temporary(path)]
    whole = {path for path in own if is_whole(path)}
    known = {*of_disks, *whole, *(base_of(path) for path in own), *named(xml, whole=True)}
    noted = folder.noted()
    detached = [path for path in noted if path not in known]
    tops = {disk.path for disk in here}
    lasting = [path for path in dict.fromkeys(beside) if not is_temporary(path) and path not in tops]
    return _Left([path for path in of_disks if path not in whole], covered, detached, lasting, noted)


def _covered(domain: Domain, xml: str, disks: list[SourceDisk]) -> list[str]:
    """The overlays of single runs on which somebody has put a snapshot of theirs."""
    found = []
    if domain.is_active():  # the definition lists what lies below
        for disk in parse(xml).iterfind("./devices/disk"):
            top, *below = [source.get("file", "") for source in disk.iter("source")] or [""]
            if not is_overlay(top):
                found += [path for path in below if is_temporary(path)]
        return found
    for one in disks:
        if not is_overlay(one.path):
            found += [path for path in files_below(one.path, one.format) if is_temporary(path)]
    return found


def _unused(domain: Domain, left: _Left) -> list[str]:
    """Those of the VM's disks that hold something, and that neither it uses nor any process has open."""
    if not left.of_disks and not left.lasting:
        return []
    if domain.is_active():
        used = named(domain.live_xml(), whole=True)
    else:
        used = {overlay.path for stack in stacks(domain).values() for overlay in stack.overlays} | set(left.covered)
    return [path for path in (*left.of_disks, *left.lasting) if path not in used and _holds(path)]


def _holds(path: str) -> bool:
    """Whether an overlay holds something, and no process has it open."""
    # One whose making was cut off is no image for QEMU's programs.
    return not is_untouched(Path(path)) and not _stays_open(path) and not qemu_img.is_empty(path)


def _stays_open(path: str) -> bool:
    """Whether a process has it open for longer than a listing that looks at it, as another one of ours may just now."""
    deadline = time.monotonic() + _LOOKED_AT
    while qemu_img.is_open_elsewhere(path):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.05)
    return False


def remarks(domain: Domain, scratch: Path) -> list[str]:
    """What to tell of a VM that no run backs up now: a line for each overlay that a run has left."""
    left = _find(domain, scratch)
    if not left.of_disks and not left.detached and not left.lasting:
        return []
    unused, used = _unused(domain, left), named(domain.live_xml(), whole=True)
    found = [
        _remark(domain, path, left, unused=path in unused, used=path in used)
        for path in (*left.of_disks, *(path for path in left.lasting if path in unused))
        if path in unused
        or path in used
        or path in left.covered
        or (not is_untouched(Path(path)) and (not qemu_img.is_empty(path) or qemu_img.is_open_elsewhere(path)))
    ]
    return found + [
        f"{path} holds what the VM has written to a disk that it does not have any more"
        for path in left.detached
        if _holds(path)
    ]


def _remark(domain: Domain, path: str, left: _Left, *, unused: bool, used: bool) -> str:
    if unused:
        return f"{path} holds what the VM has written, and the VM does not use it"
    if path in left.covered:
        return f"somebody's snapshot lies on {path}, which a backup has left, so it is not merged"
    whose = "a backup" if path in left.noted or not used else "a backup of another configuration"
    if path not in left.noted and is_served(base_of(path)):
        return f"it writes to {path}, while {whose} reads what lies below"
    return f"it writes to {path}, which {whose} has left; {typed('vmkeep recover', domain.name)} merges it"


def lost(domain: Domain, scratch: Path) -> list[str]:
    """The overlays that hold what the VM has written and that it does not use."""
    left = _find(domain, scratch)
    return [*_unused(domain, left), *(path for path in left.detached if _holds(path))]


def settle(
    connection: Connection,
    domain: Domain,
    outcome: Outcome,
    installation: str,
    *,
    folder: RunFolder,
    ctx: Context,
) -> None:
    """Merge the overlays of a run, whether it was recorded or not and whether the VM runs or not, and remove them.

    Those of dead runs too, where the run could not merge them at its begin. Idempotent, also in a fresh process. Nobody
    may read the files any more. HypervisorError, Busy where an overlay stays, Cancelled: the next run goes on with it;
    HypervisorError also where one holds something and nothing uses it.
    """
    recorded = outcome.state is RunState.RECORDED
    check = _until_cancelled(domain, ctx) if recorded else _within(MERGE_LIMIT)
    _merge(connection, domain, folder, ctx, installation, check=check)
    left = _find(domain, folder.scratch)
    for path in left.detached:
        if _holds(path):
            raise HypervisorError(
                f"VM {domain.name}: a disk was detached during a backup, or moved; what was written meanwhile lies in "
                f"{path}",
                f"Before the disk's own file or device ({base_of(path)}) is used again: "
                f"{typed('qemu-img commit -f qcow2', path)}; then remove {path}.",
            )
    for path in _unused(domain, left):
        if not recorded and not is_temporary(path):
            continue  # not of this run, and told by the one that takes its place
        raise HypervisorError(
            f"{path} holds what VM {domain.name} has written, and the VM does not use it: was it merged, was the VM "
            f"defined anew, or were its disks exchanged, {'during' if is_temporary(path) else 'since'} a backup?",
            "Nothing removes the file. No backup holds that, unless somebody has merged it into the disk since (virsh "
            "blockcommit). If the VM has not run since, make its disk use it again (virsh edit); otherwise, while the "
            "VM is off, keep what it shows and then remove it: "
            f"{typed('qemu-img convert -f qcow2 -O qcow2', path, 'COPY')} && {typed('rm', path)}",
        )


def merge_left(connection: Connection, domain: Domain, folder: RunFolder, ctx: Context, installation: str) -> None:
    """Merge the overlays of whatever run of this installation has ended without doing so, and say so to `ctx`. As
    `settle`.
    """
    _merge(connection, domain, folder, ctx, installation, check=ctx.check, told=True)


def _merge(
    connection: Connection,
    domain: Domain,
    folder: RunFolder,
    ctx: Context,
    installation: str,
    *,
    check: Callable[[], None],
    told: bool = False,
) -> None:
    left = _find(domain, folder.scratch)
    if left.of_disks:
        _merge_all(connection, domain, folder, ctx, left, installation=installation, check=check, told=told)
    OverlayFolder(folder.scratch, domain.uuid).tidy()


def _merge_all(
    connection: Connection,
    domain: Domain,
    folder: RunFolder,
    ctx: Context,
    left: _Left,
    *,
    installation: str,
    check: Callable[[], None],
    told: bool,
) -> None:
    errors: list[BackupError] = []
    with working(folder, domain):
        merger = Merger(connection, domain, folder.path, check, installation)
        for stack in stacks(domain).values():
            try:
                if _merge_one(merger, stack) and told:
                    ctx.did(f"merged the overlay of disk {stack.disk} that a dead run had left")
                # A volume whose pool was stopped meanwhile is no known file any more.
                if now := stacks(domain).get(stack.disk):
                    merger.sweep(now)
            except BackupError as error:  # the other disks all the same
                errors.append(error)
    errors += [
        HypervisorError(
            f"VM {domain.name}: {path} is not merged: somebody's snapshot lies on it",
            f"The VM goes on as it is. Remove that snapshot ({typed('virsh snapshot-list', domain.name)} may show it), "
            f"then run: {typed('vmkeep recover', domain.name)}",
        )
        for path in left.covered
        if not is_others(path, installation)
    ]
    if errors:
        raise errors[0]
    if domain.state() == (PAUSED, IO_ERROR):
        # QEMU stopped it when an overlay could not grow; on its own files the write that was stopped is done again.
        domain.resume()
        ctx.did("let the guest go on, which QEMU had stopped after an I/O error")


def _merge_one(merger: Merger, stack: Stack) -> bool:
    """Merge what is temporary in this stack; whether there was something."""
    domain = merger.domain
    assert merger.installation is not None
    if not stack.temporary(merger.installation):
        return False
    if domain.is_active():
        merger.finish(stack)
        stack = stacks(domain)[stack.disk]
    while places := stack.temporary(merger.installation):
        # The upper ones first, one by one: where AppArmor keeps the lowest from being merged they do not pile up.
        high = places[-1]
        below, _ = stack.file(high - 1)
        log.info("VM %s: merging the overlay of disk %s back into %s", domain.name, stack.disk, below)
        live = domain.is_active()
        try:
            merger.merge(stack, high, high)
        except HypervisorError:
            if not live or domain.is_active():
                raise
            # It was switched off in the middle: all that it has written is in the overlay, which is merged now.
        now = stacks(domain).get(stack.disk)
        if now is None:
            break
        stack = now
    return True


def _within(seconds: float) -> Callable[[], None]:
    deadline = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > deadline:
            raise HypervisorError(
                f"an overlay was not merged within {seconds:.0f} s: the guest writes as fast as it is merged",
                "It goes on in its overlay; the next backup or 'vmkeep recover' merges it.",
            )

    return check


def _until_cancelled(domain: Domain, ctx: Context) -> Callable[[], None]:
    def check() -> None:
        if ctx.cancelled:
            raise Cancelled(
                f"VM {domain.name}: the merge of its overlays was not waited for",
                "The guest goes on in them; the next backup or 'vmkeep recover' merges them.",
            )

    return check
