"""Restoring: from an image of the catalog to new files or volumes, all of them or none."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from backupcore import chain
from backupcore import restore as core
from backupcore.context import Progress
from backupcore.disk.in_memory import as_qcow2
from backupcore.errors import ConfigError, IntegrityError, NotFound, from_os_error
from backupcore.hypervisor import Definition, Effect
from backupcore.model import VM, Image, Increment
from vmkeep import lock, standing, volumes
from vmkeep.catalog import images, places
from vmkeep.naming import Names, file_name, short
from vmkeep.new_file import write_new
from vmkeep.workplace import Workplace

__all__ = ["Define", "Files", "require_held", "restore"]


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
    `left_out` are the parts of the stored definition that it does not hold, `left_out_effects` the same by what their
    loss does to the guest. `vm` is the VM that was defined from it.
    `beside` are the files of `BESIDE`, by artifact. `pool` is the storage pool that the disks are in.
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
    left_out_effects: Mapping[Effect, tuple[str, ...]] = field(default_factory=dict)
    vm: VM | None = None
    pool: str | None = None


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
    redact: bool = False,
    form: core.Form | None = None,
    pool: str | None = None,
    define: Define | None = None,
    progress: Progress | None = None,
) -> Files:
    """Restore increment `number` (None: the last) of the image `reference` as new files in `folder`.

    With `disks`, only those, and no definition: disks without the VM that they belong to. With `define` the VM is also
    defined; that it can be is looked at before anything is fetched. Nothing is overwritten: every
    name is looked at first (ConfigError), and taken only when all files are written.

    With `pool` the disks become volumes of that storage pool of the hypervisor: files in its folder, beside which goes
    all else that the VM uses, or devices, which are raw; the definition goes to `folder`. `form` is qcow2 where it is
    not given and may be chosen.
    """
    image = images.find(place.catalog_if_any, reference)
    into = place.hypervisor.pool(pool) if pool is not None else None
    on_devices = into is not None and into.folder is None
    if on_devices and form == "qcow2":
        raise ConfigError(f"the volumes of storage pool {pool} are devices, and get disks raw", "Leave out --format.")
    with lock.image_read(place.state, image), ExitStack() as stack:
        image = images.find(place.catalog_if_any, image.uuid)  # what it was before the lock may be gone
        places.require_here(image, place.config.datastores)
        increment = chain.lineage(image, number)[-1]
        held = require_held(image, increment, disks)
        source = short(increment.source.token, images.tokens(place.catalog_if_any))
        base = f"{file_name(image.vm.name, len(source) + 1)}-{source}" if name is None else name
        names = Names.given(folder.absolute(), base, form or "qcow2", into.folder if into else None)
        wanted = [] if on_devices else [names.disk(disk) for disk in disks or held]
        others = () if disks else (names.definition, names.nvram, *map(names.file, BESIDE))
        _require_free([*wanted, *others])
        if define:
            kept = image.vm.uuid if define.keep_uuid else None
            place.hypervisor.require_definable(names.base, kept, Path("/") if on_devices else names.used)
        ctx = stack.enter_context(place.context(progress))
        store = place.datastore(image.datastore)
        image = standing.current(place, store, image, ctx, number=increment.id)
        # Of the definition alone, where a pool takes the rest.
        staged = stack.enter_context(_staging(names.folder, names.base))
        staged_home = stack.enter_context(_staging(names.used, names.base)) if names.home else staged
        made_volumes = stack.enter_context(volumes.made(place, into, names)) if into and on_devices else None
        stack.enter_context(place.same_place(image.datastore).blamed(ctx))
        if made_volumes is not None:
            made = core.onto_new(store, image, increment.id, ctx, device=made_volumes.add, disks=disks or None)
        else:
            made = core.restore(
                store,
                image,
                increment.id,
                ctx,
                target=lambda disk: staged_home / names.disk(disk.id).name,
                disks=disks or None,
                form=form or "qcow2",
            )
            made = replace(made, disks=tuple(replace(disk, path=names.disk(disk.id)) for disk in made.disks))
        files = _publish(
            place,
            made,
            names,
            _Staged(staged, staged_home, on_devices=on_devices),
            image,
            no_ip=no_ip,
            no_nic=no_nic,
            redact=redact,
            whole=not disks,
            define=define,
        )
        files = replace(files, pool=pool)
        if made_volumes is not None:
            made_volumes.keep()
        elif into is not None:
            volumes.show(place, into)
        return _defined(place, files) if define else files


def require_held(image: Image, increment: Increment, disks: Sequence[str]) -> list[str]:
    """The IDs of the disks that an increment holds; NotFound where one of `disks` is none of them."""
    held = [disk.id for disk in increment.disks]
    unknown = sorted(set(disks) - set(held))
    if unknown:
        raise NotFound(
            f"increment {increment.id} of image {image.number} holds no disk {', '.join(unknown)}",
            f"It holds: {', '.join(held)}.",
        )
    return held


@dataclass(frozen=True, slots=True)
class _Staged:
    """Where unfinished files lie: the definition, and all that the VM uses; no disks where these are `on_devices`."""

    definition: Path
    used: Path
    on_devices: bool


def _defined(place: Workplace, files: Files) -> Files:
    if files.definition is None:
        raise IntegrityError(f"the disks are restored, but no VM could be defined: {files.no_definition}")
    return replace(files, vm=place.hypervisor.define(files.definition.read_bytes()))


def _require_free(paths: Sequence[Path]) -> None:
    taken = [path for path in paths if _is_there(path)]
    if taken:
        raise ConfigError(
            f"{', '.join(map(str, taken))}: exists already", "Nothing is overwritten: choose another --to or --name."
        )


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise from_os_error(error, f"the file {path.name} of a restore") from error
    return True


@contextmanager
def _staging(folder: Path, base: str) -> Iterator[Path]:
    """A hidden folder beside the final files, so that publishing them is a rename within one file system."""
    try:
        there = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f".{base}.{secrets.token_hex(4)}.part"
        staged.mkdir(mode=0o700)
    except OSError as error:
        raise from_os_error(error, f"the folder {folder}") from error
    try:
        yield staged
    finally:
        shutil.rmtree(staged)
        if not there:
            with suppress(OSError):  # not empty: the restore went well
                folder.rmdir()


def _publish(
    place: Workplace,
    made: core.Restored,
    names: Names,
    staged: _Staged,
    image: Image,
    *,
    no_ip: bool,
    no_nic: bool,
    redact: bool,
    whole: bool,
    define: Define | None,
) -> Files:
    """Make the definition, then give every file its final name, the definition last."""
    finished = [] if staged.on_devices else [(staged.used / disk.path.name, disk.path) for disk in made.disks]
    nvram = names.nvram if whole and "nvram" in made.files else None
    definition: Path | None = None
    nvram_format = "raw"
    why_not = ""
    left_out: tuple[str, ...] = ()
    effects: Mapping[Effect, tuple[str, ...]] = {}
    beside = {name: names.file(name) for name in BESIDE if whole and name in made.files}
    finished += [_write(staged.used, path, made.files[name]) for name, path in beside.items()]
    if whole:
        if "vm.xml" in made.files:
            disks = {disk.id: disk.path for disk in made.disks}
            made_definition, why_not = _definition(
                place,
                made.files["vm.xml"],
                name=names.base,
                disks=disks,
                nvram=nvram,
                no_ip=no_ip,
                no_nic=no_nic,
                redact=redact,
                keep_uuid=bool(define and define.keep_uuid),
                new_mac=bool(define and not define.keep_mac),
                boot={name: path for name, path in beside.items() if name in BOOT},
            )
        else:
            made_definition, why_not = None, "the backup holds none"
        if made_definition is not None:
            definition = names.definition
            left_out, effects = made_definition.left_out, made_definition.effects
            nvram_format = made_definition.nvram_format
            finished.append(_write(staged.definition, definition, made_definition.xml))
    if nvram:
        variables = made.files["nvram"]
        finished.insert(0, _write(staged.used, nvram, as_qcow2(variables) if nvram_format == "qcow2" else variables))
    core.publish(finished)
    return Files(
        name=names.base,
        image=image,
        number=made.increment.id,
        disks=made.disks,
        definition=definition,
        nvram=nvram,
        beside=beside,
        no_definition=why_not,
        left_out=left_out,
        left_out_effects=effects,
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
    redact: bool,
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
        redact=redact,
    )
    return made, ""


def _write(staged: Path, final: Path, data: bytes) -> tuple[Path, Path]:
    path = staged / final.name
    write_new(path, data, final)
    return path, final
