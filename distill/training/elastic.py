"""What a checkpoint gives to a run on other ranks or at another ZeRO stage: the optimizer's state, whole, by weights.

Weights and averages lie whole in every checkpoint. The optimizer's state lies as its ranks held it; DeepSpeed's own
converter makes universal checkpoints of that (Lian et al. 2024, arXiv 2406.18820), of which this reads the state.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPTIMIZER = "optimizer.pt"  # of a network that every rank held whole
PATIENCE_SECONDS = 2 * 3600.0  # of a conversion; a run's watchdog, if it has one, has less
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class NotElastic(ValueError):
    """The optimizer's state cannot be dealt out anew; one line."""


@dataclass(frozen=True)
class WholeState:
    """An optimizer's state by the weights' names.

    Attributes:
        of: the values kept for a weight: tensors of its size by key (Adam: exp_avg, exp_avg_sq); {} before the
            optimizer's first step.
        steps: the optimizer's own count of its steps.
    """

    of: Callable[[str], dict[str, Tensor]]
    steps: float


def is_partitioned(folder: Path) -> bool:
    """Whether the ranks that saved a network's `folder` each held a share of its optimizer's state."""
    return not (folder / OPTIMIZER).is_file()


def read_whole(folder: Path, names: Sequence[str], universal: Path) -> WholeState:
    """The optimizer's state in a network's folder of a verified checkpoint, which it unpickles.

    Args:
        folder: as `Trained.save` has written it.
        names: of the trained weights, in the order in which the optimizer holds them.
        universal: what `to_universal` has made of a partitioned folder.
    """
    return _of_universal(universal) if is_partitioned(folder) else _of_replicated(folder / OPTIMIZER, names)


def to_universal(folder: Path, target: Path) -> None:
    """Makes DeepSpeed's universal checkpoint of a partitioned folder. It takes room and time: three times the weights.

    Raises:
        NotElastic: DeepSpeed cannot; with its own last words.
    """
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder), "--output_folder", str(target)]
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHERS}
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    try:
        done = subprocess.run(command, env=environment, stdout=pipe, stderr=both, text=True, timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotElastic(
            f"{folder}: DeepSpeed has not converted it in {PATIENCE_SECONDS / 3600:g} h: resume with as many ranks and "
            "the same engine as it was saved with"
        ) from None
    if done.returncode:
        said = done.stdout.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise NotElastic(
            f"{folder} was saved by another number of ranks or ZeRO stage, and DeepSpeed cannot convert it "
            f"({said[-1]}): go on with as many ranks and the same engine as it was saved with"
        )


def _of_replicated(file: Path, names: Sequence[str]) -> WholeState:
    state: Mapping[int, Mapping[str, Any]] = torch.load(file, map_location="cpu", weights_only=True)["state"]
    kept = {names[i]: values for i, values in state.items()}
    steps = max((float(values["step"]) for values in state.values() if "step" in values), default=0.0)
    return WholeState(lambda name: _tensors(kept.get(name, {})), steps)


def _of_universal(folder: Path) -> WholeState:
    def of(name: str) -> dict[str, Tensor]:
        files = [folder / "zero" / name / f"{key}.pt" for key in ("exp_avg", "exp_avg_sq")]
        files = [file for file in files if file.is_file()]
        return {file.stem: _tensor(torch.load(file, map_location="cpu", weights_only=True)) for file in files}

    common = torch.load(folder / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
    return WholeState(of, _steps(folder, common))


def _steps(folder: Path, common: Mapping[str, Any]) -> float:
    """ZeRO-1 and 2 leave the count beside each weight, ZeRO-3 with what all weights share."""
    for file in (folder / "zero").rglob("step.pt"):
        return float(torch.load(file, map_location="cpu", weights_only=True))
    state = common.get("optimizer_state_dict", {}).get("state", {})
    return max((float(values["step"]) for values in state.values() if "step" in values), default=0.0)


def _tensor(saved: Any) -> Tensor:
    return saved["param"] if isinstance(saved, Mapping) else saved


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if isinstance(value, Tensor) and key != "step"}
