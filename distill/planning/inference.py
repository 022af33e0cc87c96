"""What a plan says of networks that are not trained: the teacher's solves, an evaluation's pictures, and loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from distill.config.settings import ClusterSettings, DataSettings, ModelSettings
from distill.diffusion.samplers import SAMPLERS
from distill.models.families.base import Family
from distill.models.folder import read_json
from distill.planning.counting import Architecture, architecture, batch_of, forward

WALKED = 2


@dataclass(frozen=True)
class Inference:
    """What a teacher takes when it is only called: bytes in the dtype it computes in, per network or per sample.

    Args:
        weights: how many its network has.
        flops: of an evaluation of the network.
        activations: bytes of an evaluation.
        encoders: weights of its text encoders, two in bfloat16 for one.
        vae_weights: of its autoencoder.
        decoding: FLOPs of a picture's decoding.
        decoded: bytes of activations of that, in float32.
        encoded: bytes of activations of a picture's encoding, in float32.
        width: bytes of a number.
        second_pass: whether guidance takes an evaluation of its own.
    """

    weights: float
    flops: float
    activations: float
    encoders: float
    vae_weights: float
    decoding: float
    decoded: float
    encoded: float
    width: int
    second_pass: bool = True

    def solve_flops(self, data: DataSettings) -> float:
        """FLOPs of one of a store's solves."""
        return SAMPLERS[data.solver].evaluations(data.solver_steps) * self.passes(data) * self.flops

    def passes(self, data: DataSettings) -> int:
        """Passes of the network for an evaluation of the teacher: two where guidance takes one of its own."""
        return 2 if self.second_pass and data.guidance != 1 else 1

    def solve_bytes(self, data: DataSettings) -> float:
        """Bytes of a process that makes a store: the text encoders stay, in float32 at most."""
        held = self.width * self.weights + 4 * self.encoders
        return held + data.batch_size * self.passes(data) * self.activations

    def encoding_bytes(self, data: DataSettings) -> float:
        """Bytes of a process that makes a store of pictures, in float32."""
        return 4 * (self.encoders + self.vae_weights) + data.batch_size * self.encoded

    def picture_flops(self, steps: int, guided: bool) -> float:
        """FLOPs of a picture of `steps` evaluations, each of them two if it is guided."""
        return steps * (2 if guided and self.second_pass else 1) * self.flops + self.decoding

    def sampling_bytes(self, samples: int, guided: bool = True) -> float:
        """Bytes of a process that generates so many pictures at once and decodes them one by one, in float32."""
        held = self.width * self.weights + 4 * (self.encoders + self.vae_weights)
        return held + max(samples * (2 if guided and self.second_pass else 1) * self.activations, self.decoded)


def inference(model: ModelSettings, half: bool, sizes: Sequence[str] | str | None = None) -> Inference:
    """Walks through an evaluation of a teacher and through the decoding of a picture, without weights.

    Args:
        sizes: `data.sizes`, of which the largest is counted.

    Raises:
        ConfigError: see `counting.architecture`.
    """
    built = architecture(model, sizes)
    network, family = built.teacher.network, built.teacher.family
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if half else torch.float32)
    batch = batch_of(built, 1, WALKED)
    x, dtype = batch.states[:, 0], next(network.parameters()).dtype
    conditioning = {name: entry.to(dtype) for name, entry in batch.conditioning.items()}
    if family.guidance.taken(network.config):
        conditioning["guidance"] = batch.guidance
    flops, most = forward(_Called(network, family), WALKED, x.to(dtype), batch.times[:, 0], conditioning, dtype)
    vae = _autoencoder(built, model)
    with torch.device("meta"):
        sides = [family.latents.factor(vae.config) * side for side in built.teacher.latent_shape[1:]]  # in pixels
        halved = 2 ** (len(vae.config.block_out_channels) - 1)
        latents = torch.empty(1, vae.config.latent_channels, *(side // halved for side in sides))
        picture = torch.empty(1, 3, *sides)
    decoding, decoded = forward(_Method(vae, "decode"), 1, latents)
    _, encoded = forward(_Method(vae, "encode"), 1, picture)
    return Inference(
        weights=sum(p.numel() for p in network.parameters()),
        flops=flops,
        activations=most,
        encoders=_encoders(built, model) / (2 if model.text_dtype == "bfloat16" else 1),
        vae_weights=sum(p.numel() for p in vae.parameters()),
        decoding=decoding,
        decoded=decoded,
        encoded=encoded,
        width=2 if half else 4,
        second_pass=built.teacher.second_pass,
    )


class _Called(torch.nn.Module):
    """A network whose call is its family's."""

    def __init__(self, network: torch.nn.Module, family: Family) -> None:
        super().__init__()
        self.network, self.family = network, family

    def forward(self, *args: Any) -> torch.Tensor:
        return self.family.predict(self.network, *args)


class _Method(torch.nn.Module):
    """A network whose call is one of its methods."""

    def __init__(self, module: Any, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x: torch.Tensor) -> Any:
        return getattr(self.module, self.name)(x)


def _autoencoder(built: Architecture, model: ModelSettings) -> Any:
    folder = Path(model.config or model.pretrained_model_name_or_path)
    config = read_json(folder, "vae/config.json") if built.published is None else dict(built.published.vae)
    with torch.device("meta"):
        return getattr(diffusers, built.teacher.family.latents.kind).from_config(config)


def _encoders(built: Architecture, model: ModelSettings) -> float:
    """Weights of the text encoders; of a folder by the size of its files, as if they were in float32."""
    if built.published is not None:
        return built.published.encoders
    folder = Path(model.config or model.pretrained_model_name_or_path)
    towers = built.teacher.family.text.towers
    files = (path for tower in towers for path in (folder / tower.encoder).glob("*.safetensors"))
    return sum(path.stat().st_size for path in files) / 4


def hours(flops: float, cluster: ClusterSettings, half: bool) -> float:
    """Hours of a GPU for so many FLOPs, at the share of its peak that a training step is assumed to reach."""
    return flops / (1e12 * cluster.mfu * (cluster.tflops if half else cluster.tflops_float32)) / 3600
