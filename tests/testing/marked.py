"""The directory driver with the hooks that are optional: its place has a mark, locks, and a listing for each VM."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import backupcore
from backupcore import hookimpl
from backupcore.errors import Locked
from backupcore.model import Listed, SourceRef, new_id
from tests.testing.folder import Folder

MARK = ".mark"
LOCK = ".locked-until"
LATE = datetime(2999, 1, 1, tzinfo=UTC)


@backupcore.driver
class Marked(Folder):
    @hookimpl
    def identity(self, known: str, make: bool) -> str | None:
        self._there()
        if make:
            self.make_mark()
        return self.mark()

    def mark(self) -> str | None:
        try:
            return (self.path / MARK).read_text()
        except FileNotFoundError:
            return None

    def make_mark(self) -> None:
        made = self.path / f"{MARK}.{new_id()}"
        made.write_text(new_id())
        with contextlib.suppress(FileExistsError):  # the first one has made it
            (self.path / MARK).hardlink_to(made)
        made.unlink()

    @hookimpl
    def locks(self, sources: Sequence[SourceRef]) -> dict[SourceRef, datetime | None]:
        found = {}
        for source in sources:
            with contextlib.suppress(FileNotFoundError):
                found[source] = datetime.fromisoformat((self.path / source.token / LOCK).read_text())
        return found

    @hookimpl
    def delete(self, sources: Sequence[SourceRef]) -> bool:
        if locked := Marked.locks(self, sources):
            raise Locked("a lock is on it", until=max(filter(None, locked.values())))
        return Folder.delete(self, sources)

    @hookimpl
    def sources_of(self, vm: str) -> Iterable[Listed]:
        return [one for one in Folder.sources(self) if one.labels["vm"] == vm]


def lock(path: Path):
    """The lock of a `Target` for what lies in this folder."""

    @contextmanager
    def locked(source: SourceRef) -> Iterator[None]:
        (path / source.token / LOCK).write_text(LATE.isoformat())
        yield
        (path / source.token / LOCK).unlink()

    return locked
