"""Restoring disks in the place of a powered-off VM's own, and with all of them its firmware's variables and its TPM.

They are written beside the old ones, checked, then swapped in (`vmkeep.swap`) while the VM cannot start. The old ones
stay until the user says otherwise. What tracked changes lay in them, so the VM's next backups are fulls.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from backupcore import chain
from backupcore import restore as core
from backupcore.context import Progress
from backupcore.disk.in_memory import as_qcow2
from backupcore.errors import BackupError, Busy, ConfigError, NotFound, from_os_error
from backupcore.hypervisor import DiskFile
from backupcore.model import VM, Image
from vmkeep import lock, recovery, standing, swap
from vmkeep.catalog import images, places
from vmkeep.new_file import write_new
from vmkeep.restore import require_held
from vmkeep.workplace import Workplace

__all__ = ["Replaced", "restore_in_place"]

_NAME = 255  # bytes; what a file name may have
_BESIDE = {"nvram": "NVRAM", "tpm": "TPM state"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """What a restore in place did. `kept` maps a disk's ID to its old file; it lacks those that are gone.

    `nvram` is the file of the firmware's variables where that was replaced as well, `tpm` that of the TPM's state; the
    old ones are kept as "nvram" and "tpm".
    """

    vm: VM
    image: Image
    number: int
    disks: tuple[core.RestoredDisk, ...]
    kept: Mapping[str, Path]
    nvram: Path | None = None
    tpm: Path | None = None


def restore_in_place(
    place: Workplace,
    reference: str,
    *,
    number: int | None = None,
    disks: Sequence[str] = (),
    drop_old: bool = False,
    progress: Progress | None = None,
) -> Replaced:
    """Put the disks of increment `number` (None: the last) of the image `reference` in the place of its VM's own.

    With `disks`, only those, and neither the variables of its firmware nor the state of its TPM. The VM must be powered
    off (Busy); NotFound if it is not on this host. Until all new disks are written and checked nothing of the VM is
    touched. With `drop_old` the old files are removed at the end.
    """
    image = images.find(place.catalog_if_any, reference)
    try:
        vm = place.vm(image.vm).vm
    except NotFound as error:
        raise NotFound(
            f"VM {image.vm.name} ({image.vm.uuid}) is not on this host, so it has no disks to replace",
            f"Restore it to new files: vmkeep restore {image.number} --to FOLDER --define",
        ) from error
    with ExitStack() as stack:
        stack.enter_context(lock.vm_run(place.state, vm, "a restore in place"))
        stack.enter_context(lock.image_shared(place.state, image))
        # What it was before the lock may be gone.
        image = places.require_here(images.find(place.catalog, image.uuid), place.config.datastores)
        _settle(place, vm)
        increment = chain.lineage(image, number)[-1]
        require_held(image, increment, disks)
        wanted = list(disks) or [disk.id for disk in increment.disks]
        files = place.hypervisor.require_replaceable(vm, wanted, nvram=not disks)
        swaps = _plan(vm, image, increment.id, files)
        new = {one.disk: one.new for one in swaps.disks}
        ctx = stack.enter_context(place.context(progress))
        store = place.datastore(image.datastore)
        image = standing.current(place, store, image, ctx, number=increment.id)
        swap.write(place.state, swaps)
        unfinished = stack.enter_context(ExitStack())
        unfinished.callback(swap.forget, place.state, swaps)
        _make(swaps.folders)
        with place.same_place(image.datastore).blamed(ctx):
            made = core.restore(store, image, increment.id, ctx, target=lambda disk: new[disk.id], disks=wanted)
        ctx.progress.phase("check")
        for disk in made.disks:
            ctx.check()
            place.hypervisor.fit(disk.path, files[disk.id])
        if not disks:
            for name, called in _BESIDE.items():
                if name in made.files and name in new:
                    contents = made.files[name]
                    contents = as_qcow2(contents) if files[name].format == "qcow2" else contents
                    write_new(new[name], contents, files[name].path)
                    place.hypervisor.fit(new[name], files[name])
                elif name in made.files:
                    ctx.log.warning("VM %s has no %s now, so that of the backup was left out", vm.name, called)
        ctx.check()
        ctx.progress.phase("swap")
        # The old files stay locked under whatever name: a VM that starts in between fails, on old and new ones mixed.
        with place.hypervisor.keep_closed([file.path for file in files.values()]):
            if place.hypervisor.require_replaceable(vm, wanted, nvram=not disks) != files:
                raise Busy(f"the disks of VM {vm.name} were changed meanwhile", "Run it again.")
            swaps = _ready(swaps)
            unfinished.pop_all()  # from here on whoever finds the journal needs the new files
            swap.write(place.state, swaps)
            swap.carry_out(swaps)
            recovery.follow(place, swaps)
        kept = {one.disk: one.kept for one in swaps.disks if one.kept is not None}
        if drop_old:
            for path in kept.values():
                path.unlink(missing_ok=True)
        return Replaced(
            vm=vm,
            image=image,
            number=increment.id,
            disks=tuple(replace(disk, path=files[disk.id].path) for disk in made.disks),
            kept={} if drop_old else kept,
            nvram=next((one.path for one in swaps.disks if one.disk == "nvram"), None),
            tpm=next((one.path for one in swaps.disks if one.disk == "tpm"), None),
        )


def _settle(place: Workplace, vm: VM) -> None:
    """Put right what dead runs left of it. One that was cut off with the VM on mixed disks is overtaken by this one."""
    try:
        recovery.put_right(place, vm, [])
    except BackupError:
        mixed = swap.pending(place.state, vm)
        if mixed is None:
            raise
        swap.forget(place.state, mixed)


def _plan(vm: VM, image: Image, number: int, files: Mapping[str, DiskFile]) -> swap.Swaps:
    now = datetime.now().astimezone()
    mark = secrets.token_hex(4)
    return swap.Swaps(
        vm=vm,
        image=image.number,
        increment=number,
        date=now,
        disks=tuple(
            swap.Swap(
                disk=disk,
                new=file.path.with_name(f".restored-{mark}") / file.path.name,
                path=file.path,
                kept=_kept(file.path, f"before-restore-{now:%Y%m%dT%H%M%S}") if file.path.exists() else None,
                old_stamp="",
                new_stamp="",
                needed=file.needed,
            )
            for disk, file in files.items()
        ),
    )


def _ready(swaps: swap.Swaps) -> swap.Swaps:
    """With the stamps of both files, which are on the disk; what the backup does not hold (NVRAM) is not swapped."""
    made = [one for one in swaps.disks if one.new.exists()]
    for folder in swaps.folders - {one.new.parent for one in made}:
        folder.rmdir()
    swap.keep({one.new.parent for one in made})
    stamped = (replace(one, old_stamp=swap.stamp(one.path), new_stamp=swap.stamp(one.new)) for one in made)
    return replace(swaps, ready=True, disks=tuple(stamped))


def _make(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise from_os_error(error, f"the folder {folder}") from error


def _kept(path: Path, mark: str) -> Path:
    """The second name of an old disk, still free: there may have been another restore in the same second."""
    for more in ("", *(f"-{number}" for number in range(2, 100))):
        name = f"{path.name}.{mark}{more}"
        if len(name.encode()) > _NAME:
            raise ConfigError(
                f"the name of {path} is too long for a second file beside it", "Restore to new files: --to."
            )
        found = path.with_name(name)
        if not found.exists():
            return found
    raise ConfigError(f"{found} exists already", "Nothing is overwritten: move it away, or run it again.")
