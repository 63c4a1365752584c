"""The bench: what the checks of the kit work with. It keeps backups, reads them back, and says what is not right."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backupcore.context import Context
from backupcore.datastore import Datastore
from backupcore.disk.mountpoints import unmount_below
from backupcore.errors import BackupError, SourceNotFound
from backupcore.manifest import NAME
from backupcore.model import (
    VM,
    Artifact,
    BackupRun,
    BytesArtifact,
    Link,
    Listed,
    SourceRef,
    Type,
    new_id,
)
from backupcore.testing.given import Made
from backupcore.testing.life import NoVM, digest, keep
from backupcore.testing.processes import below, survivors
from backupcore.testing.target import Target

__all__ = ["Bench", "Failed", "Kept", "NotApplicable"]

KIB = 1 << 10
MIB = 1 << 20


class Failed(Exception):
    """The driver did not pass a check; the message says what it did."""


class NotApplicable(Exception):
    """A check has nothing to look at; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A backup that the bench has made: its source, its run, and what went into it."""

    source: SourceRef
    run: BackupRun
    artifacts: tuple[Artifact, ...]


class Bench:
    """One target, and a private folder. `clean_up` deletes the backups that were made."""

    def __init__(
        self, target: Target, folder: Path, *, logged: list[str] | None = None, told: list[str] | None = None
    ) -> None:
        """`logged` and `told` may come from a bench before: see there."""
        self.target = target
        self.folder = folder
        self.made: list[SourceRef] = []
        self.vms: set[str] = set()
        self._contexts: list[Context] = []
        self._interrupted = False
        self.logged: list[str] = [] if logged is None else logged
        """Every line that was logged: none may show a secret."""
        self.told: list[str] = [] if told is None else told
        """Every error that came out of the driver, in full: none may show one either."""
        self._heard = _Heard(self.logged)
        self.log = logging.getLogger("backupcore")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block runs, everything that is logged is heard; the user sees no more of it than before."""
        before, shown = self.log.level, self.log.getEffectiveLevel()
        others = [(handler, handler.level) for handler in self.log.handlers]
        for handler, level in others:
            handler.setLevel(max(level, shown))
        self.log.setLevel(logging.DEBUG)
        self.log.addHandler(self._heard)
        try:
            yield
        finally:
            self.log.removeHandler(self._heard)
            self.log.setLevel(before)
            for handler, level in others:
                handler.setLevel(level)

    def clean_up(self) -> None:
        """Delete every backup that was made here, also those that nobody was told of. Errors are logged."""
        if not self.vms:
            return  # nothing was: what hinders the driver was told
        try:
            self._delete()
        except BackupError as error:
            self.log.warning("what the kit has kept could not be deleted: %s", error)

    def _delete(self) -> None:
        with self.context() as ctx:
            store = self.open()
            left = [one.source for one in store.sources(ctx) if one.labels.get("vm") in self.vms]
            store.delete(list(dict.fromkeys([*left, *self.made])), ctx)
        self.made.clear()

    # Things to work with

    def open(self, *, options: Mapping[str, object] | None = None) -> Datastore:
        """The target, opened anew."""
        return self.target.open(hypervisor=NoVM(), options=options)

    @contextmanager
    def context(self) -> Iterator[Context]:
        """A context with a folder of its own, which is gone afterwards."""
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        try:
            with Context(folder, log=self.log) as ctx:
                self._contexts.append(ctx)
                if self._interrupted:
                    ctx.cancel()
                try:
                    yield ctx
                finally:
                    self._contexts.remove(ctx)
        finally:
            unmount_below(folder)
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def threads(self, count: int) -> Iterator[ThreadPoolExecutor]:
        """So many threads that use this bench. Ctrl-C cancels what they do, or its end would wait for them."""
        try:
            with ThreadPoolExecutor(count) as pool:
                try:
                    yield pool
                except KeyboardInterrupt:
                    self._interrupted = True  # for those that a thread is about to open
                    for ctx in list(self._contexts):
                        ctx.cancel()
                    raise
        finally:
            self._interrupted = False

    def place(self) -> Path:
        """A new private folder, which stays until the end."""
        return Path(tempfile.mkdtemp(prefix="place-", dir=self.folder))

    def vm(self, name: str = "kit") -> VM:
        """A new VM."""
        made = VM(uuid=str(uuid.uuid4()), name=name)
        self.vms.add(made.uuid)
        return made

    def run(
        self,
        vm: VM | None = None,
        *,
        installation: str = "a" * 32,
        parent: str = "",
        builds_on: Sequence[SourceRef] = (),
    ) -> BackupRun:
        """A run of `vm` (of a new one) by `installation`; an increment where `parent`, a point, is given.

        All have one host name, as clones and containers have: it tells nothing.
        """
        return BackupRun(
            id=new_id(),
            vm=vm or self.vm(),
            host="kit",
            installation=installation,
            datastore="kit",
            image=new_id(),
            number=len(builds_on),
            point=new_id(),
            type=Type.INCREMENT if parent else Type.FULL,
            parent=Link(point=parent, digest="0" * 64, disks=()) if parent else None,
            builds_on=tuple(builds_on),
            settings={},  # the default, a read-only view, cannot be pickled
        )

    def artifacts(self, size: int = 300 * KIB + 7, seed: int = 0) -> list[Artifact]:
        """What a small backup consists of."""
        return [Made("disk.vda.qcow2", size, seed), BytesArtifact(NAME, b'{"kit": true}')]

    def all_kinds(self, seed: int = 0) -> list[Artifact]:
        """What a whole backup consists of, small; three names come after the manifest's by the alphabet."""
        disk, manifest = self.artifacts(seed=seed)
        rest = [BytesArtifact(name, f"{name} {seed}".encode()) for name in ("nvram", "sums.vda", "vm.xml")]
        return [disk, *rest, manifest]

    def whole_or_gone(self, kept: Kept, what: str) -> None:
        """Failed unless a source comes back as it was given, or is neither listed nor restorable."""
        listed = kept.source in {one.source for one in self.ours(kept.run.vm)}
        try:
            self.same(kept)
        except SourceNotFound as error:
            if listed:
                raise Failed(f"{what} is listed, and cannot be restored") from error
        except (Failed, BackupError) as error:
            raise Failed(f"{what} is {'listed' if listed else 'restorable'}, and not complete: {error}") from error

    def keep(
        self,
        artifacts: Sequence[Artifact] | None = None,
        run: BackupRun | None = None,
        *,
        store: Datastore | None = None,
        ctx: Context | None = None,
    ) -> Kept:
        """One backup, through its whole life, on a datastore that is opened for it."""
        run = run or self.run()
        given = tuple(artifacts if artifacts is not None else self.artifacts())
        if ctx is None:
            with self.context() as own:
                return self.keep(given, run, store=store, ctx=own)
        try:
            stored, errors = keep(store or self.open(), given, run, ctx)
        except BackupError as error:
            self.tell(error)
            raise
        self.made.append(stored.source)
        if errors:
            raise Failed(f"postbackup failed after a backup that was stored: {errors[0]}")
        return Kept(source=stored.source, run=run, artifacts=given)

    # Looking at the result

    def listed(self) -> list[Listed]:
        """What a freshly opened datastore lists."""
        with self.context() as ctx:
            return self.open().sources(ctx)

    def ours(self, *vms: VM) -> list[Listed]:
        """What is listed of these VMs (of all VMs of the bench)."""
        wanted = {vm.uuid for vm in vms} or self.vms
        return [one for one in self.listed() if one.labels.get("vm") in wanted]

    @contextmanager
    def nothing_of(self, vm: VM, what: str) -> Iterator[None]:
        """Failed if, after the block, something is listed of `vm`, or something new that does not say whose it is."""

        def listed() -> dict[SourceRef, str]:
            return {one.source: one.labels.get("vm", "") for one in self.listed()}

        before = listed()
        yield
        left = [source for source, owner in listed().items() if source not in before and owner in (vm.uuid, "")]
        if left:
            self.made.extend(left)
            raise Failed(f"{what} is listed")

    def there(self, *kept: Kept) -> None:
        """Failed unless a freshly opened datastore has what was kept: its names and their sizes."""
        with self.context() as ctx:
            store = self.open()
            for one in kept:
                self._artifacts(one, store, ctx)

    def same(self, *kept: Kept) -> None:
        """Failed unless a freshly opened datastore gives back what was kept: the names, the sizes, every byte."""
        with self.context() as ctx:
            store = self.open()
            for one in kept:
                found = self._artifacts(one, store, ctx)
                for artifact in one.artifacts:
                    if digest(found[artifact.name]) != digest(artifact):
                        raise Failed(f"{artifact.name} does not come back as it was given: its bytes differ")

    def _artifacts(self, kept: Kept, store: Datastore, ctx: Context) -> Mapping[str, Artifact]:
        given = {artifact.name: artifact.size for artifact in kept.artifacts}
        found = store.artifacts(kept.source, ctx)
        if set(found) != set(given):
            lost, extra = sorted(set(given) - set(found)), sorted(set(found) - set(given))
            raise Failed(f"restore gives other artifacts: missing {lost or 'none'}, too many {extra or 'none'}")
        for name, artifact in found.items():
            if artifact.size != given[name]:
                raise Failed(f"{name} was given {given[name]} bytes and comes back with {artifact.size}")
        return found

    def gone(self, source: SourceRef, what: str) -> None:
        """Failed unless `source` is SourceNotFound."""
        with self.context() as ctx, self.refused(SourceNotFound, what=what):
            found = self.open().artifacts(source, ctx)
            raise Failed(f"{what} can be restored ({', '.join(sorted(found)) or 'without artifacts'})")

    @contextmanager
    def refused(self, *kinds: type[BaseException], what: str) -> Iterator[None]:
        """Failed unless the block raises one of `kinds`."""
        names = " or ".join(kind.__name__ for kind in kinds)
        try:
            yield
        except kinds as error:
            self.tell(error)
            return
        except Failed:
            raise
        except Exception as error:
            self.tell(error)
            raise Failed(f"{what}: {type(error).__name__} ({error}) where {names} was expected") from error
        raise Failed(f"{what}: nothing was raised where {names} was expected")

    def tell(self, error: BaseException) -> None:
        """Remember an error in full."""
        seen: BaseException | None = error
        while seen is not None:
            self.told.append(f"{type(seen).__name__}: {seen} {getattr(seen, 'hint', '')} {seen!r}")
            seen = seen.__cause__

    @contextmanager
    def no_children(self, what: str) -> Iterator[None]:
        """Failed if a process that was started in the block outlives it for long."""
        before = below()
        yield
        if left := survivors(below() - before, self.target.patience):
            raise Failed(f"{what}: processes are left behind: {', '.join(map(str, left))}")


class _Heard(logging.Handler):
    """Everything that was logged."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.DEBUG)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
