"""pytest fixtures and hooks for tests with real VMs; see the fixtures' own docstrings.

- In CI (CI=true) a skipped test is a failed test.
- Whatever a test session leaves behind (a process, a VM, a mount) fails it.
- A libvirtd that had to be started for the tests is stopped after them.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from lab import leftovers

if TYPE_CHECKING:  # libvirt is loaded where it is used: tests of the core run without it
    from lab.domain_xml import DiskSpec, Kernel
    from lab.vm import VM

_LIBVIRTD_WAS_OURS = pytest.StashKey[bool]()
_PACKAGES = "what is missing is installed by 'make setup' (YES=1 make setup asks nothing)"
_numbers = itertools.count(1)


class MakeVM(Protocol):
    """The type of the fixture `make_vm`."""

    def __call__(self, disks: Sequence[DiskSpec], *, label: str = "vm", start: bool = True, **options: Any) -> VM: ...


def pytest_configure(config: pytest.Config) -> None:
    # A shell has its background jobs ignore Ctrl-C, and their children inherit that: tests that send one wait in vain.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        config.stash[_LIBVIRTD_WAS_OURS] = _libvirtd_started_here()


def pytest_collection_finish() -> None:
    # Tests that count descriptors have all garbage collected first: without this, each time all tests and their modules
    # are looked through as well, a tenth of a second.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Only the process that started the workers knows when the last of them is done.
    if hasattr(session.config, "workerinput") or session.config.stash[_LIBVIRTD_WAS_OURS]:
        return
    if _libvirtd_started_here():
        from lab import libvirtd  # noqa: PLC0415 - see TYPE_CHECKING above

        libvirtd.stop()


def _libvirtd_started_here() -> bool:
    try:
        from lab import libvirtd  # noqa: PLC0415 - see TYPE_CHECKING above
    except ImportError:
        return False
    return libvirtd.started_here()


def _fail_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped" or hasattr(report, "wasxfail") or os.environ.get("CI") != "true":
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"A skipped test is a failure where CI=true: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_in_ci(report)
    return report


@pytest.fixture(scope="session")
def vm_prefix() -> str:
    """What the names of all VMs of this test process begin with; VMs that a test defines by itself need it, too."""
    return f"test-{os.getpid()}-"


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind(vm_prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    marker = f"{leftovers.MARKER}={os.getpid()}-{secrets.token_hex(4)}"
    os.environ[leftovers.MARKER] = marker.partition("=")[2]
    yield
    found = [*leftovers.processes(marker), *leftovers.mounts(tmp_path_factory.getbasetemp())]
    if _libvirt_used:
        found += leftovers.domains(_libvirt_used[0], vm_prefix)
    if found:
        pytest.fail("Tests left behind:\n" + "\n".join(found))


_libvirt_used: list[str] = []


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """The command sends our log to stderr, for good: a test that calls it must not hide the log from the next one."""
    loggers = [logging.getLogger(name) for name in ("backupcore", "vmkeep")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def libvirt_uri() -> str:
    """The URI of a libvirt that answers; one that has to be started is stopped after the session."""
    try:
        from lab import libvirtd  # noqa: PLC0415 - see TYPE_CHECKING above

        uri = libvirtd.ensure()
    except ImportError as error:
        pytest.skip(f"libvirt-python is not installed ({error}); {_PACKAGES}")
    except libvirtd.LibvirtMissing as error:
        pytest.skip(str(error))
    _libvirt_used.append(uri)
    return uri


@pytest.fixture(scope="session")
def require_programs() -> Callable[..., None]:
    """Call it with names of programs: skips the test, naming the cure, where one is not on PATH."""

    def require(*names: str) -> None:
        missing = [name for name in names if shutil.which(name) is None]
        if missing:
            pytest.skip(f"not on PATH: {', '.join(missing)}; {_PACKAGES}")

    return require


@pytest.fixture(scope="session")
def qemu_tools(require_programs: Callable[..., None]) -> None:
    """For tests that run qemu-img, qemu-io or qemu-nbd."""
    require_programs("qemu-img", "qemu-io", "qemu-nbd")


@pytest.fixture
def vm_folder(libvirt_uri: str) -> Iterator[Path]:
    """A folder that QEMU's user and root may enter and nobody else: for sockets, scratch, restored disks to boot.

    pytest's tmp_path is closed to QEMU's user. Its path is short enough for sockets. Removed after the test.
    """
    from lab import libvirtd  # noqa: PLC0415 - see TYPE_CHECKING above

    base = libvirtd.folder_for_vms()
    folder = base / f"test-{os.getpid()}-{next(_numbers)}"
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(folder, base.stat().st_uid, base.stat().st_gid)
    yield folder
    while folder.exists():
        with suppress(FileNotFoundError):  # what a killed run left at work may just have removed a file of its own
            shutil.rmtree(folder)


@pytest.fixture
def make_vm(libvirt_uri: str, qemu_tools: None, vm_prefix: str) -> Iterator[MakeVM]:
    """Makes a VM with a name of its own, starts it unless told otherwise, and removes it after the test.

    For example ``make_vm([DiskSpec(target="vda", size=64 << 20)])``; further options are those of `lab.vm.VM.create`.
    """
    from lab.vm import VM  # noqa: PLC0415 - see TYPE_CHECKING above

    made: list[VM] = []

    def make(disks: Sequence[DiskSpec], *, label: str = "vm", start: bool = True, **options: Any) -> VM:
        vm = VM.create(f"{vm_prefix}{label}-{next(_numbers)}", disks, **options)
        made.append(vm)
        if start:
            vm.start()
        return vm

    yield make
    errors = []
    for vm in made:
        try:
            vm.remove()
        except Exception as error:  # noqa: BLE001 - the others have to go as well; raised below
            errors.append(f"{vm.folder.name}: {error}")
    if errors:
        pytest.fail("could not remove VMs: " + "; ".join(errors))


@pytest.fixture(scope="session")
def guest_kernel(libvirt_uri: str) -> Kernel:
    """Debian's kernel with an initramfs that writes to its disks; see `lab.kernel`."""
    from lab import kernel  # noqa: PLC0415 - see TYPE_CHECKING above

    return kernel.files()
