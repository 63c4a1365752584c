"""A host of its own for every test: configuration, two VMs, a datastore, all in files."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from backupcore import process
from backupcore.model import VM
from backupcore.testing.guest import MemoryGuest

PLUGINS = Path(__file__).parent / "plugins"
sys.path.insert(0, str(PLUGINS))
# pytest names this module vmkeep.tests.conftest, after its path, and puts an empty package "vmkeep" in the way of ours.
if getattr(sys.modules.get("vmkeep"), "__file__", None) is None:
    sys.modules.pop("vmkeep", None)

from kept_in_files import DB, WEB, load, save  # noqa: E402 - found by way of the path above

from vmkeep.cli import main  # noqa: E402 - as above

T = TypeVar("T")


class Once(Protocol):
    """The type of the fixture `once`."""

    def __call__(self, site: Site, make: Callable[[Site], T]) -> T: ...


@dataclass
class Told:
    """What one command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.err.splitlines()[-1])["error"]


@dataclass
class Site:
    """One host: where its things are, and `vmkeep` run on it."""

    folder: Path
    capture: Callable[[], tuple[str, str]]
    paths: str
    children: list[subprocess.Popen[str]] = field(default_factory=list)
    target: Any = None  # a `lab.blocking_fs.Blocking`, where the datastore lies on one

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def guests(self) -> Path:
        return self.folder / "guests"

    def configure(self, *, extra: str = "", datastores: str | None = None) -> None:
        table = f'[datastores.nas]\ndriver = "files"\npath = "{self.store}"\n' if datastores is None else datastores
        self.config.write_text(
            f'[host]\nuri = "file://{self.guests}"\nstate = "{self.state}"\nhypervisor = "files"\n{extra}\n{table}'
        )

    def second_store(self) -> str:
        """The table of a datastore named other."""
        (self.folder / "other").mkdir()
        return f'[datastores.other]\ndriver = "files"\npath = "{self.folder}/other"\n'

    def write(self, vm: VM, disk: str, offset: int, data: bytes) -> None:
        guests = load(self.guests)
        for guest in guests:
            if guest.vm.uuid == vm.uuid:
                guest.write(disk, offset, data)
        save(self.guests, guests)

    def write_unseen(self, vm: VM, disk: str, offset: int, data: bytes) -> None:
        """Write as nobody should: what tracks changes does not notice."""
        guests = load(self.guests)
        for guest in guests:
            if guest.vm.uuid == vm.uuid:
                guest.disks[disk][offset : offset + len(data)] = data
        save(self.guests, guests)

    def guest(self, vm: VM) -> MemoryGuest:
        return next(guest for guest in load(self.guests) if guest.vm.uuid == vm.uuid)

    def forget(self, vm: VM) -> None:
        save(self.guests, [guest for guest in load(self.guests) if guest.vm.uuid != vm.uuid])

    def rename(self, vm: VM, name: str) -> None:
        guests = load(self.guests)
        for guest in guests:
            if guest.vm.uuid == vm.uuid:
                guest.vm = VM(uuid=vm.uuid, name=name)
        save(self.guests, guests)

    def run(self, *arguments: str) -> Told:
        """`vmkeep` in this process."""
        self.capture()
        code = main.run(["--config", str(self.config), *arguments])
        return Told(code, *self.capture())

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`vmkeep` in a process of its own."""
        child = subprocess.Popen(
            [sys.executable, "-m", "vmkeep", *arguments],
            env={**os.environ, "PYTHONPATH": self.paths, "VMKEEP_CONFIG": str(self.config)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run under nohup hand down a hang-up that is ignored, and vmkeep leaves it so.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509 - no thread holds a lock here
        )
        self.children.append(child)
        return child

    def process(self, *arguments: str) -> Told:
        """`vmkeep` in a process of its own, to its end."""
        child = self.start(*arguments)
        out, err = child.communicate(timeout=60)
        return Told(child.returncode, out, err)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until `condition` holds, for a minute at most."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            assert self.children[-1].poll() is None, (
                f"the process ended before {what}: {self.children[-1].communicate()}"
            )
            time.sleep(0.01)

    def until_dying(self, number: int) -> None:
        """Wait until a process that was killed runs no more, though the kernel may keep it."""
        deadline = time.monotonic() + 60
        while not process.dying(number):
            assert time.monotonic() < deadline, f"process {number} goes on"
            time.sleep(0.01)


@dataclass
class Beside(Site):
    """Another configuration: a state folder of its own, with the guests and the store of `first`."""

    first: Site | None = None

    @property
    def store(self) -> Path:
        assert self.first is not None
        return self.first.store

    @property
    def guests(self) -> Path:
        assert self.first is not None
        return self.first.guests


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The test plugins as an installed distribution; returns the module path for other processes."""
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "kept_in_files-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kept-in-files\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[backupcore.drivers]\nfiles = kept_in_files:FileDriver\nplain = kept_in_files:PlainDriver\n"
        "broken = no_such_module_at_all:Driver\n"
        "[backupcore.hypervisors]\nfiles = kept_in_files:FileHypervisor\n"
    )
    sys.path.insert(0, str(folder))
    yield os.pathsep.join(path for path in sys.path if path)
    sys.path.remove(str(folder))


@pytest.fixture
def site(tmp_path: Path, installed: str, capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    made = Site(tmp_path, lambda: tuple(capsys.readouterr()), installed)  # type: ignore[arg-type]  # a pair of str
    made.store.mkdir()
    made.configure()
    mib = 1 << 20
    save(
        made.guests,
        [
            MemoryGuest(WEB, {"vda": bytearray(4 * mib), "vdb": bytearray(mib)}),
            MemoryGuest(DB, {"vda": bytearray(mib)}),
        ],
    )
    made.write(WEB, "vda", 70_000, b"first" * 100_000)
    yield made
    for child in made.children:
        if child.poll() is None:
            child.kill()
        child.communicate()


@pytest.fixture
def beside(site: Site) -> Beside:
    (site.folder / "beside").mkdir()
    made = Beside(site.folder / "beside", site.capture, site.paths, first=site)
    made.configure()
    return made


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Brings a new site to where `make` leaves one, and returns what `make` does.

    It is called once in a module: copying the files takes a tenth of the time that the backups take. Every site keeps
    its own configuration, which names its folders.
    """
    made: dict[Callable[[Site], Any], tuple[Path, Any]] = {}

    def begin(site: Site, make: Callable[[Site], T]) -> T:
        if make in made:
            shutil.copytree(made[make][0], site.folder, dirs_exist_ok=True)
        else:
            result = make(site)
            kept = tmp_path_factory.mktemp("once") / "site"
            shutil.copytree(site.folder, kept, ignore=lambda _, names: {site.config.name} & {*names})
            made[make] = kept, result
        return copy.deepcopy(made[make][1])

    return begin
