from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from safetensors import safe_open

from distill.toy.judge import judge_file, load_judge
from distill.toy.teacher import TOKENS, build_pipeline, build_tokenizer, encode_captions, teacher_folder, time_ids
from distill.toy.world import CAPTIONS, sample


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(teacher_folder())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_pipeline_draws_what_the_captions_say(pipeline: StableDiffusionXLPipeline) -> None:
    captions = [*CAPTIONS] * 5
    drawing = StableDiffusionXLPipeline(
        **{**pipeline.components, "scheduler": DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)}
    )
    drawing.set_progress_bar_config(disable=True)
    images = drawing(
        captions,
        height=32,
        width=32,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert load_judge().caption_accuracy(images * 2 - 1, captions)[0] >= 0.8


@torch.no_grad()
def test_the_vae_keeps_what_the_judge_sees(pipeline: StableDiffusionXLPipeline) -> None:
    images, captions, _ = sample(300, seed=12)
    latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert latents.shape == (300, 4, 8, 8)
    assert latents.std() == pytest.approx(1, abs=0.05) and latents.mean().abs() < 0.05
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert load_judge().caption_accuracy(decoded, captions)[0] >= 0.97
    assert (decoded - images).square().mean() < 0.02


def test_captions_fit_the_tokenizers_and_differ(pipeline: StableDiffusionXLPipeline) -> None:
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        tokens = tokenizer(list(CAPTIONS), padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        assert tokens.shape == (len(CAPTIONS), TOKENS)
        assert len({tuple(row) for row in tokens.tolist()}) == len(CAPTIONS)
        for caption in CAPTIONS:
            assert tokenizer.tokenize(caption) == [word + "</w>" for word in caption.split()]


@pytest.mark.parametrize("text", ["a zebra", "naïve café", "7 + 5!"])
def test_any_other_text_is_spelt_without_unknown_tokens(text: str) -> None:
    tokenizer = build_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens).replace(" ", "") == text.replace(" ", "")


@torch.no_grad()
def test_captions_are_encoded_as_the_pipeline_does(pipeline: StableDiffusionXLPipeline) -> None:
    prompt, pooled = encode_captions(pipeline, list(CAPTIONS))
    expected, _, expected_pooled, _ = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    torch.testing.assert_close((prompt, pooled), (expected, expected_pooled))
    assert torch.cdist(pooled, pooled).add(torch.eye(len(CAPTIONS)) * 1e3).min() > 0.1


def test_no_prompt_is_zeros_as_in_sdxl(pipeline: StableDiffusionXLPipeline) -> None:
    _, negative, _, negative_pooled = pipeline.encode_prompt("red dots", do_classifier_free_guidance=True)
    assert not negative.any() and not negative_pooled.any()


def test_bundled_files_are_small_and_of_one_precision() -> None:
    files = [judge_file(), *(path for path in teacher_folder().rglob("*") if path.is_file())]
    assert sum(path.stat().st_size for path in files) < 8.5e6
    for path in files:
        if path.suffix == ".safetensors":
            assert tensor_types(path) == {"F32"}


def tensor_types(path: Path) -> set[str]:
    with safe_open(path, "pt") as stored:
        return {stored.get_slice(name).get_dtype() for name in stored.keys()}


def test_bundled_networks_have_the_shape_the_builder_makes(pipeline: StableDiffusionXLPipeline) -> None:
    built = build_pipeline()
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(built, name).state_dict(), getattr(pipeline, name).state_dict()
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_time_ids_are_sdxl_s(pipeline: StableDiffusionXLPipeline) -> None:
    expected = pipeline._get_add_time_ids(
        (32, 32),
        (0, 0),
        (32, 32),
        torch.float32,
        text_encoder_projection_dim=pipeline.text_encoder_2.config.projection_dim,
    )
    assert torch.equal(time_ids(1), expected)
