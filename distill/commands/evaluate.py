"""Evaluates a student beside its teacher, or a teacher alone, by a published protocol, and writes a report:

distill evaluate student=runs/a output_dir=outputs/a                       # protocol=toy, the bundled world
distill launch evaluate student=exports/a protocol=coco2014-10k \
    protocol.prompts=captions_val2014.json protocol.reference=val2014 weights.inception=inception.pth \
    model.pretrained_model_name_or_path=DIR_OR_HUB_ID \
    guidance=7.5 output_dir=outputs/a

Processes share the work by blocks of pictures; the numbers are those of one process. Killed and started again, it
resumes; finished blocks are not generated twice.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("evaluate")

import json
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.config.loading import ConfigError, checking, load, suggest
from distill.config.packages import require
from distill.config.settings import EvaluateSettings, ModelSettings, ProtocolSettings, TrainSettings
from distill.data.progress import begin
from distill.data.reader import open_store
from distill.diffusion.registry import import_plugins
from distill.evaluation.blocks import Cache, WorkShare
from distill.evaluation.compare import Comparison, ComparisonPlan, Scorer, seeds_of
from distill.evaluation.metrics import METRICS, find_metric, known_weights, plotted
from distill.evaluation.pipelines import images_at_once, plain_pipeline_agrees
from distill.evaluation.report import RunFacts, format_table, write_report
from distill.evaluation.side_by_side import flat
from distill.evaluation.stored import HeldOut
from distill.evaluation.students import LoadedStudent, load_student, parse_sampler, with_student
from distill.evaluation.toy import JudgeScorer
from distill.models.devices import described, own_device
from distill.models.execution import execute
from distill.models.exported import FACTS, read_export
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.models.folder import read_json
from distill.toy.judge import load_judge
from distill.toy.teacher import teacher_folder
from distill.training.checkpoint import Checkpoints, mark_best
from distill.training.export import export_run
from distill.training.micro_batch import within_memory
from distill.training.run import checkpoints_of, finished, read_run
from distill.training.teacher import inference_dtype, located
from distill.training.tracking import open_trackers, read_metrics, setup_logging
from distill.training.watchdog import watched

log = logging.getLogger("distill")
PROVEN = 20  # pictures that a stock pipeline generates too
STEPS = (1, 2, 4, 8)
JUDGED = 100  # pictures, at least, for the judge's Fréchet distance
TOY = "toy"


@dataclass(frozen=True)
class Source:
    """Where a student comes from: the folder it is loaded from, and the run that it is of, as far as that is known."""

    folder: Path
    run: Path | None
    settings: dict[str, Any]


@watched
@within_memory("set a smaller batch_size, or dtype=bfloat16; the same command then resumes with what is left")
def main(cfg: EvaluateSettings) -> None:
    with checking():
        share = WorkShare.launched()
    setup_logging(share.rank)
    check_metrics(cfg.protocol, cfg.weights)
    if cfg.watch is not None:
        return watch(cfg, Path(cfg.watch), share)
    with tempfile.TemporaryDirectory() as scratch:
        source = None if cfg.student is None else find_student(cfg.student, Path(scratch))
        with checking():
            comparison = build(cfg, source, share)
            if share.rank > 0:
                return comparison.generate(comparison.settings())
        try:
            report(cfg, comparison, source)
        except TimeoutError as error:
            raise ConfigError(str(error)) from None


def watch(cfg: EvaluateSettings, run: Path, share: WorkShare) -> None:
    """Evaluates each new checkpoint of a run, beside it, until it is done and all are; marks the best.

    What it finds goes to RUN/evaluation/, to trackers of the run's kinds there.
    """
    if share.world_size > 1 or cfg.student is not None:
        raise ConfigError("watch=RUN is for one process, and takes the place of student=")
    if cfg.watch_metric not in plotted():
        with checking():
            import_plugins()
    if cfg.watch_metric not in plotted():
        raise ConfigError(f"watch_metric={cfg.watch_metric} is not known; allowed: {', '.join(plotted())}")
    settings, folder = read_run(run), run / "evaluation"
    rows = read_metrics(folder, sys.maxsize)
    last = max((int(row["step"]) for row in rows), default=0)
    tracker = open_trackers(settings.tracking, folder, settings.model_dump(mode="json"), resume_step=last)
    while True:
        begin("a further checkpoint of the run")
        over = finished(run, settings.max_train_steps)  # before looking: what is saved meanwhile is not missed
        evaluated = {int(row["step"]) for row in rows}
        new = sorted(step for step, _ in Checkpoints(checkpoints_of(run)).found() if step not in evaluated)
        for step in new:
            if (found := evaluate_checkpoint(cfg, run, step)) is not None:
                tracker.log(found, step)
                rows.append({"step": step} | found)
                mark(run, rows, cfg.watch_metric)
        if over and not new:
            break
        time.sleep(0 if new else cfg.watch_seconds)
    tracker.close()


def evaluate_checkpoint(cfg: EvaluateSettings, run: Path, step: int) -> dict[str, float] | None:
    """METRIC/STEPS of a checkpoint's student; None for one that has been dropped meanwhile."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            exported = export_run(run, Path(scratch) / "student", checkpoint=step, dtype=torch.float16)
        except ConfigError as error:
            log.warning("step %d is not evaluated: %s", step, error)
            return None
        source = Source(exported, run, read_run(run).model_dump(mode="json"))
        with checking():
            comparison = build(cfg, source, WorkShare())
        measured = [comparison.row(comparison.plan.student(steps)) for steps in comparison.plan.steps]
    log.info("step %d\n%s", step, format_table(measured))
    return {f"{name}/{row['steps']}": row[name] for row in measured for name in plotted() if name in row}


def mark(run: Path, rows: Sequence[Mapping[str, float]], metric: str) -> None:
    """Marks the best of all, at the most steps of sampling that were measured."""
    keys = [key for row in rows for key in row if key.startswith(f"{metric}/")]
    if not keys:
        raise ConfigError(f"watch_metric={metric} is not among what is measured: {', '.join(rows[-1])}")
    key = max(keys, key=lambda name: int(name.rpartition("/")[2]))
    there = [row for row in rows if key in row]
    best = (max if METRICS[metric].better == "higher" else min)(there, key=lambda row: row[key])
    mark_best(checkpoints_of(run), int(best["step"]))
    log.info("best by %s: step %d, %.4g", key, best["step"], best[key])


def find_student(student: str, scratch: Path) -> Source:
    """A run's student is exported first, to `scratch`: what is evaluated is what people get.

    Raises FileNotFoundError: nothing there that could be a student.
    """
    folder = Path(student).expanduser()
    if (folder / "config.yaml").is_file():
        log.info("exporting the student of %s", folder)
        exported = export_run(folder, scratch / "student", dtype=torch.float16)
        return Source(exported, folder, read_run(folder).model_dump(mode="json"))
    if (folder / FACTS).is_file():
        return Source(folder, None, read_json(folder, FACTS).get("settings", {}))
    if not folder.is_dir():
        raise FileNotFoundError(f"student={student}: no such folder")
    return Source(folder, None, {})


def build(cfg: EvaluateSettings, source: Source | None, share: WorkShare) -> Comparison:
    """All that is loaded."""
    device = own_device(share.local_rank)
    dtype = inference_dtype(cfg.dtype, device)
    log.info("%s in %s", described(device, share.world_size), str(dtype).removeprefix("torch."))
    log.info("loading the teacher, the student and what scores them")
    begin("the teacher, the student and what scores them")
    model = teacher_model(cfg, source)
    teacher = load_teacher(
        model.pretrained_model_name_or_path,
        parts=("network", "text", "vae"),
        dtype=dtype,
        revision=model.revision,
        variant=model.variant,
        allow_distilled=source is not None,  # whoever trained the student has decided it
        text_dtype=getattr(torch, model.text_dtype),
        max_tokens=model.max_tokens,
    )
    teacher = at_resolution(teacher, cfg.protocol.resolution).at_shift(shift_of(source))
    denoisers, hashes = {"teacher": teacher.denoiser()}, {"teacher": stated(teacher.teacher_hash, dtype)}
    student = None if source is None else load_student(source.folder, teacher)
    if student is not None:
        student.denoiser.module.to(device)
        denoisers["student"], hashes["student"] = student.denoiser, stated(student.weights, dtype)
    teacher.to(device)
    for network in {id(one.module): one.module for one in denoisers.values()}.values():  # a LoRA is on its teacher's
        execute(network, cfg.compile, cfg.channels_last)
    kept = Path(cfg.output_dir) / "evaluation"
    return Comparison(
        teacher=teacher,
        denoisers=denoisers,
        hashes=hashes,
        scorer=scorer_of(cfg.protocol, cfg.n or cfg.protocol.n, cfg.weights, teacher, kept, str(device)),
        plan=plan_of(cfg, source, student, teacher),
        cache=Cache(kept, writes=share.rank == 0),
        share=share,
        stored=stored_of(cfg, source, teacher, str(device)),
    )


def shift_of(source: Source | None) -> float | None:
    """Of the noise levels that an exported student learned; None without flow matching."""
    if source is None or not (source.folder / FACTS).is_file():
        return None
    return read_export(source.folder).shift


def at_resolution(teacher: Teacher, wanted: int | None) -> Teacher:
    """The teacher for pictures of another side, in pixels, with a warning where that is not its own."""
    if wanted not in (None, teacher.resolution):
        own = f"the teacher's own is {teacher.resolution}: protocol.resolution=null takes that"
        log.warning("pictures of %d px are generated, as protocol.resolution says; %s", wanted, own)
    return teacher.at_resolution(wanted)


def stated(weights: str, dtype: torch.dtype) -> str:
    """The hash of weights with their precision: in another one they generate other pictures."""
    return weights if dtype == torch.float32 else f"{weights} in {str(dtype).removeprefix('torch.')}"


def teacher_model(cfg: EvaluateSettings, source: Source | None) -> ModelSettings:
    """The teacher that is set, or the one that the student was distilled from where that is known to be there.

    It is a pipeline's folder or hub id, whatever it was made of.
    """
    own = {} if source is None else source.settings.get("model", {})
    given = cfg.model.model_dump() | {key: own[key] for key in ("max_tokens", "text_dtype") if own.get(key) is not None}
    if cfg.model.pretrained_model_name_or_path is None and source is not None and source.run is not None:
        given |= {key: own[key] for key in ("config", "loras") if key in own}
    return located(ModelSettings(**given | {"pretrained_model_name_or_path": _teacher_path(cfg, source, own)}))


def _teacher_path(cfg: EvaluateSettings, source: Source | None, own: Mapping[str, Any]) -> str:
    path = cfg.model.pretrained_model_name_or_path or own.get("pretrained_model_name_or_path")
    if cfg.model.pretrained_model_name_or_path is None and source is not None and source.run is None:
        path = path if path and "/" in path else None  # of a folder an export keeps the last name only
    if path is None and cfg.protocol.name == TOY:
        return str(teacher_folder())
    if path is None:
        raise ConfigError("which teacher? Set model.pretrained_model_name_or_path=DIR_OR_HUB_ID")
    return path


def scorer_of(
    of: ProtocolSettings, n: int, weights: Mapping[str, str | None], teacher: Teacher, kept: Path, device: str
) -> Scorer:
    """What measures n pictures by a protocol; `kept` is for statistics of real pictures.

    Raises:
        ConfigError: a protocol without prompts, or too few pictures.
    """
    if of.prompts is None:
        if of.metrics != ["judge"]:
            raise ConfigError(f"protocol {of.name} has no prompts: set protocol.prompts=FILE")
        if n < JUDGED:
            raise ConfigError(f"n={n}: the judge's Fréchet distance takes at least {JUDGED} pictures")
        return JudgeScorer(load_judge().to(device))
    require(f"protocol={of.name}", "torchvision", "torchmetrics", "open_clip")
    from distill.evaluation.protocol import Protocol, build_scorer, read_captions

    protocol = Protocol(
        name=of.name,
        used_by=of.used_by,
        n=n,
        side=teacher.resolution,
        reference=of.reference,
        matching=of.matching,
        shown_at=of.shown_at,
        clip=of.clip,
        clip_weights=of.clip_weights,
        clip_prefix=of.clip_prefix,
        metrics=tuple(of.metrics),
    )
    return build_scorer(protocol, read_captions(of.prompts, n), weights, kept, device)


def check_metrics(protocol: ProtocolSettings, weights: Mapping[str, str | None]) -> None:
    """Raises ConfigError for a metric that is not known, or weights that none is loaded from."""
    if protocol.prompts is None:  # the toy's classifier is none of them
        return
    with checking():
        for name in protocol.metrics:
            find_metric(name)
    if unknown := [name for name in weights if name not in known_weights()]:
        said = f"weights.{unknown[0]} is of no metric{suggest(unknown[0], known_weights())}"
        raise ConfigError(f"{said}; allowed: {', '.join(known_weights())}")


def plan_of(
    cfg: EvaluateSettings, source: Source | None, student: LoadedStudent | None, teacher: Teacher
) -> ComparisonPlan:
    of, guidance = cfg.protocol, teacher_guidance(cfg, source)
    own = None if student is None else student.sampling.steps
    plan = ComparisonPlan(
        guidance=guidance,
        n=cfg.n or of.n,
        tuning_n=of.tuning_n,
        steps=tuple(cfg.steps or ([own] if own else STEPS)),
        guidances=tuple(of.tuning_guidances) if of.tuning_n else (guidance,),
        spacings=("leading", "trailing") if of.tuning_n else ("trailing",),
        teacher_steps=cfg.teacher_steps,
        batch_size=cfg.batch_size or images_at_once(teacher.resolution),
        block_size=cfg.block_size,
        teacher_embedded=teacher.takes_guidance,
    )
    if student is None:
        return plan
    if own is not None and plan.steps != (own,):
        log.warning("the student was made for %d steps, and is sampled in %s", own, ", ".join(map(str, plan.steps)))
    samplings = [parse_sampler(text, student.sampling) for text in cfg.samplers or [student.sampling.sampler]]
    return with_student(plan, student, samplings, cfg.guidances or [guidance if student.embedded else 1.0])


def teacher_guidance(cfg: EvaluateSettings, source: Source | None) -> float:
    found = {} if source is None else source.settings.get("data", {})
    guidance = found.get("guidance") if cfg.guidance is None else cfg.guidance
    if not isinstance(guidance, (int, float)):
        what = "there is no run that says it" if guidance is None else f"data.guidance of the run is {guidance}"
        raise ConfigError(
            f"the teacher's guidance is not known ({what}): set guidance=W, for the teacher to compare with"
        )
    return float(guidance)


def stored_of(cfg: EvaluateSettings, source: Source | None, teacher: Teacher, device: str) -> HeldOut | None:
    if cfg.store is None:
        return None
    trained = {} if source is None else source.settings.get("data", {})
    own = trained.get("store") is not None and Path(trained["store"]).resolve() == Path(cfg.store).resolve()
    note = f"""Stored ends: of the last {cfg.store_samples} samples of {Path(cfg.store).name}, from their own noise."""
    note += " The student was trained on this store: they are not held out." if own else ""
    if own:
        log.warning("store=%s is the one that the student was trained on: its samples are not held out", cfg.store)
    return HeldOut(open_store(cfg.store), teacher.schedule, cfg.store_samples, device, (note,))


def report(cfg: EvaluateSettings, comparison: Comparison, source: Source | None) -> None:
    """Waits for the other processes, and writes what all have found."""
    toy = isinstance(comparison.scorer, JudgeScorer)
    rows = write_report(
        Path(cfg.output_dir) / "report",
        comparison,
        about=about(cfg, comparison, source),
        reproduce=f"distill evaluate {shlex.join(sys.argv[1:])}",
        real=comparison.scorer.real_pictures(comparison.plan.n) if isinstance(comparison.scorer, JudgeScorer) else None,
        run=None if source is None or source.run is None else facts_of(source.run),
        agreement=agreement(cfg, comparison, source) if toy and source is not None else None,
    )
    print(format_table(rows))
    print(f"report: {cfg.output_dir}/report/index.html; report.md, metrics.json and pictures lie beside it")


def facts_of(run: Path) -> RunFacts:
    """What the report says of the run that a student comes from."""
    metrics = run / "metrics.jsonl"
    environment = json.loads((run / "environment.json").read_text()) if (run / "environment.json").is_file() else {}
    environment |= {"packages": ", ".join(f"{name} {v}" for name, v in environment.get("packages", {}).items() if v)}
    return RunFacts(
        metrics if metrics.is_file() else None,
        departures(run),
        (run / "config.yaml").read_text(),
        {name: value for name, value in environment.items() if value},
    )


def departures(run: Path) -> dict[str, tuple[Any, Any]] | None:
    """The run's settings that are not its experiment's; None if it was not started by the name of one."""
    given = (run / "overrides.txt").read_text().split() if (run / "overrides.txt").is_file() else []
    names = [argument for argument in given if argument.startswith("experiment=")]
    if not names:
        return None
    try:
        there = flat(load("train", TrainSettings, names).model_dump(mode="json"))
    except ConfigError:  # an experiment that is no longer there
        return None
    here = flat(read_run(run).model_dump(mode="json"))
    keys = [key for key in there | here if there.get(key) != here.get(key)]
    return {key: (there.get(key, "—"), here.get(key, "—")) for key in keys}


def agreement(cfg: EvaluateSettings, comparison: Comparison, source: Source) -> float:
    """How far a stock diffusers pipeline with the exported student is from our own pictures; raises if it is far."""
    steps = 4 if 4 in comparison.plan.steps else comparison.plan.steps[0]
    expected = comparison.pictures(comparison.plan.student(steps), range(PROVEN))
    prompts, seeds = comparison.scorer.prompts("report", PROVEN), seeds_of("report", PROVEN)
    guidance = comparison.plan.student_guidance
    path = teacher_model(cfg, source).pretrained_model_name_or_path
    log.info("generating %d pictures in a stock diffusers pipeline too", PROVEN)
    begin("the pictures of a stock diffusers pipeline")
    difference = plain_pipeline_agrees(path, source.folder, prompts, seeds, steps, expected, guidance)
    if difference > 1e-2:
        raise RuntimeError(
            f"a stock diffusers pipeline generates other pictures: greatest difference {difference:.3g} of 2"
        )
    return difference


def about(cfg: EvaluateSettings, comparison: Comparison, source: Source | None) -> str:
    teacher = comparison.teacher
    name = teacher.teacher_id if isinstance(teacher, Teacher) else "the teacher"
    if source is None:
        return f"The teacher {name} alone; guidance {comparison.plan.guidance:g}."
    settings = source.settings
    if not settings.keys() >= {"student", "method"}:
        what = Path(str(cfg.student)).name
        return f"{what}, a student of {name}; the teacher's guidance {comparison.plan.guidance:g}."
    kind = str(settings["student"]["_target_"]).rpartition(".")[2]
    method = str(settings["method"]["_target_"]).rpartition(".")[2]
    what = f"A LoRA of rank {settings['lora_rank']}" if kind == "LoRAStudent" else "A full network"
    trained = f"{settings['max_train_steps']} steps of {settings['global_batch_size']} samples"
    return f"{what} for {name}, by {method}: {trained}; the teacher's guidance {comparison.plan.guidance:g}."
