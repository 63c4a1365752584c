"""A pytest plugin for the hosts: what runs there, counts per file, and the host's own logs beside each failure."""

from __future__ import annotations

import collections
import platform
import re
import subprocess
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from lab.patience import patient

_LIBVIRTD = Path("/var/log/libvirt/libvirtd.log")
_QEMU = Path("/var/log/libvirt/qemu")
_LINES = 40
_started = pytest.StashKey[float]()


# At each start of a VM on a block device virt-aa-helper tries to read that, to see what lies below a qcow2 image on it,
# and its own profile forbids it for loop devices. The VM's profile gets the device all the same.
_PROBED = re.compile(r'profile="virt-aa-helper" name="/dev/loop\d+" .*requested_mask="r"')


def denials() -> list[str]:
    """The lines of the kernel's log that tell what AppArmor has refused, but for what libvirt itself does in vain."""
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    return [line for line in log.splitlines() if 'apparmor="DENIED"' in line and not _PROBED.search(line)]


def pytest_report_header() -> list[str]:
    """The versions that everything here depends on, by their own words."""
    asked = (
        ["libvirtd", "--version"],
        ["qemu-system-x86_64", "--version"],
        ["restic", "version"],
        ["cat", "/sys/kernel/security/lsm"],
        ["cat", "/proc/1/comm"],
    )
    said = [subprocess.run(command, capture_output=True, text=True, check=False).stdout for command in asked]
    words = [line.splitlines()[0] if line else "?" for line in said]
    return [
        f"{platform.node()}: Linux {platform.release()}, {', '.join(words[:3])}; LSM {words[3]}; process 1: {words[4]}"
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A test's own limit is that of a machine.
    for item in items:
        limit = item.get_closest_marker("timeout")
        if limit is not None:
            item.add_marker(pytest.mark.timeout(patient(limit.args[0])), append=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_started] = time.time()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        since = item.stash.get(_started, time.time())
        report.sections.append(("libvirtd", _libvirtd(since)))
        report.sections += [(f"QEMU of {log.stem}", _end(log)) for log in _changed(since)]
        report.sections.append(("denied by AppArmor, since the start of the host", "\n".join(denials()[-_LINES:])))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # At once, and not at the end (--tb=no): a host that hangs afterwards does not come to its end.
    if report.failed:
        parts = [("FAILED", report.nodeid), (report.when, report.longreprtext), *report.sections]
        print("\n" + "\n".join(f"--- {title} ---\n{text}" for title, text in parts), flush=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    seconds: collections.Counter[str] = collections.Counter()
    measured: list[str] = []
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if not isinstance(report, pytest.TestReport):
                continue
            file = report.nodeid.partition("::")[0]
            seconds[file] += report.duration  # type: ignore[assignment]  # a float; Counter's type says int
            if report.when == "teardown":  # once of each test
                measured += [f"{report.nodeid}: {name}: {value}" for name, value in report.user_properties]
            if outcome:  # set-up and clean-up that went well have none
                counts[file][outcome] += 1
    terminalreporter.section(f"{platform.node()}: by file")
    for file, found in counts.items():
        text = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items(), reverse=True))
        terminalreporter.line(f"{file}: {text} in {seconds[file]:.0f} s")
    for line in measured:
        terminalreporter.line(line)


def _changed(since: float) -> list[Path]:
    return sorted(log for log in _QEMU.glob("*.log") if log.stat().st_mtime >= since)


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LINES:])


def _libvirtd(since: float) -> str:
    if Path("/run/systemd/system").exists():
        command = ["journalctl", "--no-pager", "-o", "short-precise", "-u", "libvirtd", "--since", f"@{since:.0f}"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return _end(_LIBVIRTD) if _LIBVIRTD.exists() else "(no log)"
