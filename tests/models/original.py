"""The original code's UNets, built from its hyperparameters: the modules that other programs look a file's keys up in.

Facts of openaimodel.py (CompVis and Stability, as ComfyUI 0.3.64 and A1111 have it) and of ComfyUI's model_detection.py
(the depths), read 2026-11-28; nothing of the project is used.
"""

from __future__ import annotations

from typing import Any

# Depths of transformers: one entry for each residual block of the way down and of the way up; -1: none in the middle.
ORIGINALS: dict[str, dict[str, Any]] = {
    "sd15": {"mult": (1, 2, 4, 4), "down": (1, 1, 1, 1, 1, 1, 0, 0), "middle": 1, "context": 768, "label": None}
    | {"up": (1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0), "linear": False},
    "sdxl": {"mult": (1, 2, 4), "down": (0, 0, 2, 2, 10, 10), "middle": 10, "context": 2048, "label": 2816}
    | {"up": (0, 0, 0, 2, 2, 2, 10, 10, 10), "linear": True},
    "ssd1b": {"mult": (1, 2, 4), "down": (0, 0, 2, 2, 4, 4), "middle": -1, "context": 2048, "label": 2816}
    | {"up": (0, 0, 0, 1, 1, 2, 10, 4, 4), "linear": True},
}
BLOCKS, CHANNELS, LATENT = 2, 320, 4


def original_unet(name: str) -> dict[str, list[int]]:
    """The shapes of the weights of all convolutions and matrices of an original UNet, by the paths of its modules."""
    facts = ORIGINALS[name]
    modules: dict[str, list[int]] = {"input_blocks.0.0": [CHANNELS, LATENT, 3, 3]}
    modules |= {"time_embed.0": [4 * CHANNELS, CHANNELS], "time_embed.2": [4 * CHANNELS, 4 * CHANNELS]}
    if facts["label"]:
        modules |= {"label_emb.0.0": [4 * CHANNELS, facts["label"]], "label_emb.0.2": [4 * CHANNELS, 4 * CHANNELS]}
    down, up = list(facts["down"]), list(facts["up"])
    skips, width, block = [CHANNELS], CHANNELS, 1
    for level, mult in enumerate(facts["mult"]):
        for _ in range(BLOCKS):
            modules |= residual(f"input_blocks.{block}.0", width, mult * CHANNELS)
            width = mult * CHANNELS
            modules |= transformer(f"input_blocks.{block}.1", width, down.pop(0), facts)
            skips.append(width)
            block += 1
        if level != len(facts["mult"]) - 1:
            modules[f"input_blocks.{block}.0.op"] = [width, width, 3, 3]
            skips.append(width)
            block += 1
    modules |= residual("middle_block.0", width, width)
    if facts["middle"] > 0:
        modules |= transformer("middle_block.1", width, facts["middle"], facts)
        modules |= residual("middle_block.2", width, width)
    block = 0
    for level, mult in reversed(list(enumerate(facts["mult"]))):
        for number in range(BLOCKS + 1):
            modules |= residual(f"output_blocks.{block}.0", width + skips.pop(), mult * CHANNELS)
            width, depth = mult * CHANNELS, up.pop()
            modules |= transformer(f"output_blocks.{block}.1", width, depth, facts)
            if level and number == BLOCKS:
                modules[f"output_blocks.{block}.{2 if depth else 1}.conv"] = [width, width, 3, 3]
            block += 1
    return modules | {"out.2": [LATENT, CHANNELS, 3, 3]}


def residual(path: str, width: int, out: int) -> dict[str, list[int]]:
    modules = {
        f"{path}.in_layers.2": [out, width, 3, 3],
        f"{path}.emb_layers.1": [out, 4 * CHANNELS],
        f"{path}.out_layers.3": [out, out, 3, 3],
    }
    return modules | ({f"{path}.skip_connection": [out, width, 1, 1]} if width != out else {})


def transformer(path: str, width: int, depth: int, facts: dict[str, Any]) -> dict[str, list[int]]:
    if depth <= 0:
        return {}
    ends = [width, width] if facts["linear"] else [width, width, 1, 1]
    modules = {f"{path}.proj_in": ends, f"{path}.proj_out": ends}
    for i in range(depth):
        block = f"{path}.transformer_blocks.{i}"
        for attention, read in (("attn1", width), ("attn2", facts["context"])):
            modules |= {f"{block}.{attention}.to_q": [width, width], f"{block}.{attention}.to_out.0": [width, width]}
            modules |= {f"{block}.{attention}.to_k": [width, read], f"{block}.{attention}.to_v": [width, read]}
        modules |= {f"{block}.ff.net.0.proj": [8 * width, width], f"{block}.ff.net.2": [width, 4 * width]}
    return modules
