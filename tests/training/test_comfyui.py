"""Workflows for ComfyUI: whole graphs, and times that are the student's by ComfyUI's own formulas.

The formulas, and the nodes with their slots, are facts of ComfyUI 0.3.64, read 2026-11-28: comfy/model_sampling.py
(ModelSamplingDiscrete), comfy_extras/nodes_model_advanced.py (ModelSamplingDiscreteDistilled, ModelSamplingDiscrete),
comfy/samplers.py (simple_scheduler), nodes.py (the other nodes' INPUT_TYPES and RETURN_TYPES).
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.diffusion.noise import FlowNoise, Noise
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import make_times
from distill.methods.sampling import Sampling
from distill.models.families.registry import FAMILIES, published
from distill.models.full_size import published_name, unet_config
from distill.training.comfyui import why_none, workflows_of, write_workflows
from distill.training.export import Export
from tests.tiny import UNETS
from tests.training.test_card import an_export, card, settings

OUTPUTS = {
    "CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"),
    "LoraLoaderModelOnly": ("MODEL",),
    "UNETLoader": ("MODEL",),
    "ModelSamplingDiscrete": ("MODEL",),
    "CLIPTextEncode": ("CONDITIONING",),
    "EmptyLatentImage": ("LATENT",),
    "EmptySD3LatentImage": ("LATENT",),
    "EmptyFlux2LatentImage": ("LATENT",),
    "TripleCLIPLoader": ("CLIP",),
    "DualCLIPLoader": ("CLIP",),
    "CLIPLoader": ("CLIP",),
    "VAELoader": ("VAE",),
    "FluxGuidance": ("CONDITIONING",),
    "ModelSamplingSD3": ("MODEL",),
    "ModelSamplingAuraFlow": ("MODEL",),
    "ModelSamplingFlux": ("MODEL",),
    "KSampler": ("LATENT",),
    "VAEDecode": ("IMAGE",),
    "SaveImage": (),
}
INPUTS: dict[str, dict[str, Any]] = {  # types of slots, and of values
    "CheckpointLoaderSimple": {"ckpt_name": str},
    "LoraLoaderModelOnly": {"model": "MODEL", "lora_name": str, "strength_model": float},
    "UNETLoader": {"unet_name": str, "weight_dtype": ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")},
    "ModelSamplingDiscrete": {
        "model": "MODEL",
        "sampling": ("eps", "v_prediction", "lcm", "x0", "img_to_img"),
        "zsnr": bool,
    },
    "CLIPTextEncode": {"text": str, "clip": "CLIP"},
    "EmptyLatentImage": {"width": int, "height": int, "batch_size": int},
    "EmptySD3LatentImage": {"width": int, "height": int, "batch_size": int},
    "EmptyFlux2LatentImage": {"width": int, "height": int, "batch_size": int},
    "TripleCLIPLoader": {"clip_name1": str, "clip_name2": str, "clip_name3": str},
    "DualCLIPLoader": {"clip_name1": str, "clip_name2": str, "type": ("sdxl", "sd3", "flux", "hunyuan_video")},
    "CLIPLoader": {"clip_name": str, "type": ("stable_diffusion", "sd3", "lumina2", "flux2", "qwen_image")},
    "VAELoader": {"vae_name": str},
    "FluxGuidance": {"conditioning": "CONDITIONING", "guidance": float},
    "ModelSamplingSD3": {"model": "MODEL", "shift": float},
    "ModelSamplingAuraFlow": {"model": "MODEL", "shift": float},
    "ModelSamplingFlux": {"model": "MODEL", "max_shift": float, "base_shift": float, "width": int, "height": int},
    "KSampler": {
        "model": "MODEL",
        "seed": int,
        "steps": int,
        "cfg": float,
        "sampler_name": ("euler", "lcm", "ddim", "dpmpp_2m"),  # some of them
        "scheduler": ("simple", "sgm_uniform", "normal", "karras", "ddim_uniform"),
        "positive": "CONDITIONING",
        "negative": "CONDITIONING",
        "latent_image": "LATENT",
        "denoise": float,
    },
    "VAEDecode": {"samples": "LATENT", "vae": "VAE"},
    "SaveImage": {"images": "IMAGE", "filename_prefix": str},
}
STUDENTS = {
    "lcm": {"sampling": Sampling()},
    "lightning": {"sampling": Sampling("ddim", "trailing", 4)},
    "one step": {"sampling": Sampling("ddim", "trailing", 1), "prediction": "sample"},
    "velocity": {"sampling": Sampling("ddim", "trailing", 2), "prediction": "v_prediction"},
}


def export(architecture: str | None = "sdxl", **changes: Any) -> Export:
    family = "sd15" if architecture == "sd15" else "sdxl"
    return an_export(**{"architecture": architecture, "family": family} | changes)


def by_name(of: Export) -> dict[str, dict[str, Any]]:
    return {Path(one.path).stem: one.nodes for one in workflows_of(of)}


def only(nodes: dict[str, Any], kind: str) -> dict[str, Any]:
    (found,) = [node["inputs"] for node in nodes.values() if node["class_type"] == kind]
    return found


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "ssd1b"])
def test_every_link_goes_to_a_slot_of_its_type(student: str, architecture: str) -> None:
    found = by_name(export(architecture, family=published(architecture)[0].name, **STUDENTS[student]))
    assert set(found) == {"lora", "unet", "checkpoint"}
    for nodes in found.values():
        check_links(nodes)


def check_links(nodes: dict[str, Any]) -> None:
    used = set()
    for node in nodes.values():
        inputs = INPUTS[node["class_type"]]
        assert set(node["inputs"]) == set(inputs)
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                source, slot = value
                assert OUTPUTS[nodes[source]["class_type"]][slot] == inputs[name]
                used.add(source)
            elif isinstance(inputs[name], tuple):
                assert value in inputs[name]
            else:
                assert isinstance(value, inputs[name]), (name, value)
    last = [node_id for node_id, node in nodes.items() if node["class_type"] == "SaveImage"]
    assert used == set(nodes) - set(last)  # nothing hangs in the air


# ---- times ----------------------------------------------------------------------------------------------------------


def sigmas() -> list[float]:
    """ModelSamplingDiscrete: betas evenly between their roots, 0.00085 to 0.012; sigma = sqrt((1 - a) / a)."""
    low, high, product, found = 0.00085**0.5, 0.012**0.5, 1.0, []
    for i in range(1000):
        product *= 1 - (low + (high - low) * i / 999) ** 2
        found.append(((1 - product) / product) ** 0.5)
    return found


def of_the_model(sampling: str | None) -> tuple[list[float], int]:
    """The sigmas that the model has, and the stride of its times: the node's `lcm` keeps fifty."""
    if sampling != "lcm":
        return sigmas(), 1
    stride = 1000 // 50
    kept = [0.0] * 50
    for x in range(50):
        kept[49 - x] = sigmas()[999 - x * stride]
    return kept, stride


def told(nodes: dict[str, Any]) -> list[int]:
    """The times that the network is given by a workflow, one a step."""
    sampler = only(nodes, "KSampler")
    assert sampler["scheduler"] == "simple" and sampler["denoise"] == 1.0
    kinds = {node["class_type"] for node in nodes.values()}
    sampling = only(nodes, "ModelSamplingDiscrete")["sampling"] if "ModelSamplingDiscrete" in kinds else None
    levels, stride = of_the_model(sampling)
    step = len(levels) / sampler["steps"]
    chosen = [levels[-(1 + int(x * step))] for x in range(sampler["steps"])]  # simple_scheduler
    nearest = [min(range(len(levels)), key=lambda i: abs(math.log(levels[i]) - math.log(sigma))) for sigma in chosen]
    return [i * stride + stride - 1 for i in nearest]  # timestep(sigma), of either class


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        *(Sampling("lcm", "lcm", n) for n in (1, 2, 8)),
        *(Sampling("ddim", "trailing", n) for n in (2, 4, 8)),
    ],
    ids=str,
)
def test_the_times_are_those_that_the_student_was_trained_at(sampling: Sampling) -> None:
    steps = sampling.steps or 4
    expected = [t - 1 for t in make_times(sampling.spacing, 1000, steps)[:-1]]
    for nodes in by_name(export(sampling=sampling)).values():
        assert only(nodes, "KSampler")["steps"] == steps and told(nodes) == expected


def test_sampler_and_node_are_the_students() -> None:
    lcm, lightning, clean, velocity = (by_name(export("sdxl", **STUDENTS[name])) for name in STUDENTS)
    for nodes in lcm.values():
        assert only(nodes, "KSampler")["sampler_name"] == "lcm"
        assert only(nodes, "ModelSamplingDiscrete")["sampling"] == "lcm"
    for nodes in lightning.values():
        assert only(nodes, "KSampler")["sampler_name"] == "euler" and only(nodes, "KSampler")["cfg"] == 1.0
        assert "ModelSamplingDiscrete" not in {node["class_type"] for node in nodes.values()}
    assert all(only(nodes, "ModelSamplingDiscrete")["sampling"] == "x0" for nodes in clean.values())
    assert only(velocity["unet"], "ModelSamplingDiscrete")["sampling"] == "v_prediction"
    for name in ("lora", "checkpoint"):  # SDXL's checkpoints say it themselves, SD 1.5's do not
        assert "ModelSamplingDiscrete" not in {node["class_type"] for node in velocity[name].values()}
        nodes = by_name(export("sd15", **STUDENTS["velocity"]))[name]
        assert only(nodes, "ModelSamplingDiscrete")["sampling"] == "v_prediction"


def test_files_and_sizes_are_the_exports() -> None:
    of = export(name="mine", base_model="stabilityai/stable-diffusion-xl-base-1.0")
    found = by_name(of)
    assert only(found["lora"], "CheckpointLoaderSimple")["ckpt_name"] == "sd_xl_base_1.0.safetensors"
    assert only(found["lora"], "LoraLoaderModelOnly")["lora_name"] == "mine.safetensors"
    assert only(found["unet"], "UNETLoader")["unet_name"] == "mine.safetensors"
    assert only(found["checkpoint"], "CheckpointLoaderSimple")["ckpt_name"] == "mine.safetensors"
    assert only(found["lora"], "EmptyLatentImage")["width"] == 1024
    smaller = by_name(export("sd15", settings=settings("model.resolution=384")))["lora"]
    assert only(smaller, "EmptyLatentImage")["height"] == 384
    assert set(by_name(export(formats=("kohya", "diffusers")))) == {"lora"} and by_name(export(formats=("peft",))) == {}
    tuned = by_name(export(base_model="me/../my tune"))["lora"]
    assert only(tuned, "CheckpointLoaderSimple")["ckpt_name"] == "my_tune.safetensors"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sampling": Sampling("ddim", "milestones")}, "cannot be given"),
        ({"sampling": Sampling("lcm", "milestones")}, "cannot be given"),
        ({"sampling": Sampling(), "prediction": "sample"}, "predicts clean data"),
        ({"sampling": Sampling(), "prediction": "v_prediction"}, "visits other times"),
        ({"sampling": Sampling("ddim", "trailing", 3)}, "in 3 steps it visits other times"),
        ({"takes_guidance": True}, "input of guidance"),
        ({"noise": Noise(beta_schedule="linear")}, "noise levels"),
        ({"noise": Noise(rescale_betas_zero_snr=True, prediction_type="v_prediction")}, "noise levels"),
        ({"architecture": None}, "not that of SDXL, SSD-1B"),
    ],
)
def test_where_other_pictures_would_come_of_it_there_is_no_workflow_and_the_card_says_why(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    of = replace(export(), **changes)
    assert reason in why_none(of) and workflows_of(of) == [] and write_workflows(tmp_path, of) == []
    page = card(tmp_path, of)
    assert f"No workflow for ComfyUI is written: {why_none(of)}." in page and "comfyui/" not in page


def test_the_card_names_what_is_written(tmp_path: Path) -> None:
    of = export(name="mine", formats=("diffusers", "kohya"))
    assert write_workflows(tmp_path, of) == [tmp_path / "comfyui/lora.json"]
    assert json.loads((tmp_path / "comfyui/lora.json").read_text()) == by_name(of)["lora"]
    line = "- `comfyui/lora.json`, with `kohya/mine.safetensors` as `models/loras/mine.safetensors`"
    assert line in card(tmp_path, of)


def test_networks_are_known_by_their_sizes() -> None:
    for name in ("sd15", "sdxl", "ssd1b"):
        tuned = {
            **unet_config(name),
            "sample_size": 96,
            "block_out_channels": [*unet_config(name)["block_out_channels"]],
        }
        assert published_name(published(name)[0], tuned) == name
    assert [published_name(FAMILIES[name], config) for name, config in UNETS.items()] == [None, None]
    assert published_name(FAMILIES["sd15"], unet_config("sd15") | {"cross_attention_dim": 1024}) is None


# ---- flow matching --------------------------------------------------------------------------------------------------

FLOWS = {"sd35_medium": 3.0, "sd3": 3.0, "flux_dev": 3.158193, "flux2_klein": 7.5633, "z_image": 3.0}


def of_flow(known: str, **changes: Any) -> Export:
    family, facts = (
        published(known)[0],
        {"prediction": "flow_prediction", "noise": FlowNoise(shift=FLOWS[known])},
    )
    facts |= {
        "sampling": Sampling("ddim", "trailing"),
        "takes_guidance": known == "flux_dev",
        "guidance": (3.5, 3.5),
    }
    facts |= {"formats": ("diffusers", "peft", "comfyui", "transformer", "checkpoint")}
    return an_export(**{"architecture": known, "family": family.name} | facts | changes)


@pytest.mark.parametrize("architecture", FLOWS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_of_flow_matching_is_sampled_at_the_noise_levels_that_it_learned(
    architecture: str, steps: int
) -> None:
    """By the formulas of ModelSamplingDiscreteFlow, ModelSamplingFlux (10,000 levels), and simple_scheduler."""
    of = of_flow(architecture, sampling=Sampling("ddim", "trailing", steps))
    found = by_name(of)
    assert set(found) == ({"checkpoint"} if architecture == "flux2_klein" else {"lora", "transformer", "checkpoint"})
    schedule = NoiseSchedule.linear(FLOWS[architecture])
    learned = [float(schedule.sigma(t, torch.zeros(()))) for t in make_times("trailing", 1000, steps)[:-1]]
    for nodes in found.values():
        check_links(nodes)
        assert noise_levels(nodes) == pytest.approx(learned, rel=1e-5)
        assert only(nodes, "KSampler")["cfg"] == 1.0 and only(nodes, "KSampler")["sampler_name"] == "euler"
        guidance = [node["inputs"]["guidance"] for node in nodes.values() if node["class_type"] == "FluxGuidance"]
        assert guidance == ([3.5] if architecture == "flux_dev" else [])


def noise_levels(nodes: dict[str, Any]) -> list[float]:
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values() if "ModelSampling" in node["class_type"]}
    ((kind, inputs),) = kinds.items()
    if kind == "ModelSamplingFlux":
        slope = (inputs["max_shift"] - inputs["base_shift"]) / (4096 - 256)
        mu = inputs["width"] * inputs["height"] / 256 * slope + inputs["base_shift"] - slope * 256
        all_levels = [math.exp(mu) / (math.exp(mu) + (10_000 / i - 1)) for i in range(1, 10_001)]
    else:
        shift = inputs["shift"]
        all_levels = [shift * (i / 1000) / (1 + (shift - 1) * (i / 1000)) for i in range(1, 1001)]
    step = len(all_levels) / only(nodes, "KSampler")["steps"]
    return [all_levels[-(1 + int(x * step))] for x in range(only(nodes, "KSampler")["steps"])]


def test_what_is_loaded_of_a_transformer_is_the_students_and_lies_where_comfyui_looks() -> None:
    found = by_name(of_flow("flux_dev", base_model="black-forest-labs/FLUX.1-dev", name="mine"))
    assert only(found["lora"], "UNETLoader")["unet_name"] == "flux1-dev.safetensors"
    assert only(found["lora"], "LoraLoaderModelOnly")["lora_name"] == "mine.safetensors"
    assert only(found["transformer"], "UNETLoader")["unet_name"] == "mine.safetensors"
    assert only(found["checkpoint"], "CheckpointLoaderSimple")["ckpt_name"] == "mine.safetensors"
    places = {Path(one.path).stem: one.target for one in workflows_of(of_flow("z_image", name="mine"))}
    assert places["checkpoint"] == "models/diffusion_models/mine.safetensors"  # the network alone is in it
    assert places["lora"] == "models/loras/mine.safetensors"
    sd3 = by_name(of_flow("sd3", name="mine"))
    assert not [node for node in sd3["checkpoint"].values() if node["class_type"] == "TripleCLIPLoader"]
    assert only(sd3["transformer"], "TripleCLIPLoader")["clip_name2"] == "clip_g.safetensors"


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("sd3", {"sampling": Sampling("ddim", "milestones")}, "cannot be given"),
        ("sd3", {"sampling": Sampling("lcm", "lcm")}, "cannot be given"),
        ("flux_dev", {"sampling": Sampling("ddim", "trailing", 3)}, "in 3 steps it visits other times"),
        ("z_image", {"architecture": None}, "not that of Z-Image"),
        ("flux2_klein", {"formats": ("comfyui", "transformer")}, r"from formats=[checkpoint] alone"),
    ],
)
def test_a_workflow_that_would_not_be_the_transformers_is_not_written(
    architecture: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    of = of_flow(architecture, **changes)
    assert reason in why_none(of) and workflows_of(of) == []
    assert f"No workflow for ComfyUI is written: {why_none(of)}." in card(tmp_path, of)


def test_the_card_of_a_transformer_names_node_and_shift(tmp_path: Path) -> None:
    page = card(tmp_path, of_flow("flux_dev"))
    assert "node ModelSamplingFlux, max_shift 1.15, base_shift 1.15" in page and "- `comfyui/lora.json`" in page
    assert "node ModelSamplingSD3, shift 3)" in card(tmp_path, of_flow("sd3"))
    alone = card(tmp_path, of_flow("z_image", formats=("checkpoint",)))
    assert "ZImageTransformer2DModel.from_single_file(file, config=config" in alone
    assert "StableDiffusion3Pipeline.from_single_file(" in card(tmp_path, of_flow("sd3", formats=("checkpoint",)))
