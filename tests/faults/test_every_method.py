"""Every method, killed in a step, told to stop, and killed in a save: the end is as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config.loading import CONFIGS
from tests.faults.runs import METHODS, STEPS, Runs

pytestmark = pytest.mark.faults

GAME = ["method.teacher_steps=4", "method.student_steps=2"]
NEEDS: dict[str, list[str]] = {
    "lightning_adversarial": GAME,
    "lightning_mse": GAME,
}
"""What a method needs beside `short`; one that is not here needs nothing."""
NOT_HERE = {
    "mlcm_paper": "a reward of pictures has no weights here; tests/test_reward_command.py takes the toy's",
    "mlcm_reward": "a reward of pictures has no weights here; tests/test_reward_command.py takes the toy's",
    "lightning_convert": "no LoRA can learn it; it is a link of the chain in tests/faults/campaign.py",
}


def short(name: str) -> list[str]:
    """Settings that fit a method to a store of eight steps and to runs of eight: its last two stages, and its skip."""
    node = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())
    given = [f"method={name}", *NEEDS.get(name, []), *(["method.skip=125"] if "skip" in node else [])]
    if stages := node.get("stages"):
        fitted = [{**stage, "iterations": STEPS // 2} for stage in stages[-2:]]
        for stage in fitted:
            stage |= {key: value for key, value in (("skip", 125), ("segments", 2)) if stage.get(key, 0) > value}
            stage |= {"skip": 125} if "skip" in stage else {}
        given.append(f"method.stages={hydra(fitted)}")
    return given


def hydra(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(x)}" for key, x in value.items()) + "}"
    return "[" + ",".join(map(hydra, value)) + "]" if isinstance(value, list) else json.dumps(value).strip('"')


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml")))
def test_a_run_that_meets_three_faults(
    name: str, runs: Runs, fault: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NOT_HERE:
        pytest.skip(NOT_HERE[name])
    monkeypatch.setitem(METHODS, name, short(name))
    drawn, run = random.Random(name), tmp_path / "run"
    row = fault(14, "every method: SIGKILL in a step and in a save, SIGTERM")
    at = drawn.randrange(1, STEPS - 1)
    assert runs.run(run, name, faults=[{"do": "kill", "rank": 0, "step": at}]).codes == [-signal.SIGKILL]
    stopped = runs.run(run, name, faults=[{"do": "SIGTERM", "rank": 0, "step": drawn.randrange(at, STEPS - 1)}])
    assert stopped.codes == [75], stopped.said
    torn = runs.run(run, name, faults=[{"do": "kill", "rank": 0, "save": 1, "touch": drawn.randrange(1, 30)}])
    assert torn.codes == [-signal.SIGKILL]
    seconds, _ = runs.goes_on(run, name)
    lost, differ = runs.difference(run, name)
    row.tried(lost == differ == 0, seconds, lost, differ)
    assert (lost, differ) == (0, 0)
