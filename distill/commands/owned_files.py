"""Files that a command has written into a folder, so that its next call takes its own away and nobody else's."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

MANIFEST = "written.jsonl"
OWN_NAMES = re.compile(r"(steps-\d+/)?[\w-]+\.(png|md|json)")
"""What such files are called: a manifest from elsewhere reaches nothing outside of its folder."""


class Written:
    """The files of a folder that `save` has made, in this call or an earlier one: lines of `written.jsonl`.

    Args:
        claimed: files that are the command's too, where there is no such list yet.
    """

    def __init__(self, folder: Path, claimed: Iterable[str] = ()) -> None:
        self.folder = folder
        self._known: dict[str, str | None] = dict(self._read())
        if not (folder / MANIFEST).is_file():
            self._known = {name: None for name in claimed if OWN_NAMES.fullmatch(name)}

    def clear(self) -> None:
        """Removes what earlier calls have written and nobody has changed since."""
        for name in self._known:
            if self._is_own(name):
                (self.folder / name).unlink()
                if "/" in name:
                    with suppress(OSError):  # others' files are in it
                        (self.folder / name).parent.rmdir()
        (self.folder / MANIFEST).unlink(missing_ok=True)
        self._known = {}

    def save(self, name: str, write: Callable[[Path], None]) -> None:
        """Has `write` make the file.

        Raises:
            ValueError: there is one of that name that is another's.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not self._is_own(name):
            raise ValueError(f"{path} is there and was not written by this command: choose another output_dir")
        self._note(name, None)  # a kill may leave it half written
        write(path)
        self._note(name, _sha256(path))

    def _note(self, name: str, digest: str | None) -> None:
        self._known[name] = digest
        with open(self.folder / MANIFEST, "a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, "sha256": digest}) + "\n")

    def _is_own(self, name: str) -> bool:
        path = self.folder / name
        if name not in self._known or not path.is_file() or path.is_symlink():
            return False
        return self._known[name] in (None, _sha256(path))

    def _read(self) -> Iterator[tuple[str, str | None]]:
        with suppress(FileNotFoundError):
            for line in (self.folder / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError, KeyError):  # a line that a kill has torn
                    row = json.loads(line)
                    if OWN_NAMES.fullmatch(row["file"]):
                        yield row["file"], row["sha256"]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
