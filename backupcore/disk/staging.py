"""Artifacts written out as ordinary files, where FUSE is missing."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from backupcore.errors import ContractViolation, TargetFull, from_os_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from backupcore.model import Artifact

_PIECE = 1 << 20


def stage(artifacts: Sequence[Artifact], folder: Path) -> None:
    """Write every artifact into `folder`, which the caller removes, also after an error.

    TargetFull, naming the folder, the bytes needed and those free, before a byte is written. The artifacts' own errors
    pass through.
    """
    needed = sum(artifact.size for artifact in artifacts)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TargetFull(
            f"{folder}: without FUSE the backup is written there first and needs {needed} bytes; {free} are free",
            "Install fuse3 and mfusepy so that nothing is staged, or make room there.",
        )
    for artifact in artifacts:
        path = folder / artifact.name
        try:
            file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400), "wb", 0)
            with file, artifact.open() as source:
                shutil.copyfileobj(source, file, _PIECE)
                written = file.tell()
        except OSError as error:
            raise from_os_error(error, f"writing {artifact.name} to {folder}") from error
        if written != artifact.size:
            raise ContractViolation(f"{artifact.name} gave {written} bytes; its size is {artifact.size}")
