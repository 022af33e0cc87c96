"""The best checkpoint: chosen, kept, exported and named; runs that no longer get better end, and resume the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.commands import trajectories
from distill.config.loading import ConfigError, load
from distill.config.settings import TrainSettings
from distill.methods.base import CONSISTENCY, DISTANCE, HELDOUT, MEASURES, REWARD
from distill.training.assembly import train_run
from distill.training.best import Best
from distill.training.chain import exported
from distill.training.checkpoint import Checkpoints, _read_manifest, best_of, why_best
from distill.training.export import export_run
from distill.training.heldout_samples import energy_terms, measured
from distill.training.run import checkpoints_of, finished, mark_finished, steps_done
from tests.tiny import save_tiny

NOISE = [0.3, -0.2, 0.5, -0.6]
"""What samples share at all steps: alone, it would hide differences a tenth of its size."""
TRAINED = ["max_train_steps=6", "global_batch_size=2", "lora_rank=2", "log_every=1", "validation_steps=2"]
TRAINED += ["checkpointing_steps=4", "checkpoints_total_limit=1", "dataloader_num_workers=0", "best.choose=true"]


def best(**settings: Any) -> Best:
    """One that follows the consistency."""
    found = Best(**settings)
    found.measures = found.measures or (CONSISTENCY,)
    return found


def samples(mean: float) -> dict[str, list[float]]:
    return {CONSISTENCY: [mean + noise + 0.001 * i for i, noise in enumerate(NOISE)]}


def followed(best: Best, means: Sequence[float], first: int = 1) -> list[dict[str, float]]:
    """What is logged of validations with these measures, at steps 10, 20, ..."""
    found = []
    for number, mean in enumerate(means, first):
        if best.ends_run:
            break
        found.append(best.read({CONSISTENCY: [mean + one * (1 + 0.01 * number) for one in NOISE]}, 10 * number))
    return found


class TestChoice:
    def test_it_is_the_best_of_all_by_any_margin(self) -> None:
        rows = followed(best(choose=True), [1.0, 0.8, 0.79, 0.9, 0.81])
        assert [row["best/step"] for row in rows] == [10, 20, 30, 30, 30]

    def test_where_more_is_better_it_is_the_highest(self) -> None:
        follows = best(choose=True, measures=[REWARD])
        for step, score in enumerate([0.1, 0.3, 0.2], 1):
            follows.read({REWARD: [score, score + 1]}, step)
        assert follows.found is not None and follows.found.step == 2

    def test_the_first_measure_that_is_there_is_followed_to_the_end(self, caplog: pytest.LogCaptureFixture) -> None:
        follows = best(choose=True, measures=[DISTANCE, CONSISTENCY])
        follows.read(samples(1.0), 1)
        follows.read({DISTANCE: [0.0, 0.1], **samples(2.0)}, 2)
        assert follows.found is not None and (follows.found.measure, follows.found.step) == (CONSISTENCY, 1)
        follows.read({DISTANCE: [0.0, 0.1]}, 3)
        assert "step 3 is not judged: no validation/heldout_consistency was measured" in caplog.text

    def test_neither_a_collapsed_student_nor_one_without_numbers_is_chosen(self) -> None:
        follows = best(choose=True)
        follows.read(samples(1.0), 1)
        follows.read(samples(0.1), 2, {"collapse": "all alike"})
        follows.read(samples(float("nan")), 3)
        assert follows.is_at(1) and not follows.is_at(2)

    def test_without_it_nothing_is_read(self) -> None:
        assert best().read(samples(1.0), 1) == {} and not best().follows


class TestStop:
    def test_patience_counts_validations_that_are_no_better(self) -> None:
        follows = best(stop=True, patience=3)
        rows = followed(follows, [1.0, 0.8, 0.82, 0.85, 0.9, 0.1])
        assert [row["best/waited"] for row in rows] == [0, 0, 1, 2, 3] and follows.ends_run
        assert "has not improved by 1 standard errors in 3 validations, since step 20" in follows.reason

    def test_errors_are_of_the_paired_differences(self) -> None:
        """A difference of a tenth of the samples' own error is one, for all samples show it."""
        follows = best(stop=True, patience=2, min_delta=3.0)
        followed(follows, [1.0, 0.97, 0.94, 0.91])
        assert not follows.ends_run and follows.read(samples(0.9), 50)["best/waited"] <= 1

    def test_what_is_within_the_error_is_no_improvement(self) -> None:
        follows = best(stop=True, patience=2)
        follows.read({CONSISTENCY: [1.0, 1.2, 0.8]}, 1)
        follows.read({CONSISTENCY: [0.7, 1.3, 0.97]}, 2)  # by .01 ± .15
        follows.read({CONSISTENCY: [1.3, 0.7, 0.97]}, 3)
        assert follows.ends_run and follows.found is not None and follows.found.step == 2

    def test_alarms_that_are_on_are_named(self) -> None:
        follows = best(stop=True, patience=1)
        follows.read(samples(1.0), 1)
        follows.read(samples(1.1), 2, {"winning": "..."})
        assert follows.reason.endswith("; on at the end: alarm winning")


@pytest.mark.parametrize("stopped", range(7))
def test_resumed_from_any_validation_it_decides_as_it_would_have(stopped: int) -> None:
    means = [1.0, 0.8, 0.85, 0.79, 0.83, 0.84, 0.82]
    whole, begun = best(choose=True, stop=True, patience=3), best(choose=True, stop=True, patience=3)
    rows = followed(whole, means)
    followed(begun, means[:stopped])
    resumed = best(choose=True, stop=True, patience=3)
    resumed.restore(json.loads(json.dumps(begun.state())))
    assert followed(resumed, means[stopped:], stopped + 1) == rows[stopped:]
    assert (resumed.state(), resumed.reason) == (whole.state(), whole.reason) and whole.ends_run


def test_with_another_measure_or_without_stopping_a_resumed_run_continues() -> None:
    ended = best(choose=True, stop=True, patience=1)
    followed(ended, [1.0, 1.1])
    for other in (best(choose=True), best(stop=True, patience=2), best(stop=True, patience=1, measures=[DISTANCE])):
        other.restore(ended.state())
        assert not other.ends_run and (other.found is None) == (other.measures == (DISTANCE,))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"patience": 0}, "best.patience must be at least 1, got 0"),
        ({"min_delta": -1.0}, "best.min_delta must be at least 0, got -1.0"),
        ({"measures": []}, "best.measures is empty: give at least one, or null for those of the method"),
        ({"measures": ["loss"]}, f"best.measures: 'loss' is not known; allowed: {', '.join(MEASURES)}"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        Best(**settings)
    assert str(error.value) == says


class TestEnergy:
    def normal(self, n: int, seed: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed)).double()

    def test_it_is_that_of_its_definition(self) -> None:
        x, y = self.normal(5, 0), self.normal(5, 1, 2.0)
        apart = [(i, j) for i in range(5) for j in range(5) if i != j]

        def mean(a: torch.Tensor, b: torch.Tensor) -> float:
            return sum(float((a[i] - b[j]).square().mean().sqrt()) for i, j in apart) / len(apart)

        assert float(energy_terms(x, y).mean()) == pytest.approx(2 * mean(x, y) - mean(x, x) - mean(y, y), rel=1e-9)

    def test_it_is_about_0_of_one_distribution_and_grows_with_blur_contrast_and_shift(self) -> None:
        y = self.normal(400, 0)
        assert abs(float(energy_terms(self.normal(400, 1), y).mean())) < 0.005
        for other in (self.normal(400, 1, 0.7), self.normal(400, 1, 1.4), self.normal(400, 1) + 0.5):
            assert float(energy_terms(other, y).mean()) > 0.02

    def test_sizes_are_measured_apart_and_few_of_one_have_no_distribution(self) -> None:
        pairs = [(self.normal(6, 0), self.normal(6, 1)), (torch.zeros(2, 3, 4, 2), torch.ones(2, 3, 4, 2))]
        found = measured(pairs, paired=True)
        assert len(found[CONSISTENCY]) == 8 and found[CONSISTENCY][6:] == [1.0, 1.0] and len(found[DISTANCE]) == 6
        assert measured(pairs, paired=False).keys() == {DISTANCE}


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a tiny teacher and a store with held-out solves."""
    folder = tmp_path_factory.mktemp("best")
    (folder / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(8)) + "\n")
    model = f"model.pretrained_model_name_or_path={save_tiny(folder / 'teacher')}"
    usual = ["experiment=lcm_lora_sd15", model, f"data.prompts={folder}/prompts.txt", f"data.store={folder}/store"]
    usual += ["mixed_precision=no", "data.num_samples=4", "data.solver_steps=10", "data.batch_size=4"]
    trajectories.main(load("train", TrainSettings, [*usual, "data.heldout_samples=5"]))
    return usual


def train(folder: Path, *arguments: str) -> int:
    return train_run(load("train", TrainSettings, [*arguments, f"output_dir={folder}"]))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "share", "per_second", "data_wait", "memory_gib")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(clocks)} for row in rows]


@pytest.fixture(scope="module")
def ended(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ends after its second validation, for nothing is so much better than its first."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    more = ["best.stop=true", "best.patience=1", "best.min_delta=1e6", "learning_rate=1e-6", "max_train_steps=100"]
    assert train(folder, *given, *TRAINED, *more) == 0
    return folder


def test_a_run_ends_with_0_and_says_so_where_a_person_and_a_program_look(ended: Path, given: list[str]) -> None:
    rows = rows_of(ended)
    assert rows[-1]["step"] == 4 and rows[-1]["best/waited"] == 1 and rows[-1][CONSISTENCY] > 0
    assert (ended / "DONE").read_text() == "4 of 100\n" and steps_done(ended) == 4
    assert finished(ended, 100) and not finished(ended, 101) and not finished(ended, 100, stops=False)
    before = (ended / "metrics.jsonl").read_bytes()
    again = ["best.stop=true", "best.patience=1", "best.min_delta=1e6", "learning_rate=1e-6", "max_train_steps=100"]
    assert train(ended, *given, *TRAINED, *again) == 0 and (ended / "metrics.jsonl").read_bytes() == before


def test_the_best_checkpoint_is_kept_and_exported_and_the_card_says_by_what(ended: Path, tmp_path: Path) -> None:
    step, folder = int(rows_of(ended)[-1]["best/step"]), checkpoints_of(ended)
    assert best_of(folder) == step and why_best(folder).startswith(f"{CONSISTENCY} ")
    facts = json.loads((export_run(ended, tmp_path / "export") / "distill.json").read_text())
    assert (facts["step"], facts["chosen"]) == (step, why_best(folder)) and exported(tmp_path / "export", ended)
    facts = json.loads((export_run(ended, tmp_path / "latest", "latest") / "distill.json").read_text())
    assert (facts["step"], facts["chosen"]) == (4, "")
    other = shutil.copytree(ended, tmp_path / "other")
    (checkpoints_of(other) / "best").unlink()
    with pytest.raises(ConfigError, match="checkpoint=best: none is marked"):
        export_run(other, tmp_path / "none", "best")


def test_a_run_that_dies_between_a_checkpoint_and_its_validation_decides_the_same(
    given: list[str], tmp_path: Path
) -> None:
    more = ["best.stop=true", "learning_rate=1e-2", "checkpointing_steps=2", "checkpoints_total_limit=null"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert train(whole, *given, *TRAINED, *more) == 0
    shutil.copytree(whole, torn)
    (torn / "DONE").unlink()
    shutil.rmtree(torn / "checkpoints" / "step-00000006")
    lines = (torn / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 4 and HELDOUT in line)
    (torn / "metrics.jsonl").write_text("".join(lines[:last]))  # the step is logged, and its validation is not
    assert train(torn, *given, *TRAINED, *more) == 0
    assert rows_of(torn) == rows_of(whole) and best_of(torn / "checkpoints") == best_of(whole / "checkpoints")
    for _, folder in Checkpoints(torn / "checkpoints").found():
        states = [_read_manifest(run / "checkpoints" / folder.name)[0]["state"] for run in (torn, whole)]
        assert states[0] == states[1]


def test_what_measures_nothing_is_refused_in_a_line(given: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="best.choose=true: this run measures none of .*data.heldout_samples=64"):
        train(tmp_path / "run", *given, *TRAINED, "data.heldout_samples=0")


def test_a_run_learns_the_same_whether_it_chooses_or_not(given: list[str], tmp_path: Path, ended: Path) -> None:
    more = ["learning_rate=1e-6", "best.choose=false", "max_train_steps=4", "lr_scheduler=constant_with_warmup"]
    assert train(tmp_path / "run", *given, *TRAINED, *more) == 0
    losses = [[row["loss"] for row in rows_of(folder) if "loss" in row] for folder in (ended, tmp_path / "run")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_processes_choose_and_end_as_one_does(given: list[str], tmp_path: Path) -> None:
    more = [*given, *TRAINED, "best.stop=true", "best.patience=2", "learning_rate=1e-2", "max_train_steps=40"]
    for processes, engine in ((1, "single"), (2, "ddp")):
        command = [sys.executable, "-m", "distill", "launch", "--num_processes", str(processes), "train", *more]
        command += [f"engine={engine}", f"output_dir={tmp_path}/{processes}"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    one, two = tmp_path / "1", tmp_path / "2"
    assert (one / "DONE").read_text() == (two / "DONE").read_text() != "40\n"
    assert best_of(checkpoints_of(one)) == best_of(checkpoints_of(two))
    chosen = [[row["best/step"] for row in rows_of(run) if "best/step" in row] for run in (one, two)]
    assert chosen[0] == chosen[1]


def test_the_mark_of_a_run_that_took_all_its_steps_is_as_it_was(tmp_path: Path) -> None:
    mark_finished(tmp_path, 8, 8)
    assert (tmp_path / "DONE").read_text() == "8\n"
