"""Trains a few-step student from a store: `distill train experiment=lcm_lora_sd15 data.store=STORE output_dir=runs/a`.

Settings are `configs/train.yaml` and its groups; `--cfg` prints them. Run again, it resumes from its newest checkpoint.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("train")

import logging
import sys

from distill.config.settings import TrainSettings
from distill.planning.fitting import fitting_split
from distill.training.assembly import train_run
from distill.training.launched import launched_rank, only_one_process
from distill.training.tracking import setup_logging

log = logging.getLogger("distill")


def main(cfg: TrainSettings) -> None:
    setup_logging(launched_rank())
    if line := only_one_process():
        log.warning(line)
    if code := train_run(cfg, fitting_split):
        sys.exit(code)
