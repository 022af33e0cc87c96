"""A family of somebody's own: one file in a package beside this one, and one YAML, take it from prompts to pictures.

It is Chroma, which this project has no file for: FLUX's packing, a T5 alone that is masked, guidance by a second pass.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from distill.commands import export, train
from distill.commands import trajectories as make_trajectories
from distill.config.composition import CONFIG_DIRS
from distill.config.loading import build, load
from distill.config.settings import ExportSettings, TrainSettings
from distill.data.reader import open_store
from distill.diffusion.registry import import_plugins
from distill.diffusion.solver import make_times, solve
from distill.models.families.loading import load_teacher
from distill.models.families.registry import FAMILIES
from distill.training.checkpoint import read_weights
from distill.training.run import checkpoints_of, read_run
from tests.tiny import CHANNELS, _t5_tokenizer, _vae

FILE = """
import torch

from distill.models.families.base import Family, Guidance, Latents, Network, Text
from distill.models.families.flux import PATCH, image_ids, pack, unpack
from distill.models.families.registry import FAMILIES
from distill.models.families.towers import T5Text, T5Tower
from distill.models.families.transformer import TransformerLoRA


class Masked(T5Text):
    def __call__(self, prompts):
        read = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.most, truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        mask = torch.arange(self.most) <= read.attention_mask.sum(1, keepdim=True)  # one of the padding is read
        return {"text": self.encoder(read.input_ids, attention_mask=read.attention_mask)[0], "text_mask": mask}


class MaskedTower(T5Tower):
    def load(self, folder, dtype, variant):
        found = super().load(folder, dtype, variant)
        return Masked(found.tokenizer, found.encoder)


class ChromaText(Text):
    towers = (MaskedTower("tokenizer", "text_encoder", "T5Tokenizer", "T5EncoderModel"),)
    max_tokens = 512
    stored = "bfloat16"

    def encode(self, towers, prompts):
        return towers[0](prompts)

    def shapes(self, network, tokens):
        return {"text": (tokens, network["joint_attention_dim"]), "text_mask": (tokens,)}

    def check(self, path, network, towers):
        pass


class ChromaNetwork(Network):
    def patch(self, network):
        return PATCH

    def side(self, network):
        return 128


class ChromaLoRA(TransformerLoRA):
    targets = {"blocks": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp")}

    def architecture(self, network, velocity):
        return "chroma", "chroma"


class Chroma(Family):
    name = "chroma"
    title = "Chroma"
    tag = "chroma"
    pipeline = "ChromaPipeline"
    network = ChromaNetwork("transformer", "ChromaTransformer2DModel",
                            ("transformer_blocks", "single_transformer_blocks"), ("in_channels", "num_layers"))
    text = ChromaText()
    latents = Latents()
    guidance = Guidance()
    lora = ChromaLoRA()
    full_size = {}

    def predict(self, module, x_t, told, conditioning, dtype):
        tokens, text = pack(x_t.to(dtype)), conditioning["text"].to(dtype)
        mask = torch.cat([conditioning["text_mask"].to(dtype), torch.ones_like(tokens[..., 0])], dim=1)
        out = module(
            hidden_states=tokens, encoder_hidden_states=text, timestep=told / 1000, attention_mask=mask,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
            img_ids=image_ids(x_t.shape[2:], x_t.device), return_dict=False,
        )[0]
        return unpack(out, x_t.shape[2:])


FAMILIES.register(Chroma())
"""
YAML = """
pretrained_model_name_or_path: lodestones/Chroma1-Base
revision: null
variant: null
config: null
loras: []
resolution: 16
shift: null
family: chroma
text_dtype: float32
max_tokens: 20
allow_distilled: false
"""
STEPS, SIDE, SHIFT, PROMPTS = 4, 16, 2.5, ["a boat", "snow"]


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package with the family, and a folder of settings with its model."""
    package, configs = tmp_path / "package", tmp_path / "configs"
    info = package / "chroma-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "chroma_family.py").write_text(FILE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: chroma\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distill.plugins]\nchroma = chroma_family\n")
    (configs / "model").mkdir(parents=True)
    (configs / "model/chroma.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv(CONFIG_DIRS, str(configs))
    import_plugins.cache_clear()
    yield tmp_path
    import_plugins.cache_clear()
    FAMILIES._records.pop("chroma", None)
    sys.modules.pop("chroma_family", None)


def save_chroma(folder: Path) -> str:
    torch.manual_seed(0)
    t5 = T5Config(
        vocab_size=120, d_model=14, d_kv=6, d_ff=20, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    ChromaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=T5EncoderModel(t5).eval(),
        vae=_vae(levels=2, scaling_factor=0.4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        transformer=ChromaTransformer2DModel(
            in_channels=4 * CHANNELS, num_layers=2, num_single_layers=1, attention_head_dim=12, num_attention_heads=2,
            joint_attention_dim=14, axes_dims_rope=(2, 4, 6), approximator_num_channels=16, approximator_hidden_dim=12,
            approximator_layers=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@torch.no_grad()
def drawn_by_diffusers(folder: str | Path, x: torch.Tensor, lora: Path | None = None) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    tokens = pipeline._pack_latents(x, *x.shape)
    return pipeline(PROMPTS, num_inference_steps=STEPS, guidance_scale=1.0, latents=tokens, height=SIDE, width=SIDE,
                    max_sequence_length=20, output_type="pt").images  # fmt: skip


def test_one_file_and_one_yaml_take_a_family_from_prompts_to_pictures_of_its_plain_pipeline(brought: Path) -> None:
    (brought / "prompts.txt").write_text("a red boat\ntwo owls\n")
    path, store, folder, out = save_chroma(brought / "teacher"), brought / "store", brought / "run", brought / "export"
    given = ["model=chroma", f"model.pretrained_model_name_or_path={path}", f"data.prompts={brought}/prompts.txt"]
    given += [f"data.store={store}", "data.num_samples=4", "data.solver_steps=4", "data.guidance=3", "method=lcm"]
    given += ["method.skip=250", "global_batch_size=4", "lora_rank=2", "lora_alpha=3", "max_train_steps=2"]
    given += ["learning_rate=0.05", "lr_warmup_steps=0", "mixed_precision=no", "dataloader_num_workers=0"]
    make_trajectories.main(load("train", TrainSettings, given))
    index = open_store(str(store)).index
    assert index.shapes["conditioning.text_mask"] == (20,) and index.shapes["states"] == (5, CHANNELS, 8, 8)
    assert (index.shift, index.text_dtype) == (SHIFT, "bfloat16")
    train.main(load("train", TrainSettings, [*given, f"output_dir={folder}"]))
    how = [f"run={folder}", f"output_dir={out}", "formats=[diffusers,pipeline]", "dtype=float32", "card_prompts=[owls]"]
    export.main(load("export", ExportSettings, how))
    assert json.loads((out / "distill.json").read_text())["family"] == "chroma"
    assert "- chroma\n" in (out / "README.md").read_text() and (out / "samples.png").is_file()
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())["shift"] == SHIFT

    teacher = load_teacher(path, parts=("network", "text", "vae"), max_tokens=20).at_resolution(SIDE)
    student = build(read_run(folder).student).networks(teacher, keep_teacher=False)["student"]
    _, weights = read_weights(checkpoints_of(folder), "student", "latest", True)
    assert not teacher.network.load_state_dict(dict(weights), strict=False).unexpected_keys
    x = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    times, ours = make_times("trailing", 1000, STEPS), []
    with torch.no_grad():
        for denoiser in (student, teacher.denoiser()):
            *_, (_, end) = solve(denoiser, teacher.schedule, x, times, teacher.encode(PROMPTS), "ddim")
            ours.append(teacher.decode(end) / 2 + 0.5)
    assert (drawn_by_diffusers(path, x) - ours[1]).abs().max() <= 1e-4
    for images in (drawn_by_diffusers(out, x), drawn_by_diffusers(path, x, lora=out)):
        assert (images - ours[0]).abs().max() <= 1e-4
    assert (ours[0] - ours[1]).abs().max() > 1e-3
