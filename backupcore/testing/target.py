"""What the kit examines: a driver, the options of one datastore, and what only its author can tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from backupcore.datastore import Datastore
from backupcore.model import SourceRef
from backupcore.options import build
from backupcore.plugins import DRIVERS, load

__all__ = ["Target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One datastore that a driver is examined with. Others' backups may lie in it; the kit leaves them alone.

    - `driver`: the entry-point name of an installed driver, a class made by `backupcore.driver`, or a driver object
      (one that lives in this process only: what needs a second process does not apply to it).
    - `options`: its options, as the configuration has them.
    - `tamper(source, artifact)`: change a stored byte of that artifact, behind the driver's back. The datastore may be
      of no use afterwards; the check that calls it is the last one.
    - `secrets`: values that no log, error, `repr` or command line may show (the password itself, not its file).
    - `away`: the options of a datastore that does not answer (a folder that is not there, a port that is closed).
    - `stall()`: a context manager; while its block runs the store takes what it is sent and answers nothing.
    - `fail()`: one in whose block the store refuses all that it is to keep or to delete: no room, an error 500.
    - `lock(source)`: one in whose block the store refuses to delete that source, by a lock of its own.
    - `new()`: the options of a datastore that is there and empty, another one each time: what it is known by is tried
      there. It is thrown away by whoever made it.
    - `patience`: seconds after which a cancelled backup must have ended, and every process of one that is over.
    - `large`: the size of the largest artifact that is kept, nearly all of it zeros. Beyond 4 GiB some drivers count
      wrongly; give less only where that takes too long, and a second class that runs less often the rest.
    """

    driver: str | type | object
    options: Mapping[str, object] = field(default_factory=dict, repr=False)
    tamper: Callable[[SourceRef, str], None] | None = None
    secrets: Sequence[str] = field(default=(), repr=False)
    away: Mapping[str, object] | None = field(default=None, repr=False)
    stall: Callable[[], AbstractContextManager[object]] | None = None
    fail: Callable[[], AbstractContextManager[object]] | None = None
    lock: Callable[[SourceRef], AbstractContextManager[object]] | None = None
    new: Callable[[], Mapping[str, object]] | None = None
    patience: float = 30.0
    large: int = (4 << 30) + (1 << 20) + 4097

    @property
    def elsewhere(self) -> Target:
        """The same for another process, which gets no functions."""
        return replace(self, tamper=None, stall=None, fail=None, lock=None, new=None)

    @property
    def kind(self) -> type | None:
        """The driver's class; None where an object was given."""
        if isinstance(self.driver, str):
            loaded: type = load(DRIVERS, self.driver)
            return loaded
        return self.driver if isinstance(self.driver, type) else None

    @property
    def name(self) -> str:
        """How reports call the driver."""
        if isinstance(self.driver, str):
            return self.driver
        return (self.kind or type(self.driver)).__name__

    def build(self, options: Mapping[str, object] | None = None) -> Any:
        """A new driver object, with other options if they are given; an object that was given as it is."""
        kind = self.kind
        if kind is None:
            return self.driver
        return build(kind, self.options if options is None else options, where=self.name)

    def open(
        self,
        *,
        hypervisor: object | None = None,
        plugins: Sequence[object] = (),
        options: Mapping[str, object] | None = None,
    ) -> Datastore:
        """A datastore with a driver object of its own. Deprecated: `plugins` alone, the first being the hypervisor."""
        named = {} if hypervisor is None and plugins else {"hypervisor": hypervisor}
        return Datastore("kit", self.build(options), kind=self.name, plugins=plugins, **named)
