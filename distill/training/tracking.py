"""Tracking: a run's scalars and pictures go to files in its folder, and to wandb and TensorBoard where set.

The local file is the record. What is beyond it (a network, a service) may fail at any time and never holds a step up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import queue
import re
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import diffusers
import numpy as np
import psutil
import torch
import transformers
from hydra.utils import get_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from distill.data.storage import replace_whole
from distill.models.devices import gpu_is_used
from distill.training.skipped import Skipped

logger = logging.getLogger(__name__)

Scalars = Mapping[str, float]
SKIPPED = "skipped_batches.jsonl"


class Tracker(Protocol):
    """Where a run's numbers and pictures go. `step` counts the optimizer steps taken."""

    def log(self, scalars: Scalars, step: int) -> None: ...

    def images(self, name: str, images: Sequence[Image.Image], step: int, captions: Sequence[str] = ()) -> None: ...

    def close(self) -> None: ...


def open_trackers(
    tracking: Mapping[str, Mapping[str, Any]],
    folder: Path,
    config: Mapping[str, Any],
    *,
    resume_step: int = 0,
    main: bool = True,
) -> Trackers:
    """One tracker that hands on to metrics.jsonl, always, and to those of `tracking`; on other ranks to none.

    Args:
        tracking: nodes with a `_target_` by name. Of `folder`, `config` and `resume_step` each gets those that it
            takes. A target may have `abandon()`, which is called where it does not end, see `Background`.
        config: the run's settings.
        resume_step: steps that the run had taken where it resumes (0: a new run). What was logged beyond is cut.
    """
    if not main:
        return Trackers([])
    facts = {"folder": folder, "config": config, "resume_step": resume_step}
    trackers: list[Tracker] = [JsonlTracker(folder, resume_step)]
    for name, node in tracking.items():
        target = get_object(node["_target_"])
        taken = {key: value for key, value in facts.items() if key in signature(target).parameters}
        start = partial(target, **{key: value for key, value in node.items() if key != "_target_"}, **taken)
        trackers.append(Background(name, start, abandon=getattr(target, "abandon", lambda: None)))
    return Trackers(trackers)


class Trackers:
    """Several trackers as one; scalars may arrive as tensors of one element."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def log(self, scalars: Mapping[str, float | Tensor], step: int) -> None:
        numbers = {name: float(value) for name, value in scalars.items()} if self.trackers else {}
        for tracker in self.trackers:
            tracker.log(numbers, step)

    def images(self, name: str, images: Sequence[Image.Image], step: int, captions: Sequence[str] = ()) -> None:
        for tracker in self.trackers:
            tracker.images(name, images, step, captions)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


class JsonlTracker:
    """metrics.jsonl: one object a line, `step` first; pictures as samples/step-000100/<name>-00.png.

    Each line reaches the operating system at once, so a killed process loses none. Lines beyond `resume_step` are cut
    on opening: a run that was interrupted and resumed leaves the file of one that was not. Numbers that JSON has no
    word for are the strings "nan", "inf" and "-inf". While the disk is full, lines wait in memory, and pictures are
    given up; each is a warning.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        cut_after(path, resume_step)
        self._file = open(path, "ab", buffering=0)
        self._waiting = b""

    def log(self, scalars: Scalars, step: int) -> None:
        waited = len(self._waiting)
        self._waiting += _line(scalars, step)
        try:
            self._write()
        except OSError as error:
            if not waited:
                logger.warning("metrics.jsonl cannot be written, its lines wait in memory: %s", error)

    def images(self, name: str, images: Sequence[Image.Image], step: int, captions: Sequence[str] = ()) -> None:
        folder = self.folder / "samples" / f"step-{step:06d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images):
                image.save(folder / f"{name}-{i:02d}.png")
        except OSError as error:
            logger.warning("pictures of step %d are not written: %s", step, error)

    def close(self) -> None:
        try:
            self._write()
        except OSError as error:
            logger.error("metrics.jsonl lacks its last %d lines: %s", self._waiting.count(b"\n"), error)
        self._file.close()

    def _write(self) -> None:
        if os.fstat(self._file.fileno()).st_nlink == 0:  # somebody has removed it: what follows goes to a new one
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file.close()
            self._file = open(self.folder / "metrics.jsonl", "ab", buffering=0)
        while self._waiting:  # a full disk may take a part
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def note_skipped(folder: Path, skipped: Skipped) -> None:
    """Adds an update that was skipped, with the keys of its samples, to the skipped_batches.jsonl of a run's folder.

    Its `step` is the one of metrics.jsonl that shows it.
    """
    scalars = {"loss": skipped.loss, "grad_norm": skipped.grad_norm}
    try:
        with open(Path(folder) / SKIPPED, "ab") as file:
            file.write(_line(scalars, skipped.step + 1, network=skipped.network, keys=skipped.keys))
    except OSError as error:
        logger.warning("%s cannot be written: %s", SKIPPED, error)


def _line(scalars: Scalars, step: int, **more: Any) -> bytes:
    row = {name: value if math.isfinite(value) else str(value) for name, value in scalars.items()}
    return (json.dumps({"step": step, **row, **more}) + "\n").encode()


def cut_after(path: Path, step: int) -> None:
    """Drops the lines beyond `step`, and torn ones, of a metrics.jsonl or skipped_batches.jsonl: all, or none."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if 0 <= _step_of(line) <= step]
    if len(kept) == len(lines):
        return
    logger.info("%s: %d lines beyond step %d (or torn) cut", path.name, len(lines) - len(kept), step)
    whole = path.with_suffix(".tmp")
    with open(whole, "w", encoding="utf-8") as file:
        file.writelines(kept)
    replace_whole(whole, path)


def read_metrics(folder: Path, step: int) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl up to `step`, without torn ones; "nan", "inf" and "-inf" are numbers again."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if 0 <= _step_of(line) <= step]
    return [{name: float(value) for name, value in row.items()} for row in rows]


def cpu_seconds_of(rows: Sequence[Mapping[str, float]]) -> float:
    """The processor time that a run had taken by the last of its metrics' lines; 0 where none says so."""
    return next((row["cpu_seconds"] for row in reversed(rows) if math.isfinite(row.get("cpu_seconds", math.nan))), 0.0)


def time_left(rows: Sequence[Mapping[str, float]], step: int, total: int) -> str:
    """How long the steps after `step` will take, in words, by the pace that a run's metrics last had."""
    pace = next((row["step_seconds"] for row in reversed(rows) if "step_seconds" in row), None)
    if pace is None or not math.isfinite(pace):
        return "whose time is known after the first few"
    return f"about {tqdm.format_interval(pace * (total - step))} at {pace:.3g} s per step, as before"


def _step_of(line: str) -> int:
    """The line's step; -1 for a torn line."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1


class Background:
    """Runs another tracker in a thread of its own, so that neither its failures nor its waiting reach the training.

    Calls go through a bounded queue. When it is full they are dropped, and counted in a warning. Failures are warned
    about once; a tracker that cannot start is left out. One that does not end within `patience` seconds of `close` is
    given up: `abandon` is called, and must see to it that it cannot hold up the end of the process either.

    The thread starts with the first call, when the workers of the data loader are there. To start a tracker may start
    processes, and a worker that is forked at that moment keeps the pipe open at whose end its parent waits: for ever.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Tracker],
        capacity: int = 1000,
        patience: float = 60.0,
        abandon: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.patience, self.dropped = name, patience, 0
        self._abandon = abandon
        self._failed = False
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"tracker-{name}", daemon=True)
        self._started = False

    def log(self, scalars: Scalars, step: int) -> None:
        self._put(lambda tracker: tracker.log(scalars, step))

    def images(self, name: str, images: Sequence[Image.Image], step: int, captions: Sequence[str] = ()) -> None:
        self._put(lambda tracker: tracker.images(name, images, step, captions))

    def close(self) -> None:
        """Waits at most `patience` seconds for what is still in the queue."""
        if not self._started:
            return
        deadline = time.monotonic() + self.patience
        try:
            self._calls.put(None, timeout=self.patience)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            pass  # stuck: the thread is still alive
        if self._thread.is_alive():
            logger.warning("%s did not finish within %.0f s and is given up", self.name, self.patience)
            self._abandon()

    def _put(self, call: Callable[[Tracker], None]) -> None:
        if not self._started:
            self._thread.start()
            self._started = True
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self.dropped += 1
            if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, 8, ...: seen, but no flood
                logger.warning(
                    "%s is too slow: %d calls dropped so far (metrics.jsonl has them)", self.name, self.dropped
                )

    def _work(self, start: Callable[[], Tracker]) -> None:
        tracker = self._guard(start)
        while (call := self._calls.get()) is not None:
            if tracker is not None:
                self._guard(lambda call=call: call(tracker))  # type: ignore[misc]
        if tracker is not None:
            self._guard(tracker.close)

    def _guard(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a service throws: it is not the training's business
            if not self._failed:
                first_line = (str(error).splitlines() or [""])[0]
                logger.warning(
                    "%s failed; metrics.jsonl continues, and further failures are not shown: %s: %s",
                    self.name,
                    type(error).__name__,
                    first_line,
                )
            self._failed = True
            return None


class WandbTracker:
    """A wandb run whose id follows from the run folder, so that a requeued job finds its own. Blocks, and may raise.

    Args:
        project, entity, group, tags, mode: wandb's own; None leaves them to its variables (WANDB_PROJECT, WANDB_MODE).
        resume: whether wandb resumes a run of this id: where there is one ("allow"), or has to be ("must"), or not at
            all ("never").
    """

    package = "wandb"

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["online", "offline", "disabled"] | None = None,
        resume: Literal["allow", "must", "never"] = "allow",
    ) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=project or os.environ.get("WANDB_PROJECT") or "distill",
            entity=entity,
            group=group,
            tags=list(tags) or None,
            name=Path(folder).name,
            id=run_id(folder),
            dir=str(folder),
            config=dict(config),
            mode=mode,
            resume=resume,
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        # wandb's own step may not fall, which a run resumed from an earlier checkpoint needs
        self._run.define_metric("*", step_metric="step")
        logger.info("wandb: run %s, %s", self._run.id, "offline" if self._run.offline else self._run.url)

    def log(self, scalars: Scalars, step: int) -> None:
        self._run.log({**scalars, "step": step})

    def images(self, name: str, images: Sequence[Image.Image], step: int, captions: Sequence[str] = ()) -> None:
        titles = captions or [""] * len(images)
        pictures = [self._wandb.Image(image, caption=title) for image, title in zip(images, titles, strict=True)]
        self._run.log({name: pictures, "step": step})

    def close(self) -> None:
        self._run.finish()

    @staticmethod
    def abandon() -> None:
        """Kills the service process that wandb started for us: its exit hook would wait for it for ever."""
        for process in psutil.Process().children():
            if process.name().startswith("wandb-core"):
                process.kill()


def run_id(folder: Path) -> str:
    """A wandb id for a run folder: its name and a hash of its place; the same at every start."""
    place = Path(folder).resolve()
    readable = re.sub(r"[^A-Za-z0-9_.-]", "-", place.name)[:40]
    return f"{readable}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"


class TensorboardTracker:
    """Event files under tensorboard/ in the run folder; events beyond `resume_step` are marked as gone."""

    package = "tensorboard"

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=resume_step + 1)

    def log(self, scalars: Scalars, step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def images(self, name: str, images: Sequence[Image.Image], step: int, captions: Sequence[str] = ()) -> None:
        for i, image in enumerate(images):
            self._writer.add_image(f"{name}/{i:02d}", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def to_pictures(images: Tensor) -> list[Image.Image]:
    """RGB pictures of images [B, 3, H, W] in [-1, 1]; what lies outside is clipped."""
    bytes_ = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in bytes_]


class Meter:
    """Measures speed between two readings, and how much longer the run will take.

    Args:
        total: steps of the run; `done`: those taken before this start.
        samples: of a step, over all ranks; or what says so of a step by its number.
        clock: seconds, rising.
        cpu_seconds: processor time that this process had taken for the steps before this start.
        cpu_clock: seconds of processor time of this process, all its threads together.
    """

    def __init__(
        self,
        total: int,
        samples: int | Callable[[int], int],
        done: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        cpu_seconds: float = 0.0,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self.total, self.samples, self.done = total, samples, done
        self._cpu_clock, self._cpu_began = cpu_clock, cpu_clock() - cpu_seconds
        self._clock = clock
        self._since, self._steps, self._taken, self._waited = clock(), 0, 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Surrounds the wait for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @property
    def since(self) -> tuple[int, float]:
        """Steps since the last reading, and seconds in which they waited for data."""
        return self._steps, self._waited

    def step(self) -> None:
        """Counts a step, after it."""
        self._taken += self.samples if isinstance(self.samples, int) else self.samples(self.done)
        self.done += 1
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Measured over the steps since the last reading: samples_per_second, data_wait (share of the time, 0 ... 1),
        step_seconds; peak_memory_gib and cpu_seconds so far; eta_seconds at this pace. Starts again.

        cpu_seconds is the processor time of this process since its steps began, validation and checkpoints included,
        and over all starts of the run: unlike step_seconds, it does not grow with what else a machine does.
        """
        now = self._clock()
        seconds = max(now - self._since, 1e-9)
        pace = seconds / max(self._steps, 1)
        numbers = {
            "samples_per_second": self._taken / seconds,
            "data_wait": self._waited / seconds,
            "step_seconds": pace,
            "peak_memory_gib": peak_memory_gib(),
            "cpu_seconds": self._cpu_clock() - self._cpu_began,
            "eta_seconds": pace * (self.total - self.done),
        }
        self._since, self._steps, self._taken, self._waited = now, 0, 0, 0.0
        return numbers


def peak_memory_gib() -> float:
    """The most memory this process has held: the accelerator's if there is one, else main memory."""
    if gpu_is_used():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def setup_logging(rank: int = 0, stream: TextIO | None = None) -> None:
    """Log lines with time and rank on `stream` (standard error): ours from INFO on rank 0, warnings from all others."""
    handler = _BarSafe(stream or sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [{rank}] %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("distill").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for library in (diffusers, transformers):  # they print bars into log files, and warn of what is intended
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    # Newer diffusers say `dtype`; the oldest that we support knows `torch_dtype` alone.
    warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)


class _BarSafe(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes log lines above a progress bar, not into it.

    tqdm's lock is shared with all forked processes, and stays locked for ever if one of them is killed as it holds it:
    it is taken where there may be a bar, and nowhere else.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._bars = wants_bar(stream)

    def emit(self, record: logging.LogRecord) -> None:
        if self._bars:
            tqdm.write(self.format(record), file=self.stream)
        else:
            super().emit(record)


FEW = 5  # steps after which a run's pace is known; the first one, which allocates and compiles, is left out


class TrainingProgress:
    """Shows where a run is: a bar on a terminal, elsewhere (and always in SLURM) a log line for each `show`.

    Without a bar, a line after the first few steps says how long the run will take.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None, main: bool = True) -> None:
        stream = stream or sys.stderr
        self.total, self._done = total, done
        self._main = main
        self._start = done
        self._first_ended = 0.0
        self._bar = tqdm(total=total, initial=done, file=stream, unit="step") if main and wants_bar(stream) else None

    def step(self) -> None:
        """Counts a step, after it."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif self._done == self._start + 1:
            self._first_ended = time.monotonic()
        elif self._done == self._start + FEW and self._main and self._done < self.total:
            pace = (time.monotonic() - self._first_ended) / (FEW - 1)
            left = tqdm.format_interval(pace * (self.total - self._done))
            logger.info("step %d/%d: about %s left at %.3g s per step", self._done, self.total, left, pace)

    def show(self, step: int, scalars: Scalars) -> None:
        """The scalars of a step; those that `Meter.read` gives are written with their units."""
        if self._bar is not None:
            self._bar.set_postfix_str(describe(scalars))
        elif self._main:
            logger.info("step %d/%d (%.0f %%)  %s", step, self.total, 100 * step / self.total, describe(scalars))

    def show_validation(self, step: int, scalars: Scalars) -> None:
        """What a validation has found, on a line of its own."""
        if self._main:
            found = {name.removeprefix("validation/"): value for name, value in scalars.items()}
            logger.info("step %d/%d validation  %s", step, self.total, describe(found))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def wants_bar(stream: TextIO) -> bool:
    """Whether somebody sits in front of this stream."""
    return stream.isatty() and "SLURM_JOB_ID" not in os.environ


LINE = 180
"""Characters of a line of scalars: adversarial training has too many for one; all are in metrics.jsonl."""
_WEIGHT = (  # how soon a scalar is left out of a line that is too long; by what its name matches, the first that does
    (re.compile(r"(^|/)loss$|samples_per_second|eta_seconds|^stage$|^alarm/|skipped$"), 0),
    (re.compile(r"_loss$|accuracy$|^reward$|data_wait|^lr$|^validation/"), 1),
    (re.compile(r"grad_norm$|peak_memory_gib|(^|/)lr$"), 2),
    (re.compile(r""), 3),
)


def describe(scalars: Scalars) -> str:
    """One line of scalars for people: `loss 0.1234  lr 1e-04  812 samples/s  data 3 %  0.4 GiB  eta 12:31`.

    Alarms that are off and updates that were not skipped are left out, and so are, where the line would be longer than
    `LINE`, the least important ones.
    """
    units: dict[str, Callable[[float], str]] = {
        "samples_per_second": lambda v: f"{v:.4g} samples/s",
        "data_wait": lambda v: f"data {100 * v:.0f} %",
        "step_seconds": lambda v: "",
        "peak_memory_gib": lambda v: f"{v:.1f} GiB",
        "eta_seconds": lambda v: f"eta {tqdm.format_interval(v)}",
    }
    words = {name: units[name](value) if name in units else f"{name} {value:.4g}" for name, value in scalars.items()}
    quiet = [name for name, value in scalars.items() if value == 0 and re.search(r"(^|/)skipped$|^alarm/", name)]
    shown = {name: word for name, word in words.items() if word and name not in quiet}
    for name in sorted(shown, key=_weight, reverse=True):
        if len("  ".join(shown.values())) <= LINE or _weight(name) == 0:
            break
        del shown[name]
    return "  ".join(shown.values())


def _weight(name: str) -> int:
    return next(weight for pattern, weight in _WEIGHT if pattern.search(name))
