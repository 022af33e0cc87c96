"""Student against teacher on the same prompts and noise, at equal steps and at equal network evaluations.

What is reported is drawn from prompts and seeds of the split "report"; what is chosen (the teacher's guidance and
spacing at few steps) is chosen on those of the split "tuning".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.data.progress import Progress
from distill.diffusion.guidance import guided
from distill.diffusion.losses import l2
from distill.diffusion.prediction import Conditioning, Denoiser
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import TIMES, make_times
from distill.evaluation.cache import Cache
from distill.methods.sampling import SAMPLERS, sample, starting_noise

FIRST_SEED = {"report": 10_000_000, "tuning": 20_000_000}
"""Seed of a split's first picture; the next ones count up. `torch.Generator().manual_seed(seed)` makes its noise."""

DECODING = 3  # what decoding and scoring a picture costs, in network evaluations and roughly; for progress only
WORK = "units"

Row = dict[str, Any]
Advance = Callable[[int], None]


class Teacher(Protocol):
    """What surrounds the denoisers; `distill.models.families.Teacher` is one."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...

    def unconditional(self) -> Conditioning: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Scorer(Protocol):
    """How good pictures are. What it finds in each is small, so that thousands of large pictures need no memory."""

    name: str
    """Says which judge and which protocol; results are kept under it."""

    def prompts(self, split: str, n: int) -> list[str]:
        """n prompts; those of "report" and "tuning" are drawn with different noise, and may be the same."""

    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Of each of the images [B, 3, H, W] in [-1, 1], whatever `summarise` needs: tensors [B, ...]."""

    def summarise(self, measured: Mapping[str, Tensor], split: str) -> dict[str, float]:
        """The metrics of all pictures of a split, "frechet" among them."""


@dataclass(frozen=True)
class Setting:
    """One way to make pictures: which network, and how it is sampled from. Guidance 1 is none.

    `embedded`: the network takes the guidance as an input and follows it in one pass, at 1 too.
    """

    model: str
    sampler: str
    steps: int
    guidance: float = 1.0
    spacing: str = "trailing"
    embedded: bool = False

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is not known; allowed: {', '.join(SAMPLERS)}")
        if self.spacing not in TIMES:
            raise ValueError(f"spacing {self.spacing!r} is not known; allowed: {', '.join(TIMES)}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @property
    def nfe(self) -> int:
        """Network evaluations a picture: guided steps count twice, Heun's steps (but the last) too."""
        calls = 2 * self.steps - 1 if self.sampler == "heun" else self.steps
        return calls if self.guidance == 1 or self.embedded else 2 * calls

    @property
    def work(self) -> int:
        """The cost of a picture, in units of about one network evaluation."""
        return self.nfe + DECODING


@dataclass(frozen=True)
class Generated:
    """A batch of pictures: images [B, 3, H, W] in [-1, 1], the latents [B, C, h, w] they were decoded from, prompts."""

    images: Tensor
    latents: Tensor
    prompts: list[str]


@torch.no_grad()
def generate(
    teacher: Teacher,
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    setting: Setting,
    batch_size: int = 64,
    advance: Advance = lambda work: None,
) -> Iterator[Generated]:
    """Draws pictures in batches. Each has a CPU generator of its own, as a diffusers pipeline given a list of them.

    `advance` is told the work done, batch by batch.

    Raises:
        ValueError: not one seed a prompt.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"need one seed a prompt, got {len(seeds)} for {len(prompts)}")
    times = make_times(setting.spacing, teacher.schedule.T, setting.steps)
    follow = denoiser if setting.embedded else guided(denoiser, teacher.unconditional(), setting.guidance)
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        conditioning = dict(teacher.encode(chunk))
        device = next(iter(conditioning.values())).device
        if setting.embedded:
            conditioning["guidance"] = torch.full((len(chunk),), setting.guidance, device=device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        x = starting_noise(generators, tuple(teacher.latent_shape)).to(device)
        latents = sample(follow, teacher.schedule, x, times, conditioning, setting.sampler, generators)
        yield Generated(teacher.decode(latents).cpu(), latents.cpu(), chunk)
        advance(setting.work * len(chunk))


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    Args:
        guidance: the teacher's at full steps, and in the student's sampler.
        n: pictures of each row; tuning_n: of each setting tried.
        steps: of student and teacher.
        guidances, spacings: tried for the teacher at each number of steps.
        student_sampler, student_spacing, student_guidance, student_embedded: how the student is sampled from.
    """

    guidance: float
    n: int = 1000
    tuning_n: int = 240
    steps: tuple[int, ...] = (1, 2, 4, 8)
    guidances: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    spacings: tuple[str, ...] = ("leading", "trailing")
    teacher_steps: int = 50
    student_sampler: str = "lcm"
    student_spacing: str = "lcm"
    student_guidance: float = 1.0
    student_embedded: bool = False
    batch_size: int = 64

    def reference(self) -> Setting:
        """The teacher at full steps: what the student is to equal."""
        return Setting("teacher", "ddim", self.teacher_steps, self.guidance)

    def candidates(self, steps: int) -> list[Setting]:
        """What the teacher's best at so many steps is chosen from."""
        return [Setting("teacher", "ddim", steps, w, spacing) for spacing in self.spacings for w in self.guidances]

    def undistilled(self, steps: int) -> Setting:
        """The teacher's network in the student's sampler: what training has changed shows against this one."""
        return Setting("teacher", self.student_sampler, steps, self.guidance, self.student_spacing)

    def student(self, steps: int) -> Setting:
        return Setting(
            "student", self.student_sampler, steps, self.student_guidance, self.student_spacing, self.student_embedded
        )


@dataclass(frozen=True)
class Comparison:
    """All that a comparison needs. What it has finished is in `cache`: killed and started again, it goes on.

    Args:
        teacher: with text encoders and autoencoder.
        denoisers: "teacher" and "student"; hashes: of their weights, under the same names.
    """

    teacher: Teacher
    denoisers: Mapping[str, Denoiser]
    hashes: Mapping[str, str]
    scorer: Scorer
    plan: Plan
    cache: Cache

    def rows(self) -> list[Row]:
        """The teacher at full steps; then at each number of steps the teacher's best, the undistilled teacher in the
        student's sampler, and the student.

        A row holds its setting (model, sampler, spacing, steps, guidance), nfe, n, the scorer's metrics, and
        teacher_consistency: the mean squared difference, per latent element, of its final latents from the teacher's at
        full steps from the same noise and prompt. Standard errors are called `*_se`.
        """
        settings = self.settings()
        if any(self._facts(s, "report") not in self.cache for s in settings):
            self._ends()
        advance = self._progress("evaluation", "report", settings[1:])
        return [self.cache.value(self._facts(s, "report"), lambda s=s: self._row(s, advance)) for s in settings]  # type: ignore[misc]

    def row(self, setting: Setting) -> Row:
        """The row of one setting, of the student's or the teacher's."""
        return self.cache.value(self._facts(setting, "report"), lambda: self._row(setting, lambda work: None))

    def measured(self, setting: Setting, advance: Advance = lambda work: None) -> dict[str, Tensor]:
        """What the scorer finds in each picture of a row, and `teacher_distance`, its latents' from the teacher's: all
        [n, ...], picture by picture of the same prompts and noise as those of any other row."""
        return self.cache.tensors({"measured": self._facts(setting, "report")}, lambda: self._measure(setting, advance))

    def settings(self) -> list[Setting]:
        """Those of the rows, in order; tunes the teacher first."""
        tuned = self.tune()
        settings = [self.plan.reference()]
        for steps in self.plan.steps:
            settings += [tuned[steps], self.plan.undistilled(steps), self.plan.student(steps)]
        return list(dict.fromkeys(settings))

    def tune(self) -> dict[int, Setting]:
        """The teacher's best setting at each number of steps: of the lowest Frechet distance on the tuning split."""
        tried = {steps: self.plan.candidates(steps) for steps in self.plan.steps}
        advance = self._progress("tuning the teacher", "tuning", [s for settings in tried.values() for s in settings])

        def frechet(setting: Setting) -> float:
            row = self.cache.value(self._facts(setting, "tuning"), lambda: self._tuning_row(setting, advance))
            return row["frechet"]

        return {steps: min(settings, key=frechet) for steps, settings in tried.items()}

    def pictures(self, setting: Setting, places: Sequence[int]) -> Tensor:
        """Pictures of a row, drawn again: [len(places), 3, H, W] in [-1, 1]."""
        prompts, seeds = self.scorer.prompts("report", self.plan.n), seeds_of("report", self.plan.n)
        batches = generate(
            self.teacher,
            self.denoisers[setting.model],
            [prompts[i] for i in places],
            [seeds[i] for i in places],
            setting,
            self.plan.batch_size,
        )
        return torch.cat([batch.images for batch in batches])

    def _row(self, setting: Setting, advance: Advance) -> Row:
        measured = self.measured(setting, advance)
        distance, error = mean_with_error(measured.pop("teacher_distance"))
        row = asdict(setting) | {"nfe": setting.nfe, "n": self.plan.n} | self.scorer.summarise(measured, "report")
        return row | {"teacher_consistency": distance, "teacher_consistency_se": error}

    def _measure(self, setting: Setting, advance: Advance) -> dict[str, Tensor]:
        ends = self._ends().split(self.plan.batch_size)
        if setting == self.plan.reference():
            batches = self._decoded(ends)
        else:
            batches = self._generate(setting, "report", self.plan.n, advance)
        measured, distances = [], []
        for batch, end in zip(batches, ends, strict=True):
            measured.append(self.scorer.measure(batch.images, batch.prompts))
            distances.append(l2(batch.latents, end).double())
        return _together(measured) | {"teacher_distance": torch.cat(distances)}

    def _tuning_row(self, setting: Setting, advance: Advance) -> Row:
        batches = self._generate(setting, "tuning", self.plan.tuning_n, advance)
        measured = [self.scorer.measure(batch.images, batch.prompts) for batch in batches]
        return asdict(setting) | {"n": self.plan.tuning_n} | self.scorer.summarise(_together(measured), "tuning")

    def _generate(
        self, setting: Setting, split: str, n: int, advance: Advance = lambda work: None
    ) -> Iterator[Generated]:
        prompts, seeds = self.scorer.prompts(split, n), seeds_of(split, n)
        denoiser = self.denoisers[setting.model]
        return generate(self.teacher, denoiser, prompts, seeds, setting, self.plan.batch_size, advance)

    def _ends(self) -> Tensor:
        """Final latents of the teacher at full steps, [n, C, h, w]."""
        setting, n = self.plan.reference(), self.plan.n

        def compute() -> Tensor:
            advance = Progress("teacher at full steps", n * setting.work, WORK).update
            return torch.cat([batch.latents for batch in self._generate(setting, "report", n, advance)])

        return self.cache.tensor({"latents": self._facts(setting, "report")}, compute)

    def _decoded(self, latents: Sequence[Tensor]) -> Iterator[Generated]:
        prompts = self.scorer.prompts("report", self.plan.n)
        for chunk in latents:
            device = next(iter(self.teacher.unconditional().values())).device
            yield Generated(self.teacher.decode(chunk.to(device)).cpu(), chunk, prompts[: len(chunk)])
            prompts = prompts[len(chunk) :]

    def _facts(self, setting: Setting, split: str) -> dict[str, Any]:
        """What a result depends on."""
        facts = asdict(setting) | {"scorer": self.scorer.name, "split": split, "weights": self.hashes[setting.model]}
        if split == "tuning":
            return facts | {"n": self.plan.tuning_n}
        return facts | {"n": self.plan.n, "reference": [asdict(self.plan.reference()), self.hashes["teacher"]]}

    def _progress(self, what: str, split: str, settings: Sequence[Setting]) -> Advance:
        n = self.plan.tuning_n if split == "tuning" else self.plan.n
        todo = [s for s in settings if self._facts(s, split) not in self.cache]
        return Progress(what, n * sum(s.work for s in todo), WORK).update


def mean_with_error(values: Tensor) -> tuple[float, float]:
    """The mean of values [n], and its standard error."""
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def seeds_of(split: str, n: int) -> list[int]:
    """The seeds of a split's pictures."""
    return list(range(FIRST_SEED[split], FIRST_SEED[split] + n))


def _together(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
