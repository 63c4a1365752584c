"""A proxy in front of an S3 server that makes trouble on demand: what networks and lesser servers do."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Request:
    """One request on its way; `line` is its method and path with the query."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    """What the server answered; `cut` bytes of the body are all that the client gets (None: all of it)."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    cut: int | None = None


@dataclass
class Rule:
    """`act` on the next `times` requests whose line matches."""

    pattern: re.Pattern[str]
    times: int
    act: Callable[[Request], Answer | None]
    after: Callable[[Answer], Answer | None] | None = None


class Proxy:
    """Passes requests on as they are; `seen` are their lines. Rules are looked at in the order they were made in."""

    def __init__(self, upstream: str) -> None:
        place = urlsplit(upstream)
        self.seen: list[str] = []
        self.sent = self.received = 0
        self.released = threading.Event()
        self._upstream = (place.hostname, place.port)
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client has gone
                    self.close_connection = True

            def __getattr__(self, name: str) -> Callable[[], None]:
                if name.startswith("do_"):
                    return lambda: proxy._handle(self)
                raise AttributeError(name)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    # Rules

    def _rule(
        self,
        pattern: str,
        act: Callable[[Request], Answer | None],
        times: int,
        after: Callable[[Answer], Answer | None] | None = None,
    ) -> None:
        self._rules.append(Rule(re.compile(pattern), times, act, after))

    def answer(self, pattern: str, status: int, code: str, message: str = "no reason", times: int = 1 << 30) -> None:
        """Answer in the server's place."""
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self._rule(pattern, lambda _: Answer(status, [("Content-Type", "application/xml")], body), times)

    def give(self, pattern: str, body: Callable[[], bytes]) -> None:
        """Answer with this, made anew each time, in the server's place."""
        self._rule(pattern, lambda _: Answer(200, [("Content-Type", "application/xml")], body()), 1 << 30)

    def add_header(self, pattern: str, name: str, value: str) -> None:
        """Put a header into the server's answers."""

        def after(answer: Answer) -> Answer:
            answer.headers.append((name, value))
            return answer

        self._rule(pattern, lambda _: None, 1 << 30, after=after)

    def page(self, status: int, body: bytes, location: str = "") -> None:
        """Answer everything with a page for browsers."""
        headers = [("Content-Type", "text/html"), *([("Location", location)] if location else [])]
        self._rule("", lambda _: Answer(status, headers, body), 1 << 30)

    def listen(self, heard: Callable[[Request], None]) -> None:
        """Call `heard` with every request."""

        def act(request: Request) -> None:
            heard(request)

        self._rule("", act, 1 << 30)

    def pretend(self, pattern: str) -> None:
        """Say that it was done, and do nothing."""
        self._rule(pattern, lambda _: Answer(200, [("ETag", '"0"')], b""), 1 << 30)

    def refuse_header(self, pattern: str, header: str, status: int, code: str) -> None:
        """Answer so where the request has a header that begins like this."""
        body = f"<Error><Code>{code}</Code><Message>A header is not known</Message></Error>".encode()

        def act(request: Request) -> Answer | None:
            found = any(name.lower().startswith(header) for name in request.headers)
            return Answer(status, [("Content-Type", "application/xml")], body) if found else None

        self._rule(pattern, act, 1 << 30)

    def strip_header(self, header: str) -> None:
        """Pass requests on without a header, as a server that ignores it would."""

        def act(request: Request) -> None:
            for name in list(request.headers):
                if name.lower() == header:
                    del request.headers[name]

        self._rule("", act, 1 << 30)

    def damage(self, pattern: str, times: int = 1) -> None:
        """Change a byte of the body on its way."""

        def act(request: Request) -> None:
            request.body = request.body[:-1] + bytes([request.body[-1] ^ 1])

        self._rule(pattern, act, times)

    def lose_answer(self, pattern: str, times: int = 1) -> None:
        """Let the server do it, and break the connection before its answer."""
        self._rule(pattern, lambda _: None, times, after=lambda _: None)

    def lose_answer_and_forget(self, pattern: str, status: int, code: str) -> None:
        """Let the server do it once, and break the connection before its answer; answer this to all that follow."""
        body = f"<Error><Code>{code}</Code><Message>Already done</Message></Error>".encode()
        asked: list[str] = []

        def act(request: Request) -> Answer | None:
            asked.append(request.line)
            return Answer(status, [("Content-Type", "application/xml")], body) if len(asked) > 1 else None

        self._rule(pattern, act, 1 << 30, after=lambda _: None)

    def lose_request(self, pattern: str, times: int = 1) -> None:
        """Break the connection when the request has come."""

        def act(_: Request) -> None:
            raise ConnectionAbortedError

        self._rule(pattern, act, times)

    def cut_answer(self, pattern: str, at: int, times: int = 1) -> None:
        """Break the connection after so many bytes of the answer."""

        def after(answer: Answer) -> Answer:
            answer.cut = at
            return answer

        self._rule(pattern, lambda _: None, times, after=after)

    def hang(self, pattern: str) -> None:
        """Keep the request until `released` is set."""

        def act(_: Request) -> None:
            self.released.wait(120)
            raise ConnectionAbortedError

        self._rule(pattern, act, 1 << 30)

    # For the time of a block

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Take every request, and answer none before the end of the block."""
        over = threading.Event()
        with self._only_now("", lambda _: over.wait(120) and None):
            try:
                yield
            finally:
                over.set()

    @contextmanager
    def fail(self) -> Iterator[None]:
        """Refuse whatever would change anything: there is no room, and nothing goes."""
        body = b"<Error><Code>InsufficientStorage</Code><Message>no room</Message></Error>"
        refused = Answer(507, [("Content-Type", "application/xml")], body)
        with self._only_now("^(PUT|POST|DELETE)", lambda _: refused):
            yield

    @contextmanager
    def _only_now(self, pattern: str, act: Callable[[Request], Answer | None]) -> Iterator[None]:
        rule = Rule(re.compile(pattern), 1 << 30, act)
        self._rules.insert(0, rule)
        try:
            yield
        finally:
            self._rules.remove(rule)

    # Passing on

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        line = f"{handler.command} {handler.path}"
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {key: value for key, value in handler.headers.items() if key.lower() != "expect"}
        request = Request(line, headers, body)
        with self._lock:
            self.seen.append(line)
            self.sent += len(body)
            rules = []
            for rule in list(self._rules):
                if rule.times and rule.pattern.search(line):
                    rule.times -= 1
                    rules.append(rule)
        answer: Answer | None = None
        for rule in rules:
            answer = rule.act(request)
            if answer is not None:
                break
        else:
            answer = self._ask(handler, request)
            for rule in rules:
                if rule.after and answer is not None:
                    answer = rule.after(answer)
        if answer is None:
            raise ConnectionAbortedError
        self._reply(handler, answer)

    def _ask(self, handler: BaseHTTPRequestHandler, request: Request) -> Answer:
        upstream = http.client.HTTPConnection(*self._upstream, timeout=120)
        try:
            upstream.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(request.body)
            response = upstream.getresponse()
            body = response.read()
            with self._lock:
                self.received += len(body)
            kept = [(k, v) for k, v in response.getheaders() if k.lower() not in {"transfer-encoding", "connection"}]
            return Answer(response.status, kept, body)
        finally:
            upstream.close()

    def _reply(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        handler.send_response_only(answer.status)
        names = {name.lower() for name, _ in answer.headers}
        for name, value in answer.headers:
            handler.send_header(name, value)
        if "content-length" not in names and answer.status != 204:
            handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(answer.body[: answer.cut])
        if answer.cut is not None:
            raise ConnectionAbortedError
