"""A process of its own that reads a guest's disks for the process of the run, its *owner*.

It connects to the disks, hashes what it reads and hands it over in shared memory. It never touches the datastore: so a
kill ends its connections to the guest at once, whatever its owner hangs in. The kernel ends them even where the owner
waits for a target that does not answer.

The owner holds a `Reader`: `Reader.show` gives an artifact whose bytes are read over there, `Reader.call` runs a
function there. `start` starts the process; who forks it himself runs `serve` in it, on the other end of a `pair`.

`memory` is memory for the bytes of disks that a reader fills by itself.

Between the two there is one *control* socket, whose end is the end of the process, and some *channels*: each a socket
for words and a *slot* of shared memory for bytes (`backupcore.disk.reader.channel`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backupcore.disk.reader.reader import Reader as Reader
    from backupcore.disk.reader.reader import start as start
    from backupcore.disk.reader.service import pair as pair
    from backupcore.disk.reader.service import serve as serve
    from backupcore.disk.reader.shared import memory as memory

# Loaded when they are needed: the process itself does without what its owner needs.
_WHERE = {"Reader": "reader", "start": "reader", "memory": "shared", "pair": "service", "serve": "service"}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
