"""Damage in the store is noticed."""

from __future__ import annotations

from random import Random

from backupcore.errors import IntegrityError
from backupcore.testing.bench import MIB, Bench, NotApplicable
from backupcore.testing.checks.whole import read_back, take
from backupcore.testing.guest import MemoryGuest, MemoryHypervisor


def damage(bench: Bench) -> None:
    """A byte that was changed in the store is an IntegrityError when it is restored."""
    tamper = bench.target.tamper
    if tamper is None:
        raise NotApplicable("the target has no function that tampers with what is stored")
    random = Random(6)  # noqa: S311 - no secret
    for artifact in ("disk.vda.qcow2", "manifest.json"):
        guest = MemoryGuest(bench.vm(), {"vda": bytearray(random.randbytes(MIB))})
        image = take(bench, MemoryHypervisor([guest]), guest, None)
        tamper(image.increments[0].source, artifact)
        with bench.refused(IntegrityError, what=f"a restore after a byte of {artifact} was changed in the store"):
            read_back(bench, image, 0)
