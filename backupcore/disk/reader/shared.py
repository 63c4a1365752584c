"""Memory of an owner that its reader fills by itself, without a copy."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import weakref
from dataclasses import dataclass

from backupcore.disk.reader.channel import new

__all__ = ["Memory", "memory", "place_of"]

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Memory:
    """Shared memory: its descriptor, its number in this process, where it begins, and what is told of its end."""

    descriptor: int
    number: int
    address: int


_known: weakref.WeakKeyDictionary[mmap.mmap, Memory] = weakref.WeakKeyDictionary()


def memory(size: int) -> memoryview:
    """`size` bytes that begin with a page, to read a disk into: where its artifact has a reader, that fills them.

    They cost page faults once: use them again.
    """
    descriptor = new(max(size, 1))
    try:
        pages = mmap.mmap(descriptor, max(size, 1))
    except BaseException:
        os.close(descriptor)
        raise
    _known[pages] = Memory(descriptor, next(_numbers), ctypes.addressof(ctypes.c_char.from_buffer(pages)))
    weakref.finalize(pages, os.close, descriptor)
    return memoryview(pages)[:size]


def place_of(buffer: memoryview) -> tuple[mmap.mmap, Memory, int] | None:
    """The shared memory in which a buffer lies, and where in it; None if it lies elsewhere."""
    pages = buffer.obj
    if not isinstance(pages, mmap.mmap) or not buffer.c_contiguous:
        return None
    found = _known.get(pages)
    if found is None:
        return None
    return pages, found, ctypes.addressof(ctypes.c_char.from_buffer(buffer)) - found.address
