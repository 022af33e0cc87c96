"""A web server of a folder's files with ranges, each answer after a delay. For benchmarks and tests."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Answers(BaseHTTPRequestHandler):
    """GET and HEAD of files by their names, all of one or a range `bytes=FIRST-LAST`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, folder: Path, latency: float, *args: Any) -> None:
        self.folder, self.latency = folder, latency
        super().__init__(*args)

    def do_HEAD(self) -> None:  # noqa: N802, the name that http.server looks for
        self.answer(body=False)

    def do_GET(self) -> None:  # noqa: N802
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        time.sleep(self.latency)
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.refuse(404)
            return
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            first, end = self.wanted(facts.st_size)
            if first >= facts.st_size > 0:
                self.refuse(416)
                return
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(end - first))
            self.send_header("ETag", f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"')
            if "Range" in self.headers:
                self.send_header("Content-Range", f"bytes {first}-{end - 1}/{facts.st_size}")
            self.end_headers()
            self.wfile.flush()
            while body and first < end:
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, end - first)

    def wanted(self, size: int) -> tuple[int, int]:
        """The first byte and the end of what is asked for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 0, size
        return int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)

    def refuse(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def start(folder: Path, latency: float = 0.0, answers: type[Answers] = Answers) -> ThreadingHTTPServer:
    """Serves a folder on a free port of localhost, in threads, until `shutdown`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(answers, folder, latency))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    print(start(Path(sys.argv[1]), float(sys.argv[2])).server_address[1], flush=True)
    sys.stdin.read()  # until whoever started it ends, or says so
