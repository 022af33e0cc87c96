"""The comparisons that LCM-LoRA was announced with, on any diffusers pipeline: over steps, over guidance with and
without a negative prompt, and over steps with and without the LoRA. One grid and one table each."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor, nn

from distill.data.progress import Progress
from distill.data.words import counted as said
from distill.evaluation.figures import CELL, GridRow, draw_grid
from distill.evaluation.metrics import METRICS
from distill.evaluation.pipelines import generate_images, use_adapters, use_sampler
from distill.evaluation.report import format_table
from distill.evaluation.statistics import laplacian_energy, rmse
from distill.models.families.registry import network_of
from distill.models.schedulers import sigmas_for

STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
GUIDANCES = (1.0, 1.5, 2.0, 4.0)
LORA_STEPS = (1, 4, 8, 15, 20, 25, 30, 50)

SHOWN = 6  # prompts in the grid; the table is over all
LARGEST_CELL = 256  # pixels
DECODING = 3  # what text and decoding of a picture cost, in network evaluations and roughly; for progress only
COLUMNS = {  # row key: heading, format
    "model": ("model", "{}"),
    "scheduler": ("scheduler", "{}"),
    "steps": ("steps", "{}"),
    "guidance": ("w", "{:g}"),
    "negative_prompt": ("negative prompt", "{}"),
    "nfe": ("NFE", "{:g}"),
    "seconds": ("s a picture", "{:.3g}"),
    "difference": METRICS["difference"].column,
    "energy": ("HF energy", "{:.4f}"),
    "negative_change": ("RMSE by negative prompt", "{}"),
    "caption_accuracy": METRICS["caption_accuracy"].column,
}

Row = dict[str, Any]
Right = Callable[[Tensor, Sequence[str]], Tensor]
"""Pictures [B, 3, H, W] in [-1, 1] and their prompts -> [B], 1 where a classifier labels the picture as its prompt."""


@dataclass(frozen=True)
class SweepSetting:
    """One way to sample: the student with LCM's sampler, or the undistilled model with its own. Guidance 1 is none."""

    student: bool
    steps: int
    guidance: float = 1.0
    negative_prompt: str | None = None

    @property
    def work(self) -> int:
        """The cost of a picture, in units of about one network evaluation."""
        return self.steps * (1 if self.guidance <= 1 else 2) + DECODING


@dataclass(frozen=True)
class Sweep:
    """What is generated.

    Args:
        columns: headings of the grid's columns.
        lines: the grid's lines for each prompt, by title; each has a way for every column.
        reference: the undistilled model at full steps, where there is one: what differences are taken from.
    """

    name: str
    columns: tuple[str, ...]
    lines: Mapping[str, tuple[SweepSetting, ...]]
    reference: SweepSetting | None

    def ways(self) -> list[SweepSetting]:
        """All of them once, the reference first."""
        first = [self.reference] if self.reference else []
        return list(dict.fromkeys([*first, *(way for line in self.lines.values() for way in line)]))


def steps_sweep(
    steps: Sequence[int], guidance: float, negative_prompt: str | None, reference: SweepSetting | None
) -> Sweep:
    """The student at several numbers of steps, and the reference beside them."""
    ways = [SweepSetting(True, n, guidance, negative_prompt) for n in steps]
    last = [reference] if reference else []
    return Sweep("steps", tuple(_columns([*ways, *last])), {"": (*ways, *last)}, reference)


def guidance_sweep(
    guidances: Sequence[float], negative_prompt: str, steps: int, reference: SweepSetting | None
) -> Sweep:
    """The student at several guidances, with and without a negative prompt."""
    without = tuple(SweepSetting(True, steps, w) for w in guidances)
    lines = {
        "": without,
        f"not: {negative_prompt}": tuple(replace(way, negative_prompt=negative_prompt) for way in without),
    }
    return Sweep("guidance", tuple(f"w = {w:g}" for w in guidances), lines, reference)


def lora_sweep(steps: Sequence[int], guidance: float, reference: SweepSetting) -> Sweep:
    """Compares the model with the LoRA and without, at equal steps; without it all else is the reference's."""
    lines = {
        "with the LoRA": tuple(SweepSetting(True, n, guidance, reference.negative_prompt) for n in steps),
        "without": tuple(replace(reference, steps=n) for n in steps),
    }
    return Sweep("lora", tuple(_columns(lines["with the LoRA"])), lines, reference)


def _columns(ways: Sequence[SweepSetting]) -> Iterator[str]:
    for way in ways:
        yield ("" if way.student else "undistilled, ") + f"{way.steps} {'step' if way.steps == 1 else 'steps'}"


@dataclass(frozen=True)
class Models:
    """A student's pipeline and that of the model it was distilled from, where there is one.

    For a LoRA both are the same pipeline, whose LoRA is switched on and off.

    Args:
        schedulers: the student's (True), LCM's, and the undistilled model's own (False), as it was loaded.
        adapters: the student's LoRA weights by adapter name; none for a student that is a full network.
    """

    student: Any
    undistilled: Any | None
    schedulers: Mapping[bool, Any]
    adapters: Mapping[str, float]

    @classmethod
    def of(cls, pipeline: Any, teacher: Any | None = None, lora_scale: float = 1.0) -> Models:
        """The models of a freshly loaded pipeline: one with a LoRA, or a student's, perhaps with its teacher's."""
        adapters = {name: lora_scale for names in pipeline.get_list_adapters().values() for name in names}
        undistilled = teacher or (pipeline if adapters else None)
        own = undistilled.scheduler if undistilled else None
        if not isinstance(pipeline.scheduler, LCMScheduler):
            use_sampler(pipeline, "lcm", "lcm")
        return cls(pipeline, undistilled, {True: pipeline.scheduler, False: own}, adapters)

    def ready(self, way: SweepSetting) -> Any:
        """The pipeline that generates `way`, its scheduler and LoRA set for it.

        Raises:
            ValueError: the undistilled model is needed, and there is none.
        """
        pipeline = self.student if way.student else self.undistilled
        if pipeline is None:
            raise ValueError("there is no undistilled model: a student that is a full network needs teacher=...")
        use_adapters(pipeline, self.adapters if way.student else {})
        pipeline.scheduler = self.schedulers[way.student]
        return pipeline


def run_sweep(
    folder: Path,
    sweep: Sweep,
    models: Models,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 8,
    resolution: int | tuple[int, int] | None = None,
    right: Right | None = None,
) -> str:
    """Generates all ways of a sweep, each with the same prompts and seeds, and writes `<name>.png`, `.md` and `.json`.

    A row of the table holds its way, the scheduler, nfe (network evaluations per picture, counted), seconds per picture
    (text and decoding included), difference (RMSE of pixels in [0, 1] from the reference, mean over pictures), energy
    (mean squared Laplacian) and, given `right`, caption_accuracy. Standard errors over pictures are called `*_se`.
    Pictures with a negative prompt that are generated without it too have negative_change, the RMSE between both; it
    is 0 only where they are equal to the bit.

    Returns:
        The Markdown.

    Raises:
        ValueError: no prompt, or not one seed per prompt.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"need prompts and one seed for each, got {len(prompts)} and {len(seeds)}")
    ways = sweep.ways()
    places = sorted({i * len(prompts) // SHOWN for i in range(SHOWN)})
    measured: dict[SweepSetting, list[Row]] = {way: [] for way in ways}
    shown: dict[SweepSetting, list[Tensor]] = {way: [] for way in ways}
    _warm_up(models, next(way for way in ways if way.student), prompts[0], resolution)
    advance = Progress(f"sweep over {sweep.name}", len(prompts) * sum(way.work for way in ways), "units").update
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        images: dict[SweepSetting, Tensor] = {}
        for way in ways:
            images[way], row = _draw(models, way, prompts[chunk], seeds[chunk], resolution)
            measured[way].append(row | _measure(images, way, sweep.reference, prompts[chunk], right))
            shown[way] += [images[way][i - start] for i in places if i in range(start, start + len(images[way]))]
            advance(way.work * len(images[way]))
    rows = [_row(way, models, measured[way]) for way in ways]
    folder.mkdir(parents=True, exist_ok=True)
    _write_grid(folder / f"{sweep.name}.png", sweep, [prompts[i] for i in places], shown)
    (folder / f"{sweep.name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = _markdown(sweep, rows, len(prompts))
    (folder / f"{sweep.name}.md").write_text(text)
    return text


@contextmanager
def counted(network: nn.Module) -> Iterator[Counter[str]]:
    """Counts the samples that pass through `network` inside, as "evaluations"."""
    count: Counter[str] = Counter()
    hook = network.register_forward_pre_hook(lambda _, inputs: count.update(evaluations=len(inputs[0])))
    try:
        yield count
    finally:
        hook.remove()


def _warm_up(models: Models, way: SweepSetting, prompt: str, resolution: int | tuple[int, int] | None) -> None:
    """The first call of a pipeline takes longer than others."""
    pipeline = models.ready(way)
    generate_images(pipeline, [prompt], [0], 1, way.guidance, resolution, arguments=_levels(pipeline, 1))


def _levels(pipeline: Any, steps: int) -> dict[str, Any]:
    """What is handed over to a scheduler of flow matching, which some pipelines would have shift its levels twice."""
    sigmas = sigmas_for(pipeline.scheduler, "trailing", steps)
    return {} if sigmas is None else {"sigmas": sigmas}


def _draw(
    models: Models,
    way: SweepSetting,
    prompts: Sequence[str],
    seeds: Sequence[int],
    resolution: int | tuple[int, int] | None,
) -> tuple[Tensor, Row]:
    """Pictures [B, 3, H, W] in [0, 1] and what they cost in all."""
    pipeline = models.ready(way)
    levels = _levels(pipeline, way.steps)
    began = time.perf_counter()
    with counted(network_of(pipeline)) as count:
        images = (
            generate_images(pipeline, prompts, seeds, way.steps, way.guidance, resolution, way.negative_prompt, levels)
            .float()
            .cpu()
        )
    seconds = time.perf_counter() - began
    return images, {"n": len(images), "evaluations": count["evaluations"], "seconds": seconds}


def _measure(
    images: Mapping[SweepSetting, Tensor],
    way: SweepSetting,
    reference: SweepSetting | None,
    prompts: Sequence[str],
    right: Right | None,
) -> dict[str, Tensor]:
    """What is measured of each picture of a batch, [B] each."""
    measured = {"energy": laplacian_energy(images[way])}
    if reference is not None:
        measured["difference"] = rmse(images[way], images[reference])
    without = images.get(replace(way, negative_prompt=None))
    if way.negative_prompt is not None and without is not None:
        measured["negative_change"] = rmse(images[way], without)
    if right is not None:
        measured["caption_accuracy"] = right(images[way] * 2 - 1, prompts)
    return measured


def _row(way: SweepSetting, models: Models, batches: Sequence[Row]) -> Row:
    n = sum(batch["n"] for batch in batches)
    row: Row = {
        "model": "student" if way.student else "undistilled",
        "scheduler": type(models.ready(way).scheduler).__name__,
        "steps": way.steps,
        "guidance": way.guidance,
        "negative_prompt": way.negative_prompt,
        "n": n,
        "nfe": sum(batch["evaluations"] for batch in batches) / n,
        "seconds": sum(batch["seconds"] for batch in batches) / n,
    }
    for name in ("difference", "energy", "negative_change", "caption_accuracy"):
        if name in batches[0]:
            values = torch.cat([batch[name] for batch in batches])
            row[name] = float(values.mean())
            if n > 1:
                row[f"{name}_se"] = float(values.std() / n**0.5)
    return row


def _write_grid(
    path: Path, sweep: Sweep, prompts: Sequence[str], shown: Mapping[SweepSetting, Sequence[Tensor]]
) -> None:
    groups = [
        [
            GridRow(prompt, title, torch.stack([shown[way][place] for way in ways]) * 2 - 1)
            for title, ways in sweep.lines.items()
        ]
        for place, prompt in enumerate(prompts)
    ]
    longest = max(groups[0][0].images.shape[-2:])
    draw_grid(path, sweep.columns, groups, cell=min(max(longest, CELL), LARGEST_CELL))


def _markdown(sweep: Sweep, rows: Sequence[Row], n: int) -> str:
    """The table and how to read it."""
    shown = []
    for row in rows:
        cells = {key: value for key, value in row.items() if value is not None and key != "negative_change_se"}
        if "negative_change" in row:
            same = row["negative_change"] == 0
            cells["negative_change"] = "0, equal to the bit" if same else f"{row['negative_change']:.4f}"
        shown.append(cells)
    notes = [
        f"Each row: the same {said(n, 'prompt')} and seeds. w: guidance, 1 is none.",
        "NFE: network evaluations a picture, counted. Seconds include text and decoding.",
        "HF energy: mean squared Laplacian, which blur lowers.",
    ]
    if sweep.reference is not None:
        notes.append("RMSE of pixels in [0, 1]; the reference is the first row. ± standard error over pictures.")
        notes.append("LCM's sampler adds fresh noise after its first step: more steps do not bring it nearer.")
    return "\n".join([f"# Sweep over {sweep.name}", "", format_table(shown, COLUMNS), "", *notes]) + "\n"
