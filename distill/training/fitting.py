"""Whether settings, method and store belong together: what does not is one line, before a network is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

from hydra.utils import get_object

from distill.config.loading import ConfigError, checking
from distill.config.packages import require
from distill.config.recorded import given_keys
from distill.config.settings import OF_PROMPTS, TrainSettings
from distill.data.errors import ReadError, StoreError
from distill.data.heldout import is_there, within
from distill.data.index import StoreIndex, StoreMismatch
from distill.data.reader import Store, open_store
from distill.data.remote import is_remote
from distill.methods.base import Method
from distill.models.exported import Exported
from distill.models.families.teacher import Teacher
from distill.training.helpers import check_helpers
from distill.training.launched import launched_rank
from distill.training.sizes import chosen_sizes, require_sizes

log = logging.getLogger("distill")

SAMPLES, STORE = "samples", "store"  # in a checkpoint: how many the run began with, and of which store
HELDOUT_SAMPLES = "heldout_samples"  # and how many it has measured itself on


def check_packages(cfg: TrainSettings) -> None:
    """Raises ConfigError for a setting whose package is not installed."""
    if cfg.engine.get("deepspeed") is not None:
        require("an engine with ZeRO (engine=zero1, zero2 or zero3; engine=ddp does without)", "deepspeed")
    for name, node in cfg.tracking.items():
        if package := getattr(get_object(node["_target_"]), "package", None):
            require(f"tracking={name}", package)


def check_method(cfg: TrainSettings, method: Method) -> None:
    """Raises ConfigError for settings of the run that the method cannot work with."""
    if method.steps not in (None, cfg.max_train_steps):
        raise ConfigError(
            f"the method's stages take {method.steps} steps, not max_train_steps={cfg.max_train_steps}: set "
            "max_train_steps=null, which follows them, or other method.stages"
        )
    if cfg.ema_decay is None and any(f"{name}_ema" in method.requires for name in method.trains):
        raise ConfigError("the method's target is the moving average of the student, and none is kept: set ema_decay")
    check_helpers(cfg, method)
    least = min(method.batch_size(step) or cfg.global_batch_size for step in method.starts)
    if least < method.least_samples:
        raise ConfigError(
            f"the method compares samples of a step: global_batch_size={least} must be at least {method.least_samples}"
        )
    if unknown := [name for name in cfg.engine.get("stages") or () if name not in method.trains]:
        known = ", ".join(method.trains)
        raise ConfigError(f"engine.stages.{unknown[0]}: no such network is trained; trained are: {known}")
    check_quantized(cfg, method.trains)
    check_read(cfg, method)


def say_unlogged(cfg: TrainSettings, method: Method) -> None:
    """Warns where steps are logged at which not all of a method's networks train."""
    if cfg.log_every % method.period:
        log.warning(
            "log_every=%d is no multiple of the %d steps after which the method's turns repeat: logged steps lack "
            "numbers of networks that train at others",
            *(cfg.log_every, method.period),
        )


def check_read(cfg: TrainSettings, method: Method) -> None:
    """Raises ConfigError for a key that is set and not read by the run, except for `++key=value`."""
    given = given_keys(for_any=False)
    for key, reason in unread(cfg, method.trains).items():
        if key in given:
            raise ConfigError(f"{key} is set, and has no effect: {reason}")
    for key in given:
        network = key.split(".")[1] if key.startswith("networks.") else None
        if network is not None and network not in method.trains:
            raise ConfigError(f"{key} is set, and the method trains no {network}: it trains {', '.join(method.trains)}")


def check_quantized(cfg: TrainSettings, trained: Collection[str]) -> None:
    """Raises ConfigError where weights are to be trained that are quantized."""
    nodes = {"student": cfg.student, **{name: cfg.networks[name] for name in trained if name in cfg.networks}}
    full = [name for name, node in nodes.items() if node.get("rank") is None and node.get("trained") != "heads"]
    if cfg.quantize is not None and full:
        instead = "student=lora" if full[0] == "student" else f"networks.{full[0]}.rank, or networks=adapters"
        raise ConfigError(
            f"quantize={cfg.quantize} is for frozen weights, and the {full[0]} is fully trained: set {instead}"
        )


def unread(cfg: TrainSettings, trained: Collection[str]) -> dict[str, str]:
    """The keys that nothing of a run with these settings reads, each with the reason.

    Args:
        trained: names of the networks that the run trains; of others, no settings are read.
    """
    nodes = [cfg.student, *(cfg.networks[name] for name in trained if name in cfg.networks)]
    has = {key for node in nodes if node.get("rank", 1) is not None for key in node}
    reasons = {
        "reward_batch_size": cfg.reward is None and "the method uses no reward",
        "lora_rank": "rank" not in has and "no network of this run has a LoRA",
        "lora_alpha": "alpha" not in has and "no network of this run has a LoRA",
        "lora_targets": cfg.lora_targets is not None
        and "targets" not in cfg.student
        and "the student is no LoRA, whose modules it names",
        "lr_warmup_steps": cfg.lr_scheduler == "constant"
        and cfg.lr_warmup_steps
        and "lr_scheduler=constant has no warm-up",
        **_unread_of_data(cfg),
        "validation_reward": cfg.validation_prompts is None and "there are no validation_prompts",
        "validation_sizes": cfg.validation_prompts is None and "there are no validation_prompts",
    }
    return {key: str(reason) for key, reason in reasons.items() if reason}


def _unread_of_data(cfg: TrainSettings) -> dict[str, str | bool]:
    """Of the settings of remote stores those that the run does not read, each with the reason."""
    stores = [url for url in (cfg.data.store, cfg.data.heldout) if url is not None]
    local = not any(map(is_remote, stores)) and "the store is in a local folder"
    return {
        "data.read_timeout_seconds": local,
        "data.cache": local,
        "data.cache_gib": local or (cfg.data.cache is None and "there is no data.cache"),
    }


def fitting_store(cfg: TrainSettings, teacher: Teacher, method: Method, exports: Mapping[str, Exported]) -> Store:
    """The store, once it is known to be this teacher's and to hold what the method reads.

    A method that calls no teacher learns from the solves of the one that `teacher` names.
    """
    store = open_store(
        cfg.data.store,
        max_bad_fraction=cfg.data.max_bad_fraction,
        verify_sha256=cfg.data.verify_on_first_read,
        **_reading(cfg),
    )
    try:
        for step in method.starts:
            method.reads(step).check(store.index.times)
    except ValueError as error:
        if store.index.kind == "pictures":
            raise ConfigError(
                f"a store of pictures has no teacher solves, method=lcm_noised needs none: {error}"
            ) from None
        raise
    if launched_rank() == 0:  # the hash reads all weights once
        solved = exports.get("teacher") if "teacher" not in method.requires else None
        wanted = wanted_of(cfg, teacher, solved, store.index)
        if store.index.sizes:
            with checking("data.store: "):
                require_sizes(teacher, store.index.image_sizes)
            say_small_sizes(store, cfg.global_batch_size)
        try:
            store.index.require(**wanted)
        except StoreMismatch as error:
            raise ConfigError(
                f"{error}; {remedy(store.index, wanted, learns_from_export=solved is not None)}"
            ) from None
    return store


def wanted_of(cfg: TrainSettings, teacher: Teacher, solved: Exported | None, index: StoreIndex) -> dict[str, Any]:
    """What a run expects of its store; of the writer's settings, what a person has set here must be so there.

    Args:
        solved: the export that solved it, where that is not the teacher itself.
    """
    wanted: dict[str, Any] = {
        "schedule_fingerprint": teacher.schedule.fingerprint,
        "shift": teacher.schedule.shift,
        "teacher_hash": solved.weights_hash if solved else teacher.teacher_hash,
        "guidance": cfg.data.guidance,
        "resolution": teacher.resolution,
    }
    given = given_keys()
    if index.kind == "trajectories":
        solve: dict[str, Any] = {name: getattr(cfg.data, name) for name in ("solver", "solver_steps", "empty_prompts")}
        wanted |= {name: value for name, value in solve.items() if f"data.{name}" in given}
    if "data.sizes" in given and cfg.data.sizes != OF_PROMPTS:
        wanted["sizes"] = tuple(map(str, chosen_sizes(cfg.data, teacher)))
    return wanted


def say_small_sizes(store: Store, batch: int) -> None:
    """Warns of sizes whose samples come several times in one batch, which is of one size."""
    found = store.by_size()
    few = [f"{store.index.image_sizes[n]} ({len(own)})" for n, own in found.items() if len(own) < batch]
    if few:
        log.warning(
            "fewer samples than a batch of %d have the sizes %s: a batch of such a size has samples several times",
            *(batch, ", ".join(few)),
        )


def _reading(cfg: TrainSettings) -> dict[str, Any]:
    """How a store is read, as `open_store` takes it."""
    data = cfg.data
    return {
        "retry_seconds": data.read_retry_seconds,
        "timeout_seconds": data.read_timeout_seconds,
        "cache": data.cache,
        "cache_gib": data.cache_gib,
    }


def heldout_store(cfg: TrainSettings, store: Store, state: Mapping[str, Any]) -> Store | None:
    """The solves that this run measures itself on and does not learn from, if there are any: as many as it began with.

    Those within its store, or those of `data.heldout`.

    Raises:
        StoreError: `data.heldout` is of another teacher or another guidance than the store, or cannot be read.
    """
    if cfg.data.heldout is None and cfg.data.heldout_samples == 0:
        return None
    if cfg.data.heldout is not None:
        found = open_store(cfg.data.heldout, **_reading(cfg))
    else:
        try:
            if not is_there(cfg.data.store):  # a store of before, a small one, or one of pictures
                return None
            found = open_store(within(cfg.data.store), **_reading(cfg))
        except (StoreError, ReadError) as error:  # the run itself does not need them
            log.warning("the held-out loss is not measured: %s", error)
            return None
    shared = ("schedule_fingerprint", "teacher_hash", "resolution", "sizes", "times", "guidance")
    try:
        found.index.require(**{name: getattr(store.index, name) for name in shared})
    except StoreMismatch as error:
        raise StoreError(f"data.heldout: {error}; set it to solves made as those of data.store were") from None
    return found.first(min(len(found), state.get(HELDOUT_SAMPLES, len(found))))


def remedy(index: StoreIndex, wanted: Mapping[str, Any], learns_from_export: bool) -> str:
    """Advice for a store that does not fit: what to type."""
    shifted = wanted["shift"] not in (None, index.shift) and index.shift  # whose schedules differ as well
    teachers = ("teacher_hash",) if shifted else ("schedule_fingerprint", "teacher_hash")
    if any(getattr(index, name) != wanted[name] for name in teachers):
        key = "teacher" if learns_from_export else "model.pretrained_model_name_or_path"
        return f"set {key} to what solved it ({index.teacher_id}), or data.store to a new store for this one"
    guidance = json.dumps(index.guidance).replace(" ", "")
    settings = {
        "data.guidance": ("guidance", guidance),
        "data.solver": ("solver", index.solver),
        "data.solver_steps": ("solver_steps", index.solver_steps),
        "data.empty_prompts": ("empty_prompts", index.empty_prompts),
        "model.resolution": ("resolution", index.resolution),
        "model.shift": ("shift", index.shift),
        "data.sizes": ("sizes", json.dumps(index.sizes).replace(" ", "").replace('"', "") if index.sizes else "null"),
    }
    differing = {name for name, value in wanted.items() if value not in (None, getattr(index, name))}
    given = [f"{key}={value}" for key, (name, value) in settings.items() if name in differing]
    return f"set {' '.join(given)}, or data.store to a new store for these settings"


def as_begun(store: Store, state: Mapping[str, Any]) -> Store:
    """The samples that a run began with, of a store that may have grown since: their number decides the order of data.

    Raises:
        StoreError: it is another store, or has fewer samples now.
    """
    if state.get(STORE, store.index.identity) != store.index.identity:
        raise StoreError(
            f"data.store={store.folder.name} is not the store that the run has learned from until now: set data.store "
            "to that one, wherever it lies today, or choose another output_dir"
        )
    samples = state.get(SAMPLES, len(store))
    if samples > len(store):
        raise StoreError(
            f"data.store={store.folder.name} has {len(store)} samples and had {samples} when the run began: "
            "bring the old store back, or choose another output_dir"
        )
    if samples < len(store) and launched_rank() == 0:
        log.info(
            "the store has grown to %d samples: this run continues with the first %d, which it began with; "
            "a new output_dir uses them all",
            *(len(store), samples),
        )
    return store.first(samples)


def batch_changes(cfg: TrainSettings, method: Method, world_size: int) -> tuple[tuple[int, int], ...]:
    """The steps at which the size of the method's batches changes, first from the run's; each with the new size.

    Raises:
        ConfigError: a size that the ranks and their micro-batches cannot share evenly.
    """
    parts, size, changes = world_size * cfg.gradient_accumulation_steps, cfg.global_batch_size, []
    for step in method.starts:
        before, size = size, method.batch_size(step) or cfg.global_batch_size
        if size % parts:
            raise ConfigError(
                f"the method's batch_size={size} from step {step} on must be a multiple of {parts}: {world_size} "
                f"processes x gradient_accumulation_steps={cfg.gradient_accumulation_steps}; set another for that "
                "stage, or null for the run's"
            )
        if size != before:
            changes.append((step, size))
    return tuple(changes)
