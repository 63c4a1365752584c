"""A configured host for tests of the whole: vmkeep with one VM and one datastore, and what must be true of them."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import clock, quick_repository, store
from lab.patience import patient
from lab.vm import VM, same

RUNNING = 1  # VIR_DOMAIN_RUNNING
PASSWORD = "not-to-be-seen"
"""Of restic's repositories; no program may show it."""


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait for a condition, with a limit that a loaded machine keeps as well."""
    end = time.monotonic() + patient(seconds)
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.02)


class PassedBy(AssertionError):
    """A process ended without coming to the step that it was to stop at."""


def stopped(process: int) -> bool:
    """Whether it stands still at the step that it was to stop at; see `Host.start`. `PassedBy` if it has ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        state = "Z"  # and somebody else has collected it
    if state == "Z":
        raise PassedBy("the process ended before it came to the step")
    return state == "T"


@dataclass
class Done:
    """How one command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        if self.code:
            raise AssertionError(f"exit code {self.code}: {self.err}")
        return json.loads(self.out)


@dataclass(frozen=True)
class Recorded:
    """One increment in the catalog; `state` is its image's."""

    image: int
    id: int
    point: str
    state: str


@dataclass
class Host:
    """One datastore ``nas`` and one VM; everything lies in `folder`, which QEMU's user may enter.

    `driver` is the datastore's: ``restic``, ``rsync``, ``s3``, or ``lab`` (`lab.store`), which spares a second with
    each command; `options` are its own, where they are not the usual ones (of S3 there are none).
    """

    folder: Path
    vm: VM
    uri: str
    driver: str = "restic"
    options: dict[str, str] = field(default_factory=dict)
    more: str = ""
    """Further lines of the datastore's table."""
    hostname: str = ""
    """What its programs take for the host's name; another one than this host's only root can have."""
    ahead: int = 0
    """Seconds that its programs' clock is ahead; see `lab.clock`."""

    def __post_init__(self) -> None:
        self.environment = dict(os.environ)
        if self.driver == "restic":
            password = self.folder / "password"
            password.touch(mode=0o600)
            password.write_text(f"{PASSWORD}\n")
            if "repository" not in self.options:
                quick_repository.make(self.folder / "repository", PASSWORD)
        elif self.driver == "lab":
            found = store.installed(self.folder / "installed")
            self.environment["PYTHONPATH"] = os.pathsep.join([found, *filter(None, sys.path)])
        self.state = self.folder / "state"
        self.scratch = self.folder / "scratch"
        self.config = self.folder / "config.toml"
        self.configure()

    def configure(self, *, host: str = "", extra: str = "", **options: str) -> None:
        """Write the configuration: further lines of [host], further tables, options of the datastore."""
        own = {
            "restic": {"repository": f"{self.folder}/repository", "password_file": f"{self.folder}/password"},
            "rsync": {"target": f"{self.folder}/store"},
            "lab": {"path": f"{self.folder}/store"},
            "s3": {},
        }[self.driver]
        lines = "".join(f'{key} = "{value}"\n' for key, value in {**own, **self.options, **options}.items())
        self.config.write_text(
            f'[host]\nuri = "{self.uri}"\nstate = "{self.state}"\nscratch = "{self.scratch}"\n{host}\n'
            f'{extra}\n[datastores.nas]\ndriver = "{self.driver}"\n{lines}{self.more}\n'
        )

    def start(
        self, *arguments: str, at: str = "", stop: bool = False, child: str = "", **environment: str
    ) -> subprocess.Popen[str]:
        """vmkeep in a process of its own; with `at` it is killed (or stopped) at that step, see `lab.kill_at`.

        With `child` whichever of its children comes to that step is killed there.
        """
        command = [sys.executable, "-m", *(["lab.kill_at", at, "vmkeep"] if at or child else ["vmkeep"])]
        if stop:
            environment["LAB_AT"] = "stop"
        if child:
            environment["LAB_CHILD"] = child
        if self.ahead:
            environment |= clock.environment(self.ahead, self.folder)
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.hostname] if self.hostname else []
        return subprocess.Popen(
            [*named, *command, "--config", str(self.config), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment, **environment},
        )

    def end(self, process: subprocess.Popen[str]) -> Done:
        """Wait for its end."""
        out, err = process.communicate(timeout=patient(240))
        for text in (out, err):
            if "Traceback" in text or PASSWORD in text:
                raise AssertionError(text)
        return Done(process.returncode, out, err)

    def run(self, *arguments: str, **more: Any) -> Done:
        """vmkeep to its end."""
        return self.end(self.start(*arguments, **more))

    def ask(self, *arguments: str) -> Any:
        """The document of a command that must succeed."""
        return self.run("--json", *arguments).json

    def backup(self, *arguments: str) -> Any:
        """A backup that must succeed."""
        return self.ask("backup", self.vm.name, *arguments)

    def recorded(self) -> list[Recorded]:
        """Every increment that the catalog holds, in the order in which they were taken."""
        path = self.state / "catalog.sqlite"
        if not path.exists():
            return []
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as catalog:
            rows = catalog.execute(
                "SELECT image, id, point, state FROM increments JOIN images ON number = image"
                " ORDER BY increments.sequence"
            )
            return [Recorded(*row) for row in rows]

    def note_truth(self, name: str) -> dict[str, Path]:
        """Copies of the disks as they are, made by QEMU's tools. Whatever is recorded next shows the same bytes."""
        folder = self.folder / "truth" / name
        return self.vm.copy_truth(folder) if self.vm.active else self.vm.copy_disks(folder)

    def restored(self, image: int, increment: int) -> dict[str, Path]:
        """The disks of an increment, restored to a new folder."""
        to = self.folder / "restored" / f"{image}-{increment}-{time.monotonic_ns()}"
        found = self.ask("restore", str(image), "--increment", str(increment), "--to", str(to))
        return {disk["id"]: Path(disk["path"]) for disk in found["disks"]}

    def differing(self, image: int, increment: int, truth: dict[str, Path]) -> list[str]:
        """The disks of a restored increment that are not what the truth says, by name."""
        found = self.restored(image, increment)
        if set(found) != set(truth):
            return [f"disks {sorted(found)} instead of {sorted(truth)}"]
        return [
            disk for disk, path in found.items() if size_of(path) != size_of(truth[disk]) or not same(path, truth[disk])
        ]

    def left(self) -> list[str]:
        """What is there that only a running backup may have: jobs, stopped guests, files, mounts, processes."""
        found = []
        if self.vm.active:
            if self.vm.domain.jobInfo()[0]:
                found.append("a job runs")
            if self.vm.domain.state()[0] != RUNNING:
                found.append(f"the guest stands still: {self.vm.domain.state()}")
            own = Path("/var/lib/libvirt/qemu") if os.geteuid() == 0 else Path.home() / ".config/libvirt/qemu/lib"
            found += [str(path) for path in own.glob(f"domain-{self.vm.domain.ID()}-*/backupcore-*")]
        for folder in (self.scratch, self.state / "runs"):
            found += [str(path) for path in folder.glob("*") if path.is_dir()]
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        found += [line for line in mounts if "fuse" in line and "lab-" not in line and str(self.folder) in line]
        known = set(self.points())
        mine = f"backupcore-{self.installation}-"
        names = [name for name in self.checkpoints() if name.startswith(mine) or name.count("-") == 1]
        found += [f"checkpoint {name}" for name in names if name.rpartition("-")[2] not in known]
        return [*found, *processes(str(self.folder))]

    @property
    def installation(self) -> str:
        """The ID of this host's state folder."""
        return str(json.loads((self.state / "installation").read_text())["installation"])

    def owns(self, image: dict[str, Any]) -> bool:
        """Whether a row of ``image list`` is this installation's, or of a time when there were none."""
        return image.get("installation", "") in ("", self.installation)

    def overlays(self) -> list[str]:
        """The overlays of ours beside the VM's disks."""
        return sorted(path.name for path in self.vm.folder.glob("*.backupcore-*"))

    def points(self) -> list[str]:
        """The points that next increments may build on: the last two of each chain that is open."""
        chains: dict[int, list[str]] = {}
        for one in self.recorded():
            if one.state == "open":
                chains.setdefault(one.image, []).append(one.point)
        return [point for points in chains.values() for point in points[-2:]]

    def checkpoints(self) -> list[str]:
        """The checkpoints that libvirt knows."""
        return sorted(checkpoint.getName() for checkpoint in self.vm.domain.listAllCheckpoints())


def size_of(image: Path) -> int:
    """The virtual size of an image of any format."""
    command = ["qemu-img", "info", "-U", "--output=json", str(image)]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["virtual-size"])


def processes(marker: str) -> list[str]:
    """Command lines of restic, qemu-nbd, file views and guards that work for the host in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (path.parent / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue  # it ended while we looked
        program = line.split(" ")[0]
        if (
            "restic" in program or "qemu-nbd" in program or "backupcore.disk" in line or "release.start" in line
        ) and marker in line + environment:
            found.append(line)
    return found
