"""What tests of drivers and of host tooling stand on.

- the conformance kit for drivers: `DriverKit` (a class for pytest) and `examine` (without pytest), on a `Target`
- a driver and a hypervisor that live in memory: `MemoryDriver`, `MemoryGuest`, `MemoryHypervisor`. Both are ordinary
  plugins that keep the contract, so they also serve as its shortest examples
- `Faults`, a plugin that fails, hangs or dies at a step that you name

``pip install backupcore[testing]`` brings what `DriverKit` needs: pytest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backupcore.testing.checks import CHECKS as CHECKS
    from backupcore.testing.checks import Check as Check
    from backupcore.testing.driverkit import DriverKit as DriverKit
    from backupcore.testing.examination import Result as Result
    from backupcore.testing.examination import Verdict as Verdict
    from backupcore.testing.examination import chosen as chosen
    from backupcore.testing.examination import examine as examine
    from backupcore.testing.faults import Fault as Fault
    from backupcore.testing.faults import Faults as Faults
    from backupcore.testing.faults import fails as fails
    from backupcore.testing.faults import hangs as hangs
    from backupcore.testing.faults import kills as kills
    from backupcore.testing.guest import MemoryGuest as MemoryGuest
    from backupcore.testing.guest import MemoryHypervisor as MemoryHypervisor
    from backupcore.testing.memory import MemoryDriver as MemoryDriver
    from backupcore.testing.target import Target as Target

_WHERE = {
    "CHECKS": "checks",
    "Check": "checks",
    "DriverKit": "driverkit",
    "Result": "examination",
    "Fault": "faults",
    "Faults": "faults",
    "MemoryDriver": "memory",
    "MemoryGuest": "guest",
    "MemoryHypervisor": "guest",
    "Target": "target",
    "Verdict": "examination",
    "chosen": "examination",
    "examine": "examination",
    "fails": "faults",
    "hangs": "faults",
    "kills": "faults",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    # pytest and the data plane are loaded by whoever uses them.
    if name in _WHERE:
        return getattr(import_module(f"backupcore.testing.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'backupcore.testing' has no attribute {name!r}")
