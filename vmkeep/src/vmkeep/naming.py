"""Names of restored files: safe whatever the VM is called, and never longer than a file name may be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from backupcore.errors import ConfigError

__all__ = ["Names", "file_name", "short"]

_SHORT = 8
_BYTES = 150  # a file name may have 255; "-disk-<ID>.qcow2" and the marks of an unfinished file need the rest
_NO_VOLUME = re.compile(r"[^A-Za-z0-9+_.-]")
_VOLUME = 50  # LVM allows 127 in all, with the dashes doubled that are in it
_DISK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def short(token: str, tokens: Iterable[str]) -> str:
    """The shortest prefix of `token`, of 8 characters at least, that no other of `tokens` begins with."""
    others = {other for other in tokens if other != token}
    for length in range(_SHORT, len(token)):
        if not any(other.startswith(token[:length]) for other in others):
            return token[:length]
    return token


def file_name(name: str, room: int = 0) -> str:
    """`name` as a part of a path: no slash, nothing unprintable, no leading dot or dash; `room` bytes can follow it."""
    safe = "".join(letter if letter.isprintable() and letter != "/" else "_" for letter in name)
    safe = safe.encode("utf-8", "replace")[: _BYTES - room].decode("utf-8", "ignore")
    return f"_{safe[1:]}" if safe[:1] in ("", ".", "-") else safe


@dataclass(frozen=True, slots=True)
class Names:
    """The files of one restore in `folder`, all of which begin with `base`.

    `home` is where the files go that the VM itself uses, if that is another folder: all but the definition.
    """

    folder: Path
    base: str
    form: str = "qcow2"
    home: Path | None = None

    @classmethod
    def given(cls, folder: Path, base: str, form: str = "qcow2", home: Path | None = None) -> Names:
        """With a base that the user chose. ConfigError if it cannot begin the name of a file."""
        if not base or base != file_name(base):
            raise ConfigError(
                f"the name {base!r:.80} cannot be used for files",
                "Use a name without /, not beginning with a dot or a dash, of at most 150 bytes.",
            )
        return cls(folder, base, form, home)

    @property
    def used(self) -> Path:
        """The folder of the files that the VM itself uses."""
        return self.home or self.folder

    def disk(self, disk: str) -> Path:
        """The file of a disk."""
        if not _DISK.fullmatch(disk):
            raise ConfigError(f"{disk!r:.80} is no disk ID", "See: vmkeep image show ID")
        return self.used / f"{self.base}-disk-{disk}.{self.form}"

    def volume(self, disk: str) -> str:
        """The name of a volume for a disk: of letters that every volume manager takes, and not too long for one."""
        self.disk(disk)
        return f"{_NO_VOLUME.sub('_', self.base)[:_VOLUME]}-disk-{disk}"

    @property
    def definition(self) -> Path:
        """The file of the definition."""
        return self.folder / f"{self.base}.xml"

    def file(self, artifact: str) -> Path:
        """The file of an artifact that is neither: a kernel, the state of a TPM."""
        return self.used / f"{self.base}-{artifact}"

    @property
    def nvram(self) -> Path:
        """The file of the UEFI variables."""
        return self.used / f"{self.base}-nvram"
