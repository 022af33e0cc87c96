"""Transformers in the layout of their original code: what diffusers makes of it is the network that was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from distill.config.settings import ModelSettings
from distill.diffusion.prediction import Prediction
from distill.models.derived import CACHE
from distill.models.families.loading import load_teacher
from distill.models.families.registry import FAMILIES, published
from distill.models.full_size import build_network
from distill.models.single_file import save_single_file
from distill.training.teacher import open_teacher
from tests.tiny import _text_config, save_tiny, tiny_pipeline, tiny_transformer
from tests.tiny_qwen import save, tiny_klein, tiny_z_image

CONVERT: dict[str, Callable[..., dict[str, Tensor]]] = {
    "sd3": theirs.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux": theirs.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": theirs.convert_flux2_transformer_checkpoint_to_diffusers,
    "z_image": theirs.convert_z_image_transformer_checkpoint_to_diffusers,
}
PARTS = ("network", "text", "vae")


def original(family: str, network: Any) -> dict[str, Tensor]:
    layout: Any = FAMILIES[family].network.one_file
    found = list(layout.names(network.config).tensors(network.state_dict()))
    assert len(dict(found)) == len(found), "no name stands for two weights"
    return dict(found)


NETWORKS: dict[str, Callable[[], Any]] = {
    "sd3": tiny_transformer,
    "flux2": lambda: tiny_klein().transformer,
    "z_image": lambda: tiny_z_image().transformer,
}


@pytest.mark.parametrize("family", NETWORKS)
def test_diffusers_reads_what_the_network_was(family: str) -> None:
    network = NETWORKS[family]()
    for parameter in network.parameters():  # norms too, of which halves change places
        torch.nn.init.normal_(parameter)
    own = network.state_dict()
    read = CONVERT[family](original(family, network))
    assert read.keys() == own.keys() and all(torch.equal(read[name], own[name]) for name in own)


def test_diffusers_reads_a_flux_of_the_published_width_row_by_row() -> None:
    """Its loader knows no other width; each weight here has a number of its own in each row, and no memory."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    own = {name: numbered(i, x.shape) for i, (name, x) in enumerate(network.state_dict().items())}
    layout: Any = FAMILIES["flux"].network.one_file
    read = CONVERT["flux"](dict(layout.names(network.config).tensors(own)))
    assert read.keys() == own.keys()
    for name, x in own.items():
        first = (slice(None), *[0] * (x.ndim - 1))
        assert read[name].shape == x.shape and torch.equal(read[name][first], x[first]), name


def numbered(i: int, shape: torch.Size) -> Tensor:
    rows = torch.arange(shape[0], dtype=torch.int16) * 7 + i
    return rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


@pytest.mark.parametrize("name", ["sd3", "sd35_medium", "flux_dev", "flux2_klein", "z_image"])
def test_a_published_network_has_the_names_by_which_diffusers_knows_it(name: str) -> None:
    """Without its configs: from the file alone."""
    family, known = published(name)
    network = build_network(family.network.kind, known.network, device="meta")
    found = original(family.name, network)
    if family.name == "sd3":
        found = {f"model.diffusion_model.{key}": x for key, x in found.items()}
    kinds = {"sd3": "sd3", "sd35_medium": "sd35_medium", "flux_dev": "flux-dev", "flux2_klein": "flux-2-dev"}
    assert theirs.infer_diffusers_model_type(found) == kinds.get(name, "z-image-turbo")
    read = CONVERT[family.name](found)
    assert {key: x.shape for key, x in read.items()} == {key: x.shape for key, x in network.state_dict().items()}


def save_sd3(folder: Path) -> str:
    """As published: what the first CLIP pools is not projected, and files in one do not hold it."""
    pipeline = tiny_pipeline("sd3")
    encoder = CLIPTextModelWithProjection(_text_config(width=12, heads=3, projection_dim=12))
    torch.nn.init.eye_(encoder.text_projection.weight)
    pipeline.register_modules(text_encoder=encoder, transformer=tiny_transformer(pooled_projection_dim=12 + 28))
    pipeline.save_pretrained(folder)
    return str(folder)


def test_a_file_of_sd3_is_the_student_and_all_other_parts(tmp_path: Path) -> None:
    folder = save_sd3(tmp_path / "teacher")
    student, file = tiny_transformer(seed=3, pooled_projection_dim=12 + 28), tmp_path / "a.safetensors"
    save_single_file(file, student, folder, torch.float32, Prediction.FLOW)
    loaded = StableDiffusion3Pipeline.from_single_file(str(file), config=folder)
    plain = DiffusionPipeline.from_pretrained(folder)
    parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    for name, own in {"transformer": student, **{part: getattr(plain, part) for part in parts}}.items():
        ours, wanted = getattr(loaded, name).state_dict(), own.state_dict()
        assert ours.keys() == wanted.keys() and all(torch.equal(ours[key], wanted[key]) for key in wanted), name


@pytest.mark.parametrize("family", ["sd3", "flux2", "z_image"])
def test_a_transformer_in_one_file_is_the_same_teacher_as_its_folder(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of SD3 with all that is in it; of the others the network, beside the parts of the folder that has the configs."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    made = {"flux2": tiny_klein, "z_image": tiny_z_image}
    folder = save(made[family](), tmp_path / "p") if family in made else save_sd3(tmp_path / "p")
    expected, file = load_teacher(folder, parts=PARTS), tmp_path / "file.safetensors"
    save_single_file(file, expected.network, folder, torch.float32, expected.prediction)
    assert any(key.startswith(("vae", "first_stage", "text")) for key in load_file(file)) is (family == "sd3")
    teacher = open_teacher(ModelSettings(pretrained_model_name_or_path=str(file), config=folder), PARTS)
    assert teacher.teacher_hash == expected.teacher_hash and teacher.vae_hash == expected.vae_hash
    for name, entry in expected.encode(["a cat"]).items():
        assert torch.equal(teacher.encode(["a cat"])[name], entry)


def test_a_projection_that_no_reader_would_read_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "p", "sd3")
    with pytest.raises(ValueError, match="^text_encoder has a text_projection.*: export the pipeline$"):
        save_single_file(tmp_path / "a.safetensors", tiny_transformer(), folder, torch.float32, Prediction.FLOW)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_weight_that_the_original_lacks_is_named() -> None:
    layout: Any = FAMILIES["flux"].network.one_file
    with pytest.raises(ValueError, match="^the original network has no transformer_blocks.0.attn.extra.weight$"):
        list(layout.original.tensors({"transformer_blocks.0.attn.extra.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"^double_blocks.0.img_attn.qkv.weight .* is made of 3 layers, 1 are there$"):
        list(layout.original.tensors({"transformer_blocks.0.attn.to_k.weight": torch.zeros(1)}))
