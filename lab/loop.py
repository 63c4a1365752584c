"""Block devices for tests, which a file holds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["loop_device"]


@contextmanager
def loop_device(file: Path, content: bytes, *options: str) -> Iterator[Path]:
    """A block device with this content, which a new `file` holds, within the block; `options` are losetup's.

    Whoever is not root skips the test.
    """
    if os.geteuid():
        pytest.skip("only root can set up a loop device")
    file.write_bytes(content)
    command = ["losetup", *options, "--find", "--show", str(file)]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(made)
    finally:
        subprocess.run(["losetup", "--detach", made], check=True)
