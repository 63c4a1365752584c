"""What lies where below the target, and what its names mean.

::

    <VM uuid>/<32 hex>/disk.vda.qcow2      the artifacts, as plain files
                       manifest.json       there only when the backup is complete
                       .labels/number=0    one empty file per label: a listing of names is all that `sources` needs
                       .part.<who>.<run>   at a daemon: who began this folder
    <VM uuid>/.<32 hex>.<who>.<run>.part/  a backup under way, or what is left of one (a daemon cannot rename)

Who: the ID of the installation, or the host's name where a run has none, as before installations were known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

from backupcore.errors import ContractViolation
from backupcore.model import BackupRun, new_id

__all__ = [
    "LABELS",
    "MANIFEST",
    "Token",
    "artifacts",
    "by_token",
    "label_names",
    "labels",
    "mark",
    "marks_of",
    "part",
    "parts_of",
    "rules",
]

MANIFEST = "manifest.json"
LABELS = ".labels"  # no artifact can have this name

VM_FOLDERS = "????????-????-????-????-????????????"
"""VMs' folders, as a wildcard of rsync's; `Token.parse` is exact."""

_TOKEN = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([0-9a-f]{32})")
_ARTIFACT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")


@dataclass(frozen=True, slots=True, order=True)
class Token:
    """One backup: the VM's UUID and 32 hex digits of its own. Its text is the source's token."""

    vm: str
    id: str

    def __str__(self) -> str:
        return f"{self.vm}.{self.id}"

    @property
    def folder(self) -> str:
        """Its path below the target."""
        return f"{self.vm}/{self.id}"

    @classmethod
    def parse(cls, text: str) -> Token | None:
        """The backup that a token names; None for anything that this driver would not have written."""
        found = _TOKEN.fullmatch(text)
        return cls(found[1], found[2]) if found else None

    @classmethod
    def new(cls, run: BackupRun) -> Token:
        """A name for what this run stores."""
        token = cls.parse(f"{run.vm.uuid}.{new_id()}")
        if token is None:
            raise ContractViolation(f"{run.vm.uuid!r:.100} is no UUID as libvirt writes it")
        return token


def _writer(run: BackupRun) -> str:
    """Who stores this, and the run, as part of a file name of at most 255 bytes."""
    return f"{_names(run)[0]}.{quote(run.id, safe='')[:40]}"


def _names(run: BackupRun) -> list[str]:
    """By which names what this run's installation has begun is known, today's first."""
    return [quote(name, safe="")[:120] for name in (run.installation, run.host) if name]


def _any_name(run: BackupRun) -> str:
    return "|".join(re.escape(name) for name in _names(run))


def part(token: Token, run: BackupRun) -> str:
    """The name of the folder, beside the backup's own, in which it is written."""
    return f".{token.id}.{_writer(run)}.part"


def parts_of(run: BackupRun) -> re.Pattern[str]:
    """The names of folders that a run of this installation has begun, finished or not. Nobody else's match."""
    return re.compile(rf"\.[0-9a-f]{{32}}\.(?:{_any_name(run)})\.[^./]{{1,40}}\.part")


def mark(run: BackupRun) -> str:
    """The name of the file by which a folder at a daemon says who began it."""
    return f".part.{_writer(run)}"


def marks_of(run: BackupRun) -> re.Pattern[str]:
    """The marks of all runs of this installation."""
    return re.compile(rf"\.part\.(?:{_any_name(run)})\.[^./]{{1,40}}")


def label_names(run: BackupRun) -> list[str]:
    """The file names that hold this run's labels. Values are percent-encoded: no colon, which Windows shares refuse."""
    return [f"{key}={quote(value, safe='')}" for key, value in run.labels.items()]


def labels(names: Iterable[str]) -> dict[str, str]:
    """The labels among the files of one backup (paths below its folder)."""
    pairs = (name.removeprefix(f"{LABELS}/").partition("=") for name in names if name.startswith(f"{LABELS}/"))
    return {key: unquote(value) for key, mark, value in pairs if mark}


def artifacts(files: Mapping[str, int]) -> dict[str, int]:
    """The artifacts among the files of one backup: name -> size, in the order of names."""
    return {name: files[name] for name in sorted(files) if _ARTIFACT.fullmatch(name)}


def by_token(listing: Mapping[str, int]) -> dict[Token, dict[str, int]]:
    """A listing of the target (path -> size) as the files of each backup in it, complete or not."""
    found: dict[Token, dict[str, int]] = {}
    for path, size in listing.items():
        vm, _, rest = path.partition("/")
        id_, _, name = rest.partition("/")
        token = Token.parse(f"{vm}.{id_}")
        if token and name:
            found.setdefault(token, {})[name] = size
    return found


def rules(folders: Iterable[str] | None) -> list[str]:
    """rsync's filter rules for the files of these folders, or of all backups; nothing else is looked at."""
    if folders is None:
        any_id = "?" * 32
        return [
            *(f"+ /{VM_FOLDERS}/", "- /*", f"+ /*/{any_id}/", "- /*/*"),
            *("+ /*/*/*", f"+ /*/*/{LABELS}/*", "- *"),
        ]
    found = [rule for one in folders for rule in (f"+ /{one}/", f"+ /{one}/*", f"+ /{one}/{LABELS}/*")]
    above = dict.fromkeys(f"+ /{one.partition('/')[0]}/" for one in folders)
    return [*above, *found, "- *"]
