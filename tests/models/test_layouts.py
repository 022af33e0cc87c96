"""Other programs' names: each module of the full networks is found once, with its shape, and a LoRA at its scale."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file
from torch import Tensor

from distill.models.full_size import build_unet, unet_config
from distill.models.layouts import kohya_modules, kohya_state_dict, original_module, peft_state_dict
from distill.models.lora import add_lora, lora_state_dict, save_lora
from tests.models.original import original_unet
from tests.models.test_lora import _trained, output
from tests.tiny import save_tiny, tiny_unet

FULL = ("sd15", "sdxl", "ssd1b")
RANK, ALPHA = 3, 6.1


@pytest.mark.parametrize("name", FULL)
def test_every_module_of_a_full_network_has_its_place_in_the_original_one(name: str) -> None:
    unet = build_unet(unet_config(name), device="meta")
    weights = {n.removesuffix(".weight"): p for n, p in unet.named_parameters() if n.endswith(".weight") and p.ndim > 1}
    found = {original_module(module, unet.config): list(weight.shape) for module, weight in weights.items()}
    assert found == original_unet(name) and len(found) == len(weights)
    norms = [n.removesuffix(".weight") for n, p in unet.named_parameters() if n.endswith(".weight") and p.ndim == 1]
    assert len({original_module(module, unet.config) for module in norms}) == len(norms)


@cache
def full_lora(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA's weights by peft's names, on the meta device, and the tensors of its file."""
    unet = build_unet(unet_config(name), device="meta")
    add_lora(unet, RANK, ALPHA)
    weights = {n.replace(".default.", "."): p.detach() for n, p in unet.named_parameters() if ".lora_" in n}
    real = {n: torch.zeros(1).expand(w.shape) for n, w in weights.items()}
    return weights, kohya_state_dict(real, ALPHA, unet.config, original_names=name != "sd15")


def as_clients_look(name: str) -> dict[str, list[int]]:
    """The keys that programs look for, and the shapes of the weights that they stand for.

    For SDXL sd-scripts and A1111 name the original paths; for SD 1.5 they name diffusers' own. ComfyUI and Forge know
    both, by a map between the two (comfy/lora.py, 0.3.64).
    """
    shapes = original_unet(name)
    if name != "sd15":
        return {"lora_unet_" + path.replace(".", "_"): shape for path, shape in shapes.items()}
    unet = build_unet(unet_config(name), device="meta")
    modules = [n.removesuffix(".weight") for n, p in unet.named_parameters() if n.endswith(".weight") and p.ndim > 1]
    return {"lora_unet_" + m.replace(".", "_"): shapes[original_module(m, unet.config)] for m in modules}


@pytest.mark.parametrize(("name", "modules"), [("sd15", 278), ("sdxl", 788), ("ssd1b", 423)])
def test_clients_find_every_adapter_of_the_full_networks_and_its_scale(name: str, modules: int) -> None:
    """The file at an export's root is this one: nothing of it is left unread, nothing is read at scale 1."""
    _, tensors = full_lora(name)
    wanted = as_clients_look(name)
    keys = {key.partition(".")[0] for key in tensors}
    assert len(keys) == modules and keys <= wanted.keys() and len(tensors) == 3 * modules
    for key in keys:
        down, up = (list(tensors[f"{key}.{factor}.weight"].shape) for factor in ("lora_down", "lora_up"))
        assert [up[0], *down[1:]] == wanted[key] and up[1] == down[0] == RANK, key
        alpha = tensors[f"{key}.alpha"]
        assert alpha.dtype == torch.float32 and alpha.item() == pytest.approx(ALPHA, rel=1e-7) and alpha.shape == ()


@pytest.mark.parametrize("name", FULL)
def test_diffusers_finds_every_adapter_of_the_full_networks(name: str) -> None:
    weights, tensors = full_lora(name)
    unet = build_unet(unet_config(name), device="meta")
    converted, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=unet.config)[:2]
    known = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in converted.items()})
    assert {key: value.shape for key, value in known.items()} == {key: value.shape for key, value in weights.items()}
    assert len(alphas) == len(weights) // 2 and set(alphas.values()) == {torch.tensor(ALPHA).item()}


@pytest.mark.parametrize("name", FULL)
def test_what_was_written_is_read_back_by_pefts_names(name: str) -> None:
    weights, tensors = full_lora(name)
    modules = {key.rsplit(".", 2)[0] for key in weights}
    back = peft_state_dict(
        tensors, modules, unet_config(name) | {"layers_per_block": 2}, name != "sd15"
    )  # 2: diffusers' default
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in weights.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 2, "block_out_channels": (8, 8, 16, 24), "transformer_layers_per_block": 1}
        | {"attention_head_dim": 2}
        | {"down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3)}
        | {"up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D")},
        {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")},
        {"layers_per_block": [1, 2, 1]},
    ],
    ids=["twelve blocks", "an upsampler without attention", "levels of different lengths"],
)
def test_networks_whose_original_names_diffusers_misreads_keep_its_own(changes: dict, tmp_path: Path) -> None:
    """SDXL's text and sizes, on another body: what the file says is what plain diffusers computes."""
    folder = save_tiny(tmp_path / "teacher", "sdxl")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.unet = tiny_unet("sdxl", **changes)
    unet = tiny_unet("sdxl", **changes)
    random = torch.Generator().manual_seed(5)
    for parameter in add_lora(unet, RANK, ALPHA):
        torch.nn.init.normal_(parameter, std=0.3, generator=random)
    save_lora(tmp_path / "lora", unet)
    assert all("_blocks_" not in key or "put_blocks" not in key for key in load_file(tmp_path / "lora" / FILE))
    pipeline.load_lora_weights(tmp_path / "lora", weight_name=FILE)
    torch.testing.assert_close(output(pipeline.unet, "sdxl"), output(unet, "sdxl"), rtol=1e-5, atol=1e-5)


FILE = "pytorch_lora_weights.safetensors"


def test_the_small_sdxl_has_the_original_names(tmp_path: Path) -> None:
    save_lora(tmp_path, _trained("sdxl"))
    keys = load_file(tmp_path / FILE).keys()
    assert {"lora_unet_input_blocks_1_0_in_layers_2.alpha", "lora_unet_middle_block_1_proj_in.alpha"} <= set(keys)
    assert not any("down_blocks" in key or "resnets" in key for key in keys)


def test_a_network_that_the_originals_never_were_is_named() -> None:
    unet = tiny_unet("sdxl")
    with pytest.raises(ValueError, match="^the original networks have no mid_block.attentions.1.proj_in$"):
        original_module("mid_block.attentions.1.proj_in", unet.config)
    with pytest.raises(ValueError, match=r"one number of layers in all blocks, this network has \[1, 2\]"):
        original_module("down_blocks.0.resnets.0.conv1", {"layers_per_block": [1, 2]})


def test_two_modules_never_share_a_key() -> None:
    for name in FULL:
        unet = build_unet(unet_config(name), device="meta")
        modules = {n for n, _ in unet.named_modules() if n and not n.endswith("blocks") and hasattr(_, "weight")}
        assert all(len(set(kohya_modules(modules, unet.config, known).values())) == len(modules) for known in (0, 1))


def test_values_and_names_survive_the_round(tmp_path: Path) -> None:
    for family in ("sd15", "sdxl"):
        unet = _trained(family, rank=2, alpha=0.7)
        own = lora_state_dict(unet)
        modules = {name.rsplit(".", 2)[0] for name in own}
        named = kohya_state_dict(own, 0.7, unet.config, original_names=family == "sdxl")
        back = peft_state_dict(named, modules, unet.config, family == "sdxl")
        assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
