"""``vmkeep restore``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from click.core import ParameterSource

from backupcore.model import Image
from backupcore.restore import Form, Restored
from backupcore.typed import typed
from vmkeep import restore as work
from vmkeep import restore_elsewhere as elsewhere
from vmkeep.cli import output
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.documents import restores as documents
from vmkeep.cli.figures import size
from vmkeep.cli.opening import workplace
from vmkeep.cli.progress import shown
from vmkeep.cli.stdout import own
from vmkeep.workplace import Workplace

__all__ = ["restore"]

_BESIDE = {"nvram": "NVRAM", "tpm": "TPM state"}


@click.command(short_help="Restore a backup's disks and definition to new files.")
@click.argument("image", metavar="ID")
@click.option("--increment", type=click.IntRange(min=0), metavar="N", help="Which increment; the last by default.")
@click.option(
    "--disk", "disks", multiple=True, metavar="DISK", help="Only this disk, without a definition; repeatable."
)
@click.option("--to", "folder", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="The folder.")
@click.option("--pool", metavar="NAME", help="The disks become volumes of this storage pool; --to gets the definition.")
@click.option("--name", metavar="BASE", help="What the files' names, and the VM's, begin with.")
@click.option("--format", "form", type=click.Choice(["qcow2", "raw"]), default="qcow2", help="Of the disks; qcow2.")
@click.option("--verify-only", is_flag=True, help="Read and check all that a restore reads; write nothing.")
@click.option("--stdout", is_flag=True, help="Write one disk to the standard output.")
@click.option(
    "--device", type=click.Path(dir_okay=False, path_type=Path), help="Write one disk onto this block device, raw."
)
@click.option("--overwrite", is_flag=True, help="With --device: also if it is not empty.")
@click.option("--define", is_flag=True, help="Define the restored VM, with a new UUID and new MAC addresses.")
@click.option("--keep-uuid", is_flag=True, help="With --define: it gets the UUID that it had.")
@click.option("--keep-mac", is_flag=True, help="With --define: it gets the MAC addresses that it had.")
@click.option("--in-place", is_flag=True, help="Replace the disks of the VM itself, which must be powered off.")
@click.option("--drop-old", is_flag=True, help="With --in-place: remove the old disks afterwards.")
@click.option("--no-ip", is_flag=True, help="The definition gets no IP and no MAC addresses.")
@click.option("--no-nic", is_flag=True, help="The definition gets no network interfaces.")
@click.option("--redact", is_flag=True, help="The definition gets no title, description or strings of SMBIOS.")
@common
@click.pass_obj
def restore(
    asked: Asked,
    *,
    image: str,
    increment: int | None,
    disks: tuple[str, ...],
    folder: Path,
    name: str | None,
    no_ip: bool,
    no_nic: bool,
    pool: str | None,
    form: Form,
    verify_only: bool,
    stdout: bool,
    device: Path | None,
    overwrite: bool,
    define: bool,
    keep_uuid: bool,
    keep_mac: bool,
    in_place: bool,
    drop_old: bool,
    redact: bool,
) -> None:
    """Restore image ID (a number, a UUID, or a prefix of one) to new files. Nothing is ever overwritten.

    With --in-place the restored disks take the place of the VM's own, which are kept beside them.
    """
    _check_together(define=define, keep_uuid=keep_uuid, keep_mac=keep_mac, in_place=in_place, drop_old=drop_old)
    _check_one_way(verify_only=verify_only, stdout=stdout, device=device, overwrite=overwrite, asked=asked)
    place = workplace(asked)
    if verify_only or stdout or device:
        with shown(asked, f"image {image}") as progress:
            if device:
                made = elsewhere.onto(
                    place, image, device, number=increment, disks=disks, overwrite=overwrite, progress=progress
                )
            elif stdout:
                made = elsewhere.pour(
                    place, image, own().buffer, number=increment, disks=disks, form=form, progress=progress
                )
            else:
                made = elsewhere.check(place, image, number=increment, disks=disks, progress=progress)
        _tell(asked, place, *made, stdout=stdout, device=device)
        return
    if in_place:
        _in_place(asked, place, image, increment=increment, disks=disks, drop_old=drop_old)
        return
    with shown(asked, f"image {image}") as progress:
        files = work.restore(
            place,
            image,
            number=increment,
            disks=disks,
            folder=folder,
            name=name,
            no_ip=no_ip,
            no_nic=no_nic,
            redact=redact,
            form=form if _given("form") else None,
            pool=pool,
            define=work.Define(keep_uuid=keep_uuid, keep_mac=keep_mac) if define else None,
            progress=progress,
        )
    if asked.json:
        driver = place.config.datastores[files.image.datastore]["driver"]
        output.document(documents.restore(files, str(driver)))
    elif not asked.quiet:
        _show(files)
    if files.no_definition:
        output.remark(asked, f"no definition was made: {files.no_definition}")


def _given(option: str) -> bool:
    """Whether the user said it, and not just its default counts."""
    return click.get_current_context().get_parameter_source(option) is ParameterSource.COMMANDLINE


def _check_one_way(*, verify_only: bool, stdout: bool, device: Path | None, overwrite: bool, asked: Asked) -> None:
    ctx = click.get_current_context()
    files = [
        f"--{option}"
        for name, option in (
            ("folder", "to"),
            ("name", "name"),
            ("no_ip", "no-ip"),
            ("no_nic", "no-nic"),
            ("redact", "redact"),
            ("pool", "pool"),
            ("define", "define"),
            ("in_place", "in-place"),
        )
        if _given(name)
    ]
    ways = [way for way, given in (("--verify-only", verify_only), ("--stdout", stdout), ("--device", device)) if given]
    if len(ways) > 1 or (ways and files):
        raise click.UsageError(f"{', '.join([*ways, *files])} cannot go together", ctx)
    if ctx.params["in_place"] and _given("form"):
        raise click.UsageError("--format cannot go with --in-place: the disks stay what they are", ctx)
    if overwrite and not device:
        raise click.UsageError("--overwrite goes with --device", ctx)
    if device and _given("form") and ctx.params["form"] != "raw":
        raise click.UsageError("a block device gets the disk raw", ctx)
    if stdout and asked.json:
        raise click.UsageError("--stdout and --json cannot go together: there is one standard output", ctx)
    if stdout and own().isatty():
        raise click.UsageError("a disk is not written to a terminal: send it to a file or a pipe", ctx)


def _tell(asked: Asked, place: Workplace, image: Image, made: Restored, *, stdout: bool, device: Path | None) -> None:
    if stdout or (asked.quiet and not asked.json):
        return
    if asked.json:
        driver = place.config.datastores[image.datastore]["driver"]
        where = str(device) if device else None
        output.document(documents.elsewhere(image, made.increment.id, made.disks, str(driver), where))
        return
    for disk in made.disks:
        what = f"{device}  ({size(disk.virtual_size)} disk {disk.id})" if device else f"disk {disk.id} is well"
        output.line(what)
    if not device:
        output.line(f"increment {made.increment.id} of image {image.number} can be restored")


def _show(files: work.Files) -> None:
    for disk in files.disks:
        output.line(f"{disk.path}  ({size(disk.virtual_size)} disk {disk.id})")
    if files.nvram:
        output.line(f"{files.nvram}  (UEFI variables)")
    for name, path in files.beside.items():
        output.line(f"{path}  ({'TPM state' if name == 'tpm' else name})")
    if files.definition:
        output.line(f"{files.definition}  (definition)")
    for effect, paths in files.left_out_effects.items():
        if paths:
            output.line(f"left out of the definition ({effect}): {', '.join(paths)}")
    if files.vm:
        output.line(f"VM {files.vm.name} ({files.vm.uuid}) is defined; look it through: virsh dumpxml {files.vm.uuid}")
    elif files.definition:
        output.line(f"Look it through, then: {typed('virsh define', files.definition)}")
        if "tpm" in files.beside:
            output.line(
                "The VM will have a new, empty TPM. To give it this state, before its first start: install -D -m 600 "
                f"{shlex.quote(str(files.beside['tpm']))} /var/lib/libvirt/swtpm/"
                f"$({typed('virsh domuuid', files.name)})/tpm2/tpm2-00.permall"
            )


def _check_together(*, define: bool, keep_uuid: bool, keep_mac: bool, in_place: bool, drop_old: bool) -> None:
    ctx = click.get_current_context()
    if (keep_uuid or keep_mac) and not define:
        raise click.UsageError("--keep-uuid and --keep-mac go with --define", ctx)
    if drop_old and not in_place:
        raise click.UsageError("--drop-old goes with --in-place", ctx)
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("folder", "pool", "name", "no_ip", "no_nic", "redact", "define")
        if _given(name)
    ]
    if in_place and given:
        raise click.UsageError(f"{', '.join(given).replace('--folder', '--to')} cannot go with --in-place", ctx)
    if define and ctx.params["disks"]:
        raise click.UsageError("--define needs all disks: leave out --disk", ctx)


def _in_place(
    asked: Asked, place: Workplace, image: str, *, increment: int | None, disks: tuple[str, ...], drop_old: bool
) -> None:
    from vmkeep.in_place import restore_in_place  # noqa: PLC0415 - recovery and all, which no other restore needs

    with shown(asked, f"image {image}") as progress:
        done = restore_in_place(place, image, number=increment, disks=disks, drop_old=drop_old, progress=progress)
    if asked.json:
        driver = place.config.datastores[done.image.datastore]["driver"]
        output.document(documents.replaced(done, str(driver)))
        return
    if asked.quiet:
        return
    for disk in done.disks:
        output.line(
            f"{disk.path}  ({size(disk.virtual_size)} disk {disk.id} of VM {done.vm.name}, increment {done.number})"
        )
    if done.nvram:
        output.line(f"{done.nvram}  (UEFI variables)")
    if done.tpm:
        output.line(f"{done.tpm}  (TPM state)")
    for name, path in done.kept.items():
        output.line(f"the old {_BESIDE.get(name, 'disk')} is kept: {path}")
    output.line("The next backup of this VM is a full in a new image.")
    if done.kept:
        output.line(f"When all is well: {typed('rm', *done.kept.values())}")
