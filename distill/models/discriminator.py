"""The latent discriminator of SDXL-Lightning (Lin et al. 2024, arXiv 2402.13929, sec. 3.3 and 3.4).

It is the teacher's own encoder, which reads noisy latents, times and prompts already, and a small head. Either all
weights of a copy of the encoder are trained, or a LoRA on the teacher's frozen weights; the head always is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import group_norm, pad, silu
from torch.utils._pytree import tree_map_only

from distill.diffusion.adversarial import Origin
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import generator
from distill.models.denoiser import bare, unet_keywords
from distill.models.families import Teacher
from distill.models.lora import add_lora, check_sizes, lora_layers
from distill.models.shared import on_the_weights_of


@dataclass(frozen=True)
class Discriminator:
    """A `Critic` by a `CriticNetwork`. `dataclasses.replace(discriminator, module=wrapped)` is the same in an engine.

    Args:
        module: a `CriticNetwork`, bare or wrapped.
    """

    module: nn.Module

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        conditional: bool = False,
        seed: int = 0,
        rank: int | None = None,
        alpha: float = 64.0,
    ) -> Discriminator:
        """A discriminator that starts as the encoder of the teacher's UNet; see `CriticNetwork`.

        Raises:
            ValueError: the UNet has adapters, which would be copied with it.
        """
        if lora_layers(teacher.unet):
            raise ValueError("a discriminator is made of the teacher's own network: before it is given a LoRA")
        unet = teacher.unet if rank is None else teacher.lend()
        return cls(CriticNetwork(unet, teacher.latent_shape[1:], conditional, seed, rank, alpha))

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
        keywords = unet_keywords(many, critic.dtype, critic.encoder.config["time_cond_proj_dim"])
        logits = self.module(x, (torch.cat(times) - 1).clamp(min=0), len(samples), **keywords)
        return list(logits.float().chunk(len(logits) // len(t)))


class CriticNetwork(nn.Module):
    """The encoder and middle of a UNet, and a head over their features.

    Args:
        unet: whose encoder is copied and fully trained; or, with a rank, serves frozen as it is.
        size: (h, w) of the latents it is meant for; it takes others.
        conditional: the head sees beside a sample's features those of the state it was made from.
        seed: of the head's weights and the LoRA's. The head's last layer starts at zero: it finds everything as likely
            real as fake.
        rank, alpha: of a LoRA on the encoder.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        size: Sequence[int],
        conditional: bool = False,
        seed: int = 0,
        rank: int | None = None,
        alpha: float = 64.0,
    ) -> None:
        super().__init__()
        self.conditional = conditional
        if rank is None:
            self.encoder = encoder_of(unet).requires_grad_(True)
        else:
            self.encoder = encoder_of(unet, on_its_weights=True)
            add_lora(self.encoder, rank, alpha, seed=seed)
        width = unet.config["block_out_channels"][-1]
        halvings = sum(block.downsamplers is not None for block in unet.down_blocks)
        smaller = min(math.ceil(side / 2**halvings) for side in size)
        with torch.device("meta"):  # or torch would initialise the weights, from the global generator
            head = Head(width * (1 + conditional), width, Head.depth(smaller))
        self.head = head.to(self.dtype).to_empty(device=unet.conv_in.weight.device)
        self.head.initialise(seed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inputs it expects."""
        return self.encoder.conv_in.weight.dtype

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """As in diffusers: the encoder's blocks are recomputed in the backward pass."""
        self.encoder.enable_gradient_checkpointing(gradient_checkpointing_func)

    def forward(self, x: Tensor, index: Tensor, batches: int, **keywords: Any) -> Tensor:
        """Latents x [N, C, h, w] of `batches` equal batches at timestep indices [N] to logits.

        They are [N]; or, for a conditional network, those of all batches but the last, which all the others came from.
        """
        features = self._features(x, index, batches, keywords)  # [N, width, h', w']
        if self.conditional:
            *made, origin = features.chunk(batches)
            features = torch.cat([torch.cat([d, origin], 1) for d in made])
        return self.head(features)

    def _features(self, x: Tensor, index: Tensor, batches: int, keywords: Mapping[str, Any]) -> Tensor:
        """What the encoder makes of all batches.

        In the student's turn it is not trained, and what it makes of the state that samples came from is a constant:
        computed without a graph, which saves the activations and the backward passes through them.
        """
        if not (self.conditional and torch.is_grad_enabled()) or any(p.requires_grad for p in self.parameters()):
            return self.encoder(x, index, return_dict=False, **keywords)[0]
        made = len(x) - len(x) // batches
        with torch.no_grad():
            origin = self._of(slice(made, None), x.detach(), index, keywords)
        return torch.cat([self._of(slice(made), x, index, keywords), origin])

    def _of(self, part: slice, x: Tensor, index: Tensor, keywords: Mapping[str, Any]) -> Tensor:
        """What the encoder makes of a part of the samples."""
        given = tree_map_only(Tensor, lambda entry: entry[part], dict(keywords))
        return self.encoder(x[part], index[part], return_dict=False, **given)[0]


def encoder_of(unet: UNet2DConditionModel, on_its_weights: bool = False) -> UNet2DConditionModel:
    """A UNet that ends after its middle: what it returns are its features [B, width, h', w'].

    It is a copy; or, `on_its_weights`, it computes with the very weights of `unet`.
    """
    left_out: dict[int, nn.Module] = {id(unet.up_blocks): nn.ModuleList(), id(unet.conv_out): nn.Identity()}
    if unet.conv_norm_out is not None:
        left_out[id(unet.conv_norm_out)] = nn.Identity()
        left_out[id(unet.conv_act)] = nn.Identity()
    return on_the_weights_of(unet, left_out) if on_its_weights else copy.deepcopy(unet, left_out)


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
        """The network for a teacher with its UNet, before any adapter is added to that."""
        return Discriminator.of(teacher, self.conditional, seed, self.rank, self.alpha)
