"""``vmkeep driver``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from backupcore import plugins
from backupcore.typed import typed
from vmkeep.cli import exits, log, output
from vmkeep.cli.asked import Asked, common

if TYPE_CHECKING:
    from backupcore.testing import Result, Target

__all__ = ["driver"]


@click.group(short_help="List, test and begin drivers.")
def driver() -> None:
    """List, test and begin drivers."""


@driver.command(name="list", short_help="List the installed drivers.")
@common
@click.pass_obj
def list_(asked: Asked) -> None:
    """List the installed drivers, and the packages that they come from. None is loaded."""
    log.start(asked.verbose)
    found = plugins.names(plugins.DRIVERS)
    if asked.json:
        output.document([{"name": name, "package": package} for name, package in found.items()])
        return
    output.table(("DRIVER", "PACKAGE"), list(found.items()))


@driver.command(short_help="Does a driver keep its contract?")
@click.argument("name")
@click.option("-o", "options", multiple=True, metavar="KEY=VALUE", help="An option of the datastore; repeatable.")
@click.option("--check", "checks", multiple=True, metavar="CHECK", help="Only this check; repeatable.")
@common
@click.pass_obj
def test(asked: Asked, name: str, options: tuple[str, ...], checks: tuple[str, ...]) -> int:
    """Make every check of the contract with the driver NAME, on a datastore with these options.

    What the checks store there they delete again; other backups in it are left alone. No configuration is read. Give
    it a place of its own all the same: some checks kill a backup on the way. The exit code is 1 if a check fails.
    """
    from backupcore.testing import Target, Verdict, chosen, examine  # noqa: PLC0415 - the whole data plane
    from vmkeep import driver_options  # noqa: PLC0415 - as above

    log.start(asked.verbose)
    target = Target(driver=name, options=driver_options.parse(plugins.load(plugins.DRIVERS, name), options))
    wanted = chosen(checks)
    _answers(target)
    results = examine(target, checks=wanted, heard=lambda result: _tell(asked, result))
    count = {verdict: sum(result.verdict is verdict for result in results) for verdict in Verdict}
    if asked.json:
        made = [
            {
                "check": result.check,
                "title": result.title,
                "verdict": result.verdict.value,
                "why": result.why,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ]
        document = {"driver": name, "package": plugins.names(plugins.DRIVERS)[name]}
        output.document({**document, "ok": not count[Verdict.FAILED], "checks": made})
    elif not asked.quiet or count[Verdict.FAILED]:
        output.line(", ".join(f"{number} {verdict.value}" for verdict, number in count.items() if number))
    return exits.UNEXPECTED if count[Verdict.FAILED] else 0


def _answers(target: Target) -> None:
    """What is wrong with the options, or with the place, is told as such, and not as thirty checks that fail."""
    import tempfile  # noqa: PLC0415 - needed here only

    from backupcore import errors  # noqa: PLC0415 - as above
    from backupcore.context import Context  # noqa: PLC0415 - as above

    try:
        with tempfile.TemporaryDirectory(prefix="vmkeep-") as folder, Context(Path(folder)) as ctx:
            target.open().check(ctx)
    except errors.ContractViolation:
        return  # the checks say more


def _tell(asked: Asked, result: Result) -> None:
    from backupcore.testing import Verdict  # noqa: PLC0415 - see above

    if asked.json or (asked.quiet and result.verdict is not Verdict.FAILED):
        return
    output.line(f"{result.verdict.value:<14}  {result.check:<17}  {result.title}")
    if result.why:
        output.line(f"{'':<14}  {'':<17}    {result.why}")


@driver.command(short_help="Begin a driver of your own.")
@click.argument("name")
@click.option(
    "--to", "folder", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="The folder to write to."
)
@common
@click.pass_obj
def new(asked: Asked, name: str, folder: Path) -> None:
    """Write the package of a driver NAME to ./backupcore-NAME: code that works, its tests, a README.

    It keeps backups in a folder; docs/writing-a-driver.md explains it line by line. Nothing is overwritten.
    """
    from vmkeep import new_driver  # noqa: PLC0415 - needed here only

    log.start(asked.verbose)
    made = new_driver.write(name, folder)
    if asked.json:
        output.document({"name": name, "files": [str(folder / path) for path in made]})
    elif not asked.quiet:
        for path in made:
            output.line(f"{folder / path}")
        then = [typed("cd", folder / f"backupcore-{name}"), *new_driver.commands()]
        output.line(f"Then: {' && '.join(then)}")
