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

__all__ = ["Place", "Upload", "changed", "differing", "expected"]


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
        wanted = {name: size for name, size in expected(self.sizes, self.run).items() if name != but}
        if wrong := differing(wanted, there, folder):
            raise IntegrityError(
                f"rsync reported no error, but {wrong}", "Check rsync_arguments of this datastore, then run it again."
            )


def expected(sizes: Mapping[str, int], run: BackupRun) -> dict[str, int]:
    """The files of a complete backup: path below its folder -> size. `sizes` are those of its artifacts."""
    return {**sizes, **{f"{LABELS}/{name}": 0 for name in label_names(run)}}


def differing(wanted: Mapping[str, int], there: Mapping[str, int], folder: str) -> str:
    """What in a listing of `folder` is not as it is wanted, in words; "" if all of it is there."""
    for name, size in wanted.items():
        found = there.get(f"{folder}/{name}")
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            return f"{name} {state} in the target ({size} bytes were given to it)"
    return ""


def changed(name: str, wrong: str) -> IntegrityError:
    """The error for a backup that is not published, since somebody else has changed what was stored of it."""
    return IntegrityError(
        f"{name}: all was stored, but {wrong}: somebody else has changed it before it was published",
        "Nothing of it was kept. See who else writes to the target, then run it again.",
    )


class Place(Protocol):
    """A target of one kind. Holds nothing open; pickles as the driver's options."""

    @property
    def name(self) -> str:
        """How messages call it."""

    def ready(self, run: BackupRun, ctx: Context) -> None:
        """It answers and takes writes.

        What runs of this installation that are dead have left unfinished for this VM is removed, once nothing hinders
        this run any more (`Context.on_touch`). What cannot be removed is told, and hinders nothing.
        """

    def check(self, ctx: Context) -> None:
        """It answers and takes writes, as far as can be told without one."""

    def identity(self, ctx: Context, *, make: bool) -> str | None:
        """What its marker says, None where it has none. With `make` it gets one, if it has none by then."""

    def files(self, folders: Iterable[str] | None, ctx: Context, *, vm: str = "") -> dict[str, int]:
        """The files in these folders (of all backups if None, or of all of `vm`): path below the target -> size."""

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
