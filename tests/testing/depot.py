"""Keeps backups on a server that speaks HTTP: a datastore driver for backupcore."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, BinaryIO

import backupcore
from backupcore.errors import AccessDenied, IncrementImpossible, NotFound, SourceNotFound, TargetFull, TargetUnavailable
from backupcore.manifest import NAME as MANIFEST
from backupcore.model import Artifact, BackupRun, Listed, SourceRef, Stored

__all__ = ["Depot"]

LABELS = "~labels"  # no artifact has a tilde in its name


@backupcore.driver
class Depot:
    """Artifacts as ``/TOKEN/NAME``. The source is the ID of its run; what has a manifest is complete."""

    host: str = backupcore.option("the server's name or address")
    port: int = backupcore.option("its port", default=80)
    timeout: float = backupcore.option("seconds that the server may take for an answer", default=60.0)

    @contextmanager
    def ask(
        self,
        ctx: backupcore.Context | None,
        method: str,
        path: str,
        body: BinaryIO | bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[HTTPResponse]:
        """The answer to one request, with its status looked at. A cancel wakes whoever waits for it."""
        connection = HTTPConnection(self.host, self.port, timeout=self.timeout, blocksize=1 << 20)
        with ctx.on_cancel(self.waker(connection)) if ctx else nullcontext():
            try:
                connection.connect()
                if ctx:
                    ctx.check()  # a cancel until now found no socket
                connection.request(method, path, body, dict(headers or {}))
                answer = connection.getresponse()
                self.check_status(answer, f"{method} {path}")
                yield answer
            except (OSError, HTTPException) as error:
                if ctx:
                    ctx.check()  # it was woken by a cancel, and the error is that
                raise TargetUnavailable(f"{self.host}:{self.port} does not answer: {error!r}") from error
            finally:
                connection.close()

    def waker(self, connection: HTTPConnection) -> Callable[[], None]:
        """What ends a wait in another thread: `close` would not, it takes the number away and the receive goes on."""

        def wake() -> None:
            if connection.sock:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

        return wake

    def check_status(self, answer: HTTPResponse, what: str) -> None:
        """A server that refuses says so in the status, and nowhere else."""
        if answer.status < 300:
            return
        kinds = {401: AccessDenied, 403: AccessDenied, 404: NotFound, 413: TargetFull, 507: TargetFull}
        kind = kinds.get(answer.status, TargetUnavailable)
        raise kind(f"{self.host}:{self.port} answered {answer.status} {answer.reason} to {what}")

    def put(self, ctx: backupcore.Context, path: str, body: BinaryIO | bytes, size: int) -> None:
        """Send one file; the server shows it once it has all of it."""
        with self.ask(ctx, "PUT", path, body, {"Content-Length": str(size)}):
            pass

    def names(self, ctx: backupcore.Context | None) -> dict[str, int]:
        """All files, as ``TOKEN/NAME``, and their sizes."""
        with self.ask(ctx, "GET", "/") as answer:
            files: dict[str, int] = json.loads(answer.read())
            return files

    @backupcore.hookimpl
    def prebackup(self, run: BackupRun, ctx: backupcore.Context) -> None:
        """The server answers, and has every source that the run builds on."""
        names = self.names(ctx)
        for source in run.builds_on:
            if f"{source}/{MANIFEST}" not in names:
                raise IncrementImpossible(f"source {source} is no longer on {self.host}")

    @backupcore.hookimpl
    def backup(self, artifacts: Sequence[Artifact], run: BackupRun, ctx: backupcore.Context) -> Stored:
        """The manifest last: with it, all is there."""
        labels = json.dumps(run.labels).encode()
        self.put(ctx, f"/{run.id}/{LABELS}", labels, len(labels))
        done = 0
        for artifact in sorted(artifacts, key=lambda one: one.name == MANIFEST):
            with artifact.open() as stream:
                self.put(ctx, f"/{run.id}/{artifact.name}", stream, artifact.size)
            done += artifact.size
            ctx.progress.done(done)
        return Stored(source=SourceRef(run.id), stored=done)

    @backupcore.hookimpl
    def postbackup(self, run: BackupRun) -> None:
        """What a run has left that came to nothing. Its context may be cancelled: this asks without, and not long."""
        quick = Depot(host=self.host, port=self.port, timeout=min(self.timeout, 5.0))
        names = quick.names(None)
        if f"{run.id}/{MANIFEST}" not in names and any(name.startswith(f"{run.id}/") for name in names):
            with quick.ask(None, "DELETE", f"/{run.id}"):
                pass

    @backupcore.hookimpl
    def restore(self, source: SourceRef, ctx: backupcore.Context) -> Sequence[Artifact]:
        """The files below the token, which are asked for when they are read."""
        found = {name: size for name, size in self.names(ctx).items() if name.startswith(f"{source}/")}
        if f"{source}/{MANIFEST}" not in found:
            raise SourceNotFound(f"{self.host}:{self.port} holds no backup {source}")
        names = ((path.partition("/")[2], size) for path, size in found.items())
        return [Remote(self, source.token, name, size, ctx) for name, size in names if name != LABELS]

    @backupcore.hookimpl
    def delete(self, sources: Sequence[SourceRef], ctx: backupcore.Context) -> bool:
        """The manifest first: from then on it is no backup any more."""
        for source in sources:
            for path in (f"/{source}/{MANIFEST}", f"/{source}"):
                with self.ask(ctx, "DELETE", path):
                    pass
        return True

    @backupcore.hookimpl
    def sources(self, ctx: backupcore.Context) -> Iterator[Listed]:
        """Every token with a manifest."""
        names = self.names(ctx)
        for token in [name.partition("/")[0] for name in names if name.endswith(f"/{MANIFEST}")]:
            size = sum(count for name, count in names.items() if name.startswith(f"{token}/"))
            with self.ask(ctx, "GET", f"/{token}/{LABELS}") as answer:
                yield Listed(source=SourceRef(token), labels=json.loads(answer.read()), size=size)


@dataclass(frozen=True)
class Remote(Artifact):
    """A file on the server. It pickles as its address; the context stays in this process."""

    depot: Depot
    token: str
    name: str
    size: int
    ctx: backupcore.Context | None

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self.depot, self.token, self.name, self.size, None)

    def open(self) -> BinaryIO:
        """A stream from byte 0."""
        return io.BufferedReader(Download(self))

    def read_at(self, offset: int, length: int) -> bytes:
        """A range of the file."""
        if offset >= self.size or not length:
            return b""
        asked = {"Range": f"bytes={offset}-{offset + length - 1}"}
        with self.depot.ask(self.ctx, "GET", f"/{self.token}/{self.name}", headers=asked) as answer:
            return answer.read()


class Download(io.RawIOBase):
    """What the server sends of one file, as it comes."""

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self.remote = remote
        self.stack = ExitStack()
        path = f"/{remote.token}/{remote.name}"
        self.answer = self.stack.enter_context(remote.depot.ask(remote.ctx, "GET", path))
        if remote.ctx:
            remote.ctx.stack.callback(self.close)  # for a stream that nobody closes

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes. Those that a cancel has cut off are no end of the file."""
        try:
            return self.answer.readinto(buffer)
        except HTTPException as error:
            raise TargetUnavailable(f"{self.remote.name} was cut off: {error!r}") from error
        finally:
            if self.remote.ctx:
                self.remote.ctx.check()

    def close(self) -> None:
        """Give the connection up."""
        if not self.closed:
            super().close()
            self.stack.close()
