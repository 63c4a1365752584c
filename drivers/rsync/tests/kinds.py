"""What the tests of the rsync driver back up, and where to."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from backupcore.model import VM, Artifact, BackupRun, BytesArtifact, SourceRef, Type, new_id
from backupcore.options import build
from backupcore.testing.given import Made
from backupcore.testing.processes import below
from backupcore_rsync import Rsync
from lab.servers import Sshd

ODD = '-odd: it\'s "here"'
SECRET = "correct horse battery"


@dataclass(frozen=True)
class Kind:
    """A target that tests write to: the options that reach it, and the folder in which its files really lie."""

    name: str
    root: Path
    options: dict[str, object] = field(repr=False)
    server: int = 0
    """The process that serves it; 0 for a folder of this host."""

    def driver(self, **more: object) -> Rsync:
        return build(Rsync, self.options | more)

    def kept(self, source: SourceRef) -> Path:
        return self.root / source.token.replace(".", "/")

    def everything(self) -> list[str]:
        """All that lies in the target; at a daemon, which removes no folder of a VM, those are left out."""
        return sorted(
            str(path.relative_to(self.root))
            for path in self.root.rglob("*")
            if path.parent != self.root or not path.is_dir() or (self.name != "daemon" and not any(path.iterdir()))
        )

    def new(self) -> dict[str, object]:
        """The options of another empty folder, beside it."""
        made = self.root.with_name(f"{self.root.name}-{uuid.uuid4().hex}")
        made.mkdir()
        return self.options | {"target": str(self.options["target"]).replace(self.root.name, made.name)}

    @contextmanager
    def fail(self) -> Iterator[None]:
        """In the place of the folder is a file: nothing can be written below it, and nothing removed."""
        away = self.root.with_name("away")
        self.root.rename(away)
        self.root.touch()
        try:
            yield
        finally:
            self.root.unlink()
            away.rename(self.root)

    @contextmanager
    def stall(self) -> Iterator[None]:
        """The server and all that it has begun stand still; what is sent to it waits."""
        stopped: list[int] = []
        # The server first, so that nothing is begun meanwhile.
        while new := [one for one in (self.server, *(pid for pid, _ in below(self.server))) if one not in stopped]:
            for one in new:
                stopped.append(one)
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGSTOP)
        try:
            yield
        finally:
            for one in stopped:
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGCONT)


def over_ssh(server: Sshd, path: Path | str) -> dict[str, object]:
    return {
        "target": f"{server.user}@127.0.0.1:{path}",
        "ssh": "ssh -F none",  # not what whoever runs the tests has in his configuration
        "port": server.port,
        "identity_file": str(server.identity),
        "known_hosts_file": str(server.known_hosts),
    }


def new_run(vm: str = "", host: str = "host-a.example", builds_on: tuple[SourceRef, ...] = ()) -> BackupRun:
    return BackupRun(
        id=new_id(),
        vm=VM(uuid=vm or str(uuid.uuid4()), name="web"),
        host=host,
        datastore="nas",
        image=new_id(),
        number=0,
        point=new_id(),
        type=Type.FULL,
        builds_on=builds_on,
        date=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )


def new_artifacts(size: int = 3 << 20) -> list[Artifact]:
    return [
        Made("disk.vda.qcow2", size),
        BytesArtifact("sums.vda", bytes(range(96))),
        BytesArtifact("vm.xml", b"<domain/>"),
        BytesArtifact("nvram", b""),
        BytesArtifact("manifest.json", b'{"format": 1}'),
    ]
