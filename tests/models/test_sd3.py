"""Stable Diffusion 3 as a family: texts, calls, LoRAs and critics as diffusers' own pipeline has them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.diffusion.guidance import guided
from distill.diffusion.prediction import Prediction
from distill.diffusion.solver import make_times, solve
from distill.models.discriminator import CriticNetwork
from distill.models.families.loading import load_teacher, prompt_tokens
from distill.models.families.registry import FAMILIES, published
from distill.models.families.teacher import Teacher
from distill.models.full_size import build_network
from distill.models.lora import add_lora, load_lora, lora_config, only_adapter, save_lora, save_lora_file
from distill.models.student import FullStudent
from tests.tiny import CHANNELS, SD3_TRANSFORMER, SHIFT, TOKENS, save_tiny, tiny_conditioning, tiny_transformer

SD3 = FAMILIES["sd3"]
PROMPTS = ["a cat", "a dog on a log that is longer than the CLIP encoders read"]
T = torch.tensor([10, 999])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("sd3"), "sd3"))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return load_teacher(folder, parts=("network", "text", "vae"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return plain(folder)


def plain(folder: Path, **parts: Any) -> Any:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- what a folder says ---


def test_a_folder_is_a_flow_matching_teacher(teacher: Teacher) -> None:
    assert teacher.family is SD3 and teacher.schedule.shift == SHIFT
    assert teacher.prediction.value == "flow_prediction" and not teacher.zeros_for_empty
    assert (teacher.latent_shape, teacher.resolution, teacher.image_tokens) == ((CHANNELS, 6, 6), 24, 9)


def test_pictures_may_be_as_large_as_the_table_of_positions(teacher: Teacher) -> None:
    assert teacher.at_resolution(40).latent_shape == (CHANNELS, 10, 10)


# --- texts ---


def encoded(pipeline: Any, prompts: list[str], **given: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **given)
    return found[0], found[2]


def test_prompts_are_encoded_as_the_pipeline_encodes_them(teacher: Teacher, pipeline: Any) -> None:
    found = teacher.encode(PROMPTS)
    text, pooled = encoded(pipeline, PROMPTS)
    assert torch.equal(found["encoder_hidden_states"], text) and torch.equal(found["pooled_projections"], pooled)
    assert text.shape == (2, TOKENS + 256, 40) and not torch.equal(text[0, TOKENS:], text[1, TOKENS:])
    empty, none = encoded(pipeline, [""]), teacher.unconditional()
    assert torch.equal(none["encoder_hidden_states"], empty[0]) and torch.equal(none["pooled_projections"], empty[1])


def test_the_length_of_the_t5s_prompts_may_be_chosen(folder: Path, pipeline: Any) -> None:
    short = load_teacher(folder, parts=("text",), max_tokens=9)
    text, _ = encoded(pipeline, PROMPTS, max_sequence_length=9)
    assert torch.equal(short.encode(PROMPTS)["encoder_hidden_states"], text)
    assert prompt_tokens(folder, 9) == TOKENS + 9 and prompt_tokens(folder) == TOKENS + 256
    with pytest.raises(ValueError, match=r"max_tokens must lie in 1 \.\.\. 512, got 513"):
        load_teacher(folder, parts=("text",), max_tokens=513)


def test_text_encoders_compute_in_the_dtype_that_is_chosen_and_a_t5_never_in_float16(folder: Path) -> None:
    towers = load_teacher(folder, parts=("text",), text_dtype=torch.bfloat16).text
    assert {tower.encoder.dtype for tower in towers} == {torch.bfloat16}
    towers = load_teacher(folder, parts=("text",), text_dtype=torch.float16).text
    assert [tower.encoder.dtype for tower in towers] == [torch.float16, torch.float16, torch.bfloat16]


def test_zeros_stand_for_a_t5_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "without")
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / "without" / name)
    index = tmp_path / "without/model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | dict.fromkeys(("text_encoder_3", "tokenizer_3"), [None, None]))
    )
    teacher = load_teacher(tmp_path / "without", parts=("network", "text", "vae"))
    theirs = plain(tmp_path / "without", text_encoder_3=None, tokenizer_3=None)
    found, (text, _) = teacher.encode(PROMPTS)["encoder_hidden_states"], encoded(theirs, PROMPTS)
    assert torch.equal(found, text) and not found[:, TOKENS:].any() and found.shape[1] == TOKENS + 256
    assert teacher.pipeline(theirs.scheduler).text_encoder_3 is None


# --- calls ---


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_our_sampler_draws_the_plain_pipelines_pictures(teacher: Teacher, pipeline: Any, steps: int) -> None:
    for w, most in ((1.0, 2e-6), (5.0, 1e-5)):
        ours, x = drawn(teacher, steps, w)
        theirs = pictures(pipeline, x, steps, w, sigmas=own_grid(steps))
        assert float((ours - theirs).abs().max()) <= most


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_the_pipelines_own_grid_is_shifted_twice(teacher: Teacher, pipeline: Any, steps: int) -> None:
    """What the noise levels are handed over for: this fails once diffusers mends it."""
    ours, x = drawn(teacher, steps, 5.0)
    assert float((ours - pictures(pipeline, x, steps, 5.0)).abs().max()) > 0.02
    assert float((ours - pictures(pipeline, x, steps, 5.0, sigmas=own_grid(steps))).abs().max()) <= 1e-5


def own_grid(steps: int) -> list[float]:
    return [1 - i / steps for i in range(steps)]


@torch.no_grad()
def drawn(teacher: Teacher, steps: int, w: float) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    weight = torch.full((2,), w) if w != 1 else 1.0
    denoiser = guided(teacher.denoiser(), teacher.unconditional(), weight)
    times = make_times("trailing", teacher.schedule.T, steps)
    *_, (_, latents) = solve(denoiser, teacher.schedule, x, times, teacher.encode(PROMPTS), "ddim")
    return teacher.decode(latents), x


def pictures(pipeline: Any, x: Tensor, steps: int, w: float, **given: Any) -> Tensor:
    found = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=w, latents=x.clone(), output_type="pt", **given
    ).images
    return found * 2 - 1


def test_a_student_of_clean_data_goes_on_predicting_velocities(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    student = FullStudent(guidance_embedding_dim=None, prediction="sample")
    with caplog.at_level(logging.WARNING):
        networks = student.networks(load_teacher(folder), keep_teacher=False)
    assert networks["student"].prediction is Prediction.FLOW
    assert "student.prediction=sample is left aside" in caplog.text


def test_pictures_survive_the_way_to_latents_and_back(teacher: Teacher) -> None:
    """Shift and scale are undone in the order in which they were done, whatever the autoencoder is worth."""
    latents = torch.randn(2, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(0))
    vae = teacher.vae
    with torch.no_grad():
        theirs = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
        assert torch.equal(teacher.decode(latents), theirs) and vae.config.shift_factor
        pictures = torch.rand(2, 3, 24, 24) * 2 - 1
        mean = (vae.encode(pictures).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    assert torch.allclose(teacher.encode_pictures(pictures, torch.zeros(2, CHANNELS, 6, 6)), mean, atol=1e-6)


# --- full size ---


@pytest.mark.parametrize(
    "name, millions, modules, trained",
    [
        ("sd3", 2028, {"attention": 191, "blocks": 285}, {"attention": 37.6, "blocks": 83.8}),
        ("sd35_medium", 2243, {"attention": 243, "blocks": 337}, {"attention": 47.8, "blocks": 94.0}),
        ("sd35_large", 8057, {}, {"blocks": 211.1}),
    ],
)
def test_published_networks_and_their_loras_have_the_sizes_that_are_known(
    name: str, millions: int, modules: dict[str, int], trained: dict[str, float]
) -> None:
    family, model = published(name)
    for which, expected in trained.items():
        network = build_network(family.network.kind, model.network, device="meta")
        assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions
        found = add_lora(network, 64, 64, targets=family.lora.chosen(network, which), family=family)
        assert round(sum(p.numel() for p in found) / 1e6, 1) == expected
        assert modules.get(which, len(found) // 2) == len(found) // 2


# --- critics ---


@pytest.mark.parametrize("on_its_weights", [False, True])
def test_a_critics_features_are_the_states_after_half_of_the_blocks(on_its_weights: bool) -> None:
    network, c = tiny_transformer(), tiny_conditioning("sd3", 2)
    x, told = torch.randn(2, CHANNELS, 6, 4, generator=torch.Generator().manual_seed(0)), T.float()
    seen: list[Tensor] = []
    network.transformer_blocks[1].register_forward_hook(lambda *given: seen.append(given[2][1]))
    with torch.no_grad():
        SD3.predict(network, x, told, c, torch.float32)
    encoder = SD3.critic.encoder(network, on_its_weights)
    with torch.no_grad():
        features = SD3.critic.features(encoder, x, told, c, torch.float32)
    width = SD3_TRANSFORMER["num_attention_heads"] * SD3_TRANSFORMER["attention_head_dim"]
    assert features.shape == (2, *SD3.critic.shape(network, (6, 4))) == (2, width, 3, 2)
    assert torch.equal(features.flatten(2).transpose(1, 2), seen[0])
    assert len(network.transformer_blocks) == 4, "the network itself is whole"


@pytest.mark.parametrize("rank", [None, 2])
def test_every_trained_weight_of_a_critic_counts(rank: int | None) -> None:
    """What the last block makes of the text is read by nothing, and is not trained; text and origin are read."""
    critic = CriticNetwork(tiny_transformer().requires_grad_(False), (6, 6), conditional=True, rank=rank, family=SD3)
    for parameter in critic.head.logit.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    if rank is not None:  # as a LoRA starts, its A has no gradient yet
        for name, parameter in critic.encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    x, c = torch.randn(4, CHANNELS, 6, 6), tiny_conditioning("sd3", 4)
    told = torch.tensor([100.0, 900.0, 400.0, 950.0])
    logit = critic(x, told, 2, c)
    assert logit.shape == (2,)
    logit.sum().backward()
    idle = [name for name, p in critic.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []
    frozen = {name for name, p in critic.encoder.named_parameters() if not p.requires_grad}
    assert rank is not None or all(name.startswith("transformer_blocks.1.") for name in frozen) and frozen
    with torch.no_grad():
        other = {
            key: entry + torch.tensor([1.0, 0, 0, 0]).view(-1, *[1] * (entry.ndim - 1)) for key, entry in c.items()
        }
        for key in c:
            assert (critic(x, told, 2, c | {key: other[key]}) != logit).tolist() == [True, False]
        moved = x + torch.tensor([0.0, 0, 1, 0]).view(-1, 1, 1, 1)
        assert (critic(moved, told, 2, c) != logit).tolist() == [True, False]


def test_heads_over_wide_features_are_narrower() -> None:
    family, model = published("sd35_large")
    network = build_network(family.network.kind, model.network, device="meta")
    critic = CriticNetwork(network, (128, 128), family=family)
    assert critic.head.convs[0].in_channels == 2432 and critic.head.convs[0].out_channels == 1024
    assert len(critic.encoder.transformer_blocks) == 19


# --- LoRAs ---


@pytest.fixture
def adapted() -> Any:
    """A network with a LoRA that is not zero, and whose alpha is not its rank."""
    network = tiny_transformer().requires_grad_(False)
    random = torch.Generator().manual_seed(1)
    for parameter in add_lora(network, rank=3, alpha=2.0, family=SD3):
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    return network


def predicted(network: Any) -> Tensor:
    x = torch.randn(2, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return SD3.predict(network, x, T.float(), tiny_conditioning("sd3", 2), torch.float32)


def in_diffusers(pipeline: Any, path: Path, **given: Any) -> Tensor:
    """What the pipeline's network predicts with a LoRA's file."""
    pipeline.transformer = tiny_transformer().requires_grad_(False)
    name = path.name if path.is_file() else "pytorch_lora_weights.safetensors"  # which diffusers 0.39 wants to be given
    folder = path.parent if path.is_file() else path
    pipeline.load_lora_weights(str(folder), **({"weight_name": name} | given))
    return predicted(pipeline.transformer)


def test_its_files_are_read_by_diffusers_and_peft_at_their_scale(adapted: Any, pipeline: Any, tmp_path: Path) -> None:
    expected, bare = predicted(adapted), predicted(tiny_transformer().requires_grad_(False))
    assert (expected - bare).abs().max() > 0.01
    save_lora(tmp_path, adapted, formats=("diffusers", "peft"), family=SD3)
    save_lora_file(tmp_path / "c.safetensors", adapted, format="comfyui", family=SD3)
    assert torch.equal(in_diffusers(pipeline, tmp_path), expected)
    torch.testing.assert_close(in_diffusers(pipeline, tmp_path / "c.safetensors"), expected, rtol=0, atol=1e-5)
    in_peft = PeftModel.from_pretrained(tiny_transformer().requires_grad_(False), tmp_path / "peft")
    torch.testing.assert_close(predicted(in_peft.base_model.model), expected, rtol=0, atol=1e-6)


def test_a_file_without_its_header_would_be_read_at_another_scale(adapted: Any, pipeline: Any, tmp_path: Path) -> None:
    """Why there are two files, and why a folded one says nothing of an alpha."""
    save_lora(tmp_path, adapted, formats=("diffusers",), family=SD3)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    assert (in_diffusers(pipeline, tmp_path / "bare.safetensors") - predicted(adapted)).abs().max() > 1e-3
    save_lora_file(tmp_path / "c.safetensors", adapted, format="comfyui", family=SD3)
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        header, keys = file.metadata(), set(file.keys())
    assert "lora_adapter_metadata" not in header and json.loads(header["distill_lora"])["lora_alpha"] == 3
    assert keys == set(tensors) and all(key.startswith("transformer.") for key in keys)
    assert "kohya" not in SD3.lora.formats, "no loader of diffusers reads such names for this network"


def test_a_lora_comes_back_bit_for_bit_and_is_the_teacher_when_off(adapted: Any, tmp_path: Path) -> None:
    save_lora(tmp_path, adapted, formats=("diffusers",), family=SD3)
    again = tiny_transformer().requires_grad_(False)
    load_lora(again, tmp_path, family=SD3)
    theirs = dict(again.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in adapted.named_parameters())
    assert lora_config(again).lora_alpha == 2.0
    with only_adapter(adapted, None):
        assert torch.equal(predicted(adapted), predicted(tiny_transformer().requires_grad_(False)))
