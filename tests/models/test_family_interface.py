"""Families: one file each, asked for everything that differs between networks, and found wherever they come from."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.config.loading import ConfigError, build, load
from distill.config.settings import TrainSettings
from distill.diffusion.noise import AnyNoise, DynamicShift, FlowNoise, Noise
from distill.diffusion.prediction import Prediction
from distill.diffusion.registry import UnknownName, import_plugins
from distill.diffusion.schedule import NoiseSchedule
from distill.models import families
from distill.models.denoiser import NetworkDenoiser
from distill.models.families import NAMES, SHARED, check_family
from distill.models.families.base import Family, Network
from distill.models.families.loading import load_teacher
from distill.models.families.registry import FAMILIES, family_of_network, family_of_pipeline, network_of, published
from distill.models.families.sd15 import StableDiffusion
from distill.models.families.teacher import PARTS, Teacher
from distill.models.full_size import build_network, published_name
from distill.models.lora import adapters, add_lora, fill_lora, load_lora, lora_config, lora_settings, save_lora
from distill.models.student import LoRAStudent
from distill.training.fitting import unread
from tests.test_house import circles, imports, modules
from tests.tiny import FAMILIES as TINY
from tests.tiny import TOKENS, UNETS, save_tiny, tiny_conditioning, tiny_pipeline, tiny_transformer, tiny_unet
from tests.tiny_flux import tiny_flux
from tests.tiny_qwen import tiny_klein, tiny_z_image

T = torch.tensor([10, 999])


def test_each_file_defines_one_family_and_is_named_like_it() -> None:
    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__", *SHARED}
    assert files == set(NAMES) == set(FAMILIES)
    for name in NAMES:
        module = importlib.import_module(f"distill.models.families.{name}")
        own = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Family)]
        defined = [kind for kind in own if kind.__module__ == module.__name__]
        assert module.FAMILY.name == name and [type(module.FAMILY)] == defined
    for name in SHARED:
        assert not hasattr(importlib.import_module(f"distill.models.families.{name}"), "FAMILY")


def test_no_family_imports_what_asks_the_registry() -> None:
    """The registry imports every family's file, by its name; one that leads back to it could not be imported first."""
    graph = imports(modules())
    graph["distill.models.families.registry"] |= {f"distill.models.families.{name}" for name in NAMES}
    assert circles(graph) == []


def test_what_is_asked_of_a_family_is_little() -> None:
    assert len([name for name in {*Family.__annotations__, *vars(Family)} if not name.startswith("_")]) <= 16


def test_no_two_families_have_one_pipeline_or_one_name_for_a_network() -> None:
    assert len({family.pipeline for family in FAMILIES.values()}) == len(FAMILIES)
    sizes = [name for family in FAMILIES.values() for name in family.full_size]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("name", [name for family in FAMILIES.values() for name in family.full_size])
def test_a_published_network_is_built_and_recognised(name: str) -> None:
    family, known = published(name)
    network = build_network(family.network.kind, known.network, device="meta")
    assert family_of_network(network) is family
    assert published_name(family, network.config) == name
    assert family.network.parts(network), "it has blocks"
    for which, targets in family.lora.targets.items():
        assert targets and family.lora.chosen(network, which)


@pytest.mark.parametrize("name", TINY)
def test_a_pipeline_and_its_network_lead_to_the_family(name: str) -> None:
    pipeline = tiny_pipeline(name)
    family = family_of_pipeline("x", type(pipeline).__name__)
    assert family is FAMILIES[name] is family_of_network(network_of(pipeline))


def test_a_network_of_no_family_is_said_to_be_one() -> None:
    with pytest.raises(ValueError, match="a Linear is the network of no family; known: .*sd15, "):
        family_of_network(nn.Linear(1, 1))


@pytest.mark.parametrize("name", TINY)
def test_texts_and_sizes_have_the_shapes_that_the_family_says(name: str, tmp_path: Path) -> None:
    teacher = load_teacher(save_tiny(tmp_path, name), parts=("text",))
    shapes = teacher.family.text.shapes(teacher.network_config, teacher.family.text.tokens(tmp_path))
    found = teacher.family.text.encode(teacher.text, ["a", "b"])
    assert {key: entry.shape for key, entry in found.items()} == {key: (2, *s) for key, s in shapes.items()}
    assert shapes["encoder_hidden_states"][0] == TOKENS
    assert teacher.encode(["a", "b"]).keys() == tiny_conditioning(name, 2).keys()


@pytest.mark.parametrize("which", ["blocks", "attention", None])
def test_lora_targets_are_chosen_by_name(which: str | None) -> None:
    unet = tiny_unet()
    add_lora(unet, 2, 2, targets=FAMILIES["sd15"].lora.chosen(unet, which))
    adapted = set(lora_config(unet).target_modules or ())
    assert {"to_q", "to_out.0"} <= adapted and ("conv1" in adapted) == (which != "attention")
    with pytest.raises(ValueError, match="lora_targets=everything is not known; allowed: blocks, attention, or a list"):
        FAMILIES["sd15"].lora.chosen(unet, "everything")


def test_a_pattern_chooses_modules_by_their_whole_names() -> None:
    class Patterns(type(FAMILIES["sd15"].lora)):  # type: ignore[misc]
        targets = {"some": ("down_blocks.*.to_q", "conv_in")}

    unet = tiny_unet()
    chosen = Patterns().chosen(unet)
    expected = {name for name, _ in unet.named_modules() if name.startswith("down_blocks") and name.endswith(".to_q")}
    assert set(chosen) == expected | {"conv_in"} and len(expected) > 1


NETWORKS: dict[str, Callable[[], Any]] = {
    "sd15": tiny_unet,
    "sd3": tiny_transformer,
    "flux": tiny_flux,
    "flux2": lambda: tiny_klein().transformer,
    "z_image": lambda: tiny_z_image().transformer,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_user_names_the_modules_of_a_lora_and_a_file_says_which(name: str, tmp_path: Path) -> None:
    def student(which: str | list[str] | None) -> tuple[Any, list[str]]:
        network = NETWORKS[name]()
        add_lora(network, 2, 3, targets=FAMILIES[name].lora.chosen(network, which))
        return network, sorted({key.split(".lora_")[0] for key in adapters(network)})

    network, adapted = student(["to_q", "to_v"])
    assert adapted and {module.rpartition(".")[2] for module in adapted} == {"to_q", "to_v"}
    assert set(adapted) < set(student("attention")[1]) < set(student(None)[1])
    one = adapted[-1]
    assert student([one.replace(one.split(".")[1], "*", 1)])[1][-1] == one
    save_lora(tmp_path, network, formats=["diffusers"])
    assert lora_settings(tmp_path)["target_modules"] == ["to_q", "to_v"]
    again = NETWORKS[name]()
    load_lora(again, tmp_path)
    assert sorted(adapters(again)) == sorted(adapters(network))
    with pytest.raises(ValueError, match="made for another network, or for other lora_targets: .*only one of the two"):
        fill_lora(student(None)[0], tmp_path)


def test_a_target_that_also_names_other_modules_means_the_layers_alone() -> None:
    """peft refuses a name that leads it to a module that it cannot adapt."""
    network = nn.ModuleDict(
        {"a": nn.ModuleDict({"out": nn.Linear(2, 2)}), "b": nn.ModuleDict({"out": nn.LayerNorm(2)})}
    )
    assert FAMILIES["sd15"].lora.chosen(network, ["out"]) == ["a.out"]
    for target in ("a", "to_p", "a.*.weight", "b.out"):
        with pytest.raises(ValueError, match=f"lora_targets: '{re.escape(target)}' matches no linear layer.* a.out$"):
            FAMILIES["sd15"].lora.chosen(network, ["out", target])


def test_lora_targets_of_a_run_are_checked_and_without_a_lora_they_are_refused(tmp_path: Path) -> None:
    given = ["experiment=quickstart", "data.store=s", "output_dir=o"]
    cfg = load("train", TrainSettings, [*given, "lora_targets=[to_q,proj_*]"])
    assert build(cfg.student).targets == ["to_q", "proj_*"] and build(cfg.student).rank == cfg.lora_rank
    assert build(load("train", TrainSettings, [*given, "lora_targets=attention"]).student).targets == "attention"
    assert load("train", TrainSettings, given).student["targets"] is None
    full = load("train", TrainSettings, [*given, "student=full_unguided", "lora_targets=attention"])
    assert unread(full, ["student"])["lora_targets"] == "the student is no LoRA, whose modules it names"
    with pytest.raises(ConfigError, match="lora_targets"):
        load("train", TrainSettings, [*given, "lora_targets=[]"])
    teacher = load_teacher(save_tiny(tmp_path))
    with pytest.raises(ValueError, match="lora_targets: 'to_qq' matches no linear layer or convolution of the UNet2D"):
        LoRAStudent(2, 3, ["to_qq"]).networks(teacher)


# --- earlier names ---


def test_parts_and_attributes_of_earlier_versions_work(tmp_path: Path) -> None:
    teacher = load_teacher(save_tiny(tmp_path), parts=("unet", "vae"))
    assert teacher.parts.keys() == {"network", "vae"} and PARTS == ("network", "text", "vae")
    with pytest.warns(DeprecationWarning, match="Teacher.network"):
        assert teacher.unet is teacher.network
    given = Teacher(teacher.family, teacher.schedule, teacher.prediction, Noise(), "x", 24, (5, 6, 6),
                    parts={"unet": teacher.network})  # fmt: skip
    assert given.network is teacher.network
    assert families.Teacher is Teacher and families.load_teacher is load_teacher
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = families.nothing


# --- a family from elsewhere ---


class Elsewhere(StableDiffusion):
    """A stand-in that shows its own call."""

    name = "elsewhere"
    pipeline = "StableDiffusionImg2ImgPipeline"

    def predict(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return 2 * super().predict(*args, **kwargs)


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    family = FAMILIES.register(Elsewhere())
    yield family  # type: ignore[misc]
    del FAMILIES._records["elsewhere"]


def test_a_registered_family_is_known_to_settings_pipelines_and_denoisers(elsewhere: Elsewhere) -> None:
    check_family("elsewhere")
    given = ["experiment=quickstart", "model.family=elsewhere"]
    assert load("train", TrainSettings, given).model.family == "elsewhere"
    assert family_of_pipeline("x", "StableDiffusionImg2ImgPipeline") is elsewhere
    unet, c = tiny_unet(), tiny_conditioning("sd15", len(T))
    x = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    schedule = NoiseSchedule.scaled_linear()
    with torch.no_grad():
        usual = NetworkDenoiser(unet, schedule, Prediction.EPSILON)(x, T, c)
        other = NetworkDenoiser(unet, schedule, Prediction.EPSILON, family=elsewhere)(x, T, c)
    assert torch.equal(other.eps, 2 * usual.eps)


def test_a_family_that_nobody_has_is_refused_in_one_line() -> None:
    with pytest.raises(UnknownName, match="family 'sd16' is not known; allowed: .*sd15, "):
        check_family("sd16")
    with pytest.raises(ConfigError, match="model.family.*'sd16' is not known") as caught:
        load("train", TrainSettings, ["experiment=quickstart", "model.family=sd16"])
    assert "\n" not in str(caught.value)


def test_an_installed_package_brings_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry point that methods and samplers come by; nobody imports it before it is asked for."""
    (tmp_path / "brought.py").write_text(
        "from distill.models.families.registry import FAMILIES\n"
        "from distill.models.families.sdxl import StableDiffusionXL\n"
        "class Brought(StableDiffusionXL):\n"
        "    name, pipeline = 'brought', 'StableDiffusionXLImg2ImgPipeline'\n"
        "FAMILIES.register(Brought())\n"
    )
    info = tmp_path / "brought-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distill.plugins]\nbrought = brought\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_plugins.cache_clear()
    try:
        assert family_of_pipeline("x", "StableDiffusionXLImg2ImgPipeline").name == "brought"
        check_family("brought")
    finally:
        import_plugins.cache_clear()
        FAMILIES._records.pop("brought", None)
        sys.modules.pop("brought", None)


# --- what a family may change ---


def test_tokens_decide_the_schedule_and_the_multiples_of_a_resolution(tmp_path: Path) -> None:
    class Patched(StableDiffusion):
        network = Network("unet", "UNet2DConditionModel", ("mid_block",), ())

        def noise(self, noise: AnyNoise, tokens: int) -> AnyNoise:
            return Noise(num_train_timesteps=tokens)

    loaded = load_teacher(save_tiny(tmp_path), parts=())
    teacher = Teacher(Patched(), loaded.schedule, Prediction.EPSILON, Noise(), "x", loaded.resolution,
                      loaded.latent_shape, config={"patch_size": 2})  # fmt: skip
    assert UNETS["sd15"]["sample_size"] == 6 and teacher.image_tokens == 9
    assert teacher.at_resolution(48).schedule.T == 36
    with pytest.raises(ValueError, match="resolution must be a multiple of 8 pixels, got 28"):
        teacher.at_resolution(28)


def test_a_shift_by_the_pictures_size_is_settled_for_each_size_and_one_that_was_set_for_all(tmp_path: Path) -> None:
    noise = FlowNoise(1000, None, DynamicShift(base_image_seq_len=9, max_image_seq_len=144))
    loaded = load_teacher(save_tiny(tmp_path), parts=())
    small = Teacher(
        StableDiffusion(),
        NoiseSchedule.of(noise, 36),
        Prediction.FLOW,
        noise.at(36),
        "x",
        loaded.resolution,
        loaded.latent_shape,
        config=loaded.config,
    )
    large = small.at_resolution(2 * small.resolution)
    assert (small.image_tokens, large.image_tokens) == (36, 144)
    assert [t.schedule.shift for t in (small, large)] == [noise.at(n).settled_shift for n in (36, 144)]
    assert small.schedule.fingerprint != large.schedule.fingerprint
    assert large.at_resolution(small.resolution).schedule.fingerprint == small.schedule.fingerprint

    fixed = small.at_shift(3.0)
    assert fixed.at_resolution(large.resolution).schedule.shift == fixed.noise.settled_shift == 3.0
    assert small.at_shift(None) is small
    with pytest.raises(ValueError, match="^shift 3.0 is for flow-matching teachers"):
        loaded.at_shift(3.0)
