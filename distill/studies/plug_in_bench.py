"""A LoRA that was distilled from one model, plugged into its fine-tunes and beside other LoRAs, in the toy world."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.data.progress import Progress
from distill.diffusion.random import generator
from distill.evaluation import report
from distill.evaluation.blocks import Cache, network_hash
from distill.evaluation.compare import WORK, Row, Setting, seeds_of
from distill.evaluation.pipelines import arguments_of, generate_images, use_adapters, use_sampler
from distill.evaluation.toy import JudgeScorer
from distill.toy.styles import Style
from distill.toy.world import labels_of

OWN = {"weight": ("style's weight", "{:g}")}
ORDER = "model weight sampler spacing steps guidance nfe caption_accuracy style frechet".split()
COLUMNS = {key: (report.all_columns() | OWN)[key] for key in ORDER}  # row key: heading, format


@dataclass(frozen=True)
class Line:
    """A row to be: the best of some settings, with these LoRAs on (name: weight); `more` is added to the row."""

    adapters: Mapping[str, float]
    settings: Sequence[Setting]
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A pipeline with all its LoRAs loaded, and how its pictures are scored for a style.

    Args:
        scorer: compares with real pictures of the style.
        cache: of finished rows: killed and started again, it resumes.
        n: pictures of a row.
    """

    pipeline: Any
    style: Style
    scorer: JudgeScorer
    cache: Cache
    n: int
    batch_size: int

    def rows(self, what: str, lines: Sequence[Line]) -> list[Row]:
        """A row for each line: its best setting by Fréchet distance, chosen on the very pictures that are reported.

        It holds the setting, nfe, n, the scorer's metrics and "style", the share of pictures in the style among those
        that it concerns. Standard errors are called `*_se`.
        """
        todo = [s for line in lines for s in line.settings if self._facts(s, line.adapters) not in self.cache]
        progress = Progress(what, self.n * sum(setting.work for setting in todo), WORK)

        def row(setting: Setting, adapters: Mapping[str, float]) -> Row:
            facts = self._facts(setting, adapters)
            return setting.facts() | self.cache.value(facts, lambda: self._measured(setting, adapters, progress))

        return [
            min((row(setting, line.adapters) for setting in line.settings), key=lambda found: found["frechet"])
            | dict(line.more)
            for line in lines
        ]

    def pictures(self, row: Row, adapters: Mapping[str, float], places: Sequence[int]) -> Tensor:
        """Pictures of a row, generated again: [len(places), 3, 32, 32] in [-1, 1]."""
        settings = row["model"], row["sampler"], row["steps"], row["guidance"], row["spacing"]
        setting = Setting(*settings, gamma=row.get("gamma", 0.0))
        return self._generated(setting, adapters, places)

    def real(self) -> Row:
        """What n other real pictures of the style score: the best that can be reached."""
        labels = labels_of(self.scorer.prompts("report", self.n))
        images = self.style.render(labels, generator("real pictures", "other"))
        return {"model": "other real pictures"} | self.scorer.real_pictures(self.n) | self._share(images)

    def _facts(self, setting: Setting, adapters: Mapping[str, float]) -> dict[str, Any]:
        """What a row depends on; the model's name is for people."""
        facts = setting.facts() | {"adapters": dict(adapters), "style": self.style.name, "n": self.n}
        return facts | {"model": network_hash(self.pipeline.unet), "scorer": self.scorer.name}

    def _measured(self, setting: Setting, adapters: Mapping[str, float], progress: Progress) -> Row:
        batches = []
        for places in torch.arange(self.n).split(self.batch_size):
            batches.append(self._generated(setting, adapters, places.tolist()))
            progress.update(setting.work * len(places))
        images = torch.cat(batches)
        measured = self.scorer.measure(images, self.scorer.prompts("report", self.n))
        row = {"nfe": setting.nfe, "n": self.n}
        return row | self.scorer.summarise(measured, "report") | self._share(images)

    def _generated(self, setting: Setting, adapters: Mapping[str, float], places: Sequence[int]) -> Tensor:
        prompts, seeds = self.scorer.prompts("report", self.n), seeds_of("report", self.n)
        use_adapters(self.pipeline, adapters)
        use_sampler(self.pipeline, setting.sampler, setting.spacing)
        chosen = [prompts[i] for i in places], [seeds[i] for i in places]
        arguments = arguments_of(self.pipeline, setting.spacing, setting.steps, gamma=setting.gamma)
        images = generate_images(self.pipeline, *chosen, setting.steps, setting.guidance, arguments=arguments)
        return images.float().cpu() * 2 - 1

    def _share(self, images: Tensor) -> dict[str, float]:
        seen = self.style.seen(images, labels_of(self.scorer.prompts("report", self.n)))
        share = float(seen.mean())
        return {"style": share, "style_se": math.sqrt(share * (1 - share) / len(seen))}


def columns(style: Style) -> dict[str, tuple[str, str]]:
    """The columns of a table of `Bench` rows, for `format_table`."""
    return COLUMNS | {"style": (style.meaning, COLUMNS["style"][1])}
