"""Finished pieces of an evaluation, kept so that one that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Cache:
    """cache.jsonl in a folder: one finished piece a line, found again by the facts that determine it."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / "cache.jsonl"
        self._values = dict(self._read())

    def value(self, facts: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was computed from these facts, now or earlier. A JSON object."""
        key = key_of(facts)
        if key not in self._values:
            self._values[key] = compute()
            line = json.dumps({"key": key, "facts": facts, "value": self._values[key]})
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        return self._values[key]

    def __contains__(self, facts: Mapping[str, Any]) -> bool:
        return key_of(facts) in self._values

    def tensor(self, facts: Mapping[str, Any], compute: Callable[[], Tensor]) -> Tensor:
        """The same for a tensor, in a file of its own."""
        return self.tensors(facts, lambda: {"tensor": compute()})["tensor"]

    def tensors(self, facts: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The same for several of them, by name, in one file."""
        path = self.folder / f"{key_of(facts)}.safetensors"
        if not path.exists():
            whole = path.with_suffix(".tmp")
            save_file({name: tensor.contiguous() for name, tensor in compute().items()}, whole)
            os.replace(whole, path)
        return load_file(path)

    def _read(self) -> Iterable[tuple[str, dict[str, Any]]]:
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        if not text.endswith("\n"):  # torn by a kill: the next line must not be glued to it
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("\n")
        for line in text.splitlines():
            try:
                row = json.loads(line)
                yield row["key"], row["value"]
            except (ValueError, KeyError, TypeError):
                continue  # torn: it is computed again


def key_of(facts: Mapping[str, Any]) -> str:
    """24 hex digits that differ when a fact does."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


@torch.no_grad()
def weights_hash(module: nn.Module) -> str:
    """16 hex digits over a network's parameters and buffers, their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
