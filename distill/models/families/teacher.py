"""A teacher: a pretrained model as the rest of the project sees it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from distill.diffusion.noise import AnyNoise
from distill.diffusion.prediction import Prediction
from distill.diffusion.schedule import NoiseSchedule
from distill.models.denoiser import NetworkDenoiser
from distill.models.families.base import DEFAULT_PIXELS, Config, Family, Size
from distill.models.families.towers import TextTower
from distill.models.folder import stored_tensors, weights_hash
from distill.models.lora import ADAPTER

_log = logging.getLogger(__name__)

PARTS = ("network", "text", "vae")
"""What `load_teacher` can load: the network, the tokenizers with their text encoders, the autoencoder."""
_EARLIER = {"unet": "network"}
"""Names of parts in earlier versions."""
DECODED_PIXELS = 2**20
"""Pixels decoded at once, or one picture if it has more: in float32, 1024 x 1024 pixels take some 7 GB."""


def part_named(name: str) -> str:
    """A part's name, if it was said by an earlier one.

    Raises:
        ValueError: there is no such part.
    """
    found = _EARLIER.get(name, name)
    if found not in PARTS:
        raise ValueError(f"part {name!r} of a teacher is not known; allowed: {', '.join(PARTS)}")
    return found


@dataclass
class Teacher:
    """A pretrained text-to-image model: what is known of it, and those of its parts that were loaded.

    Args:
        family: how its prompts become conditioning.
        schedule: its noise schedule.
        prediction: what its network predicts.
        noise: what its scheduler stands for, which these two say in other words.
        teacher_id: its name, for people; `teacher_hash` is its identity.
        resolution: side of the pictures it was trained for, in pixels.
        latent_shape: (C, h, w) of their latents.
        zeros_for_empty: whether "no prompt" is zeros (SDXL) instead of the encoded empty string.
        second_pass: whether it is guided by a pass without a prompt, and not by w as an input, or not at all.
        weight_files: of its network; without them the hash is taken of the network in memory.
        parts: the loaded parts by their names in `PARTS`.
        lent: whether other networks compute with the weights of its own, so that these must stay as they are.
        config: of its network, which need not be loaded.
    """

    family: Family
    schedule: NoiseSchedule
    prediction: Prediction
    noise: AnyNoise
    teacher_id: str
    resolution: int
    latent_shape: tuple[int, int, int]
    zeros_for_empty: bool = False
    second_pass: bool = True
    weight_files: Sequence[Path] = ()
    parts: dict[str, Any] = field(default_factory=dict)
    lent: bool = False
    config: Config = field(default_factory=dict)
    _warned_of_cuts: bool = field(default=False, init=False, repr=False)

    @classmethod
    def of(
        cls, family: Family, network: Config, vae: Config, noise: AnyNoise, teacher_id: str, **known: Any
    ) -> Teacher:
        """A teacher without its parts, by the configs of its network and its autoencoder.

        Args:
            noise: what its scheduler stands for.
            known: further fields.

        Raises:
            ValueError: see `Family.noise`.
        """
        side = family.network.side(network) or DEFAULT_PIXELS // family.latents.factor(vae)
        noise = family.noise(noise, (side // family.network.patch(network)) ** 2)
        return cls(
            family=family,
            schedule=NoiseSchedule.of(noise),
            prediction=Prediction(noise.prediction_type),
            noise=noise,
            teacher_id=teacher_id,
            resolution=side * family.latents.factor(vae),
            latent_shape=(family.latents.channels(vae), side, side),
            config=network,
            **known,
        )

    def __post_init__(self) -> None:
        if _EARLIER.keys() & self.parts.keys():
            self.parts = {part_named(name): part for name, part in self.parts.items()}

    @property
    def network(self) -> Any:
        """The denoising network; raises ValueError if it was not loaded, as do the other parts."""
        return self._part("network")

    @property
    def unet(self) -> Any:
        """What `network` is called in earlier versions; it will go with the next one."""
        warnings.warn("Teacher.unet is called Teacher.network now", DeprecationWarning, stacklevel=2)
        return self.network

    def lend(self) -> Any:
        """The network, for another one on its weights (`on_the_weights_of`): from now on nobody trains them."""
        self.lent = True
        return self.network

    @property
    def network_config(self) -> Config:
        """The config of its network: of the one that is loaded, if one is."""
        return self.parts["network"].config if "network" in self.parts else self.config

    @property
    def takes_guidance(self) -> bool:
        """Whether w is an input of its network."""
        return self.family.guidance.taken(self.network_config)

    @property
    def image_tokens(self) -> int:
        """How many tokens its network reads a picture of its resolution as; of a UNet, the entries of a state."""
        patch = self.family.network.patch(self.network_config)
        return (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)

    @property
    def text(self) -> tuple[TextTower, ...]:
        """Each tokenizer with its text encoder."""
        return self._part("text")

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self._part("vae")

    def _part(self, name: str) -> Any:
        if name not in self.parts:
            raise ValueError(f"the teacher was loaded without its {name!r}; load_teacher(..., parts=({name!r}, ...))")
        return self.parts[name]

    @cached_property
    def teacher_hash(self) -> str:
        """16 hex digits over the network's weights as stored (reads them all: seconds for SDXL), adapters left out."""
        if self.weight_files:
            return weights_hash(stored_tensors(self.weight_files))
        state = {name.replace(".base_layer.", "."): tensor for name, tensor in self.network.state_dict().items()}
        return weights_hash((name, state[name]) for name in sorted(state) if ".lora_" not in name)

    def denoiser(self) -> NetworkDenoiser:
        """The teacher as floor 0 knows it; stays the teacher when a LoRA is added to its network."""
        return self.denoiser_of(self.network, adapter=None)

    def denoiser_of(
        self, network: nn.Module, prediction: Prediction | None = None, adapter: str | None = ADAPTER
    ) -> NetworkDenoiser:
        """A network of its family as floor 0 knows it, on its schedule; for `adapter` see `NetworkDenoiser`.

        Args:
            prediction: what the network predicts; None is what the teacher's does.
        """
        return NetworkDenoiser(network, self.schedule, prediction or self.prediction, adapter, self.family)

    def pipeline(self, scheduler: Any) -> Any:
        """A stock diffusers pipeline of all its parts, in the class that its own folder names, with this scheduler.

        Made of parts that are loaded already, it opens nothing: no safety checker, and nothing that a folder names.
        """
        parts: dict[str, Any] = {self.family.network.folder: self.network, "vae": self.vae, "scheduler": scheduler}
        for place in self.family.text.towers:
            parts |= {place.tokenizer: None, place.encoder: None}
        for place, tower in zip(self.family.text.towers, self.text, strict=False):
            parts |= {place.tokenizer: tower.tokenizer, place.encoder: tower.encoder}
        cls = getattr(diffusers, self.family.pipeline)
        return cls(**parts, **self.family.arguments(self.zeros_for_empty))

    def at_resolution(self, pixels: int | None) -> Teacher:
        """The same teacher for square pictures of so many pixels; None leaves it as it is.

        Raises:
            ValueError: pixels of which its autoencoder and network do not make whole tokens, or noise that has no
                schedule there.
        """
        if pixels is None or pixels == self.resolution:
            return self
        C, side, _ = self.latent_shape
        factor = self.resolution // side
        multiple = factor * self.family.network.patch(self.network_config)
        if pixels < 1 or pixels % multiple:
            raise ValueError(f"resolution must be a multiple of {multiple} pixels, got {pixels}")
        most = self.family.network.most(self.network_config)
        if most is not None and pixels > most * factor:
            raise ValueError(
                f"resolution must be at most {most * factor} pixels, for which the network has positions, got {pixels}"
            )
        sized = replace(self, resolution=pixels, latent_shape=(C, pixels // factor, pixels // factor))
        sized.noise = self.family.noise(self.noise, sized.image_tokens)
        sized.schedule = NoiseSchedule.of(sized.noise)
        return sized

    def at_shift(self, shift: float | None) -> Teacher:
        """The same teacher at other noise levels, for pictures of any size; None leaves it as it is.

        Raises:
            ValueError: a teacher that is not of flow matching.
        """
        if shift is None:
            return self
        noise = self.noise.at(shift=shift)
        return replace(self, noise=noise, schedule=NoiseSchedule.of(noise))

    def to(self, device: torch.device | str) -> Teacher:
        """Moves the loaded parts, in place."""
        for module in modules_of(self.parts):
            module.to(device)
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], size: Size | None = None) -> dict[str, Tensor]:
        """Prompts as the network's keyword tensors, each [B, ...], for pictures of `size` (height, width) pixels.

        Equal to what the diffusers pipeline feeds its network. Without `size` it is the teacher's own resolution.
        """
        if not prompts:
            raise ValueError("there is no prompt to encode")
        self._tell_of_cuts(prompts)
        text = self.family.text.encode(self.text, prompts)
        whole, many = size or (self.resolution, self.resolution), len(prompts)
        sizes = self.family.sizes([whole] * many, [(0, 0)] * many, whole)
        device = next(iter(text.values())).device
        return text | {key: tensor.to(device) for key, tensor in sizes.items()}

    def _tell_of_cuts(self, prompts: Sequence[str]) -> None:
        if not self._warned_of_cuts:
            longest = max(self.text, key=lambda tower: tower.length)
            if cut := longest.cuts(prompts):
                self._warned_of_cuts = True
                _log.warning("prompts are cut after %d tokens (said once); the first: %r", longest.length, cut[0])

    @torch.no_grad()
    def unconditional(self) -> dict[str, Tensor]:
        """The text's part of "no prompt", each [1, ...]: what classifier-free guidance puts in its place.

        Nothing where guidance takes no second pass: `guided` then gives the network w.
        """
        if not self.second_pass:
            return {}
        empty = self.family.text.encode(self.text, [""])
        return {key: torch.zeros_like(tensor) for key, tensor in empty.items()} if self.zeros_for_empty else empty

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pictures [B, 3, H, W], float32 in [-1, 1]; large ones one after another."""
        factor = self.resolution // self.latent_shape[1]
        at_once = max(1, DECODED_PIXELS // (factor**2 * latents.shape[2] * latents.shape[3]))
        return torch.cat([self.pictures(part) for part in latents.split(at_once)])

    def pictures(self, latents: Tensor) -> Tensor:
        """What `decode` gives, with a gradient for the latents."""
        return self.family.latents.decode(self.vae, latents).clamp(-1, 1)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to latents [B, C, h, w], float32: what `decode` takes.

        They are sampled from the autoencoder's posterior with the standard normal `noise` [B, C, h, w].
        """
        return self.family.latents.encode(self.vae, pictures, noise)

    @cached_property
    def vae_hash(self) -> str:
        """16 hex digits over the autoencoder's weights as loaded: in another precision they are others."""
        return weights_hash(sorted(self.vae.state_dict().items()))


def modules_of(parts: Mapping[str, Any]) -> list[nn.Module]:
    """The networks among the parts of a teacher."""
    text = [tower.encoder for tower in parts.get("text", ()) if tower.encoder is not None]
    return [parts[name] for name in ("network", "vae") if name in parts] + text
