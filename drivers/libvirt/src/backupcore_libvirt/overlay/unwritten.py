"""Whether the file below an overlay was written to since that was put on it.

Whoever has a VM use its first file again, and not the overlay on it, has it start without what it has written since the
last backup. Where nothing was written to that file the overlay can be put back, and no bytes are lost; where something
was, the two do not belong together any more. A mark on the overlay, an extended attribute, tells: what the file below
was when the last backup had ended. Where the file system keeps none, nothing is put back.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress

from backupcore_libvirt.stamps import changed, stamps_below

__all__ = ["announce", "has_lost_its_note", "is_unwritten", "mark", "note", "written"]

_NAME = "user.backupcore.base"
_LONGEST = 1024
_BELOW = "user.backupcore.below"
_DUE, _TOO_LONG = b"due", b"long"
_NO_ROOM = (errno.ENOSPC, errno.E2BIG, errno.ERANGE)


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


def announce(overlay: str) -> None:
    """Have an overlay bear that its `note` is due: what lies below is merged first."""
    with suppress(OSError):  # as above
        os.setxattr(overlay, _BELOW, _DUE, follow_symlinks=False)


def note(overlay: str) -> None:
    """Write down what all files below an overlay are by now: what it holds counts from them.

    Only where no overlay of ours is among them: one that is shall be merged, and that writes to the one below.
    """
    text = json.dumps(stamps_below(overlay, "qcow2")).encode()
    with suppress(OSError):  # as above
        try:
            os.setxattr(overlay, _BELOW, text, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            # A long chain may be more than a file system takes. That there was a note at all still counts.
            os.setxattr(overlay, _BELOW, _TOO_LONG, follow_symlinks=False)


def written(overlay: str) -> str | None:
    """Which of the files below an overlay were written to, or exchanged, since `note`, as a reason; "" if none was;
    None where nothing tells.
    """
    try:
        noted = json.loads(os.getxattr(overlay, _BELOW, follow_symlinks=False))
        then = tuple((str(path), int(inode), int(size), int(time)) for path, inode, size, time in noted)
    except (OSError, ValueError, TypeError):
        return None
    return changed(then, stamps_below(overlay, "qcow2"))


def has_lost_its_note(overlay: str) -> bool:
    """Whether an overlay has no note, not even a due one, where its file system would keep that: it is another file
    than a run of ours has put there, and nothing tells what was written past it; or an older version has made it.
    """
    try:
        os.getxattr(overlay, _BELOW, follow_symlinks=False)
    except OSError as error:
        return error.errno == errno.ENODATA
    return False


def _stamp(base: str) -> bytes:
    # Not the time of its last change of owner or mode: libvirt changes both as a VM starts and stops.
    found = os.stat(base)  # noqa: PTH116 - as the calls above, which pathlib has not
    return json.dumps([found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]).encode()
