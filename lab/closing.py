"""A site plugin that closes every file of the process, at the step that LAB_CLOSE names (`backupcore.testing.faults`).

A configuration names it as ``plugins = ["lab.closing:faults"]``.
"""

from __future__ import annotations

import os

from backupcore.context import Context
from backupcore.testing.faults import Faults

__all__ = ["faults"]


def _close(_ctx: Context) -> None:
    os.closerange(3, 4096)


faults = Faults({os.environ["LAB_CLOSE"]: _close})
