"""What families of transformers refuse: networks, texts, sizes and conditioning that do not fit, and students."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.models.families.loading import load_teacher
from distill.models.families.registry import FAMILIES
from tests.tiny import CHANNELS, save_tiny, tiny_conditioning, tiny_transformer
from tests.tiny_flux import save_tiny_flux, tiny_flux, tiny_flux_conditioning
from tests.tiny_qwen import save, tiny_klein, tiny_z_image

SAVE: dict[str, Callable[[Path], str]] = {
    "sd3": lambda path: save_tiny(path, "sd3"),
    "flux": save_tiny_flux,
    "flux2": lambda path: save(tiny_klein(), path),
    "z_image": lambda path: save(tiny_z_image(), path),
}
Changed = Callable[..., Path]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Changed:
    """A tiny pipeline of a family in a folder, with these changes in the config of its network."""
    sound = {name: Path(make(tmp_path_factory.mktemp(name))) for name, make in SAVE.items()}

    def copied(name: str, **change: Any) -> Path:
        folder = Path(shutil.copytree(sound[name], tmp_path_factory.mktemp("changed") / "other"))
        config = folder / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        return folder

    return copied


def refused(folder: Path, said: str, *parts: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load_teacher(folder, parts=parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SAVE)
def test_the_pipelines_as_they_are_open(name: str, changed: Changed) -> None:
    """Without which the refusals below would say nothing."""
    assert load_teacher(changed(name), parts=("network", "text")).family.name == name


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("sd3", {"out_channels": 3}, f"reads {CHANNELS} and writes 3 channels"),
        ("sd3", {"sample_size": 12}, "sample_size is 12; it must be a multiple of patch_size 2 and at most 10"),
        ("sd3", {"pos_embed_max_size": None}, "pos_embed_max_size is None; it must be one whole number"),
        ("flux", {"in_channels": 24}, "reads 24 and writes 24 numbers a token .* its autoencoder packs 20"),
        ("flux", {"out_channels": 10}, "reads 20 and writes 10 numbers a token"),
        ("flux", {"num_layers": None}, "num_layers is None; it must be one whole number"),
        ("flux2", {"guidance_embeds": True}, "takes guidance as an input"),
        ("flux2", {"in_channels": 16}, "reads 16 and writes 16 channels, the latents of its autoencoder have 12"),
        ("z_image", {"in_channels": 4}, "reads 4 channels, its autoencoder has 5"),
        ("z_image", {"siglip_feat_dim": 6}, "reads pictures beside prompts"),
    ],
)
def test_a_network_that_its_pipeline_does_not_feed(
    name: str, change: dict[str, Any], said: str, changed: Changed
) -> None:
    refused(changed(name, **change), said)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("sd3", {"joint_attention_dim": 44}, "width 44, its T5 makes 40 and its CLIP text encoders 32"),
        ("flux2", {"joint_attention_dim": 20}, "width 20, its text encoder makes"),
        ("z_image", {"cap_feat_dim": 9}, "width 9, its text encoder makes"),
    ],
)
def test_texts_of_another_width(name: str, change: dict[str, Any], said: str, changed: Changed) -> None:
    refused(changed(name, **change), f"reads text of {said}", "text")


@pytest.mark.parametrize(
    ("name", "pixels", "said"),
    [
        ("sd3", 48, "must be at most 40 pixels, for which the network has positions"),
        ("sd3", 36, "must be a multiple of 8 pixels, got 36"),
        ("flux", 18, "must be a multiple of 4 pixels, got 18"),
        ("z_image", 132, "must be at most 128 pixels"),
    ],
)
def test_pictures_that_are_no_whole_tokens_or_have_no_positions(
    name: str, pixels: int, said: str, changed: Changed
) -> None:
    teacher = load_teacher(changed(name), parts=())
    with pytest.raises(ValueError, match=f"resolution {said}"):
        teacher.at_resolution(pixels)


@pytest.mark.parametrize(
    ("name", "change"),
    [("flux", {"guidance_embeds": False}), ("flux2", {}), ("z_image", {})],
)
def test_a_model_that_was_distilled_is_taken_only_if_that_is_meant(
    name: str, change: dict[str, Any], changed: Changed
) -> None:
    """FLUX.1 schnell has no input of guidance, FLUX.2 klein says it of itself, and Z-Image-Turbo in its name."""
    folder = changed(name, **change)
    if name == "flux2":
        said = folder / "model_index.json"
        said.write_text(json.dumps(json.loads(said.read_text()) | {"is_distilled": True}))
    if name == "z_image":
        folder = folder.rename(folder.with_name("Z-Image-Turbo"))
    with pytest.raises(
        ValueError, match="student already; take the model .*or set model.allow_distilled=true"
    ) as caught:
        load_teacher(folder, parts=())
    assert "\n" not in str(caught.value)
    teacher = load_teacher(folder, parts=("text",), allow_distilled=True)
    assert teacher.family.name == name and not teacher.takes_guidance and teacher.unconditional() == {}


CALLS: dict[str, Callable[[], tuple[Any, Tensor, dict[str, Tensor]]]] = {
    "sd3": lambda: (tiny_transformer(), torch.zeros(2, CHANNELS, 6, 6), tiny_conditioning("sd3", 2)),
    "flux": lambda: (tiny_flux(), torch.zeros(2, CHANNELS, 8, 8), tiny_flux_conditioning(2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_conditioning_that_is_missing_or_not_known(name: str) -> None:
    network, x, c = CALLS[name]()
    told = torch.tensor([10.0, 999.0])

    def call(conditioning: dict[str, Tensor]) -> Tensor:
        return FAMILIES[name].predict(network, x, told, conditioning, torch.float32)

    assert call(c).shape == x.shape
    for key in c:
        with pytest.raises(ValueError, match=f"the conditioning lacks '{key}'"):
            call({other: entry for other, entry in c.items() if other != key})
    with pytest.raises(ValueError, match="conditioning 'time_ids' is not known"):
        call(c | {"time_ids": told})
