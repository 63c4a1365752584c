# mypy: disable-error-code="empty-body"
# a hookspec has a signature and a docstring, and no body
"""The contract between the core and its plugins, and its manual.

A *driver* is a class decorated with `backupcore.driver`; it is found under the entry-point group ``backupcore.drivers``
and implements `backup`, `restore`, `delete` and `sources`; `prebackup`, `postbackup`, `flatten`, `sources_of`, `check`,
`usage`, `locks`, `maintain` and `identity` are optional. A *hypervisor* (``backupcore.hypervisors``) implements
`prebackup` and `postbackup`, and the Python protocol of `backupcore.hypervisor`. Site plugins may wrap any hook with
``@hookimpl(wrapper=True)``.

The life of a run::

    prebackup   driver: is the target there, do the sources it builds on exist?
        |       hypervisor: one instant of all disks -> Prepared
    backup      driver: keep every artifact, all or nothing -> Stored
        |
    (record)    the host tooling writes the increment down
        |
    postbackup  hypervisor releases the guest, then the driver; always, whatever happened

What the core does so that no driver has to: it adds ``manifest.json`` and the digests, checks sizes, names and tokens,
counts bytes, turns `OSError` into the taxonomy of `backupcore.errors`, and refuses answers that cannot be: None, a size
below 0, a token that another backup has. A stray exception, also SystemExit, is a ContractViolation that names driver
and hook; what is printed goes to stderr; a thread that does not end is left behind. What only a
driver can do: atomicity, durability, and telling its own tool's errors apart.

Hooks are plain synchronous functions and may block. They are called in a thread that need not be the main one, which
hears the signals: a hook cannot call `signal.signal`, and hears of a cancel by its context. Plugin instances keep no
state of a run: two runs may share one.
A hook may leave out arguments it does not need; a default value for one is refused, since pluggy would never fill it.
Arguments and fields are only ever added.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from datetime import datetime

    from backupcore.context import Context
    from backupcore.model import (
        Artifact,
        BackupRun,
        Listed,
        Merge,
        Outcome,
        Prepared,
        SourceRef,
        Stored,
        Usage,
    )

__all__ = ["CONTRACT", "PROJECT", "hookimpl"]

PROJECT = "backupcore"
CONTRACT = 1
"""The version of this contract. What is only added (a hook, an argument, a field) does not raise it; docs/hooks.md has
the rule for what goes."""
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def prebackup(run: BackupRun, ctx: Context) -> Prepared | None:
    """Get ready for one run. Called for every plugin: the driver first, then the hypervisor.

    The driver returns None. It checks that its target answers and takes writes (TargetUnavailable, AccessDenied,
    TargetFull, ConfigError) and, in one cheap listing, that every source in `run.builds_on` still exists; one that does
    not is IncrementImpossible. It may wait, so nothing of the guest is touched yet. What the first byte would find out,
    as a wrong password, is found out here; where that takes long it is begun here, and `ctx.on_touch` is told.

    The hypervisor returns Prepared: artifacts that show one instant of all disks, readable until `postbackup`. All that
    can fail or wait is looked at before the guest is touched; what rules out an increment but not a full is
    IncrementImpossible, raised before as well. It calls `ctx.touch` right before it touches the guest. A disk of which
    nothing can tell what changed is whole within the increment, with the reason; where that is so of every disk, the
    increment is impossible. If it fails halfway it may leave the rest to `postbackup`, which always follows. Exactly
    one plugin returns a Prepared.
    """


@hookspec(firstresult=True)
def backup(artifacts: Sequence[Artifact], run: BackupRun, ctx: Context) -> Stored:
    """Keep every artifact, under its name, with its exact bytes, and return the new source.

    All or nothing: no source is listed or restorable until it is complete and durable, also where this process is
    killed at any line. Read the artifacts in any order, sequentially or by `read_at`, several at once, as often as
    needed; but read every byte of each once at least, since the core takes its digests on the way. ``sums.*`` and
    ``manifest.json`` are ready once the disks were read; a read of them waits, and never for ever.

    The token was never given before, also not to a backup that is deleted by now. Keep at no time a whole artifact in
    memory, and leave no file, thread or connection behind.

    Store `run.labels` beside the source, in a form that `sources` can return. Tell ``ctx.progress.done`` now and then
    how many bytes of the artifacts are stored; the core has told their total.

    Raise Cancelled soon after `ctx.cancelled`, also while you wait for the store or after the last read; leave nothing
    restorable and no child behind. Call `ctx.release` before a clean-up that may take long, so that the guest does not
    wait for it. Errors: TargetUnavailable, TargetFull, AccessDenied, or what a read of an artifact raised, unchanged.
    """


@hookspec
def postbackup(run: BackupRun, outcome: Outcome, ctx: Context) -> None:
    """Release what this run held. Called for each plugin by itself, the hypervisor first, then the driver.

    Always called, also where `prebackup` failed or never ran, and again in a fresh process after a crash: find out what
    is there, release it, and be content if nothing is. An error here is logged and never masks the first one. Only
    where `outcome.state` is RECORDED may the checkpoints of `run.spent` go; where it is not, the one this run made
    goes. Either way those may go that are in nobody's `run.keep`, where that is given.
    """


@hookspec(firstresult=True)
def restore(source: SourceRef, ctx: Context) -> Sequence[Artifact]:
    """Every artifact of one source, as `backup` got them, lazily: no contents are fetched until they are read.

    An unknown token, well-formed or not, is SourceNotFound. Nothing outside the datastore is ever opened because a
    token says so. `open` gives a sequential stream; where ranges are cheap, set `seekable` and implement `read_at`. A
    stream that ends early or late is noticed by the core (IntegrityError). Resources go on `ctx.stack`.
    """


@hookspec(firstresult=True)
def flatten(merge: Merge, run: BackupRun, ctx: Context) -> Stored | None:
    """Keep the merged result of `merge.sources` as a new full, and return its source; the old ones stay untouched.

    Optional: without it, or where it returns None, the core stores ``merge.artifacts`` through `backup`. A store that
    can copy on its own side follows ``merge.pieces(artifact)``. The rules of `backup` hold.

    `prebackup` does not come before it; `run.builds_on` are the sources to merge. `run.point` and `run.number` are
    those of the last of them, which stays until the result is proved and recorded. So never take a source for your own
    because it has this point: whatever cleans up after a flatten (or a `backup` that stores one) that failed must tell
    the two apart.
    """


@hookspec(firstresult=True)
def delete(sources: Sequence[SourceRef], ctx: Context) -> bool:
    """Remove sources; return True when none of them is restorable any more. One that is absent is done already.

    Nothing but these sources is touched. Killed at any line, each of them is whole or gone: what makes it a backup goes
    first. No object of the driver gives back from a cache what was deleted. A store that refuses (a lock, a policy) is
    Locked with its reason and, where it says so, until when; one that does not take these credentials is AccessDenied.
    """


@hookspec(firstresult=True)
def locks(sources: Sequence[SourceRef], ctx: Context) -> Mapping[SourceRef, datetime | None]:
    """Which of these sources the store would refuse to delete now, and until when (None where nobody says).

    Optional, for stores that can say so in a few quick questions, as by an object's retention date: retention does not
    begin what it could not end. What is absent is not locked. Changes nothing.
    """


@hookspec(firstresult=True)
def sources(ctx: Context) -> Iterable[Listed]:
    """Every complete source in the datastore, of all VMs and hosts, with the labels stored beside it.

    A source whose manifest is missing is not complete and not listed. What is not a backup of ours is skipped.
    """


@hookspec(firstresult=True)
def sources_of(vm: str, known: Collection[SourceRef], ctx: Context) -> Iterable[Listed]:
    """The same for one VM (a UUID), which every backup asks: what others have removed, or added, is noticed by it.

    Optional; without it the core asks for all. Worth having where it is quicker. Other VMs' sources may be in the
    answer, and such as are not complete: who acts on one looks at its manifest first. Of those that are `known` the
    caller has the labels, they may come without: a store that can tell names alone at once need ask no further where
    it holds no other.
    """


@hookspec(firstresult=True)
def check(ctx: Context) -> bool:
    """True if the datastore answers and takes the credentials. Writes nothing that stays; creates no repository."""


@hookspec(firstresult=True)
def usage(ctx: Context) -> Usage:
    """How many bytes are used, in total and free, as far as the store can say cheaply."""


@hookspec(firstresult=True)
def maintain(ctx: Context) -> bool:
    """Do what would hold up the other verbs: give back the room of what was deleted, look for damage. True when done.

    Optional. Called only when the user asks for it, never on the way; it may take hours and lock others out. Nothing
    that is restorable is touched. Tell ``ctx.progress.phase`` what goes on. Damage is IntegrityError.
    """


@hookspec(firstresult=True)
def identity(known: str, make: bool, ctx: Context) -> str | None:
    """What stays the same for as long as this is the same place: a repository's ID, a mark that was put there once.

    It tells an unmounted disk, another disk or an emptied bucket from the place where the backups are. Optional, and
    called often, so it must be quick: without it the host tooling goes by the sources that are listed. None where the
    place has none (yet); TargetUnavailable where it does not answer, or what is found cannot be one.

    `known` is what the caller has seen here before ("": nothing): return exactly that where this is the place it names,
    however you can tell. With `make` a place that has none gets one, unless the driver makes it with its first backup:
    once, also where several do so in the same moment. Without it nothing is written. It is made like a token.
    """
