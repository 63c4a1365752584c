"""Whether the file below an overlay was written to since that was put on it.

Whoever has a VM use its first file again, and not the overlay on it, has it start without what it has written since the
last backup. Where nothing was written to that file the overlay can be put back, and no bytes are lost; where something
was, the two do not belong together any more. A mark on the overlay, an extended attribute, tells: what the file below
was when the last backup had ended. Where the file system keeps none, nothing is put back.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress

__all__ = ["is_unwritten", "mark"]

_NAME = "user.backupcore.base"
_LONGEST = 1024


def mark(overlay: str, base: str) -> None:
    """Write down what the file below an overlay is by now: nobody writes to it as long as the overlay is used."""
    with suppress(OSError):  # it is no more than a proof that there will not be
        os.setxattr(overlay, _NAME, _stamp(base), follow_symlinks=False)


def is_unwritten(overlay: str, base: str) -> bool:
    """Whether it is proved that the file below was not written to since."""
    try:
        return os.getxattr(overlay, _NAME, follow_symlinks=False)[:_LONGEST] == _stamp(base)
    except OSError:
        return False


def _stamp(base: str) -> bytes:
    # Not the time of its last change of owner or mode: libvirt changes both as a VM starts and stops.
    found = os.stat(base)  # noqa: PTH116 - as the calls above, which pathlib has not
    return json.dumps([found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]).encode()
