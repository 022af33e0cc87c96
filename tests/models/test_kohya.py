"""kohya's file: every adapter under a name that readers know, and alpha as it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.models.families.unet import LCM_LORA_TARGETS
from distill.models.kohya import save_kohya
from distill.models.layouts import kohya_state_dict
from distill.models.lora import add_lora, lora_state_dict
from tests.models.test_lora import output
from tests.tiny import FAMILIES, save_tiny, tiny_unet


def trained(folder: str, rank: int = 4, alpha: float = 2.5) -> tuple[Teacher, dict[str, Tensor]]:
    """A teacher with fresh adapters, and the values that training gave them."""
    teacher = load_teacher(folder)
    add_lora(teacher.network, rank, alpha)
    random = torch.Generator().manual_seed(5)
    named = teacher.network.named_parameters()
    return teacher, {n: 0.3 * torch.randn(p.shape, generator=random) for n, p in named if p.requires_grad}


def fill(unet: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    unet.load_state_dict(state, strict=False)
    return unet


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank, alpha", [(4, 2.5), (3, 8)])
def test_plain_diffusers_computes_what_was_trained(family: str, rank: int, alpha: float, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", family)
    teacher, state = trained(folder, rank, alpha)
    save_kohya(tmp_path / "kohya" / "a.b.safetensors", teacher, state)
    expected = output(fill(teacher.network, state), family)

    pipe = DiffusionPipeline.from_pretrained(folder)
    without = output(pipe.unet, family)
    pipe.load_lora_weights(tmp_path, subfolder="kohya", weight_name="a.b.safetensors")
    torch.testing.assert_close(output(pipe.unet, family), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(expected, without, atol=0.1)


def test_the_small_networks_have_every_kind_of_adapter() -> None:
    """So that the test above asks about each: every target, and 1x1 convolutions, 3x3 ones and matrices."""
    targets, shapes = set(), set()
    for family in FAMILIES:
        unet = tiny_unet(family)
        add_lora(unet, 2, 2)
        for name, tensor in lora_state_dict(unet).items():
            module = name.removesuffix(".lora_A.weight")
            targets |= {target for target in LCM_LORA_TARGETS if f".{module}".endswith(f".{target}")}
            shapes |= {(target, tensor.shape[2:]) for target in ("proj_in", "conv1") if module.endswith(target)}
    assert targets == set(LCM_LORA_TARGETS)
    assert shapes == {("proj_in", (1, 1)), ("proj_in", ()), ("conv1", (3, 3))}


def test_names_shapes_and_dtypes_are_kohyas(tmp_path: Path) -> None:
    teacher, state = trained(save_tiny(tmp_path / "teacher"), rank=4, alpha=2.5)
    save_kohya(tmp_path / "a.safetensors", teacher, state, torch.float16)
    tensors = load_file(tmp_path / "a.safetensors")
    linear = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    convolution = "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes[f"{linear}.lora_down.weight"] == [4, 20] and shapes[f"{linear}.lora_up.weight"] == [16, 4]
    assert shapes[f"{convolution}.lora_down.weight"] == [4, 16, 3, 3]
    assert shapes[f"{convolution}.lora_up.weight"] == [16, 4, 1, 1]
    assert shapes[f"{linear}.alpha"] == [] and tensors[f"{linear}.alpha"] == 2.5
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".weight")} == {torch.float16}


@pytest.mark.parametrize("dtype, alpha", [(torch.float16, 0.1), (torch.bfloat16, 2.7)])
def test_alpha_is_exact_in_files_of_half_the_size(dtype: torch.dtype, alpha: float) -> None:
    stored = kohya_state_dict({"to_q.lora_B.weight": torch.rand(20, 5)}, alpha, tiny_unet().config, dtype)
    assert stored["lora_unet_to_q.lora_up.weight"].dtype == dtype
    assert stored["lora_unet_to_q.alpha"].item() == pytest.approx(alpha, rel=1e-7)


@pytest.mark.parametrize(
    "family, unet, scheduler, expected",
    [
        ("sd15", {}, {}, ("sd_v1", "False", "stable-diffusion-v1/lora", "epsilon")),
        (
            "sd15",
            {"cross_attention_dim": 1024},
            {"prediction_type": "v_prediction"},
            ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v"),
        ),
        ("sdxl", {}, {}, ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "epsilon")),
    ],
)
def test_user_interfaces_are_told_what_it_is(
    family: str, unet: dict[str, Any], scheduler: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    teacher = load_teacher(save_tiny(tmp_path / "my teacher", family, **scheduler))
    teacher.parts["network"] = tiny_unet(family, **unet)
    add_lora(teacher.network, 4, 2.5)
    save_kohya(tmp_path / "a.b.safetensors", teacher, dict(teacher.network.named_parameters()))
    found = metadata(tmp_path / "a.b.safetensors")
    keys = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.prediction_type")
    assert tuple(found[key] for key in keys) == expected
    assert (found["ss_network_module"], found["ss_network_dim"], found["ss_network_alpha"]) == (
        "networks.lora",
        "4",
        "2.5",
    )
    assert (found["ss_sd_model_name"], found["modelspec.title"]) == ("my teacher", "a.b")
    side = teacher.resolution
    assert found["modelspec.resolution"] == f"{side}x{side}"


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    teacher, state = trained(save_tiny(tmp_path / "teacher"))
    name = next(n for n in state if "lora_A" in n)
    state[name][0, 0] = 7e4
    with pytest.raises(ValueError, match=r"lora_A.weight holds 7e\+04, too much for dtype=float16"):
        save_kohya(tmp_path / "a.safetensors", teacher, state, torch.float16)
    state[name][0, 0] = float("nan")
    with pytest.raises(ValueError, match="the weights are broken: .* not finite"):
        save_kohya(tmp_path / "a.safetensors", teacher, state)
    assert isinstance(teacher.network, UNet2DConditionModel) and not (tmp_path / "a.safetensors").exists()
