"""A store of files over HTTP: PUT, GET (also a range), DELETE (also of a folder), and GET / for the list of all."""

import json
import os
import shutil
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_PUT(self):
        path, left = Path(self.server.folder + self.path), int(self.headers["Content-Length"])
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        with part.open("wb") as file:
            while left and (block := self.rfile.read(min(left, 1 << 20))):
                left -= file.write(block)
            os.fsync(file.fileno())
        part.unlink() if left else part.rename(path)  # what was cut off is nothing
        self.answer(400 if left else 201)

    def do_GET(self):
        path, top = Path(self.server.folder + self.path), Path(self.server.folder)
        if self.path == "/":
            files = {str(one.relative_to(top)): one.stat().st_size for one in top.glob("*/[!.]*")}
            self.answer(200, json.dumps(files).encode())
        elif not path.is_file():
            self.answer(404)
        else:
            self.send_range(path)

    def send_range(self, path):
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        with path.open("rb") as file:
            count = min(int(last or 1 << 60), path.stat().st_size - 1) + 1 - file.seek(int(first))
            self.answer(200, count=count)
            while count and (block := file.read(min(count, 1 << 20))):
                count -= self.wfile.write(block)

    def do_DELETE(self):
        path = Path(self.server.folder + self.path)
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        self.answer(204)

    def answer(self, status, body=b"", count=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if count is None else count))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder, port=0, handler=Handler):
        super().__init__(("127.0.0.1", port), handler)
        self.folder = str(folder)


if __name__ == "__main__":
    Server(sys.argv[1], int(sys.argv[2])).serve_forever()
