"""A control for the toy teacher, the pattern's mask, and how well a picture follows it, measured in pixels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from distill.diffusion.prediction import Conditioning, Denoised, Denoiser, Prediction, to_denoised
from distill.diffusion.schedule import NoiseSchedule
from distill.toy.world import SIZE


def build_controlnet(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """A ControlNet for the toy's network, untrained: a copy of its encoder behind layers of zeros, for masks as RGB.

    Two strided layers bring a mask to the latents' size (Stable Diffusion's eightfold VAE needs three). Their weights
    start larger than diffusers' and they end without a layer of zeros: otherwise they distinguish one mask from
    another so faintly that the first hundreds of steps teach nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
        for parameter in controlnet.controlnet_cond_embedding.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)
    return controlnet


def controlled(unet: Any, controlnet: Any, control: Tensor, schedule: NoiseSchedule) -> Denoiser:
    """The noise-predicting network under a control [B, 3, H, W] in [0, 1]."""

    def call(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        added = {name: value for name, value in conditioning.items() if name != "encoder_hidden_states"}
        shown: dict[str, Any] = {
            "encoder_hidden_states": conditioning["encoder_hidden_states"],
            "added_cond_kwargs": added,
            "return_dict": False,
        }
        told = schedule.told(t)
        down, middle = controlnet(x_t, told, controlnet_cond=control, **shown)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return to_denoised(Prediction.EPSILON, unet(x_t, told, **shown, **residuals)[0], x_t, t, schedule)

    return call


def as_control(coverage: Tensor) -> Tensor:
    """The control picture [B, 3, 32, 32] in [0, 1] of `world.coverage` [B, 1, 32, 32]: white where the pattern is."""
    return coverage.expand(-1, 3, SIZE, SIZE)


def follows(images: Tensor, coverage: Tensor) -> Tensor:
    """Correlation [B], float64, of colourfulness with coverage [B, 1, H, W], over the pixels of each picture.

    Backgrounds are grey, so a pixel's largest less its smallest channel is in proportion to its share of foreground:
    pictures [B, 3, H, W] in [-1, 1] of the world itself score 1 with their own coverage. A flat picture scores 0.
    """
    colourful = images.double().amax(1) - images.double().amin(1)  # [B, H, W]
    a, b = (x - x.mean(1, keepdim=True) for x in (colourful.flatten(1), coverage.double().flatten(1)))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-9)
