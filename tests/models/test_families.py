"""Teachers must be recognised, and must see and say what their diffusers pipeline sees and says.

What both compute agrees within float32's rounding (`assert_close`: 1e-5 of values near 1): the pipeline's weights are
trainable and ours frozen, for which torch multiplies in other ways.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

import distill.toy
from distill.diffusion.guidance import guided
from distill.diffusion.prediction import Prediction
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import solve, trailing_times
from distill.models.families.loading import load_teacher
from distill.models.folder import _patterns
from distill.models.lora import add_lora
from distill.toy import world
from tests.tiny import CHANNELS, FAMILIES, TOKENS, save_tiny, tiny_pipeline

PROMPTS = ["a cat", "", "ein Öl-Gemälde, viel länger als das Fenster", "two  Cats!"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("teacher") / family, family)


@pytest.fixture(scope="module")
def teacher(folder: str):
    return load_teacher(folder, parts=("network", "text", "vae"))


@pytest.fixture(scope="module")
def pipeline(family: str):
    pipe = tiny_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_sizes_come_from_the_configs(teacher, family):
    assert teacher.family.name == family
    side, factor = {"sd15": (6, 4), "sdxl": (12, 2)}[family]
    assert teacher.latent_shape == (CHANNELS, side, side)
    assert teacher.resolution == side * factor
    assert teacher.encode(["a"])["encoder_hidden_states"].shape[1] == TOKENS
    assert teacher.prediction is Prediction.EPSILON
    assert teacher.schedule.fingerprint == NoiseSchedule.scaled_linear().fingerprint
    assert not any(p.requires_grad for p in teacher.network.parameters())


@torch.no_grad()
def test_encode_is_the_pipelines_encode_prompt(teacher, pipeline):
    states, empty_states, *pooled = pipeline.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    ours, empty = teacher.encode(PROMPTS), teacher.unconditional()
    torch.testing.assert_close(ours["encoder_hidden_states"], states)
    torch.testing.assert_close(empty["encoder_hidden_states"].expand_as(states), empty_states)
    if pooled:
        torch.testing.assert_close(ours["text_embeds"], pooled[0])
        assert torch.equal(empty["text_embeds"].expand_as(pooled[1]), pooled[1])


def test_sdxl_without_zeros_encodes_the_empty_string(tmp_path):
    pipe = tiny_pipeline("sdxl")
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pipe.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, parts=("text",))
    with torch.no_grad():
        _, states, _, pooled = pipe.encode_prompt("a", device="cpu")
    torch.testing.assert_close(teacher.unconditional()["encoder_hidden_states"], states)
    torch.testing.assert_close(teacher.unconditional()["text_embeds"], pooled)
    assert states.any()


def test_the_network_is_told_what_the_pipeline_tells_it(teacher, pipeline, family):
    seen = {}
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    height, width = teacher.resolution, teacher.resolution + 8
    pipeline("a cat", num_inference_steps=1, guidance_scale=3.0, height=height, width=width, output_type="latent")
    hook.remove()

    ours = teacher.encode(["a cat"], size=(height, width))
    empty = ours | teacher.unconditional()
    theirs = {"encoder_hidden_states": seen["encoder_hidden_states"], **(seen["added_cond_kwargs"] or {})}
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        torch.testing.assert_close(torch.cat([empty[key], ours[key]]), expected)


SCHEDULERS = [
    {},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "beta_end": 0.02},
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: "-".join(map(str, s.values())) or "epsilon")
def test_a_teacher_solve_is_the_pipelines(family, scheduler, tmp_path):
    """Networks, schedule, prediction, guidance and conditioning together: the same latents, step for step."""
    pipe = tiny_pipeline(family, timestep_spacing="trailing", **scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, parts=("network", "text"))
    assert teacher.prediction.value == scheduler.get("prediction_type", "epsilon")
    torch.testing.assert_close(teacher.schedule.alphas_cumprod[1:].float(), pipe.scheduler.alphas_cumprod)

    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
    prompts = ["a cat", "a dog"]
    theirs = pipe(prompts, latents=x, num_inference_steps=5, guidance_scale=3.0, output_type="latent").images
    denoiser = guided(teacher.denoiser(), teacher.unconditional(), 3.0)
    times = trailing_times(teacher.schedule.T, 5)
    with torch.no_grad():
        *_, (t, ours) = solve(denoiser, teacher.schedule, x, times, teacher.encode(prompts))
    assert t == 0
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * theirs.std().item())


def test_decode_is_the_pipelines(teacher, pipeline):
    latents = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        picture = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(picture, output_type="pt")  # in [0, 1]
    torch.testing.assert_close(teacher.decode(latents), expected * 2 - 1)


@pytest.mark.parametrize(
    ("config", "normalise"),
    [
        ({"shift_factor": 0.4}, lambda z: (z - 0.4) * 0.7),
        (
            {"latents_mean": [1.0, 2, 3, 4, 5], "latents_std": [5.0, 4, 3, 2, 1]},
            lambda z: (z - torch.arange(1.0, 6).view(1, 5, 1, 1)) / torch.arange(5.0, 0, -1).view(1, 5, 1, 1) * 0.7,
        ),
    ],
    ids=["shift", "mean and std"],
)
def test_decode_undoes_the_autoencoders_normalisation(config, normalise, tmp_path):
    pipe = tiny_pipeline("sdxl")
    pipe.vae.register_to_config(**config)
    pipe.save_pretrained(tmp_path)
    z = torch.randn(2, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = pipe.vae.decode(z).sample.clamp(-1, 1)
    torch.testing.assert_close(load_teacher(tmp_path, parts=("vae",)).decode(normalise(z)), expected)


def pictures(teacher, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *(teacher.resolution,) * 2, generator=torch.Generator().manual_seed(4)) * 2 - 1


def test_pictures_become_the_latents_that_diffusers_trains_on(teacher, pipeline):
    """Its training scripts: `vae.encode(pixels).latent_dist.sample() * scaling_factor`."""
    x = pictures(teacher)
    with torch.no_grad():
        posterior = pipeline.vae.encode(x).latent_dist
        expected = posterior.sample(torch.Generator().manual_seed(5)) * pipeline.vae.config.scaling_factor
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(teacher.encode_pictures(x, noise), expected)
    assert expected.shape == (2, *teacher.latent_shape)


NORMALISED = [
    {},
    {"shift_factor": 0.4},
    {"latents_mean": [1.0, 2, 3, 4, 5], "latents_std": [5.0, 4, 3, 2, 1], "shift_factor": 9.0},
]


@pytest.mark.parametrize("config", NORMALISED, ids=["plain", "shift", "mean and std"])
def test_encoding_is_the_inverse_of_decoding(config, tmp_path):
    """What `decode` hands the autoencoder's decoder is what its encoder gave `encode_pictures`."""
    pipe = tiny_pipeline("sdxl")
    pipe.vae.register_to_config(**config)
    pipe.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, parts=("vae",))
    x = pictures(teacher)
    with torch.no_grad():
        mean = pipe.vae.encode(x).latent_dist.mean
        expected = pipe.vae.decode(mean).sample.clamp(-1, 1)
    latents = teacher.encode_pictures(x, torch.zeros_like(mean))
    torch.testing.assert_close(teacher.decode(latents), expected)


def test_the_toys_pictures_come_back():
    teacher = load_teacher(Path(distill.toy.__file__).parent / "teacher", parts=("vae",))
    x, _, _ = world.sample(8, seed=1)
    noise = torch.randn(8, *teacher.latent_shape, generator=torch.Generator().manual_seed(6))
    back = teacher.decode(teacher.encode_pictures(x, noise))
    assert (back - x).square().mean() < 0.02 * x.var()


CROPS = [((1024, 683), (171, 0)), ((24, 24), (0, 0)), ((33, 50), (0, 7))]


def test_cut_pictures_are_described_as_the_pipeline_describes_them(teacher, pipeline, family):
    originals, corners = zip(*CROPS, strict=True)
    ours = teacher.family.sizes(originals, corners, (24, 32))
    if family == "sd15":
        assert ours == {}
        return
    width = pipeline.text_encoder_2.config.projection_dim
    theirs = [
        pipeline._get_add_time_ids(original, corner, (24, 32), torch.float32, text_encoder_projection_dim=width)
        for original, corner in CROPS
    ]
    assert torch.equal(ours["time_ids"], torch.cat(theirs))
    assert ours["time_ids"][0].tolist() == [1024, 683, 171, 0, 24, 32]  # height first


@pytest.fixture
def fixed_vae(tmp_path) -> Path:
    """The SDXL-shaped autoencoder with other weights, for itself."""
    vae = tiny_pipeline("sdxl", seed=1).vae
    vae.save_pretrained(tmp_path / "fixed")
    return tmp_path / "fixed"


def test_another_autoencoder_takes_the_place_of_the_teachers(fixed_vae, tmp_path):
    folder = save_tiny(tmp_path / "teacher", "sdxl")
    own = load_teacher(folder, parts=("text", "vae"))
    other = load_teacher(folder, parts=("text", "vae"), vae=fixed_vae)
    half = load_teacher(folder, parts=("text", "vae"), vae=fixed_vae, vae_dtype=torch.bfloat16)
    assert half.vae.dtype == torch.bfloat16 and half.text[0].encoder.dtype == torch.float32
    assert len({own.vae_hash, other.vae_hash, half.vae_hash}) == 3
    assert own.vae_hash == load_teacher(folder, parts=("vae",)).vae_hash
    assert own.teacher_hash == other.teacher_hash
    assert not any(p.requires_grad for p in other.vae.parameters())

    x, noise = pictures(own), torch.zeros(2, *own.latent_shape)
    exact, rounded = (teacher.encode_pictures(x, noise) for teacher in (other, half))
    with torch.no_grad():
        mean = tiny_pipeline("sdxl", seed=1).vae.encode(x).latent_dist.mean
    torch.testing.assert_close(exact, mean * 0.7)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05 * exact.std().item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0.3}, "has scaling_factor 0.3, the teacher's own has 0.7"),
        ({"latent_channels": 4}, "has latent_channels 4, the teacher's own has 5"),
        ({"shift_factor": 0.1}, "has shift_factor 0.1, the teacher's own has None"),
        ({"block_out_channels": [8]}, "halves its pictures more or less often"),
        ({"_class_name": "AutoencoderTiny"}, "is a AutoencoderTiny, not an AutoencoderKL"),
    ],
)
def test_an_autoencoder_of_other_latents_is_refused(fixed_vae, tmp_path, changes, message):
    folder = save_tiny(tmp_path / "teacher", "sdxl")
    _edit(fixed_vae, "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_teacher(folder, parts=("vae",), vae=fixed_vae)


def test_an_autoencoder_that_is_not_there_is_named(fixed_vae, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = save_tiny(tmp_path / "teacher", "sdxl")
    (fixed_vae / "diffusion_pytorch_model.safetensors").rename(fixed_vae / "diffusion_pytorch_model.bin")
    for path in (fixed_vae, "/nowhere/at/all", "nobody/nothing"):
        with pytest.raises(FileNotFoundError, match=f"no autoencoder with safetensors weights at '{path}'") as caught:
            load_teacher(folder, parts=("vae",), vae=path)
        assert "\n" not in str(caught.value)


def test_a_dtype_is_the_networks_and_what_is_called_once_a_picture_stays_in_float32(tmp_path):
    folder = save_tiny(tmp_path, "sdxl")
    half, whole = (
        load_teacher(folder, parts=("network", "text", "vae"), dtype=d) for d in (torch.float16, torch.float32)
    )
    assert half.network.dtype == torch.float16
    assert {tower.encoder.dtype for tower in half.text} == {half.vae.dtype} == {torch.float32}
    for name, value in whole.encode(["a red disc"]).items():
        assert torch.equal(value, half.encode(["a red disc"])[name]), name
    z = torch.randn(2, *whole.latent_shape)
    assert torch.equal(whole.decode(z), half.decode(z))


@pytest.mark.parametrize(("force", "expected"), [(True, torch.float32), (False, torch.float16)])
def test_an_autoencoder_that_overflows_is_loaded_in_float32(force, expected, fixed_vae, tmp_path):
    folder = save_tiny(tmp_path / "teacher", "sdxl")
    _edit(fixed_vae, "config.json", force_upcast=force)
    assert load_teacher(folder, parts=("vae",), vae=fixed_vae, vae_dtype=torch.float16).vae.dtype == expected


def test_large_pictures_are_decoded_one_after_another(tmp_path, monkeypatch):
    teacher = load_teacher(save_tiny(tmp_path, "sdxl"), parts=("vae",))
    latents = torch.randn(5, *teacher.latent_shape)
    whole, decoded = teacher.decode(latents), []
    teacher.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append(len(args[0])))
    monkeypatch.setattr("distill.models.families.teacher.DECODED_PIXELS", 2 * teacher.resolution**2)
    torch.testing.assert_close(teacher.decode(latents), whole)
    assert decoded == [2, 2, 1]
    decoded.clear()
    large = teacher.at_resolution(4 * teacher.resolution)
    assert large.decode(torch.randn(3, *large.latent_shape)).shape[-1] == large.resolution
    assert decoded == [1, 1, 1]


def test_the_hash_is_of_the_weights_not_of_the_files(folder, teacher, tmp_path):
    in_memory = load_teacher(folder)
    in_memory.weight_files = ()
    add_lora(in_memory.network, rank=2, alpha=2)
    assert in_memory.teacher_hash == teacher.teacher_hash

    shutil.copytree(folder, tmp_path / "sharded")
    shutil.rmtree(tmp_path / "sharded" / "unet")
    teacher.network.save_pretrained(tmp_path / "sharded" / "unet", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    assert load_teacher(tmp_path / "sharded", parts=()).teacher_hash == teacher.teacher_hash

    shutil.copytree(folder, tmp_path / "changed")
    file = tmp_path / "changed" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    assert load_teacher(tmp_path / "changed", parts=()).teacher_hash != teacher.teacher_hash


def test_a_teacher_is_named_by_its_folder(teacher, family):
    assert teacher.teacher_id == family


def test_a_variant_is_read_from_its_own_files(tmp_path):
    tiny_pipeline("sd15").to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert load_teacher(tmp_path, variant="fp16").network.dtype == torch.float32
    with pytest.raises(FileNotFoundError, match="it has diffusion_pytorch_model.fp16.safetensors: choose a variant"):
        load_teacher(tmp_path)


def test_parts_that_were_not_asked_for_are_named(folder):
    with pytest.raises(ValueError, match="loaded without its 'text'"):
        load_teacher(folder, parts=("vae",)).encode(["a"])
    with pytest.raises(ValueError, match="'clip' of a teacher is not known; allowed: network, text, vae"):
        load_teacher(folder, parts=("clip",))


def test_cut_prompts_are_told_once(folder, caplog):
    teacher = load_teacher(folder, parts=("text",))
    with caplog.at_level(logging.WARNING, logger="distill"):
        teacher.encode(["a b"])
        assert not caplog.records
        teacher.encode(["a b", "a very long prompt"])
        teacher.encode(["another very long prompt"])
    assert [record.getMessage() for record in caplog.records] == [
        f"prompts are cut after {TOKENS} tokens (said once); the first: 'a very long prompt'"
    ]


def _edit(folder: Path, name: str, **changes: object) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))


WRONG = {
    "another class": ("model_index.json", {"_class_name": "KolorsPipeline"}, "is a KolorsPipeline; known .*Stable"),
    "refiner": ("model_index.json", {"tokenizer": [None, None]}, "its tokenizer is None, it must be a CLIPTokenizer"),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "reads 9 and writes 5 channels.*inpainting"),
    "learned variance": ("unet/config.json", {"out_channels": 10}, "writes 10 channels"),
    "other family": ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type 'image'"),
    "prediction": ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "'flow'; allowed: epsilon, v_pred"),
    "schedule": ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, "beta_schedule 'cosine'"),
}


@pytest.mark.parametrize(("file", "changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_a_teacher_is_refused_in_one_line(folder, file, changes, message, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    _edit(tmp_path, file, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_teacher(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_opened(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=r"only pickled ones.*re-save the pipeline with save_pretrained"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./runs/x", "name"])
def test_a_missing_folder_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"no folder '{path}'"):
        load_teacher(path)


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no model_index.json"):
        load_teacher(tmp_path)


def test_offline_a_hub_id_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no folder 'nobody/nothing', and the hub did not give it") as caught:
        load_teacher("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_only_the_files_needed_are_downloaded():
    repository = [
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "v1-5-pruned.ckpt",
    ]

    def chosen(variant: str | None) -> list[str]:
        return list(huggingface_hub.utils.filter_repo_objects(repository, allow_patterns=_patterns("unet", variant)))

    assert chosen(None) == [repository[1], repository[4], repository[5]]
    assert chosen("fp16") == [repository[2]]


def test_settings_for_another_family_are_refused_before_weights_are_read(folder, family, monkeypatch):
    other = {"sd15": "sdxl", "sdxl": "sd15"}[family]
    monkeypatch.setattr("distill.models.families.loading.load_checked", None)
    with pytest.raises(
        ValueError, match=rf"\(model.family={other}\): choose an experiment for {family}, or set"
    ) as caught:
        load_teacher(folder, family=other)
    assert "\n" not in str(caught.value)
    assert load_teacher(folder, parts=(), family=family).family.name == family
