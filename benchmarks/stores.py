"""The datastores, and what the tool behind each takes for the same bytes by itself."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.measure import Sample, run, together
from benchmarks.place import Place
from lab.s3_server import SeaweedFS

__all__ = ["KINDS", "S3", "Folder", "Restic", "Store"]

BUCKET = "bench"


class Store(Protocol):
    """Where vmkeep keeps backups, and its tool without vmkeep.

    `tool` is its name in the tables; `table` are the lines of the datastore's TOML table.
    """

    tool: str
    table: str

    def put(self, file: Path) -> Sample:
        """The tool keeps a file, beside what vmkeep keeps."""

    def got(self, to: Path) -> Sample:
        """The tool gives back what it has kept last, to a file that is removed afterwards."""

    def fetched(self, source: str, artifact: str, to: Path) -> Sample:
        """The tool gives back an artifact that vmkeep keeps, to a file that is removed afterwards."""

    def close(self) -> None:
        """Remove all of it."""


class Restic:
    """A local repository, made by whoever needs it first, and another for restic alone."""

    tool = "restic"

    def __init__(self, place: Place, name: str = "repository") -> None:
        self.repository, self.beside = place.folder / name, place.folder / f"{name}-beside"
        self._password = place.password
        self._file = Path()
        self.table = f'driver = "restic"\nrepository = "{self.repository}"\npassword_file = "{place.password}"'

    def put(self, file: Path) -> Sample:
        """``restic backup``, after ``restic init`` where there is no repository."""
        return self.put_all([file])

    def put_all(self, files: Sequence[Path]) -> Sample:
        """``restic backup`` of several files in one snapshot."""
        self._file = files[-1]
        made = [] if self.beside.exists() else [self._restic(self.beside, "init", "-q")]
        return together(*made, self._restic(self.beside, "backup", "--force", "-q", *files))

    def got(self, to: Path) -> Sample:
        """``restic dump``."""
        return self._dumped(self.beside, "latest", str(self._file), to)

    def fetched(self, source: str, artifact: str, to: Path) -> Sample:
        """``restic dump``."""
        return self._dumped(self.repository, source, f"/{artifact}", to)

    def anew(self, repository: Path, work: Callable[[], Sample]) -> Callable[[], Sample]:
        """That work, each time with a new repository: the one there is removed before."""

        def begun() -> Sample:
            shutil.rmtree(repository, ignore_errors=True)
            return work()

        return begun

    def share(self) -> None:
        """From now on restic alone uses vmkeep's repository.

        The cost of a key is set when a repository is made, by how quick the machine was in that moment: two that were
        made one after the other may differ by half a second for every command.
        """
        shutil.rmtree(self.beside, ignore_errors=True)
        self.beside = self.repository

    def make(self) -> None:
        """Make the repository that vmkeep uses."""
        self._restic(self.repository, "init", "-q")

    def environment(self, repository: Path) -> dict[str, str]:
        """What restic needs to know to work on it."""
        return {"RESTIC_PASSWORD_FILE": str(self._password), "RESTIC_REPOSITORY": str(repository)}

    def close(self) -> None:
        """Remove all of it."""
        for folder in (self.repository, self.beside):
            shutil.rmtree(folder, ignore_errors=True)

    def _dumped(self, repository: Path, snapshot: str, path: str, to: Path) -> Sample:
        try:
            return self._restic(repository, "dump", "-q", snapshot, path, output=to)
        finally:
            to.unlink(missing_ok=True)

    def _restic(self, repository: Path, *arguments: str | Path, output: Path | None = None) -> Sample:
        return run("restic", *arguments, environment=self.environment(repository), output=output)


class S3:
    """A bucket of a real S3 server on this host, and boto3's own transfer (`benchmarks.transfer`)."""

    tool = "boto3"

    def __init__(self, place: Place) -> None:
        self.server = SeaweedFS(place.folder)
        credentials = self.server.credentials(place.folder / "s3.credentials")
        self.environment = {"AWS_SHARED_CREDENTIALS_FILE": str(credentials)}
        self._transfer("bucket", "", Path())
        self.table = self.at(self.server.url)

    def at(self, url: str) -> str:
        """The table for that endpoint."""
        return (
            f'driver = "s3"\nbucket = "{BUCKET}"\nendpoint_url = "{url}"\npath_style = true\n'
            f'credentials_file = "{self.environment["AWS_SHARED_CREDENTIALS_FILE"]}"'
        )

    def put(self, file: Path) -> Sample:
        """boto3's ``upload_file``."""
        return self._transfer("upload", "ready", file)

    def got(self, to: Path) -> Sample:
        """boto3's ``download_file``."""
        return self._downloaded("ready", to)

    def fetched(self, source: str, artifact: str, to: Path) -> Sample:
        """boto3's ``download_file``."""
        return self._downloaded(f"{source.replace('.', '/')}/{artifact}", to)

    def close(self) -> None:
        """Stop the server and remove its data."""
        self.server.stop()

    def _downloaded(self, key: str, to: Path) -> Sample:
        try:
            return self._transfer("download", key, to)
        finally:
            to.unlink(missing_ok=True)

    def _transfer(self, verb: str, key: str, path: Path) -> Sample:
        command = (sys.executable, "-m", "benchmarks.transfer", self.server.url, BUCKET, verb, key, path)
        return run(*command, environment=self.environment)


class Folder:
    """A local folder, and ``rsync --whole-file --fsync``: ours syncs as well."""

    tool = "rsync"

    def __init__(self, place: Place) -> None:
        self.target, self._copy = place.folder / "target", place.folder / "copy"
        self.target.mkdir()
        self.table = f'driver = "rsync"\ntarget = "{self.target}"'

    def put(self, file: Path) -> Sample:
        """rsync to another folder."""
        self._copy.unlink(missing_ok=True)
        return run("rsync", "--whole-file", "--fsync", file, self._copy)

    def got(self, to: Path) -> Sample:
        """rsync back."""
        return self._back(self._copy, to)

    def fetched(self, source: str, artifact: str, to: Path) -> Sample:
        """rsync back."""
        return self._back(self.target / source.replace(".", "/") / artifact, to)

    def close(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.target, ignore_errors=True)
        self._copy.unlink(missing_ok=True)

    def _back(self, file: Path, to: Path) -> Sample:
        try:
            return run("rsync", "--whole-file", "--fsync", file, to)
        finally:
            to.unlink(missing_ok=True)


KINDS: tuple[Callable[[Place], Store], ...] = (Restic, S3, Folder)
"""How to open one of each kind."""
