"""A disk image behind an NBD server on a unix socket."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["served"]


@contextmanager
def served(image: Path, shape: str, socket: Path) -> Iterator[str]:
    """The URI of the image, of format `shape` (with "raw" the file as it lies), served by qemu-nbd until the end.

    A VM may run on it: its QEMU holds the lock, and nothing must be written meanwhile.
    """
    options = f"driver={shape},force-share=on,file.filename={image}"
    command = ["qemu-nbd", "-r", "-t", "-e", "8", "-k", str(socket), "-x", "vda", "--image-opts", options]
    server = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 10
        while not socket.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("qemu-nbd does not listen")
            time.sleep(0.02)
        yield f"nbd+unix:///vda?socket={socket}"
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)
