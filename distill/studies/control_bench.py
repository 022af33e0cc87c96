"""Other uses of a few-step LoRA in stock diffusers pipelines, measured in the toy world: under a control, and from a
picture."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from distill.data.progress import Progress
from distill.diffusion.solver import make_times
from distill.evaluation.blocks import Cache, network_hash
from distill.evaluation.compare import WORK, Row, Setting, seeds_of
from distill.evaluation.metrics import METRICS
from distill.evaluation.pipelines import arguments_of, use_adapters, use_sampler
from distill.evaluation.report import setting_of
from distill.evaluation.toy import JudgeScorer
from distill.toy.control import follows

COLUMNS = {  # row key: heading, format
    "model": ("model", "{}"),
    "strength": ("strength", "{:g}"),
    "sampler": ("sampler", "{}"),
    "spacing": ("times", "{}"),
    "steps": ("steps", "{}"),
    "from": ("from t", "{}"),
    "guidance": ("w", "{:g}"),
    "nfe": ("NFE", "{}"),
    "caption_accuracy": METRICS["caption_accuracy"].column,
    "follows": METRICS["follows"].column,
    "frechet": METRICS["frechet"].column,
}

Arguments = Callable[[int, float], dict[str, Any]]
"""Steps and a strength -> arguments of a pipeline's call with which it takes these steps at this strength."""


def under_control(steps: int, strength: float) -> dict[str, Any]:
    """Arguments of a ControlNet's pipeline; strength 0 is no control."""
    return {"num_inference_steps": steps, "controlnet_conditioning_scale": strength}


def from_picture(steps: int, strength: float) -> dict[str, Any]:
    """Arguments of an image-to-image pipeline, which takes only the last `strength` of its num_inference_steps."""
    return {"num_inference_steps": nominal_steps(steps, strength), "strength": strength}


def nominal_steps(steps: int, strength: float) -> int:
    """The fewest num_inference_steps n of an image-to-image pipeline at which it takes `steps`, int(n * strength).

    Raises:
        ValueError: strength outside (0, 1], at which no number would do.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], got {strength:g}")
    return next(n for n in count(steps) if int(n * strength) >= steps)


def start_time(spacing: str, T: int, steps: int, strength: float) -> int:
    """The time t to which such a pipeline noises the picture: at few steps it is far from strength * T.

    With n num_inference_steps it takes the last int(n * strength) of the n times that it would take from noise.
    """
    n = nominal_steps(steps, strength)
    return make_times(spacing, T, n)[n - steps]


@dataclass(frozen=True)
class ControlRow:
    """A row to measure: the best of some settings by Fréchet distance, with these LoRAs on (name: weight)."""

    settings: Sequence[Setting]
    adapters: Mapping[str, float]
    strength: float


@dataclass(frozen=True)
class ControlBench:
    """A pipeline that is given pictures, and how its results are scored.

    Args:
        pipeline: with all its LoRAs loaded.
        arguments: of a call, from steps and strength.
        images: [n, 3, 32, 32] in [0, 1], as pipelines take them: what it is given for each picture.
        coverage: [n, 1, 32, 32], the layout which that picture ought to have, see `distill.toy.world`.
        cache: of finished rows: killed and started again, it resumes.
    """

    pipeline: Any
    arguments: Arguments
    images: Tensor
    coverage: Tensor
    scorer: JudgeScorer
    cache: Cache
    batch_size: int

    def rows(self, what: str, ways: Sequence[ControlRow]) -> list[Row]:
        """A row for each way: its best setting, chosen on the very pictures that are reported.

        It holds the setting, strength, nfe and what `scored` says.
        """
        todo = [s for way in ways for s in way.settings if self._facts(way, s) not in self.cache]
        progress = Progress(what, len(self.images) * sum(setting.work for setting in todo), WORK)

        def row(way: ControlRow, setting: Setting) -> Row:
            found = self.cache.value(self._facts(way, setting), lambda: self._measured(way, setting, progress))
            return setting.facts() | {"strength": way.strength, "nfe": setting.nfe} | found

        return [min((row(way, s) for s in way.settings), key=lambda found: found["frechet"]) for way in ways]

    def pictures(self, row: Row, way: ControlRow, places: Sequence[int]) -> Tensor:
        """Pictures of a row, generated again: [len(places), 3, 32, 32] in [-1, 1]."""
        return self._generated(way, setting_of(row), places)

    def scored(self, images: Tensor) -> dict[str, float]:
        """The scorer's metrics of n pictures [n, 3, 32, 32] in [-1, 1], and "follows", the mean correlation with the
        coverage. Standard errors are called `*_se`."""
        measured = self.scorer.measure(images, self._prompts())
        correlation = follows(images, self.coverage)
        error = float(correlation.std()) / math.sqrt(len(correlation))
        summary = self.scorer.summarise(measured, "report")
        return summary | {"follows": float(correlation.mean()), "follows_se": error}

    def _prompts(self) -> list[str]:
        return self.scorer.prompts("report", len(self.images))

    def _facts(self, way: ControlRow, setting: Setting) -> dict[str, Any]:
        """What a row depends on; the model's name is for people."""
        parts = {name: network_hash(self.pipeline.components[name]) for name in self._networks()}
        given = hashlib.sha256(self.images.numpy().tobytes()).hexdigest()
        facts = setting.facts() | {"adapters": dict(way.adapters), "model": parts, "given": given}
        return facts | {"arguments": self.arguments(setting.steps, way.strength), "scorer": self.scorer.name}

    def _networks(self) -> list[str]:
        return [name for name in ("unet", "controlnet") if name in self.pipeline.components]

    def _measured(self, way: ControlRow, setting: Setting, progress: Progress) -> Row:
        batches = []
        for places in torch.arange(len(self.images)).split(self.batch_size):
            batches.append(self._generated(way, setting, places.tolist()))
            progress.update(setting.work * len(places))
        return self.scored(torch.cat(batches))

    def _generated(self, way: ControlRow, setting: Setting, places: Sequence[int]) -> Tensor:
        use_adapters(self.pipeline, way.adapters)
        use_sampler(self.pipeline, setting.sampler, setting.spacing)
        prompts, seeds = self._prompts(), seeds_of("report", len(self.images))
        arguments = self.arguments(setting.steps, way.strength)
        steps = arguments["num_inference_steps"]
        arguments |= arguments_of(self.pipeline, setting.spacing, steps, gamma=setting.gamma)
        generated = self.pipeline(
            prompt=[prompts[i] for i in places],
            image=self.images[list(places)],
            guidance_scale=setting.guidance,
            generator=[torch.Generator().manual_seed(seeds[i]) for i in places],
            output_type="pt",
            **arguments,
        )
        return generated.images.float().cpu() * 2 - 1
