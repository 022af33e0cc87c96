"""Death at any moment of writing files, put in from outside: a process that kills itself at a touch of one.

A touch is the opening of a file to write, the middle of a write, fsync, a rename, link or removal, or a new folder. It
has a name, `write shard-000000.tar`, and a number. What a process has written outlives its SIGKILL without fsync, which
takes long and is therefore only counted.

    python -m tests.data.dying "os.rename shard-000000.tar:1" scripts/make_trajectories.py SETTINGS
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from distill.data import storage

EVENTS = ("os.rename", "os.link", "os.remove", "os.mkdir")


class Touches:
    """Those of this process from now on; it dies at the one wanted: a number, or a name and its count, `NAME:2`."""

    def __init__(self, fatal: int | str = 0) -> None:
        self.fatal, self.names, self.counts = fatal, [], Counter[str]()  # type: tuple[int | str, list[str], Counter]
        self._alive = True
        sys.addaudithook(self._audit)
        os.fsync = lambda descriptor: self.touch("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        storage.open = lambda *args, **kwargs: _File(open(*args, **kwargs), self)

    def touch(self, event: str, path: str) -> None:
        if not self._alive:
            return
        name = f"{event} {re.sub(f'[.]{storage.HOST}[.][0-9a-f]{{12}}[.]tmp', '.tmp', os.path.basename(path))}"
        self.names.append(name)
        self.counts[name] += 1
        if self.fatal in (len(self.names), f"{name}:{self.counts[name]}"):
            os.kill(os.getpid(), signal.SIGKILL)

    def end(self) -> list[str]:
        self._alive = False
        return self.names

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            self.touch(event, str(arguments[1 if event == "os.rename" else 0]))
        elif event == "open" and set(str(arguments[1] or "")) & set("wxa+"):
            self.touch(event, str(arguments[0]))


class _File:
    """A file whose writes are in two halves, with a touch between."""

    def __init__(self, file: IO[bytes], touches: Touches) -> None:
        self._file, self._touches = file, touches

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._touches.touch("write", str(self._file.name))
        self._file.write(data[len(data) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def in_child(action: Callable[[], object], fatal: int | str = 0) -> list[str] | None:
    """The touches of `action` in a process of its own; None if it died of the fatal one."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        touches = Touches(fatal)
        try:
            action()
            os.write(writer, json.dumps(touches.end()).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as file:
        said = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"exit code {code}"
    return json.loads(said) if code == 0 else None


if __name__ == "__main__":
    Touches(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
