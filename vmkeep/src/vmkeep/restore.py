"""Restoring: from an image of the catalog to new files, all of them or none."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from backupcore import chain
from backupcore import restore as core
from backupcore.context import Progress
from backupcore.errors import ConfigError, IntegrityError, NotFound, from_os_error
from backupcore.hypervisor import Definition
from backupcore.model import VM, Disk, Image
from vmkeep import lock
from vmkeep.catalog import images
from vmkeep.naming import Names, file_name, short
from vmkeep.workplace import Workplace

__all__ = ["Define", "Files", "restore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Define:
    """That the restored VM is to be defined: with a new UUID and new MACs, unless they are to be kept."""

    keep_uuid: bool = False
    keep_mac: bool = False


BOOT = ("kernel", "initrd", "dtb")
"""Artifacts that a VM boots from, named in its definition."""
BESIDE = (*BOOT, "tpm")
"""Artifacts that are restored as files beside the disks, where a backup holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What a restore made.

    `definition` is None where none was asked for (some disks only) or none could be made (`no_definition` says why);
    `left_out` are the parts of the stored definition that it does not hold. `vm` is the VM that was defined from it.
    `beside` are the files of `BESIDE`, by artifact.
    """

    name: str
    image: Image
    number: int
    disks: tuple[core.RestoredDisk, ...]
    definition: Path | None
    nvram: Path | None
    beside: Mapping[str, Path]
    no_definition: str = ""
    left_out: tuple[str, ...] = ()
    vm: VM | None = None


def restore(
    place: Workplace,
    reference: str,
    *,
    number: int | None = None,
    disks: Sequence[str] = (),
    folder: Path,
    name: str | None = None,
    no_ip: bool = False,
    no_nic: bool = False,
    form: core.Form = "qcow2",
    define: Define | None = None,
    progress: Progress | None = None,
) -> Files:
    """Restore increment `number` (None: the last) of the image `reference` as new files in `folder`.

    With `disks`, only those, and no definition: disks without the VM that they belong to. With `define` the VM is also
    defined; that it can be is looked at before anything is fetched. Nothing is overwritten: every
    name is looked at first (ConfigError), and taken only when all files are written.
    """
    image = images.find(place.catalog_if_any, reference)
    with lock.image_shared(place.state, image):
        image = images.find(place.catalog_if_any, image.uuid)  # what it was before the lock may be gone
        increment = chain.lineage(image, number)[-1]
        held = [disk.id for disk in increment.disks]
        unknown = sorted(set(disks) - set(held))
        if unknown:
            raise NotFound(
                f"increment {increment.id} of image {image.number} holds no disk {', '.join(unknown)}",
                f"It holds: {', '.join(held)}.",
            )
        source = short(increment.source.token, images.tokens(place.catalog_if_any))
        base = f"{file_name(image.vm.name)}-{source}" if name is None else name
        names = Names.given(folder.absolute(), base, form)
        wanted = [names.disk(disk) for disk in disks or held]
        others = () if disks else (names.definition, names.nvram, *map(names.file, BESIDE))
        _require_free([*wanted, *others])
        if define:
            kept = image.vm.uuid if define.keep_uuid else None
            place.hypervisor.require_definable(names.base, kept, names.folder)
        with _staging(names) as staged, place.context(progress) as ctx:
            store = place.datastore(image.datastore)
            made = core.restore(
                store,
                image,
                increment.id,
                ctx,
                target=lambda disk: _at(staged, disk, names),
                disks=disks or None,
                form=form,
            )
            files = _publish(
                place, made, names, staged, image, no_ip=no_ip, no_nic=no_nic, whole=not disks, define=define
            )
        return _defined(place, files) if define else files


def _defined(place: Workplace, files: Files) -> Files:
    if files.definition is None:
        raise IntegrityError(f"the disks are restored, but no VM could be defined: {files.no_definition}")
    return replace(files, vm=place.hypervisor.define(files.definition.read_bytes()))


def _at(staged: Path, disk: Disk, names: Names) -> Path:
    return staged / names.disk(disk.id).name


def _require_free(paths: Sequence[Path]) -> None:
    taken = [path for path in paths if os.path.lexists(path)]
    if taken:
        raise ConfigError(
            f"{', '.join(map(str, taken))}: exists already", "Nothing is overwritten: choose another --to or --name."
        )


@contextmanager
def _staging(names: Names) -> Iterator[Path]:
    """A hidden folder beside the final files, so that publishing them is a rename within one file system."""
    there = names.folder.exists()
    try:
        names.folder.mkdir(parents=True, exist_ok=True)
        staged = names.folder / f".{names.base}.{secrets.token_hex(4)}.part"
        staged.mkdir(mode=0o700)
    except OSError as error:
        raise from_os_error(error, f"the folder {names.folder}") from error
    try:
        yield staged
    finally:
        shutil.rmtree(staged)
        if not there:
            with suppress(OSError):  # not empty: the restore went well
                names.folder.rmdir()


def _publish(
    place: Workplace,
    made: core.Restored,
    names: Names,
    staged: Path,
    image: Image,
    *,
    no_ip: bool,
    no_nic: bool,
    whole: bool,
    define: Define | None,
) -> Files:
    """Make the definition, then give every file its final name, the definition last."""
    finished = [(disk.path, names.disk(disk.id)) for disk in made.disks]
    nvram = names.nvram if whole and "nvram" in made.files else None
    definition: Path | None = None
    why_not = ""
    left_out: tuple[str, ...] = ()
    if nvram:
        finished.append(_write(staged, nvram, made.files["nvram"]))
    beside = {name: names.file(name) for name in BESIDE if whole and name in made.files}
    finished += [_write(staged, path, made.files[name]) for name, path in beside.items()]
    if whole:
        if "vm.xml" in made.files:
            disks = {disk.id: names.disk(disk.id) for disk in made.disks}
            made_definition, why_not = _definition(
                place,
                made.files["vm.xml"],
                name=names.base,
                disks=disks,
                nvram=nvram,
                no_ip=no_ip,
                no_nic=no_nic,
                keep_uuid=bool(define and define.keep_uuid),
                new_mac=bool(define and not define.keep_mac),
                boot={name: path for name, path in beside.items() if name in BOOT},
            )
        else:
            made_definition, why_not = None, "the backup holds none"
        if made_definition is not None:
            definition = names.definition
            left_out = made_definition.left_out
            finished.append(_write(staged, definition, made_definition.xml))
    core.publish(finished)
    return Files(
        name=names.base,
        image=image,
        number=made.increment.id,
        disks=tuple(replace(disk, path=names.disk(disk.id)) for disk in made.disks),
        definition=definition,
        nvram=nvram,
        beside=beside,
        no_definition=why_not,
        left_out=left_out,
    )


def _definition(
    place: Workplace,
    stored: bytes,
    *,
    name: str,
    disks: dict[str, Path],
    nvram: Path | None,
    no_ip: bool,
    no_nic: bool,
    keep_uuid: bool,
    new_mac: bool,
    boot: Mapping[str, Path],
) -> tuple[Definition | None, str]:
    """The definition, or None and why: on a host without the hypervisor's plugin the disks still count."""
    try:
        hypervisor = place.hypervisor
    except ConfigError as error:
        return None, error.message
    made = hypervisor.definition(
        stored,
        name=name,
        disks=disks,
        nvram=nvram,
        no_ip=no_ip,
        no_nic=no_nic,
        keep_uuid=keep_uuid,
        new_mac=new_mac,
        boot=boot,
    )
    return made, ""


def _write(staged: Path, final: Path, data: bytes) -> tuple[Path, Path]:
    path = staged / final.name
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise from_os_error(error, f"writing {final}") from error
    return path, final
