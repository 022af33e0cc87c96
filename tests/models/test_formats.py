"""Whole networks as files: a pipeline's other parts byte for byte, a checkpoint in one file, a guidance built in."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModelWithProjection

from distill.diffusion.guidance import guidance_embedding
from distill.diffusion.prediction import Prediction
from distill.models.copied import text_tensors
from distill.models.families.loading import load_teacher
from distill.models.families.unet import UNetGuidance
from distill.models.formats import save_network, save_pipeline
from distill.models.full_size import build_unet, unet_config
from distill.models.layouts import original_module
from distill.models.original import open_clip, original_vae
from distill.models.schedulers import make_scheduler
from distill.models.single_file import save_single_file
from tests.models.original import original_unet
from tests.tiny import CHANNELS, FAMILIES, save_tiny, tiny_conditioning, tiny_unet

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def exported(teacher: str, folder: Path, **more: Any) -> Path:
    """The teacher's pipeline around its own network."""
    scheduler = partial(make_scheduler, sampler="lcm", spacing="lcm")
    save_pipeline(folder, load_teacher(teacher, **more).network, teacher, torch.float32, scheduler, **more)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def unchanged(found: dict[str, bytes]) -> dict[str, bytes]:
    own = ("unet/", "scheduler/", "model_index.json")
    return {name: content for name, content in found.items() if not name.startswith(own)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_that_a_student_leaves_alone_are_the_teachers_files(family: str, tmp_path: Path) -> None:
    """A teacher as transformers 4 saved it: its vocabulary, its merges, its names; nothing but known files is taken."""
    teacher = exported(save_tiny(tmp_path / "new", family), tmp_path / "teacher")
    before = files(teacher)
    for stray in ("notes.md", "text_encoder/pytorch_model.bin", "vae/flax.msgpack", "tokenizer/notes.md"):
        (teacher / stray).write_text("stray")
    index = json.loads((teacher / "model_index.json").read_text())
    index |= {"image_encoder": ["evil", "Evil"], "note": {"a": 1}}
    (teacher / "model_index.json").write_text(json.dumps(index))
    found = files(exported(str(teacher), tmp_path / "again"))
    assert unchanged(found) == unchanged(before) and found.keys() == before.keys()
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "vae/config.json"} <= found.keys()
    assert b"evil" not in found["model_index.json"].lower()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_as_transformers_5_saves_it_is_readable_for_version_4(family: str, tmp_path: Path) -> None:
    """Which needs vocab.json and merges.txt, and starts an encoder at random whose names lack `text_model.`."""
    teacher = save_tiny(tmp_path / "teacher", family)
    assert not (tmp_path / "teacher" / "tokenizer" / "vocab.json").exists()  # else this test says nothing
    folder = exported(teacher, tmp_path / "a")
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert (
        len(vocabulary) == 514 and vocabulary["<|endoftext|>"] == 513 and list(vocabulary.values()) == list(range(514))
    )
    assert (folder / "tokenizer" / "merges.txt").read_text().startswith("#version")
    names = load_file(folder / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    pipelines = [DiffusionPipeline.from_pretrained(path) for path in (teacher, folder)]
    own, ours = (p.text_encoder.state_dict() for p in pipelines)
    assert own.keys() == ours.keys() and all(torch.equal(own[name], ours[name]) for name in own)
    own_ids, our_ids = (p.tokenizer(["a red boat", "é"], padding="max_length").input_ids for p in pipelines)
    assert own_ids == our_ids


def test_links_are_followed_and_a_variants_files_lose_its_name(tmp_path: Path) -> None:
    """As in the hub's cache: every file a link. Loaded plainly, halves are float32, as the UNet beside them is."""
    save_tiny(tmp_path / "plain", "sdxl")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "plain").to(torch.float16)
    pipeline.save_pretrained(tmp_path / "blobs", variant="fp16")
    for path in [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()]:
        link = tmp_path / "cache" / path.relative_to(tmp_path / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    folder = exported(str(tmp_path / "cache"), tmp_path / "a", variant="fp16")
    shutil.rmtree(tmp_path / "blobs")
    names = files(folder).keys()
    assert not any(p.is_symlink() for p in folder.rglob("*")) and not any("fp16" in name for name in names)
    assert load_file(folder / "text_encoder_2" / "model.safetensors")["text_projection.weight"].dtype == torch.float16
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert {loaded.text_encoder.dtype, loaded.text_encoder_2.dtype, loaded.unet.dtype} == {torch.float32}
    loaded("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent")


def test_a_text_encoder_in_several_files_is_copied_whole(tmp_path: Path) -> None:
    teacher = exported(save_tiny(tmp_path / "new"), tmp_path / "teacher")
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    weights = dict(text_tensors(teacher, "text_encoder"))
    (teacher / "text_encoder" / "model.safetensors").unlink()
    pipeline.vae.save_pretrained(teacher / "vae", max_shard_size="20KB")
    (teacher / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({n: weights[n] for n in held}, teacher / "text_encoder" / file, {"format": "pt"})
    listed = {"metadata": {}, "weight_map": {n: file for file, held in parts.items() for n in held}}
    (teacher / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(listed))
    again = DiffusionPipeline.from_pretrained(exported(str(teacher), tmp_path / "a"))
    for part in ("text_encoder", "vae"):
        own, ours = (getattr(p, part).state_dict() for p in (pipeline, again))
        assert all(torch.equal(own[name], ours[name]) for name in own)


def checked_teacher(folder: Path) -> Path:
    """A teacher with a safety checker."""
    save_tiny(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = sizes | {"image_size": 32, "patch_size": 16}, sizes | {"vocab_size": 514}
    config = CLIPConfig(projection_dim=16, vision_config=vision, text_config=text)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text()) | {"requires_safety_checker": True}
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index |= {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}  # its name of old
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def pickled(teacher: Path) -> None:
    (teacher / "safety_checker" / "model.safetensors").rename(teacher / "safety_checker" / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (lambda teacher: None, True),
        (pickled, False),
        (lambda teacher: shutil.rmtree(teacher / "safety_checker"), False),
        (lambda teacher: shutil.rmtree(teacher / "feature_extractor"), False),
    ],
    ids=["whole", "pickled", "gone", "without what it reads"],
)
def test_a_safety_checker_is_exported_if_it_is_whole(change: Any, stays: bool, tmp_path: Path) -> None:
    teacher = checked_teacher(tmp_path / "teacher")
    change(teacher)
    folder = exported(str(teacher), tmp_path / "a")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["requires_safety_checker"] is stays and (folder / "safety_checker").exists() is stays
    assert (DiffusionPipeline.from_pretrained(folder).safety_checker is not None) is stays


def test_a_part_that_a_pipeline_needs_is_missed(tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher")
    unet = load_teacher(teacher).network
    shutil.rmtree(tmp_path / "teacher" / "tokenizer")
    scheduler = partial(make_scheduler, sampler="lcm", spacing="lcm")
    with pytest.raises(FileNotFoundError, match="tokenizer/ of .* has none of vocab.json"):
        save_pipeline(tmp_path / "a", unet, teacher, torch.float32, scheduler)


def test_a_network_is_one_file_of_whatever_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL in float32 is over diffusers' 10 GB: two shards, which ComfyUI does not load. Here the limit is 10 KB."""
    save = UNet2DConditionModel.save_pretrained

    def in_small_shards(self: UNet2DConditionModel, folder: Path, max_shard_size: int | str = "10KB") -> None:
        save(self, folder, max_shard_size=max_shard_size)

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", in_small_shards)
    save_network(tmp_path, tiny_unet(), torch.float32)
    assert [p.name for p in (tmp_path / "unet").glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]


# ---- one file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_the_student_and_the_teachers_other_parts(family: str, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", family)
    unet, file = tiny_unet(family, seed=3), tmp_path / "a.safetensors"
    save_single_file(file, unet, teacher, torch.float32, Prediction.EPSILON, {"modelspec.title": "a"})
    loaded = PIPELINES[family].from_single_file(str(file), config=teacher)
    theirs = DiffusionPipeline.from_pretrained(teacher)
    parts = ["vae", "text_encoder"] + (["text_encoder_2"] if family == "sdxl" else [])
    for name, own in {"unet": unet, **{part: getattr(theirs, part) for part in parts}}.items():
        ours = getattr(loaded, name).state_dict()
        assert ours.keys() == own.state_dict().keys()
        assert all(torch.equal(ours[key], weight) for key, weight in own.state_dict().items()), name


def test_a_checkpoint_is_of_one_dtype_and_an_sdxl_says_that_it_predicts_velocity(tmp_path: Path) -> None:
    for family, said in (("sd15", False), ("sdxl", True)):
        teacher = save_tiny(tmp_path / family, family)
        file = tmp_path / f"{family}.safetensors"
        save_single_file(file, tiny_unet(family), teacher, torch.float16, Prediction.V)
        tensors = load_file(file)
        assert ("v_pred" in tensors) is said
        assert {tensor.dtype for name, tensor in tensors.items() if name != "v_pred"} == {torch.float16}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "ssd1b"])
def test_the_full_networks_have_the_names_of_the_original_ones(name: str) -> None:
    unet = build_unet(unet_config(name), device="meta")
    found = {n: original_module(n.rpartition(".")[0], unet.config) for n in unet.state_dict()}
    weights = {found[n]: list(p.shape) for n, p in unet.named_parameters() if n.endswith(".weight") and p.ndim > 1}
    assert weights == original_unet(name)


def test_the_autoencoders_attention_has_the_original_names_and_shapes() -> None:
    """The tiny teachers' have none."""
    config: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    config |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**config)
    tensors = dict(original_vae(vae.state_dict().items(), levels=2))
    attention = "first_stage_model.encoder.mid.attn_1"
    assert tensors[f"{attention}.q.weight"].shape == (16, 16, 1, 1) and f"{attention}.norm.weight" in tensors
    assert {
        "first_stage_model.decoder.up.1.upsample.conv.weight",
        "first_stage_model.encoder.norm_out.bias",
    } <= tensors.keys()
    back = convert_ldm_vae_checkpoint(tensors, vae.config)
    own = vae.state_dict()
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
    with pytest.raises(ValueError, match="^the original autoencoder has no encoder.mid_block.attentions.1.to_q$"):
        list(original_vae([("encoder.mid_block.attentions.1.to_q.weight", torch.zeros(1))], 2))


def test_open_clip_computes_what_the_text_encoder_computes() -> None:
    """By OpenCLIP's own text tower: its names, its joined matrix, its transposed projection."""
    from open_clip.transformer import TextTransformer

    config = CLIPTextConfig(
        vocab_size=50, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    config.update({"max_position_embeddings": 9, "projection_dim": 10, "hidden_act": "gelu", "eos_token_id": 49})
    torch.manual_seed(0)
    encoder = CLIPTextModelWithProjection(config).eval()
    tower = TextTransformer(
        context_length=9, vocab_size=50, width=24, heads=4, layers=3, mlp_ratio=2.0, output_dim=10, pool_type="argmax"
    ).eval()
    missing, unexpected = tower.load_state_dict(dict(open_clip(encoder.state_dict().items())), strict=False)
    assert not unexpected and not missing
    ids = torch.tensor([[48, 3, 7, 1, 49, 0, 0, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(tower(ids), encoder(ids).text_embeds, rtol=1e-4, atol=1e-5)


# ---- guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_guidance_built_in_is_the_input_at_that_value(family: str) -> None:
    unet = tiny_unet(family)
    UNetGuidance().add(unet, 16)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    plain_keys = tiny_unet(family).state_dict().keys()
    c = tiny_conditioning(family, 2)
    x = torch.randn(2, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    added = {key: c[key] for key in ("text_embeds", "time_ids") if key in c} or None
    given: dict[str, Any] = {"encoder_hidden_states": c["encoder_hidden_states"], "added_cond_kwargs": added}
    with torch.no_grad():
        expected, other = (
            unet(x, 500, timestep_cond=guidance_embedding(torch.tensor([w, w]), 16), **given).sample for w in (7.5, 1.0)
        )
        UNetGuidance().build_in(unet, 7.5)
        torch.testing.assert_close(unet(x, 500, **given).sample, expected, rtol=1e-4, atol=1e-5)
    assert (expected - other).abs().max() > 0.01
    assert unet.state_dict().keys() == plain_keys and unet.config["time_cond_proj_dim"] is None
    with pytest.raises(ValueError, match="^the network takes no guidance as an input$"):
        UNetGuidance().build_in(unet, 7.5)
