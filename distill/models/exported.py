"""Exports of earlier runs, as a later run takes them up: what `distill export` wrote, by what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.diffusion.prediction import Prediction
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
        facts = json.loads((folder / FACTS).read_text())
        prediction, guidance = facts.get("prediction"), facts.get("guidance")
        return Exported(
            folder,
            tuple(facts["formats"]),
            facts["base_hash"],
            FAMILIES.find(facts.get("family", "sd15")).network.folder,
            None if prediction is None else Prediction(prediction),
            facts.get("sampling", {}),
            facts.get("noise", {}).get("shift"),
            None if guidance is None else (float(guidance[0]), float(guidance[1])),
        )
    except FileNotFoundError:
        raise ValueError(f"{folder} is not an export: it has no {FACTS} (distill export writes them)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / FACTS} is not readable ({type(error).__name__}: {error})") from None


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
