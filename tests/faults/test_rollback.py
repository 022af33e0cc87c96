"""Runs that meet a spike, or a streak of skipped updates: they go back, and pass over what they have seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import BATCH, Runs, bits, errors, metrics, weights

Fault = Callable[..., Any]
STEPS, AT, MOST = 22, 14, 2  # steps of a run; those taken where a spike begins; updates outside that are one
UNHEALTHY = 3  # exit code
BANDS = [
    "spikes.window=10",
    "spikes.deviations=1",
    f"spikes.steps={MOST}",
    "spikes.factor=50",
    f"engine.max_nonfinite_steps={MOST}",
]
SEEN = [BATCH * AT, BATCH * (AT + MOST)]  # positions of the steps that are outside


def history(run: Path) -> dict[str, Any]:
    return json.loads((run / "rollbacks.json").read_text())


def spoiled(does: str, positions: list[int], ranks: int = 1) -> list[dict[str, Any]]:
    return [{"do": does, "rank": rank, "positions": positions, "of": "loss"} for rank in range(ranks)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "does"), [(2, "spike"), *(pytest.param(1, does, marks=pytest.mark.faults) for does in ("nan", "spike"))]
)
def test_a_run_goes_back_by_itself_as_if_it_had_been_resumed_by_hand_without_those_samples(
    ranks: int, does: str, runs: Runs, fault: Fault, tmp_path: Path
) -> None:
    """Killed before its next checkpoint, too, it knows what it passes over."""
    run, hand = tmp_path / "run", tmp_path / "hand"
    kill = {"do": "kill", "rank": 0, "positions": [SEEN[1], SEEN[1] + BATCH]}
    ended = runs.run(run, ranks=ranks, faults=[*spoiled(does, SEEN, ranks), kill], more=BANDS, steps=STEPS)
    assert ended.codes[0] == -9, ended.said[-4000:]
    (said,) = [line for line in ended.said.splitlines() if "back to the checkpoint" in line]
    assert f"of step {AT}, and the {BATCH * MOST} samples seen since are passed over (1 of 2 times)" in said
    seconds, _ = runs.goes_on(run, ranks=ranks, faults=spoiled(does, SEEN, ranks), more=BANDS, steps=STEPS)

    ended = runs.run(hand, ranks=ranks, more=BANDS, steps=AT)
    assert not any(ended.codes), ended.said[-4000:]
    (hand / "rollbacks.json").write_text((run / "rollbacks.json").read_text())
    runs.goes_on(hand, ranks=ranks, more=BANDS, steps=STEPS)

    assert metrics(run) == metrics(hand) and sorted(metrics(run)) == list(range(1, STEPS + 1))
    assert [metrics(run)[step].get("rollbacks") for step in (AT, AT + 1, STEPS)] == [None, 1, 1]
    found, right = weights(run, STEPS), weights(hand, STEPS)
    assert found.keys() == right.keys() and sum(bits(found[name], right[name]) for name in right) == 0
    assert history(run)["passed_over"] == [[AT, BATCH * MOST]]
    manifest = json.loads((run / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    assert manifest["state"]["passed_over"] == [[AT, BATCH * MOST]]
    fault(9, "a spike, or a streak of skipped updates").tried(True, seconds, 0, 0)


@pytest.mark.faults
def test_a_run_that_diverges_wherever_it_goes_on_goes_back_a_bounded_number_of_times(
    runs: Runs, tmp_path: Path
) -> None:
    more = [*BANDS, "spikes.rollbacks=2"]
    ended = runs.run(tmp_path / "run", faults=spoiled("spike", [SEEN[0], 10**6]), more=more, steps=STEPS)
    assert ended.codes == [UNHEALTHY]
    assert ended.said.count("back to the checkpoint of step") == 2
    (line,) = errors(ended.said)
    assert f"step {AT + MOST}: the student's loss" in line and f"is that of step {AT}" in line
    assert [one["step"] for one in history(tmp_path / "run")["rollbacks"]] == [AT, AT]
    assert history(tmp_path / "run")["passed_over"] == [[AT, 2 * BATCH * MOST]]
    assert max(metrics(tmp_path / "run")) < AT + 2 * MOST

    ended = runs.run(
        tmp_path / "run", faults=spoiled("spike", [SEEN[0], 10**6]), more=[*BANDS, "spikes.rollbacks=0"], steps=STEPS
    )
    assert ended.codes == [0], ended.said[-4000:]  # nothing is watched: the spike is trained on
