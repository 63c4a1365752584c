"""Writing overlays back into what lies below them, whether the VM runs or not.

Every step leaves a disk that reads as before: what is written into the file below is still in the overlay above it
until the VM no longer uses that. So a merge that is cut off, by a crash of ours or of QEMU, is just done again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree.ElementTree import tostring

from backupcore.disk.nbd import DEPTH, Client, held
from backupcore.errors import BackupError, Busy, HypervisorError, NotFound, TargetFull, UnsupportedOperation
from backupcore.typed import typed
from backupcore_libvirt import image_tail, qemu_img
from backupcore_libvirt.apparmor import MENDED, denies_merges
from backupcore_libvirt.connection import ACTIVE_COMMIT, COMMIT, NOT_READY, Connection, Domain
from backupcore_libvirt.image_lock import keep_closed
from backupcore_libvirt.libvirt_errors import code_of, is_away
from backupcore_libvirt.overlay import device
from backupcore_libvirt.overlay.folder import OverlayFolder
from backupcore_libvirt.overlay.room import Growing, allocated
from backupcore_libvirt.overlay.stack import (
    Overlay,
    Stack,
    is_others,
    is_overlay,
    is_regular,
    opened,
    source_path,
    stacks,
)
from backupcore_libvirt.place.open_files import exchanged
from backupcore_libvirt.premade.image import is_untouched
from backupcore_libvirt.qemu_nbd import QemuNbd, is_locked, is_served
from backupcore_libvirt.scratch import reserve
from backupcore_libvirt.states import require_here
from backupcore_libvirt.used_files import used_files
from backupcore_libvirt.versions import text
from backupcore_libvirt.xml import Element, parse

__all__ = ["Merger", "named", "set_source"]

log = logging.getLogger("backupcore")

EVERY = 0.02  # seconds between two looks at a block job
GUARD = "nbd.guard.sock"
STALL_LIMIT = 600.0
READER_LIMIT = 1.0  # for others who look at the files to be done
_LITTLE = 1 << 20  # bytes that QEMU may need for its tables
GONE_LIMIT = 10.0  # for libvirt to write down the end of a job


@dataclass(frozen=True, slots=True)
class Merger:
    """Merges the overlays of one VM.

    `folder` is private to the run (a socket is made there), and lies in scratch; `check` is called while it waits, and
    raises to give up. Only overlays of `installation` are merged or removed, and those of nobody; all, with None.
    """

    connection: Connection
    domain: Domain
    folder: Path
    check: Callable[[], None]
    installation: str | None = ""

    def merge(self, stack: Stack, low: int, high: int) -> None:
        """Write the overlays `low` to `high` of a disk into the file below them, and remove them.

        With `high` the last of them, the VM writes to that file afterwards. HypervisorError, Busy; what `check` raises:
        then a merge below the last overlay goes on in QEMU, and any other is given up.
        """
        below, _ = stack.file(low - 1)
        for overlay in stack.overlays[low : high + 1]:
            self._refuse_others(overlay)
        if is_served(below):  # of files QEMU's lock says so too, and of devices nothing does
            raise Busy(
                f"VM {self.domain.name}: {below} is still read by a backup, so the overlay on it is not merged",
                "Wait until that backup has ended; the next one merges it.",
            )
        self._refuse_used(stack, [below, *(overlay.path for overlay in stack.overlays[low : high + 1])])
        for overlay in stack.overlays[low : high + 1]:
            self._refuse_snapshots(overlay.path)
            if overlay.temporary and not is_regular(stack.base):
                device.require_same(overlay.path, stack.base)
        try:
            self._merge_now(stack, low, high)
        except HypervisorError as error:
            if why := _no_room(stack, low, high):
                raise self._full(stack, high, error, why) from error
            raise
        for overlay in stack.overlays[low : high + 1]:
            device.forget(overlay.path)

    def _merge_now(self, stack: Stack, low: int, high: int) -> None:
        if self.domain.is_active():
            self._refuse_exchanged(stack, low, high)
            self._merge_live(stack, low, high)
        elif self.domain.is_saved() or self.domain.was_saved():
            raise Busy(
                f"VM {self.domain.name}: its memory is saved with the names of its disks' files, so its overlays stay",
                "Start the VM ('virsh restore' where it was saved to a file); the next backup merges them.",
            )
        else:
            require_here(self.domain)
            self._refuse_unsafe(stack)
            self._merge_off(stack, low, high)

    def _full(self, stack: Stack, high: int, error: HypervisorError, why: str) -> TargetFull:
        return TargetFull(
            f"VM {self.domain.name}: the overlay of disk {stack.disk} is not merged: {why} ({error.message})",
            f"Nothing is lost: the VM goes on in {stack.overlays[high].path}. Make room there, then run: "
            f"{typed('vmkeep recover', self.domain.name)}",
        )

    def merge_all(self, stack: Stack) -> None:
        """Write every overlay of a disk into its base, which the VM then writes to."""
        if self.domain.is_active():
            self.finish(stack)
            stack = stacks(self.domain)[stack.disk]
        if stack.overlays:
            log.info("VM %s: bringing disk %s back to %s", self.domain.name, stack.disk, stack.base)
            self.merge(stack, 0, len(stack.overlays) - 1)

    def finish(self, stack: Stack) -> None:
        """Wait for a commit that a dead run, or a killed one's libvirt, has left behind on this disk."""
        kind, _, _ = self.domain.block_job_progress(stack.disk)
        if stack.overlays and kind in (COMMIT, ACTIVE_COMMIT):
            self._follow(stack)

    def hindrance(self, stack: Stack, low: int, high: int) -> UnsupportedOperation | None:
        """Why the disk's size forbids this merge while the VM runs; None where it does not, or the VM is off."""
        if not self.domain.is_active():
            return None
        if high == len(stack.overlays) - 1:
            below, shape = stack.file(low - 1)
            if not _has_own_size(below, shape) and _size(below, shape) > _size(stack.top):
                return UnsupportedOperation(
                    f"VM {self.domain.name}: disk {stack.disk} was made smaller, so {stack.top} can be merged into "
                    f"{below} only while the VM is off",
                    "Power it off, and run the command again.",
                )
        elif _cut_off(stack, low, high):
            # A commit does not cut off the file below. (While it runs QEMU lets nobody resize the disk.)
            return UnsupportedOperation(
                f"VM {self.domain.name}: disk {stack.disk} was made smaller and has grown since, so "
                f"{stack.overlays[high].path} is not merged yet: the guest would see again what was cut off",
                "The next backup does it.",
            )
        return None

    def _merge_live(self, stack: Stack, low: int, high: int) -> None:
        if error := self.hindrance(stack, low, high):
            raise error
        below, shape = stack.file(low - 1)
        last = high == len(stack.overlays) - 1
        if not last:
            _require_header_room(self.domain.name, stack)
        if _size(stack.overlays[high].path) > _size(below, shape):
            image_tail.clear(below, shape)
        try:
            self._begin(stack, below, None if last else stack.overlays[high].path)
        except HypervisorError as refused:
            if not is_away(refused) and denies_merges(self.connection, self.domain):
                raise HypervisorError(
                    f"{refused.message} (AppArmor denies it while this VM runs, before libvirt {text(MENDED)})",
                    f"Power the VM off once, then run {typed('vmkeep recover', self.domain.name)}. Until then it goes "
                    "on in its overlay, and its backups are taken as before.",
                ) from refused
            raise
        self._follow(stack)
        merged = {overlay.path for overlay in stack.overlays[low : high + 1]}
        deadline = time.monotonic() + GONE_LIMIT
        while merged & set(self._files(stack.disk)):
            if time.monotonic() > deadline:
                raise HypervisorError(
                    f"VM {self.domain.name}: the commit of disk {stack.disk} into {below} has ended without success",
                    f"Nothing is lost: the VM goes on in {stack.overlays[high].path}. Is the file system of {below} "
                    f"full? QEMU's log (/var/log/libvirt/qemu/{self.domain.name}.log) may say more. Then run: "
                    f"{typed('vmkeep recover', self.domain.name)}",
                )
            time.sleep(EVERY)

    def _begin(self, stack: Stack, below: str, top: str | None) -> None:
        """Begin the commit once nobody else reads the files: of a `qemu-img info` the lock is there for a moment.

        Busy where it stays.
        """
        deadline = time.monotonic() + READER_LIMIT
        while True:
            try:
                self.domain.begin_commit(stack.disk, below, top)
            except HypervisorError as refused:
                if not is_locked(refused.message):
                    raise
                if time.monotonic() > deadline:
                    raise Busy(
                        f"VM {self.domain.name}: the overlay of disk {stack.disk} is not merged: another process has "
                        f"a lock on {below} or a file above it",
                        f"The VM goes on in it. See which one with: {typed('lsof', below)}; then run: "
                        f"{typed('vmkeep recover', self.domain.name)}",
                    ) from refused
            else:
                return
            self.check()
            time.sleep(EVERY)

    def _files(self, disk: str) -> list[str]:
        """The files of a disk, by libvirt."""
        for element in parse(self.domain.live_xml()).iterfind("./devices/disk"):
            target = element.find("target")
            if target is not None and target.get("dev") == disk:
                return [source.get("file", "") for source in element.iter("source")]
        return []

    def _follow(self, stack: Stack) -> None:
        """Until the block job has ended; that of the last overlay is brought to its end."""
        disk = stack.disk
        least, deadline = -1, time.monotonic() + STALL_LIMIT
        while True:
            kind, done, size = self.domain.block_job_progress(disk)
            if not kind:
                return
            if least < 0 or size - done < least:
                least, deadline = size - done, time.monotonic() + STALL_LIMIT
            try:
                self.check()
                self._check_progress(disk, deadline)
            except BaseException:
                if kind == ACTIVE_COMMIT:
                    self._give_up(disk)
                raise
            if kind == COMMIT:
                try:
                    _require_header_room(self.domain.name, stack)
                except TargetFull:
                    self._give_up(disk)
                    raise
            if kind == ACTIVE_COMMIT and done == size:
                try:
                    self.domain.pivot(disk)
                except BackupError as error:
                    # Between the last byte and "ready" QEMU has more to do; and the guest goes on writing.
                    if code_of(error) != NOT_READY:
                        raise
            time.sleep(EVERY)

    def _check_progress(self, disk: str, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise HypervisorError(
                f"VM {self.domain.name}: the merge of disk {disk} has not come nearer to its end for "
                f"{STALL_LIMIT:.0f} s: the guest writes as fast as is merged",
                "It goes on in its overlay. Run the backup again, or 'vmkeep recover', when it writes less.",
            )

    def _give_up(self, disk: str) -> None:
        self.domain.give_up_block_job(disk)
        deadline = time.monotonic() + GONE_LIMIT
        while self.domain.block_job_progress(disk)[0] and time.monotonic() < deadline:
            time.sleep(EVERY)

    def _merge_off(self, stack: Stack, low: int, high: int) -> None:
        # One by one, from above: qemu-img empties an overlay only when it writes it into the file right below.
        for index in range(high, low - 1, -1):
            overlay = stack.overlays[index].path
            below, shape = stack.file(index - 1)
            if _size(overlay) > _size(below, shape):
                image_tail.clear(below, shape)
            if index == len(stack.overlays) - 1:
                self._merge_top_off(stack, overlay, below, shape)
            else:
                # libvirt writes the chain of files into the stored definition, and believes that more than the images.
                _unlist(self.domain, stack.disk)
                qemu_img.commit(overlay, self.check)
                if _cut_off(stack, index, index):
                    qemu_img.shrink(below, shape, _size(overlay))
                qemu_img.rebase(stack.overlays[index + 1].path, below, shape)
            self._discard(overlay)
            stack = replace(stack, overlays=stack.overlays[:index] + stack.overlays[index + 1 :])

    def _merge_top_off(self, stack: Stack, top: str, below: str, shape: str) -> None:
        qemu_img.commit(top, self.check)
        # While this process has it open the VM cannot start, so nothing is written to the overlay any more.
        with QemuNbd(self.folder / GUARD, top, "qcow2", depth=True) as guard:
            with Client(guard.address, [DEPTH]) as client:
                size = client.size
                written = any(held(client, DEPTH, 0, size, most=1))
            if written:
                raise Busy(
                    f"VM {self.domain.name} ran while its disk {stack.disk} was merged into {below}",
                    "Run the backup again.",
                )
            set_source(self.domain, stack.disk, below, shape)
        if not _has_own_size(below, shape) and _size(below, shape) > size:
            qemu_img.shrink(below, shape, size)  # the guest has seen it smaller since, and no less

    def sweep(self, stack: Stack) -> None:
        """Remove overlays of this disk that no VM uses and that hold nothing: a merge was cut off before its last step,
        or a run before it put them on the disks.

        Any other that lies about may be all that is left of something, and stays.
        """
        used = {stack.base, *(overlay.path for overlay in stack.overlays)}
        for path in OverlayFolder(self.folder.parent, self.domain.uuid).of(stack.base, stack.disk):
            if self.installation is not None and is_others(path, self.installation):
                continue  # it may be about to be used
            if path in used or self._discard_untouched(stack, Path(path)) or qemu_img.is_open_elsewhere(path):
                continue
            if qemu_img.is_empty(path):
                self._refuse_used(stack, [path])
                self._refuse_snapshots(path)
                self._discard(path)

    def _discard_untouched(self, stack: Stack, path: Path) -> bool:
        """Remove an overlay that was made and never used; whether it was one.

        QEMU's programs cannot look at it: they would open the file below as well, which the VM may have in use.
        """
        if not is_untouched(path):
            return False
        if self.domain.is_active() and str(path) in opened(self.domain):
            return False
        try:
            with keep_closed([path]):
                self._refuse_used(stack, [str(path)])
                if any(str(path) in named(text, whole=True) for text in self._definitions()):
                    return False
                path.unlink()
        except Busy:
            return False
        return True

    def _definitions(self) -> tuple[str, str]:
        return self.domain.live_xml(), self.domain.inactive_xml()

    def _refuse_used(self, stack: Stack, files: Sequence[str]) -> None:
        """HypervisorError if another VM uses one of these files, as its disk or below it (a linked clone), or if the
        next start of this one would use another than the top one, and it runs now.
        """
        real = {Path(path).resolve(): path for path in files}
        users: dict[str, list[str]] = {}
        for other in self.connection.domains():
            with contextlib.suppress(NotFound):  # it has ended meanwhile
                if other.uuid != self.domain.uuid:
                    for used in real.keys() & set(used_files(other)):
                        users.setdefault(real[used], []).append(f"VM {other.name}")
                elif other.is_active():
                    # What libvirt itself keeps right is the file that the VM writes to.
                    next_start = named(other.inactive_xml(), whole=False)
                    for overlay in (path for path in files if is_overlay(path) and path != stack.top):
                        if overlay in next_start:
                            users.setdefault(overlay, []).append(f"the next start of VM {other.name}")
        if users:
            path = next(path for path in reversed(files) if path in users)  # what lies below it is used with it
            raise HypervisorError(
                f"{path} of VM {self.domain.name} is not merged, and stays: it is used by {', '.join(users[path])}",
                "See: virsh dumpxml --inactive, and qemu-img info --backing-chain of its disks; give that VM a disk of "
                f"its own (qemu-img convert), then run: {typed('vmkeep recover', self.domain.name)}",
            )

    def _refuse_others(self, overlay: Overlay) -> None:
        """HypervisorError for an overlay of another installation: what it holds is that one's next increment."""
        if self.installation is not None and not overlay.is_of(self.installation):
            raise HypervisorError(
                f"{overlay.path} of VM {self.domain.name} is not merged: it is of another installation "
                f"({overlay.installation}…)",
                f"That one merges it. If it is gone: {typed('vmkeep vm forget', self.domain.name, '--foreign')}",
            )

    def _refuse_unsafe(self, stack: Stack) -> None:
        """HypervisorError where a header names other files than when the overlay was put on the disk.

        The files belong to QEMU's user. What they name QEMU opens itself, while the VM runs; here root would.
        """
        if stack.unsafe:
            raise HypervisorError(
                f"VM {self.domain.name}: disk {stack.disk} is not merged while the VM is off: {stack.unsafe}",
                f"Somebody has changed it since the backup began. Look at it first: "
                f"{typed('qemu-img info --backing-chain', stack.top)}; once the VM runs, its QEMU merges it: "
                f"{typed('vmkeep recover', self.domain.name)}",
            )

    def _refuse_exchanged(self, stack: Stack, low: int, high: int) -> None:
        """HypervisorError where QEMU, which opens the files of a commit anew by their names, would find others."""
        if why := exchanged(self.domain, [stack.file(index)[0] for index in range(low - 1, high + 1)]):
            raise HypervisorError(
                f"VM {self.domain.name}: the overlay of disk {stack.disk} is not merged: {why}",
                f"The guest goes on in {stack.top}, on what QEMU has open: save the disk from within the guest, or put "
                f"that very file back in its place, then run: {typed('vmkeep recover', self.domain.name)}",
            )

    def _refuse_snapshots(self, path: str) -> None:
        """HypervisorError if somebody has taken a snapshot into this overlay: a merge brings only what it shows now."""
        if names := qemu_img.info(path, "qcow2").snapshots:
            raise HypervisorError(
                f"{path} stays: it holds snapshots of VM {self.domain.name} ({', '.join(names):.200}), which a merge "
                "would destroy",
                f"The VM goes on with it. Once they are not needed any more ("
                f"{typed('virsh snapshot-delete', self.domain.name, 'NAME')}), run: "
                f"{typed('vmkeep recover', self.domain.name)}",
            )

    def _discard(self, path: str) -> None:
        """Remove an overlay that holds nothing any more and that nothing uses."""
        if not is_overlay(path) or any(path in named(text, whole=True) for text in self._definitions()):
            raise HypervisorError(f"{path} stays: VM {self.domain.name} still uses it")
        if qemu_img.is_open_elsewhere(path):
            raise Busy(f"{path} stays: a process still has it open", "It holds nothing any more: remove it by hand.")
        Path(path).unlink()


def _no_room(stack: Stack, low: int, high: int) -> str:
    """Where the file below these overlays may not have had the room to take up what they hold; "" where it has."""
    below, _ = stack.file(low - 1)
    try:
        size = max(_size(overlay.path) for overlay in stack.overlays[low : high + 1])
        growing = Growing.of(stack.disk, stack.overlays[high].path, below, size)
        free = shutil.disk_usage(growing.home).free
    except (OSError, BackupError):
        return ""
    needed = min(sum(allocated(overlay.path) for overlay in stack.overlays[low : high + 1]), growing.spread)
    if free >= needed + _LITTLE:
        return ""
    return f"{free >> 20} MiB are free in {growing.home}, and up to {-(-needed >> 20)} MiB may be needed"


def _require_header_room(vm: str, stack: Stack) -> None:
    """TargetFull where a commit below the disk's last overlay must not end: the file system of that is almost full.

    QEMU then writes into its header what lies below it now, and dies where it cannot (QEMU 7.2: "Could not update
    backing file link: No space left on device").
    """
    usage = shutil.disk_usage(stack.top)
    needed = reserve(usage.total) // 4
    if usage.free < needed:
        raise TargetFull(
            f"VM {vm}: the overlay of disk {stack.disk} is not merged: {usage.free >> 20} MiB are free beside "
            f"{stack.top}, {needed >> 20} MiB are needed, or QEMU could die of it",
            "Make room there; the next backup merges it.",
        )


def _size(path: str, shape: str = "qcow2") -> int:
    """What the guest sees of an image, in bytes."""
    return qemu_img.info(path, shape).virtual_size


def _has_own_size(path: str, shape: str) -> bool:
    """Whether a disk in this file has the size of a device, whatever was written to an overlay on it."""
    return shape == "raw" and Path(path).is_block_device()


def _cut_off(stack: Stack, low: int, high: int) -> bool:
    """Whether the file below overlay `low` reaches beyond overlay `high` where the one above that does as well.

    There the disk reads as zeros, since the shorter file lies in between, and without that it would show old bytes.
    """
    return min(_size(*stack.file(low - 1)), _size(*stack.file(high + 1))) > _size(*stack.file(high))


def named(xml: str, *, whole: bool) -> set[str]:
    """The files and devices that a definition names: those of its disks, and with `whole` what it lists below them as
    well.
    """
    disks = list(parse(xml).iterfind("./devices/disk"))
    sources = [source for disk in disks for source in (disk.iter("source") if whole else disk.findall("source"))]
    return {path for source in sources if (path := source.get("file") or source.get("dev"))}


def set_source(domain: Domain, disk: str, path: str, shape: str) -> None:
    """Have the next start use this file or device for a disk. Idempotent.

    Where the definition lists it below the disk's present file it is named as it is there: a volume as one of its pool.
    """
    element = _stored(domain, disk)
    source, driver, below = element.find("source"), element.find("driver"), element.find("backingStore")
    assert source is not None  # see _stored
    if source_path(domain, source) == path and _shape(driver) == shape:
        return
    if below is not None:
        element.remove(below)
    _put_source(element, source, _listed(domain, below, path), path)
    if driver is not None:
        driver.set("type", shape)
    domain.redefine_disk(tostring(element, encoding="unicode"))


def _unlist(domain: Domain, disk: str) -> None:
    """Have the next start believe the images about what lies below a disk's file, not the definition. Idempotent."""
    element = _stored(domain, disk)
    if (below := element.find("backingStore")) is not None:
        element.remove(below)
        domain.redefine_disk(tostring(element, encoding="unicode"))


def _stored(domain: Domain, disk: str) -> Element:
    """A disk in the definition of the next start, which has a source."""
    for element in parse(domain.inactive_xml()).iterfind("./devices/disk"):
        target = element.find("target")
        if target is not None and target.get("dev") == disk and element.find("source") is not None:
            return element
    raise HypervisorError(f"VM {domain.name}: the stored definition has no disk {disk} any more")


def _listed(domain: Domain, below: Element | None, path: str) -> Element | None:
    """What a definition lists below a disk's file as this file or device."""
    for one in below.iter("backingStore") if below is not None else ():
        source = one.find("source")
        if source is not None and source_path(domain, source) == path:
            return one
    return None


def _put_source(disk: Element, source: Element, listed: Element | None, path: str) -> None:
    if listed is None:
        kind, name = ("block", "dev") if Path(path).is_block_device() else ("file", "file")
        disk.set("type", kind)
        for key in ("file", "dev", "pool", "volume", "mode"):
            source.attrib.pop(key, None)
        source.set(name, path)
        return
    disk.set("type", listed.get("type", "file"))
    place = list(disk).index(source)
    disk.remove(source)
    disk.insert(place, *listed.findall("source"))
    # What is listed further below goes along: it may be a volume, too, which no header tells.
    if (further := listed.find("backingStore")) is not None and further.find("source") is not None:
        disk.append(further)


def _shape(driver: Element | None) -> str:
    return "raw" if driver is None else driver.get("type", "raw")
