"""The portable type in front of a driver: one method per verb, and all that drivers should not repeat."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, BinaryIO

import pluggy

from backupcore import hookspecs
from backupcore.answers import checked_artifacts, checked_listed, checked_locks, checked_stored, checked_usage
from backupcore.context import Context
from backupcore.errors import BackupError, ContractViolation
from backupcore.exact import Exact
from backupcore.hooks import check_hooks, implements
from backupcore.model import (
    Artifact,
    BackupRun,
    Listed,
    Merge,
    Outcome,
    Prepared,
    RunState,
    SourceRef,
    Stored,
    Usage,
    is_token,
    itself,
    stream,
)
from backupcore.options import build
from backupcore.plugins import DRIVERS, load
from backupcore.strays import translated

__all__ = ["Datastore"]

REQUIRED = ("backup", "restore", "delete", "sources")
_OLD: Any = object()
"""Stands for a `hypervisor` that was not given, as before there was such an argument."""


class Datastore:
    """A configured place for backups: a name, a driver, and the plugins that take part in its runs.

    Callers hold a Datastore and never a driver. Every method may raise what `backupcore.errors` lists; an answer that
    breaks the contract is a ContractViolation that names the driver.
    """

    def __init__(
        self,
        name: str,
        driver: object,
        *,
        kind: str = "",
        hypervisor: object | None = _OLD,
        plugins: Sequence[object] = (),
    ) -> None:
        """`driver` is a driver object, `hypervisor` the plugin for the VMs' side or None, `plugins` are site plugins.

        Nothing is contacted. Deprecated: without `hypervisor` the first of `plugins` is taken for it.
        """
        hypervisor, plugins = _sorted_out(hypervisor, plugins)
        self.name = name
        self.kind = kind or type(driver).__name__
        self._driver = driver
        self._hypervisor = hypervisor
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        # pluggy calls the last registered first: site plugins wrap, then the driver, then the hypervisor.
        self._plugins = [one for one in (hypervisor, driver, *plugins) if one is not None]
        for plugin in self._plugins:
            what = f"driver {self.kind}" if plugin is driver else f"plugin {type(plugin).__name__}"
            with translated(f"{what} of datastore {name}", "looking at its hooks"):
                check_hooks(plugin, what, required=REQUIRED if plugin is driver else ())
                self._manager.register(plugin)
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise ContractViolation(f"datastore {name}: {error}") from error

    @classmethod
    def open(
        cls,
        name: str,
        options: Mapping[str, object],
        *,
        hypervisor: object | None = _OLD,
        plugins: Sequence[object] = (),
    ) -> Datastore:
        """The datastore of a configuration table: `options` holds ``driver`` (an entry-point name) and its options.

        `hypervisor` and `plugins` as for the class. ConfigError if the driver is not installed or an option is wrong.
        Nothing is contacted.
        """
        kind = str(options.get("driver", ""))
        rest = {key: value for key, value in options.items() if key != "driver"}
        made = build(load(DRIVERS, kind), rest, where=f"datastores.{name}")
        return cls(name, made, kind=kind, hypervisor=hypervisor, plugins=plugins)

    # The run

    def prebackup(self, run: BackupRun, ctx: Context) -> Prepared:
        """Every plugin's `prebackup`; the one Prepared among their answers."""
        answers = self._call("prebackup", run=run, ctx=ctx)
        if len(answers) != 1 or not isinstance(answers[0], Prepared):
            kinds = ", ".join(type(answer).__name__ for answer in answers)
            raise ContractViolation(
                f"{len(answers)} plugins prepared {run.vm.name}{f' ({kinds})' if kinds else ''}; exactly one, the "
                f"hypervisor, must: driver {self.kind} returns None from prebackup"
            )
        return answers[0]

    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
        """The driver's `backup`. A read of an artifact that gives more or less than it promised fails it."""
        given = tuple(_Given(artifact, ctx) for artifact in artifacts)
        return self._stored("backup", self._call("backup", artifacts=given, run=run, ctx=ctx))

    def flatten(self, merge: Merge, run: BackupRun, ctx: Context) -> Stored | None:
        """The driver's own way of keeping the result of a merge; None where it has none, or cannot do it for these."""
        if not self.flattens:
            return None
        stored = self._call("flatten", merge=merge, run=run, ctx=ctx)
        return None if stored is None else self._stored("flatten", stored)

    @property
    def flattens(self) -> bool:
        """Whether the driver has a way of its own to flatten."""
        return self.implements("flatten")

    def postbackup(self, run: BackupRun, outcome: Outcome, ctx: Context) -> list[BackupError]:
        """Each plugin's `postbackup` by itself, the hypervisor first; what failed is returned, for the caller to tell.

        Of a run that was not recorded, the context is told as well what the driver leaves in the datastore.
        """
        errors: list[BackupError] = []
        parties = [plugin for plugin in self._plugins if implements(plugin, "postbackup")]
        for party in parties:
            # One by one, since a broadcast ends at the first error; wrappers stay around each of them.
            others = [plugin for plugin in parties if plugin is not party]
            caller = self._manager.subset_hook_caller("postbackup", others)
            witness = _Witness(party)
            self._manager.register(witness)
            try:
                for call in (caller, witness.call_party):
                    try:
                        with self._translated("postbackup"):
                            call(run=run, outcome=outcome, ctx=ctx)
                    except BackupError as error:
                        errors.append(error)
                        if party is self._driver and outcome.state is not RunState.RECORDED:
                            ctx.owes(
                                f"what run {run.id[:8]} had begun to store stays there until the next backup of "
                                f"{run.vm.name} to it sweeps it ({error.message})"
                            )
                    else:
                        ctx.released = ctx.released or (party is self._hypervisor and witness.called)
                    if witness.called:
                        break
            finally:
                self._manager.unregister(witness)
        return errors

    # Other verbs

    def artifacts(self, source: SourceRef, ctx: Context) -> dict[str, Artifact]:
        """The artifacts of a source by name. One that is shorter or longer than it says is an IntegrityError."""
        with self._translated("restore"):
            found = checked_artifacts(self._answer("restore", Sequence, source=source, ctx=ctx), source)
            return {
                name: Exact(artifact, name=name, size=size, place=f"{self.name}:{source}", whose=self._whose, ctx=ctx)
                for name, (artifact, size) in found.items()
            }

    def delete(self, sources: Sequence[SourceRef], ctx: Context) -> None:
        """Remove sources; those that are gone already are no error."""
        if sources and self._answer("delete", bool, sources=tuple(sources), ctx=ctx) is not True:
            raise ContractViolation(f"driver {self.kind}: delete did not delete {', '.join(map(str, sources))}")

    def sources(self, ctx: Context, vm: str = "", *, known: Collection[SourceRef] = ()) -> list[Listed]:
        """Every complete source in the datastore, of all VMs and hosts.

        With `vm` (a UUID) those of that VM at least, among which may be some that are not complete. Of those that are
        `known` then labels and size may be missing.
        """
        if vm and self.implements("sources_of"):
            with self._translated("sources_of"):
                return checked_listed(
                    self._answer("sources_of", object, vm=vm, known=frozenset(known), ctx=ctx), ctx.check
                )
        with self._translated("sources"):
            return checked_listed(self._answer("sources", object, ctx=ctx), ctx.check)

    def check(self, ctx: Context) -> None:
        """Raise what is wrong with the datastore, if anything is. A driver without `check` is asked for its sources."""
        if self.implements("check"):
            if self._answer("check", bool, ctx=ctx) is not True:
                raise ContractViolation(f"driver {self.kind}: check returned False: it must raise what is wrong")
        else:
            self.sources(ctx)

    def usage(self, ctx: Context) -> Usage:
        """How full the datastore is, as far as its driver says."""
        if not self.implements("usage"):
            return Usage()
        with self._translated("usage"):
            return checked_usage(self._answer("usage", Usage, ctx=ctx))

    def locks(self, sources: Sequence[SourceRef], ctx: Context) -> dict[SourceRef, datetime | None]:
        """Those of these sources that the datastore would not delete now, and until when; {} where it cannot say."""
        if not sources or not self.implements("locks"):
            return {}
        with self._translated("locks"):
            return checked_locks(self._answer("locks", Mapping, sources=tuple(sources), ctx=ctx), sources)

    def maintain(self, ctx: Context) -> bool:
        """Let the driver tidy up and look for damage, which may take hours; False if it has nothing of the kind."""
        return self.implements("maintain") and self._answer("maintain", bool, ctx=ctx) is True

    def identity(self, known: str, ctx: Context, *, make: bool = False) -> str | None:
        """What stays the same for as long as this is the same place; None if it has none, or the driver knows none.

        `known` is what it was before ("": not known). With `make` a place that has none gets one.
        """
        found = self._call("identity", known=known, make=make, ctx=ctx) if self.implements("identity") else None
        if found is not None and not is_token(found):
            raise ContractViolation(f"driver {self.kind}: identity returned what is made like no token")
        return found

    # Calling

    def implements(self, hook: str) -> bool:
        """Whether the driver itself has this hook: what it leaves out, the core does or does without."""
        return implements(self._driver, hook)

    def _stored(self, hook: str, stored: object) -> Stored:
        with self._translated(hook):
            return checked_stored(hook, stored)

    def _call(self, hook: str, **arguments: Any) -> Any:
        with self._translated(hook):
            return getattr(self._manager.hook, hook)(**arguments)

    def _answer(self, hook: str, kind: type, **arguments: Any) -> Any:
        answer = self._call(hook, **arguments)
        if answer is None or not isinstance(answer, kind):
            raise ContractViolation(f"driver {self.kind}: {hook} returned {type(answer).__name__}")
        return answer

    @property
    def _whose(self) -> str:
        return f"driver {self.kind} of datastore {self.name}"

    def _translated(self, hook: str) -> AbstractContextManager[None]:
        return translated(self._whose, hook)


def _sorted_out(hypervisor: object | None, plugins: Sequence[object]) -> tuple[object | None, Sequence[object]]:
    """The hypervisor and the site plugins, also of a caller that gives both as `plugins`."""
    if hypervisor is not _OLD:
        return hypervisor, plugins
    if not plugins:
        return None, ()
    warnings.warn(
        "plugins=[hypervisor, …] is deprecated: Datastore(…, hypervisor=hypervisor, plugins=[…])",
        DeprecationWarning,
        stacklevel=3,
    )
    return plugins[0], plugins[1:]


class _Witness:
    """Is called right before a plugin's own `postbackup`, and calls it where no call has come so far.

    That is where a site plugin's wrapper raised before its yield: the guest must be released all the same.
    """

    def __init__(self, party: object) -> None:
        self.called = False
        self._party: Any = party

    @hookspecs.hookimpl(tryfirst=True)
    def postbackup(self) -> None:
        """Notes that all wrappers have let the call through."""
        self.called = True

    def call_party(self, **arguments: Any) -> None:
        """Call the plugin with those of the arguments that it takes."""
        self.called = True
        names = inspect.signature(self._party.postbackup).parameters
        self._party.postbackup(**{name: value for name, value in arguments.items() if name in names})


class _Given(Artifact):
    """What a driver reads from: it notices a cancelled run, and that a giver breaks its promise.

    In another process it is the artifact itself: the context stays here, and the file view counts bytes as well.
    """

    def __init__(self, inner: Artifact, ctx: Context) -> None:
        self._inner = inner
        self._ctx = ctx
        self.name = inner.name
        self.size = inner.size

    def open(self) -> BinaryIO:
        return stream(self)

    def read_at(self, offset: int, length: int) -> bytes:
        self._check()
        data = self._inner.read_at(offset, length)
        self._exactly(offset, length, len(data))
        return data

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self._check()
        count = self._inner.read_into(offset, buffer)
        self._exactly(offset, len(buffer), count)
        return count

    def _check(self) -> None:
        self._ctx.check()

    def _exactly(self, offset: int, length: int, count: int) -> None:
        self._check()  # once more: after the last read a driver publishes
        promised = max(0, min(length, self.size - offset))
        if count != promised:
            raise ContractViolation(
                f"artifact {self.name} gave {count} of {promised} bytes at {offset} of {self.size}",
                "Whoever prepared the backup is at fault, not the datastore.",
            )

    def close(self) -> None:
        self._inner.close()

    def __reduce__(self) -> tuple[Callable[[Artifact], Artifact], tuple[Artifact]]:
        return itself, (self._inner,)
