"""Drivers whose optional hooks say what is not so: identity, locks, sources_of."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from dataclasses import replace
from datetime import timedelta
from typing import ClassVar

import backupcore
from backupcore import hookimpl
from backupcore.errors import BackupError
from backupcore.model import Listed, SourceRef, new_id
from tests.testing.folder import Folder
from tests.testing.marked import LATE, MARK, Marked

# What the place is known by


@backupcore.driver
class Fresh(Marked):
    """Thinks of another identity each time."""

    @hookimpl
    def identity(self, known, make):
        return Marked.identity(self, known, make) and new_id()


@backupcore.driver
class Renaming(Marked):
    """Writes what it is known by in another way to who knows it."""

    @hookimpl
    def identity(self, known, make):
        found = Marked.identity(self, known, make)
        return f"{found}.again" if found and known == found else found


@backupcore.driver
class Counting(Marked):
    """Is known by the backups that are there."""

    @hookimpl
    def identity(self, known, make):
        found = Marked.identity(self, known, make)
        there = "".join(sorted(one.name for one in self.path.glob("[!.]*")))
        return found and f"{found}.{hashlib.sha256(there.encode()).hexdigest()}"


@backupcore.driver
class Credulous(Marked):
    """Is whatever place the caller knows."""

    @hookimpl
    def identity(self, known, make):
        return Marked.identity(self, known, make) and (known or self.mark())


@backupcore.driver
class Loyal(Marked):
    """Takes a place that is away for the one that is known."""

    @hookimpl
    def identity(self, known, make):
        try:
            return Marked.identity(self, known, make)
        except BackupError:
            return known or None


@backupcore.driver
class Mounting(Marked):
    """Makes its folder where it is not there, and a mark in it."""

    @hookimpl
    def identity(self, known, make):
        if make:
            self.path.mkdir(exist_ok=True)
        return Marked.identity(self, known, make)


@backupcore.driver
class Hasty(Marked):
    """Makes what it lacks at the first question."""

    @hookimpl
    def identity(self, known, make):
        return Marked.identity(self, known, True)


@backupcore.driver
class Reserved(Marked):
    """Makes none, whoever tells it to."""

    @hookimpl
    def identity(self, known, make):
        return Marked.identity(self, known, False)


@backupcore.driver
class Racing(Marked):
    """Looks first, and writes then."""

    meeting = threading.Barrier(4)

    @hookimpl
    def identity(self, known, make):
        found = Marked.identity(self, known, make=False)
        if found is None and make:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.meeting.wait(1)  # the check's four, all of which have seen none
            self.meeting.reset()
            found = new_id()
            made = self.path / f"{MARK}.{found}"
            made.write_text(found)
            made.replace(self.path / MARK)
        return found


@backupcore.driver
class Alike(Marked):
    """All its places are called the same."""

    @hookimpl
    def identity(self, known, make):
        return Marked.identity(self, known, make) and "backups"


# Locks


@backupcore.driver
class Over(Marked):
    """Names locks that were."""

    @hookimpl
    def locks(self, sources):
        there = [one for one in sources if (self.path / one.token).is_dir()]
        return dict.fromkeys(there, LATE - timedelta(days=365 * 999))


@backupcore.driver
class Zoneless(Marked):
    @hookimpl
    def locks(self, sources):
        return {one: until.replace(tzinfo=None) for one, until in Marked.locks(self, sources).items()}


@backupcore.driver
class Everything(Marked):
    """Takes what is not there for locked."""

    @hookimpl
    def locks(self, sources):
        return Marked.locks(self, sources) | {one: None for one in sources if not (self.path / one.token).is_dir()}


@backupcore.driver
class Unasked(Marked):
    """Names others beside those that it is asked for."""

    @hookimpl
    def locks(self, sources):
        return Marked.locks(self, sources) | {SourceRef("f" * 32): LATE}


@backupcore.driver
class Unlocked(Marked):
    """Sees no lock."""

    @hookimpl
    def locks(self, sources):
        return {}


@backupcore.driver
class Forcing(Marked):
    """Deletes what it calls locked."""

    @hookimpl
    def delete(self, sources):
        return Folder.delete(self, sources)


@backupcore.driver
class Sealed(Marked):
    """Calls all that is there locked, and deletes it."""

    @hookimpl
    def locks(self, sources):
        there = {one: LATE for one in sources if (self.path / one.token).is_dir()}
        return there | Marked.locks(self, sources)


# The listing of one VM


@backupcore.driver
class Fulls(Marked):
    """Lists no increments."""

    @hookimpl
    def sources_of(self, vm):
        return [one for one in Marked.sources_of(self, vm) if one.labels["type"] == "FULL"]


@backupcore.driver
class Own(Marked):
    """Lists what one installation has taken, and no other."""

    @hookimpl
    def sources_of(self, vm):
        found = Marked.sources_of(self, vm)
        return [one for one in found if one.labels["installation"] == found[0].labels["installation"]]


@backupcore.driver
class Everyones(Marked):
    """Says of all backups that they are the VM's."""

    @hookimpl
    def sources_of(self, vm):
        return [replace(one, labels={**one.labels, "vm": vm}) for one in Folder.sources(self)]


@backupcore.driver
class Bare(Marked):
    """Leaves out the labels that a caller might do without."""

    @hookimpl
    def sources_of(self, vm):
        return [replace(one, labels={"vm": vm}) for one in Marked.sources_of(self, vm)]


@backupcore.driver
class Doubling(Marked):
    @hookimpl
    def sources_of(self, vm):
        return [*Marked.sources_of(self, vm), *Marked.sources_of(self, vm)]


@backupcore.driver
class Keeping(Marked):
    """Goes on listing what it has listed once."""

    seen: ClassVar[dict[str, dict[SourceRef, Listed]]] = {}

    @hookimpl
    def sources_of(self, vm):
        known = self.seen.setdefault(vm, {})
        known.update({one.source: one for one in Marked.sources_of(self, vm)})
        return list(known.values())
