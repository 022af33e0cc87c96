"""Student against teacher on the same prompts and noise, at equal steps and at equal network evaluations.

What is reported is generated from prompts and seeds of the split "report"; what is chosen (the teacher's guidance and
spacing at few steps) is chosen on those of the split "tuning". The work is cut into blocks of pictures that do not
depend on how many processes share it: neither do the numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.data.progress import Progress
from distill.data.words import counted
from distill.diffusion.guidance import guided
from distill.diffusion.losses import l2
from distill.diffusion.prediction import Conditioning, Denoised, Denoiser
from distill.diffusion.random import starting_noise
from distill.diffusion.samplers import SAMPLERS, check_gamma, check_pair
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import make_times
from distill.evaluation.blocks import Cache, WorkShare
from distill.evaluation.metrics import METRICS
from distill.evaluation.statistics import mean_with_error
from distill.methods.sampling import sample

log = logging.getLogger(__name__)
FIRST_SEED = {"report": 10_000_000, "tuning": 20_000_000, "stored": 30_000_000}
"""Seed of a split's first picture; the next ones count up. `torch.Generator().manual_seed(seed)` makes its noise; of
a stored solve, which has its own, the noise that a sampler adds."""

DECODING = 3  # what decoding and scoring a picture costs, in network evaluations and roughly; for progress only
WORK = "units"

Row = dict[str, Any]
Advance = Callable[[int], None]


class TeacherParts(Protocol):
    """What surrounds the denoisers; `distill.models.families.teacher.Teacher` is one."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...

    def unconditional(self) -> Conditioning: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Scorer(Protocol):
    """How good pictures are. What it finds in each is small, so that thousands of large pictures need no memory."""

    @property
    def name(self) -> str:
        """Says which classifier and which protocol; results are kept under it."""

    @property
    def protocol(self) -> str:
        """Its name and what shapes its numbers beside N. Rows of another one never share a table with these."""

    @property
    def against(self) -> str:
        """What pictures are compared with that is not measured with them, such as FID's reference; or nothing."""

    @property
    def notes(self) -> Sequence[str]:
        """What else a reader has to know of how it was measured, a sentence or two each."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Metrics of the protocol that could not be measured, and why not."""

    def prompts(self, split: str, n: int) -> list[str]:
        """n prompts; those of "report" and "tuning" have different noise, and may be the same."""

    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What `summarise` needs of each of the images [B, 3, H, W] in [-1, 1]: tensors [B, ...]."""

    def summarise(self, measured: Mapping[str, Tensor], split: str) -> dict[str, float]:
        """The metrics of all pictures of a split, "frechet" among them if a teacher is tuned."""

    def difference(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor], split: str) -> dict[str, float]:
        """The metrics of `a` less those of `b`, of the same prompts and noise; errors are of the differences."""


class StoredSolves(Protocol):
    """Solves of the teacher that are stored, as noise, conditioning and end points; see `distill.evaluation.stored`."""

    @property
    def name(self) -> str: ...

    @property
    def n(self) -> int: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def measure(self, denoiser: Denoiser, setting: Setting, places: range, batch_size: int) -> dict[str, Tensor]:
        """How far the end points that `denoiser` reaches are from those of these solves: tensors [len(places)]."""


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
    gamma: float = 0.0

    def __post_init__(self) -> None:
        check_pair(self.sampler, self.spacing)
        check_gamma(self.sampler, self.gamma)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def facts(self) -> dict[str, Any]:
        """Its fields by name, for rows and for what is kept of them; without a gamma of 0, which few samplers have."""
        return {name: value for name, value in asdict(self).items() if name != "gamma" or value}

    @property
    def nfe(self) -> int:
        """Network evaluations a picture: the sampler's, which guidance doubles."""
        calls = SAMPLERS[self.sampler].evaluations(self.steps)
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


class Counting:
    """A denoiser that reports its evaluations, a unit of work for each sample of each."""

    def __init__(self, denoiser: Denoiser, advance: Advance) -> None:
        self._denoiser, self._advance, self._reported = denoiser, advance, 0

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        out = self._denoiser(x_t, t, conditioning)
        self._reported += len(x_t)
        self._advance(len(x_t))
        return out

    def complete(self, work: int) -> None:
        """Reports what is left of a batch's work."""
        self._advance(work - self._reported)
        self._reported = 0


@torch.no_grad()
def generate(
    teacher: TeacherParts,
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    setting: Setting,
    batch_size: int = 64,
    advance: Advance = lambda work: None,
) -> Iterator[Generated]:
    """Generates pictures in batches. Each has a CPU generator of its own, as a diffusers pipeline given a list of them.

    `advance` gets the work done after each network evaluation, and that of decoding after each batch.

    Raises:
        ValueError: not one seed per prompt.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"need one seed per prompt, got {len(seeds)} for {len(prompts)}")
    times = make_times(setting.spacing, teacher.schedule.T, setting.steps)
    counting = Counting(denoiser, advance)
    follow = counting if setting.embedded else guided(counting, teacher.unconditional(), setting.guidance)
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        conditioning = dict(teacher.encode(chunk))
        device = next(iter(conditioning.values())).device
        if setting.embedded:
            conditioning["guidance"] = torch.full((len(chunk),), setting.guidance, device=device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        x = starting_noise(generators, tuple(teacher.latent_shape)).to(device)
        latents = sample(follow, teacher.schedule, x, times, conditioning, setting.sampler, generators, setting.gamma)
        yield Generated(teacher.decode(latents).cpu(), latents.cpu(), chunk)
        counting.complete(setting.work * len(chunk))


@dataclass(frozen=True)
class ComparisonPlan:
    """What is compared with what.

    Args:
        guidance: the teacher's at full steps, and in the student's sampler.
        n: pictures of each row; tuning_n: of each setting tried.
        steps: of student and teacher.
        guidances, spacings: tried for the teacher at each number of steps, and the best taken. Of one guidance and
            one spacing nothing is tried.
        student_sampler, student_spacing, student_guidance, student_embedded, student_gamma: how the student is sampled
            from.
        teacher_embedded: whether guidance is an input of the teacher's network.
        tuned_by: the metric by which the teacher's settings are chosen.
        more: settings that have rows beside these.
        block_size: pictures that are made by one process, in batches of `batch_size`, and kept together.
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
    student_gamma: float = 0.0
    teacher_embedded: bool = False
    tuned_by: str = "frechet"
    more: tuple[Setting, ...] = ()
    batch_size: int = 64
    block_size: int = 250

    def reference(self) -> Setting:
        """The teacher at full steps: what the student is to equal."""
        return Setting("teacher", "ddim", self.teacher_steps, self.guidance, embedded=self.teacher_embedded)

    def candidates(self, steps: int) -> list[Setting]:
        """What the teacher's best at so many steps is chosen from."""
        tried = [(spacing, w) for spacing in self.spacings for w in self.guidances]
        return [Setting("teacher", "ddim", steps, w, spacing, self.teacher_embedded) for spacing, w in tried]

    def undistilled(self, steps: int) -> Setting:
        """The teacher's network in the student's sampler: what training has changed shows against this one."""
        sampler, spacing = self.student_sampler, self.student_spacing
        return Setting("teacher", sampler, steps, self.guidance, spacing, self.teacher_embedded, self.student_gamma)

    def student(self, steps: int) -> Setting:
        return Setting(
            "student",
            self.student_sampler,
            steps,
            self.student_guidance,
            self.student_spacing,
            self.student_embedded,
            self.student_gamma,
        )


@dataclass(frozen=True)
class Comparison:
    """All that a comparison needs. What it has finished is in `cache`: killed and started again, it resumes.

    Args:
        teacher: with text encoders and autoencoder.
        denoisers: "teacher" and, if there is one, "student"; hashes: of their weights, under the same names.
        share: which blocks are this process's; the others' are waited for.
        stored: solves that rows are held against as well.
    """

    teacher: TeacherParts
    denoisers: Mapping[str, Denoiser]
    hashes: Mapping[str, str]
    scorer: Scorer
    plan: ComparisonPlan
    cache: Cache
    share: WorkShare = WorkShare()
    stored: StoredSolves | None = None

    def rows(self) -> list[Row]:
        """The teacher at full steps; then at each number of steps the teacher's best, the undistilled teacher in the
        student's sampler, and the student.

        A row holds its setting (model, sampler, spacing, steps, guidance), nfe, n, the scorer's metrics, and
        teacher_consistency: the mean squared difference, per latent element, of its final latents from the teacher's at
        full steps from the same noise and prompt. Standard errors are called `*_se`. With `stored` there are
        stored_consistency, the same from the end points of its solves, and stored_cosine. What it was measured by is
        there too: protocol, judged_by, seeds (first and last), times, weights (their hash), left_out; and `tuned`, true
        of the teacher's best.
        """
        settings = self.settings()
        self.generate(settings)
        tuned = set(self.tune().values()) if len(self.plan.candidates(1)) > 1 else set()
        progress = Progress("summing up", len(settings), "rows", bar=self.share.rank == 0)
        rows = []
        for setting in settings:
            rows.append(self.row(setting) | ({"tuned": True} if setting in tuned else {}))
            progress.update(1)
        return rows

    def row(self, setting: Setting) -> Row:
        """The row of one setting, of the student's or the teacher's."""
        return self.cache.value(self._row_facts(setting), lambda: self._row(setting)) | self._stated(setting)

    def tuning_row(self, setting: Setting) -> Row:
        """The metrics of one setting on the tuning split, from which nothing is reported."""
        return self.cache.value(self._facts(setting, "tuning"), lambda: self._tuning_row(setting))

    def facts(self, setting: Setting) -> dict[str, Any]:
        """All that the row of a setting depends on."""
        return self._row_facts(setting)

    def generate(self, settings: Sequence[Setting]) -> None:
        """Makes this process's blocks of rows: all that a process has to do whose rank is not 0."""
        todo = [s for s in settings if self._row_facts(s) not in self.cache]
        self._generate_blocks("evaluation", "report", todo)
        if self.stored is not None:
            self._generate_blocks("stored solves", "stored", todo)

    def measured(self, setting: Setting, split: str = "report") -> dict[str, Tensor]:
        """What the scorer finds in each picture of a row, and `teacher_distance`, its latents' from the teacher's: all
        [n, ...], picture by picture of the same prompts and noise as those of any other row."""
        self._generate_blocks(f"{setting.model}, {setting.steps} steps", split, [setting])
        return _together(self.cache.awaited([self._block_facts(setting, split, b) for b in self._blocks(split)]))

    def settings(self) -> list[Setting]:
        """Those of the rows, in order; tunes the teacher first."""
        tuned, plan = self.tune(), self.plan
        settings = [plan.reference()]
        for steps in plan.steps:
            students = [plan.undistilled(steps), plan.student(steps)] if "student" in self.denoisers else []
            settings += [tuned[steps], *students, *(s for s in plan.more if s.steps == steps)]
        return list(dict.fromkeys([*settings, *plan.more]))

    def tune(self) -> dict[int, Setting]:
        """The teacher's best setting at each number of steps, by `plan.tuned_by` on the tuning split."""
        tried = {steps: self.plan.candidates(steps) for steps in self.plan.steps}
        several = [s for settings in tried.values() if len(settings) > 1 for s in settings]
        todo = [s for s in several if self._facts(s, "tuning") not in self.cache]
        self._generate_blocks("tuning the teacher", "tuning", todo)

        sign = -1 if METRICS[self.plan.tuned_by].better == "higher" else 1

        def badness(setting: Setting) -> float:
            return sign * float(self.tuning_row(setting)[self.plan.tuned_by])

        return {
            steps: min(settings, key=badness) if len(settings) > 1 else settings[0] for steps, settings in tried.items()
        }

    def pictures(self, setting: Setting, places: Sequence[int], advance: Advance = lambda work: None) -> Tensor:
        """Pictures of a row, generated again: [len(places), 3, H, W] in [-1, 1]."""
        prompts, seeds = self.scorer.prompts("report", self.plan.n), seeds_of("report", self.plan.n)
        batches = generate(
            self.teacher,
            self.denoisers[setting.model],
            [prompts[i] for i in places],
            [seeds[i] for i in places],
            setting,
            self.plan.batch_size,
            advance,
        )
        return torch.cat([batch.images for batch in batches])

    def _row(self, setting: Setting) -> Row:
        measured = self.measured(setting)
        distance = measured.pop("teacher_distance")
        row = setting.facts() | {"nfe": setting.nfe, "n": self.plan.n} | self.scorer.summarise(measured, "report")
        found = {"teacher_consistency": distance}
        if self.stored is not None:
            row["stored_n"] = self.stored.n
            found |= {f"stored_{name}": values for name, values in self.measured(setting, "stored").items()}
        for name, values in found.items():
            row[name], row[f"{name}_se"] = mean_with_error(values)
        return row

    def _tuning_row(self, setting: Setting) -> Row:
        measured = self.measured(setting, "tuning")
        return setting.facts() | {"n": self.plan.tuning_n} | self.scorer.summarise(measured, "tuning")

    def _stated(self, setting: Setting) -> Row:
        """What every row says of how it was measured."""
        return {
            "protocol": f"{self.scorer.protocol}, N = {self.plan.n}",
            "judged_by": self.scorer.name,
            "seeds": [FIRST_SEED["report"], FIRST_SEED["report"] + self.plan.n - 1],
            "times": make_times(setting.spacing, self.teacher.schedule.T, setting.steps),
            "weights": self.hashes[setting.model],
            "left_out": dict(self.scorer.left_out),
        }

    def _n(self, split: str) -> int:
        if split == "stored":
            return 0 if self.stored is None else self.stored.n
        return self.plan.tuning_n if split == "tuning" else self.plan.n

    def _blocks(self, split: str) -> list[range]:
        """The places of a split's pictures, block by block."""
        size, n = self.plan.block_size, self._n(split)
        return [range(first, min(first + size, n)) for first in range(0, n, size)]

    def _generate_blocks(self, what: str, split: str, settings: Sequence[Setting]) -> None:
        """Makes those of this process's blocks that are not there yet."""
        own = self.share.own(self._blocks(split))  # the same of every row: their reference is made by the same process
        pieces = [(s, block, self._block_facts(s, split, block)) for s in settings for block in own]
        todo = [(s, block, facts) for s, block, facts in pieces if not self.cache.has_tensors(facts)]
        work = sum(s.work * len(block) for s, block, _ in todo)
        named = what if self.share.world_size == 1 else f"{what}, rank {self.share.rank}"
        if todo:
            pictures = sum(len(block) for _, block, _ in todo)
            rows = len({setting for setting, _, _ in todo})
            log.info("%s: %s to make for %s", named, counted(pictures, "picture"), counted(rows, "row"))
        advance = Progress(named, work, WORK, bar=self.share.rank == 0).update
        for setting, block, facts in todo:
            self.cache.make(facts, lambda s=setting, b=block: self._measure(s, split, b, advance))  # type: ignore[misc]

    def _measure(self, setting: Setting, split: str, block: range, advance: Advance) -> dict[str, Tensor]:
        if split == "stored":
            assert self.stored is not None  # its split would be empty
            found = self.stored.measure(self.denoisers[setting.model], setting, block, self.plan.batch_size)
            advance(setting.work * len(block))
            return found
        if split == "tuning":
            batches = self._generate(setting, split, block, advance)
            return _together([self.scorer.measure(batch.images, batch.prompts) for batch in batches])
        is_reference = setting == self.plan.reference()
        ends = self._ends(block, advance if is_reference else lambda work: None).split(self.plan.batch_size)
        batches = self._decoded(ends, block) if is_reference else self._generate(setting, split, block, advance)
        measured, distances = [], []
        for batch, end in zip(batches, ends, strict=True):
            measured.append(self.scorer.measure(batch.images, batch.prompts))
            distances.append(l2(batch.latents, end).double())
        return _together(measured) | {"teacher_distance": torch.cat(distances)}

    def _generate(self, setting: Setting, split: str, block: range, advance: Advance) -> Iterator[Generated]:
        n = self._n(split)
        prompts, seeds = (of(split, n)[block.start : block.stop] for of in (self.scorer.prompts, seeds_of))
        denoiser = self.denoisers[setting.model]
        return generate(self.teacher, denoiser, prompts, seeds, setting, self.plan.batch_size, advance)  # type: ignore[arg-type]

    def _ends(self, block: range, advance: Advance) -> Tensor:
        """Final latents of the teacher at full steps, [len(block), C, h, w]."""
        setting = self.plan.reference()
        facts = {"latents": self._block_facts(setting, "report", block)}
        batches = self._generate(setting, "report", block, advance)  # nothing is generated until it is iterated over
        return self.cache.tensor(facts, lambda: torch.cat([batch.latents for batch in batches]))

    def _decoded(self, latents: Sequence[Tensor], block: range) -> Iterator[Generated]:
        prompts = self.scorer.prompts("report", self.plan.n)[block.start : block.stop]
        for chunk in latents:
            device = next(iter(self.teacher.encode(prompts[:1]).values())).device
            yield Generated(self.teacher.decode(chunk.to(device)).cpu(), chunk, prompts[: len(chunk)])
            prompts = prompts[len(chunk) :]

    def _facts(self, setting: Setting, split: str) -> dict[str, Any]:
        """What a result depends on."""
        facts = setting.facts() | {"scorer": self.scorer.name, "split": split, "weights": self.hashes[setting.model]}
        if split == "tuning":
            return facts | {"n": self.plan.tuning_n}
        return facts | {"n": self.plan.n, "reference": [self.plan.reference().facts(), self.hashes["teacher"]]}

    def _row_facts(self, setting: Setting) -> dict[str, Any]:
        beside = {"against": self.scorer.against, "stored": self.stored.name if self.stored is not None else ""}
        return self._facts(setting, "report") | {name: what for name, what in beside.items() if what}

    def _block_facts(self, setting: Setting, split: str, block: range) -> dict[str, Any]:
        if split == "stored":
            assert self.stored is not None
            facts = setting.facts() | {"stored": self.stored.name, "weights": self.hashes[setting.model]}
        else:
            facts = self._facts(setting, split)
        return {"measured": facts, "block": [block.start, block.stop]}


def by_protocol(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the protocol that they were measured by, which decides who may share a table; "" where none is said."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.get("protocol", ""), []).append(row)
    return found


def require_one_protocol(rows: Iterable[Row]) -> None:
    """Raises ValueError for rows of several protocols: their numbers do not compare."""
    if len(found := [name for name in by_protocol(rows) if name]) > 1:
        raise ValueError(f"rows of different protocols cannot share a table: {' | '.join(found)}")


def seeds_of(split: str, n: int) -> list[int]:
    """The seeds of a split's pictures."""
    return list(range(FIRST_SEED[split], FIRST_SEED[split] + n))


def _together(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
