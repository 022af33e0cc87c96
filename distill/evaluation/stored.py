"""Students against end points that the teacher has stored: needs no weights but the student's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.reader import Store
from distill.diffusion.guidance import guided
from distill.diffusion.losses import l2
from distill.diffusion.prediction import Denoiser
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import make_times
from distill.evaluation.compare import FIRST_SEED, Setting
from distill.methods.sampling import sample


@dataclass(frozen=True)
class HeldOut:
    """The last `n` samples of a trajectory store. Of them nothing is read but the first state and the last.

    Args:
        store: open; of solves from pure noise to clean latents.
        schedule: the teacher's.
        device: of the denoisers.
        notes: what a reader has to know of them.

    Raises:
        ValueError: fewer samples than `n`, or a store that is not of such solves.
    """

    store: Store
    schedule: NoiseSchedule
    n: int
    device: torch.device | str = "cpu"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        times, url = self.store.index.times, self.store.folder.url
        if (times[0], times[-1]) != (self.schedule.T, 0):
            raise ValueError(f"store={url} holds no complete solves: its times run from {times[0]} to {times[-1]}")
        if self.n > len(self.store):
            raise ValueError(f"store={url} holds {len(self.store)} samples, and {self.n} are needed")

    @property
    def name(self) -> str:
        """Which samples: of the store's plan, and of these shards' bytes."""
        shards = self.store.index.shards
        return f"last {self.n} of {len(self.store)} in {shards[0].sha256[:16]} ... {shards[-1].sha256[:16]}"

    def measure(self, denoiser: Denoiser, setting: Setting, places: range, batch_size: int) -> dict[str, Tensor]:
        """`consistency`, the mean squared difference per latent element between a sample from a solve's noise and
        conditioning and the solve's end point, and `cosine`, of the two as vectors: float64 [len(places)].

        It is sampled as `setting` says, whatever the guidance of the stored solve; solves of one size at once.
        """
        by_size: dict[int, list[int]] = {}
        for i in places:
            by_size.setdefault(self.store.size_of(len(self.store) - self.n + i), []).append(i)
        batches = [own[i : i + batch_size] for own in by_size.values() for i in range(0, len(own), batch_size)]
        parts = [self._measure(denoiser, setting, batch) for batch in batches]
        in_order = torch.tensor([i for batch in batches for i in batch]).argsort()
        return {name: torch.cat([part[name] for part in parts])[in_order] for name in parts[0]}

    def _measure(self, denoiser: Denoiser, setting: Setting, places: Sequence[int]) -> dict[str, Tensor]:
        first = len(self.store) - self.n
        samples = [self.store.read(first + i, (0, len(self.store.index.times) - 1)) for i in places]
        x, end = torch.stack([s.states.float() for s in samples], dim=1).to(self.device)  # [B, C, h, w] each
        conditioning = {
            name: torch.stack([s.conditioning[name] for s in samples]).to(self.device, torch.float32)
            for name in samples[0].conditioning
        }
        unconditional = {name: value.to(self.device, torch.float32) for name, value in self.store.unconditional.items()}
        if setting.embedded:
            conditioning["guidance"] = torch.full((len(x),), setting.guidance, device=x.device)
        follow = denoiser if setting.embedded else guided(denoiser, unconditional, setting.guidance)
        generators = [torch.Generator().manual_seed(FIRST_SEED["stored"] + i) for i in places]
        times = make_times(setting.spacing, self.schedule.T, setting.steps)
        found = sample(follow, self.schedule, x, times, conditioning, setting.sampler, generators, setting.gamma)
        cosine = F.cosine_similarity(found.double().flatten(1), end.double().flatten(1))
        return {"consistency": l2(found, end).double().cpu(), "cosine": cosine.cpu()}
