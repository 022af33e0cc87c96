"""The blocks of an evaluation: which of them this process makes, and a folder that keeps those that are finished.

Several processes share one folder, and none talks to another: tensors appear in it complete or not at all, and one
process writes the lines. An evaluation that was killed resumes from the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.data.progress import begin
from distill.data.storage import make_folder, replace_whole
from distill.models.files import save_file

log = logging.getLogger(__name__)
POLL_SECONDS, SAY_SECONDS, PATIENCE_SECONDS = 0.2, 30.0, 2 * 3600.0

T = TypeVar("T")

# What a launcher sets for each process: its rank, how many there are. SLURM's are those of a step, which `srun` starts.
_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class WorkShare:
    """Which pieces of work are this process's: every `world_size`-th, from its rank on.

    What the pieces are must not depend on `world_size`: then what they amount to does not either.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be within 0 ... {self.world_size - 1}, got {self.rank}")

    @classmethod
    def launched(cls, environment: Mapping[str, str] = os.environ) -> WorkShare:
        """What torchrun, accelerate or srun says of this process; all of the work where there is no launcher.

        Raises:
            ValueError: what it says makes no sense.
        """
        for names in _LAUNCHERS:
            if all(name in environment for name in names[:2]):
                return cls(*(int(environment.get(name, 0)) for name in names))
        return cls()

    def own(self, pieces: Sequence[T]) -> Sequence[T]:
        """This process's among all pieces."""
        return pieces[self.rank :: self.world_size]


class Cache:
    """cache.jsonl in a folder: one finished piece a line, found again by the facts that determine it.

    Args:
        writes: whether lines are written; of several processes one does. Tensors are written by all.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = Path(folder), writes
        make_folder(self.folder)
        self._path = self.folder / "cache.jsonl"
        self._values = dict(self._read())

    def value(self, facts: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was computed from these facts, now or earlier. A JSON object."""
        key = key_of(facts)
        if key not in self._values:
            self._values[key] = compute()
            if self.writes:
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
        self.make(facts, compute)
        return load_file(self._file(facts))

    def has_tensors(self, facts: Mapping[str, Any]) -> bool:
        """Whether `make` has made them, here or in another process."""
        return self._file(facts).exists()

    def make(self, facts: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]) -> None:
        """What `tensors` does, without reading them."""
        path = self._file(facts)
        if not path.exists():
            aside = path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}.tmp")
            save_file({name: tensor.contiguous() for name, tensor in compute().items()}, aside)
            replace_whole(aside, path)

    def awaited(
        self, pieces: Sequence[Mapping[str, Any]], patience: float = PATIENCE_SECONDS
    ) -> list[dict[str, Tensor]]:
        """The tensors of all these facts, once other processes have made those that this one has not.

        Raises:
            TimeoutError: none has appeared for `patience` seconds: another process is gone.
        """
        missing = [facts for facts in pieces if not self.has_tensors(facts)]
        last = said = time.monotonic()
        while missing:
            time.sleep(POLL_SECONDS)
            still, now = [facts for facts in missing if not self.has_tensors(facts)], time.monotonic()
            last = now if len(still) < len(missing) else last
            missing = still
            waiting = f"{len(missing)} of {len(pieces)} blocks of other processes"
            begin(waiting)  # `patience` is the limit here
            if missing and now - last > patience:
                raise TimeoutError(f"{waiting} are missing in {self.folder}, and none came for {patience:g} s")
            if missing and now - said > SAY_SECONDS:
                said = now
                log.info("waiting for %s", waiting)
        return [load_file(self._file(facts)) for facts in pieces]

    def _file(self, facts: Mapping[str, Any]) -> Path:
        return self.folder / f"{key_of(facts)}.safetensors"

    def _read(self) -> Iterable[tuple[str, dict[str, Any]]]:
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        if self.writes and not text.endswith("\n"):  # torn by a kill: the next line must not be glued to it
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
def network_hash(module: nn.Module) -> str:
    """16 hex digits over a network's parameters and buffers, their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
