"""LoRA: the published sizes, a teacher that is still there, and files that other programs read rightly."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import PixArtTransformer2DModel, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from distill.models.families.unet import LCM_LORA_TARGETS
from distill.models.full_size import build_unet, unet_config
from distill.models.layouts import kohya_state_dict
from distill.models.lora import (
    LORA_FILE,
    adapters,
    add_lora,
    load_lora,
    lora_layers,
    lora_state_dict,
    merge_lora,
    only_adapter,
    save_lora,
)
from tests.tiny import CHANNELS, FAMILIES, save_tiny, tiny_conditioning, tiny_unet

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def output(unet: nn.Module, family: str) -> torch.Tensor:
    c = tiny_conditioning(family, 2)
    x = torch.randn(2, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    added = {key: c[key] for key in ("text_embeds", "time_ids") if key in c}
    with torch.no_grad():
        return unet(x, torch.tensor([3, 800]), c["encoder_hidden_states"], added_cond_kwargs=added or None).sample


def _trained(family: str = "sd15", rank: int = 4, alpha: float = 1.5) -> nn.Module:
    """A UNet whose adapters are no longer at their start."""
    unet = tiny_unet(family)
    random = torch.Generator().manual_seed(5)
    for parameter in add_lora(unet, rank, alpha):
        nn.init.normal_(parameter, std=0.3, generator=random)
    return unet


# Parameters in all, trained at rank 64, and adapted modules: LCM-LoRA (arXiv 2311.05556) says 67.5 M, 105 M, 197 M.
PUBLISHED = {
    "sd15": (859_520_964, 67_252_224, 278),
    "ssd1b": (1_331_334_404, 104_902_656, 423),
    "sdxl": (2_567_463_684, 196_751_360, 788),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    unet = build_unet(unet_config(name), device="meta")
    total = sum(p.numel() for p in unet.parameters())
    trained = add_lora(unet, rank=64, alpha=64)
    assert (total, sum(p.numel() for p in trained), len(lora_layers(unet))) == PUBLISHED[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_starts_as_the_teacher_and_off_stays_it_to_the_bit(family):
    unet = tiny_unet(family).requires_grad_(False)  # as loaded; torch rounds otherwise where weights are trainable
    teacher = output(unet, family)
    trained = add_lora(unet, rank=3, alpha=7)
    torch.testing.assert_close(output(unet, family), teacher)
    for parameter in trained:
        nn.init.normal_(parameter, std=0.3)
    student = output(unet, family)
    assert not torch.allclose(student, teacher, atol=0.1)

    with only_adapter(unet, None):
        assert torch.equal(output(unet, family), teacher)
        with only_adapter(unet, None):
            pass
        assert torch.equal(output(unet, family), teacher)
        assert all(parameter.requires_grad for parameter in trained)
    assert torch.equal(output(unet, family), student)
    with pytest.raises(RuntimeError), only_adapter(unet, None):
        raise RuntimeError
    assert torch.equal(output(unet, family), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_float32_and_alone_are_trained(dtype):
    unet = tiny_unet().to(dtype)
    trained = add_lora(unet, rank=2, alpha=2)
    assert {id(p) for p in trained} == {id(p) for p in unet.parameters() if p.requires_grad}
    assert {p.dtype for p in trained} == {torch.float32}
    assert unet.conv_in.weight.dtype == dtype


def test_an_adapter_adds_alpha_over_rank_b_a_x():
    layer = dict(_trained(rank=4, alpha=1.5).named_modules())["mid_block.attentions.0.proj_in"]
    x = torch.randn(1, 24, 3, 3)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # [4, 24, 1, 1], [24, 4, 1, 1]
    extra = torch.einsum("or,rc,bchw->bohw", b[..., 0, 0], a[..., 0, 0], x) * 1.5 / 4
    torch.testing.assert_close(layer(x), layer.base_layer(x) + extra)


def test_a_comes_from_the_seed_and_no_global_draw_is_spent():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = add_lora(tiny_unet(), rank=2, alpha=2, seed=7)
    assert torch.equal(torch.rand(3), expected)
    again, other = (add_lora(tiny_unet(), rank=2, alpha=2, seed=seed) for seed in (7, 8))
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    assert not any(
        torch.equal(p, q) for p, q in zip(first[::2], other[::2], strict=True)
    )  # A; the others are B, all zero
    assert not any(p.any() for p in first[1::2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0, "alpha": 1}, "lora_rank must be at least 1, got 0"),
        ({"rank": 4, "alpha": 0}, "lora_alpha must be positive, got 0"),
        ({"rank": 4, "alpha": 1, "dropout": 1}, r"lora_dropout must lie in \[0, 1\), got 1"),
        ({"rank": 4, "alpha": 1, "targets": ("to_q", "to_w")}, "target 'to_w' matches no module"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_unet(), **settings)


def test_a_network_of_a_class_without_adapters_says_to_train_all_of_it():
    network = PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        cross_attention_dim=4, caption_channels=4, norm_num_groups=1, use_additional_conditions=False,
    )  # fmt: skip
    said = "a PixArtTransformer2DModel takes no LoRA, .* with student=full, and set rank=null in networks.fake_score"
    for settings in ({}, {"targets": ["to_q"]}):
        with pytest.raises(ValueError, match=said):
            add_lora(network, 4, 4, **settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [4, 0.5])
def test_a_plain_diffusers_pipeline_computes_what_was_trained(family, alpha, tmp_path):
    student = _trained(family, rank=4, alpha=alpha)
    save_lora(tmp_path / "lora", student)
    pipe = PIPELINES[family].from_pretrained(save_tiny(tmp_path / "teacher", family), safety_checker=None)
    teacher = output(pipe.unet, family)
    pipe.load_lora_weights(tmp_path / "lora", weight_name=LORA_FILE)
    torch.testing.assert_close(output(pipe.unet, family), output(student, family), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(output(student, family), teacher, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_was_trained(family, tmp_path):
    student = _trained(family, rank=4, alpha=0.5)
    save_lora(tmp_path, student)
    loaded = PeftModel.from_pretrained(tiny_unet(family), tmp_path / "peft")
    torch.testing.assert_close(output(loaded, family), output(student, family), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank, alpha", [(4, 2.5), (3, 8)])
def test_a_merged_network_is_plain_and_computes_what_was_trained(family, rank, alpha):
    student = _trained(family, rank, alpha)
    expected, halves = output(student, family), {n: p / 2 for n, p in adapters(student).items()}
    other = _trained(family, rank, alpha)
    merge_lora(student)
    assert type(student) is UNet2DConditionModel and not lora_layers(student)
    assert student.state_dict().keys() == tiny_unet(family).state_dict().keys()
    torch.testing.assert_close(output(student, family), expected, rtol=1e-4, atol=1e-4)

    merge_lora(other, halves)  # B/2 times A/2
    assert not torch.allclose(output(other, family), expected, atol=0.1)
    layer, own = "mid_block.attentions.0.proj_out.weight", tiny_unet(family).state_dict()
    quarter = (student.state_dict()[layer] - own[layer]) / 4
    torch.testing.assert_close(other.state_dict()[layer] - own[layer], quarter, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="has no LoRA adapter"):
        merge_lora(student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_the_size_hold_the_rounded_values(dtype, tmp_path):
    student = _trained()
    save_lora(tmp_path, student, dtype=dtype)
    own = lora_state_dict(student)
    expected = kohya_state_dict(own, 1.5, student.config, dtype)
    pefts = {"base_model.model." + n: p.to(dtype) for n, p in own.items()}
    for file, weights in (("pytorch_lora_weights", expected), ("peft/adapter_model", pefts)):
        saved = load_file(tmp_path / f"{file}.safetensors")
        assert saved.keys() == weights.keys()
        assert all(torch.equal(saved[n], w) and saved[n].dtype == w.dtype for n, w in weights.items())
    assert {w.dtype for n, w in expected.items() if not n.endswith("alpha")} == {dtype}


def test_the_files_ask_for_nothing_that_an_older_peft_lacks(tmp_path):
    """Readers call `LoraConfig(**fields)`: one new field, and the file loads nowhere else; without the two patterns
    diffusers 0.35 raises a KeyError, and a record of diffusers' own beside alphas is refused by it."""
    save_lora(tmp_path, _trained(alpha=0.5))
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    since_0_7 = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "bias", "r"}
    since_0_7 |= {"fan_in_fan_out", "init_lora_weights", "modules_to_save", "use_rslora", "target_modules"}
    since_0_7 |= {"lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"}
    assert fields.keys() == since_0_7 and LoraConfig(**fields).lora_alpha == 0.5
    assert fields["rank_pattern"] == {} and fields["alpha_pattern"] == {}
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata().keys() == {"format", "distill_lora"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_of_an_earlier_version_is_still_read(family, tmp_path):
    """It was in peft's names, with its rank and alpha in diffusers' own record."""
    student = _trained(family, rank=4, alpha=0.5)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=lora_state_dict(student),
        unet_lora_adapter_metadata={
            "r": 4,
            "lora_alpha": 0.5,
            "lora_dropout": 0.0,
            "target_modules": sorted(student.peft_config["default"].target_modules),
        },
    )
    unet = tiny_unet(family)
    load_lora(unet, tmp_path)
    assert torch.equal(output(unet, family), output(student, family))


def test_a_loaded_lora_is_the_saved_one_and_trainable(tmp_path):
    student = _trained(alpha=0.5)
    save_lora(tmp_path, student)
    unet = tiny_unet()
    trained = load_lora(unet, tmp_path)
    assert torch.equal(output(unet, "sd15"), output(student, "sd15"))
    assert all(p.requires_grad for p in trained)
    assert set(unet.peft_config["default"].target_modules) == set(LCM_LORA_TARGETS)


def test_the_exported_values_may_be_others_than_the_networks(tmp_path):
    student = _trained()
    halves = {name: parameter / 2 for name, parameter in adapters(student).items()}
    save_lora(tmp_path, student, state=halves)
    unet = tiny_unet()
    load_lora(unet, tmp_path)
    assert all(torch.equal(p, halves[name]) for name, p in adapters(unet).items())
    name, _ = halves.popitem()
    with pytest.raises(ValueError, match=f"lacks the LoRA parameter '{name}'"):
        lora_state_dict(student, halves)


def test_names_are_pefts():
    student = _trained()
    ours, pefts = lora_state_dict(student), get_peft_model_state_dict(student)
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[name], pefts[name]) for name in ours)


def test_a_lora_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA in"):
        load_lora(tiny_unet(), tmp_path)
    with pytest.raises(ValueError, match="has no LoRA adapter"):
        save_lora(tmp_path, tiny_unet())
    save_lora(tmp_path, _trained())
    with pytest.raises(
        ValueError, match="made for another network, or for other lora_targets: .* is in only one of the two"
    ):
        load_lora(tiny_unet("sdxl"), tmp_path)
    with pytest.raises(ValueError, match=r"to_k.lora_A.weight is \[4, 20\], the network's \[4, 21\]"):
        load_lora(tiny_unet(cross_attention_dim=21), tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)
    with pytest.raises(ValueError, match="does not record its rank and alpha"):
        load_lora(tiny_unet(), tmp_path)
