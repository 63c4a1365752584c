"""How long the lab waits for a condition: LAB_PATIENCE=5 makes each limit five times as long, for an emulated host.

What the product promises is never stretched by it: only how long a test waits until it calls something hung.
"""

from __future__ import annotations

import os


def patient(seconds: float) -> float:
    """A limit of the lab's, as long as this machine needs it."""
    return seconds * float(os.environ.get("LAB_PATIENCE", "1"))
