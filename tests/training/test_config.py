"""Settings that compose, and reach what uses them. Mistakes among them are in tests/faults/test_config.py."""

from __future__ import annotations

import pytest
import yaml

from distill.config.loading import CONFIGS, ConfigError, load
from distill.config.settings import EvaluateSettings, ModelSettings, SampleSettings, TrainSettings
from distill.models.families.registry import FAMILIES
from distill.toy.teacher import teacher_folder
from distill.training.teacher import open_teacher

GIVEN = ["output_dir=runs/a", "data.store=store"]


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "override", [f"experiment={e}" for e in names("experiment")] + [f"engine={e}" for e in names("engine")]
)
def test_every_experiment_and_every_engine_composes(override: str) -> None:
    settings = load("train", TrainSettings, [override, *GIVEN])
    assert settings.output_dir == "runs/a"


def test_settings_reach_the_objects_that_use_them() -> None:
    settings = load("train", TrainSettings, [*GIVEN, "learning_rate=3e-5", "lora_rank=8", "method.loss=l2"])
    assert settings.optimizer["lr"] == 3e-5
    assert settings.student["rank"] == 8
    assert settings.method["loss"] == "l2"


MODELS = {  # the end of an experiment's name, and the family of that model
    "_sd15": "sd15",
    "_sdxl": "sdxl",
    "_ssd1b": "sdxl",
    "_sd3": "sd3",
    "_sd35_medium": "sd3",
    "_sd35_large": "sd3",
    "_flux_dev": "flux",
    "_flux2_klein": "flux2",
    "_z_image": "z_image",
}


def test_every_experiment_states_the_family_that_its_numbers_are_for() -> None:
    """But for the toy's, which are for whatever is tried on."""
    assert {ModelSettings(pretrained_model_name_or_path="x", family=name).family for name in FAMILIES} == set(
        MODELS.values()
    )
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        found = yaml.safe_load(path.read_text()).get("model", {}).get("family")
        toy = "toy" in path.stem or path.stem == "quickstart"
        assert found == (None if toy else next(MODELS[end] for end in MODELS if path.stem.endswith(end))), path.stem


WAYS = {
    "sampler": (
        ["sampler=euler_a"],
        "sampler: sampler 'euler_a' is not known; allowed: lcm, tcd, euler, ddim, heun, dpmpp_2m",
    ),
    "spacing": (["spacing=even"], "spacing: spacing 'even' is not known; allowed: trailing, leading, lcm, milestones"),
}


@pytest.mark.parametrize(("overrides", "said"), WAYS.values(), ids=WAYS.keys())
def test_how_to_sample_is_checked_by_the_table_when_it_is_set(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("sample", SampleSettings, ["prompts=[a]", "output_dir=o", *overrides])
    assert str(caught.value) == said


@pytest.mark.parametrize("samplers", ["[euler/leading]", "[lcm/]", "[lcm,ddim/even]", "[dpm]"])
def test_samplers_to_evaluate_are_checked_when_they_are_set(samplers: str) -> None:
    with pytest.raises(ConfigError, match=r"^samplers\.\d: (sampler|spacing) "):
        load("evaluate", EvaluateSettings, ["output_dir=o", f"samplers={samplers}"])


def test_a_shift_where_there_is_none_is_one_line() -> None:
    model = ModelSettings(pretrained_model_name_or_path=str(teacher_folder()), shift=3.0)
    with pytest.raises(ConfigError, match="^model.shift 3.0 is for flow-matching teachers, .*: leave it null$"):
        open_teacher(model)
    with pytest.raises(ConfigError, match="^model.shift=0: must be greater than 0"):
        load("train", TrainSettings, ["data.store=STORE", "experiment=quickstart", "model.shift=0"])
