"""The hypervisor: `Libvirt`."""

from __future__ import annotations

import contextlib
import difflib
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from backupcore import hookimpl
from backupcore.context import Context
from backupcore.errors import BackupError, Busy, ConfigError, HypervisorError, NotFound
from backupcore.hypervisor import Checkpoint, Definition, DiskFile, Finding, Pool, Unchanged, VMState
from backupcore.model import (
    VM,
    Artifact,
    BackupRun,
    BytesArtifact,
    Estimate,
    LeftOut,
    Outcome,
    Prepared,
    RunState,
    new_id,
)
from backupcore.typed import typed
from backupcore_libvirt import __version__, checkpoint, freeze_record
from backupcore_libvirt.backup_job import end, left_behind
from backupcore_libvirt.connection import Connection, Domain
from backupcore_libvirt.define import define, require_definable
from backupcore_libvirt.definition import restored_definition
from backupcore_libvirt.findings import findings
from backupcore_libvirt.folder import RunFolder, living_vms
from backupcore_libvirt.freeze import DEAD_LIMIT, frozen, release
from backupcore_libvirt.image_lock import keep_closed
from backupcore_libvirt.in_place import fit, require_replaceable
from backupcore_libvirt.libvirt_errors import is_away
from backupcore_libvirt.mechanisms.choice import choose, forget, prepare, settle
from backupcore_libvirt.pools import add_volume, find_pool
from backupcore_libvirt.reading.ended import job_expected
from backupcore_libvirt.reading.process import guarded, reader_of
from backupcore_libvirt.reading.taken import taken_of
from backupcore_libvirt.recovery import clear, recover
from backupcore_libvirt.redacted import redacted
from backupcore_libvirt.release.guard import Guard
from backupcore_libvirt.release.servers import end_stray
from backupcore_libvirt.settings import read as read_settings
from backupcore_libvirt.settings import write as write_settings
from backupcore_libvirt.unchanged import hold_unchanged
from backupcore_libvirt.vm_files import read as read_file
from backupcore_libvirt.vm_state import choice_of, state_of

__all__ = ["Libvirt"]

AWAY_LIMIT = 60.0
"""Seconds that a release waits for a libvirtd that does not answer: it reconnects to every QEMU as it starts."""


class Libvirt:
    """libvirt with QEMU. `uri` is libvirt's (``qemu:///system``), `scratch` an absolute path: a folder for sockets and
    scratch files, made when it is first needed.

    Building it does nothing. It keeps no connection and no state of a run: connections are opened per call, what a run
    holds lies in ``SCRATCH/RUN``, in libvirt, and on the run's context.
    """

    def __init__(self, uri: str, scratch: Path) -> None:
        self.uri = uri
        self.scratch = Path(os.path.normpath(scratch.absolute()))

    def __repr__(self) -> str:
        return f"Libvirt(uri={self.uri!r}, scratch={str(self.scratch)!r})"

    @hookimpl
    def prebackup(self, run: BackupRun, ctx: Context) -> Prepared:
        """Hold one instant of all disks, and begin to track what changes from there.

        The artifacts: ``disk.<id>.qcow2`` per disk, ``vm.xml`` (the inactive definition, without libvirt's own secrets;
        with REDACT=YES see `backupcore_libvirt.redacted`), and the
        files of `backupcore_libvirt.vm_files`. Their exports live until `postbackup`.
        """
        connection = ctx.stack.enter_context(Connection(self.uri))
        domain = connection.domain(run.vm.uuid)
        folder = RunFolder(self.scratch, run.id)
        guard = guarded(self.uri, domain, folder, ctx, run.installation)  # it gets ready while the VM is looked at
        clear(domain, self.scratch, ctx)
        prepare(connection, domain, run, folder, ctx)
        mechanism = choose(connection, domain, run, self.scratch, ctx)
        seen = mechanism.look
        for remark in seen.remarks:
            ctx.log.warning(remark)
        lock = folder.make(seen.owner, domain.uuid)
        ctx.stack.callback(os.close, lock)
        ctx.touch()
        mechanism.ready(guard)
        with frozen(domain, folder, seen.freeze, guard, ctx) as held:
            date = mechanism.begin()
        exports = mechanism.serve(guard)
        reader = reader_of(guard, ctx)
        files = [read_file(file) for file in seen.files]
        with job_expected(domain, folder, exports, ctx):
            taken = [taken_of(disk, exports[disk.id], seen, run, reader) for disk in seen.disks]
        for disk_artifact, _ in taken:
            ctx.stack.callback(disk_artifact.close)
        artifacts: list[Artifact] = [
            *(disk_artifact for disk_artifact, _ in taken),
            BytesArtifact("vm.xml", _stored(domain, run).encode()),
            *(file for file in files if isinstance(file, BytesArtifact)),
        ]
        return Prepared(
            artifacts=tuple(artifacts),
            date=date,
            consistency=held.consistency,
            frozen_seconds=held.seconds,
            disks=tuple(disk for _, disk in taken),
            left_out=(*seen.left_out, *(file for file in files if isinstance(file, LeftOut))),
            versions={**seen.versions, "backupcore-libvirt": __version__},
        )

    @hookimpl
    def postbackup(self, run: BackupRun, outcome: Outcome, ctx: Context) -> None:
        """End this run's job, delete the checkpoints that are not needed any more, remove the run's folder.

        Finds out what is there, so it works after a crash, in another process, and where `prebackup` never ran.
        """
        guard = Guard.of(run.id)
        with guard.turn() if guard is not None else contextlib.nullcontext():
            self._release(run, outcome, ctx)

    def _release(self, run: BackupRun, outcome: Outcome, ctx: Context) -> None:
        folder = RunFolder(self.scratch, run.id)
        end_stray(folder.path)
        # Where something is held, a libvirtd that is just being started anew is waited for.
        deadline = time.monotonic() + (AWAY_LIMIT if folder.path.exists() else 0)
        while True:
            try:
                with Connection(self.uri) as connection:
                    _release(connection, run, outcome, folder, ctx)
            except HypervisorError as error:
                if not is_away(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return

    def recover(self, vm: VM, spent: Collection[str], ctx: Context, installation: str = "") -> None:
        """Put right what dead runs of this VM have left; see `backupcore_libvirt.recovery`."""
        with Connection(self.uri) as connection:
            try:
                domain = connection.domain(vm.uuid)
            except NotFound:
                domain = None
            recover(connection, domain, vm, self.scratch, spent=spent, installation=installation, ctx=ctx)

    def vms(self) -> Sequence[VMState]:
        """Every VM of this host, by name. HypervisorError if libvirt is away."""
        backed_up = living_vms(self.scratch)
        with Connection(self.uri) as connection:
            states = []
            for domain in connection.domains():
                with contextlib.suppress(NotFound):  # one that ended, or was undefined, since it was listed
                    states.append(state_of(domain, backed_up, self.scratch))
        return sorted(states, key=lambda state: state.vm.name)

    def find(self, vm: str, defaults: Mapping[str, str] | None = None) -> VMState:
        """The VM of that name or UUID; with `defaults`, its disks as its settings choose. NotFound, with near names."""
        with Connection(self.uri) as connection:
            domains = connection.domains()
            chosen = {domain.uuid: domain for domain in domains if vm == domain.name or vm.lower() == domain.uuid}
            if len(chosen) > 1:
                named = next(domain.uuid for domain in chosen.values() if domain.name == vm)
                raise ConfigError(
                    f"{vm} is the name of one VM and the UUID of another",
                    f"Give the first one another name, while it is off: {typed('virsh domrename', named, 'NAME')}",
                )
            for domain in chosen.values():
                return state_of(domain, living_vms(self.scratch), self.scratch, choice_of(domain, defaults))
            names = [domain.name for domain in domains]
        near = difflib.get_close_matches(vm, names, n=3, cutoff=0.5)
        hint = f"Did you mean: {', '.join(near)}?" if near else "List the VMs with: vmkeep vm list"
        raise NotFound(f"there is no VM {vm!r} on {self.uri}", hint)

    def estimate(self, run: BackupRun) -> Estimate:
        """What `prebackup` would take for this run, raising what it would raise, and touching nothing."""
        with Connection(self.uri) as connection:
            domain = connection.domain(run.vm.uuid)
            left_behind(domain, self.scratch)
            mechanism = choose(connection, domain, run, self.scratch, Context(self.scratch))
            return Estimate(disks=mechanism.estimate(), left_out=mechanism.look.left_out)

    @contextlib.contextmanager
    def unchanged(self, run: BackupRun, disks: Collection[str], ctx: Context) -> Iterator[Sequence[Unchanged]]:
        """Hold one instant of these disks, and tell what is said not to have changed since the parent."""
        # Released as a backup that came to nothing: its point has no checkpoint, and all others stay.
        ended, outcome = replace(run, spent=(), keep=None), Outcome(state=RunState.FAILED)
        try:
            with Connection(self.uri) as connection:
                domain = connection.domain(run.vm.uuid)
                clear(domain, self.scratch, ctx)
                guard = guarded(self.uri, domain, RunFolder(self.scratch, run.id), ctx, run.installation)
                yield hold_unchanged(connection, domain, run, disks, scratch=self.scratch, guard=guard, ctx=ctx)
        except BaseException:
            try:
                self.postbackup(ended, outcome, ctx)
            except BackupError as error:  # it must not hide the first one
                ctx.log.warning("VM %s: %s", run.vm.name, error.in_full)
            raise
        self.postbackup(ended, outcome, ctx)

    def checkpoints(self, vm: VM) -> Sequence[Checkpoint]:
        """Every checkpoint and bitmap that backupcore made on this VM, in whichever installation."""
        with Connection(self.uri) as connection:
            return checkpoint.found(connection.domain(vm.uuid))

    def forget(self, vm: VM, installation: str = "", *, foreign: bool = False) -> Sequence[str]:
        """Delete the checkpoints, bitmaps and overlays that this installation made on this VM, and return their names.

        With `foreign` those of all other installations, and nothing else. Busy where a job runs.
        """
        with Connection(self.uri) as connection:
            domain = connection.domain(vm.uuid)
            left_behind(domain, self.scratch)
            return forget(connection, domain, RunFolder(self.scratch, new_id()), installation, foreign=foreign)

    def settings(self, vm: VM) -> Mapping[str, str]:
        """The VM's backup configuration out of its own metadata: upper-case keys (``MODE``) and their values."""
        with Connection(self.uri) as connection:
            return read_settings(connection.domain(vm.uuid))

    def configure(self, vm: VM, settings: Mapping[str, str]) -> None:
        """Replace the VM's backup configuration, for the running VM and for its next start."""
        with Connection(self.uri) as connection:
            write_settings(connection.domain(vm.uuid), settings)

    def definition(
        self,
        stored: bytes,
        *,
        name: str,
        disks: Mapping[str, Path],
        nvram: Path | None,
        no_ip: bool,
        no_nic: bool,
        keep_uuid: bool = False,
        new_mac: bool = False,
        boot: Mapping[str, Path] | None = None,
        redact: bool = False,
    ) -> Definition:
        """A restored VM's definition; see `backupcore_libvirt.definition` for what is carried over."""
        return restored_definition(
            stored,
            name=name,
            disks=disks,
            nvram=nvram,
            no_ip=no_ip,
            no_nic=no_nic,
            keep_uuid=keep_uuid,
            new_mac=new_mac,
            boot=boot,
            redact=redact,
        )

    def require_definable(self, name: str, uuid: str | None, folder: Path) -> None:
        """That a VM of this name (and UUID) can be defined on disks in `folder`: ConfigError, AccessDenied."""
        with Connection(self.uri) as connection:
            require_definable(connection, name, uuid, folder)

    def define(self, definition: bytes) -> VM:
        """Define a VM that is not there yet."""
        with Connection(self.uri) as connection:
            return define(connection, definition)

    def pool(self, name: str) -> Pool:
        """The storage pool of that name, if disks can be restored into it; see `backupcore_libvirt.pools`."""
        with Connection(self.uri) as connection:
            return find_pool(connection, name)

    def add_volume(self, pool: Pool, volume: str, size: int) -> Path:
        """Make a volume of a pool without a folder; its device. ConfigError if there is one of that name."""
        with Connection(self.uri) as connection:
            return add_volume(connection.pool(pool.name), volume, size)

    def remove_volume(self, pool: Pool, volume: str) -> None:
        """Remove a volume that `add_volume` has made."""
        with Connection(self.uri) as connection:
            connection.pool(pool.name).delete(volume)

    def refresh(self, pool: Pool) -> None:
        """Have libvirt list what was put into the pool's folder."""
        with Connection(self.uri) as connection:
            connection.pool(pool.name).refresh()

    def require_replaceable(self, vm: VM, disks: Sequence[str], *, nvram: bool = False) -> Mapping[str, DiskFile]:
        """That disks of a powered-off VM may be replaced, and their files; see `backupcore_libvirt.in_place`."""
        with Connection(self.uri) as connection:
            return require_replaceable(connection, connection.domain(vm.uuid), disks, nvram=nvram)

    def keep_closed(self, files: Sequence[Path]) -> AbstractContextManager[None]:
        """Hold QEMU's own lock on these files; see `backupcore_libvirt.image_lock`."""
        return keep_closed(files)

    def fit(self, written: Path, old: DiskFile) -> None:
        """Make a restored qcow2 file like the one that it replaces."""
        fit(written, old)

    def check(self, *, try_vm: bool = True) -> Sequence[Finding]:
        """Is everything here that backups need: the daemon, versions, the scratch folder, QEMU's user, and, with
        `try_vm`, does a backup of a VM made for it work?
        """
        return findings(self.uri, self.scratch, try_vm=try_vm)


def _stored(domain: Domain, run: BackupRun) -> str:
    """The definition that a backup keeps."""
    xml = domain.inactive_xml()
    return redacted(xml) if run.settings.get("REDACT") == "YES" else xml


def _release(connection: Connection, run: BackupRun, outcome: Outcome, folder: RunFolder, ctx: Context) -> None:
    domain = _found(connection, run)
    active = domain is not None and domain.is_active()
    try:
        _release_of(connection, domain, run, outcome, folder=folder, ctx=ctx)
    except BackupError as error:
        now = _found(connection, run)
        if (now is not None and now.is_active()) == active:
            raise
        # It was powered off, or started, while this went on: what libvirt refuses then is done in another way.
        ctx.log.info("VM %s: once more, its state has changed meanwhile: %s", run.vm.name, error)
        _release_of(connection, now, run, outcome, folder=folder, ctx=ctx)


def _found(connection: Connection, run: BackupRun) -> Domain | None:
    try:
        return connection.domain(run.vm.uuid)
    except NotFound:
        return None  # a transient VM that has ended, or one that was undefined: nothing of it is held


def _release_of(
    connection: Connection,
    domain: Domain | None,
    run: BackupRun,
    outcome: Outcome,
    *,
    folder: RunFolder,
    ctx: Context,
) -> None:
    problems: list[BackupError] = []
    resting = False
    if domain is None:
        freeze_record.remove(folder)
    else:
        try:
            release(domain, folder, DEAD_LIMIT)
        except BackupError as error:  # the rest can go all the same
            problems.append(error)
            resting = True
        end(domain, folder)
        problems += settle(connection, domain, run, outcome, folder=folder, ctx=ctx)
    strange = [name for name in folder.remove() if not resting or name != "freeze"]
    if strange:
        ctx.log.warning("%s holds what no run puts there, and stays: %s", folder.path, ", ".join(strange))
    if domain is not None and not _occupied(domain, folder.scratch):
        checkpoint.tidy(domain, run, outcome)
    if problems:
        raise problems[0]


def _occupied(domain: Domain, scratch: Path) -> bool:
    """Whether a job runs on the VM that is no dead run's of ours: its checkpoint is in nobody's list as yet, and one of
    an older version does not say whose it is. Whatever is superfluous goes after the next backup.
    """
    try:
        left_behind(domain, scratch)
    except Busy:
        return True
    return False
