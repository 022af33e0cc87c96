"""Teachers of the Stable Diffusion 1/2 and XL families, recognised by their configs and sized by them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill.diffusion.prediction import Prediction
from distill.diffusion.schedule import NoiseSchedule
from distill.models.denoiser import NetworkDenoiser
from distill.models.folder import find_pipeline, read_json, stored_tensors, weight_files, weights_hash

_log = logging.getLogger(__name__)

PARTS = ("unet", "text", "vae")
"""What `load_teacher` can load: the network, the tokenizers with their text encoders, the autoencoder."""
Size = tuple[int, int]


@dataclass(frozen=True)
class TextTower:
    """A tokenizer and the text encoder that reads its tokens."""

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel | CLIPTextModelWithProjection

    def __call__(self, prompts: Sequence[str]) -> Any:
        """The encoder's output with all hidden states [B, tokens, width], prompts cut or padded to one length."""
        length, device = self.tokenizer.model_max_length, self.encoder.device
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        masked = getattr(self.encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        return self.encoder(tokens.input_ids.to(device), attention_mask=mask, output_hidden_states=True)

    def cuts(self, prompts: Sequence[str]) -> list[str]:
        """Those prompts that are too long to be read to their end."""
        ids = self.tokenizer(list(prompts), verbose=False).input_ids
        return [prompt for prompt, own in zip(prompts, ids, strict=True) if len(own) > self.tokenizer.model_max_length]


class Family(Protocol):
    """What differs between families: how a prompt becomes conditioning."""

    name: str
    towers: tuple[tuple[str, str], ...]
    """The sub-folders of each tokenizer and its text encoder."""

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        """The text's part of the conditioning, each [B, ...], as the family's diffusers pipeline makes it."""

    def micro_conditioning(self, count: int, height: int, width: int) -> dict[str, Tensor]:
        """The rest of the conditioning, each [count, ...], for uncropped pictures of height x width pixels."""

    def crop_conditioning(self, originals: Sequence[Size], corners: Sequence[Size], size: Size) -> dict[str, Tensor]:
        """The same, each [B, ...], for pictures cut to `size` (height, width) pixels.

        Of each: `originals`, its (height, width) before it was resized; `corners`, the cut's (top, left) afterwards.
        """


class StableDiffusion:
    """SD 1.x and 2.x: the last hidden states of one CLIP text encoder, final layer norm included."""

    name = "sd15"
    towers: tuple[tuple[str, str], ...] = (("tokenizer", "text_encoder"),)

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": towers[0](prompts).last_hidden_state}  # [B, tokens, width]

    def micro_conditioning(self, count: int, height: int, width: int) -> dict[str, Tensor]:
        return {}

    def crop_conditioning(self, originals: Sequence[Size], corners: Sequence[Size], size: Size) -> dict[str, Tensor]:
        return {}


class StableDiffusionXL:
    """SDXL and its relatives (SSD-1B): the last but one states of two encoders, and the second one's pooled output."""

    name = "sdxl"
    towers: tuple[tuple[str, str], ...] = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        outputs = [tower(prompts) for tower in towers]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # [B, tokens, width 1 + width 2]
        return {"encoder_hidden_states": states, "text_embeds": outputs[-1].text_embeds}

    def micro_conditioning(self, count: int, height: int, width: int) -> dict[str, Tensor]:
        return self.crop_conditioning([(height, width)] * count, [(0, 0)] * count, (height, width))

    def crop_conditioning(self, originals: Sequence[Size], corners: Sequence[Size], size: Size) -> dict[str, Tensor]:
        ids = [[*original, *corner, *size] for original, corner in zip(originals, corners, strict=True)]
        return {"time_ids": torch.tensor(ids, dtype=torch.float32)}  # [B, 6]


_FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
}


@dataclass
class Teacher:
    """A pretrained text-to-image model: what is known of it, and those of its parts that were asked for.

    Args:
        family: how its prompts become conditioning.
        schedule: its noise schedule.
        prediction: what its UNet predicts.
        scheduler_config: the scheduler config these two were read from.
        teacher_id: its name, for people; `teacher_hash` is its identity.
        resolution: side of the pictures it was trained for, in pixels.
        latent_shape: (C, h, w) of their latents.
        zeros_for_empty: whether "no prompt" is zeros (SDXL) instead of the encoded empty string.
        weight_files: of its UNet; without them the hash is taken of the network in memory.
        parts: the loaded parts by their names in `PARTS`.
    """

    family: Family
    schedule: NoiseSchedule
    prediction: Prediction
    scheduler_config: dict[str, Any]
    teacher_id: str
    resolution: int
    latent_shape: tuple[int, int, int]
    zeros_for_empty: bool = False
    weight_files: Sequence[Path] = ()
    parts: dict[str, Any] = field(default_factory=dict)
    _told_of_cuts: bool = field(default=False, init=False, repr=False)

    @property
    def unet(self) -> UNet2DConditionModel:
        """The network; raises ValueError if it was not loaded, as do the other parts."""
        return self._part("unet")

    @property
    def text(self) -> tuple[TextTower, ...]:
        """Each tokenizer with its text encoder."""
        return self._part("text")

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return self._part("vae")

    def _part(self, name: str) -> Any:
        if name not in self.parts:
            raise ValueError(f"the teacher was loaded without its {name!r}; load_teacher(..., parts=({name!r}, ...))")
        return self.parts[name]

    @cached_property
    def teacher_hash(self) -> str:
        """16 hex digits over the UNet's weights as stored (reads them all: seconds for SDXL), adapters left out."""
        if self.weight_files:
            return weights_hash(stored_tensors(self.weight_files))
        state = {name.replace(".base_layer.", "."): tensor for name, tensor in self.unet.state_dict().items()}
        return weights_hash((name, state[name]) for name in sorted(state) if ".lora_" not in name)

    def denoiser(self) -> NetworkDenoiser:
        """The teacher as floor 0 knows it; stays the teacher when a LoRA is added to its network."""
        return NetworkDenoiser(self.unet, self.schedule, self.prediction, adapter=None)

    def at_resolution(self, pixels: int | None) -> Teacher:
        """The same teacher for square pictures of so many pixels; None leaves it as it is.

        Raises:
            ValueError: pixels that its autoencoder and UNet cannot halve as often as they do.
        """
        if pixels is None or pixels == self.resolution:
            return self
        C, side, _ = self.latent_shape
        factor = self.resolution // side
        if pixels < 1 or pixels % factor:
            raise ValueError(f"resolution must be a multiple of {factor} pixels, got {pixels}")
        return replace(self, resolution=pixels, latent_shape=(C, pixels // factor, pixels // factor))

    def to(self, device: torch.device | str) -> Teacher:
        """Moves the loaded parts, in place."""
        for module in _modules(self.parts):
            module.to(device)
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Prompts as the network's keyword tensors, each [B, ...], for pictures of `size` (height, width) pixels.

        Equal to what the diffusers pipeline feeds its UNet. Without `size` it is the teacher's own resolution.
        """
        if not prompts:
            raise ValueError("there is no prompt to encode")
        self._tell_of_cuts(prompts)
        text = self.family.encode(self.text, prompts)
        sizes = self.family.micro_conditioning(len(prompts), *(size or (self.resolution, self.resolution)))
        device = text["encoder_hidden_states"].device
        return text | {key: tensor.to(device) for key, tensor in sizes.items()}

    def _tell_of_cuts(self, prompts: Sequence[str]) -> None:
        if not self._told_of_cuts and (cut := self.text[0].cuts(prompts)):
            self._told_of_cuts = True
            length = self.text[0].tokenizer.model_max_length
            _log.warning("prompts are cut after %d tokens (said once); the first: %r", length, cut[0])

    @torch.no_grad()
    def unconditional(self) -> dict[str, Tensor]:
        """The text's part of "no prompt", each [1, ...]: what classifier-free guidance puts in its place."""
        empty = self.family.encode(self.text, [""])
        return {key: torch.zeros_like(tensor) for key, tensor in empty.items()} if self.zeros_for_empty else empty

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pictures [B, 3, H, W], float32 in [-1, 1]."""
        return self.pictures(latents)

    def pictures(self, latents: Tensor) -> Tensor:
        """What `decode` gives, with a gradient for the latents."""
        weight = next(self.vae.parameters())
        z = latents.to(weight.device, torch.float32) / self.vae.config["scaling_factor"]
        mean, std = self._latent_statistics(z)
        return self.vae.decode((z * std + mean).to(weight.dtype), return_dict=False)[0].float().clamp(-1, 1)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to latents [B, C, h, w], float32: what `decode` takes.

        They are drawn from the autoencoder's posterior with the standard normal `noise` [B, C, h, w].
        """
        weight = next(self.vae.parameters())
        posterior = self.vae.encode(pictures.to(weight), return_dict=False)[0]
        z = posterior.mean.float() + posterior.std.float() * noise.to(weight.device, torch.float32)
        mean, std = self._latent_statistics(z)
        return (z - mean) / std * self.vae.config["scaling_factor"]

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) by which the autoencoder's latents are normalised, before they are scaled."""
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            mean, std = [config.get("shift_factor") or 0.0], [1.0]
        return torch.tensor(mean).to(like).view(1, -1, 1, 1), torch.tensor(std).to(like).view(1, -1, 1, 1)

    @cached_property
    def vae_hash(self) -> str:
        """16 hex digits over the autoencoder's weights as loaded: in another precision they are others."""
        return weights_hash(sorted(self.vae.state_dict().items()))


def load_teacher(
    pretrained_model_name_or_path: str | Path,
    *,
    parts: Sequence[str] = ("unet",),
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | Path | None = None,
    vae_dtype: torch.dtype | None = None,
) -> Teacher:
    """Loads a teacher from a diffusers pipeline folder or from the hub: the named parts, frozen, and its configs.

    Only safetensors weights are read, never pickles. `revision` and `variant` (`"fp16"`) mean what they mean in
    diffusers. A float16 autoencoder that overflows (`force_upcast` in its config) is loaded as float32.

    `vae` is the folder or hub id of an autoencoder to take the place of the teacher's, of the same latents; in
    `vae_dtype`, or else in `dtype`.

    Raises:
        FileNotFoundError: if there is no such pipeline or autoencoder, or a file of it is missing.
        ValueError: if it is of another family, or made for something else than text to image; or `vae` has other
            latents.
    """
    path = str(pretrained_model_name_or_path)
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part {part!r} of a teacher is not known; allowed: {', '.join(PARTS)}")
    components = ["unet"] + [name for part in parts for name in _components(part)]
    folder = find_pipeline(path, components, revision, variant)
    index, unet, own_vae, scheduler = (
        read_json(folder, name)
        for name in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    )
    family = _recognise(path, index, unet, own_vae)
    side = unet["sample_size"]
    teacher = Teacher(
        family=family,
        schedule=NoiseSchedule.from_config(scheduler),
        prediction=_prediction(path, scheduler),
        scheduler_config=scheduler,
        teacher_id=_identity(path, folder, revision),
        resolution=side * 2 ** (len(own_vae["block_out_channels"]) - 1),
        latent_shape=(unet["in_channels"], side, side),
        zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", family.name == "sdxl")),
        weight_files=weight_files(folder, "unet", variant),
    )
    for part in parts:
        if part == "vae" and vae is not None:
            teacher.parts[part] = _load_vae(str(vae), own_vae, vae_dtype or dtype)
        else:
            teacher.parts[part] = _load_part(part, folder, family, dtype, variant)
    for module in _modules(teacher.parts):
        module.requires_grad_(False).eval()
    return teacher


def _components(part: str) -> list[str]:
    """The sub-folders that a part may live in."""
    return [name for tower in StableDiffusionXL.towers for name in tower] if part == "text" else [part]


def _recognise(path: str, index: Mapping[str, Any], unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Family:
    kind = index.get("_class_name")
    if kind not in _FAMILIES:
        raise ValueError(f"{path} is a {kind}; known teachers: {', '.join(_FAMILIES)} (text to image, base model)")
    family = _FAMILIES[kind]
    for name, wanted in _classes(family).items():
        found = (index.get(name) or [None, None])[1]
        if found is None or found.removesuffix("Fast") != wanted:
            raise ValueError(f"{path} cannot be a teacher: its {name} is {found}, it must be a {wanted}")
    reads, writes, latent = unet.get("in_channels"), unet.get("out_channels"), vae.get("latent_channels")
    if not reads == writes == latent:
        raise ValueError(
            f"the UNet of {path} reads {reads} and writes {writes} channels, its autoencoder has {latent}: "
            "inpainting, editing and variance-predicting networks cannot be teachers"
        )
    added = unet.get("addition_embed_type")
    if added != {"sd15": None, "sdxl": "text_time"}[family.name]:
        raise ValueError(f"{path} is a {kind}, yet its UNet has addition_embed_type {added!r}")
    if not isinstance(unet.get("sample_size"), int):
        raise ValueError(f"the UNet of {path} has sample_size {unet.get('sample_size')!r}; it must be one number")
    return family


def _classes(family: Family) -> dict[str, str]:
    """The class that model_index.json must give for each component; an SDXL refiner lacks some."""
    classes = {"unet": UNet2DConditionModel.__name__, "vae": AutoencoderKL.__name__}
    for tokenizer, encoder in family.towers:
        classes |= {tokenizer: CLIPTokenizer.__name__, encoder: _encoder_class(encoder).__name__}
    return classes


def _encoder_class(component: str) -> type[CLIPTextModel] | type[CLIPTextModelWithProjection]:
    return CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel


def _prediction(path: str, scheduler: Mapping[str, Any]) -> Prediction:
    name = scheduler.get("prediction_type", Prediction.EPSILON.value)
    known = [prediction.value for prediction in Prediction]
    if name not in known:
        raise ValueError(f"the scheduler of {path} has prediction_type {name!r}; allowed: {', '.join(known)}")
    return Prediction(name)


def _identity(path: str, folder: Path, revision: str | None) -> str:
    if Path(path).expanduser().exists():
        return folder.resolve().name
    return f"{path}@{revision}" if revision else path


def _load_part(part: str, folder: Path, family: Family, dtype: torch.dtype, variant: str | None) -> Any:
    if part == "text":
        return tuple(_load_tower(folder, tokenizer, encoder, dtype, variant) for tokenizer, encoder in family.towers)
    weight_files(folder, part, variant)  # its message is clearer than diffusers'
    if part == "unet":
        return UNet2DConditionModel.from_pretrained(
            folder / "unet", torch_dtype=dtype, variant=variant, use_safetensors=True
        )
    if dtype == torch.float16 and read_json(folder, "vae/config.json").get("force_upcast", True):
        dtype = torch.float32
    return AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype, variant=variant, use_safetensors=True)


def _load_vae(path: str, own: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKL:
    """Another autoencoder for the teacher whose own has the config `own`."""
    try:
        given = AutoencoderKL.load_config(path)
        _same_latents(path, given, own)
        return AutoencoderKL.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
    except (OSError, HFValidationError) as error:  # what diffusers and the hub client raise
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no autoencoder with safetensors weights at {path!r}: {reason}") from error


def _same_latents(path: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if given.get("_class_name") != AutoencoderKL.__name__:
        raise ValueError(f"{path} is a {given.get('_class_name')}, not an {AutoencoderKL.__name__}")
    defaults = signature(AutoencoderKL).parameters
    for name in ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        theirs, ours = (config.get(name, defaults[name].default) for config in (given, own))
        if theirs != ours:
            raise ValueError(f"the autoencoder {path} has {name} {theirs}, the teacher's own has {ours}")
    if len(given["block_out_channels"]) != len(own["block_out_channels"]):
        raise ValueError(f"the autoencoder {path} halves its pictures more or less often than the teacher's own")


def _load_tower(folder: Path, tokenizer: str, encoder: str, dtype: torch.dtype, variant: str | None) -> TextTower:
    weight_files(folder, encoder, variant)
    model = _encoder_class(encoder).from_pretrained(
        folder / encoder, dtype=dtype, variant=variant, use_safetensors=True
    )
    return TextTower(CLIPTokenizer.from_pretrained(folder / tokenizer), model)


def _modules(parts: Mapping[str, Any]) -> list[nn.Module]:
    text = [tower.encoder for tower in parts.get("text", ())]
    return [parts[name] for name in ("unet", "vae") if name in parts] + text
