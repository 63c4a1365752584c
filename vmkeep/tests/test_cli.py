"""What every command has in common: exit codes, errors, JSON, help, start-up."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backupcore import errors
from vmkeep.cli import exits
from vmkeep.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]


def test_help_imports_nothing_heavy(installed):
    code = (
        "import sys\nfrom vmkeep.cli.main import run\n"
        "assert run(['--help']) == 0\n"
        "heavy = {'msgspec', 'sqlite3', 'rich', 'pluggy', 'blake3', 'libvirt', 'tomllib', 'logging'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": installed}, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_a_group_without_a_command_shows_its_help(site):
    told = site.run("image")
    assert told.code == exits.USAGE
    assert "\n  list     List the images.\n" in told.err


def test_the_help_lines_are_those_of_the_commands():
    for where, line in COMMANDS.values():
        module, _, attribute = where.partition(":")
        assert getattr(importlib.import_module(module), attribute).short_help == line


def test_every_error_has_its_exit_code():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.BackupError)]
    assert {kind.__name__: exits.code(kind("x")) for kind in kinds} == {
        "AccessDenied": 7,
        "BackupError": 1,
        "Busy": 10,
        "Cancelled": 130,
        "ConfigError": 2,
        "ContractViolation": 1,
        "HypervisorError": 11,
        "IncrementImpossible": 9,
        "IntegrityError": 8,
        "Locked": 7,
        "NotFound": 4,
        "SourceNotFound": 4,
        "TargetFull": 6,
        "TargetUnavailable": 5,
        "UnsupportedOperation": 9,
    }


def test_what_is_printed_is_one_line_without_control_characters():
    assert exits.one_line("web\x1b[31m\nGrün\x00\u202e") == "web?[31m Grün??"


@pytest.mark.parametrize(
    "arguments", [["bakup", "x"], ["backup"], ["backup", "x", "--what"], ["restore", "1", "--increment", "x"]]
)
def test_usage_errors_are_a_line_and_a_hint(site, arguments):
    told = site.run(*arguments)
    assert told.code == 2
    first, hint = told.err.splitlines()
    assert first.startswith("vmkeep: ")
    assert hint.startswith("  See: vmkeep")
    told = site.run(*arguments, "--json")
    assert told.error["class"] == "UsageError"
    assert told.out == ""


def test_an_unexpected_error_is_a_line_and_with_v_a_traceback(site):
    site.guests.write_bytes(b"no pickle")
    told = site.run("vm", "list")
    assert told.code == 1
    assert told.err.startswith("vmkeep: unexpected UnpicklingError: ")
    assert "Traceback" not in told.err
    assert "Traceback" in site.run("-v", "vm", "list").err


def test_the_common_options_stand_before_or_after_the_command(site):
    assert json.loads(site.run("--json", "vm", "list").out) == json.loads(site.run("vm", "list", "--json").out)
    told = site.run("-q", "backup", "web1")
    assert (told.code, told.out, told.err) == (0, "", "")


def test_off_a_terminal_there_is_a_line_per_phase_and_none_with_json(site):
    told = site.run("backup", "web1")
    assert [line.split(" (")[0] for line in told.err.splitlines()] == [
        f"vmkeep: web1: {phase}" for phase in ("prepare", "backup", "record", "release")
    ]
    assert site.run("backup", "web1", "--json").err == ""


def test_the_program_prints_its_version_and_ends_quietly_when_nobody_reads(site):
    assert site.process("--version").out.startswith("vmkeep ")
    site.run("backup", "web1")
    shell = f"{sys.executable} -m vmkeep image list --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", shell],
        env={"PYTHONPATH": site.paths, "VMKEEP_CONFIG": str(site.config), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_completion_of_commands(installed):
    done = subprocess.run(
        [sys.executable, "-m", "vmkeep"],
        env={
            "PYTHONPATH": installed,
            "_VMKEEP_COMPLETE": "bash_complete",
            "COMP_WORDS": "vmkeep ba",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "plain,backup"


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ("click:<module>", 130),
        ("vmkeep.cli.main:<module>", 130),
        ("vmkeep.vms:<module>", 130),
        ("threading:_shutdown", 0),
    ],
    ids=["while click is imported", "while our own is imported", "while a command is imported", "at the very end"],
)
def test_an_interrupt_shows_no_traceback(site, step, code):
    """Whether it comes before anything is done, or when all is done and told."""
    done = subprocess.run(
        [sys.executable, "-m", "lab.kill_at", f"{step} call", "vmkeep", "vm", "list"],
        env={
            **os.environ,
            "PYTHONPATH": f"{site.paths}:{ROOT}",
            "VMKEEP_CONFIG": str(site.config),
            "LAB_AT": "interrupt",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr, "web1" in done.stdout) == (code, "", code == 0)
