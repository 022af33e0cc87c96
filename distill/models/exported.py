"""Exports of earlier runs, as a later run takes them up: what `distill export` wrote, by what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.diffusion.prediction import Prediction
from distill.models.checks import first_line
from distill.models.families.registry import FAMILIES
from distill.models.folder import stored_tensors, weight_files, weights_hash
from distill.models.formats import FOLDER_FORMATS, format_named
from distill.models.lora import lora_file

FACTS = "distill.json"
"""A file of every export: what it is and which files it wrote, for machines. `README.md` is for people."""


@dataclass(frozen=True)
class Exported:
    """A student in a folder.

    Args:
        folder: of the export.
        formats: those it holds.
        base_hash: identity of the model that it was distilled from, which its LoRA belongs on.
        network: the sub-folder of its network, where it holds one.
        prediction: what its network predicts; None, in exports that do not say, is what that model predicts.
        sampling: how it is sampled, by the names of `Sampling`'s fields; empty in exports that do not say.
        shift: of the noise levels that it learned; None without flow matching.
        guidance: the lowest and the highest w that it learned; None in exports that do not say.
    """

    folder: Path
    formats: tuple[str, ...]
    base_hash: str
    network: str = "unet"
    prediction: Prediction | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    shift: float | None = None
    guidance: tuple[float, float] | None = None

    def learned(self, w: float) -> float:
        """The w nearest to this one that it has learned."""
        low, high = self.guidance or (w, w)
        return min(max(w, low), high)

    @property
    def is_lora(self) -> bool:
        """Whether its LoRA is used, which it then has in full precision of its dtype; else its full network."""
        return "diffusers" in self.formats

    @property
    def files(self) -> Sequence[Path]:
        """The files of the weights that are used; raises FileNotFoundError if they are gone."""
        return [lora_file(self.folder)] if self.is_lora else weight_files(self.folder, self.network)

    @cached_property
    def weights_hash(self) -> str:
        """16 hex digits over the weights that are taken, as they are stored now (reads them all)."""
        return weights_hash(stored_tensors(self.files))

    def require_base(self, base_hash: str) -> None:
        """Raises ValueError for a student of another model."""
        if self.base_hash != base_hash:
            raise ValueError(
                f"{self.folder} is an export of another model: its base_hash is {self.base_hash}, "
                f"this model's is {base_hash}"
            )


def read_export(folder: str | Path) -> Exported:
    """What the export in `folder` says of itself; its weights are not read.

    Raises:
        ValueError: no export is there, or what it says cannot be read.
    """
    folder = Path(folder).expanduser()
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return _exported(folder, facts)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not an export: it has no {FACTS} (distill export writes them)") from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ValueError(f"{folder / FACTS} is not readable ({type(error).__name__}: {first_line(error)})") from None


def _exported(folder: Path, facts: dict[str, Any]) -> Exported:
    """Raises what is said of facts that are none, or of another kind than they have to be."""
    prediction, guidance, shift = facts.get("prediction"), facts.get("guidance"), facts.get("noise", {}).get("shift")
    family, sampling, formats = facts.get("family", "sd15"), facts.get("sampling", {}), facts["formats"]
    texts = [facts["base_hash"], family, *formats, *([] if prediction is None else [prediction])]
    if not isinstance(formats, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("formats must be a list of texts, and base_hash, family and prediction texts")
    if not isinstance(sampling, dict):
        raise TypeError("sampling must be an object")
    numbers = [*([] if shift is None else [shift]), *(guidance or [])]
    if any(type(number) not in (int, float) or not 0 <= number < 1e6 for number in numbers) or shift == 0:
        raise ValueError("shift and guidance must be numbers above 0")
    if guidance is not None and (len(guidance) != 2 or guidance[0] > guidance[1]):
        raise ValueError("guidance must be the lowest and the highest w")
    return Exported(
        folder,
        tuple(formats),
        facts["base_hash"],
        FAMILIES.find(family).network.folder,
        None if prediction is None else Prediction(prediction),
        sampling,
        shift,
        None if guidance is None else (float(guidance[0]), float(guidance[1])),
    )


def open_export(folder: str | Path) -> Exported:
    """What `read_export` gives, of an export that a run can take up.

    Raises:
        ValueError: no export is there, or one without weights that a run takes up.
    """
    export = read_export(folder)
    if not {"diffusers", *FOLDER_FORMATS} & set(map(format_named, export.formats)):
        raise ValueError(
            f"{export.folder} holds {', '.join(export.formats)}: a run takes up a LoRA for diffusers or a whole "
            "network, export it with formats=[diffusers] or formats=[network]"
        )
    try:
        _ = export.files
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    return export
