"""The commands as functions, for notebooks and programs of one's own.

Each takes settings as the command line does, `"key=value"`, or as arguments, `key=value`; where both are given, the
latter count. What a person has to correct is a `ConfigError`, a `StoreError` or a `FileNotFoundError`, in one line.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

from distill.commands import COMMANDS
from distill.config.loading import check_components, load
from distill.models.devices import hide_gpus_if_asked
from distill.training import arithmetic


def trajectories(*overrides: str, **settings: Any) -> None:
    """Writes a store of teacher solves (`distill trajectories`): `data.store`, `data.prompts`, `data.num_samples`."""
    call("trajectories", overrides, settings)


def latents(*overrides: str, **settings: Any) -> None:
    """Writes a store of pictures' clean latents (`distill latents`): `data.store`, `data.images`."""
    call("latents", overrides, settings)


def train(*overrides: str, **settings: Any) -> None:
    """Trains a student from a store (`distill train`), or resumes it: `data.store`, `output_dir`.

    Raises:
        SystemExit: the run ended before its time; its code says why (75: saved, to be run again; 3: it diverged).
    """
    call("train", overrides, settings)


def export(*overrides: str, **settings: Any) -> None:
    """Writes a run's student for other programs (`distill export`): `run`, `output_dir`, `formats`."""
    call("export", overrides, settings)


def sample(*overrides: str, **settings: Any) -> None:
    """Writes pictures of a pipeline, a LoRA or a run (`distill sample`): `run` or `lora`, `prompts`, `output_dir`."""
    call("sample", overrides, settings)


def evaluate(*overrides: str, **settings: Any) -> None:
    """Compares a student with its teacher (`distill evaluate`): `student`, `protocol`, `output_dir`."""
    call("evaluate", overrides, settings)


def call(name: str, overrides: tuple[str, ...], settings: dict[str, Any]) -> None:
    """Runs a command in this process, with its settings checked as on its command line."""
    command = COMMANDS[name]
    assert command.settings is not None
    given = [*overrides, *(f"{key}={text_of(value)}" for key, value in settings.items())]
    checked = load(command.config, command.settings, given)
    deterministic: arithmetic.Deterministic = getattr(checked, "deterministic", "auto")
    hide_gpus_if_asked()
    arithmetic.prepare(deterministic)
    arithmetic.settle(deterministic, getattr(checked, "matmul_precision", "highest"))
    arithmetic.choose_attention(getattr(checked, "attention", "auto"))
    importlib.import_module(command.module).main(check_components(checked))


def text_of(value: Any) -> str:
    """A value as it is typed: texts as they are, numbers, lists and dictionaries as JSON."""
    if value is None or isinstance(value, (bool, int, float, list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
