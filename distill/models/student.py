"""Students: how the network that is trained starts, and which network teaches it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.diffusion.prediction import Prediction
from distill.models.denoiser import NetworkDenoiser
from distill.models.exported import Exported
from distill.models.families.base import Family
from distill.models.families.loading import load_network
from distill.models.families.teacher import Teacher
from distill.models.folder import stored_tensors
from distill.models.formats import LORA_FORMATS, NAMED_FORMATS, NETWORK, NETWORK_FORMATS
from distill.models.kohya import kohya_metadata, save_kohya
from distill.models.lora import (
    ADAPTER,
    TEACHING,
    add_lora,
    fill_lora,
    load_lora,
    lora_settings,
    merge_lora,
    save_lora,
)

_log = logging.getLogger(__name__)


class LoRAStudent:
    """Adapters on the teacher's own network: switched off, it is the teacher, so there is one copy in memory.

    Args:
        rank, alpha: the adapters compute `alpha / rank * B A x`.
        targets: the modules that get one: a name of the family's (`LoRA.targets`) or modules' names; None takes the
            family's first.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    formats: tuple[str, ...] = (*LORA_FORMATS, *NETWORK_FORMATS)
    usual_formats: tuple[str, ...] = LORA_FORMATS

    def __init__(self, rank: int = 64, alpha: float = 64, targets: str | list[str] | None = None) -> None:
        if rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {rank}")
        if alpha <= 0:
            raise ValueError(f"lora_alpha must be above 0, got {alpha}")
        self.rank, self.alpha, self.targets = rank, alpha, targets

    def settle(self, start: Exported) -> dict[str, Any]:
        """The settings of this student that are left to the export it starts from: none.

        Raises:
            ValueError: that holds no LoRA, or one of another rank or alpha.
        """
        if not start.is_lora:
            raise ValueError(f"{start.folder} holds no LoRA for diffusers, and a LoRA cannot start from anything else")
        found = lora_settings(start.folder)
        for name, theirs, own in (("rank", found["r"], self.rank), ("alpha", found["lora_alpha"], self.alpha)):
            if theirs != own:
                raise ValueError(f"{start.folder} has a LoRA of {name} {theirs:g}, this run has lora_{name}={own:g}")
        return {}

    def networks(
        self,
        teacher: Teacher,
        seed: int = 0,
        keep_teacher: bool = True,
        start: Exported | None = None,
        taught_by: Exported | None = None,
    ) -> dict[str, NetworkDenoiser]:
        """The teacher's network with adapters, which is "student" with them on, and "teacher".

        Args:
            seed: of the adapters, where there is no `start`.
            keep_teacher: False leaves an earlier student out that teaches; the network itself is there anyway.
            start: a student whose LoRA the adapters start as.
            taught_by: a student that teaches in the place of the network without adapters. If it is a LoRA, it is a
                second, frozen adapter on the same network; else a second network.

        Raises:
            ValueError: an export that does not fit the network; targets that match none of its modules.
        """
        network, family = teacher.network, teacher.family
        targets = family.lora.chosen(network, self.targets)
        second = None if taught_by is None or not keep_teacher else taught_by
        if second is not None and second.is_lora:
            load_lora(network, second.folder, TEACHING, family)
        # Last: the others are frozen and off from here on.
        add_lora(network, self.rank, self.alpha, targets=targets, seed=seed, family=family)
        if start is not None:
            fill_lora(network, start.folder, family=family)
        original = teacher.denoiser()
        student = replace(original, adapter=ADAPTER)
        if second is None:
            return {"student": student, "teacher": original}
        teaching = replace(original, adapter=TEACHING) if second.is_lora else _network(teacher, second)
        return {"student": student, "teacher": teaching}

    def export_lora(
        self,
        folder: Path,
        teacher: Teacher,
        weights: Mapping[str, Tensor],
        formats: Sequence[str],
        dtype: torch.dtype,
        name: str,
    ) -> None:
        """Writes trained `weights`, by their names in the network, as LoRA files.

        Beside those of `save_lora`, each format has a file of the export's name, `kohya/<name>.safetensors`.

        Raises:
            ValueError: a weight that is missing, or that the dtype cannot hold.
        """
        metadata = kohya_metadata(teacher, name)
        save_lora(
            folder,
            teacher.network,
            weights,
            formats=formats,
            dtype=dtype,
            metadata=metadata,
            family=teacher.family,
        )
        for format in NAMED_FORMATS:
            if format in formats:
                save_kohya(folder / format / f"{name}.safetensors", teacher, weights, dtype, format)

    def finish(self, teacher: Teacher, weights: Mapping[str, Tensor]) -> None:
        """Merges trained `weights` into `teacher.network`, an ordinary network that then computes the student."""
        merge_lora(teacher.network, weights)


class FullStudent:
    """All weights of a copy of the teacher's network.

    Args:
        guidance_embedding_dim: of the Fourier features of w, for a network that does not take them already. None adds
            none: the student does not take guidance as an input; nor does one of a family whose networks cannot.
        guidance_start: of their projection into the time embedding. `zero`: the student starts as it was, blind to w.
            `random`: as torch starts a layer, so that w counts from the first step on, and changes what the student
            starts as.
        prediction: what its output is read as from now on; None leaves what the teacher's is read as, or the start's.
            For flow matching `sample` is left aside, which a line says.

    Raises:
        ValueError: a value out of its range, naming it.
    """

    formats: tuple[str, ...] = NETWORK_FORMATS
    usual_formats: tuple[str, ...] = (NETWORK,)

    def __init__(
        self,
        guidance_embedding_dim: int | None = 256,
        prediction: Literal["epsilon", "v_prediction", "sample"] | None = None,
        guidance_start: Literal["zero", "random"] = "zero",
    ) -> None:
        dim = guidance_embedding_dim
        if dim is not None and (dim < 4 or dim % 2):
            raise ValueError(f"student.guidance_embedding_dim must be even and at least 4, or null, got {dim}")
        if guidance_start not in ("zero", "random"):
            raise ValueError(f"student.guidance_start must be zero or random, got {guidance_start!r}")
        self.guidance_embedding_dim, self.guidance_start = dim, guidance_start
        self.prediction = None if prediction is None else Prediction(prediction)

    def settle(self, start: Exported) -> dict[str, Any]:
        """The settings of this student that are left to the export it starts from."""
        return {} if self.prediction or start.prediction is None else {"prediction": start.prediction.value}

    def networks(
        self,
        teacher: Teacher,
        seed: int = 0,
        keep_teacher: bool = True,
        start: Exported | None = None,
        taught_by: Exported | None = None,
    ) -> dict[str, NetworkDenoiser]:
        """ "student", which becomes `teacher.network`, and "teacher", if that is to be kept.

        Args:
            seed: of the projection of w, where it starts at random.
            start: a student whose weights it starts with, of a LoRA merged into the network's; else it starts as the
                teacher's network.
            taught_by: a student that teaches in the place of the teacher's untouched network.

        Raises:
            ValueError: an export that does not fit the network.
        """
        networks: dict[str, NetworkDenoiser] = {}
        if keep_teacher and taught_by is not None:
            networks["teacher"] = _network(teacher, taught_by)
        elif keep_teacher:
            networks["teacher"] = teacher.denoiser()
        if teacher.lent or (keep_teacher and taught_by is None):
            teacher.parts["network"] = copy.deepcopy(teacher.network)
        network, guidance = teacher.network, teacher.family.guidance
        if start is not None and start.is_lora:
            _merge(network, start, teacher.family)
        if self.guidance_embedding_dim is not None and not (guidance.weights or guidance.taken(network.config)):
            _log.warning(
                "a %s cannot be given guidance as an input: the student learns without it, as it does with "
                "student=full_unguided",
                type(network).__name__,
            )
        elif self.guidance_embedding_dim is not None:
            guidance.add(network, self.guidance_embedding_dim, seed if self.guidance_start == "random" else None)
        if start is not None and not start.is_lora:
            _fill(network, start, guidance.weights)
        network.requires_grad_(True)
        prediction = self._predicts(teacher) or (None if start is None else start.prediction)
        return {"student": teacher.denoiser_of(network, prediction)} | networks

    def _predicts(self, teacher: Teacher) -> Prediction | None:
        """What is set. Networks are made to predict clean data for the noisiest time, where a velocity does already."""
        if self.prediction is Prediction.SAMPLE and teacher.schedule.is_linear:
            _log.warning(
                "student.prediction=sample is left aside: a velocity says what clean data is at every noise level, and "
                "diffusers has no flow-matching scheduler for networks that predict clean data"
            )
            return None
        return self.prediction

    def finish(self, teacher: Teacher, weights: Mapping[str, Tensor]) -> None:
        """Puts trained `weights`, by their names in the network, into `teacher.network`."""
        network = teacher.network
        fixed = {name: x for name, x in network.state_dict().items() if name not in dict(network.named_parameters())}
        network.load_state_dict(fixed | dict(weights))  # a table of positions is no weight, and is not trained


def as_teacher(teacher: Teacher, export: Exported) -> Teacher:
    """The model with an earlier student's network in the place of its own; `Exported.weights_hash` is its identity.

    Raises:
        ValueError: an export that does not fit the network.
    """
    network = _network(teacher, export)
    return replace(
        teacher, prediction=network.prediction, weight_files=(), parts=teacher.parts | {"network": network.module}
    )


def _network(teacher: Teacher, export: Exported) -> NetworkDenoiser:
    """An earlier student as a frozen network of its own; of a LoRA, merged into a copy of the teacher's."""
    if export.is_lora:
        network = copy.deepcopy(teacher.network)
        _merge(network, export, teacher.family)
    else:
        network = load_network(export.folder, teacher.family, teacher.network.config, teacher.network.dtype)
    network.requires_grad_(False).eval()
    return teacher.denoiser_of(network, export.prediction)


def _merge(network: Any, export: Exported, family: Family) -> None:
    load_lora(network, export.folder, family=family)
    merge_lora(network)


@torch.no_grad()
def _fill(network: nn.Module, export: Exported, may_lack: Sequence[str]) -> None:
    """Sets the weights to those of an exported network, which need not take guidance as an input if this one does."""
    own = network.state_dict()
    left = set(own)
    for name, tensor in stored_tensors(export.files):
        if name not in own or own[name].shape != tensor.shape:
            wanted = list(own[name].shape) if name in own else "not in this student"
            hint = " (student.guidance_embedding_dim)" if name in may_lack else ""
            raise ValueError(f"{export.folder} does not fit: its {name} {list(tensor.shape)} is {wanted}{hint}")
        own[name].copy_(tensor)
        left.discard(name)
    if missing := sorted(left - set(may_lack)):
        raise ValueError(f"{export.folder} does not fit: it lacks {missing[0]}")
