"""Networks of the real sizes with random weights. Steps at these sizes: tests/test_experiments.py."""

from __future__ import annotations

import pytest
import torch

from distill.models.families.registry import published
from distill.models.full_size import build_network, build_unet, unet_config
from distill.models.lora import adapters, add_lora, lora_layers
from tests.tiny import SDXL_UNET, tiny_conditioning


def test_a_cheap_fill_is_reproducible_and_keeps_activations_in_range():
    first, again, other = (build_unet(SDXL_UNET, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)
    c = tiny_conditioning("sdxl", 2)
    added = {"text_embeds": c["text_embeds"], "time_ids": c["time_ids"]}
    with torch.no_grad():
        out = first(torch.randn(2, 5, 8, 8), 500, c["encoder_hidden_states"], added_cond_kwargs=added).sample
    assert 0.1 < out.std() < 10


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="published model 'sd16' is not known; allowed: .*sd15, .*sdxl, ssd1b"):
        unet_config("sd16")


WEIGHTS = {
    "sd3": (2_028_328_000, 56_623_104),
    "sd35_medium": (2_243_171_520, 226_492_416),
    "sd35_large": (8_056_627_520, 89_653_248),
    "flux_dev": (11_901_408_320, 0),
    "flux_schnell": (11_891_178_560, 0),
    "flux2_klein": (3_875_544_576, 0),
    "flux2_klein_9b": (9_078_581_248, 0),
    "z_image": (6_154_908_736, 0),
}
"""Parameters of the published transformers, and numbers in their tables of positions."""
LORAS = {
    "sd3": ((285, 83_755_008), (191, 37_552_128)),
    "sd35_medium": ((337, 93_978_624), (243, 47_775_744)),
    "sd35_large": ((453, 211_058_688), (303, 94_322_688)),
    "flux_dev": ((418, 261_488_640), (190, 74_711_040)),
    "flux_schnell": ((418, 261_488_640), (190, 74_711_040)),
    "flux2_klein": ((100, 96_337_920), (20, 7_864_320)),
    "flux2_klein_9b": ((144, 174_063_616), (32, 16_777_216)),
    "z_image": ((238, 158_760_960), (136, 66_846_720)),
}
"""Adapted modules and trained numbers of a LoRA of rank 64: on all of the blocks, and on their attention."""


SOME = ("sd35_medium", "flux_dev", "flux2_klein", "z_image")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in WEIGHTS]
)
def test_a_published_transformer_and_its_loras_have_their_sizes_to_the_unit(name: str) -> None:
    """On the meta device. diffusers' own defaults have FLUX.2's and Z-Image's sizes."""
    family, known = published(name)
    for targets, expected in zip(("blocks", "attention"), LORAS[name], strict=True):
        network = build_network(family.network.kind, known.network, device="meta")
        parameters, buffers = list(network.parameters()), list(network.buffers())
        assert (sum(p.numel() for p in parameters), sum(b.numel() for b in buffers)) == WEIGHTS[name]
        chosen = family.lora.chosen(network, targets)
        with torch.device("meta"):
            add_lora(network, 64, 64.0, targets=chosen, family=family)
        assert (len(lora_layers(network)), sum(p.numel() for p in adapters(network).values())) == expected
    assert next(iter(family.lora.targets)) == "blocks"
