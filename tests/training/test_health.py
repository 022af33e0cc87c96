"""Health: each alarm in the trouble it is meant for and in no other, in series that are made up and in real runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.diffusion.adversarial import AdversarialScalars
from distill.diffusion.prediction import Prediction
from distill.methods.mlcm import MLCM
from distill.models.denoiser import NetworkDenoiser
from distill.models.discriminator import CriticNetwork, Discriminator
from distill.models.families.loading import load_teacher
from distill.training import health as alarms
from distill.training.checkpoint import Checkpoints
from distill.training.engine import EngineSettings
from distill.training.loop import Every, Observers, train
from distill.training.preemption import Preemption
from distill.training.tracking import JsonlTracker, Meter, TrainingProgress, open_trackers, read_metrics
from distill.training.trained_network import TrainingRecipe
from distill.training.validation import Validation, diversity
from distill.training.watchdog import Watchdog
from tests.tiny import save_tiny, tiny_conditioning, tiny_unet
from tests.training.engine_worker import SCHEDULE, TWO_LEVELS, micro_batches, student

Caplog = pytest.LogCaptureFixture


def Health(*arguments: Any, **settings: Any) -> alarms.Health:  # noqa: N802
    """Of a run with adversarial training, logged as MLCM does."""
    return alarms.Health(*arguments, **settings, adversarial=AdversarialScalars())


def game(real: float, fake: float) -> dict[str, float]:
    return {"student/loss": 0.9, "discriminator/real_accuracy": real, "discriminator/fake_accuracy": fake}


def followed(health: alarms.Health, rows: Iterable[dict[str, float]], name: str) -> list[float]:
    """What an alarm says after each row."""
    return [health.read(row, step)[f"alarm/{name}"] for step, row in enumerate(rows, start=1)]


def said(caplog: Caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


class TestGame:
    def test_chance_takes_all_of_the_window(self, caplog: Caplog) -> None:
        assert followed(Health(4), [game(0.9, 0.7)] + 5 * [game(0.55, 0.5)], "chance") == [0, 0, 0, 0, 1, 1]
        (line,) = said(caplog)
        assert line.startswith("chance: discriminator does no better than guessing (accuracies 0.55 on real, 0.50 on")
        assert "from step 2 on" in line and "learning rate of it" in line

    @pytest.mark.parametrize("real, fake", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
    def test_one_that_says_the_same_of_all_is_guessing(self, real: float, fake: float) -> None:
        """The last layer of a new one is zero: its logits are neither above nor below 0."""
        assert followed(Health(2), 2 * [game(real, fake)], "chance") == [0, 1]

    @pytest.mark.parametrize("real, fake", [(0.7, 0.5), (0.6, 0.62), (1.0, 0.3), (0.98, 0.9)])
    def test_a_game_that_is_open_is_left_alone(self, real: float, fake: float, caplog: Caplog) -> None:
        health = Health(2)
        for name in ("chance", "winning"):
            assert followed(health, 6 * [game(real, fake)], name) == [0] * 6
        assert not said(caplog) and not health.ends_run

    def test_winning_takes_both_accuracies(self, caplog: Caplog) -> None:
        rows = 3 * [game(1.0, 0.9)] + 3 * [game(1.0, 0.99)] + [game(1.0, x) for x in (0.97, 0.95, 0.9)]
        assert followed(Health(3), rows, "winning") == [0, 0, 0, 0, 0, 1, 1, 1, 0]
        (line,) = said(caplog)
        assert line.startswith("winning: discriminator is always right (accuracies 1.00 on real, 0.99 on fake, from")

    def test_about_the_limit_it_is_said_once_and_after_an_episode_again(self, caplog: Caplog) -> None:
        near = [game(0.55 + 0.03 * (-1) ** i, 0.55) for i in range(20)]  # about the limit of .55
        health = Health(1)
        assert followed(health, near, "chance") == [0] + 19 * [1]
        assert len(said(caplog)) == 1
        assert followed(health, [game(0.65, 0.65), game(0.5, 0.5)], "chance") == [0, 1]
        assert len(said(caplog)) == 2

    def test_what_is_not_finite_does_not_count(self) -> None:
        rows = [game(0.5, 0.5), game(float("nan"), 0.5), game(0.5, 0.5)]
        assert followed(Health(2), rows, "chance") == [0, 0, 1]

    def test_a_run_without_a_discriminator_logs_nothing_more(self) -> None:
        assert Health().read({"loss": 0.3, "grad_norm": 1.0}, 10) == {}

    def test_the_balance_is_of_the_adversarial_losses(self) -> None:
        """.693 of 1.386 by guessing. A student's loss of several terms is not what is asked for."""
        guessing = {**game(0.5, 0.5), "student/loss": 0.693, "discriminator/loss": 1.386}
        whole = alarms.Health(adversarial=AdversarialScalars(student_loss="loss"))
        assert whole.read(guessing, 1)["discriminator/balance"] == pytest.approx(0.5)
        assert "discriminator/balance" not in Health().read(guessing, 1)
        mixed = {**guessing, "student/loss": 20.0, "student/adversarial_loss": 1.386}
        assert Health().read(mixed, 1)["discriminator/balance"] == pytest.approx(1.0)
        alone = {key: value for key, value in guessing.items() if "student" not in key}  # steps of D's alone
        assert "discriminator/balance" not in whole.read(alone, 1)

    def test_the_method_says_what_its_scalars_are_called(self) -> None:
        row = {"critic/real_accuracy": 1.0, "critic/fake_accuracy": 1.0}
        named = alarms.Health(1, adversarial=AdversarialScalars("critic"))
        assert named.read(row, 1)["alarm/winning"] == 1
        assert Health(1).read(row, 1) == {} and alarms.Health(1).read(row, 1) == {}


class TestCollapse:
    def rows(self, *values: float) -> list[dict[str, float]]:
        return [{"validation/diversity": value} for value in values]

    def test_it_is_a_share_of_the_first_validation(self, caplog: Caplog) -> None:
        """On below half of 1.2, off above three quarters."""
        rows = self.rows(1.2, 0.7, 0.59, 0.7, 0.89, 0.91, 0.7, 0.5)
        assert followed(Health(), rows, "collapse") == [0, 0, 1, 1, 1, 0, 0, 1]
        assert len(said(caplog)) == 2
        assert "validation/diversity is 0.59 at step 3, and was 1.2 at step 1" in said(caplog)[0]

    def test_what_rises_is_no_collapse(self) -> None:
        assert followed(Health(), self.rows(0.1, 0.3, 0.9, 0.2), "collapse") == [0, 0, 0, 0]


@pytest.mark.parametrize("name, row", [("chance", game(0.5, 0.5)), ("winning", game(1.0, 1.0))])
def test_null_switches_an_alarm_off(name: str, row: dict[str, float]) -> None:
    health = Health(2, **{name: None}, stop=True)  # type: ignore[arg-type]
    assert all(f"alarm/{name}" not in health.read(row, step) for step in range(1, 5)) and not health.ends_run
    health = Health(diversity=None, stop=True)
    assert [health.read({"validation/diversity": v}, 1) for v in (1.0, 0.1)] == [{}, {}] and not health.ends_run


def test_other_ranks_know_and_do_not_say(caplog: Caplog) -> None:
    health = Health(1, stop=True, main=False)
    assert followed(health, [game(0.5, 0.5)], "chance") == [1] and health.ends_run
    assert not said(caplog)


def test_a_resumed_run_knows_what_the_uninterrupted_one_does(tmp_path: Path, caplog: Caplog) -> None:
    """All of it follows from metrics.jsonl up to the step where the run goes on."""
    rows = [game(*pair) for pair in [(0.9, 0.8)] * 3 + [(0.5, 0.5)] * 3 + [(0.6, 0.55)] * 4]
    rows[1] |= {"validation/diversity": 1.0}
    rows[8] |= {"validation/diversity": 0.4}
    whole, log = Health(3), JsonlTracker(tmp_path)
    for step, row in enumerate(rows, start=1):
        row |= whole.read(row, step)
        log.log(row, step)
    log.close()
    caplog.clear()
    for stopped in range(len(rows)):
        resumed = Health(3)
        resumed.recall(read_metrics(tmp_path, stopped))
        for step, row in enumerate(rows[stopped:], start=stopped + 1):
            assert row.items() >= resumed.read(row, step).items()
        assert resumed.alarms == whole.alarms
    assert {line.partition(":")[0] for line in said(caplog)} == {"chance", "collapse"}


def test_numbers_that_json_has_no_word_for_come_back(tmp_path: Path) -> None:
    log = JsonlTracker(tmp_path)
    log.log({"a": float("inf")}, 3)
    log.log({"a": 1.0}, 4)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "a"')
    assert read_metrics(tmp_path, 4) == [{"step": 3, "a": float("inf")}, {"step": 4, "a": 1.0}]
    assert read_metrics(tmp_path / "new", 4) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logged_steps": 0}, "health.logged_steps must be at least 1, got 0"),
        ({"chance": 0.3}, r"health.chance must be null or lie in \[0, 0.25\), got 0.3"),
        ({"winning": 1.0}, r"health.winning must be null or lie in \[0.75, 1\), got 1.0"),
        ({"diversity": -0.5}, r"health.diversity must be null or lie in \[0, 1\), got -0.5"),
    ],
)
def test_a_limit_out_of_range_is_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        Health(**settings)


def test_diversity_is_that_of_its_definition() -> None:
    """Over all pairs, counted out."""
    z = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0)) + 3 * torch.arange(3.0).view(
        3, 1, 1, 1, 1
    )
    pairs = [(z[p, i] - z[p, j]).square().mean() for p in range(3) for i in range(4) for j in range(i)]
    assert diversity(z) == pytest.approx(float(torch.stack(pairs).mean() / z.var()), rel=1e-5)
    assert diversity(z[:, :1].expand(-1, 4, -1, -1, -1)) == 0  # one picture a prompt, whatever the noise
    assert diversity(torch.zeros(3, 4, 2, 5, 5)) == 0
    assert diversity(z - z.mean(1, keepdim=True)) > diversity(z)


def test_a_student_that_collapses_is_found_by_its_validation(tmp_path: Path) -> None:
    """A network whose answer no longer depends on what it sees draws one picture, but for what the sampler adds."""
    teacher = load_teacher(save_tiny(tmp_path / "teacher", "sd15"), parts=("vae",))
    unet = tiny_unet("sd15", time_cond_proj_dim=None)
    engine = EngineSettings().start()
    engine.prepare({"student": NetworkDenoiser(unet, SCHEDULE, Prediction.SAMPLE)}, {"student": TrainingRecipe(adam)})
    prompts = [f"prompt {i}" for i in range(6)]
    validation = Validation(teacher, prompts, tiny_conditioning("sd15", 6), steps=3, seed=0, diversity_seeds=3)
    health, tracker = Health(), open_trackers({}, tmp_path, {})
    weight = unet.conv_out.weight.detach().clone()
    found = []
    for step, share in enumerate((1.0, 0.01, 1.0), start=1):
        unet.conv_out.weight.data.copy_(share * weight)
        found.append(validation(engine, tracker, step))
        found[-1] |= health.read(found[-1], step)
    tracker.close()
    engine.release()
    assert [row["alarm/collapse"] for row in found] == [0, 1, 0]
    assert found[0]["validation/diversity"] == found[2]["validation/diversity"] > 0.1
    assert len(list((tmp_path / "samples" / "step-000001").iterdir())) == len(prompts)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


def frozen(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.0)


@pytest.mark.parametrize("stop", [False, True])
def test_a_discriminator_that_does_not_learn_is_said_to_guess(stop: bool, tmp_path: Path, caplog: Caplog) -> None:
    """A real run of six steps. With `stop` it ends when it is said, saved; and as soon as it is gone on with."""
    stage: Any = {"segments": 1, "grid": 8, "skip": 125, "source": "student", "student_steps": 2, "iterations": 6}
    method = MLCM(SCHEDULE, [stage | {"adversarial": 0.5}], guidance=2.0)
    plans = {"student": TrainingRecipe(adam), "discriminator": TrainingRecipe(frozen)}

    def run(health: alarms.Health, steps: int) -> int:
        critic = Discriminator(CriticNetwork(tiny_unet("sdxl", seed=1, **TWO_LEVELS), (8, 8)))
        engine = EngineSettings().start()
        engine.prepare({**student(lora=True), "discriminator": critic}, plans)
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        resumed = checkpoints.resume(engine, "latest")
        start = resumed.step if resumed else 0
        health.recall(read_metrics(tmp_path, start))
        tracker = open_trackers({}, tmp_path, {}, resume_step=start)
        taken = train(
            method,
            engine,
            (batch for step in range(start, 100) for batch in micro_batches(engine, step)),
            start_step=start,
            max_train_steps=steps,
            every=Every(log=1, checkpoint=100, validate=100),
            observers=Observers(
                Meter(steps, 8, start), TrainingProgress(steps, start, main=False), tracker, health, lambda step: {}
            ),
            checkpoints=checkpoints,
            preemption=Preemption(tmp_path),
            watchdog=Watchdog(None),
        )
        tracker.close()
        engine.release()
        return taken

    assert run(Health(3, stop=stop), 6) == (3 if stop else 6)
    assert [line.partition(" (")[0] for line in said(caplog)] == ["chance: discriminator does no better than guessing"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["alarm/chance"] for row in rows] == ([0, 0, 1] if stop else [0, 0, 1, 1, 1, 1])
    assert all(row["alarm/winning"] == 0 and 0.3 < row["discriminator/balance"] < 0.7 for row in rows)
    if stop:
        assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000003\n"
        assert run(Health(3, stop=True), 6) == 3
        assert run(Health(3), 6) == 6
