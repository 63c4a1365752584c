"""``vmkeep restore``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from vmkeep import restore as work
from vmkeep.cli import documents, output
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.figures import size
from vmkeep.cli.opening import workplace
from vmkeep.cli.progress import shown

__all__ = ["restore"]


@click.command(short_help="Restore a backup's disks and definition to new files.")
@click.argument("image", metavar="ID")
@click.option("--increment", type=click.IntRange(min=0), metavar="N", help="Which increment; the last by default.")
@click.option(
    "--disk", "disks", multiple=True, metavar="DISK", help="Only this disk, without a definition; repeatable."
)
@click.option("--to", "folder", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="The folder.")
@click.option("--name", metavar="BASE", help="What the files' names, and the VM's, begin with.")
@click.option("--no-ip", is_flag=True, help="The definition gets no IP and no MAC addresses.")
@click.option("--no-nic", is_flag=True, help="The definition gets no network interfaces.")
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
) -> None:
    """Restore image ID (a number, a UUID, or a prefix of one) to new files. Nothing is ever overwritten."""
    place = workplace(asked)
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
            progress=progress,
        )
    if asked.json:
        driver = place.config.datastores[files.image.datastore]["driver"]
        output.document(documents.restore(files, str(driver)))
    elif not asked.quiet:
        _show(files)
    if files.no_definition:
        output.remark(asked, f"no definition was made: {files.no_definition}")


def _show(files: work.Files) -> None:
    for disk in files.disks:
        output.line(f"{disk.path}  ({size(disk.virtual_size)} disk {disk.id})")
    if files.nvram:
        output.line(f"{files.nvram}  (UEFI variables)")
    for name, path in files.beside.items():
        output.line(f"{path}  ({'TPM state' if name == 'tpm' else name})")
    if files.definition:
        output.line(f"{files.definition}  (definition)")
        output.line(f"Look it through, then: virsh define {shlex.quote(str(files.definition))}")
        if "tpm" in files.beside:
            output.line(
                "The VM will have a new, empty TPM. To give it this state, before its first start: install -D -m 600 "
                f"{shlex.quote(str(files.beside['tpm']))} /var/lib/libvirt/swtpm/"
                f"$(virsh domuuid {shlex.quote(files.name)})/tpm2/tpm2-00.permall"
            )
