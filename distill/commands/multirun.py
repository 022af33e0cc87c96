"""Sweeps: `distill train -m learning_rate=1e-4,2e-4 lora_rank=8,64 output_dir=runs/sweep`.

Every combination of the values runs as a command of its own, one after another, in a folder of its own below
`output_dir`; a sweep that is run again leaves what is finished and resumes the rest. A run that fails does not keep the
others from theirs. At the end `output_dir/index.html` compares the runs, and `failed` beside one says how it ended.
With `hydra/sweeper=optuna` each run's values follow from the results of those before (`distill/commands/search.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from distill.commands.search import search
from distill.commands.sweep_runs import Start, SweepRunner, compare
from distill.config.loading import Settings
from distill.config.mistakes import ConfigError
from distill.config.sweeps import combinations, swept_of

FLAGS = ("-m", "--multirun")


def multirun(
    command: Sequence[str], config: str, settings: type[Settings], arguments: Sequence[str], start: Start | None = None
) -> int:
    """Runs a command with every combination of what its arguments sweep over; returns the first exit code but 0.

    Args:
        command: what is typed before the settings, such as `["train"]`.
        start: how a run is started; by itself, as a process.

    Raises:
        ConfigError: nothing is swept over, or the settings of a run are wrong; nothing has been started.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("-m starts processes of its own: use distill launch, or distill submit -m")
    swept = swept_of(config, settings, arguments)
    if swept.search is not None:
        return search(command, config, settings, swept, start)
    runs = combinations(config, settings, swept)
    with SweepRunner(command, runs[0].folder.parent, start) as sweep:
        for number, run in enumerate(runs, 1):
            print(f"run {number} of {len(runs)}: {run.name}", flush=True)
            sweep.run(run)
            if sweep.stopped:
                break
    compare(sweep.base, runs, sweep.codes)
    return sweep.code()
