"""``vmkeep vm``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import click

from backupcore.errors import ConfigError
from backupcore.hypervisor import Checkpoint, VMState
from backupcore.typed import typed
from vmkeep import vms
from vmkeep.cli import exits, output
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.documents import vms as documents
from vmkeep.cli.exits import one_line
from vmkeep.cli.figures import age, date, size
from vmkeep.cli.opening import workplace
from vmkeep.cli.progress import shown
from vmkeep.settings import LEGAL, NUMBERS

__all__ = ["vm"]

_RUNS_SHOWN = 5


@click.group(short_help="List and show VMs; change their backup settings.")
def vm() -> None:
    """List and show VMs; change their backup settings."""


@vm.command(name="list", short_help="List the VMs with the age of their last backup.")
@common
@click.pass_obj
def list_(asked: Asked) -> None:
    """List the VMs with the age of their last backup."""
    found = vms.listing(workplace(asked))
    if asked.json:
        output.document(documents.vms(found))
        return
    now = datetime.now(UTC)
    rows = [
        (
            one.found.vm.name,
            f"{one.found.state_in_full}, being read" if one.found.being_read else one.found.state_in_full,
            date(one.last_backup) if one.last_backup else "never",
            age(max(0, int((now - one.last_backup).total_seconds()))) if one.last_backup else "-",
            one.found.vm.uuid,
        )
        for one in found
    ]
    output.table(("VM", "STATE", "LAST BACKUP", "AGE", "UUID"), rows, right=("AGE",))
    for one in found:
        for remark in one.found.remarks:
            output.line(f"VM {one.found.vm.name}: {remark}")


@vm.command(short_help="Show a VM: disks, settings, images, last runs.")
@click.argument("name", metavar="VM")
@common
@click.pass_obj
def show(asked: Asked, name: str) -> None:
    """Show VM (a name or a UUID): disks, settings, images, last runs."""
    found = vms.detail(workplace(asked), name)
    if asked.json:
        output.document(documents.vm(found))
        return
    output.line(f"VM {found.found.vm.name} ({found.found.vm.uuid}), {_state(found.found)}")
    for remark in found.found.remarks:
        output.line(remark)
    output.line("")
    output.table(
        ("DISK", "SIZE", "FORMAT", "PATH", "LEFT OUT"),
        [(disk.id, size(disk.virtual_size), disk.format, disk.path, disk.left_out) for disk in found.found.disks],
        right=("SIZE",),
    )
    output.line("")
    _show_settings(found)
    output.line("")
    output.table(
        ("IMAGE", "DATASTORE", "STATE", "INCREMENTS", "LAST"),
        [
            (
                str(one.number),
                one.datastore,
                one.state,
                str(len(one.increments)),
                date(one.increments[-1].date if one.increments else None),
            )
            for one in found.images
        ],
        right=("IMAGE", "INCREMENTS"),
    )
    output.line("")
    output.table(
        ("RUN", "DATASTORE", "TYPE", "STATE", "IMAGE", "ERROR"),
        [
            (
                date(run.started),
                run.datastore,
                run.type or run.kind,
                run.state,
                f"{run.image}/{run.increment}" if run.image else "-",
                run.error or "",
            )
            for run in found.last_runs[:_RUNS_SHOWN]
        ],
    )


def _show_settings(found: vms.Detail) -> None:
    rows = [(key, value, "VM" if key in found.own else "default") for key, value in found.settings.items()]
    output.table(("SETTING", "VALUE", "FROM"), rows)


def _state(found: VMState) -> str:
    if not found.being_read:
        return found.state_in_full
    # QEMU's lock on the disks refuses the start, and libvirt's message does not say whose lock it is.
    stopped = "; it can start once that has ended" if found.state in ("off", "saved") else ""
    return f"{found.state_in_full}, being read by a backup{stopped}"


@vm.command(short_help="Compare a VM's disks with its last backup, to find changes that nothing tracked.")
@click.argument("name", metavar="VM")
@click.option("-d", "--datastore", metavar="DATASTORE", help="Whose backups; needed if several are configured.")
@click.option("--disk", "disks", multiple=True, metavar="DISK", help="Only this disk; repeatable.")
@click.option(
    "--sample",
    type=click.FloatRange(0, 100, min_open=True),
    default=1,
    metavar="PERCENT",
    help="How much of what has not changed to compare, chosen at random (at least 16 MiB of each disk); 1.",
)
@common
@click.pass_obj
def compare(asked: Asked, name: str, datastore: str | None, disks: tuple[str, ...], sample: float) -> int:
    """Compare disks of VM, running or not, with what its last backup would restore.

    Increments hold what QEMU's bitmaps call changed. Here a sample of what they call unchanged is read and compared:
    where it differs (exit code 8), something was written that no backup holds. Nothing is recorded.
    """
    from vmkeep import compare as work  # noqa: PLC0415 - the data plane, which most commands here do not need

    place = workplace(asked)
    with shown(asked, name) as progress:
        done = work.compare(place, name, datastore=datastore, disks=disks, sample=sample / 100, progress=progress)
    if asked.json:
        output.document(documents.compare(done))
    elif not asked.quiet:
        output.line(f"VM {done.image.vm.name}, increment {done.increment} of image {done.image.number}")
        rows = [
            (
                disk.id,
                size(disk.virtual_size) if disk.virtual_size else "",
                size(disk.unchanged),
                size(disk.compared),
                disk.why_not or (f"{len(disk.differing)} ranges differ" if disk.differing else "equal"),
            )
            for disk in done.disks
        ]
        columns = ("DISK", "SIZE", "UNCHANGED", "COMPARED", "FOUND")
        output.table(columns, rows, right=("SIZE", "UNCHANGED", "COMPARED"))
    if done.error is not None:
        return exits.tell(
            type(done.error).__name__, done.error.message, done.error.hint, exits.code(done.error), as_json=asked.json
        )
    return 0


@vm.command(short_help="Remove the checkpoints, bitmaps and overlays of a VM's backups.")
@click.argument("name", metavar="VM")
@click.option("--foreign", is_flag=True, help="Those of other installations instead, which are gone for good.")
@click.option("--yes", is_flag=True, help="Do not ask (with --foreign).")
@common
@click.pass_obj
def forget(asked: Asked, name: str, foreign: bool, yes: bool) -> None:
    """Remove what backups made on VM to tell changes: checkpoints, bitmaps, overlays.

    QEMU reverts no disk to a snapshot that has bitmaps; overlays are merged into the VM's own disk files. No backup is
    lost. The next one of each chain is a full in a new image. What other installations have made stays, unless
    --foreign is said: then theirs goes, and this one's stays.
    """
    place = workplace(asked)
    if foreign and not yes:
        state, there = vms.foreign(place, name)
        _ask(state, there)
    found, gone = vms.forget(place, name, foreign=foreign)
    if asked.json:
        output.document({"name": found.vm.name, "uuid": found.vm.uuid, "removed": list(gone)})
    elif not asked.quiet:
        output.line(f"VM {found.vm.name}: checkpoints and overlays removed: {len(gone)}")
        for name_or_file in gone:
            output.line(f"  {name_or_file}")
        if not foreign and (there := vms.foreign(place, found.vm.uuid)[1]):
            command = typed("vmkeep vm forget", found.vm.name, "--foreign")
            output.line(f"{len(there)} of other installations stay; if those are gone: {command}")


def _ask(found: VMState, there: Sequence[Checkpoint]) -> None:
    if not there:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nothing was removed: there is no terminal to ask on", "Say --yes.")
    for one in there:
        click.echo(f"  {one.name}", err=True)
    owners = ", ".join(sorted({one.installation for one in there}))
    click.confirm(
        f"Remove these from VM {one_line(found.vm.name)}? If installation {owners} still works, its next backup is a "
        "full",
        abort=True,
        err=True,
    )


def _choice(key: str) -> click.Choice[str]:
    return click.Choice(LEGAL[key], case_sensitive=False)


def _number(key: str) -> click.IntRange:
    return click.IntRange(*NUMBERS[key])


@vm.command(short_help="Change a VM's backup settings.")
@click.argument("name", metavar="VM")
@click.option("--mode", type=_choice("MODE"), help="Every backup a full, or increments.")
@click.option("--increment-mode", type=_choice("INCREMENT_MODE"), help="How changes are found.")
@click.option("--fs-freeze", type=_choice("FS_FREEZE"), help="How the guest is brought to rest.")
@click.option(
    "--fs-freeze-fallback", type=_choice("FS_FREEZE_FALLBACK"), help="Back up all the same where the freeze fails."
)
@click.option(
    "--freeze-timeout", type=_number("FREEZE_TIMEOUT"), metavar="S", help="How long the guest may stand still."
)
@click.option("--keep-last", type=click.IntRange(0, 999_999), metavar="N", help="How many backups to keep; 0: all.")
@click.option("--backup-volatile", type=_choice("BACKUP_VOLATILE"), help="Also disks whose contents need not last.")
@click.option("--volatile-disks", metavar="DISKS", help="Disks whose contents need not last: vdb,vdc; '' for none.")
@click.option("--exclude-disks", metavar="DISKS", help="Disks that no backup holds: vdb,vdc; '' for none.")
@click.option(
    "--encrypted-disks", type=_choice("ENCRYPTED_DISKS"), help="PLAIN: backups hold what the guest sees, unencrypted."
)
@click.option(
    "--redact",
    type=_choice("REDACT"),
    help="YES: the stored definition lacks what may be secret: QEMU's arguments, texts.",
)
@click.option("--keep-chains", metavar="N", help='How many closed images; 0: all, "": as --keep-last.')
@click.option("--full-every", metavar="N|Nd", help="A new image every N increments or days; 0: never.")
@click.option("--verify-flatten", type=_choice("VERIFY_FLATTEN"), help="Read a sample or all of it back.")
@common
@click.pass_obj
def updateconf(
    asked: Asked,
    *,
    name: str,
    mode: str | None,
    increment_mode: str | None,
    fs_freeze: str | None,
    fs_freeze_fallback: str | None,
    freeze_timeout: int | None,
    keep_last: int | None,
    keep_chains: str | None,
    full_every: str | None,
    verify_flatten: str | None,
    backup_volatile: str | None,
    volatile_disks: str | None,
    exclude_disks: str | None,
    encrypted_disks: str | None,
    redact: str | None,
) -> None:
    """Change the backup settings of VM; without options, show them. They are kept in the VM's own definition."""
    given = {
        "MODE": mode,
        "INCREMENT_MODE": increment_mode,
        "FS_FREEZE": fs_freeze,
        "FS_FREEZE_FALLBACK": fs_freeze_fallback,
        "FREEZE_TIMEOUT": None if freeze_timeout is None else str(freeze_timeout),
        "KEEP_LAST": None if keep_last is None else str(keep_last),
        "KEEP_CHAINS": keep_chains,
        "FULL_EVERY": full_every,
        "VERIFY_FLATTEN": verify_flatten,
        "BACKUP_VOLATILE": backup_volatile,
        "VOLATILE_DISKS": volatile_disks,
        "EXCLUDE_DISKS": exclude_disks,
        "ENCRYPTED_DISKS": encrypted_disks,
        "REDACT": redact,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    found = vms.configure(workplace(asked), name, changes)
    if asked.json:
        output.document({"name": found.found.vm.name, "uuid": found.found.vm.uuid, "config": documents.config(found)})
    elif not asked.quiet:
        _show_settings(found)
