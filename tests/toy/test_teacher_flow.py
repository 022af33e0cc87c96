from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from transformers import AutoTokenizer, T5Tokenizer

from distill.config.loading import load
from distill.config.settings import TrainSettings
from distill.models.families.loading import load_teacher
from distill.studies.toy_flow import (
    PROMPTS,
    SCHEDULE,
    generate_flow_images,
    random_times,
    velocity,
)
from distill.toy.judge import load_judge
from distill.toy.teacher import TOKENS, build_vae, teacher_folder
from distill.toy.teacher_flow import (
    SHIFT,
    T5_TOKENS,
    build_flow_pipeline,
    build_t5_tokenizer,
    encode_for_flow,
    flow_teacher_folder,
    fold_quant_convs,
)
from distill.toy.world import CAPTIONS, labels_of, sample

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(flow_teacher_folder(), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture()
def a_train_mode(pipeline: StableDiffusion3Pipeline) -> Iterator[StableDiffusion3Pipeline]:
    """The pipeline with text encoders as they are before anyone has called `eval()`."""
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    for encoder in encoders:
        encoder.train()
    yield pipeline
    for encoder in encoders:
        encoder.eval()


def test_the_bundled_flow_teacher_is_what_its_model_file_names() -> None:
    cfg = load("train", TrainSettings, ["experiment=quickstart", "model=toy_flow", "data.store=STORE"])
    assert cfg.model.pretrained_model_name_or_path == str(flow_teacher_folder())
    assert cfg.model.max_tokens == T5_TOKENS


def test_the_flow_pipeline_draws_what_the_captions_say(pipeline: StableDiffusion3Pipeline) -> None:
    captions = [*CAPTIONS] * 3
    images = pipeline(
        captions,
        height=32,
        width=32,
        sigmas=[1 - i / 20 for i in range(20)],
        num_inference_steps=20,
        guidance_scale=2.0,
        max_sequence_length=T5_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert load_judge().caption_accuracy(images * 2 - 1, captions)[0] >= 0.9


def test_it_also_draws_them_with_the_pipeline_s_own_defaults(pipeline: StableDiffusion3Pipeline) -> None:
    """Its own grid of sigmas, and 256 T5 tokens, most of them padding that the transformer attends to."""
    images = pipeline(
        list(CAPTIONS),
        num_inference_steps=6,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (len(CAPTIONS), 3, 32, 32)
    assert load_judge().caption_accuracy(images * 2 - 1, CAPTIONS)[0] >= 0.8


@torch.no_grad()
def test_the_transformer_predicts_eps_minus_x0(pipeline: StableDiffusion3Pipeline) -> None:
    """Read as v of a variance-preserving path, the same output gives a worse x_0."""
    images, captions, labels = sample(200, seed=5)
    vae = pipeline.vae
    clean = (vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(6))
    prompt, pooled = encode_for_flow(pipeline, list(CAPTIONS))
    told = torch.full((len(clean),), 400.0)
    x = 0.6 * clean + 0.4 * noise
    v = velocity(pipeline, x, told, prompt[labels], pooled[labels])
    error = (x - 0.4 * v - clean).square().mean()
    assert error < 0.05
    assert (0.6 * x - 0.4 * v - clean).square().mean() > 3 * error


@torch.no_grad()
def test_its_vae_has_sd3_s_form_and_keeps_what_the_judge_sees(pipeline: StableDiffusion3Pipeline) -> None:
    vae = pipeline.vae
    assert vae.quant_conv is None and vae.post_quant_conv is None
    assert abs(vae.config.shift_factor) * vae.config.scaling_factor > 0.2, "one that is forgotten would not be noticed"
    images, captions, _ = sample(300, seed=12)
    latents = (vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    assert latents.shape == (300, 4, 8, 8)
    assert latents.std() == pytest.approx(1, abs=0.05) and latents.mean().abs() < 0.05
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert load_judge().caption_accuracy(decoded, captions)[0] >= 0.97
    assert (decoded - images).square().mean() < 0.02


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_folding_the_quant_convolutions_keeps_every_picture(seed: int) -> None:
    torch.manual_seed(seed)
    vae = build_vae().eval()
    for conv in (vae.quant_conv, vae.post_quant_conv):
        torch.nn.init.normal_(conv.weight)
        torch.nn.init.normal_(conv.bias)
    folded = fold_quant_convs(vae).eval()
    images = sample(4, seed)[0]
    before, after = vae.encode(images).latent_dist, folded.encode(images).latent_dist
    assert not torch.allclose(before.mean, after.mean, atol=0.1)
    torch.testing.assert_close(after.logvar, before.logvar, atol=1e-4, rtol=1e-4)
    expected = vae.decode(before.mean).sample
    torch.testing.assert_close(folded.decode(after.mean).sample, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.01


def test_the_bundled_vae_is_the_first_teacher_s_folded(pipeline: StableDiffusion3Pipeline) -> None:
    images = sample(20, seed=3)[0]
    first = type(pipeline.vae).from_pretrained(teacher_folder() / "vae")
    with torch.no_grad():
        expected = first.decode(first.encode(images).latent_dist.mean).sample
        found = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mean).sample
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_captions_fit_the_flow_teacher_s_tokenizers_and_differ(pipeline: StableDiffusion3Pipeline) -> None:
    for tokenizer, length in ((pipeline.tokenizer, TOKENS), (pipeline.tokenizer_3, T5_TOKENS)):
        assert tokenizer.model_max_length == length
        tokens = tokenizer(list(CAPTIONS), padding="max_length", max_length=length, return_tensors="pt").input_ids
        assert len({tuple(row) for row in tokens.tolist()}) == len(CAPTIONS)
    for caption in CAPTIONS:
        assert pipeline.tokenizer_3.tokenize(caption) == ["▁" + word for word in caption.split()]


@pytest.mark.parametrize("text", ["a zebra", "red dots", "7 + 5!", "unheard-of (words): ~"])
def test_any_other_ascii_text_is_spelt_by_the_t5_tokenizer_without_unknown_tokens(text: str) -> None:
    tokenizer = build_t5_tokenizer()
    tokens = tokenizer(text).input_ids
    assert tokens[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.parametrize("cls", [AutoTokenizer, T5Tokenizer])
def test_the_t5_tokenizer_reloads_from_its_folder_alone(cls: type) -> None:
    folder = flow_teacher_folder() / "tokenizer_3"
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    loaded = cls.from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
    texts = [*PROMPTS, "a zebra", "no word of Ängström"]
    built = build_t5_tokenizer()
    assert isinstance(loaded, T5Tokenizer) and len(loaded) == len(built)
    assert loaded(texts, padding=True).input_ids == built(texts, padding=True).input_ids


@torch.no_grad()
def test_prompts_are_encoded_alike_every_time(a_train_mode: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    """Whatever mode the encoders are in (a T5 usually drops out in training mode), and after saving them."""
    prompt, pooled = encode_for_flow(a_train_mode, PROMPTS)
    assert prompt.shape == (len(PROMPTS), TOKENS + T5_TOKENS, 64) and pooled.shape == (len(PROMPTS), 64)
    torch.testing.assert_close(encode_for_flow(a_train_mode, PROMPTS), (prompt, pooled), atol=0, rtol=0)
    a_train_mode.save_pretrained(tmp_path)
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path, local_files_only=True)
    torch.testing.assert_close(encode_for_flow(again, PROMPTS), (prompt, pooled), atol=0, rtol=0)


@torch.no_grad()
def test_it_is_a_teacher_of_the_sd3_family(pipeline: StableDiffusion3Pipeline) -> None:
    teacher = load_teacher(flow_teacher_folder(), parts=("text",), max_tokens=T5_TOKENS)
    assert teacher.family.name == "sd3" and teacher.schedule.fingerprint == SCHEDULE.fingerprint
    prompt, pooled = encode_for_flow(pipeline, PROMPTS)
    encoded = teacher.encode(PROMPTS)
    assert {tuple(x.shape) for x in encoded.values()} == {tuple(prompt.shape), tuple(pooled.shape)}
    for x in encoded.values():
        torch.testing.assert_close(x, prompt if x.ndim == 3 else pooled, atol=1e-6, rtol=0)


@torch.no_grad()
def test_prompts_differ_in_all_three_encoders(pipeline: StableDiffusion3Pipeline) -> None:
    prompt, pooled = encode_for_flow(pipeline, PROMPTS)
    both, t5 = prompt[:, :TOKENS], prompt[:, TOKENS:]
    for encoded in (both[..., :32], both[..., 32:], t5, pooled[:, :32], pooled[:, 32:]):
        flat = encoded.flatten(1)
        assert torch.cdist(flat, flat).add(torch.eye(len(PROMPTS)) * 1e3).min() > 0.05
    assert prompt[-1].any() and pooled[-1].any(), "no prompt is the encoded empty one, and not zeros as in SDXL"


def test_the_files_of_the_flow_teacher_are_small_and_of_one_precision() -> None:
    files = [path for path in flow_teacher_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == len(PARTS)
    for path in weights:
        with safe_open(path, "pt") as stored:
            assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F32"}
    for path in files:
        assert path in weights or "/home" not in (text := path.read_text()) and "/root" not in text, path


def test_the_bundled_flow_networks_have_the_shape_the_builder_makes(pipeline: StableDiffusion3Pipeline) -> None:
    built = build_flow_pipeline(fold_quant_convs(build_vae()))
    for name in PARTS:
        ours, theirs = getattr(built, name).state_dict(), getattr(pipeline, name).state_dict()
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    ours, theirs = (dict(it.scheduler.config) for it in (built, pipeline))
    assert {key: theirs[key] for key in ours if not key.startswith("_")} == {
        key: value for key, value in ours.items() if not key.startswith("_")
    }
    assert ours["shift"] == SHIFT


def test_the_sigmas_that_it_learns_are_its_scheduler_s(pipeline: StableDiffusion3Pipeline) -> None:
    times = torch.arange(1, SCHEDULE.T + 1)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    torch.testing.assert_close(SCHEDULE.told(times).flip(0), scheduler.timesteps, atol=2e-4, rtol=0)


def test_random_times_reach_both_ends_and_favour_middling_noise() -> None:
    times = random_times(20_000, torch.Generator().manual_seed(0))
    assert times.min() == 1 and times.max() == SCHEDULE.T
    share = torch.histc(SCHEDULE.told(times), bins=5, min=0, max=1000) / len(times)
    assert share.min() > 0.05 and share[1:4].min() > 0.15
    for count in (1, 2, 3, 16):
        assert random_times(count, torch.Generator()).shape == (count,)


def test_the_study_samples_what_the_flow_pipeline_samples(pipeline: StableDiffusion3Pipeline) -> None:
    noise = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for spacing, sigmas in (("trailing", [1, 2 / 3, 1 / 3]), ("default", None)):
        ours = generate_flow_images(pipeline, 20, seed=3, steps=3, spacing=spacing, guidance=2.0)
        theirs = pipeline(
            list(CAPTIONS),
            sigmas=sigmas,
            num_inference_steps=3,
            guidance_scale=2.0,
            max_sequence_length=T5_TOKENS,
            latents=noise,
            output_type="pt",
        ).images
        torch.testing.assert_close(ours, theirs * 2 - 1, atol=1e-5, rtol=0)
    assert labels_of(CAPTIONS).tolist() == list(range(20)), "the study's balanced labels are the captions in turn"
