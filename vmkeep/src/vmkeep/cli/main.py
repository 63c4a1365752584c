"""The `vmkeep` program. Only what ``--help`` needs is imported here."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import click

from backupcore.errors import BackupError, text_of
from backupcore.thread import aside
from vmkeep import ctrl_c
from vmkeep.cli import exits, stdout, streams
from vmkeep.cli.asked import Asked, common
from vmkeep.cli.ended import ended_by_others, ends_with
from vmkeep.cli.lazy import LazyGroup

_PATIENCE = 5.0
"""Seconds that threads of plugins have to end once the command has come to its end."""

__all__ = ["COMMANDS", "main", "run", "vmkeep"]

COMMANDS = {
    "backup": ("vmkeep.cli.backup:backup", "Back up a VM."),
    "restore": ("vmkeep.cli.restore:restore", "Restore a backup's disks and definition to new files."),
    "cancel": ("vmkeep.cli.cancel:cancel", "Stop the running backup of a VM."),
    "recover": ("vmkeep.cli.recover:recover", "Put right what killed backups left behind."),
    "image": ("vmkeep.cli.image:image", "List, show, flatten, pin and delete images (chains of backups)."),
    "vm": ("vmkeep.cli.vm:vm", "List and show VMs; change their backup settings."),
    "datastore": ("vmkeep.cli.datastore:datastore", "List, show, check and maintain datastores."),
    "catalog": ("vmkeep.cli.catalog:catalog", "Hold the catalog against the datastores; make it anew from them."),
    "driver": ("vmkeep.cli.driver:driver", "List, test and begin drivers."),
    "check": ("vmkeep.cli.check:check", "Is everything here that backups need?"),
    "init": ("vmkeep.cli.init:init", "Write a commented configuration."),
}

_EPILOG = """\b
Configuration: --config, else $VMKEEP_CONFIG, else /etc/vmkeep/config.toml
(root) or ~/.config/vmkeep/config.toml.
\b
Shell completion: eval "$(_VMKEEP_COMPLETE=bash_source vmkeep)" in ~/.bashrc;
zsh_source and fish_source for the others.
"""


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - 30 ms, for --version only

        try:
            click.echo(f"vmkeep {version('vmkeep')}")
        except PackageNotFoundError:
            click.echo("vmkeep (not installed)")
        ctx.exit()


@click.group(cls=LazyGroup, lazy=COMMANDS, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
@common
def vmkeep() -> None:
    """Back up and restore libvirt/KVM virtual machines."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. Whatever goes wrong is told on stderr."""
    asked = Asked(json="--json" in arguments)  # known also where the command line cannot be parsed
    before = sys.stdout, sys.stderr
    try:
        with ended_by_others(partial(_ended, asked)):
            answer = vmkeep.main(list(arguments), prog_name="vmkeep", standalone_mode=False, obj=asked)
    except KeyboardInterrupt:  # not in click's hands, or the second in them
        return _told(click.Abort(), asked)
    except SystemExit as error:
        # click ends so after a shell's completion, and at any broken pipe: of a command's own streams, which are no
        # text, or of a plugin. Whoever else says that all went well is a plugin: the command did not come to its end.
        if isinstance(error.__context__, BrokenPipeError):
            sys.stdout, sys.stderr = before
            return _told(error.__context__, asked)
        if error.code or "_VMKEEP_COMPLETE" in os.environ:
            raise
        return _told(error, asked)
    except BaseException as error:  # noqa: BLE001 - the last resort: whatever it is, a line instead of a traceback
        return _told(error, asked)
    answer = answer if isinstance(answer, int) else 0
    return _arrived(answer, asked, quiet=not _ONLY_TELL.isdisjoint(arguments))


_ONLY_TELL = frozenset({"list", "show", "check", "--help", "-h", "--version"})
"""What only tells something: who reads no further (``| head``) has enough, and nothing is in doubt."""


def _arrived(answer: int, asked: Asked, *, quiet: bool) -> int:
    """The exit code of a command that came to its end, where what it has printed may not have arrived."""
    lost = streams.lost()
    if lost is None:
        return answer
    code = answer if answer not in (0, exits.WARNING) else exits.UNEXPECTED
    if quiet and isinstance(lost, BrokenPipeError):
        return code
    message = f"the command has come to its end, but its output could not be written: {lost.strerror or text_of(lost)}"
    return exits.tell("OutputLost", message, "", code, as_json=asked.json)


def _ended(asked: Asked, message: str, hint: str) -> int:
    return exits.tell("ContractViolation", message, hint, exits.UNEXPECTED, as_json=asked.json)


def _told(error: BaseException, asked: Asked) -> int:
    kind, hint, code = type(error).__name__, "", exits.code(error)
    if kind == "NoArgsIsHelpError" and not asked.json:  # by its name: click before 8.2 has none
        click.echo(error, err=True)
        return exits.USAGE
    match error:
        case BackupError():
            message, hint = error.message, error.hint
        case click.UsageError():
            kind, message, code = "UsageError", error.format_message(), exits.USAGE
            hint = f"See: {error.ctx.command_path if error.ctx else 'vmkeep'} --help"
        case click.ClickException():
            message, code = error.format_message(), exits.USAGE
        case click.Abort():
            kind, message, code = "Cancelled", "cancelled", exits.CANCELLED
        case _:
            message = f"unexpected {kind}: {text_of(error)}"
            hint = "" if asked.verbose else "This is a bug. -v shows where it happened."
    if asked.verbose and not isinstance(error, click.ClickException | click.Abort):
        import traceback  # noqa: PLC0415 - for -v only

        click.echo(exits.each_line("".join(traceback.format_exception(error))), err=True)
    return exits.tell(kind, message, hint, code, as_json=asked.json)


def _with_standard_streams() -> None:
    """Open those of the three that the caller has closed (``>&-``), to nothing.

    Else the first files that are opened would get their numbers, and what any library prints would go into the catalog.
    """
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - for good


def main() -> None:
    """Run the command of this process's own arguments, and end the process."""
    _with_standard_streams()
    stdout.take()
    streams.put_in_place()
    code = exits.CANCELLED
    try:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run(sys.argv[1:])
        streams.lost()  # of a command that has failed, where it was not asked for
    except KeyboardInterrupt:  # while the first was being told
        pass
    finally:
        ctrl_c.ends_at_once(code)  # what was done stays done, and was told
    attended = sys.modules.get("vmkeep.attended")  # loaded by those commands alone that have such a run
    if attended is not None and attended.left_behind():
        # A run that hangs was left behind, and Python would wait for the threads that it has begun.
        stdout.flush()
        ctrl_c.end(code)
    aside(lambda: _end(code), "vmkeep-end")
    ends_with(code)
    raise SystemExit(code)  # not sys.exit: a plugin may have put something else there


def _end(code: int) -> None:
    """End the process though threads go on: Python would wait for a plugin's that never ends, too."""
    time.sleep(_PATIENCE)
    stdout.flush()
    ours = (threading.main_thread(), threading.current_thread())
    names = [thread.name for thread in threading.enumerate() if thread not in ours and not thread.daemon]
    what = f"threads go on ({', '.join(names)})" if names else "something that is done at the end goes on"
    with suppress(OSError, ValueError):
        click.echo(exits.one_line(f"vmkeep: {what}, a plugin's: it is not waited for any longer"), err=True)
    ctrl_c.end(code)
