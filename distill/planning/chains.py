"""A chain of runs as a plan sees it: what each link takes, and all of them together."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distill.config.loading import ConfigError
from distill.config.settings import ClusterSettings, PlanSettings
from distill.data.progress import Progress
from distill.planning.inference import hours, inference
from distill.planning.phases import (
    NotCounted,
    PlannedRun,
    engine_of,
    prepared,
    ranks_of,
    step_seconds,
    store_bytes,
    usable,
)
from distill.training.chain import Link

COUNTED = set(
    "model data method student networks engine teacher optimizer ema_decay "
    "gradient_checkpointing mixed_precision max_train_steps".split()
)
EXPORTED = 4  # bytes of a weight: the links that build on it get exactly what was trained


@dataclass(frozen=True)
class PlannedLink:
    """What a link takes.

    Args:
        work: its steps or samples, for people.
        engine: and micro-batch, for people.
        memory: bytes of a GPU.
        hours: on all machines of the plan.
        disk: bytes that stay: a store, or checkpoints and an export.
        not_counted: why the link was left out of the plan, and has none of these numbers; "" if it was not.
    """

    name: str
    work: str
    engine: str = ""
    memory: float = 0.0
    fits: bool = True
    hours: float = 0.0
    disk: float = 0.0
    not_counted: str = ""


def planned_links(links: Sequence[Link], cluster: ClusterSettings) -> list[PlannedLink]:
    """The links that write a store or train; those that are counted alike are walked through once.

    A link that calls what a plan knows nothing of, a reward say, is there without numbers.

    Raises:
        ConfigError: a link that cannot be planned, by its name.
    """
    taken = [link for link in links if link.trains or link.writes]
    plans = {link.name: settings_of(link, links, cluster) for link in taken}
    kinds = {link.name: kind_of(plans[link.name]) for link in taken if link.trains}
    first = {kind: plans[name] for name, kind in reversed(kinds.items())}
    progress = Progress("walking through the links", len(first), "kinds of links")
    walked: dict[str, PlannedRun | str] = {}
    with multiprocessing.get_context("fork").Pool(min(len(first), os.cpu_count() or 1) or 1, _alone) as pool:
        for kind, found in pool.imap_unordered(_walked, first.items()):
            if isinstance(found, PlannedRun):
                walked[kind] = found
            elif isinstance(found, NotCounted):
                walked[kind] = str(found)
            else:
                name = next(name for name, other in kinds.items() if other == kind)
                raise ConfigError(f"link {name}: {found}")
            progress.update(1)
    return [
        _trained(link, plans[link.name], walked[kinds[link.name]]) if link.trains else _written(link, plans[link.name])
        for link in taken
    ]


def settings_of(link: Link, links: Sequence[Link], cluster: ClusterSettings) -> PlanSettings:
    """The settings to plan a link with: its teacher by kind, and an engine that runs on all GPUs."""
    given = link.settings.model_dump()
    if given["teacher"] is not None:
        teacher = next(other for other in links if str(other.export) == str(given["teacher"]))
        given["teacher"] = "lora" if "rank" in teacher.settings.student else "whole"
    given |= {"start": None, "cluster": cluster, "measured_step_seconds": None}
    found = PlanSettings.model_validate(given)
    if link.trains and engine_of(found) == "single" and ranks_of(cluster) > 1:
        raise ConfigError(
            f"link {link.name}: engine=single is one process, there are {ranks_of(cluster)} GPUs: "
            "add 'engine=zero2' to overrides"
        )
    return found


def kind_of(cfg: PlanSettings) -> str:
    """What decides the walk through a link's turns; the rest of its settings decides what is counted of that walk."""
    found: dict[str, Any] = cfg.model_dump(mode="json", include=COUNTED)
    found["data"] = {key: found["data"][key] for key in ("solver_steps", "keep", "segments", "dtype", "guidance")}
    return json.dumps(found, sort_keys=True)


def _alone() -> None:
    torch.set_num_threads(1)


def _walked(given: tuple[str, PlanSettings]) -> tuple[str, PlannedRun | ConfigError]:
    kind, cfg = given
    try:
        return kind, prepared(cfg, alone=True)
    except ConfigError as error:
        return kind, error


def _trained(link: Link, cfg: PlanSettings, run: PlannedRun | str) -> PlannedLink:
    """A link with what its run takes, or with the reason why that is not known."""
    if isinstance(run, str):
        return PlannedLink(link.name, f"{cfg.max_train_steps} steps", not_counted=run)
    run = replace(run, cfg=cfg)
    needed = run.memory(run.engine, cfg.gradient_checkpointing, run.samples)
    saved = -(-cfg.max_train_steps // cfg.checkpointing_steps)
    kept = saved if cfg.checkpoints_total_limit is None else min(saved, cfg.checkpoints_total_limit)
    student = next(weights for _, names, weights in run.trained() if "student" in names)
    return PlannedLink(
        name=link.name,
        work=f"{cfg.max_train_steps} steps",
        engine=f"{run.engine}, {run.samples} x {run.split.accumulated}",
        memory=needed,
        fits=needed <= usable(cfg.cluster),
        hours=cfg.max_train_steps * step_seconds(run, run.engine) / 3600,
        disk=kept * run.checkpoint(run.engine) + EXPORTED * student.trained,
    )


def _written(link: Link, cfg: PlanSettings) -> PlannedLink:
    half, samples = cfg.mixed_precision != "no", cfg.data.num_samples or 0
    teacher = inference(cfg.model, half, cfg.data.sizes)
    needed = teacher.solve_bytes(cfg.data)
    return PlannedLink(
        name=link.name,
        work=f"{samples} samples",
        engine=f"solves, {cfg.data.batch_size} at once",
        memory=needed,
        fits=needed <= usable(cfg.cluster),
        hours=hours(samples * teacher.solve_flops(cfg.data), cfg.cluster, half) / ranks_of(cfg.cluster),
        disk=store_bytes(cfg, samples),
    )
