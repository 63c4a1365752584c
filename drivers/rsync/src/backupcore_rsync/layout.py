"""What lies where below the target, and what its names mean.

::

    <VM uuid>/<32 hex>/disk.vda.qcow2      the artifacts, as plain files
                       manifest.json       there only when the backup is complete
                       .labels/number=0    one empty file per label: a listing of names is all that `sources` needs
                       .part.<who>.<run>.<life>   at a daemon: who began this folder
    .vmkeep-datastore                      32 hex digits by which this target is known, for good
    <VM uuid>/.<32 hex>.<who>.<run>.<life>.part/  a backup under way, or what is left of one (a daemon cannot rename)

Who: the ID of the installation, or the host's name where a run has none, as before installations were known. Life: that
of the process which writes it (`backupcore.life`); older versions left it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

from backupcore.errors import ContractViolation, TargetUnavailable
from backupcore.life import Life
from backupcore.model import BackupRun, new_id

__all__ = [
    "LABELS",
    "MANIFEST",
    "MARKER",
    "MARKER_LIMIT",
    "OLD",
    "Begun",
    "Token",
    "artifacts",
    "begun",
    "by_token",
    "identity",
    "label_names",
    "labels",
    "mark",
    "marked",
    "part",
    "rules",
]

MANIFEST = "manifest.json"
LABELS = ".labels"  # no artifact can have this name

MARKER = ".vmkeep-datastore"
MARKER_LIMIT = 200
"""Bytes of the marker that are looked at; it has 33."""

VM_FOLDERS = "????????-????-????-????-????????????"
"""VMs' folders, as a wildcard of rsync's; `Token.parse` is exact."""

OLD = 86400
"""Seconds without a change after which what does not say whose life it began with counts as left behind."""

_TOKEN = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([0-9a-f]{32})")
_WHO = 80  # letters of whoever began something, in a file name
_IDENTITY = re.compile(rb"[0-9a-f]{32}\n?")
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
    """Who stores this, the run, and this process, as part of a file name of at most 255 bytes."""
    who = quote(run.installation or run.host, safe="")[:_WHO]
    return f"{who}.{quote(run.id, safe='')[:40]}.{Life.own()}"


@dataclass(frozen=True, slots=True)
class Begun:
    """What a name says of a backup that a run of this installation has begun, finished or not."""

    life: Life | None
    """That of the process which writes it; None where an older version has begun it."""
    sure: bool
    """Whether it is this host's for certain: the installation's ID tells, a host's name does not."""

    @property
    def is_over(self) -> bool:
        """Whether nobody writes it any more, for certain."""
        return self.life is not None and self.life.is_over(this_host=self.sure)


def _begun(pattern: str, name: str, run: BackupRun) -> Begun | None:
    own = quote(run.installation, safe="")[:_WHO]
    names = [own] if own else []
    names += [quote(run.host, safe="")[:most] for most in (_WHO, 120) if run.host]
    who = "|".join(re.escape(one) for one in names)
    found = re.fullmatch(pattern % rf"(?P<who>{who})\.[^./]{{1,40}}(?:\.(?P<life>[0-9a-f-]+))?", name)
    if not found:
        return None
    life = Life.parse(found["life"] or "")
    return None if found["life"] and life is None else Begun(life, found["who"] == own)


def part(token: Token, run: BackupRun) -> str:
    """The name of the folder, beside the backup's own, in which it is written."""
    return f".{token.id}.{_writer(run)}.part"


def begun(name: str, run: BackupRun) -> Begun | None:
    """What the name of a folder says that `part` has given in a run of this installation; None for anybody else's."""
    return _begun(r"\.[0-9a-f]{32}\.%s\.part", name, run)


def mark(run: BackupRun) -> str:
    """The name of the file by which a folder at a daemon says who began it."""
    return f".part.{_writer(run)}"


def marked(name: str, run: BackupRun) -> Begun | None:
    """The same of a file that `mark` has named."""
    return _begun(r"\.part\.%s", name, run)


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


def identity(marker: bytes, where: str) -> str:
    """What the marker of the target `where` says. TargetUnavailable if it is none that was made here."""
    if not _IDENTITY.fullmatch(marker):
        raise TargetUnavailable(
            f"{where}: the file {MARKER} does not say which datastore this is",
            "Somebody has changed it, or the target lost what was written to it: look at it.",
        )
    return marker[:32].decode()


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


def rules(folders: Iterable[str] | None, vm: str = "") -> list[str]:
    """rsync's filter rules for the files of these folders, or of all backups (of `vm`); nothing else is looked at."""
    if folders is None:
        any_id = "?" * 32
        return [
            *(f"+ /{vm or VM_FOLDERS}/", "- /*", f"+ /*/{any_id}/", "- /*/*"),
            *("+ /*/*/*", f"+ /*/*/{LABELS}/*", "- *"),
        ]
    found = [rule for one in folders for rule in (f"+ /{one}/", f"+ /{one}/*", f"+ /{one}/{LABELS}/*")]
    above = dict.fromkeys(f"+ /{one.partition('/')[0]}/" for one in folders)
    return [*above, *found, "- *"]
