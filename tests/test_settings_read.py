"""Settings that nothing of a run would read are refused, and the steps of a method with stages follow from them."""

from __future__ import annotations

import sys

import pytest

from distill.config.loading import ConfigError, build, load
from distill.config.settings import TrainSettings
from distill.diffusion.schedule import NoiseSchedule
from distill.training.fitting import check_method

SCHEDULE = NoiseSchedule.scaled_linear()


def checked(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> TrainSettings:
    """The settings of a command line, as far as they need neither teacher nor store."""
    monkeypatch.setattr(sys, "argv", ["train", *overrides])
    cfg = load("train", TrainSettings, ["data.store=STORE", *overrides])
    check_method(cfg, build(cfg.method, schedule=SCHEDULE))
    return cfg


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("experiment=mlcm_toy method=mlcm_reward reward=toy", "stages take 14500 steps, .*set max_train_steps=null"),
        ("experiment=quickstart reward=toy", "reward is set, and the method uses none: leave it out"),
        (
            "experiment=quickstart perceptual=latent_lpips perceptual.path=x",
            "perceptual is set, and the method uses none",
        ),
        ("experiment=quickstart reward_batch_size=3", "reward_batch_size is set, and has no effect"),
        ("experiment=lcm_toy lora_rank=8", "lora_rank is set, and has no effect: no network of this run has a LoRA"),
        ("experiment=lcm_toy lora_alpha=8", "lora_alpha is set, and has no effect"),
        ("experiment=quickstart lr_scheduler=constant lr_warmup_steps=5", "lr_warmup_steps is set, .*has no warm-up"),
        ("experiment=quickstart networks.discriminator.conditional=true", "the method trains no discriminator"),
        (
            "experiment=quickstart engine.stages={critic:2}",
            "engine.stages.critic: no such network is trained; .* student",
        ),
        ("experiment=quickstart networks.fake_score.rank=4", "the method trains no fake_score: it trains student"),
        (
            "experiment=quickstart tracking.wandb.project=x",
            "wandb is set, and nothing is sent there: set tracking=wandb",
        ),
        ("experiment=quickstart data.cache=x", "data.cache is set, and has no effect: the store is in a local folder"),
        ("experiment=quickstart data.read_timeout_seconds=3", "no effect: the store is in a local folder"),
        ("experiment=quickstart data.store=s3://a/b data.cache_gib=3", "no effect: there is no data.cache"),
        ("experiment=mlcm_sdxl method=mlcm_reward", "there is no reward: set reward=clip"),
        ("experiment=mlcm_sdxl max_train_steps=5", "stages take 14000 steps, not max_train_steps=5: .*=null"),
        ("experiment=quickstart max_train_steps=null", "max_train_steps: null is for a method with stages"),
    ],
)
def test_what_nothing_reads_is_one_line(overrides: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=line):
        checked(monkeypatch, *overrides.split())


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ("experiment=mlcm_sdxl", 14000),
        ("experiment=mlcm_sdxl method=mlcm_reward reward=clip", 14500),
        ("experiment=mlcm_sd15 method=mlcm_critics", 15000),
        ("experiment=mlcm_toy method=mlcm_reward reward=toy max_train_steps=null", 14500),
        ("experiment=mlcm_sdxl method=mlcm_paper networks=critics reward=pickscore networks.fake_score.rank=4", 15500),
        ("experiment=lcm_lora_sdxl method=mlcm max_train_steps=null", 14000),
        ("experiment=lightning_toy networks.discriminator.conditional=true lr_warmup_steps=0", 200),
        ("experiment=quickstart lora_rank=8", 350),
        ("experiment=lcm_toy ++lora_rank=8 ++networks.fake_score.rank=4", 1300),
        ("experiment=lcm_toy", 1300),
    ],
)
def test_what_is_read_is_taken_and_steps_follow_the_stages(
    overrides: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checked(monkeypatch, *overrides.split()).max_train_steps == steps
