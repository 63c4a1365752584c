"""The command lines: what this driver asks of rsync and ssh, and the environment in which they run."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import time
from calendar import timegm
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

from backupcore.child import Child
from backupcore.errors import BackupError, ConfigError, IntegrityError, TargetUnavailable
from backupcore_rsync.failures import Refused, translate
from backupcore_rsync.target import DaemonTarget, HostTarget

if TYPE_CHECKING:
    from backupcore import Context
    from backupcore_rsync.driver import Rsync

__all__ = ["Programs", "patiently", "quoted"]

ANSWER = 1 << 30
"""Bytes that a program may answer with: a listing of some 500,000 backups."""

STALLED = 1800
"""Seconds without a byte after which a transfer is given up. A merge may read for minutes before it writes."""

PAUSES = (1.0, 3.0, 8.0, 20.0)
"""Seconds before a target that let nobody in is asked again: a daemon that still counts the last connection, a sshd
that takes few logins at once, a firewall that takes six connections in 30 s (``ufw limit``)."""

T = TypeVar("T")

# All else comes from the options: an RSYNC_* variable of the user's shell must not send a backup elsewhere.
_INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "SSH_AUTH_SOCK")
_LISTED = re.compile(r"([-d])\S{9}\S? +([0-9]+) ([0-9]+/[0-9/]+ [0-9:]+) (.+)")


class Programs:
    """rsync and ssh, as the driver's options describe them. Holds nothing open; pickles as its options.

    `control` is the socket of a connection that others share (`backupcore_rsync.login`), "" where there is none.
    """

    def __init__(self, options: Rsync, control: str = "") -> None:
        self._options = options
        self._control = control

    def environment(self) -> dict[str, str]:
        """What the programs find in their environment."""
        result = {key: os.environ[key] for key in _INHERITED if key in os.environ}
        result.setdefault("PATH", os.defpath)
        if "HOME" not in result:  # cron and systemd may set none
            result["HOME"] = pwd.getpwuid(os.getuid()).pw_dir
        return result | {"LC_ALL": "C", "TZ": "UTC0"}  # their words and dates are read

    def ssh(self) -> list[str]:
        """The ssh command, without the host. ssh takes the first value of an option, so the user's own wins."""
        options = self._options
        command = shlex.split(options.ssh)
        settings = {
            "BatchMode": "yes",  # nobody is there to type a password
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": str(options.timeout),
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "8",
            "LogLevel": "ERROR",  # no banner: its words would be taken for ssh's
            "RequestTTY": "no",
            "RemoteCommand": "none",
        }
        if self._control:
            settings |= {"ControlMaster": "no", "ControlPath": _ssh_quoted(self._control)}
        if options.known_hosts_file:
            settings["UserKnownHostsFile"] = _ssh_quoted(str(options.known_hosts_file.expanduser().absolute()))
            settings["GlobalKnownHostsFile"] = "/dev/null"  # the file named is the one that counts
        if options.identity_file:
            settings["IdentitiesOnly"] = "yes"
            command += ["-i", str(options.identity_file.expanduser().absolute())]
        if options.port:
            command += ["-p", str(options.port)]
        return command + [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]

    def start_ssh(self, target: HostTarget, script: str, *arguments: str) -> Child:
        """A script for the other host's sh, with its arguments as $1, $2, …"""
        program, *rest = self.ssh()
        # One line, and single quotes only: whatever shell the account has passes it on to sh as it is.
        line = " ".join(["exec", "sh", "-c", *map(quoted, (script, "sh", *arguments))])
        return self._start(program, [*rest, target.login, line], "the option ssh")

    def start_login(self, target: HostTarget, control: str) -> Child:
        """An ssh that logs in, runs nothing, and lets others use its connection by the socket `control`."""
        program, *rest = self.ssh()
        more = ["-M", "-N", "-o", f"ControlPath={_ssh_quoted(control)}", "-o", "ControlPersist=no"]
        return self._start(program, [*rest, *more, target.login], "the option ssh")

    def shares_already(self, target: HostTarget, ctx: Context) -> bool:
        """Whether the user's own configuration of ssh has connections shared, which is his affair then."""
        program, *rest = self.ssh()
        child = self._start(program, [*rest, "-G", target.login], "the option ssh")
        try:
            said = self.ask(child, "asking ssh for its configuration", ctx, limit=self._options.timeout)
        except (ConfigError, TargetUnavailable):  # no OpenSSH, or one older than 6.8
            return True
        found = re.search(r"^controlpath (.+)$", said.decode(errors="replace"), re.MULTILINE | re.IGNORECASE)
        return found is not None and found[1] != "none"

    def start_rsync(self, target: object, arguments: Sequence[str]) -> Child:
        """rsync with these arguments; `target` decides how it connects."""
        options = self._options
        command = ["-s"]  # names reach the other side untouched by any shell
        if isinstance(target, HostTarget):
            command += ["-e", " ".join(map(_rsync_quoted, self.ssh())), f"--rsync-path={options.rsync_path}"]
        if isinstance(target, DaemonTarget):
            command += ["--no-motd", f"--contimeout={options.timeout}", "--sockopts=SO_KEEPALIVE"]
            if options.password_file:
                command.append(f"--password-file={options.password_file.expanduser().absolute()}")
        return self._start(options.binary, [*command, *arguments], "the option binary")

    def _start(self, name: str, arguments: Sequence[str], option: str) -> Child:
        import sh  # noqa: PLC0415 - 0.05 s that only those pay who start a program

        environment = self.environment()
        try:
            program = sh.Command(name, search_paths=environment["PATH"].split(os.pathsep))
        except sh.CommandNotFound:
            raise ConfigError(
                f"the program {name} is not installed, or not executable",
                f"Install it (Debian, Ubuntu: apt-get install rsync openssh-client), or name it by {option}.",
            ) from None
        return Child(program, arguments, environment)

    def failed(self, child: Child, code: int, what: str) -> BackupError:
        """The error for a child that ended with `code`."""
        error = translate(code, child.errors, what)
        if child.late:  # whatever it says now is about the signal that ended it
            return TargetUnavailable(
                f"{what}: no answer in time, so {child.name} was ended", "Is it up, and reachable from here?"
            )
        return error

    def ask(
        self,
        child: Child,
        what: str,
        ctx: Context | None,
        *,
        limit: float | None = None,
        still: float | None = None,
        judge: Callable[[int, bytes], BackupError | None] = lambda code, answer: None,
    ) -> bytes:
        """Let a child run to its end; what it wrote to stdout. `ctx` cancels it.

        `limit` are the seconds that it may take, `still` those that it may stand still. `judge` may know better what a
        code and an answer mean.
        """
        with child, ctx.on_cancel(child.stop) if ctx else nullcontext():
            if limit:
                child.within(limit)
            if still:
                child.while_moving(still)
            answer = bytearray()
            while block := child.output.read(1 << 20):
                answer += block
                if len(answer) > ANSWER:
                    raise IntegrityError(f"{what}: the answer is longer than {ANSWER} bytes")
            code = child.wait()
            if ctx:
                ctx.check()
            if not child.late and (judged := judge(code, bytes(answer))):
                raise judged
            if code:
                raise self.failed(child, code, what)
            return bytes(answer)

    def listing(
        self, target: HostTarget | DaemonTarget, rules: Iterable[str], what: str, ctx: Context
    ) -> dict[str, int]:
        """What lies below the target and passes these filter rules: path -> size; a folder's path ends with a slash."""
        return {path: size for path, (size, _) in self.dated_listing(target, rules, what, ctx).items()}

    def dated_listing(
        self, target: HostTarget | DaemonTarget, rules: Iterable[str], what: str, ctx: Context
    ) -> dict[str, tuple[int, int]]:
        """The same with the time of the last change, in seconds since 1970."""
        source = f"{target.at}:{target.path}/" if isinstance(target, HostTarget) else f"{target.url}/"
        arguments = ["--recursive", "--list-only", "--no-human-readable", *(f"--filter={rule}" for rule in rules)]
        answer = patiently(
            lambda: self.ask(
                self.start_rsync(target, [*arguments, "--", source]), what, ctx, still=self._options.timeout
            ),
            ctx,
        )
        # Links, devices and names with odd characters are nothing of ours.
        found = (_LISTED.fullmatch(line) for line in answer.decode(errors="replace").splitlines())
        return {
            hit[4] if hit[1] == "-" else f"{hit[4]}/": (int(hit[2]) if hit[1] == "-" else 0, _seconds(hit[3]))
            for hit in found
            if hit
        }

    def transfer(self, child: Child, what: str, ctx: Context, before: int = 0) -> int:
        """Follow an rsync that copies, to its end, and tell the progress; how many bytes were copied with it.

        `before` are the bytes that were copied by others.
        """
        said, count = b"", 0
        while block := child.output.read(1 << 16):
            said = (said + block)[-4096:]
            if counts := re.findall(rb"\r +([0-9]+) +[0-9]+%", said):
                count = int(counts[-1])
                ctx.progress.done(before + count)
        code = child.wait()
        ctx.check()
        if code:
            raise self.failed(child, code, what)
        return before + count


def patiently(work: Callable[[], T], ctx: Context | None, pauses: Sequence[float] | None = None) -> T:
    """`work`, again after each of these pauses (`PAUSES` if None) where it was not even let in."""
    for pause in PAUSES if pauses is None else pauses:
        try:
            return work()
        except Refused as error:
            if ctx is None:  # in a process of a view's
                time.sleep(pause)
                continue
            ctx.log.info("%s; trying again in %.0f s", error, pause)
            ctx.wait(pause)
    return work()


def _seconds(date: str) -> int:
    """A date of rsync's listing, in UTC; now where it is none, so that it is not taken for old."""
    try:
        return timegm(time.strptime(date, "%Y/%m/%d %H:%M:%S"))
    except ValueError:
        return int(time.time())


def _rsync_quoted(word: str) -> str:
    """A word of the command in ``-e``, which rsync takes apart itself: a quote within quotes is doubled."""
    if re.fullmatch(r"[A-Za-z0-9_./=:,@%+-]+", word):
        return word
    doubled = word.replace("'", "''")
    return f"'{doubled}'"


def quoted(word: str) -> str:
    """A word for whatever shell an account has; csh looks for "!" in single quotes, too."""
    return shlex.quote(word).replace("!", r"'\!'")


def _ssh_quoted(path: str) -> str:
    """A path as the value of an ssh option that takes several: with % doubled, in quotes if it holds a blank."""
    escaped = path.replace("%", "%%").replace('"', '\\"')
    return f'"{escaped}"' if re.search(r"\s", path) else escaped
