"""What a family of teachers is: all that differs between kinds of networks, behind one interface.

A family is one file of this package, named like the family, that ends in `FAMILY = TheClass()`. It is found by its
file; nothing else has to name it. The rest of the project asks it and never asks which one it is:

- states of a trajectory are always maps [B, C, h, w]; packing, positions, units of time, lists and the sign of an
  output are inside `predict`;
- the conditioning of a sample is a flat dictionary of tensors [B, ...], made by `text.encode` and `sizes`, kept in the
  store, and read by `predict` alone: its keys are the family's own;
- configs are dictionaries as diffusers writes them (`network` is the denoising network's, `vae` the autoencoder's).

What families share are the classes below, of which a family has one each, changed where it differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.diffusion.noise import AnyNoise, Noise
from distill.diffusion.prediction import Conditioning, Prediction
from distill.models.checks import component, levels, positive
from distill.models.families.comfy import ComfyUI
from distill.models.families.towers import TextTower, Tower

Config = Mapping[str, Any]
"""A component's `config.json`, or what diffusers has read of it."""
Size = tuple[int, int]
"""(height, width)."""
DEFAULT_PIXELS = 1024
"""Side of the pictures of a network whose config does not say it."""


class OneFile(ABC):
    """The layout in which other programs read a family's networks as one file."""

    parts: tuple[str, ...] = ()
    """The sub-folders of a pipeline whose weights are in the file beside the network's; one that it lacks is not."""

    @abstractmethod
    def tensors(self, network: Any, source: Path, variant: str | None) -> Iterator[tuple[str, Tensor]]:
        """All that is in the file, by its names there.

        Args:
            network: bare.
            source: the pipeline's folder, with the `parts`.

        Raises:
            FileNotFoundError: a part lacks a file.
            ValueError: a network that the original code cannot build.
        """

    def marks(self, prediction: Prediction) -> dict[str, Tensor]:
        """Further entries, by which a file says what its network predicts."""
        return {}


@dataclass(frozen=True)
class Network:
    """The denoising network as a pipeline has it.

    Args:
        folder: its sub-folder, and its name in the pipeline: `unet` or `transformer`.
        kind: its class in diffusers.
        blocks: its attributes that hold its repeated blocks, a block or a list of them: what a LoRA adapts, what is
            quantized. The rest are its ends and embeddings.
        same: keys of its config in which a student must equal its model.
        noun: what people call such a network.
        one_file: how other programs read it as one file; None where no such layout is known.
    """

    folder: str
    kind: str
    blocks: tuple[str, ...]
    same: tuple[str, ...]
    noun: str = "transformer"
    one_file: OneFile | None = None

    def describes(self, network: Config) -> bool:
        """Whether a network of this class with this config is one of the family's: others may have its class too."""
        return True

    def check(self, path: str, file: Path, network: Config, vae: Config) -> None:
        """Raises ValueError for a network that wants to be given more than the family's pipeline gives it.

        Args:
            path: of the pipeline, for messages; file: of the network's config.
        """

    def patch(self, network: Config) -> int:
        """Side of what the network reads as one token of an image, in entries of a state: 1 where there are none."""
        return int(network.get("patch_size") or 1)

    def side(self, network: Config) -> int | None:
        """Side of the states that it was trained for; None where its config does not say it."""
        return network.get("sample_size")

    def most(self, network: Config) -> int | None:
        """The largest side of states that the network has positions for; None where there is none."""
        return None

    def parts(self, module: nn.Module) -> list[nn.Module]:
        """The blocks of a network, bare."""
        found = [getattr(module, name, None) for name in self.blocks]
        return [part for part in found if part is not None]


class Text(ABC):
    """Prompts and what the network reads of them."""

    towers: tuple[Tower, ...]
    """Tokenizers with their text encoders; those that a pipeline may lack stand last."""
    max_tokens: int | None = None
    """Tokens of a prompt that the pipeline takes unless it is given another `max_sequence_length`; None where the text
    encoders fix their number, and the pipeline takes no such argument."""
    most_tokens = 512
    """The greatest `max_sequence_length` that the pipeline takes."""
    stored: str | None = None
    """The dtype of its states in a store; None is that of the trajectories' states."""
    shared = False
    """Whether the samples of a prompt share one text in a store, unless `data.share_texts` says it."""

    def load(
        self,
        folder: Path,
        index: Config,
        network: Config,
        dtype: torch.dtype,
        variant: str | None,
        max_tokens: int | None = None,
    ) -> tuple[TextTower, ...]:
        """The towers that the pipeline in `folder` has.

        Args:
            index: its `model_index.json`.
            dtype: see `Tower.load`.
            max_tokens: of a prompt, where they are for the pipeline to say; None takes its own.

        Raises:
            FileNotFoundError: see `Tower.load`.
            ValueError: the same; or `max_tokens` that the pipeline does not take.
        """
        there = [t for t in self.towers if component(folder, index, t.encoder)[1] is not None]
        tokens = self.prompt_tokens(max_tokens)
        towers = (tower.load(folder, dtype, variant) for tower in there)
        return tuple(towers if tokens is None else (tower.at_most(tokens) for tower in towers))

    def prompt_tokens(self, max_tokens: int | None) -> int | None:
        """The `max_sequence_length` that the pipeline is called with; None where it takes none.

        Raises:
            ValueError: one that the pipeline does not take.
        """
        if max_tokens is None:
            return self.max_tokens
        if self.max_tokens is None:
            raise ValueError(f"max_tokens {max_tokens}: this model's text encoders fix it, leave it null")
        if not 1 <= max_tokens <= self.most_tokens:
            raise ValueError(f"max_tokens must lie in 1 ... {self.most_tokens}, got {max_tokens}")
        return max_tokens

    @abstractmethod
    def encode(self, towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, Tensor]:
        """The text's part of the conditioning, each [B, ...], as the family's diffusers pipeline makes it.

        A mask is an entry of its own, bool [B, tokens]; `predict` trims by it.

        Args:
            towers: those that the pipeline has, in the order of `self.towers`.
        """

    @abstractmethod
    def shapes(self, network: Config, tokens: int) -> dict[str, tuple[int, ...]]:
        """The shape of each entry of `encode`, without the batch, for prompts of so many tokens."""

    def tokens(self, folder: Path, max_tokens: int | None = None) -> int:
        """The tokens of a prompt in the pipeline in `folder`, by its configs.

        Args:
            max_tokens: see `load`.

        Raises:
            FileNotFoundError, ValueError: configs that do not say it.
        """
        return self.prompt_tokens(max_tokens) or self.towers[0].tokens(folder)

    @abstractmethod
    def check(self, path: str, network: Config, towers: Sequence[TextTower]) -> None:
        """Raises ValueError where the text encoders make something else than the network reads.

        Args:
            path: of the pipeline, for messages.
        """


class Latents:
    """Pictures and the states that a network denoises, of an AutoencoderKL with one scale and one shift."""

    kind = "AutoencoderKL"
    """The autoencoder's class in diffusers."""
    same: tuple[str, ...] = ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
    """Keys of its config in which another one must equal it, to be of the same latents."""

    def check(self, file: Path, vae: Config) -> None:
        """Raises ValueError for the config, in `file`, of an autoencoder of other latents than these."""
        levels(file, vae)
        positive(file, vae, "latent_channels")

    def channels(self, vae: Config) -> int:
        """Of a state."""
        return int(vae["latent_channels"])

    def factor(self, vae: Config) -> int:
        """Pixels to an entry of a state, along a side."""
        return int(2 ** (len(vae["block_out_channels"]) - 1))

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """States [B, C, h, w] to pictures [B, 3, H, W] in float32, unclamped, with a gradient for the states."""
        weight = next(vae.parameters())
        z = latents.to(weight.device, torch.float32) / vae.config["scaling_factor"]
        mean, std = _statistics(vae.config, z)
        return vae.decode((z * std + mean).to(weight.dtype), return_dict=False)[0].float()

    def encode(self, vae: Any, pictures: Tensor, noise: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to states [B, C, h, w] in float32.

        They are sampled from the autoencoder's posterior with the standard normal `noise` [B, C, h, w].
        """
        weight = next(vae.parameters())
        posterior = vae.encode(pictures.to(weight), return_dict=False)[0]
        z = posterior.mean.float() + posterior.std.float() * noise.to(weight.device, torch.float32)
        mean, std = _statistics(vae.config, z)
        return (z - mean) / std * vae.config["scaling_factor"]


def _statistics(vae: Config, like: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) by which an autoencoder's latents are normalised, before they are scaled."""
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    if mean is None or std is None:
        mean, std = [vae.get("shift_factor") or 0.0], [1.0]
    return torch.tensor(mean).to(like).view(1, -1, 1, 1), torch.tensor(std).to(like).view(1, -1, 1, 1)


class Guidance:
    """How a network is guided: by a second pass without a prompt, and w is no input of it.

    This project's w is that of `uncond + w (cond - uncond)`: 1 is no guidance.
    """

    weights: tuple[str, ...] = ()
    """Names of the weights of an input of w that `add` gives a network."""

    def form(self, network: Config, index: Config) -> Literal["cfg", "embedded", "none"]:
        """What a teacher needs: a second pass (`cfg`), w as an input in the only pass (`embedded`), or nothing, since
        it was distilled already (`none`).

        Args:
            index: the pipeline's `model_index.json`; if it names no `_name_or_path`, that is where it
                was opened from.
        """
        return "cfg"

    def to_pipeline(self, w: float) -> float:
        """The `guidance_scale` with which the family's pipeline guides by this w."""
        return w

    def taken(self, network: Config) -> bool:
        """Whether w is an input of the network: the entry "guidance" [B] of a conditioning, float32."""
        return False

    def add(self, network: Any, dim: int, seed: int | None = None) -> None:
        """Gives a network w as an input, where it has not got it: as `dim` Fourier features of it.

        Without a `seed` it has no effect until it is trained; with one it starts as torch starts a layer.

        Raises:
            ValueError: a network of this family cannot be given it.
        """
        raise ValueError(
            f"a {type(network).__name__} cannot be given guidance as an input: set student.guidance_embedding_dim=null"
        )

    def build_in(self, network: Any, w: float) -> None:
        """Fixes the w that a network takes as an input: an ordinary network that computes what it did at w.

        Raises:
            ValueError: the network takes no guidance, or it cannot be fixed.
        """
        raise ValueError("the network takes no guidance as an input")


@dataclass(frozen=True)
class LoRAFile:
    """What is to be written to a LoRA's file.

    Args:
        tensors: under the names that the file's readers look for.
        header: entries of the file's metadata without which they would read it otherwise.
        folded: whether alpha / rank is in the tensors already, so that the file's alpha is its rank.
    """

    tensors: dict[str, Tensor]
    header: dict[str, str]
    folded: bool = False


def _is_layer(name: str, module: nn.Module) -> bool:
    """Whether a module is one that peft adapts; one with an adapter counts as what it was without, its parts do not."""
    part = ".lora_" in name or name.endswith(".base_layer")
    return not part and isinstance(getattr(module, "base_layer", module), (nn.Linear, nn.Conv2d))


def _matched(target: str, modules: Mapping[str, nn.Module], layers: Sequence[str]) -> list[str]:
    """What peft is to be told of a target: the end itself, or, where it is a pattern or ends other modules' names too,
    the whole names of the layers that it matches."""
    if "*" in target:
        return [name for name in layers if fnmatchcase(name, target)]
    ended = [name for name in layers if f".{name}".endswith(f".{target}")]
    others = (name for name in modules if f".{name}".endswith(f".{target}") and name not in ended)
    return ended if ended and any(others) else [target] * bool(ended)


def _some(layers: Sequence[str]) -> str:
    """A few of the names, far apart."""
    return ", ".join(dict.fromkeys(layers[i * (len(layers) - 1) // 2] for i in range(3))) if layers else "none"


class LoRA(ABC):
    """LoRAs of a family: which modules they adapt, and how files name them."""

    formats: tuple[str, ...]
    """The formats that exist for it, of `diffusers`, `peft`, `comfyui`, `kohya`."""
    prefix: str
    """What diffusers' loader calls the network in the keys of a file: `unet` or `transformer`."""
    targets: Mapping[str, tuple[str, ...]]
    """Modules to adapt, by names that users choose (`attention`, `blocks`, `all`); the first is the default.

    A target is the end of a module's name (`to_q`), as peft has it, or a pattern of whole names with `*`
    (`single_transformer_blocks.*.proj_out`), where the end alone would match others.
    """

    def chosen(self, network: nn.Module, which: str | Sequence[str] | None = None) -> list[str]:
        """peft's `target_modules` for a network.

        Args:
            network: bare.
            which: a name of `targets`, of which those are taken that the network has; or targets themselves, of which
                each has to match something. None is the default.

        Raises:
            ValueError: a name that is not known, or a target that matches no layer of the network.
        """
        if isinstance(which, str) and which not in self.targets:
            raise ValueError(
                f"lora_targets={which} is not known; allowed: {', '.join(self.targets)}, or a list of modules' names "
                "such as [to_q,to_k]"
            )
        named = not isinstance(which, (list, tuple))
        found: dict[str, None] = {}
        modules = dict(network.named_modules())
        layers = [name for name, module in modules.items() if _is_layer(name, module)]
        for target in self.targets[str(which or next(iter(self.targets)))] if named else which or ():
            matched = _matched(target, modules, layers)
            if not matched and not named:
                raise ValueError(
                    f"lora_targets: {target!r} matches no linear layer or convolution of the {type(network).__name__}; "
                    f"names are ends (to_q) or patterns with * of those such as {_some(layers)}"
                )
            found |= dict.fromkeys(matched)
        return list(found)

    @abstractmethod
    def file(
        self, format: str, weights: Mapping[str, Tensor], config: Any, network: Config, dtype: torch.dtype
    ) -> LoRAFile:
        """A LoRA for a file of one of the `formats` (`peft`'s folder is the same for all families, and not asked for).

        Args:
            weights: by peft's names in the network, `<module>.lora_A.weight`.
            config: peft's, with `r` and `lora_alpha`.

        Raises:
            ValueError: a value that the dtype cannot hold.
        """

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], modules: Sequence[str], network: Config) -> dict[str, Tensor]:
        """What `file("diffusers", ...)` wrote, by peft's names; a key of none of the `modules` keeps its name."""

    def seen(self, pipeline: Any, file: str, **named: Any) -> dict[str, Tensor]:
        """A LoRA of any format that diffusers reads, as its pipeline reads it, by peft's names in the network.

        Args:
            named: further arguments of diffusers' `lora_state_dict`.

        Raises:
            ValueError, OSError and others: whatever diffusers raises of it.
        """
        found = pipeline.lora_state_dict(file, **named)
        state = found[0] if isinstance(found, tuple) else found
        start = f"{self.prefix}."
        return {key.removeprefix(start): x for key, x in state.items() if key.startswith(start)}

    @abstractmethod
    def architecture(self, network: Config, velocity: bool) -> tuple[str, str]:
        """The base model as kohya-ss (`ss_base_model_version`) and as ModelSpec (`modelspec.architecture`) call it.

        Args:
            velocity: whether the network predicts velocities of variance-preserving noise.
        """


class CriticFeatures(ABC):
    """What of a network judges latents: its encoder, which reads noisy states, times and prompts already."""

    widest_head: int | None = None
    """The greatest width of a head over the features; None: it is as wide as they are."""

    def idle(self, encoder: nn.Module) -> Sequence[nn.Module]:
        """Modules of an encoder that have no part in the features: they are not trained, nor are adapters on them."""
        return ()

    @abstractmethod
    def encoder(self, network: Any, on_its_weights: bool = False) -> Any:
        """A network that ends where its features are taken, and so runs its published `forward`.

        It is a copy, of which what has a part in the features requires a gradient and nothing else does; or,
        `on_its_weights`, it computes with the very weights of `network`.
        """

    @abstractmethod
    def features(
        self, encoder: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        """A map of features [B, width, h', w'] of states [B, C, h, w]; the other arguments are those of `predict`."""

    @abstractmethod
    def shape(self, network: Any, size: Size) -> tuple[int, int, int]:
        """(width, h', w') of the features of states of `size` (h, w)."""

    def taps(self, encoder: nn.Module) -> Sequence[nn.Module]:
        """Blocks of an encoder whose outputs are features too, of earlier levels, in their order.

        None of them means that `features` are the only level.
        """
        return ()

    def tapped(self, encoder: nn.Module, output: Any, x_t: Tensor) -> Tensor:
        """The map [B, width, h', w'] in the output of one of the `taps`, for states x_t [B, C, h, w]."""
        raise NotImplementedError

    def level_shapes(self, network: Any, encoder: nn.Module, size: Size) -> list[tuple[int, int, int]]:
        """(width, h', w') of the features of each level: those of the `taps`, then those of `features`."""
        return [self.shape(network, size)] * (len(self.taps(encoder)) + 1)

    def levels(
        self, encoder: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> list[Tensor]:
        """The features of all levels, the last of which are `features`, of one call of the encoder.

        Raises:
            RuntimeError: blocks that are compiled did not show what they put out.
        """
        outputs: list[Any] = []
        taps = self.taps(encoder)
        hooks = [tap.register_forward_hook(lambda _, __, output: outputs.append(output)) for tap in taps]
        try:
            last = self.features(encoder, x_t, told, conditioning, dtype)
        finally:
            for hook in hooks:
                hook.remove()
        if len(outputs) != len(taps):
            raise RuntimeError("networks.discriminator.levels=all sees nothing of compiled blocks: set compile=false")
        return [*(self.tapped(encoder, output, x_t) for output in outputs), last]


SD_VAE: Config = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""Stable Diffusion's autoencoder, whose shape most others have."""


@dataclass(frozen=True)
class Published:
    """A published model, of which no file is needed to know what it takes.

    Args:
        network: the config of its network, as far as it is not the class's own; with what tells it from its relatives.
        encoders: weights of its text encoders.
        tokens: of a prompt.
        vae: the config of its autoencoder.
        noise: what its scheduler stands for.
    """

    network: Config
    encoders: float
    tokens: int = 77
    vae: Config = field(default_factory=lambda: SD_VAE)
    noise: AnyNoise = field(default_factory=Noise)


class Family(ABC):
    """A kind of teachers. An instance has no state; there is one of each."""

    name: str
    """In settings, files and exports; its file is called so."""
    title: str
    """For people."""
    tag: str
    """What the hub calls it."""
    pipeline: str
    """Its pipeline's class in diffusers."""
    network: Network
    text: Text
    latents: Latents
    guidance: Guidance
    lora: LoRA
    critic: CriticFeatures
    full_size: Mapping[str, Published]
    """Published models by the names of their files in `configs/model/`: what can be measured without a download."""
    comfyui: ComfyUI | None = None
    """How ComfyUI opens its models; None where that is not known, and exports then have no workflows."""

    def arguments(self, zeros_for_empty: bool) -> dict[str, Any]:
        """What the pipeline's constructor takes beside its parts.

        Args:
            zeros_for_empty: whether "no prompt" is zeros in the place of the encoded ""; a pipeline that knows both
                takes it as `force_zeros_for_empty_prompt`.
        """
        return {}

    def sizes(self, originals: Sequence[Size], corners: Sequence[Size], size: Size) -> dict[str, Tensor]:
        """The rest of the conditioning, each [B, ...], for pictures cut to `size` pixels.

        Of each: `originals`, its (height, width) before it was resized; `corners`, the cut's (top, left) afterwards.
        Uncropped pictures are their own originals with corners (0, 0). An entry is in float32 and stays so.
        """
        return {}

    def noise(self, noise: AnyNoise, tokens: int) -> AnyNoise:
        """A teacher's noise, settled for pictures that its network reads as so many tokens.

        Raises:
            ValueError: there is none.
        """
        return noise.at(tokens)

    @abstractmethod
    def predict(
        self, module: nn.Module, x_t: Tensor, told: Tensor, conditioning: Conditioning, dtype: torch.dtype
    ) -> Tensor:
        """One call of the network: what it predicts, [B, C, h, w], in the sense of `Prediction`.

        For a flow that is v = eps - x0, whatever sign the network has; x_t and the output are maps, whatever it reads.

        Args:
            module: the network, bare or inside DDP's or DeepSpeed's wrapper (`bare` finds its config).
            x_t: [B, C, h, w], in any dtype.
            told: [B], by `NoiseSchedule.told`: the index of a level (int64), or T sigma (float32) for a flow.
            conditioning: entries [B, ...] in any dtype. "guidance" [B], a w, is there where the method has one; it
                reaches a network that takes it (`guidance.taken`), and no other.
            dtype: that the network computes in: x_t and texts are cast to it, numbers such as sizes, w and times to
                nothing that would round them.

        Raises:
            ValueError: a conditioning entry that the network does not take, or a missing one that it needs.
        """
