"""From a run's checkpoint to a folder of files that other people's programs load."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from distill.config.loading import ConfigError, build, checking
from distill.config.settings import ModelSettings, TrainSettings
from distill.data.storage import make_folder, sync_folder, sync_tree
from distill.diffusion.noise import AnyNoise
from distill.diffusion.prediction import Prediction
from distill.methods.sampling import Sampling
from distill.models.denoiser import NetworkDenoiser
from distill.models.derived import SINGLE
from distill.models.exported import FACTS
from distill.models.families.base import Family
from distill.models.families.loading import load_teacher
from distill.models.families.registry import FAMILIES
from distill.models.families.teacher import Teacher
from distill.models.files import share
from distill.models.formats import LORA_FORMATS, NETWORK, format_named, save_network, save_pipeline
from distill.models.full_size import published_name
from distill.models.kohya import checkpoint_metadata
from distill.models.schedulers import make_scheduler
from distill.models.single_file import save_single_file
from distill.training.checkpoint import best_of, read_weights, why_best
from distill.training.run import checkpoints_of, read_run, writing
from distill.training.teacher import as_set, located
from distill.training.used_data import UsedData, data_of, set_guidance

log = logging.getLogger("distill")


@dataclass(frozen=True)
class Export:
    """What is known of an exported student.

    Args:
        name: of the export, and of kohya's file.
        formats: those it holds.
        dtype: of its weights in the files.
        base_model: the teacher's hub id, or its folder's name; `base_hash` is its identity.
        family: the teacher's.
        step: of the checkpoint.
        ema: whether its weights are the moving average.
        guidance: lowest and highest w that the student learned from.
        takes_guidance: whether w is an input of the student; else it is built in.
        built_in_guidance: the w that such an input was fixed to, where it was.
        prediction: what its network predicts, in diffusers' words.
        noise: what its teacher was trained on; of the prediction it says the teacher's.
        sampling: how it is sampled.
        method, paper, tag: what the method is called, where it was published, and under what the hub lists it.
        data: what the run learned from, as its store said; None if that is not known any more.
        settings: of the run.
        chosen: by what its checkpoint was found to be the best, in words; "" of the newest, or one that was named.
        architecture: what `distill.models.full_size` calls the teacher's network; None for one of other sizes.
    """

    name: str
    formats: tuple[str, ...]
    dtype: str
    base_model: str
    base_hash: str
    family: str
    step: int
    ema: bool
    guidance: tuple[float, float]
    takes_guidance: bool
    built_in_guidance: float | None
    prediction: str
    noise: AnyNoise
    sampling: Sampling
    method: str
    paper: str
    tag: str
    data: UsedData | None
    settings: TrainSettings
    architecture: str | None = None
    chosen: str = ""

    @property
    def network(self) -> str:
        """What its pipeline calls its network, which is its sub-folder too: `unet` or `transformer`."""
        return FAMILIES.find(self.family).network.folder

    def holds(self, format: str) -> bool:
        """Whether it is in this format, of which `NETWORK` goes by the network's own name here."""
        return (self.network if format == NETWORK else format) in self.formats

    @property
    def guidance_scale(self) -> float:
        """The guidance to sample with: 1, or, where w is an input, the validation's, within what was learned."""
        low, high = self.guidance
        return min(max(self.settings.validation_guidance, low), high) if self.takes_guidance else 1.0

    def facts(self) -> dict[str, Any]:
        """Values of JSON, without this machine's paths."""
        return asdict(self) | {"settings": _without_paths(self.settings.model_dump(mode="json"))}


def export_run(
    run: str | Path,
    output_dir: str | Path,
    checkpoint: str | int = "auto",
    use_ema: bool = True,
    formats: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    guidance: float | None = None,
) -> Path:
    """Writes the student of a run to `output_dir` and returns that folder; for the arguments see `write_student`.

    Raises:
        FileNotFoundError: no run there.
        ConfigError: see `write_student` and `published`.
    """
    with published(output_dir) as folder:
        write_student(folder, run, Path(output_dir).resolve().name, checkpoint, use_ema, formats, dtype, guidance)
    return Path(output_dir)


def write_student(
    folder: Path,
    run: str | Path,
    name: str,
    checkpoint: str | int = "auto",
    use_ema: bool = True,
    formats: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    guidance: float | None = None,
) -> Export:
    """Writes a run's student and `distill.json` to a folder.

    Args:
        name: of the export.
        checkpoint: `auto` (the best, of a run that chooses it, and otherwise the latest), `best`, `latest` or a step.
        use_ema: the moving average of the weights, where the run keeps one.
        formats: `diffusers`, `peft`, `comfyui`, `kohya` (LoRA files), `network` (a full network; `unet` or
            `transformer`, the name of its sub-folder, says the same), `pipeline` (the teacher's, with that network and
            the student's scheduler), `checkpoint` (network, autoencoder and text encoders in one file); those that
            exist for the teacher's family; None takes the student's usual ones.
        dtype: of the student's weights in the files, and of all that is in a checkpoint; a pipeline's other parts are
            copied as they are.
        guidance: the w to fix, of a student that takes it as an input; None leaves the input.

    Raises:
        FileNotFoundError: no run there, or its teacher is gone.
        ConfigError: a format that the student cannot give; no such checkpoint, or a damaged one; a weight that the
            dtype cannot hold; a guidance that the student does not take, or has not learned.
    """
    settings = read_run(run)
    student = build(settings.student)
    _chosen(student, formats)
    with checking():
        where, chosen = checkpoint_of(run, settings, checkpoint)
        step, weights = read_weights(checkpoints_of(run), "student", where, use_ema)
    model = located(settings.model)
    teacher = load_teacher(
        model.pretrained_model_name_or_path,
        revision=model.revision,
        variant=model.variant,
        allow_distilled=model.allow_distilled,
    )
    wanted = formats_of(student, teacher.family, formats)
    network = student.networks(teacher, keep_teacher=False)["student"]  # without its start: that is in its weights
    ema = use_ema and settings.ema_decay is not None
    export = _export_of(run, settings, teacher, network, name, wanted, dtype, step, ema, guidance, chosen)
    with checking():
        if lora := [f for f in wanted if f in LORA_FORMATS]:
            student.export_lora(folder, teacher, weights, lora, dtype, name)
        if len(lora) < len(wanted):
            student.finish(teacher, weights)
            if guidance is not None:
                teacher.family.guidance.build_in(teacher.network, guidance)
            _write_network(folder, export, teacher, network.prediction, dtype)
    (folder / FACTS).write_text(json.dumps(export.facts(), indent=1) + "\n")
    return export


def _export_of(
    run: str | Path,
    settings: TrainSettings,
    teacher: Teacher,
    network: NetworkDenoiser,
    name: str,
    formats: tuple[str, ...],
    dtype: torch.dtype,
    step: int,
    ema: bool,
    guidance: float | None,
    chosen: str,
) -> Export:
    """What is to be exported, for `distill.json` and the card. Raises ConfigError for a guidance that does not fit."""
    method = build(settings.method, schedule=teacher.schedule)
    data = data_of(run, settings)
    learned = method.guidance_learned(data.guidance if data else set_guidance(settings))
    takes_guidance = network.takes_guidance
    _check_guidance(guidance, learned, takes_guidance, formats)
    return Export(
        name=name,
        formats=formats,
        dtype=str(dtype).removeprefix("torch."),
        base_model=_base_model(settings.model, teacher),
        base_hash=teacher.teacher_hash,
        family=teacher.family.name,
        step=step,
        ema=ema,
        guidance=learned,
        takes_guidance=takes_guidance and guidance is None,
        built_in_guidance=guidance,
        prediction=network.prediction.value,
        noise=as_set(teacher, settings.model).noise,
        sampling=method.sampling,
        method=method.title or type(method).__name__,
        paper=method.paper,
        tag=method.tag or type(method).__name__.lower(),
        data=data,
        settings=settings,
        architecture=published_name(teacher.family, teacher.network.config),
        chosen=chosen,
    )


def checkpoint_of(run: str | Path, settings: TrainSettings, wanted: str | int) -> tuple[str | int, str]:
    """Which checkpoint of a run is meant, `latest` or a step (or a folder), and by what it was chosen, in words.

    Raises:
        ConfigError: the best is wanted, and none is marked.
    """
    if wanted not in ("auto", "best") or (wanted == "auto" and not settings.best.get("choose", False)):
        return ("latest" if wanted == "auto" else wanted), ""
    folder = checkpoints_of(run)
    step = best_of(folder)
    if step is None and wanted == "best":
        raise ConfigError(
            f"checkpoint=best: none is marked in {folder}; a run with best.choose=true marks it, and so does "
            "distill evaluate watch=RUN"
        )
    if step is None:
        log.warning("%s was to choose its best checkpoint, and has measured none: the latest is exported", run)
        return "latest", ""
    log.info("exporting the best checkpoint, of step %d: %s", step, why_best(folder) or "by an evaluation")
    return step, why_best(folder) or "an evaluation"


def _base_model(model: ModelSettings, teacher: Teacher) -> str:
    """The hub id of a teacher, or its folder's or file's name; without LoRAs that were merged into it."""
    if not model.loras:
        return teacher.teacher_id.removesuffix(f"@{model.revision}")
    path = Path(model.pretrained_model_name_or_path)
    return path.resolve().name.removesuffix(SINGLE) if path.exists() else str(path)


def _write_network(folder: Path, export: Export, teacher: Teacher, prediction: Prediction, dtype: torch.dtype) -> None:
    """Writes those of the export's formats that hold a full network, which the teacher's has become."""
    model, sampling = located(export.settings.model), export.sampling
    path = model.pretrained_model_name_or_path
    if "checkpoint" in export.formats:
        save_single_file(
            folder / "checkpoint" / f"{export.name}.safetensors",
            teacher.network,
            path,
            dtype,
            prediction,
            checkpoint_metadata(teacher, prediction, export.name),
            model.revision,
            model.variant,
            teacher.family,
        )
    if "pipeline" in export.formats:  # which has the sub-folder of the network too

        def scheduler(_: AnyNoise) -> Any:
            """Of the run's noise: in the folder's own config, a shift may depend on the picture's size."""
            return make_scheduler(export.noise, sampling.sampler, sampling.spacing, prediction, sampling.steps)

        save_pipeline(
            folder, teacher.network, path, dtype, scheduler, model.revision, model.variant, family=teacher.family
        )
    elif teacher.family.network.folder in export.formats:
        save_network(folder, teacher.network, dtype, teacher.family)


def formats_of(student: Any, family: Family, formats: Sequence[str] | None) -> tuple[str, ...]:
    """The formats of an export, by the names that it says them by; None takes the usual ones of student and family.

    Raises:
        ConfigError: a format that the student cannot give, or that does not exist for the family.
    """
    exist = [f for f in student.formats if f not in LORA_FORMATS or f in family.lora.formats]
    exist = [f for f in exist if f != "checkpoint" or family.network.one_file is not None]
    chosen = [f for f in _chosen(student, formats) if formats is not None or f in exist]
    names = {NETWORK: family.network.folder}
    for name in chosen:
        if name not in exist:
            allowed = ", ".join(names.get(one, one) for one in exist)
            raise ConfigError(f"formats: {name} does not exist for {family.title}; allowed: {allowed}")
    return tuple(names.get(name, name) for name in chosen)


def _chosen(student: Any, formats: Sequence[str] | None) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(map(format_named, student.usual_formats if formats is None else formats)))
    for name in chosen:
        if name not in student.formats:
            kind = type(student).__name__
            raise ConfigError(
                f"formats: a {kind} cannot be exported as {name!r}; allowed: {', '.join(student.formats)}"
            )
    return chosen


def check_formats(settings: TrainSettings, formats: Sequence[str] | None) -> None:
    """Raises ConfigError for a format that the run's student cannot give, before anything is loaded."""
    _chosen(build(settings.student), formats)


def _check_guidance(
    guidance: float | None, learned: tuple[float, float], takes_guidance: bool, formats: Sequence[str]
) -> None:
    low, high = learned
    known = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    if guidance is None:
        if takes_guidance and "checkpoint" in formats:
            raise ConfigError(
                "formats: no program that reads a checkpoint gives its network the guidance as an input: fix one with "
                f"guidance={(low + high) / 2:g} (this student learned {known})"
            )
    elif not takes_guidance:
        raise ConfigError(f"guidance={guidance:g}: this student takes no guidance as an input, it is built in already")
    elif any(format in LORA_FORMATS for format in formats):
        raise ConfigError(
            f"guidance={guidance:g}: a LoRA leaves the model its input of guidance; set formats to those of a network"
        )
    elif not low <= guidance <= high:
        raise ConfigError(f"guidance={guidance:g} is not what this student learned, which is {known}")


def _without_paths(value: Any) -> Any:
    """Values of JSON with the last part of each path that only this machine has."""
    if isinstance(value, Mapping):
        return {key: _without_paths(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_paths(v) for v in value]
    return Path(value).name if isinstance(value, str) and re.match(r"[/~]", value) else value


# ---- the folder ---------------------------------------------------------------------------------------------------


@contextmanager
def published(output_dir: str | Path) -> Iterator[Path]:
    """A folder to write an export to; it becomes `output_dir` when all is written, and is removed if something fails.

    An export that is there already is replaced, and nothing else ever is.

    Raises:
        ConfigError: something else than an export is at `output_dir`, it cannot be written to, or another export is
            being written to it.
    """
    final = Path(output_dir).expanduser().resolve()
    with writing(final):
        _require_replaceable(final)
        make_folder(final.parent)
    with _alone(final):
        aside = final.with_name(f".{final.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        with writing(final):
            aside.mkdir()
        try:
            yield aside
            share(aside)
            _seal(aside)
            _require_replaceable(final)
            _replace(final, aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _alone(final: Path) -> Iterator[None]:
    """One export at a time into a folder. The lock is the system's, which lets go of it when a process is killed.

    Raises:
        ConfigError: another process writes there.
    """
    path = final.with_name(f".{final.name}.lock")
    with writing(final):
        lock = _locked(path)
    if lock is None:
        raise ConfigError(
            f"output_dir={final}: another export is being written there; wait for it, or choose another output_dir"
        )
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> IO[str] | None:
    """The file, locked by this process; None if another one holds it."""
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                raise
            return file  # a file system without locks has none to wait for
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder has removed it between the two lines above


def _require_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir={folder} is a file")
    found = _sizes(folder)
    if not found:
        return
    try:
        written: Mapping[str, int] = json.loads((folder / FACTS).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"output_dir={folder} holds something else than an export: choose another") from None
    for path, size in found.items():
        if path != FACTS and written.get(path) != size:
            state = "was changed since" if path in written else "is not of it"
            raise ConfigError(f"output_dir={folder} holds an export, but {path} {state}: move it, or choose another")


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(p for p in folder.rglob("*") if not p.is_dir())
    return {p.relative_to(folder).as_posix(): p.lstat().st_size for p in files}


def _seal(folder: Path) -> None:
    """Notes in distill.json which files the export has, and has them all on the disk."""
    facts = json.loads((folder / FACTS).read_text())
    files = {path: size for path, size in _sizes(folder).items() if path != FACTS}
    (folder / FACTS).write_text(json.dumps(facts | {"files": files}, indent=1) + "\n")
    sync_tree(folder)


def _replace(final: Path, aside: Path) -> None:
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    aside.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


# ---- the hub ------------------------------------------------------------------------------------------------------


def require_login(repository: str) -> None:
    """Raises ConfigError, without asking the hub, if huggingface_hub knows no login."""
    if get_token() is None:
        raise ConfigError(f"push_to_hub={repository} needs a login, and there is none: run `hf auth login`")


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Uploads an export, as it is, to a model repository of the hub, which is made if it is not there.

    Returns its address. Uses huggingface_hub's own login.

    Raises:
        ConfigError: the hub refuses or cannot be reached, or a public repository is there and a private one is wanted.
    """
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise ConfigError(
                f"push_to_hub={repository} is public: if that is meant, set hub_private=false "
                f"(the export is complete in {folder})"
            )
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Export of {folder.name}")
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"push_to_hub={repository}: {reason} (the export is complete in {folder})") from None
    return str(url)
