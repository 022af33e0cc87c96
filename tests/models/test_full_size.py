"""Networks of the real sizes with random weights. Steps at these sizes: tests/test_experiments.py."""

from __future__ import annotations

import pytest
import torch

from distill.models.full_size import build_unet, unet_config
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
