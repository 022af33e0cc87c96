"""The latent discriminator of SDXL-Lightning (Lin et al. 2024, arXiv 2402.13929, sec. 3.3 and 3.4).

It is the teacher's own encoder, which reads noisy latents, times and prompts already, and a small head. Either all
weights of a copy of the encoder are trained, or a LoRA on the teacher's frozen weights, or nothing of it; the head
always is. Instead of one head at its end there may be one at each level of the encoder (PCM, Wang et al. 2024, arXiv
2405.18407).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, interpolate, leaky_relu, pad, silu

from distill.diffusion.adversarial import Origin
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import generator
from distill.diffusion.schedule import NoiseSchedule
from distill.models.execution import bare, base_dtype
from distill.models.families.base import Family
from distill.models.families.registry import family_of_network
from distill.models.families.teacher import Teacher
from distill.models.lora import add_lora, check_sizes, lora_layers

TRAINED, LEVELS = ("all", "heads"), ("last", "all")
"""What `trained` and `levels` of a critic may be."""


@dataclass(frozen=True)
class Discriminator:
    """A `Critic` by a `CriticNetwork`. `dataclasses.replace(discriminator, module=wrapped)` is the same in an engine.

    Args:
        module: a `CriticNetwork`, bare or wrapped.
        schedule: of the noise in what it judges. Among variance-preserving ones of 1000 times it does not matter which:
            networks are told the same of their times.
    """

    module: nn.Module
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule.scaled_linear)

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        conditional: bool = False,
        seed: int = 0,
        rank: int | None = None,
        alpha: float = 64.0,
        trained: str = "all",
        levels: str = "last",
    ) -> Discriminator:
        """A discriminator that starts as the encoder of the teacher's network; see `CriticNetwork`.

        Raises:
            ValueError: the network has adapters, which would be copied with it.
        """
        if lora_layers(teacher.network):
            raise ValueError("a discriminator is made of the teacher's own network: before it is given a LoRA")
        copied = rank is None and trained == "all"
        network = teacher.network if copied else teacher.lend()
        size = teacher.latent_shape[1:]
        critic = CriticNetwork(network, size, conditional, seed, rank, alpha, teacher.family, trained, levels)
        return cls(critic, teacher.schedule)

    def __call__(
        self, samples: Sequence[Tensor], t: Tensor, conditioning: Conditioning, origin: Origin | None = None
    ) -> list[Tensor]:
        """Logits in float32 for each of `samples` [B, C, h, w], all at t [B], in one call of the network.

        They are [B], or, of heads at all levels, [B, n].

        Raises:
            ValueError: a conditional network without `origin`, or a conditioning entry that is missing or not known.
        """
        critic: Any = bare(self.module)
        times = [t] * len(samples)
        if critic.conditional:
            if origin is None:
                raise ValueError("the discriminator is conditional: it needs the state that the samples were made from")
            samples, times = [*samples, origin[0]], [*times, origin[1]]
        x = torch.cat(list(samples)).to(critic.dtype)  # [n B, C, h, w]
        many = {key: torch.cat([entry] * len(samples)) for key, entry in conditioning.items()}
        logits = self.module(x, self.schedule.told(torch.cat(times)), len(samples), many)
        return list(logits.float().chunk(len(logits) // len(t)))


class CriticNetwork(nn.Module):
    """The encoder of a network, as its family has it for critics, and a head over its features.

    Args:
        network: whose encoder is copied and fully trained; or, with a rank or where the heads alone are trained, serves
            frozen as it is.
        size: (h, w) of the latents it is meant for; it takes others.
        conditional: the head sees beside a sample's features those of the state it was made from.
        seed: of the head's weights and the LoRA's. The head's last layer starts at zero: it finds everything as likely
            real as fake.
        rank, alpha: of a LoRA on the encoder.
        family: the network's, which is found by its class where it is not given.
        trained: `all`, or `heads` alone.
        levels: `last`: one head over what the encoder ends in, with a logit for a sample; `all`: a head over each of
            its levels, with a logit for each place.

    Raises:
        ValueError: a rank where nothing of the encoder is trained.
    """

    def __init__(
        self,
        network: Any,
        size: Sequence[int],
        conditional: bool = False,
        seed: int = 0,
        rank: int | None = None,
        alpha: float = 64.0,
        family: Family | None = None,
        trained: str = "all",
        levels: str = "last",
    ) -> None:
        super().__init__()
        check_trained(trained, levels, rank)
        self.conditional = conditional
        self.family = family or family_of_network(network)
        critic = self.family.critic
        self.encoder = critic.encoder(network, on_its_weights=rank is not None or trained == "heads")
        if trained == "heads":
            self.encoder.requires_grad_(False)
        if rank is not None:
            add_lora(self.encoder, rank, alpha, seed=seed, family=self.family)
            for module in critic.idle(self.encoder):
                module.requires_grad_(False)
        width, *sides = critic.shape(network, (size[0], size[1]))
        widest = critic.widest_head or width
        head: Head | Heads
        with torch.device("meta"):  # or torch would initialise the weights, from the global generator
            if levels == "last":
                head = Head(width * (1 + conditional), min(width, widest), Head.depth(min(sides)))
            else:
                widths = [width for width, *_ in critic.level_shapes(network, self.encoder, (size[0], size[1]))]
                head = Heads(widths, conditional, critic.widest_head)
        self.head = head.to(self.dtype).to_empty(device=next(network.parameters()).device)
        initialise(self.head, seed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs it expects."""
        return base_dtype(self.encoder)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """As in diffusers: the encoder's blocks are recomputed in the backward pass."""
        self.encoder.enable_gradient_checkpointing(gradient_checkpointing_func)

    def forward(self, x: Tensor, told: Tensor, batches: int, conditioning: Conditioning) -> Tensor:
        """Latents x [N, C, h, w] of `batches` equal batches, at what a network is told of their times [N], to logits.

        They are [N], of heads at all levels [N, n]; or, for a conditional network, those of all batches but the last,
        which all the others came from.
        """
        levels = self._features(x, told, batches, conditioning)  # each [N, width, h', w']
        if self.conditional:
            levels = [_beside_the_last(features, batches) for features in levels]
        return self.head(*levels)

    def _features(self, x: Tensor, told: Tensor, batches: int, conditioning: Conditioning) -> list[Tensor]:
        """What the encoder makes of all batches, at each level that has a head.

        In the student's turn it is not trained, and what it makes of the state that samples came from is a constant:
        computed without a graph, which saves the activations and the backward passes through them.
        """
        if not (self.conditional and torch.is_grad_enabled()) or any(p.requires_grad for p in self.parameters()):
            return self._encoded(x, told, conditioning)
        made = len(x) - len(x) // batches
        with torch.no_grad():
            origin = self._of(slice(made, None), x.detach(), told, conditioning)
        of_made = self._of(slice(made), x, told, conditioning)
        return [torch.cat(both) for both in zip(of_made, origin, strict=True)]

    def _of(self, part: slice, x: Tensor, told: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """What the encoder makes of a part of the samples."""
        return self._encoded(x[part], told[part], {key: entry[part] for key, entry in conditioning.items()})

    def _encoded(self, x: Tensor, told: Tensor, conditioning: Conditioning) -> list[Tensor]:
        critic = self.family.critic
        if isinstance(self.head, Heads):
            return critic.levels(self.encoder, x, told, conditioning, self.dtype)
        return [critic.features(self.encoder, x, told, conditioning, self.dtype)]


def _beside_the_last(features: Tensor, batches: int) -> Tensor:
    """Features [N, width, h, w] of `batches` equal batches: those of all but the last, each with the last beside it."""
    *made, origin = features.chunk(batches)
    return torch.cat([torch.cat([d, origin], 1) for d in made])


class Head(nn.Module):
    """`depth` times a 4 x 4 convolution of stride 2, normalisation and SiLU; then a logit, the mean over the map.

    It computes in float32 whatever its features and weights are in: the loss is of differences between logits, and the
    gradients of all samples pass through here. It costs next to nothing beside the encoder.

    Args:
        channels: of the features.
        width: of the convolutions.
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [channels] + [width] * depth
        self.convs = nn.ModuleList(InputConv(a, width, 4, stride=2) for a in widths[:-1])
        self.norms = nn.ModuleList(MapNorm(groups_of(width), width) for _ in range(depth))
        self.logit = InputConv(width, 1, 1)

    @staticmethod
    def depth(size: int) -> int:
        """How many convolutions bring a map of `size` near 2 x 2."""
        return max(1, round(math.log2(size)) - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, channels, h', w'] to logits [N]."""
        with _no_autocast(x.device):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            for conv, norm in zip(self.convs, self.norms, strict=True):
                h, w = x.shape[2:]
                x = silu(norm(conv(pad(x, (1, 1 + w % 2, 1, 1 + h % 2)))))  # an odd side is halved upwards, 1 stays 1
            return self.logit(x).flatten(1).mean(1)


class PlaceHead(nn.Module):
    """Two 3 x 3 convolutions with normalisation and leaky ReLU, and a logit for each place (PCM's heads).

    It computes in float32, as `Head` does.

    Args:
        channels: of the features.
        width: of the convolutions.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(InputConv(a, width, 3, padding=1) for a in (channels, width))
        self.norms = nn.ModuleList(MapNorm(groups_of(width), width) for _ in range(2))
        self.logit = InputConv(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, channels, h', w'] to logits [N, 1, h', w']."""
        with _no_autocast(x.device):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = leaky_relu(norm(conv(x)), 0.2)
            return self.logit(x)


class Heads(nn.Module):
    """A `PlaceHead` over each level of an encoder.

    Args:
        widths: of the levels' features.
        conditional: they stand beside those of the state that samples were made from.
        widest: the greatest width of a head; None: it is as wide as its features.
    """

    def __init__(self, widths: Sequence[int], conditional: bool = False, widest: int | None = None) -> None:
        super().__init__()
        self.levels = nn.ModuleList(PlaceHead(n * (1 + conditional), min(n, widest or n)) for n in widths)

    def forward(self, *features: Tensor) -> Tensor:
        """The features [N, width, h', w'] of each level to logits [N, levels h w], as many for each level.

        A logit of a coarse level stands for all the places of the finest one that it covers, so that the mean over all
        of them is the mean over the levels.
        """
        maps = [head(x) for head, x in zip(self.levels, features, strict=True)]
        finest = max((logits.shape[2:] for logits in maps), key=math.prod)
        return torch.cat([interpolate(logits, finest, mode="nearest").flatten(1) for logits in maps], 1)


def initialise(heads: nn.Module, seed: int) -> None:
    """Initialises convolutions as torch does by default, but from `seed`; biases and what makes logits are 0."""
    for name, module in heads.named_modules():
        if isinstance(module, MapNorm):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(cast(Tensor, module.bias))
            if name.rpartition(".")[2] != "logit" and not module.weight.is_meta:
                bound, start = module.weight[0].numel() ** -0.5, torch.empty(module.weight.shape)
                start.uniform_(-bound, bound, generator=generator("discriminator", seed, name))
                module.weight.data.copy_(start)


class InputConv(nn.Conv2d):
    """A convolution in the dtype of its input, whatever its weights are in.

    It is a module of its own because ZeRO-3 gathers weights where a module is called.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [N, channels, h, w]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class MapNorm(nn.GroupNorm):
    """GroupNorm that leaves a 1 x 1 map's values as they are: of so few in a group it would keep little but signs.

    It computes in the dtype of its input, like `InputConv`.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if x.shape[2] * x.shape[3] > 1:
            return group_norm(x, self.num_groups, weight, bias, self.eps)
        return x * weight[:, None, None] + bias[:, None, None]


def groups_of(width: int) -> int:
    """32 groups, or the largest number of them that divides `width` into groups of at least 4 channels."""
    return max(n for n in range(1, 33) if width % n == 0 and (n == 1 or width // n >= 4))


@dataclass(frozen=True)
class LatentDiscriminator:
    """A setting: a `Discriminator` that a run makes of its teacher.

    Args:
        conditional: it also sees the state that samples were made from.
        rank, alpha: of a LoRA on the teacher's own frozen weights; rank None trains all of a copy of its encoder.
        trained: `all` of that, or the `heads` alone, over the teacher's own frozen encoder.
        levels: `last`: one head over what the encoder ends in; `all`: one over each of its levels.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    conditional: bool = False
    rank: int | None = None
    alpha: float = 64.0
    trained: str = "all"
    levels: str = "last"

    def __post_init__(self) -> None:
        check_sizes("networks.discriminator", self.rank, self.alpha)
        check_trained(self.trained, self.levels, self.rank)

    def network(self, teacher: Teacher, seed: int = 0) -> Discriminator:
        """The network for a teacher with its own, before any adapter is added to that."""
        return Discriminator.of(
            teacher, self.conditional, seed, self.rank, self.alpha, trained=self.trained, levels=self.levels
        )


def check_trained(trained: str, levels: str, rank: int | None) -> None:
    """Raises ValueError for values that a critic's `trained` and `levels` cannot have."""
    for name, value, allowed in (("trained", trained, TRAINED), ("levels", levels, LEVELS)):
        if value not in allowed:
            raise ValueError(f"networks.discriminator.{name} must be one of {', '.join(allowed)}, got {value!r}")
    if trained == "heads" and rank is not None:
        raise ValueError(
            f"networks.discriminator.rank={rank} is of a LoRA on the encoder, and trained=heads trains none: set rank "
            "to null, or trained to all"
        )
