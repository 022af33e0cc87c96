"""The latent discriminator of SDXL-Lightning (Lin et al. 2024, arXiv 2402.13929, sec. 3.3 and 3.4).

It is the teacher's own encoder, which reads noisy latents, times and prompts already, and a small head. Either all
weights of a copy of the encoder are trained, or a LoRA on the teacher's frozen weights; the head always is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, pad, silu

from distill.diffusion.adversarial import Origin
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import generator
from distill.diffusion.schedule import NoiseSchedule
from distill.models.execution import bare, base_dtype
from distill.models.families.base import Family
from distill.models.families.registry import family_of_network
from distill.models.families.teacher import Teacher
from distill.models.lora import add_lora, check_sizes, lora_layers


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
    ) -> Discriminator:
        """A discriminator that starts as the encoder of the teacher's network; see `CriticNetwork`.

        Raises:
            ValueError: the network has adapters, which would be copied with it.
        """
        if lora_layers(teacher.network):
            raise ValueError("a discriminator is made of the teacher's own network: before it is given a LoRA")
        network = teacher.network if rank is None else teacher.lend()
        size = teacher.latent_shape[1:]
        critic = CriticNetwork(network, size, conditional, seed, rank, alpha, teacher.family)
        return cls(critic, teacher.schedule)

    def __call__(
        self, samples: Sequence[Tensor], t: Tensor, conditioning: Conditioning, origin: Origin | None = None
    ) -> list[Tensor]:
        """Logits [B] in float32 for each of `samples` [B, C, h, w], all at t [B], in one call of the network.

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
        network: whose encoder is copied and fully trained; or, with a rank, serves frozen as it is.
        size: (h, w) of the latents it is meant for; it takes others.
        conditional: the head sees beside a sample's features those of the state it was made from.
        seed: of the head's weights and the LoRA's. The head's last layer starts at zero: it finds everything as likely
            real as fake.
        rank, alpha: of a LoRA on the encoder.
        family: the network's, which is found by its class where it is not given.
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
    ) -> None:
        super().__init__()
        self.conditional = conditional
        self.family = family or family_of_network(network)
        self.encoder = self.family.critic.encoder(network, on_its_weights=rank is not None)
        if rank is not None:
            add_lora(self.encoder, rank, alpha, seed=seed, family=self.family)
            for module in self.family.critic.idle(self.encoder):
                module.requires_grad_(False)
        width, *sides = self.family.critic.shape(network, (size[0], size[1]))
        widest = self.family.critic.widest_head or width
        with torch.device("meta"):  # or torch would initialise the weights, from the global generator
            head = Head(width * (1 + conditional), min(width, widest), Head.depth(min(sides)))
        self.head = head.to(self.dtype).to_empty(device=next(network.parameters()).device)
        self.head.initialise(seed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs it expects."""
        return base_dtype(self.encoder)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """As in diffusers: the encoder's blocks are recomputed in the backward pass."""
        self.encoder.enable_gradient_checkpointing(gradient_checkpointing_func)

    def forward(self, x: Tensor, told: Tensor, batches: int, conditioning: Conditioning) -> Tensor:
        """Latents x [N, C, h, w] of `batches` equal batches, at what a network is told of their times [N], to logits.

        They are [N]; or, for a conditional network, those of all batches but the last, which all the others came from.
        """
        features = self._features(x, told, batches, conditioning)  # [N, width, h', w']
        if self.conditional:
            *made, origin = features.chunk(batches)
            features = torch.cat([torch.cat([d, origin], 1) for d in made])
        return self.head(features)

    def _features(self, x: Tensor, told: Tensor, batches: int, conditioning: Conditioning) -> Tensor:
        """What the encoder makes of all batches.

        In the student's turn it is not trained, and what it makes of the state that samples came from is a constant:
        computed without a graph, which saves the activations and the backward passes through them.
        """
        if not (self.conditional and torch.is_grad_enabled()) or any(p.requires_grad for p in self.parameters()):
            return self._encoded(x, told, conditioning)
        made = len(x) - len(x) // batches
        with torch.no_grad():
            origin = self._of(slice(made, None), x.detach(), told, conditioning)
        return torch.cat([self._of(slice(made), x, told, conditioning), origin])

    def _of(self, part: slice, x: Tensor, told: Tensor, conditioning: Conditioning) -> Tensor:
        """What the encoder makes of a part of the samples."""
        return self._encoded(x[part], told[part], {key: entry[part] for key, entry in conditioning.items()})

    def _encoded(self, x: Tensor, told: Tensor, conditioning: Conditioning) -> Tensor:
        return self.family.critic.features(self.encoder, x, told, conditioning, self.dtype)


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

    def initialise(self, seed: int) -> None:
        """Initialises the convolutions as torch does by default, but from `seed`; biases and the logit's are 0."""
        for name, module in self.named_modules():
            if isinstance(module, MapNorm):
                module.reset_parameters()
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(cast(Tensor, module.bias))
                if module is not self.logit and not module.weight.is_meta:
                    bound, start = module.weight[0].numel() ** -0.5, torch.empty(module.weight.shape)
                    start.uniform_(-bound, bound, generator=generator("discriminator", seed, name))
                    module.weight.data.copy_(start)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, channels, h', w'] to logits [N]."""
        with _no_autocast(x.device):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            for conv, norm in zip(self.convs, self.norms, strict=True):
                h, w = x.shape[2:]
                x = silu(norm(conv(pad(x, (1, 1 + w % 2, 1, 1 + h % 2)))))  # an odd side is halved upwards, 1 stays 1
            return self.logit(x).flatten(1).mean(1)


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

    Raises:
        ValueError: a value out of its range, naming it.
    """

    conditional: bool = False
    rank: int | None = None
    alpha: float = 64.0

    def __post_init__(self) -> None:
        check_sizes("networks.discriminator", self.rank, self.alpha)

    def network(self, teacher: Teacher, seed: int = 0) -> Discriminator:
        """The network for a teacher with its own, before any adapter is added to that."""
        return Discriminator.of(teacher, self.conditional, seed, self.rank, self.alpha)
