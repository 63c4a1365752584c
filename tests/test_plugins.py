"""Finding plugins by their entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backupcore import plugins
from backupcore.errors import ConfigError, ContractViolation
from backupcore.options import build, driver, option

if TYPE_CHECKING:
    from pathlib import Path as Elsewhere

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """An installed distribution `newer` whose driver `newer` cannot be imported, with these requirements."""

    def make(*needs: str) -> None:
        info = tmp_path / "newer-3.0.dist-info"
        info.mkdir()
        requires = "".join(f"Requires-Dist: {need}\n" for need in needs)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: newer\nVersion: 3.0\n{requires}")
        (info / "entry_points.txt").write_text("[backupcore.drivers]\nnewer = no_such_module:Driver\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return make


def test_a_driver_that_needs_a_newer_core_says_so_in_one_line(install: Install):
    install("backupcore[fileview]>=99.1", "click")
    with pytest.raises(ConfigError) as caught:
        plugins.load(plugins.DRIVERS, "newer")
    assert caught.value.message == f"newer 3.0 needs backupcore>=99.1, and {version('backupcore')} is installed"
    assert "pip install --upgrade" in caught.value.hint


@pytest.mark.parametrize(
    "needs",
    [(), ("backupcore",), ("backupcore>=0.1",), ("backupcore-restic>=99",), ('backupcore>=99 ; extra == "test"',)],
)
def test_what_is_satisfied_or_meant_for_others_does_not_matter(install: Install, needs: tuple[str, ...]):
    install(*needs)
    with pytest.raises(ConfigError, match="cannot be loaded: No module named 'no_such_module'"):
        plugins.load(plugins.DRIVERS, "newer")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
        ("def (", "SyntaxError"),
        ("raise ValueError('no')", "ValueError: no"),
    ],
)
def test_a_driver_that_ends_the_program_as_it_is_imported_is_named(install: Install, tmp_path, code: str, told: str):
    """A backup would end with exit code 0, and nothing would be stored."""
    install()
    (tmp_path / "no_such_module.py").write_text(code)
    with pytest.raises(ContractViolation, match=f"plugin 'newer' cannot be loaded: it failed with {told}"):
        plugins.load(plugins.DRIVERS, "newer")


def test_a_driver_that_ends_the_program_as_it_is_built_is_named():
    @driver
    class Leaving:
        def __post_init__(self) -> None:
            sys.exit(0)

    with pytest.raises(ContractViolation, match=r"driver Leaving of datastores.nas cannot be loaded: .*SystemExit"):
        build(Leaving, {}, where="datastores.nas")


def test_of_two_drivers_of_one_name_none_is_taken(install: Install, tmp_path: Path):
    install()
    other = tmp_path / "older-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: older\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[backupcore.drivers]\nnewer = another_module:Driver\n")
    with pytest.raises(ConfigError, match="several plugins named 'newer' are installed .*: newer 3.0, older 1.0"):
        plugins.load(plugins.DRIVERS, "newer")
    assert plugins.names(plugins.DRIVERS)["newer"] == "newer 3.0, older 1.0"
    (other / "entry_points.txt").write_text("[backupcore.drivers]\nnewer = no_such_module:Driver\n")
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):  # renamed, and the same all the same
        plugins.load(plugins.DRIVERS, "newer")


def test_an_option_whose_type_is_imported_for_the_type_checker_alone_is_named():
    @driver
    class Checked:
        path: Elsewhere = option("where the backups lie")

    with pytest.raises(
        ContractViolation, match="driver Checked: the types .* cannot be looked up: .*'Elsewhere'"
    ) as caught:
        build(Checked, {"path": "/srv"})
    assert "when the program runs" in caught.value.hint


def test_a_driver_that_is_not_installed_is_named_with_those_that_are():
    assert "restic" in plugins.names(plugins.DRIVERS)
    with pytest.raises(ConfigError, match="no plugin 'nonsense'") as caught:
        plugins.load(plugins.DRIVERS, "nonsense")
    assert "restic" in caught.value.hint
    assert "backupcore-nonsense" not in caught.value.hint, "whoever has published that would be believed"
    assert sys.modules.get("backupcore_nonsense") is None


def test_nobody_is_told_to_install_a_package_that_nobody_knows():
    with pytest.raises(ConfigError) as caught:
        plugins.load(plugins.DRIVERS, "restik")
    assert "Did you mean restic" in caught.value.hint
    assert "backupcore-restik" not in caught.value.hint
