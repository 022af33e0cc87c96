"""The runs of a comparison of methods: how long each trains for one budget, and its training, killed or not."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from distill.commands import trajectories
from distill.config.composition import group_files
from distill.config.loading import ConfigError, build, check_components, checking, load, suggest
from distill.config.settings import CompareSettings, ModelSettings, PlanSettings, TrainSettings
from distill.data.progress import Progress
from distill.diffusion.schedule import NoiseSchedule
from distill.evaluation.blocks import Cache
from distill.evaluation.compare import Row
from distill.methods.base import Method
from distill.models.families.loading import load_teacher
from distill.planning.fitting import fitting_split
from distill.planning.phases import averaged_over, prepared
from distill.training.assembly import train_run
from distill.training.ends import UNHEALTHY
from distill.training.export import export_run
from distill.training.run import finished, recorded_settings
from distill.training.teacher import located
from distill.training.tracking import cpu_seconds_of, read_metrics

log = logging.getLogger("distill")
FOLDER = "compare"
"""Of `configs/experiment/`: a file for each method, with what it is tuned to."""
SHARED = f"{FOLDER}/shared"
NOMINAL_STEPS = 1000
"""Of a run by which the cost of a step is counted, on average over its stages."""


def known_methods() -> list[str]:
    """The names that `methods` may have."""
    names = [name.removeprefix(f"{FOLDER}/") for name in group_files("experiment") if name.startswith(f"{FOLDER}/")]
    return sorted(set(names) - {SHARED.removeprefix(f"{FOLDER}/")})


@dataclass(frozen=True)
class Contestant:
    """One method's student within one budget; all seeds of it are trained for as many steps.

    Args:
        method: a file of `configs/experiment/compare/`.
        budget: "samples" or "processing", or the name of a start or a trial.
        steps: of its run.
        flops: counted of its run, and of its start's.
        start: the student that it begins from, of the same seed.
        more: overrides beyond its file's.
    """

    method: str
    budget: str
    steps: int
    flops: float
    start: Contestant | None = None
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its folders; of another number of steps it is another one."""
        return f"{self.method}-{self.budget}-{self.steps}"


@dataclass(frozen=True)
class Runs:
    """All runs of a comparison, in one folder."""

    cfg: CompareSettings

    @cached_property
    def _composed(self) -> dict[str, TrainSettings]:
        return {}

    @property
    def output(self) -> Path:
        return Path(self.cfg.output_dir)

    @property
    def store(self) -> str:
        return self.cfg.store or str(self.output / "store")

    @cached_property
    def cache(self) -> Cache:
        """Of costs, which take a while to count."""
        return Cache(self.output / "costs")

    def shared(self) -> list[str]:
        """What all runs are given beside their files."""
        model = [] if self.cfg.model is None else [f"model.pretrained_model_name_or_path={self.cfg.model}"]
        return [*model, *self.cfg.overrides, f"data.store={self.store}", "engine=single", "validation_prompts=null"]

    def overrides(self, one: Contestant, seed: int) -> list[str]:
        """What `distill train` is given for a run."""
        start = [] if one.start is None else [f"start={self.export_folder(one.start, seed)}"]
        where = [f"max_train_steps={one.steps}", f"seed={seed}", f"output_dir={self.folder(one, seed)}"]
        return [f"experiment={FOLDER}/{one.method}", *self.shared(), *one.more, *start, *where]

    def settings(self, one: Contestant, seed: int) -> TrainSettings:
        """Of a run, composed once."""
        given = self.overrides(one, seed)
        key = " ".join(given)
        if key not in self._composed:
            self._composed[key] = load("train", TrainSettings, given)
        return self._composed[key]

    def folder(self, one: Contestant, seed: int) -> Path:
        return self.output / "runs" / f"{one.name}-{seed}"

    def export_folder(self, one: Contestant, seed: int) -> Path:
        return self.output / "exports" / f"{one.name}-{seed}"

    @cached_property
    def teacher(self) -> str:
        """The pipeline folder of the teacher."""
        with checking():
            return located(self.base.model).pretrained_model_name_or_path

    @cached_property
    def base(self) -> TrainSettings:
        """The settings that all share."""
        return load("train", TrainSettings, [f"experiment={SHARED}", *self.shared()])

    def method(self, name: str) -> Method:
        """A method as a run of the shared length has it."""
        cfg = load("train", TrainSettings, [f"experiment={FOLDER}/{name}", *self.shared()])
        made: Method = build(cfg.method, schedule=self.schedule)
        return made

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The teacher's."""
        return load_teacher(self.teacher, parts=()).schedule

    # ---- budgets -----------------------------------------------------------------------------------------------------

    def flops(self, method: str, more: Sequence[str] = ()) -> float:
        """FLOPs of a step, on average over a run's stages and the period of its turns, as `distill plan` counts them.

        Raises:
            ConfigError: a method whose steps cannot be counted.
        """
        model = ModelSettings(**self.base.model.model_dump() | {"pretrained_model_name_or_path": self.teacher})
        given = [f"experiment={FOLDER}/{method}", *self.shared(), *more, "cluster=laptop"]
        given += [f"model.pretrained_model_name_or_path={self.teacher}", f"max_train_steps={NOMINAL_STEPS}"]
        cfg = load("plan", PlanSettings, given)
        facts = {"method": cfg.method, "student": cfg.student, "networks": cfg.networks, "batch": cfg.global_batch_size}
        facts |= {"rank": cfg.lora_rank, "model": model.model_dump(mode="json")}

        def counted() -> Row:
            log.info("counting the arithmetic of a step of %s", method)
            run = prepared(cfg, alone=True)
            return {"flops": averaged_over(run, lambda phase: run.samples_in(phase) * run.flops(phase))}

        return float(self.cache.value(facts, counted)["flops"])

    def contestants(self, budget: str) -> list[Contestant]:
        """The students of all methods within a budget."""
        return [self.contestant(method, budget) for method in self.cfg.methods]

    def contestant(self, method: str, budget: str, share: float = 1.0, more: tuple[str, ...] = ()) -> Contestant:
        """A method's student within a share of a budget, of which its start takes a part, if it has one."""
        begins = self.cfg.starts.get(method)
        part = 0.0 if begins is None else self.cfg.start_share
        start = None if begins is None else self._sized(begins, f"{budget}_start", share * part, budget)
        return self._sized(method, f"{budget}", share * (1 - part), budget, start, more)

    def _sized(
        self,
        method: str,
        name: str,
        share: float,
        budget: str,
        start: Contestant | None = None,
        more: tuple[str, ...] = (),
    ) -> Contestant:
        cost = self.flops(method, more)
        if budget == "samples":
            steps = share * self.cfg.samples_steps
        else:
            assert self.cfg.processing_steps is not None  # settings are settled
            steps = share * self.cfg.processing_steps * self.flops(self.cfg.baseline) / cost
        period = getattr(self.method(method), "period", 1)
        whole = max(period, round(steps / period) * period)
        before = 0.0 if start is None else start.flops
        return Contestant(method, name, whole, before + whole * cost, start, more)

    # ---- training ----------------------------------------------------------------------------------------------------

    def write_store(self) -> None:
        """The teacher's solves, unless a store is given."""
        if self.cfg.store is None:
            with command_line("trajectories", [f"experiment={SHARED}", *self.shared()]):
                trajectories.main(check_components(self.base))

    def train(self, contestants: Sequence[Contestant], seeds: Sequence[int]) -> None:
        """Trains and exports what is not there yet, the starts first; says how much is left after each run.

        Raises:
            SystemExit: a run was stopped by a signal, and saved; or it ended early. Its exit code.
            ConfigError: a run is there, of other settings.
        """
        todo = [(one, seed) for one, seed in self.in_order(contestants, seeds) if not self._is_done(one, seed)]
        own = [one.flops - (one.start.flops if one.start else 0) for one, _ in todo]
        progress = Progress("training", sum(round(flops / 1e9) for flops in own), "GFLOP")
        for number, ((one, seed), flops) in enumerate(zip(todo, own, strict=True), 1):
            log.info("run %d of %d: %s, seed %d, %d steps", number, len(todo), one.name, seed, one.steps)
            if not self._is_done(one, seed):  # its start may have diverged meanwhile
                self._train(one, seed)
            progress.update(round(flops / 1e9))
            log.info("%s", progress.line())
        for one, seed in self.in_order(contestants, seeds):
            self._check_same(one, seed)

    @staticmethod
    def in_order(contestants: Sequence[Contestant], seeds: Sequence[int]) -> list[tuple[Contestant, int]]:
        """All runs, each start before what begins from it; all methods of a seed before the next seed."""
        return [(run, seed) for seed in seeds for run in _with_starts(contestants)]

    def _is_done(self, one: Contestant, seed: int) -> bool:
        return self.export_folder(one, seed).exists() or self.diverged(one, [seed])

    def _train(self, one: Contestant, seed: int) -> None:
        folder, given = self.folder(one, seed), self.overrides(one, seed)
        if not finished(folder, one.steps):
            with command_line("train", given):
                code = train_run(check_components(self.settings(one, seed)), fitting_split)
            if code == UNHEALTHY:
                return self._note_diverged(one, seed)
            if code:
                log.warning("%s has ended before its time; the same command resumes it", folder)
                sys.exit(code)
        kind = "diffusers" if self.settings(one, seed).student["_target_"].endswith("LoRAStudent") else "network"
        export_run(folder, self.export_folder(one, seed), formats=[kind])

    def _note_diverged(self, one: Contestant, seed: int) -> None:
        log.warning("%s diverged with seed %d: it has no row, and the report says so", one.name, seed)
        self._diverged(one, seed).parent.mkdir(parents=True, exist_ok=True)
        self._diverged(one, seed).write_text(json.dumps({"method": one.method, "seed": seed}) + "\n")

    def _diverged(self, one: Contestant, seed: int) -> Path:
        return self.output / "diverged" / f"{one.name}-{seed}.json"

    def diverged(self, one: Contestant, seeds: Sequence[int]) -> bool:
        """Whether a run of the student, or of its start, did not come to its end; it is not tried again."""
        of_start = one.start is not None and self.diverged(one.start, seeds)
        return of_start or any(self._diverged(one, seed).exists() for seed in seeds)

    def _check_same(self, one: Contestant, seed: int) -> None:
        """Raises ConfigError for a run that was trained with another tuning than its file has now."""
        recorded = recorded_settings(self.folder(one, seed))
        if not recorded:
            return
        now = self.settings(one, seed).model_dump(mode="json")
        for key in ("method", "learning_rate", "global_batch_size", "optimizer", "lora_rank", "lr_scheduler"):
            before, given = recorded.get(key), now[key]
            if isinstance(before, dict):  # of an argument that was not there then, its default is what was used
                given = {name: value for name, value in given.items() if name in before}
            if before != given:
                raise ConfigError(
                    f"{self.folder(one, seed)} was trained with {key}={before}, and it is {given} now: remove that "
                    f"folder and {self.export_folder(one, seed)} to train it again"
                )

    def cpu_minutes(self, one: Contestant, seed: int) -> float:
        """Processor minutes of a run's steps, and of its start's."""
        seconds = cpu_seconds_of(read_metrics(self.folder(one, seed), one.steps))
        return seconds / 60 + (self.cpu_minutes(one.start, seed) if one.start is not None else 0)


def _with_starts(contestants: Sequence[Contestant]) -> list[Contestant]:
    found: dict[Contestant, None] = {}
    for one in contestants:
        for run in (*([one.start] if one.start else []), one):
            found[run] = None
    return list(found)


@contextmanager
def command_line(name: str, given: Sequence[str]) -> Iterator[None]:
    """A command's own arguments in `sys.argv` while it runs in this process: runs record what they were given."""
    before, sys.argv = sys.argv, [f"distill {name}", *given]
    try:
        yield
    finally:
        sys.argv = before


def check_methods(cfg: CompareSettings) -> None:
    """Raises ConfigError for names that are no methods, or a start or a baseline that cannot be."""
    known = known_methods()
    for name in (*cfg.methods, *cfg.starts.values(), cfg.baseline):
        if name not in known:
            said = f"no experiment {FOLDER}/{name}{suggest(name, known)}"
            raise ConfigError(f"methods: {said}; allowed: {', '.join(known)}")
    if cfg.baseline not in cfg.methods:
        raise ConfigError(f"baseline={cfg.baseline} is not among methods={cfg.methods}")
    for name, begins in cfg.starts.items():
        if begins in cfg.starts:
            raise ConfigError(f"starts: {name} begins from {begins}, which begins from {cfg.starts[begins]} itself")
