"""Preference learning from the command line: what is refused at once, and a toy run that is scored afterwards."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from distill.config.loading import CONFIGS, ConfigError, build, load
from distill.config.settings import TrainSettings
from distill.diffusion.schedule import NoiseSchedule
from distill.training.fitting import check_method
from tests.forked import python

ROOT = Path(__file__).parents[1]
REWARDS = sorted(path.stem for path in (CONFIGS / "reward").glob("*.yaml"))
STAGES = "[{segments: 1, skip: 250, iterations: 1}, {segments: 1, skip: 250, iterations: 3, reward: 0.1}]"
TOY = ["experiment=quickstart", "engine=single", "method=mlcm", "~method.skip", f"method.stages={STAGES}"]
TOY += ["max_train_steps=4", "lr_warmup_steps=0", "global_batch_size=4"]


def run(script: str, *settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), f"scripts/{script}.py", *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("reward", REWARDS)
def test_every_reward_is_a_component(reward: str) -> None:
    given = [] if reward in ("clip", "pickscore", "toy") else ["reward.path=weights.pt"]
    cfg = load("train", TrainSettings, ["experiment=quickstart", f"reward={reward}", *given])
    assert cfg.reward is not None and cfg.reward_batch_size == 1
    assert load("train", TrainSettings, ["experiment=quickstart"]).reward is None


@pytest.mark.parametrize("experiment", ["mlcm_sdxl", "mlcm_sd15"])
def test_all_four_stages_of_the_paper_are_one_run(experiment: str) -> None:
    given = ["method=mlcm_paper", "networks=critics", "reward=clip", "max_train_steps=15500", "data.store=STORE"]
    cfg = load("train", TrainSettings, [f"experiment={experiment}", *given])
    method = build(cfg.method, schedule=NoiseSchedule.scaled_linear())
    check_method(cfg, method)
    assert method.starts == (0, 12000, 14000, 14500) and method.trains == ("student", "discriminator", "fake_score")
    assert [method.learning_rate(step) for step in method.starts] == [1e-4, 1e-5, 1e-5, 1e-5]
    assert {"reward", "teacher"} <= set(method.requires) and cfg.networks.keys() == {"discriminator", "fake_score"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "there is no reward: set reward=clip"),
        (["reward=toy", "global_batch_size=1"], "samples of a step: global_batch_size=1 must be at least 2"),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(settings: list[str], message: str) -> None:
    cfg = load("train", TrainSettings, [*TOY, *settings])
    method = build(cfg.method, schedule=NoiseSchedule.scaled_linear())
    with pytest.raises(ConfigError, match=message):
        check_method(cfg, method)


WEIGHTS = {
    "clip": "reward",
    "hps": "reward",
    "image_reward": "reward",
    "pickscore": "validation_reward",
    "latent_lpips": "perceptual",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_there_are_a_line_that_names_them(name: str, tmp_path: Path) -> None:
    cfg = load("train", TrainSettings, [*TOY, f"{WEIGHTS[name]}={name}", f"{WEIGHTS[name]}.path={tmp_path}/nowhere"])
    with pytest.raises(ConfigError, match="nowhere") as error:
        build(getattr(cfg, WEIGHTS[name]))
    assert "\n" not in str(error.value)


def test_a_toy_run_is_rewarded_and_scored(tmp_path: Path) -> None:
    toy = [*TOY, f"data.store={tmp_path}/store", f"output_dir={tmp_path}/run", "data.num_samples=12"]
    toy += ["data.solver_steps=4", "validation_prompts=null", "checkpointing_steps=2", "log_every=1"]
    made = run("make_trajectories", *toy)
    assert made.returncode == 0, made.stderr[-3000:]

    trained = run("train", *toy, "reward=toy", "reward_batch_size=3", "dataloader_num_workers=1")
    assert trained.returncode == 0, trained.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["reward" in row for row in metrics] == [False, True, True, True]
    assert all(row["loss"] == pytest.approx(row["segment_1"] + 0.1 * row.get("reward_loss", 0)) for row in metrics)

    scored = run("score_reward", f"run={tmp_path}/run", f"output_dir={tmp_path}/scores", "n=100", "steps=1")
    assert scored.returncode == 0, scored.stderr[-3000:]
    rows = json.loads((tmp_path / "scores" / "rows.json").read_text())
    assert [(row["run"], row.get("step")) for row in rows] == [("run", 2), ("run", 4), ("real pictures", None)]
    assert rows[0]["reward"] != rows[1]["reward"] and rows[2]["reward"] > rows[1]["reward"]
    assert rows[2]["frechet"] < rows[1]["frechet"] and "caption accuracy" in scored.stdout
    assert (tmp_path / "scores" / "reward.png").is_file()
