"""What the three kinds of target have in common, as the driver sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from backupcore.errors import IntegrityError
from backupcore_rsync.layout import LABELS, Token, label_names

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore.model import Artifact, BackupRun, Usage

__all__ = ["Place", "Upload"]


@dataclass(frozen=True, slots=True)
class Upload:
    """One backup on its way: what is to be stored, and the rsync that does it.

    `view` shows the artifacts as files, `labels` is a folder of empty ones. `copy(sources, destination, arguments)`
    runs one rsync to its end.
    """

    token: Token
    run: BackupRun
    ctx: Context
    view: Path
    labels: Path
    sizes: Mapping[str, int]
    copy: Callable[[Sequence[str], str, Sequence[str]], None]

    def check(self, there: Mapping[str, int], folder: str, *, but: str = "") -> None:
        """Hold a listing against what should be in `folder`: an argument of the user's may leave files out."""
        expected = {**self.sizes, **{f"{LABELS}/{name}": 0 for name in label_names(self.run)}}
        expected.pop(but, None)
        for name, size in expected.items():
            found = there.get(f"{folder}/{name}")
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise IntegrityError(
                    f"rsync reported no error, but {name} {state} in the target ({size} bytes were shown to it)",
                    "Check rsync_arguments of this datastore.",
                )


class Place(Protocol):
    """A target of one kind. Holds nothing open; pickles as the driver's options."""

    @property
    def name(self) -> str:
        """How messages call it."""

    def ready(self, run: BackupRun, ctx: Context) -> None:
        """It answers and takes writes; what runs of this host have left unfinished for this VM is removed."""

    def check(self, ctx: Context) -> None:
        """It answers and takes writes, as far as can be told without one."""

    def files(self, folders: Iterable[str] | None, ctx: Context) -> dict[str, int]:
        """The files in these folders (of all backups if None): path below the target -> size."""

    def holds_backups(self, ctx: Context) -> bool:
        """True if any VM has a folder there: false in the empty folder of a disk that is not mounted."""

    def store(self, upload: Upload) -> None:
        """Copy, make durable, publish."""

    def abandon(self, upload_token: Token, run: BackupRun, ctx: Context) -> None:
        """Remove what a failed `store` has left. May raise."""

    def artifact(self, token: Token, name: str, size: int, ctx: Context) -> Artifact:
        """One file of a backup."""

    def remove(self, tokens: Sequence[Token], ctx: Context) -> None:
        """Remove backups, the manifest first; absent ones are fine."""

    def room(self, ctx: Context) -> Usage:
        """The size of the file system that it lies in, as far as it can be asked."""
