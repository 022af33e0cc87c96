"""Teachers of the Stable Diffusion 1/2 and XL families, recognised by their configs and sized by them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distill.diffusion.noise import AnyNoise, Noise, read_noise, short
from distill.diffusion.prediction import Prediction
from distill.diffusion.schedule import NoiseSchedule
from distill.models.checks import (
    check_folder,
    check_sizes,
    component,
    first_line,
    levels,
    load_checked,
    naming,
    positive,
)
from distill.models.denoiser import NetworkDenoiser
from distill.models.folder import find_pipeline, read_json, stored_tensors, variant_of, weight_files, weights_hash

_log = logging.getLogger(__name__)

PARTS = ("unet", "text", "vae")
"""What `load_teacher` can load: the network, the tokenizers with their text encoders, the autoencoder."""
DECODED_PIXELS = 2**20
"""Pixels decoded at once, or one picture if it has more: in float32, 1024 x 1024 pixels take some 7 GB."""
Size = tuple[int, int]


@dataclass(frozen=True)
class TextTower:
    """A tokenizer, whose `model_max_length` the encoder has positions for, and the encoder that reads its tokens."""

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


SD2_WIDTH = 1024
"""Width of the text states that SD 2.x reads; SD 1.x reads 768."""


class Family(Protocol):
    """What differs between families: how a prompt becomes conditioning, and what diffusers calls their pipeline."""

    name: str
    title: str
    pipeline: str
    """Its class in diffusers."""
    towers: tuple[tuple[str, str], ...]
    """The sub-folders of each tokenizer and its text encoder."""
    added_embedding: str | None
    """The `addition_embed_type` of its networks."""
    tag: str
    """What the hub calls it."""

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        """The text's part of the conditioning, each [B, ...], as the family's diffusers pipeline makes it."""

    def micro_conditioning(self, count: int, height: int, width: int) -> dict[str, Tensor]:
        """The rest of the conditioning, each [count, ...], for uncropped pictures of height x width pixels."""

    def crop_conditioning(self, originals: Sequence[Size], corners: Sequence[Size], size: Size) -> dict[str, Tensor]:
        """The same, each [B, ...], for pictures cut to `size` (height, width) pixels.

        Of each: `originals`, its (height, width) before it was resized; `corners`, the cut's (top, left) afterwards.
        """

    def arguments(self, zeros_for_empty: bool) -> dict[str, Any]:
        """What its pipeline's constructor takes beside the parts."""

    def architecture(self, text_width: int, velocity: bool) -> tuple[str, str]:
        """The base model of a LoRA as kohya-ss and as Stability's ModelSpec call it.

        Args:
            text_width: of the text states that the network reads.
            velocity: whether it predicts velocities.
        """


class StableDiffusion:
    """SD 1.x and 2.x: the last hidden states of one CLIP text encoder, final layer norm included."""

    name = "sd15"
    title = "Stable Diffusion 1 or 2"
    pipeline = "StableDiffusionPipeline"
    towers: tuple[tuple[str, str], ...] = (("tokenizer", "text_encoder"),)
    added_embedding: str | None = None
    tag = "stable-diffusion"

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": towers[0](prompts).last_hidden_state}  # [B, tokens, width]

    def micro_conditioning(self, count: int, height: int, width: int) -> dict[str, Tensor]:
        return {}

    def crop_conditioning(self, originals: Sequence[Size], corners: Sequence[Size], size: Size) -> dict[str, Tensor]:
        return {}

    def arguments(self, zeros_for_empty: bool) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def architecture(self, text_width: int, velocity: bool) -> tuple[str, str]:
        if text_width != SD2_WIDTH:
            return ("sd_v1_v" if velocity else "sd_v1"), "stable-diffusion-v1"
        return ("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512")


class StableDiffusionXL:
    """SDXL and its relatives (SSD-1B): the last but one states of two encoders, and the second one's pooled output."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
    towers: tuple[tuple[str, str], ...] = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    added_embedding: str | None = "text_time"
    tag = "stable-diffusion-xl"

    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        outputs = [tower(prompts) for tower in towers]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # [B, tokens, width 1 + width 2]
        return {"encoder_hidden_states": states, "text_embeds": outputs[-1].text_embeds}

    def micro_conditioning(self, count: int, height: int, width: int) -> dict[str, Tensor]:
        return self.crop_conditioning([(height, width)] * count, [(0, 0)] * count, (height, width))

    def crop_conditioning(self, originals: Sequence[Size], corners: Sequence[Size], size: Size) -> dict[str, Tensor]:
        ids = [[*original, *corner, *size] for original, corner in zip(originals, corners, strict=True)]
        return {"time_ids": torch.tensor(ids, dtype=torch.float32)}  # [B, 6]

    def arguments(self, zeros_for_empty: bool) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": zeros_for_empty}

    def architecture(self, text_width: int, velocity: bool) -> tuple[str, str]:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"


FAMILIES: dict[str, Family] = {family.name: family for family in (StableDiffusion(), StableDiffusionXL())}
"""The families by their names in settings and exports."""


def family_of(unet: Mapping[str, Any]) -> Family:
    """The family of a UNet's config, by the embedding that is added to its times."""
    return next(f for f in FAMILIES.values() if f.added_embedding == unet.get("addition_embed_type"))


@dataclass
class Teacher:
    """A pretrained text-to-image model: what is known of it, and those of its parts that were loaded.

    Args:
        family: how its prompts become conditioning.
        schedule: its noise schedule.
        prediction: what its UNet predicts.
        noise: what its scheduler stands for, which these two say in other words.
        teacher_id: its name, for people; `teacher_hash` is its identity.
        resolution: side of the pictures it was trained for, in pixels.
        latent_shape: (C, h, w) of their latents.
        zeros_for_empty: whether "no prompt" is zeros (SDXL) instead of the encoded empty string.
        weight_files: of its UNet; without them the hash is taken of the network in memory.
        parts: the loaded parts by their names in `PARTS`.
        lent: whether other networks compute with the weights of its UNet, so that these must stay as they are.
    """

    family: Family
    schedule: NoiseSchedule
    prediction: Prediction
    noise: AnyNoise
    teacher_id: str
    resolution: int
    latent_shape: tuple[int, int, int]
    zeros_for_empty: bool = False
    weight_files: Sequence[Path] = ()
    parts: dict[str, Any] = field(default_factory=dict)
    lent: bool = False
    _warned_of_cuts: bool = field(default=False, init=False, repr=False)

    @property
    def unet(self) -> UNet2DConditionModel:
        """The network; raises ValueError if it was not loaded, as do the other parts."""
        return self._part("unet")

    def lend(self) -> UNet2DConditionModel:
        """The network, for another one on its weights (`on_the_weights_of`): from now on nobody trains them."""
        self.lent = True
        return self.unet

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

    def pipeline(self, scheduler: Any) -> Any:
        """A stock diffusers pipeline of all its parts, in the class that its own folder names, with this scheduler.

        Made of parts that are loaded already, it opens nothing: no safety checker, and nothing that a folder names.
        """
        parts: dict[str, Any] = {"unet": self.unet, "vae": self.vae, "scheduler": scheduler}
        for (tokenizer, encoder), tower in zip(self.family.towers, self.text, strict=True):
            parts |= {tokenizer: tower.tokenizer, encoder: tower.encoder}
        cls = getattr(diffusers, self.family.pipeline)
        return cls(**parts, **self.family.arguments(self.zeros_for_empty))

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
        if not self._warned_of_cuts and (cut := self.text[0].cuts(prompts)):
            self._warned_of_cuts = True
            length = self.text[0].tokenizer.model_max_length
            _log.warning("prompts are cut after %d tokens (said once); the first: %r", length, cut[0])

    @torch.no_grad()
    def unconditional(self) -> dict[str, Tensor]:
        """The text's part of "no prompt", each [1, ...]: what classifier-free guidance puts in its place."""
        empty = self.family.encode(self.text, [""])
        return {key: torch.zeros_like(tensor) for key, tensor in empty.items()} if self.zeros_for_empty else empty

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pictures [B, 3, H, W], float32 in [-1, 1]; large ones one after another."""
        factor = self.resolution // self.latent_shape[1]
        at_once = max(1, DECODED_PIXELS // (factor**2 * latents.shape[2] * latents.shape[3]))
        return torch.cat([self.pictures(part) for part in latents.split(at_once)])

    def pictures(self, latents: Tensor) -> Tensor:
        """What `decode` gives, with a gradient for the latents."""
        weight = next(self.vae.parameters())
        z = latents.to(weight.device, torch.float32) / self.vae.config["scaling_factor"]
        mean, std = self._latent_statistics(z)
        return self.vae.decode((z * std + mean).to(weight.dtype), return_dict=False)[0].float().clamp(-1, 1)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to latents [B, C, h, w], float32: what `decode` takes.

        They are sampled from the autoencoder's posterior with the standard normal `noise` [B, C, h, w].
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


@dataclass(frozen=True)
class PipelineFacts:
    """What the configs of a pipeline folder say, checked.

    Args:
        path: as it was given, for messages.
        folder: on disk.
        index, unet, vae, scheduler: its `model_index.json` and the configs of these components.
        scheduler_class: as the index names it.
    """

    path: str
    folder: Path
    family: Family
    noise: AnyNoise
    index: Mapping[str, Any]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    scheduler_class: str

    @property
    def zeros_for_empty(self) -> bool:
        """Whether "no prompt" is zeros: what the index says, else what the family's pipeline does by itself."""
        usual = self.family.arguments(True).get("force_zeros_for_empty_prompt", False)
        return bool(self.index.get("force_zeros_for_empty_prompt", usual))

    def own_scheduler(self) -> Any:
        """The pipeline's scheduler as it comes, of a class of diffusers whose noise is understood."""
        with naming(self.folder / "scheduler"):
            return getattr(diffusers, self.scheduler_class).from_config(dict(self.scheduler))


def check_pipeline(path: str, folder: Path) -> PipelineFacts:
    """Reads and checks a pipeline folder's configs: nothing in it is run, and no weights are opened.

    Every pipeline that is opened here is opened by it, and made of parts of the classes that it allows.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, code, another family, a network that is not
            text to image, noise that is not understood, or sizes that no machine has. One line, which names the file.
    """
    index = check_folder(folder)
    unet, vae, scheduler = (
        read_json(folder, name) for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    )
    for name, config in (("unet", unet), ("vae", vae)):
        check_sizes(folder / name / "config.json", config)
    family = _recognise(path, folder, index, unet, vae)
    kind = component(folder, index, "scheduler")[1]
    try:
        noise = read_noise(kind, scheduler)
        read_noise(scheduler.get("_class_name", kind), scheduler)
    except ValueError as error:
        raise ValueError(f"{path} cannot be a teacher: {error}") from None
    if isinstance(noise, Noise) and noise.rescale_betas_zero_snr and noise.prediction_type == Prediction.EPSILON.value:
        raise ValueError(
            f"{path} cannot be a teacher: its scheduler has rescale_betas_zero_snr with prediction_type epsilon, which "
            "says nothing about a picture at the noisiest time"
        )
    return PipelineFacts(path, folder, family, noise, index, unet, vae, scheduler, str(kind))


def load_teacher(
    pretrained_model_name_or_path: str | Path,
    *,
    parts: Sequence[str] = ("unet",),
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | Path | None = None,
    vae_dtype: torch.dtype | None = None,
    family: str | None = None,
) -> Teacher:
    """Loads a teacher from a diffusers pipeline folder or from the hub: the named parts, frozen, and its configs.

    Only safetensors weights are read, never pickles. `revision` and `variant` (`"fp16"`) mean what they mean in
    diffusers. `dtype` is the UNet's. Text encoders and the teacher's own autoencoder are float32: they are called once
    a picture, and what they round is in all that follows.

    `family` is the only one wanted, by its name; None takes any.

    `vae` is the folder or hub id of an autoencoder to take the place of the teacher's, of the same latents; in
    `vae_dtype`, but in float32 where its config says that it overflows in float16 (`force_upcast`).

    Raises:
        FileNotFoundError: if there is no such pipeline or autoencoder, or a file of it is missing.
        ValueError: see `check_pipeline`; or weights that are damaged or of another network, a UNet that takes guidance
            as an input, another family, or a `vae` of other latents.
    """
    path = str(pretrained_model_name_or_path)
    teacher, described = _open(path, parts, revision, variant)
    require_family(path, described.family, family)
    if described.unet.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{path} cannot be a teacher: its UNet takes guidance as an input (time_cond_proj_dim), so it is a student "
            "already; take the model that it was distilled from"
        )
    for part in parts:
        if part == "vae" and vae is not None:
            teacher.parts[part] = _load_vae(str(vae), described.vae, vae_dtype or torch.float32)
        else:
            teacher.parts[part] = _load_part(part, described, dtype if part == "unet" else torch.float32, variant)
    for module in _modules(teacher.parts):
        module.requires_grad_(False).eval()
    return teacher


def require_family(path: str, found: Family, wanted: str | None) -> None:
    """Raises ValueError for a teacher of another family than settings were chosen for."""
    if wanted not in (None, found.name):
        title = FAMILIES[wanted].title
        raise ValueError(
            f"{path} is a {found.title}, the settings are for a {title} (model.family={wanted}): choose an experiment "
            f"for {found.name}, or set model.family=null"
        )


def open_pipeline(
    path: str, revision: str | None = None, variant: str | None = None, unet: UNet2DConditionModel | None = None
) -> tuple[Any, PipelineFacts]:
    """A stock diffusers pipeline in float32, a teacher's or an exported student's, and what its folder says.

    What `DiffusionPipeline.from_pretrained` gives, without a safety checker; but the folder has no say in what is run.

    Args:
        unet: in the place of its own, which then is not loaded.

    Raises:
        FileNotFoundError, ValueError: as `load_teacher`.
    """
    parts = [part for part in PARTS if part != "unet" or unet is None]
    teacher, described = _open(path, parts, revision, variant)
    for part in parts:
        teacher.parts[part] = _load_part(part, described, torch.float32, variant)
    if unet is not None:
        teacher.parts["unet"] = unet
    return teacher.pipeline(described.own_scheduler()), described


def _open(path: str, parts: Sequence[str], revision: str | None, variant: str | None) -> tuple[Teacher, PipelineFacts]:
    """A teacher without its parts."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part {part!r} of a teacher is not known; allowed: {', '.join(PARTS)}")
    components = ["unet"] + [name for part in parts for name in _components(part)]
    described = check_pipeline(path, find_pipeline(path, components, revision, variant))
    folder, side = described.folder, described.unet["sample_size"]
    teacher = Teacher(
        family=described.family,
        schedule=NoiseSchedule.of(described.noise),
        prediction=Prediction(described.noise.prediction_type),
        noise=described.noise,
        teacher_id=_identity(path, folder, revision),
        resolution=side * 2 ** (levels(folder / "vae/config.json", described.vae) - 1),
        latent_shape=(described.unet["in_channels"], side, side),
        zeros_for_empty=described.zeros_for_empty,
        weight_files=weight_files(folder, "unet", variant),
    )
    return teacher, described


def _components(part: str) -> list[str]:
    """The sub-folders that a part may live in."""
    return [name for tower in StableDiffusionXL.towers for name in tower] if part == "text" else [part]


def _recognise(
    path: str, folder: Path, index: Mapping[str, Any], unet: Mapping[str, Any], vae: Mapping[str, Any]
) -> Family:
    families = {family.pipeline: family for family in FAMILIES.values()}
    kind = index["_class_name"]
    if kind not in families:
        raise ValueError(
            f"{path} is a {short(kind)[1:-1]}; known teachers: {', '.join(families)} (text to image, base model)"
        )
    family = families[kind]
    for name, wanted in _classes(family).items():
        found = component(folder, index, name)[1]
        if found is None or found.removesuffix("Fast") != wanted:
            raise ValueError(f"{path} cannot be a teacher: its {name} is {found}, it must be a {wanted}")
    _check_unet(path, folder / "unet/config.json", kind, family, unet)
    levels(folder / "vae/config.json", vae)
    positive(folder / "vae/config.json", vae, "latent_channels")
    reads, writes, latent = unet["in_channels"], unet["out_channels"], vae["latent_channels"]
    if not reads == writes == latent:
        raise ValueError(
            f"the UNet of {path} reads {reads} and writes {writes} channels, its autoencoder has {latent}: "
            "inpainting, editing and variance-predicting networks cannot be teachers"
        )
    return family


MOST_TOKENS = 10**6
"""Stands for a tokenizer that does not say how many tokens it takes."""
MOST_SIDE = 8192
"""The largest side of latents: a picture has 65,536 pixels per side."""


def _check_unet(path: str, file: Path, kind: str, family: Family, unet: Mapping[str, Any]) -> None:
    """Raises ValueError for a UNet that wants to be given more than its family's pipeline gives it."""
    levels(file, unet)
    positive(file, unet, "in_channels")
    positive(file, unet, "out_channels")
    added = unet.get("addition_embed_type")
    if added != family.added_embedding:
        raise ValueError(f"{path} is a {kind}, yet its UNet has addition_embed_type {short(added)}")
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim"):
        if unet.get(key) is not None:
            raise ValueError(f"{path} cannot be a teacher: its UNet has {key} {short(unet[key])}, an input of its own")
    positive(file, unet, "sample_size", MOST_SIDE)


def _classes(family: Family) -> dict[str, str]:
    """The class that model_index.json must give for each component; an SDXL refiner lacks some."""
    classes = {"unet": UNet2DConditionModel.__name__, "vae": AutoencoderKL.__name__}
    for tokenizer, encoder in family.towers:
        classes |= {tokenizer: CLIPTokenizer.__name__, encoder: _encoder_class(encoder).__name__}
    return classes


def _encoder_class(component: str) -> type[CLIPTextModel] | type[CLIPTextModelWithProjection]:
    return CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel


def _identity(path: str, folder: Path, revision: str | None) -> str:
    if Path(path).expanduser().exists():
        return folder.resolve().name
    return f"{path}@{revision}" if revision else path


def _load_part(part: str, described: PipelineFacts, dtype: torch.dtype, variant: str | None) -> Any:
    folder = described.folder
    if part == "text":
        towers = tuple(_load_tower(folder, *names, dtype, variant) for names in described.family.towers)
        _fits(described, towers)
        return towers
    cls, config = {"unet": (UNet2DConditionModel, described.unet), "vae": (AutoencoderKL, described.vae)}[part]
    return load_checked(
        folder / part,
        weight_files(folder, part, variant),
        lambda: cls.from_config(dict(config)),  # type: ignore[attr-defined]
        lambda: cls.from_pretrained(  # type: ignore[attr-defined]
            folder / part,
            torch_dtype=dtype,
            variant=variant_of(folder, part, variant),
            use_safetensors=True,
            output_loading_info=True,
        ),
    )


def load_unet(folder: Path, like: Mapping[str, Any], dtype: torch.dtype) -> UNet2DConditionModel:
    """The network of an export, which is to take the place of a pipeline's whose UNet has the config `like`.

    Args:
        folder: with its config and weights.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged, or of another model.
    """
    config, file = read_json(folder.parent, f"{folder.name}/config.json"), folder / "config.json"
    check_sizes(file, config)
    for key in ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "block_out_channels"):
        if _plain(config.get(key)) != _plain(like.get(key)):
            raise ValueError(
                f"{folder} is the network of another model: its {key} is {short(config.get(key))}, the model's is "
                f"{short(like.get(key))}"
            )
    return load_checked(
        folder,
        weight_files(folder.parent, folder.name),
        lambda: UNet2DConditionModel.from_config(dict(config)),  # type: ignore[attr-defined]
        lambda: UNet2DConditionModel.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        ),
    )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _fits(described: PipelineFacts, towers: Sequence[TextTower]) -> None:
    """Raises ValueError where the text encoders make something else than the UNet reads."""
    unet, widths = described.unet, [tower.encoder.config.hidden_size for tower in towers]
    if isinstance(reads := unet.get("cross_attention_dim"), int) and reads != sum(widths):
        raise ValueError(
            f"{described.path} cannot be a teacher: its UNet reads text of width {reads}, its text encoders make "
            f"{' + '.join(map(str, widths))}"
        )
    reads, sizes = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    pooled = towers[-1].encoder.config.projection_dim or 0
    if isinstance(reads, int) and isinstance(sizes, int) and reads != pooled + 6 * sizes:
        raise ValueError(
            f"{described.path} cannot be a teacher: its UNet reads {reads} numbers of pooled text and sizes, its text "
            f"encoder and six sizes make {pooled} + 6 * {sizes}"
        )


def _load_vae(path: str, own: Mapping[str, Any], dtype: torch.dtype) -> AutoencoderKL:
    """Another autoencoder for the teacher whose own has the config `own`."""
    try:
        given = AutoencoderKL.load_config(path)
        _same_latents(path, given, own)
        check_sizes(Path(path) / "config.json", given)
        if dtype == torch.float16 and given.get("force_upcast", True):
            dtype = torch.float32
        return AutoencoderKL.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
    except (OSError, HFValidationError) as error:  # what diffusers and the hub client raise
        raise FileNotFoundError(f"no autoencoder with safetensors weights at {path!r}: {first_line(error)}") from error
    except (RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the autoencoder {path} cannot be opened ({first_line(error)})") from error


def _same_latents(path: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if given.get("_class_name") != AutoencoderKL.__name__:
        raise ValueError(f"{path} is a {given.get('_class_name')}, not an {AutoencoderKL.__name__}")
    defaults = signature(AutoencoderKL).parameters
    for name in ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        theirs, ours = (config.get(name, defaults[name].default) for config in (given, own))
        if theirs != ours:
            raise ValueError(f"the autoencoder {path} has {name} {theirs}, the teacher's own has {ours}")
    if levels(Path(path) / "config.json", given) != levels(Path(path) / "config.json", own):
        raise ValueError(f"the autoencoder {path} halves its pictures more or less often than the teacher's own")


def _load_tower(folder: Path, tokenizer: str, encoder: str, dtype: torch.dtype, variant: str | None) -> TextTower:
    cls, files = _encoder_class(encoder), weight_files(folder, encoder, variant)
    check_sizes(folder / encoder / "config.json", read_json(folder, f"{encoder}/config.json"))
    model = load_checked(
        folder / encoder,
        files,
        lambda: cls(CLIPTextConfig.from_pretrained(folder / encoder)),
        lambda: cls.from_pretrained(
            folder / encoder,
            dtype=dtype,
            variant=variant_of(folder, encoder, variant),
            use_safetensors=True,
            output_loading_info=True,
        ),
    )
    with naming(folder / tokenizer):
        words = CLIPTokenizer.from_pretrained(folder / tokenizer)
    words.model_max_length = _tokens(folder / tokenizer, words.model_max_length, model.config.max_position_embeddings)
    if len(words) > model.config.vocab_size:
        raise ValueError(
            f"{folder / tokenizer} has {len(words)} tokens, its text encoder reads {model.config.vocab_size}: they do "
            "not belong together"
        )
    return TextTower(words, model)


def _tokens(path: Path, said: object, positions: int) -> int:
    """How many tokens a prompt has: what the tokenizer says, where it says something that the encoder can read."""
    if isinstance(said, bool) or not isinstance(said, (int, float)) or not said > 2:
        raise ValueError(f"{path}: model_max_length is {short(said)}; a prompt takes at least 3 tokens")
    return min(int(said), positions)


def prompt_tokens(folder: Path) -> int:
    """The tokens of a prompt of the pipeline in `folder`, by its configs.

    Raises:
        FileNotFoundError, ValueError: configs that do not say it.
    """
    said = read_json(folder, "tokenizer/tokenizer_config.json").get("model_max_length", MOST_TOKENS)
    config = read_json(folder, "text_encoder/config.json")
    positions = positive(
        folder / "text_encoder/config.json", {"max_position_embeddings": 77} | config, "max_position_embeddings"
    )
    return _tokens(folder / "tokenizer/tokenizer_config.json", said, positions)


def _modules(parts: Mapping[str, Any]) -> list[nn.Module]:
    text = [tower.encoder for tower in parts.get("text", ())]
    return [parts[name] for name in ("unet", "vae") if name in parts] + text
