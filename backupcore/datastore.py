"""The portable type in front of a driver: one method per verb, and all that drivers should not repeat."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pluggy

from backupcore import hookspecs
from backupcore.context import Context
from backupcore.errors import BackupError, Cancelled, ContractViolation, IntegrityError, from_os_error, text_of
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
    check_name,
    itself,
    stream,
)
from backupcore.options import build
from backupcore.plugins import DRIVERS, load

__all__ = ["Datastore"]

REQUIRED = ("backup", "restore", "delete", "sources")


class Datastore:
    """A configured place for backups: a name, a driver, and the plugins that take part in its runs.

    Callers hold a Datastore and never a driver. Every method may raise what `backupcore.errors` lists; an answer that
    breaks the contract is a ContractViolation that names the driver.
    """

    def __init__(self, name: str, driver: object, *, kind: str = "", plugins: Sequence[object] = ()) -> None:
        """`driver` is a driver object; `plugins` are the hypervisor, then site plugins. Nothing is contacted."""
        self.name = name
        self.kind = kind or type(driver).__name__
        self._driver = driver
        self._hypervisor = plugins[0] if plugins else None
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        # pluggy calls the last registered first: site plugins wrap, then the driver, then the hypervisor.
        self._plugins = [*plugins[:1], driver, *plugins[1:]]
        for plugin in self._plugins:
            _check_hooks(plugin)
            self._manager.register(plugin)
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise ContractViolation(f"datastore {name}: {error}") from error
        missing = [hook for hook in REQUIRED if not _implements(driver, hook)]
        if missing:
            raise ContractViolation(f"driver {self.kind} does not implement: {', '.join(missing)}")

    @classmethod
    def open(cls, name: str, options: Mapping[str, object], *, plugins: Sequence[object] = ()) -> Datastore:
        """The datastore of a configuration table: `options` holds ``driver`` (an entry-point name) and its options.

        ConfigError if the driver is not installed or an option is wrong. Nothing is contacted.
        """
        kind = str(options.get("driver", ""))
        rest = {key: value for key, value in options.items() if key != "driver"}
        return cls(name, build(load(DRIVERS, kind), rest, where=f"datastores.{name}"), kind=kind, plugins=plugins)

    # The run

    def prebackup(self, run: BackupRun, ctx: Context) -> Prepared:
        """Every plugin's `prebackup`; the one Prepared among their answers."""
        answers = self._call("prebackup", run=run, ctx=ctx)
        if len(answers) != 1 or not isinstance(answers[0], Prepared):
            raise ContractViolation(f"{len(answers)} plugins prepared {run.vm.name}; exactly one hypervisor must")
        return answers[0]

    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
        """The driver's `backup`. A read of an artifact that gives more or less than it promised fails it."""
        given = tuple(_Given(artifact, ctx) for artifact in artifacts)
        return self._stored("backup", self._answer("backup", Stored, artifacts=given, run=run, ctx=ctx))

    def flatten(self, merge: Merge, run: BackupRun, ctx: Context) -> Stored | None:
        """The driver's own way of keeping the result of a merge; None where it has none, or cannot do it for these."""
        if not self.flattens:
            return None
        stored = self._call("flatten", merge=merge, run=run, ctx=ctx)
        if stored is not None and not isinstance(stored, Stored):
            raise ContractViolation(f"driver {self.kind}: flatten returned {type(stored).__name__}")
        return stored

    @property
    def flattens(self) -> bool:
        """Whether the driver has a way of its own to flatten."""
        return self.implements("flatten")

    def postbackup(self, run: BackupRun, outcome: Outcome, ctx: Context) -> list[BackupError]:
        """Each plugin's `postbackup` by itself, the hypervisor first; what failed is returned, for the caller to tell.

        Of a run that was not recorded, the context is told as well what the driver leaves in the datastore.
        """
        errors: list[BackupError] = []
        parties = [plugin for plugin in self._plugins if _implements(plugin, "postbackup")]
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
        found = self._answer("restore", Sequence, source=source, ctx=ctx)
        by_name = {check_name(artifact.name): _Exact(artifact, f"{self.name}:{source}", ctx) for artifact in found}
        if len(by_name) != len(found):
            raise ContractViolation(f"driver {self.kind} names an artifact of {source} twice")
        return dict(by_name)

    def delete(self, sources: Sequence[SourceRef], ctx: Context) -> None:
        """Remove sources; those that are gone already are no error."""
        if sources and self._answer("delete", bool, sources=tuple(sources), ctx=ctx) is not True:
            raise ContractViolation(f"driver {self.kind} did not delete: {', '.join(map(str, sources))}")

    def sources(self, ctx: Context) -> list[Listed]:
        """Every complete source in the datastore, of all VMs and hosts."""
        with self._translated("sources"):
            return list(self._answer("sources", object, ctx=ctx))

    def check(self, ctx: Context) -> None:
        """Raise what is wrong with the datastore, if anything is. A driver without `check` is asked for its sources."""
        if self.implements("check"):
            self._answer("check", bool, ctx=ctx)
        else:
            self.sources(ctx)

    def usage(self, ctx: Context) -> Usage:
        """How full the datastore is, as far as its driver says."""
        found: Usage = self._answer("usage", Usage, ctx=ctx) if self.implements("usage") else Usage()
        return found

    def maintain(self, ctx: Context) -> bool:
        """Let the driver tidy up and look for damage, which may take hours; False if it has nothing of the kind."""
        return self.implements("maintain") and self._answer("maintain", bool, ctx=ctx) is True

    # Calling

    def implements(self, hook: str) -> bool:
        """Whether the driver itself has this hook: what it leaves out, the core does or does without."""
        return _implements(self._driver, hook)

    def _stored(self, hook: str, stored: Stored) -> Stored:
        if not isinstance(stored.source, SourceRef):
            raise ContractViolation(f"driver {self.kind}: {hook} returned a source that is no SourceRef")
        return stored

    def _call(self, hook: str, **arguments: Any) -> Any:
        with self._translated(hook):
            return getattr(self._manager.hook, hook)(**arguments)

    def _answer(self, hook: str, kind: type, **arguments: Any) -> Any:
        answer = self._call(hook, **arguments)
        if answer is None or not isinstance(answer, kind):
            raise ContractViolation(f"driver {self.kind}: {hook} returned {type(answer).__name__}")
        return answer

    @contextmanager
    def _translated(self, hook: str) -> Iterator[None]:
        """Errors of the taxonomy pass; an OSError becomes one; anything else is the plugin's own bug."""
        process = os.getpid()
        try:
            try:
                yield
            finally:
                if os.getpid() != process:
                    # A child that the plugin forked and did not end: there must not be two at work on one run.
                    os._exit(1)
        except BackupError:
            raise
        except OSError as error:
            raise from_os_error(error, f"datastore {self.name}, {hook}") from error
        except KeyboardInterrupt as error:
            raise Cancelled("cancelled") from error
        # Whatever it is: a plugin, or its library, that ends the program (SystemExit), or lets a task of asyncio be
        # cancelled (CancelledError, no Exception), ends nothing here.
        except BaseException as error:
            raise ContractViolation(
                f"datastore {self.name}: {hook} failed with {type(error).__name__}: {text_of(error)}",
                "This is a bug of a plugin or of this program; -v shows where.",
            ) from error


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


class _Exact(Artifact):
    """A stored artifact whose length is held against what it promised. Pickled, it leaves the context behind."""

    def __init__(self, inner: Artifact, what: str, ctx: Context | None) -> None:
        self._inner = inner
        self._what = f"{what}//{inner.name}"
        self._ctx = ctx
        self.name = inner.name
        self.size = inner.size
        self.seekable = inner.seekable

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ctx": None}

    def open(self) -> BinaryIO:
        with _reading(self._what):
            inner = self._inner.open()
        return io.BufferedReader(_ExactStream(inner, self.size, self._what, self._ctx), 1 << 20)

    def read_at(self, offset: int, length: int) -> bytes:
        if self._ctx is not None:
            self._ctx.check()
        with _reading(self._what):
            data = self._inner.read_at(offset, length)
        self._exactly(offset, length, len(data))
        return data

    def read_into(self, offset: int, buffer: memoryview) -> int:
        if self._ctx is not None:
            self._ctx.check()
        with _reading(self._what):
            count = self._inner.read_into(offset, buffer)
        self._exactly(offset, len(buffer), count)
        return count

    def _exactly(self, offset: int, length: int, count: int) -> None:
        if count != max(0, min(length, self.size - offset)):
            raise IntegrityError(f"{self._what}: {count} bytes at {offset} instead of {length}")


class _ExactStream(io.RawIOBase):
    def __init__(self, inner: BinaryIO, size: int, what: str, ctx: Context | None) -> None:
        super().__init__()
        self._inner = inner
        self._left = size
        self._what = what
        self._ctx = ctx

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # Buffer has no length
        if self._ctx is not None:
            self._ctx.check()
        with _reading(self._what):
            data = self._inner.read(len(buffer))
        if not data and self._left:
            raise IntegrityError(f"{self._what} ends {self._left} bytes early", "Verify the image.")
        if len(data) > self._left:
            raise IntegrityError(f"{self._what} is longer than it promised", "Verify the image.")
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, f"reading {what}") from error


def _implements(plugin: object, hook: str) -> bool:
    method = getattr(plugin, hook, None)
    options = getattr(method, f"{hookspecs.PROJECT}_impl", None)
    return options is not None and not options["wrapper"] and not options["hookwrapper"]


def _check_hooks(plugin: object) -> None:
    """pluggy never passes an argument that has a default, so such a hook would work on the default for ever."""
    for name in dir(type(plugin)):
        method = getattr(plugin, name, None)
        if getattr(method, f"{hookspecs.PROJECT}_impl", None) is None:
            continue
        for parameter in inspect.signature(method).parameters.values():  # type: ignore[arg-type]  # a hook is callable
            if parameter.default is not inspect.Parameter.empty:
                raise ContractViolation(
                    f"{type(plugin).__name__}.{name}: argument {parameter.name} has a default, which is never filled"
                )
