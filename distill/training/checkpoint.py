"""Checkpoints, complete or not there: written aside, sealed by a manifest, renamed; verified before they are read.

    checkpoints/
        step-00000100/            a folder per checkpoint, written as step-00000100.tmp and renamed when it is complete
            manifest.json         size and sha256 of every file, versions, settings, what an engine must fit
            student/              a trained network: weights.safetensors, ema.safetensors, every rank's optimizer state
        latest                    the name of the newest one, for people and batch scripts
        best                      the name of the one that was found best, if any, and by what: it is kept

A checkpoint is healthy if no update was being skipped, or out of its band, when it was saved. Only healthy ones count
towards the limit, so that a run that diverges cannot push them out.

A step folder may be a link, to another disk say. Where an old checkpoint is dropped, the link is removed and what it
points to stays. What is no checkpoint (a folder without a manifest, a file) is neither counted nor removed. Cleaning up
never fails the save that it follows.

All ranks call the methods of `Checkpoints` together; the folder is one that all of them see.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.config.recorded import chief, differences, given_keys
from distill.config.settings import TrainSettings
from distill.data.storage import make_folder, sync_folder, write_whole
from distill.training.deepspeed_internals import IN_ITS_FILES
from distill.training.engine import Engine
from distill.training.processes import Channel, Processes
from distill.training.rank_writes import WriteError, free_space, together
from distill.training.resharding import NotElastic
from distill.training.snapshot import HostMemory, InPlace
from distill.training.state_files import Digests, StateFile, write_files
from distill.training.trained_network import weights_file

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
_SHAPING = (
    "lora_rank",
    "lora_targets",
    "student",
    "networks",
    "method",
    "model",
    "ema_decay",
)  # settings of what is trained
_NAME = re.compile(r"step-(\d{8,})")
_GO_ON = "resume_from_checkpoint=latest continues from it; for a new run choose another output_dir"
_PACKAGES = ("distill", "torch", "accelerate", "deepspeed", "diffusers", "peft")


class CheckpointError(ValueError):
    """A checkpoint that is named is missing, damaged, or not this run's; one line."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes: `step` optimizer steps were taken, and `state` is what `save` was given then."""

    step: int
    state: Mapping[str, Any]
    folder: Path


@dataclass
class _Saving:
    """A checkpoint on its way: where it is written and where it will be, over which channel, and from what."""

    aside: Path
    final: Path
    processes: Processes
    channel: Channel
    manifest: dict[str, Any]
    began: float
    must: bool
    files: list[StateFile] = field(default_factory=list)
    stood_still: float = 0.0

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        total_limit: keep the newest so many of the healthy ones; None keeps all.
        config: the run's settings, for the record.
        must_match: settings (values of JSON) that a resumed run must share with the one that saved.
        run: the run's own name; checkpoints of another one are taken from a folder that is named only.
        state: what `save` writes beside the engine's own state (values of JSON) when it is given nothing else.
        before: called on the main rank before anything is saved.
        background: whether a checkpoint that is begun is written beside the training, from a copy in the host's memory.
        watched: surrounds the writing of one, in whichever thread; it is given what is being done.

    Raises:
        ValueError: a limit below 1.
    """

    folder: Path
    total_limit: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    must_match: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""
    state: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[], None] = lambda: None
    background: bool = False
    watched: Callable[[str], AbstractContextManager[None]] = lambda what: nullcontext()

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if self.total_limit is not None and self.total_limit < 1:
            raise ValueError(f"checkpoints_total_limit must be null or at least 1, got {self.total_limit}")
        self._current: int | None = None  # the step that was saved or resumed from last
        self._unhealthy: dict[Path, bool] = {}  # of the checkpoints whose manifest has been read
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None  # writes the checkpoint that was begun last
        self._problem: WriteError | None = None  # why that could not be written
        self._error: BaseException | None = None  # what else has ended the thread

    # ---- writing ------------------------------------------------------------------------------------------------

    def save(self, engine: Engine, step: int, state: Mapping[str, Any] | None = None) -> Path:
        """Writes the checkpoint of `step`, with `state` (values of JSON) beside the engine's, and drops old ones.

        A kill at any moment leaves the checkpoints before it as they were. Saving a step that was just saved or
        resumed from does nothing.

        Raises:
            WriteError: on all ranks alike, if one of them could not write, as on a full disk; the checkpoints before
                it and `latest` are as they were.
        """
        self.begin(engine, step, state, must=True)
        self.finish()
        return self._final(step)

    def begin(self, engine: Engine, step: int, state: Mapping[str, Any] | None = None, must: bool = False) -> None:
        """`save`, of which no more is done here than has to be while the training stands still, if `background` is set.

        Then the state is copied, and a thread writes the copies. What is begun while another one is being written
        waits for that. Every save that was begun has to be followed by `finish`, `begin` or `close`.

        Args:
            must: `finish` follows at once, and raises what fails. Otherwise it is a warning.
        """
        self.wait()
        processes, final = engine.processes, self._final(step)
        self._problem = None
        if self._current == step and processes.from_main(final.is_dir()):  # and nobody has removed it
            return
        began = time.monotonic()
        saving = _Saving(
            aside=final.with_name(final.name + ".tmp"),
            final=final,
            processes=processes,
            channel=processes.second_channel if self.background else processes.channel,
            manifest=self._manifest(engine, step, self.state if state is None else state, engine.is_healthy()),
            began=began,
            must=must,
        )
        try:
            together(processes.gathered, lambda: self._begin(saving.aside) if processes.is_main else None)
            saving.files = together(processes.gathered, lambda: self._files(engine, saving.aside))
        except WriteError as error:
            self._fail(saving, error)
            return
        if self.background:
            saving.stood_still = time.monotonic() - began
            self._thread = threading.Thread(target=self._write, args=(saving,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(saving)

    @property
    def copied_bytes(self) -> int:
        """Bytes of host memory on this rank for the copy that is written."""
        return self._memory.nbytes

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing what was begun last."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Waits until nothing is being written. What has failed `finish` says."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Waits until the checkpoint that was begun last is complete.

        Raises:
            WriteError: on all ranks alike, if it could not be written.
        """
        self.wait()
        if self._problem is not None:
            raise self._problem

    def is_saved(self) -> bool:
        """Waits until nothing is being written; whether the checkpoint that was begun last is complete."""
        self.wait()
        return self._problem is None

    def close(self) -> None:
        """Waits until nothing is being written, whatever comes of it."""
        if self._thread is not None:
            self._thread.join()

    def _final(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _begin(self, aside: Path) -> None:
        self.before()
        _make_anew(aside)

    def _files(self, engine: Engine, aside: Path) -> list[StateFile]:
        if not self.background:
            return engine.files(aside, InPlace())
        with self._memory.snapshot() as copies:
            return engine.files(aside, copies)

    def _write(self, saving: _Saving) -> None:
        """Writes, seals and publishes; on all ranks, in a thread beside the training or in its place."""
        gathered = saving.channel.gathered
        try:
            with self.watched(f"the checkpoint of step {saving.step}, which is being written"):
                mine = together(gathered, lambda: write_files(saving.files, saving.aside, saving.channel))
                digests = {path: digest for part in gathered(mine) for path, digest in part.items()}
                together(gathered, lambda: self._complete(saving, digests) if saving.processes.is_main else None)
        except WriteError as error:
            self._fail(saving, error)
        except BaseException as error:  # is raised in the training, by the next call here
            if not self.background:
                raise
            self._error = error
        else:
            self._current = saving.step
            if saving.processes.is_main:
                took = time.monotonic() - saving.began
                beside = (
                    f" beside the training, which stood still for {saving.stood_still:.1f} s" if self.background else ""
                )
                log.info("saved the checkpoint of step %d in %.1f s%s: %s", saving.step, took, beside, saving.final)

    def _fail(self, saving: _Saving, error: WriteError) -> None:
        try:
            free = free_space(self.folder.parent)
        except OSError as gone:
            free = str(gone)
        if saving.processes.is_main:
            shutil.rmtree(saving.aside, ignore_errors=True)
        self._problem = WriteError(f"{saving.final} could not be written ({error}; {free})")
        if not saving.must and saving.processes.is_main:
            log.warning("%s; the run continues, and what is saved is as it was", self._problem)

    def _complete(self, saving: _Saving, digests: Digests) -> None:
        there = (str(path.relative_to(saving.aside)) for path in saving.aside.rglob("*") if path.is_file())
        digests |= {path: _digest(saving.aside / path) for path in there if path not in digests}  # of libraries
        manifest = {**saving.manifest, "files": dict(sorted(digests.items()))}
        _write_manifest(saving.aside, manifest)
        _publish(saving.aside, saving.final)
        self._unhealthy[saving.final] = _is_unhealthy(manifest)
        try:
            self._drop_old()
        except OSError as error:  # the checkpoint is complete all the same
            log.warning("old checkpoints in %s could not be dropped: %s", self.folder, error)

    def _manifest(self, engine: Engine, step: int, state: Mapping[str, Any], healthy: bool) -> dict[str, Any]:
        """All but the files. It is a copy: what an engine counts goes on."""
        found = {
            "format": FORMAT,
            "run": self.run,
            "step": step,
            "state": dict(state),
            "engine_state": engine.state_dict(),
            "healthy": healthy,
            "engine": engine.describe(),
            "must_match": dict(self.must_match),
            "versions": _versions(),
            "config": dict(self.config),
        }
        return json.loads(json.dumps(found))

    def _drop_old(self) -> None:
        """Keeps the newest healthy ones and the best one; of those saved in a streak of skipped updates the newest."""
        if self.total_limit is None:
            return
        found = [(step, folder, self._was_unhealthy(folder)) for step, folder in self.found()]
        healthy = [step for step, _, unhealthy in found if unhealthy is False][: self.total_limit]
        best = best_of(self.folder)
        for step, folder, unhealthy in found[1:]:
            of_a_streak = unhealthy is True and step < max(healthy, default=found[0][0])
            too_old = unhealthy is not None and len(healthy) == self.total_limit and step < healthy[-1]
            if (of_a_streak or too_old) and step != best:
                _drop(folder)

    def mark_best(self, processes: Processes, step: int, why: str) -> None:
        """Marks the checkpoint of `step`; that it cannot be marked is a warning."""
        if processes.is_main:
            try:
                mark_best(self.folder, step, why)
            except OSError as error:
                log.warning("step %d could not be marked as the best in %s: %s", step, self.folder, error)

    def _was_unhealthy(self, folder: Path) -> bool | None:
        """Whether it was saved while updates were being skipped; None for what is no checkpoint."""
        if not (folder / MANIFEST).is_file():
            return None
        if folder not in self._unhealthy:
            manifest, problem = _read_manifest(folder)
            self._unhealthy[folder] = problem is not None or _is_unhealthy(manifest)
        return self._unhealthy[folder]

    def after_divergence(self, processes: Processes) -> str:
        """What the line about a run that ended for its skipped updates says: from where it can continue.

        What a stopped run saved within that streak is renamed to `*.set-aside`, for the run to start again before it.
        """
        self.wait()
        return processes.from_main(self._way_back() if processes.is_main else "")

    def set_aside_after(self, processes: Processes, step: int) -> None:
        """Renames what is newer than `step` to `*.set-aside`. Call it on all ranks."""
        self.wait()
        if problem := processes.from_main(self._set_aside_after(step) if processes.is_main else None):
            log.warning("%s", problem)

    def healthy_steps(self) -> list[int]:
        """Steps of the checkpoints that were saved while no update was skipped or out of its band, newest first."""
        return [step for step, _ in self._healthy()]

    def _healthy(self) -> list[tuple[int, Path]]:
        self.wait()
        return [(step, folder) for step, folder in self.found() if self._was_unhealthy(folder) is False]

    def _way_back(self) -> str:
        healthy = self._healthy()
        if not healthy:
            return (
                "no checkpoint was saved before that: choose another output_dir and, say, a lower learning_rate, or "
                "save more often (checkpointing_steps)"
            )
        step, folder = healthy[0]
        if problem := self._set_aside_after(step):
            log.warning("%s", problem)
        older = f" (before it: that of step {healthy[1][0]})" if len(healthy) > 1 else ""
        return (
            f"the newest checkpoint with an update taken is that of step {step}{older}: the same command tries again "
            f"from there, and resume_from_checkpoint={folder} with another output_dir continues it as a new run, with "
            "a lower learning_rate, say"
        )

    # ---- reading ------------------------------------------------------------------------------------------------

    def found(self) -> list[tuple[int, Path]]:
        """(step, folder) of the checkpoints that were completed, newest first."""
        return _found(self.folder)

    def resume(self, engine: Engine, where: str | int | None) -> ResumePoint | None:
        """Loads a checkpoint into a prepared engine; None if the run starts at step 0.

        Args:
            where: `latest` (the newest intact one of this run; damaged ones are skipped with a warning; with none saved
                yet, start), a step, a checkpoint's folder, or None for a new run.

        Checkpoints of this run that are newer than the one loaded are renamed to `*.set-aside`: they belong to a
        course that this run no longer follows.

        Raises:
            CheckpointError: named and missing or damaged; saved by a run this one does not fit; no intact one left;
                or None in a folder that has checkpoints.
        """
        self.wait()
        processes = engine.processes
        if processes.is_main:
            self._clean()
        candidates = processes.from_main(self._candidates(where))
        if isinstance(candidates, str):
            raise CheckpointError(candidates)
        for folder in candidates:
            manifest, problem = self._verify(processes, folder)
            if problem is None and self._is_foreign(manifest, where):
                raise CheckpointError(
                    f"{folder} was saved by another run: resume_from_checkpoint={folder} in a new output_dir "
                    "continues from it, if that is what you want"
                )
            if problem is None:
                return self._load(engine, folder, manifest)
            if where != LATEST:
                raise CheckpointError(f"{folder} is damaged: {problem}")
            if processes.is_main:
                log.warning("checkpoint %s is damaged (%s); trying the one before", folder.name, problem)
        if candidates:
            raise CheckpointError(f"none of the {len(candidates)} checkpoints in {self.folder} is intact")
        if processes.is_main:
            log.info("no checkpoint in %s: starting at step 0", self.folder)
        return None

    def _verify(self, processes: Processes, folder: Path) -> tuple[dict[str, Any], str | None]:
        """The manifest, and what is wrong with the checkpoint, the same on all ranks; nothing is unpickled."""
        manifest, problem = _read_manifest(folder)
        if problem is None:
            paths = sorted(manifest["files"])[processes.rank :: processes.world_size]
            problem = next((p for path in paths if (p := _difference(folder, path, manifest["files"][path]))), None)
            problem = problem or next((p for path in paths if (p := _foreign_code(folder, path))), None)
        problems = [p for p in processes.gathered(problem) if p]
        return manifest, problems[0] if problems else None

    def _is_foreign(self, manifest: Mapping[str, Any], where: str | int | None) -> bool:
        named = isinstance(where, str) and where != LATEST and not where.isdigit()
        return not named and manifest.get("run", "") != self.run

    def _load(self, engine: Engine, folder: Path, manifest: Mapping[str, Any]) -> ResumePoint:
        processes, problem = engine.processes, engine.misfit(manifest["engine"])
        if problem and (setting := self._setting_that_differs(manifest.get("config", {}))):
            problem = f"{setting} ({problem})"
        problem = problem or _mismatch(manifest["must_match"], self.must_match)
        if problem:
            raise CheckpointError(f"{folder} does not fit this run: {problem}")
        try:
            engine.load(folder, manifest["engine"])
        except NotElastic as error:
            raise CheckpointError(str(error)) from None
        engine.load_state_dict(manifest["engine_state"])
        step = int(manifest["step"])
        problem = processes.from_main(self._set_aside_after(step) if processes.is_main else None)
        if problem:
            raise CheckpointError(problem)
        if processes.is_main:
            if folder.parent.resolve() == self.folder.resolve():
                _point(self.folder / LATEST, folder)
            log.info("resumed from %s at step %d", folder, step)
        processes.barrier()
        self._current = step if (self.folder / folder.name).is_dir() else None
        return ResumePoint(step, manifest["state"], folder)

    def _setting_that_differs(self, saved: Mapping[str, Any]) -> str | None:
        """What decides the shape of what is trained, and was another when it was saved."""
        if not saved or not self.config:
            return None
        here = json.loads(json.dumps(dict(self.config)))
        found = differences(saved, here, TrainSettings)
        shaping = {key: both for key, both in found.items() if key.partition(".")[0] in _SHAPING}
        if not shaping:
            return None
        key = chief(shaping, given_keys())
        return f"{key} was {shaping[key][0]!r}, is {shaping[key][1]!r}"

    def _set_aside_after(self, step: int) -> str | None:
        """Renames what is newer than `step`; returns why it cannot be."""
        for later, folder in self.found():
            if later > step:
                target = next(p for p in _numbered(folder.with_name(folder.name + ".set-aside")) if not _is_there(p))
                try:
                    folder.rename(target)
                except OSError as error:
                    return (
                        f"{folder} is newer than step {step}, where this run continues, and cannot be renamed: {error}"
                    )
                log.warning(
                    "%s is newer than step %d, where this run continues: renamed to %s", folder, step, target.name
                )
        return None

    def _candidates(self, where: str | int | None) -> list[Path] | str:
        """The folders to try in their order, or what is wrong with `where`."""
        if _is_there(self.folder) and not self.folder.is_dir():
            return f"{self.folder} is a file, or a link to nothing: the checkpoints have no place"
        return _candidates(self.folder, where)

    def _clean(self) -> None:
        for torn in self.folder.glob("step-*.tmp"):
            log.warning("removing %s: it was never completed", torn)
            try:
                _remove(torn)
            except OSError as error:
                log.warning("%s cannot be removed: %s", torn, error)


def read_weights(
    folder: Path, network: str, where: str | int = LATEST, ema: bool = True
) -> tuple[int, dict[str, Tensor]]:
    """The step and the trained weights of a network (its moving average if `ema` and there is one), from checkpoints.

    Needs no engine, and no more processes than one, whatever saved them; reads safetensors only.

    Args:
        folder: the run's checkpoints.
        where: `latest` (a damaged one is passed over, and said so), a step, or a checkpoint's folder.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or one without that network.
    """
    candidates = _candidates(folder, where)
    if isinstance(candidates, str):
        raise CheckpointError(candidates)
    for candidate in candidates:
        manifest, problem = _read_manifest(candidate)
        if problem is None:
            files = manifest["files"]
            path = next((p for e in (ema, False) if (p := f"{network}/{weights_file(e)}") in files), None)
            if path is None:
                raise CheckpointError(f"{candidate} has no trained network {network!r}: it holds {', '.join(files)}")
            problem = _difference(candidate, path, files[path])
            if problem is None:
                return int(manifest["step"]), load_file(candidate / path)
        if where != LATEST:
            raise CheckpointError(f"{candidate} is damaged: {problem}")
        log.warning("checkpoint %s is damaged (%s); trying the one before", candidate.name, problem)
    raise CheckpointError(f"no intact checkpoint in {folder}")


def newest_manifest(folder: Path) -> dict[str, Any]:
    """The newest manifest in a run's checkpoints that is not damaged; {} without one."""
    for _, found in _found(folder):
        manifest, problem = _read_manifest(found)
        if problem is None:
            return manifest
    return {}


def mark_best(folder: Path, step: int, why: str = "") -> None:
    """Notes in a run's checkpoints which one was found best, and by what; it is not dropped for its age."""
    write_whole(folder / BEST, f"step-{step:08d}\n{why}".rstrip() + "\n")


def best_of(folder: Path) -> int | None:
    """The step of the checkpoint that is marked as the best; None if none is."""
    found = _NAME.fullmatch(_best_lines(folder)[0].strip())
    return int(found[1]) if found else None


def why_best(folder: Path) -> str:
    """By what the best one was found to be that, in words; "" where nothing is noted."""
    return " ".join(_best_lines(folder)[1:]).strip()


def _best_lines(folder: Path) -> list[str]:
    return ((folder / BEST).read_text().splitlines() if (folder / BEST).is_file() else []) or [""]


def _found(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    named = [(_NAME.fullmatch(p.name), p) for p in folder.iterdir() if p.is_dir()]
    return sorted(((int(m[1]), p) for m, p in named if m), reverse=True)


def _candidates(root: Path, where: str | int | None) -> list[Path] | str:
    """The folders to try in their order, or what is wrong with `where`."""
    there = dict(_found(root))
    if where is None:
        return f"{root} has a checkpoint of step {max(there)}: {_GO_ON}" if there else []
    if where == LATEST:
        return list(there.values())
    if isinstance(where, int) or where.isdigit():
        steps = ", ".join(map(str, there)) or "none"
        return [there[int(where)]] if int(where) in there else f"no checkpoint of step {where}; there are: {steps}"
    folder = Path(where)
    if not (folder / MANIFEST).is_file():
        return f"resume_from_checkpoint={where} is neither latest, nor a step, nor a folder with a {MANIFEST}"
    if there and folder.resolve().parent != root.resolve():
        return f"resume_from_checkpoint={where}, but {root} has its own checkpoints: use latest"
    return [folder]


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for i in range(2, 1000):
        yield path.with_name(f"{path.name}-{i}")


def _mismatch(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    here = json.loads(json.dumps(here))  # as the saved ones have come back: tuples are lists, keys strings
    for key in sorted(saved.keys() | here.keys()):
        if saved.get(key) != here.get(key):
            remedy = f": set {key.rpartition(' ')[2]} to the export it was" if key.startswith("SHA-256") else ""
            return f"{key} was {saved.get(key)!r}, is {here.get(key)!r}{remedy}"
    return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "not installed"
    return found


# ---- files --------------------------------------------------------------------------------------------------------


def _make_anew(folder: Path) -> None:
    if _is_there(folder):
        _remove(folder)
    make_folder(folder.parent)
    folder.mkdir()


def _is_there(path: Path) -> bool:
    """Whether there is anything of that name, a link to nothing included."""
    return os.path.lexists(path)


def _remove(path: Path) -> None:
    """Removes a folder, a file or a link; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _drop(folder: Path) -> None:
    """Removes an old checkpoint; half deleted, it must not look like one."""
    doomed = folder.with_name(folder.name + ".tmp")
    if _is_there(doomed):
        _remove(doomed)
    folder.rename(doomed)
    if doomed.is_symlink():
        log.info("removed the link %s; what it points to stays: %s", folder, doomed.resolve())
    _remove(doomed)


def _is_unhealthy(manifest: Mapping[str, Any]) -> bool:
    """Whether updates were being skipped when it was saved, or a weight was not finite."""
    return not manifest.get("healthy", not manifest.get("engine_state", {}).get("skipped_in_a_row", 0))


def _digest(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, once it is on the disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _difference(folder: Path, path: str, expected: Mapping[str, Any]) -> str | None:
    file = folder / path
    if not file.is_file():
        return f"{path} is missing"
    if (size := file.stat().st_size) != expected["size"]:
        return f"{path} has {size} bytes, not {expected['size']}"
    return None if _digest(file)["sha256"] == expected["sha256"] else f"{path} has other contents than were saved"


def _foreign_code(folder: Path, path: str) -> str | None:
    """What a pickle would call beside tensors and what DeepSpeed puts into its files; found without running it."""
    if not path.endswith(".pt"):
        return None
    try:
        found = set(torch.serialization.get_unsafe_globals_in_checkpoint(folder / path)) - IN_ITS_FILES
    except Exception as error:  # of whatever is no file of torch's: a pickle of its own, a zip without one
        return f"{path} is not a file of torch's ({type(error).__name__})"
    return f"{path} would call {', '.join(sorted(found))}, which no checkpoint does" if found else None


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    manifest = json.loads(json.dumps(manifest))
    text = json.dumps({**manifest, "seal": _seal(manifest)}, indent=1)
    write_whole(folder / MANIFEST, text)


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str | None]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        seal = manifest.pop("seal")
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except (ValueError, KeyError, AttributeError):
        return {}, f"{MANIFEST} is not readable"
    if _seal(manifest) != seal:
        return {}, f"{MANIFEST} has other contents than were saved"
    if manifest["format"] != FORMAT:
        return {}, f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
    return manifest, None


def _publish(aside: Path, final: Path) -> None:
    """Renames a complete folder, replacing a checkpoint of the same step, and points `latest` at it."""
    for folder in (p for p in aside.rglob("*") if p.is_dir()):
        sync_folder(folder)
    sync_folder(aside)
    replaced = final.with_name(final.name + ".replaced.tmp")
    if _is_there(final):
        if _is_there(replaced):
            _remove(replaced)
        final.rename(replaced)
    aside.rename(final)
    sync_folder(final.parent)
    with suppress(OSError):  # at the next start, if not now
        _remove(replaced)
    _point(final.parent / LATEST, final)


def _point(pointer: Path, checkpoint: Path) -> None:
    """Names a checkpoint in a file for people and scripts; nothing here reads it, so that it may fail."""
    try:
        write_whole(pointer, checkpoint.name + "\n")
    except OSError as error:
        log.warning("%s could not be written: %s", pointer, error)
