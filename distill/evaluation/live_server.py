"""The page of runs as they go by: served on this machine alone, or written as one file."""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from distill.data.storage import write_whole
from distill.evaluation.live import Watched

log = logging.getLogger("distill")

HOST = "127.0.0.1"
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data:; "
_POLICY += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_PICTURE = re.compile(r"/picture/(\d{1,4})/(step-\d{1,12})/([A-Za-z0-9_.-]{1,100})")
_LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.I)
MOST_EMBEDDED = 8
"""Pictures of each run in a file that is written: those of its newest step."""


def page(seconds: float, data: dict[str, Any] | None = None) -> str:
    """The page, which asks for what it shows; with `data` it holds that itself. It loads nothing from elsewhere."""
    text = (files("distill.evaluation") / "live.html").read_text(encoding="utf-8")
    text = text.replace('{"seconds": 5}', _in_script({"seconds": seconds}))
    if data is None:
        return text
    before, _, after = text.partition('id="embedded">null<')
    return f'{before}id="embedded">{_in_script(data)}<{after}'


def _in_script(value: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_live_page(path: Path, watched: Watched, seconds: float) -> dict[str, Any]:
    """Writes the page with all that it shows, the newest pictures too, and returns that."""
    data = watched.look()
    for run, shown in zip(watched.runs.values(), data["runs"], strict=True):
        newest = list(shown["pictures"])[-1:]
        shown["pictures"] = {
            step: [
                {"name": name, "data": "data:image/png;base64," + base64.b64encode(picture).decode()}
                for name in shown["pictures"][step][:MOST_EMBEDDED]
                if (picture := run.picture(step, name)) is not None
            ]
            for step in newest
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(seconds, data))
    return data


class LiveServer(ThreadingHTTPServer):
    """Serves the page at /, what it shows at /data, and the pictures of the runs: nothing else, and to this machine.

    Args:
        port: 0 takes any that is free.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, watched: Watched, port: int, seconds: float) -> None:
        self.watched, self.seconds, self._lock = watched, seconds, threading.Lock()
        super().__init__((HOST, port), LiveHandler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def look(self) -> bytes:
        """What the page shows, as JSON; one request at a time reads."""
        with self._lock:
            return json.dumps(self.watched.look(), allow_nan=False).encode()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no news."""
        log.debug("a request of %s failed", client_address, exc_info=True)


class LiveHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    server: LiveServer
    server_version, sys_version = "distill", ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """The page, its data, or a picture."""
        if not _LOCAL.fullmatch(self.headers.get("Host", "")):
            # A page elsewhere whose name leads here would otherwise read what is on this machine.
            return self._answer(403, "text/plain", b"open it as http://localhost:PORT/\n")
        path = self.path.partition("?")[0]
        if path in ("/", "/index.html"):
            return self._answer(200, "text/html; charset=utf-8", page(self.server.seconds).encode())
        if path == "/data":
            return self._answer(200, "application/json", self.server.look())
        if asked := _PICTURE.fullmatch(path):
            found = self.server.watched.picture(int(asked[1]), asked[2], asked[3])
            if found is not None:
                return self._answer(200, "image/png", found)
        self._answer(404, "text/plain", b"there is nothing of that name\n")

    do_HEAD = do_GET

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def bound(watched: Watched, port: int, seconds: float) -> LiveServer:
    """A server at a port.

    Raises:
        ValueError: it cannot be had; one line.
    """
    try:
        return LiveServer(watched, port, seconds)
    except OSError as error:
        said = (error.strerror or str(error)).lower()
        raise ValueError(f"port={port} cannot be had ({said}): choose another, or 0 for any that is free") from None
