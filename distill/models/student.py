"""Students: how the network that is trained starts from its teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

from distill.models.denoiser import NetworkDenoiser
from distill.models.families import Teacher
from distill.models.formats import LORA_FORMATS, NETWORK_FORMATS
from distill.models.kohya import save_kohya
from distill.models.lora import add_lora, merge_lora, save_lora


class LoRAStudent:
    """Adapters on the teacher's own network: switched off, it is the teacher, so there is one copy in memory.

    Args:
        rank, alpha: the adapters compute `alpha / rank * B A x`.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    formats: tuple[str, ...] = (*LORA_FORMATS, *NETWORK_FORMATS)
    usual_formats: tuple[str, ...] = LORA_FORMATS

    def __init__(self, rank: int = 64, alpha: float = 64) -> None:
        if rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {rank}")
        if alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {alpha}")
        self.rank, self.alpha = rank, alpha

    def networks(self, teacher: Teacher, seed: int = 0, keep_teacher: bool = True) -> dict[str, NetworkDenoiser]:
        """The teacher's UNet with adapters drawn from `seed`: with them on, "student"; with them off, "teacher"."""
        add_lora(teacher.unet, self.rank, self.alpha, seed=seed)
        original = teacher.denoiser()
        return {"student": replace(original, adapters=True), "teacher": original}

    def export_lora(
        self,
        folder: Path,
        teacher: Teacher,
        weights: Mapping[str, Tensor],
        formats: Sequence[str],
        dtype: torch.dtype,
        name: str,
    ) -> None:
        """Writes trained `weights`, by their names in the UNet, as LoRA files; kohya's is `kohya/<name>.safetensors`.

        Raises:
            ValueError: a weight that is missing, or that the dtype cannot hold.
        """
        save_lora(folder, teacher.unet, weights, formats=formats, dtype=dtype)
        if "kohya" in formats:
            save_kohya(folder / "kohya" / f"{name}.safetensors", teacher, weights, dtype)

    def finish(self, teacher: Teacher, weights: Mapping[str, Tensor]) -> None:
        """Merges trained `weights` into `teacher.unet`, which is then a plain network that computes the student."""
        merge_lora(teacher.unet, weights)


class FullStudent:
    """All weights of a copy of the teacher's network, which is also told the guidance to follow.

    Args:
        guidance_embedding_dim: of the Fourier features of w, for a teacher's network that does not take them already.
            Their projection into the time embedding starts at zero, so the student starts as its teacher.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    formats: tuple[str, ...] = NETWORK_FORMATS
    usual_formats: tuple[str, ...] = ("unet",)

    def __init__(self, guidance_embedding_dim: int = 256) -> None:
        if guidance_embedding_dim < 4 or guidance_embedding_dim % 2:
            raise ValueError(
                f"student.guidance_embedding_dim must be even and at least 4, got {guidance_embedding_dim}"
            )
        self.guidance_embedding_dim = guidance_embedding_dim

    def networks(self, teacher: Teacher, seed: int = 0, keep_teacher: bool = True) -> dict[str, NetworkDenoiser]:
        """ "student", which becomes `teacher.unet`, and "teacher", its untouched network, if that is to be kept."""
        original = teacher.denoiser()
        if keep_teacher:
            teacher.parts["unet"] = copy.deepcopy(teacher.unet)
        embed_guidance(teacher.unet, self.guidance_embedding_dim)
        teacher.unet.requires_grad_(True)
        student = {"student": teacher.denoiser()}
        return student | {"teacher": original} if keep_teacher else student

    def finish(self, teacher: Teacher, weights: Mapping[str, Tensor]) -> None:
        """Puts trained `weights`, by their names in the UNet, into `teacher.unet`."""
        teacher.unet.load_state_dict(dict(weights))


def embed_guidance(unet: UNet2DConditionModel, dim: int) -> None:
    """Gives `unet` the input `timestep_cond` [B, dim] (of `guidance_embedding`), without effect until it is trained."""
    if unet.config["time_cond_proj_dim"] is not None:
        return
    first: nn.Linear = unet.time_embedding.linear_1
    projection = nn.Linear(dim, first.in_features, bias=False, device=first.weight.device, dtype=first.weight.dtype)
    with torch.no_grad():
        projection.weight.zero_()
    unet.time_embedding.cond_proj = projection
    unet.register_to_config(time_cond_proj_dim=dim)
