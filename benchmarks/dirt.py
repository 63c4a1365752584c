"""What a guest changes between two backups, written through its own device."""

from __future__ import annotations

import os

from benchmarks.figures import MIB
from lab.vm import VM

__all__ = ["ISLAND", "islands", "one_place", "percent", "zeroes"]

ISLAND = 64 << 10
_REQUEST = 1 << 30  # bytes; QEMU refuses a request of 2 GiB


def percent(data: int) -> int:
    """One per cent of `data` bytes, in whole MiB."""
    return max(data // 100 // MIB, 1) * MIB


def one_place(vm: VM, amount: int) -> None:
    """Change `amount` bytes (whole MiB) in one place."""
    vm.io("vda", f"write -P {_pattern()} {MIB} {amount}")


def islands(vm: VM, size: int, amount: int, shift: int = 0) -> None:
    """Change `amount` bytes in islands of 64 KiB, evenly over a disk of `size`; `shift` moves all by that many."""
    count, pattern = amount // ISLAND, _pattern()
    step = size // count // ISLAND * ISLAND
    vm.io(
        "vda",
        *(f"write -P {pattern} {(number * step + shift * ISLAND) % size} {ISLAND}" for number in range(count)),
    )


def zeroes(vm: VM, size: int) -> None:
    """Turn the whole disk into zeros."""
    vm.io("vda", *(f"write -z {at} {min(_REQUEST, size - at)}" for at in range(0, size, _REQUEST)))


def _pattern() -> int:
    return os.urandom(1)[0] | 1  # never zeros, which would be another case
