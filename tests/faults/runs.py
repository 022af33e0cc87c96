"""Runs of a tiny teacher that faults are tried on, each beside one that nothing disturbed.

What is set makes them small and quick. All else is as it comes: four processes that read ahead on each rank, checks of
what is read, retries, locks, watchdogs. Only a test that is about one of these sets it, and says so.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.clocks import is_clock
from tests.faults.ranks import ROOT, Ended, Launch, Ranks
from tests.forked import python
from tests.tiny import save_tiny

STEPS = 8
EVERY = 2  # steps a checkpoint
BATCH = 2
METHODS = {
    "one network": ["method.skip=125", "ema_decay=0.9", "learning_rate=1e-2"],
    "two networks": ["method=lightning_adversarial", "method.teacher_steps=4", "method.student_steps=2"],
}
ENGINES = {1: "single", 2: "zero2"}


class Runs:
    """Settings of runs, and what starts them. A run is named by its folder, `method` and number of `ranks`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "prompts.txt").write_text("a red boat\ntwo owls\na bridge at night\nsnow\n")
        teacher = f"model.pretrained_model_name_or_path={save_tiny(folder / 'teacher', 'sd15')}"
        data = [f"data.prompts={folder}/prompts.txt", "data.num_samples=12", "data.solver_steps=8", "data.keep=all"]
        self.store = folder / "store"
        self._common = ["experiment=lcm_lora_sd15", teacher, *data, f"data.store={self.store}", "mixed_precision=no"]
        self._sizes = ["lora_rank=2", "lora_alpha=2", "lr_warmup_steps=0", "log_every=1"]
        self._undisturbed: dict[tuple[str, int, int], Path] = {}
        self.ranks = Ranks(folder)
        ended = self.ranks.run(self._common, script="make_trajectories")
        assert ended.codes == [0], ended.said

    def settings(self, run: Path, method: str = "one network", ranks: int = 1, steps: int = STEPS) -> list[str]:
        sizes = [*self._sizes, f"global_batch_size={BATCH}", f"max_train_steps={steps}", "optimizer.betas=[0.5,0.9]"]
        sizes += [f"checkpointing_steps={EVERY}", "checkpoints_total_limit=3", f"engine={ENGINES[ranks]}"]
        return [*self._common, *sizes, *METHODS[method], f"output_dir={run}"]

    def start(
        self,
        run: Path,
        method: str = "one network",
        ranks: int = 1,
        faults: Sequence[dict[str, Any]] = (),
        more: Sequence[str] = (),
        steps: int = STEPS,
        **more_of_it: Any,
    ) -> Launch:
        return self.ranks.start([*self.settings(run, method, ranks, steps), *more], ranks, faults, **more_of_it)

    def run(self, run: Path, *args: Any, **kwargs: Any) -> Ended:
        return self.start(run, *args, **kwargs).wait()

    def goes_on(self, run: Path, *args: Any, **kwargs: Any) -> tuple[float, Ended]:
        """Starts a run again, which must reach its end: seconds until a step was taken, and how it went."""
        start = time.monotonic()
        launch = self.start(run, *args, **kwargs)
        while launch.running() and " INFO step " not in launch.log.read_text():
            time.sleep(0.02)
        seconds, ended = time.monotonic() - start, launch.wait()
        assert not any(ended.codes) and (run / "DONE").exists(), ended.said[-4000:]
        return seconds, ended

    def undisturbed(self, method: str = "one network", ranks: int = 1, steps: int = STEPS) -> Path:
        """The folder of a run that nothing disturbed, made once."""
        key = method, ranks, steps
        if key not in self._undisturbed:
            run = self.folder / f"undisturbed-{len(self._undisturbed)}"
            ended = self.run(run, method, ranks, steps=steps)
            assert not any(ended.codes), ended.said[-4000:]
            self._undisturbed[key] = run
        return self._undisturbed[key]

    def difference(self, run: Path, method: str = "one network", ranks: int = 1, steps: int = STEPS) -> tuple[int, int]:
        """Samples of steps that were not taken as in an undisturbed run; bits of weights that differ at the end."""
        wanted = self.undisturbed(method, ranks, steps)
        rows, expected = metrics(run), metrics(wanted)
        lost = sum(rows.get(step) != row for step, row in expected.items()) + len(rows.keys() - expected.keys())
        found, right = (weights(folder, steps) for folder in (run, wanted))
        assert found.keys() == right.keys() and len(right) > 10
        return lost * BATCH, sum(bits(found[name], right[name]) for name in right)


def accelerate(arguments: Sequence[str], faults: Path, ranks: int = 2) -> list[str]:
    """The command that a user launches a run with, the faults of a file put in."""
    flags = ["--use_deepspeed", "--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no"]
    launcher = [python(), "-m", "accelerate.commands.launch", *flags, "--dynamo_backend", "no"]
    launcher += ["--main_process_port", "0", "-m", "tests.faults.sabotage", str(faults)]
    return [*launcher, str(ROOT / "scripts/train.py"), *arguments]


def metrics(run: Path) -> dict[int, dict[str, Any]]:
    """What a run has logged, by step, without what clocks say."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: {key: value for key, value in row.items() if not is_clock(key)} for row in rows}


def weights(run: Path, step: int) -> dict[str, np.ndarray]:
    files = sorted((run / "checkpoints" / f"step-{step:08d}").rglob("*.safetensors"))
    return {f"{f.parent.name}/{f.name}/{name}": w for f in files for name, w in load_file(f).items()}


def bits(a: np.ndarray, b: np.ndarray) -> int:
    """In how many bits two arrays differ."""
    assert a.dtype == b.dtype and a.shape == b.shape
    return int(np.unpackbits(np.frombuffer(a.tobytes(), np.uint8) ^ np.frombuffer(b.tobytes(), np.uint8)).sum())


def wait_for(path: Path, lines: int, process: Launch | subprocess.Popen[Any]) -> None:
    """Until a file has so many lines; not for longer than `process` runs."""
    alive = process.running if isinstance(process, Launch) else lambda: process.poll() is None
    while alive() and not (path.exists() and path.read_bytes().count(b"\n") >= lines):
        time.sleep(0.005)


def errors(said: str) -> list[str]:
    """The lines of an output that say what went wrong."""
    return [line for line in said.splitlines() if line.startswith("error: ") or " ERROR " in line]
