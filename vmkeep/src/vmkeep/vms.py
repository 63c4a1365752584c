"""The VMs of this host with their backups, and their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from backupcore.errors import BackupError, NotFound, sentences
from backupcore.hypervisor import Checkpoint, VMState
from backupcore.model import Image
from backupcore.near import near
from vmkeep import lock, settings, swap
from vmkeep.catalog import images, runs
from vmkeep.workplace import Workplace

__all__ = ["Detail", "Listing", "configure", "detail", "foreign", "forget", "listing", "require_known"]

_RUNS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One VM, and the date of its last backup that is still there."""

    found: VMState
    last_backup: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """One VM with its settings (`own` are the keys that it sets itself), images and last runs."""

    found: VMState
    settings: Mapping[str, str]
    own: frozenset[str]
    images: tuple[Image, ...]
    last_runs: tuple[runs.PastRun, ...]


def listing(place: Workplace) -> list[Listing]:
    """Every VM of the hypervisor, by name."""
    dates = images.last_dates(place.catalog_if_any)
    return [
        Listing(found=_told(place, found), last_backup=dates.get(found.vm.uuid)) for found in place.hypervisor.vms()
    ]


def _told(place: Workplace, found: VMState) -> VMState:
    """With what this host itself knows of it."""
    remark = swap.remark(place.state, found.vm)
    return replace(found, remarks=(*found.remarks, remark)) if remark else found


def require_known(place: Workplace, vm: str) -> None:
    """NotFound, with near names, unless this host or the catalog has a VM of this name or UUID."""
    known = {image.image.vm.name for image in images.listed(place.catalog_if_any)}
    try:
        place.hypervisor.find(vm)
    except NotFound as error:
        known |= {found.vm.name for found in place.hypervisor.vms()}
        raise NotFound(f"neither the catalog nor this host has a VM {vm!r:.80}", near(vm, known)) from error
    except BackupError as error:
        raise NotFound(
            f"the catalog has no backup of a VM {vm!r:.80}",
            sentences(f"This host's VMs could not be looked at ({error.message})", near(vm, known)),
        ) from error


def detail(place: Workplace, vm: str) -> Detail:
    """One VM by name or UUID."""
    found = place.hypervisor.find(vm, place.config.defaults)
    own = place.hypervisor.settings(found.vm)
    return Detail(
        found=_told(place, found),
        settings=settings.effective(own, place.config.defaults, found.vm.name),
        own=frozenset(own),
        images=tuple(images.where(place.catalog_if_any, vm=found.vm.uuid)),
        last_runs=tuple(runs.last(place.catalog_if_any, found.vm.uuid, _RUNS)),
    )


def foreign(place: Workplace, vm: str) -> tuple[VMState, Sequence[Checkpoint]]:
    """The checkpoints (and bitmaps) on a VM that other installations have made."""
    found = place.hypervisor.find(vm)
    own = place.installation_if_any.id
    there = place.hypervisor.checkpoints(found.vm)
    return found, [one for one in there if one.installation not in ("", own)]


def forget(place: Workplace, vm: str, *, foreign: bool = False) -> tuple[VMState, Sequence[str]]:
    """Remove every checkpoint, bitmap and overlay of a VM's backups; their names. Busy while it is being backed up.

    The next backup of each of its chains is then a full in a new image. With `foreign` only the checkpoints and bitmaps
    of other installations go, and this one's stay.
    """
    found = place.hypervisor.find(vm)
    with lock.vm_run(place.state, found.vm):
        return found, place.hypervisor.forget(found.vm, place.installation.id, foreign=foreign)


def configure(place: Workplace, vm: str, changes: Mapping[str, str]) -> Detail:
    """Change some of a VM's own settings, and return what counts now.

    ConfigError for a value that is not legal, NotFound for a disk that the VM has not.
    """
    found = place.hypervisor.find(vm)
    settings.validate(changes, f"VM {found.vm.name}")
    _require_disks(found, changes)
    if changes:
        place.hypervisor.configure(found.vm, {**place.hypervisor.settings(found.vm), **changes})
    return detail(place, found.vm.uuid)


def _require_disks(found: VMState, changes: Mapping[str, str]) -> None:
    """That lists of disks name disks of the VM, as it is when they are set: later one may be detached."""
    here = [disk.id for disk in found.disks]
    for key in settings.DISK_LISTS:
        unknown = [disk for disk in settings.disk_list(changes.get(key, "")) if disk not in here]
        if unknown:
            raise NotFound(
                f"VM {found.vm.name} has no disk {', '.join(unknown)}, which {key} would name",
                f"It has: {', '.join(here) or 'none'}.",
            )
