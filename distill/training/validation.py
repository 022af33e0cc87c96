"""The student while it trains: pictures of the same prompts from the same noise every time, and what they are worth."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from distill.data.storage import make_folder, replace_whole
from distill.diffusion.losses import l2
from distill.diffusion.prediction import Denoiser
from distill.diffusion.random import seed_of, starting_noise
from distill.diffusion.solver import make_times
from distill.methods.base import REWARD, Method
from distill.methods.sampling import Sampling, sample
from distill.models.families.teacher import Teacher
from distill.models.files import save_file
from distill.models.rewards import Reward
from distill.training.engine import Engine
from distill.training.health import DIVERSITY
from distill.training.processes import Processes
from distill.training.tracking import Tracker, to_pictures

DIVERSITY_PROMPTS = 4


class Validation:
    """Generates `prompts` with the student's weights, or their moving average where there is one.

    The ranks share the work. Scalars are `validation/diversity`, `validation/teacher_consistency` (the mean squared
    difference of a latent's elements from `ends`), `validation/reward` (the mean score of the pictures), each if it is
    set; `validation/seconds` of this time, and `validation/share` of the time since the first step in all.

    Args:
        teacher: with its VAE.
        conditioning: of the prompts, [B, ...]; its "guidance" [B] is for a student that takes it as an input.
        steps: where `sampling` leaves them open.
        seed: of the pictures' noise.
        diversity_seeds: noises from which each of the first `DIVERSITY_PROMPTS` prompts is generated, to see how the
            results differ; 0 does not.
        sampling: how the method's students are sampled.
        ends: where the teacher gets to from the same noise, [C, h, w] each; `teacher_ends` makes them.
        reward: of pictures; CLIP's is the CLIP score.
        shapes: of each prompt's latent; None takes the teacher's own for all.
        same: the prompts as `conditioning` has them, but all for pictures of the first one's size, for diversity.
    """

    def __init__(
        self,
        teacher: Teacher,
        prompts: Sequence[str],
        conditioning: Mapping[str, Tensor],
        steps: int,
        seed: int,
        diversity_seeds: int = 0,
        sampling: Sampling = Method.sampling,
        ends: Sequence[Tensor] | None = None,
        reward: Reward | None = None,
        shapes: Sequence[tuple[int, ...]] | None = None,
        same: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.teacher, self.prompts, self.conditioning = teacher, list(prompts), dict(conditioning)
        self.sampling, self.times = sampling, sampling.times(teacher.schedule.T, steps)
        self.ends, self.reward = ends, reward
        self.shapes = list(shapes or [teacher.latent_shape] * len(prompts))
        self.same = self.conditioning if same is None else dict(same)
        self.seeds = validation_seeds(seed, len(prompts))
        many = range(min(len(prompts), DIVERSITY_PROMPTS) if diversity_seeds else 0)
        self.many_seeds = [[seed_of(seed, "diversity", i, j) for j in range(diversity_seeds)] for i in many]
        self.scores: list[float] = []  # of the last pictures, on all ranks
        self._began, self._spent = time.monotonic(), 0.0

    def __call__(self, engine: Engine, tracker: Tracker, step: int) -> dict[str, float]:
        """Called on all ranks; the main one shows the pictures, and all get the scalars."""
        began = time.monotonic()
        with engine.inference("student", ema=engine.has_ema("student")) as student:
            latents = self._generate(engine, student, self.seeds, self.conditioning, self.shapes)
            groups = [self._again(engine, student, i, seeds) for i, seeds in enumerate(self.many_seeds)]
        found: dict[str, float] = {}
        if engine.processes.is_main:
            found = self._shown(engine, tracker, latents, step)
        if groups:
            found[DIVERSITY] = diversity(torch.stack(groups))
        if self.ends is not None:
            found["validation/teacher_consistency"] = float(distances(latents, self.ends).double().mean())
        now = time.monotonic()
        self._spent += now - began
        found |= {"validation/seconds": now - began, "validation/share": self._spent / (now - self._began)}
        found, self.scores = engine.processes.from_main((found, self.scores))
        return found

    def _again(self, engine: Engine, student: Denoiser, prompt: int, seeds: Sequence[int]) -> Tensor:
        """Clean latents [B, C, h, w] of one prompt from B noises, of the first prompt's size."""
        conditioning, shapes = rows_of(self.same, [prompt] * len(seeds)), self.shapes[:1] * len(seeds)
        return torch.stack(self._generate(engine, student, seeds, conditioning, shapes))

    def _generate(
        self,
        engine: Engine,
        student: Denoiser,
        seeds: Sequence[int],
        conditioning: Mapping[str, Tensor],
        shapes: Sequence[tuple[int, ...]],
    ) -> list[Tensor]:
        """B clean latents of these shapes, on the CPU, from the noise of B seeds, of all ranks together.

        Latents of one shape are generated at once. Each rank generates as many; see `places_of`.
        """
        processes = engine.processes
        places: list[int] = []
        own: list[Tensor] = []
        for shape, alike in by_shape(shapes).items():
            mine = [alike[place] for place in places_of(processes, len(alike))]
            chosen = {k: v.to(processes.device) for k, v in rows_of(conditioning, mine).items()}
            generators = [torch.Generator().manual_seed(seeds[place]) for place in mine]
            x = starting_noise(generators, shape).to(processes.device)
            how, schedule = self.sampling, self.teacher.schedule
            found = sample(student, schedule, x, self.times, chosen, how.sampler, generators, how.gamma)
            places, own = places + mine, own + list(found.cpu())
        return in_order(processes, places, own)

    @torch.no_grad()
    def _shown(self, engine: Engine, tracker: Tracker, latents: Sequence[Tensor], step: int) -> dict[str, float]:
        """The pictures, decoded one by one to need little memory; and what they score."""
        self.teacher.to(engine.processes.device)
        pictures = [self.teacher.decode(latent[None].to(engine.processes.device))[0].cpu() for latent in latents]
        self.teacher.to("cpu")
        images = [image for picture in pictures for image in to_pictures(picture[None])]
        tracker.images("validation", images, step, self.prompts)
        if self.reward is None:
            return {}
        scores = [self.reward((p[None] + 1) / 2, [words]) for p, words in zip(pictures, self.prompts, strict=True)]
        self.scores = torch.cat(scores).double().tolist()
        return {REWARD: float(torch.cat(scores).double().mean())}


def by_shape(shapes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """The places of each shape among several, in the order in which the shapes come first."""
    found: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        found.setdefault(tuple(shape), []).append(place)
    return found


def rows_of(conditioning: Mapping[str, Tensor], places: Sequence[int]) -> dict[str, Tensor]:
    """The conditioning of the prompts at these places."""
    return {name: value[list(places)] for name, value in conditioning.items()}


def distances(latents: Sequence[Tensor], ends: Sequence[Tensor]) -> Tensor:
    """The mean squared difference of the elements of each of B latents from the other's, [B]."""
    found: dict[int, Tensor] = {}
    for alike in by_shape([tuple(latent.shape) for latent in latents]).values():
        a, b = (torch.stack([own[place] for place in alike]) for own in (latents, ends))
        found |= dict(zip(alike, l2(a, b), strict=True))
    return torch.stack([found[place] for place in sorted(found)])


def validation_seeds(seed: int, n: int) -> list[int]:
    """The seeds of the noise of n pictures."""
    return [seed_of(seed, "validation", i) for i in range(n)]


@torch.no_grad()
def teacher_ends(
    teacher: Teacher,
    denoiser: Denoiser,
    conditioning: Mapping[str, Tensor],
    seeds: Sequence[int],
    steps: int,
    processes: Processes,
    advance: Callable[[int], None] = lambda n: None,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> list[Tensor]:
    """B final latents [C, h, w] of the teacher (DDIM at trailing times), on the CPU of every rank.

    The ranks share the pictures, and each generates its own one after another: so little memory is needed beside a
    training's.

    Args:
        teacher: of its schedule and its latents' shape.
        denoiser: its network on the device of each rank, with guidance.
        conditioning: of B prompts, [B, ...].
        seeds: of their noise.
        advance: called with how many more there are.
        shapes: of each picture's latent; None takes the teacher's own for all.
    """
    times, device = make_times("trailing", teacher.schedule.T, steps), processes.device
    places, own = places_of(processes, len(seeds)), []
    shapes = shapes or [teacher.latent_shape] * len(seeds)
    for place in places:
        generators = [torch.Generator().manual_seed(seeds[place])]
        one = {name: value[place : place + 1].to(device) for name, value in conditioning.items() if name != "guidance"}
        x = starting_noise(generators, shapes[place]).to(device)
        own.append(sample(denoiser, teacher.schedule, x, times, one, "ddim", generators)[0].cpu())
        advance(processes.world_size)
    return in_order(processes, places, own)


def kept_ends(
    kept: Path,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    processes: Processes,
    make: Callable[[], Sequence[Tensor]],
    sizes: Sequence[str] = (),
) -> Sequence[Tensor]:
    """What `make` generates, or the file `kept` where a run has written it there with the same facts.

    Args:
        sizes: of the pictures, where they are not all the teacher's square.
    """
    facts = {"steps": str(steps), "guidance": f"{guidance:g}", "seeds": " ".join(map(str, seeds))}
    facts |= {"sizes": " ".join(sizes)} if sizes else {}
    found = processes.from_main(_read_ends(kept, facts) if processes.is_main else None)
    if found is not None:
        return found
    ends = make()
    if processes.is_main:
        make_folder(kept.parent)
        aside = kept.with_name(f".{kept.name}.{os.getpid()}")
        together = {"ends": torch.stack(list(ends))} if not sizes else {f"end.{i}": end for i, end in enumerate(ends)}
        save_file(together, aside, facts)
        replace_whole(aside, kept)
    return ends


def _read_ends(kept: Path, facts: Mapping[str, str]) -> Sequence[Tensor] | None:
    if not kept.is_file():
        return None
    with safe_open(kept, "pt") as file:
        if file.metadata() != facts:
            return None
    found = load_file(kept)
    return list(found["ends"]) if "ends" in found else [found[f"end.{i}"] for i in range(len(found))]


def places_of(processes: Processes, n: int) -> list[int]:
    """Which of n pictures this rank generates: as many as every other one, some of them twice if need be.

    Under ZeRO-3 all ranks must call a network together.
    """
    ranks = processes.world_size
    return [(processes.rank + i * ranks) % n for i in range(-(-n // ranks))]


def in_order(processes: Processes, places: Sequence[int], own: Sequence[Tensor]) -> list[Tensor]:
    """The pictures of all ranks by their places, from those of this one; on all of them."""
    parts = processes.gathered(list(zip(places, own, strict=True)))
    found = dict(pair for part in parts for pair in part)
    return [found[place] for place in sorted(found)]


def diversity(latents: Tensor) -> float:
    """How much latents [prompts, seeds, C, h, w] of one prompt differ: 2 if they have nothing in common, 0 if alike.

    It is the mean squared difference of an element between two seeds of a prompt, over the variance of all elements.
    """
    x = latents.double().flatten(2)
    within = x.var(1).mean()  # half of the mean squared difference of two
    return float(2 * within / x.var().clamp(min=torch.finfo(x.dtype).tiny))
