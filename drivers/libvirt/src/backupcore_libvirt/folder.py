"""The run's folder below the scratch folder: it holds QEMU's scratch files, and nobody else gets in.

``SCRATCH/RUN.lock`` the process of the run keeps locked. It lies outside of ``SCRATCH/RUN/``, which is QEMU's user's:
taken away there, a run that lives would look dead. (Runs of older versions have theirs inside, as ``lock``.)

``SCRATCH/RUN/`` holds one ``DISK.scratch`` per disk; ``stopped`` where QEMU had stopped the guest before; ``marking``
while the run has a node of its own in the guest's QEMU (`backupcore_libvirt.marks`); ``nbd.sock`` where the job's
socket cannot lie in the VM's own folder (`backupcore_libvirt.place`), and for a VM that is off one ``nbd.DISK.sock``
per disk. It is 0700 and belongs to the user that QEMU runs as; the folders above only have to let that user pass
(0711).
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backupcore import inherited
from backupcore.errors import AccessDenied, HypervisorError, from_os_error
from backupcore.process import held_by_the_dying
from backupcore_libvirt.scratch import Owner

__all__ = ["SOCKET_PATH_LIMIT", "RunFolder", "dead_folders", "living_vms"]

_KNOWN = re.compile(r"nbd\.sock|lock|stopped|marking|trial\.raw|[A-Za-z0-9_.-]+\.scratch|nbd\.[A-Za-z0-9_.-]+\.sock")
_RUN = re.compile(r"[0-9a-f]{32}")
_VM = re.compile(r"[0-9a-f-]{36}")
_CAREFULLY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LOCK_LIMIT = 64  # bytes; a UUID has 36
SOCKET_PATH_LIMIT = 107
"""Bytes in sockaddr_un.sun_path, less the NUL."""


class RunFolder:
    """The folder of one run. Building it touches nothing."""

    def __init__(self, scratch: Path, run: str) -> None:
        if not _RUN.fullmatch(run):  # it becomes part of paths that are removed later
            raise HypervisorError(f"{run!r:.100} is no run's ID")
        self.run = run
        self.scratch = scratch
        self.path = scratch / run
        self.lock = scratch / f"{run}.lock"
        self.socket = self.path / "nbd.sock"
        self.socket_name = f"backupcore-{run}"
        """What the job's socket is called in a folder that is not ours alone."""

    @classmethod
    def of_job(cls, scratch: Path, socket: str, files: Collection[str]) -> RunFolder | None:
        """The folder of the run that this backup job is of, by its socket and its scratch files; None if it is not one
        of ours.

        The name of a socket in the VM's folder does not tell whose it is: another configuration on this host has its
        own scratch folder, and its living run must never be taken for a dead one.
        """
        folders = {Path(file).parent for file in files}
        if len(folders) != 1:
            return None
        path = folders.pop()
        if path.parent != scratch or not _RUN.fullmatch(path.name):
            return None
        found = cls(scratch, path.name)
        return found if socket == str(found.socket) or Path(socket).name == found.socket_name else None

    def check_length(self) -> None:
        """HypervisorError if the socket's path is too long for a unix socket."""
        socket = self.socket_of("vdzz")
        length = len(os.fsencode(socket))
        if length > SOCKET_PATH_LIMIT:
            raise HypervisorError(
                f"the path of a socket would have {length} bytes, {SOCKET_PATH_LIMIT} is the limit: {socket}",
                "Set 'scratch' in the configuration to a folder with a shorter path.",
            )

    def socket_of(self, disk: str) -> Path:
        """The socket of one disk, where each has a server of its own."""
        return self.path / f"nbd.{disk}.sock"

    def disk(self, disk: str) -> Path:
        """Where a disk's scratch file goes."""
        return self.path / f"{disk}.scratch"

    def make(self, owner: Owner, vm: str) -> int:
        """Create it for `owner`, locked by this process; the result is the lock's file descriptor.

        The lock says which VM (its UUID) the run is of, for `dead_folders`.

        AccessDenied, TargetFull. What an earlier try of the same run left is removed first.
        """
        try:
            self.scratch.mkdir(mode=0o711, parents=True, exist_ok=True)
            with _changing(self.scratch):
                self._remove()
                self.path.mkdir(mode=0o700)
                lock = self._locked(vm)
        except OSError as error:
            raise from_os_error(error, f"scratch folder {self.scratch}") from error
        try:
            if owner.uid != os.geteuid():
                os.chown(self.path, owner.uid, owner.gid, follow_symlinks=False)
        except OSError as error:
            os.close(lock)
            raise from_os_error(error, f"scratch folder {self.path}") from error
        if not owner.may("w", self.path):
            os.close(lock)
            raise AccessDenied(
                f"QEMU runs as {owner} and cannot write to {self.path}",
                "Set 'scratch' in the configuration to a folder on a file system that this user can write to.",
            )
        return lock

    def _locked(self, vm: str) -> int:
        lock = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | _CAREFULLY, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(lock, vm.encode())
        except OSError:
            os.close(lock)
            raise
        return inherited.keep_from_children(lock)

    def note_stopped(self) -> None:
        """Note that QEMU had stopped the guest before this run: it is not the run's to let go on."""
        self._note("stopped")

    @property
    def was_stopped(self) -> bool:
        """Whether that was noted."""
        return os.path.lexists(self.path / "stopped")

    def note_marking(self) -> None:
        """Note that this run is about to have a node of its own in the guest's QEMU."""
        self._note("marking")

    def end_marking(self) -> None:
        """Note that the node is gone."""
        with suppress(OSError):  # what is left of the note costs a question
            (self.path / "marking").unlink()

    @property
    def is_marking(self) -> bool:
        """Whether that node may be there."""
        return os.path.lexists(self.path / "marking")

    def _note(self, name: str) -> None:
        try:
            os.close(os.open(self.path / name, os.O_WRONLY | os.O_CREAT | _CAREFULLY, 0o600))
        except OSError as error:
            raise from_os_error(error, f"scratch folder {self.path}") from error

    def is_in_use(self) -> bool:
        """Whether the process of that run still lives: its lock is released when it ends, however it ends.

        One that was killed and waits in the kernel before it can end keeps its lock, and does not live any more.
        """
        try:
            lock = self._opened_lock(os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: who else looks is not its owner
        except BlockingIOError:
            return not held_by_the_dying(lock)
        finally:
            os.close(lock)
        return False

    def _opened_lock(self, how: int) -> int:
        """A descriptor of its lock. FileNotFoundError, OSError."""
        try:
            return os.open(self.lock, how | _CAREFULLY)
        except FileNotFoundError:
            return os.open(self.path / "lock", how | _CAREFULLY)

    def vm(self) -> str:
        """The UUID of the VM that its lock names, "" if it names none. OSError where it may not be read.

        One inside of the folder is QEMU's user's, who may put anything there: a link, or a pipe that nobody writes to.
        """
        try:
            handle = self._opened_lock(os.O_RDONLY)
        except FileNotFoundError:
            return ""
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                return ""
            of = os.read(handle, _LOCK_LIMIT).decode(errors="replace")
        finally:
            os.close(handle)
        return of if _VM.fullmatch(of) else ""

    @contextmanager
    def sole(self, limit: float) -> Iterator[bool]:
        """Be the only process of ours that ends what this run holds; whether the folder is there.

        The kernel takes the lock back when its process ends. HypervisorError if another one has it for `limit` seconds.
        """
        deadline = time.monotonic() + limit
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            yield False
            return
        except OSError as error:
            raise from_os_error(error, f"scratch folder {self.path}") from error
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise HypervisorError(
                            f"another process has been at the release of the run of {self.path} for {limit:.0f} s",
                            f"See which one with: lsof {self.path}",
                        ) from error
                    time.sleep(0.01)
                else:
                    break
            yield True
        finally:
            os.close(handle)

    def remove(self) -> list[str]:
        """Remove what a run puts there, and the folder; the result names what was strange, and therefore stays."""
        if not self.path.exists() and not self.lock.exists():
            return []
        with _changing(self.scratch):
            return self._remove()

    def remove_scratch(self) -> None:
        """Remove the scratch files of a job that is about to end; QEMU has them open and goes on until then.

        As each disk's part ends, libvirt takes all scratch files out of the VM's AppArmor profile, and QEMU opens those
        of the other disks once more, to read: harmless, but denied and logged where the files are still there. Without
        REUSE_EXTERNAL libvirt itself removes them (9.0, tried).
        """
        with suppress(OSError), _opened(self.path) as folder:  # nothing here may hinder the release
            for name in os.listdir(folder):  # noqa: PTH208 - by descriptor, so that no path is followed twice
                mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
                if name.endswith(".scratch") and _KNOWN.fullmatch(name) and stat.S_ISREG(mode):
                    os.unlink(name, dir_fd=folder)

    def _remove(self) -> list[str]:
        try:
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            self.lock.unlink(missing_ok=True)
            return []
        strange = []
        try:
            for name in os.listdir(folder):  # noqa: PTH208 - by descriptor, so that no path is followed twice
                mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
                if _KNOWN.fullmatch(name) and (stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
                    os.unlink(name, dir_fd=folder)
                else:
                    strange.append(name)
        finally:
            os.close(folder)
        if not strange:
            self.path.rmdir()
            self.lock.unlink(missing_ok=True)
        return strange


def dead_folders(scratch: Path, vm: str) -> list[RunFolder]:
    """The folders that dead runs of this VM (its UUID) have left, killed before or after they had a job.

    A folder whose lock names no VM is a dead run's too, of whichever VM: it was killed while it made or removed it.
    """
    return [folder for folder, of, in_use in _folders(scratch) if of in (vm, "") and not in_use]


def living_vms(scratch: Path) -> set[str]:
    """The UUIDs of the VMs that a run of ours is backing up now, as far as we may look."""
    try:
        return {of for _, of, in_use in _folders(scratch) if in_use}
    except OSError:
        return set()  # another user's scratch


def _folders(scratch: Path) -> list[tuple[RunFolder, str, bool]]:
    """Every run's folder, the UUID of its VM ("" if it names none), and whether that run lives."""
    if not scratch.is_dir():
        return []
    found = []
    with _changing(scratch):
        for path in scratch.iterdir():
            if path.suffix == ".lock" and _RUN.fullmatch(path.stem) and not path.with_suffix("").exists():
                with suppress(
                    OSError
                ):  # of a run that was killed while it made or removed its folder; or another user's
                    path.unlink()
            if not _RUN.fullmatch(path.name):
                continue
            folder = RunFolder(scratch, path.name)
            try:
                of = folder.vm()
            except OSError:
                continue  # not ours to read
            found.append((folder, of, folder.is_in_use()))
    return found


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _changing(scratch: Path) -> Iterator[None]:
    """Be the only one that makes, removes or looks for run folders here.

    So a folder without a lock is a dead run's, and not one that is just being made.
    """
    handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
