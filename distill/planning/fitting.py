"""The largest micro-batches that fit, for runs that leave their size to be found."""

from __future__ import annotations

import logging

import torch

from distill.config.composition import yaml_of
from distill.config.loading import ConfigError
from distill.config.settings import ClusterSettings, PlanSettings, TrainSettings
from distill.planning.phases import prepared
from distill.training.micro_batch import Split

log = logging.getLogger("distill")
ANY = "cluster/a100-80gb-x8.yaml"  # its numbers of speed are not used


def fitting_split(
    cfg: TrainSettings, split: Split, ranks: int, room: float, teacher_is_lora: bool | None
) -> tuple[Split, float] | None:
    """A `distill.training.micro_batch.Counting`, by a walk through the run's own turns on the meta device."""
    machines = ClusterSettings.model_validate({**yaml_of(ANY), "nodes": 1, "gpus_per_node": ranks})
    teacher = None if teacher_is_lora is None else "lora" if teacher_is_lora else "whole"
    given = {**cfg.model_dump(), "teacher": teacher, "start": None, "micro_batch_size": None}
    try:
        planned = PlanSettings.model_validate({**given, "cluster": machines, "measured_step_seconds": None})
        with torch.random.fork_rng(devices=[]):
            return prepared(planned, alone=True).fitting(room, split)
    except ConfigError as error:
        log.info("micro_batch_size=auto: %s; beginning with %d samples at once", error, split.largest)
        return None
