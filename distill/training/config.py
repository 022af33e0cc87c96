"""From a command line to checked settings, and from settings to built objects.

Hydra composes `configs/`; pydantic checks the flat keys against the classes below, and every node with a `_target_`
against the signature of what it names. A mistake is one line that names the key, the value and what is allowed, and
exit code 2, before any network is built.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from distill.data.record import StoreError, short

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TARGETS = (
    "distill.methods.",
    "distill.models.",
    "distill.toy.",
    "distill.training.engine.",
    "distill.training.health.",
    "torch.optim.",
)
"""Where what settings may build is defined. A run's settings may be another person's: they must not call anything."""
MAX_OVERRIDE = 20_000
MAX_NESTING = 20
MAX_SETTINGS_BYTES = 1 << 18
MAX_LINE = 400

OmegaConf.register_new_resolver("toy", lambda name: str(_bundled(name)), replace=True)


class ConfigError(ValueError):
    """A setting is wrong; the message is one line for the person who set it."""


def check_component(node: dict[str, Any]) -> dict[str, Any]:
    """Checks a node's keys and value types against the signature of its `_target_`.

    Arguments without a value in the node are left to be passed as built objects.

    Raises:
        ValueError: a target that does not exist or is not for settings to name, an argument it does not take, or a
            value of the wrong type.
    """
    target = _target(node.get("_target_"))
    constructor = target.__init__ if inspect.isclass(target) else target
    allowed = [p for p in inspect.signature(target).parameters]
    hints = get_type_hints(constructor, include_extras=True)
    for key, value in node.items():
        if key == "_target_" or (key == "_partial_" and isinstance(value, bool)):
            continue
        if key not in allowed:
            shown = short(repr(key))
            raise ValueError(f"unknown key {shown}{_suggest(key, allowed)}; allowed: {', '.join(allowed)}")
        if _instructs(value):
            raise ValueError(f"{key}={short(repr(value))}: only a node itself has a _target_ and the like")
        node[key] = _checked(key, value, hints.get(key, Any))
    return node


def _target(path: object) -> Any:
    """The class or function that a node names: one that this package, or torch.optim, defines for that."""
    module, _, name = str(path).rpartition(".")
    if not str(path).startswith(TARGETS):
        raise ValueError(f"_target_ {short(repr(path))} is not one of {', '.join(f'{start}*' for start in TARGETS)}")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"_target_ {short(repr(path))} does not exist") from None
    if not (inspect.isclass(target) or inspect.isfunction(target)) or not f"{target.__module__}.".startswith(TARGETS):
        raise ValueError(f"_target_ {short(repr(path))} is no class or function of its own module")
    return target


def _instructs(value: Any) -> bool:
    """Whether a node within a node would make Hydra call something."""
    if isinstance(value, dict):
        return any(str(key).startswith("_") for key in value) or any(map(_instructs, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_instructs, value))


def _checked(key: str, value: Any, hint: Any) -> Any:
    """The value of an argument; a whole number for one may be written 20.0, but not "20" or true."""
    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        found = TypeAdapter(hint, config=config).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{key}={short(repr(value))}: {_sentence(error.errors()[0]['msg'])}") from None
    if isinstance(value, (bool, str)) and isinstance(found, (bool, int, float)) and type(found) is not type(value):
        raise ValueError(f"{key}={value!r}: must be {type(found).__name__}, not {type(value).__name__}")
    return found if type(found) is int and type(value) is float else value


def check_number(value: Any) -> Any:
    """Refuses true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


Component = Annotated[dict[str, Any], AfterValidator(check_component)]
Number = Annotated[float, BeforeValidator(check_number), Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Fraction = Annotated[Number, Field(ge=0, le=1)]


def check_several(count: int) -> int:
    """Raises ValueError for 1: what is compared is none, or two or more."""
    if count == 1:
        raise ValueError("must be 0, or 2 or more: one has nothing to be compared with")
    return count


Several = Annotated[Natural, AfterValidator(check_several)]


class Settings(BaseModel):
    """A group of settings; a key that it does not list is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSettings(Settings):
    """The teacher: a diffusers pipeline folder or hub id. `resolution` in pixels; null takes the teacher's own."""

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    resolution: Positive | None = None


class DataSettings(Settings):
    """The store: how it is written (all but the last two) and read.

    `guidance` is the teacher's w in `uncond + w (cond - uncond)`: a number, or a range [w_min, w_max] that every
    trajectory draws its own from; null where nothing was solved. `keep` is all, milestones (the edges of `segments`
    equal segments), or times.

    From pictures (`data=images`): `images` are tars or a folder, `min_size` is pixels of the shorter side (null: the
    teacher's resolution), `max_aspect_ratio` longer over shorter side, `vae` an autoencoder in place of the teacher's,
    `prompt_column` names the caption in JSON, and `num_samples` null takes them all.
    """

    store: str
    prompts: str | None = None
    prompt_column: str | None = None
    images: str | None = None
    min_size: Positive | None = None
    max_aspect_ratio: Annotated[Number, Field(ge=1)] = 2.0
    crop: Literal["center", "random"] = "center"
    vae: str | None = None
    num_samples: Positive | None = 2000
    samples_per_shard: Positive = 100
    solver: Literal["ddim", "heun", "dpmpp_2m"] = "ddim"
    solver_steps: Positive = 50
    guidance: (
        Annotated[Number, Field(ge=0)] | tuple[Annotated[Number, Field(ge=0)], Annotated[Number, Field(ge=0)]] | None
    )
    keep: Literal["all", "milestones"] | list[Natural] = "all"
    segments: Positive = 8
    dtype: Literal["float16", "float32"] = "float16"
    batch_size: Positive = 8
    max_bad_fraction: Fraction = 0.0
    verify_on_first_read: bool = False


class TrainSettings(Settings):
    """All of `configs/train.yaml`, which `train.py` and `make_trajectories.py` share."""

    model: ModelSettings
    data: DataSettings
    method: Component
    student: Component
    optimizer: Component
    engine: Component
    networks: dict[str, Component] = {}
    reward: Component | None = None
    reward_batch_size: Positive = 1
    perceptual: Component | None = None
    teacher: str | None = None
    start: str | None = None
    health: Component = {"_target_": "distill.training.health.Health"}
    output_dir: str
    seed: Natural
    max_train_steps: Positive
    global_batch_size: Positive
    gradient_accumulation_steps: Positive
    learning_rate: Annotated[Number, Field(gt=0)]
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    lr_warmup_steps: Natural
    max_grad_norm: Annotated[Number, Field(gt=0)] | None
    mixed_precision: Literal["no", "bf16"]
    gradient_checkpointing: bool
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None
    lora_rank: Positive
    lora_alpha: Annotated[Number, Field(gt=0)]
    dataloader_num_workers: Natural
    resume_from_checkpoint: str | Natural | None
    checkpointing_steps: Positive
    checkpoints_total_limit: Positive | None
    preemption_signals: Annotated[list[str], Field(min_length=1)] = ["SIGTERM", "SIGUSR1"]
    watchdog_minutes: Annotated[Number, Field(gt=0)] | None = 30
    validation_prompts: list[str] | str | None
    validation_steps: Positive
    validation_sampling_steps: Positive
    validation_guidance: Annotated[Number, Field(ge=0)] = 7.5  # runs of before it existed have none
    validation_diversity_seeds: Several = 0
    validation_teacher_steps: Natural = 0
    validation_reward: Component | None = None
    report_to: list[Literal["jsonl", "wandb", "tensorboard"]] | Literal["jsonl", "wandb", "tensorboard"]
    log_every: Positive


class ClusterSettings(Settings):
    """A file of `configs/cluster/`: machines, a process a GPU; GiB are 2^30 bytes, GB and tera powers of ten.

    `usable` is the share of a GPU's memory for tensors, `mfu` the share of its arithmetic that a training step reaches,
    `link_efficiency` that of its links; the latter are of one direction.
    """

    gpu: str
    nodes: Positive
    gpus_per_node: Positive
    memory_gib: Annotated[Number, Field(gt=0)]
    usable: Annotated[Number, Field(gt=0, le=1)]
    tflops: Annotated[Number, Field(gt=0)]
    tflops_float32: Annotated[Number, Field(gt=0)]
    mfu: Annotated[Number, Field(gt=0, le=1)]
    node_link_gb_s: Annotated[Number, Field(gt=0)]
    network_gb_s: Annotated[Number, Field(gt=0)]
    link_efficiency: Annotated[Number, Field(gt=0, le=1)]
    read_gb_s: Annotated[Number, Field(gt=0)]
    write_gb_s: Annotated[Number, Field(gt=0)]
    node_mtbf_hours: Annotated[Number, Field(gt=0)]
    restart_minutes: Annotated[Number, Field(ge=0)]


class PlanSettings(TrainSettings):
    """`configs/plan.yaml`: a training run's settings, and where it is to run."""

    cluster: ClusterSettings
    measured_step_seconds: Annotated[Number, Field(gt=0)] | None


class SampleSettings(Settings):
    """`configs/sample.yaml`: pictures from a pipeline, with or without a LoRA, or from a run, or a sweep over them."""

    model: ModelSettings
    run: str | None
    lora: str | None
    lora_scale: Number
    prompts: str | list[str]
    negative_prompt: str | None
    sweep: Literal["steps", "guidance", "lora"] | None
    steps: Positive | list[Positive] | None
    guidance: Annotated[Number, Field(ge=0)] | list[Annotated[Number, Field(ge=1)]] | None
    sampler: Literal["lcm", "euler", "ddim", "heun", "dpmpp_2m"] | None
    spacing: Literal["lcm", "trailing", "leading", "milestones"] | None
    teacher: str | None
    teacher_steps: Positive
    teacher_guidance: Annotated[Number, Field(ge=0)]
    num_images_per_prompt: Positive
    batch_size: Positive
    seed: Natural
    output_dir: str


class PlugInSettings(Settings):
    """`configs/plug_in.yaml`: the toy LCM-LoRA on a fine-tuned teacher and beside a style LoRA."""

    lora: str
    output_dir: str
    n: Annotated[int, Field(ge=100, strict=True)]
    steps: list[Positive]
    weights: list[Number]
    teacher_steps: Positive
    guidance: Annotated[Number, Field(ge=0)]
    guidances: list[Annotated[Number, Field(ge=0)]]
    fine_tune_steps: Positive
    style_steps: Positive
    style_rank: Positive
    style_alpha: Annotated[Number, Field(gt=0)]
    pictures: Positive
    train_batch_size: Positive
    batch_size: Positive
    seed: Natural


class ToyControlSettings(Settings):
    """`configs/toy_control.yaml`: the toy LCM-LoRA under a ControlNet of its teacher, and from pictures."""

    lora: str
    output_dir: str
    n: Annotated[int, Field(ge=100, strict=True)]
    steps: Annotated[list[Positive], Field(min_length=1)]
    strength: Annotated[Number, Field(gt=0, le=1)]
    teacher_steps: Positive
    guidance: Annotated[Number, Field(ge=0)]
    guidances: Annotated[list[Annotated[Number, Field(ge=0)]], Field(min_length=1)]
    control_steps: Positive
    pictures: Positive
    train_batch_size: Positive
    batch_size: Positive
    seed: Natural


def check_repository(name: str | None) -> str | None:
    """Raises ValueError for what cannot be the name of a repository on the hub; None is no repository."""
    if name is not None:
        try:
            validate_repo_id(name)
        except HFValidationError:
            name = ""
        if name.count("/") != 1:
            raise ValueError("must be organisation/name, of letters, digits, '-', '_' and '.', or null")
    return name


Repository = Annotated[str | None, AfterValidator(check_repository)]


class ExportSettings(Settings):
    """`configs/export.yaml`: files that other people's programs load, from a run's checkpoint."""

    run: str
    checkpoint: str | Natural
    use_ema: bool
    output_dir: str
    formats: Annotated[list[str], Field(min_length=1)] | None
    dtype: Literal["float16", "bfloat16", "float32"]
    card_prompts: list[str] | None
    metrics: str | None
    push_to_hub: Repository
    hub_private: bool


class EvaluatedModelSettings(Settings):
    """The teacher, as in `ModelSettings`; null is the student's own."""

    pretrained_model_name_or_path: str | None
    revision: str | None
    variant: str | None


class ProtocolSettings(Settings):
    """A file of `configs/protocol/`; see `distill.evaluation.protocol.Protocol`.

    `prompts` null are the toy's captions; `resolution` null is the teacher's; of `tuning_n` 0 no teacher is tuned.
    """

    name: str
    used_by: str
    prompts: str | None
    n: Positive
    resolution: Positive | None
    reference: str | None
    matching: bool
    shown_at: Positive | None
    clip: str | None
    clip_weights: str | None
    clip_prefix: str
    metrics: Annotated[list[str], Field(min_length=1)]
    tuning_n: Natural
    tuning_guidances: list[Annotated[Number, Field(ge=0)]]


class WeightsSettings(Settings):
    """What metrics are loaded from: files or hub ids."""

    inception: str | None
    clip: str | None
    aesthetic: str | None
    aesthetic_clip: str | None
    image_reward: str | None
    bert_tokenizer: str | None
    hps: str | None
    pickscore: str | None
    pickscore_tokenizer: str | None


class EvaluateSettings(Settings):
    """`configs/evaluate.yaml`: a student beside its teacher, or a teacher alone, by a protocol."""

    protocol: ProtocolSettings
    model: EvaluatedModelSettings
    student: str | None
    watch: str | None
    watch_metric: str
    watch_seconds: Positive
    guidance: Annotated[Number, Field(ge=0)] | None
    steps: Annotated[list[Positive], Field(min_length=1)] | None
    samplers: Annotated[list[str], Field(min_length=1)] | None
    guidances: Annotated[list[Annotated[Number, Field(ge=0)]], Field(min_length=1)] | None
    teacher_steps: Positive
    n: Positive | None
    store: str | None
    store_samples: Positive
    weights: WeightsSettings
    dtype: Literal["float16", "bfloat16", "float32"]
    batch_size: Positive
    block_size: Positive
    output_dir: str


class ReportSettings(Settings):
    """`configs/report.yaml`: evaluations on one page."""

    evaluations: Annotated[list[str], Field(min_length=1)]
    output_dir: str


class ScoreRewardSettings(Settings):
    """`configs/score_reward.yaml`: the checkpoints of toy runs, by a reward and by the judge."""

    reward: Component
    run: str | Annotated[list[str], Field(min_length=1)]
    output_dir: str
    steps: Positive
    n: Annotated[int, Field(ge=100, strict=True)]
    batch_size: Positive


class ShowSettings(Settings):
    """`configs/show_lightning.yaml`: students of several kinds on the toy world, with several seeds."""

    output_dir: str
    overrides: list[str]
    seeds: Annotated[list[Natural], Field(min_length=1)]
    n: Annotated[int, Field(ge=100, strict=True)]
    tuning_n: Annotated[int, Field(ge=100, strict=True)]
    guidances: list[Annotated[Number, Field(ge=0)]]
    batch_size: Positive


class ShowMLCMSettings(ShowSettings):
    """`configs/show_mlcm.yaml`: MLCM-LoRA beside LCM-LoRA on the toy world."""

    steps: list[Positive]


READERS = ("verify_shards", "evaluate", "sample")


class LinkSettings(Settings):
    """A link of a chain: a run of `script` with `overrides`, of the chain's experiment or, for one that only looks at
    what was made, of its own settings.

    A training run is exported when it is finished, in the formats `export` (null: its student's usual ones); `teacher`
    and `start` name the earlier links whose exports become those settings of it. `evaluate` and `sample` look at the
    earlier link `run`, `verify_shards` at the store before it. With `seeds` there is a link for each, "NAME-SEED".
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    script: Literal["train", "make_trajectories", "verify_shards", "evaluate", "sample"] = "train"
    overrides: list[str] = []
    teacher: str | None = None
    start: str | None = None
    run: str | None = None
    export: Annotated[list[str], Field(min_length=1)] | None = None
    seeds: Annotated[list[Natural], Field(min_length=1)] | None = None


def each_seed(links: list[LinkSettings]) -> list[LinkSettings]:
    """With a link for each of its seeds in the place of one that has them."""

    def seeded(link: LinkSettings, seed: int) -> LinkSettings:
        given = {"name": f"{link.name}-{seed}", "overrides": [*link.overrides, f"seed={seed}"], "seeds": None}
        return link.model_copy(update=given)

    return [one for link in links for one in ([seeded(link, s) for s in link.seeds] if link.seeds else [link])]


def check_links(links: list[LinkSettings]) -> list[LinkSettings]:
    """Raises ValueError for a name that is given twice, or a link that builds on none of those before it."""
    names = [link.name for link in links]
    for i, link in enumerate(links):
        before = [other.name for other in links[:i] if other.script == "train"]
        if link.name in names[:i]:
            raise ValueError(f"two links are called {link.name!r}")
        if link.script != "train" and (link.start or link.export):
            raise ValueError(f"{link.name}: start and export are for links with script: train")
        if link.script in READERS and link.teacher:
            raise ValueError(f"{link.name}: teacher is for links that train, or make trajectories")
        if (link.script in ("evaluate", "sample")) != (link.run is not None):
            raise ValueError(f"{link.name}: run is for links with script: evaluate or sample, which need it")
        if link.script == "verify_shards" and link.overrides:
            raise ValueError(f"{link.name}: verify_shards has no settings to override")
        if link.script == "verify_shards" and not any(other.script == "make_trajectories" for other in links[:i]):
            raise ValueError(f"{link.name}: no link before it writes a store that it could verify")
        for key, name in {"teacher": link.teacher, "start": link.start, "run": link.run}.items():
            if name in names[i:]:
                raise ValueError(f"{link.name}: {key} {name!r} is not before it in the chain")
            if name is not None and name not in before:
                allowed = ", ".join(before) or "none, it is the first"
                raise ValueError(f"{link.name}: no {key} {name!r}{_suggest(name, before)}; allowed: {allowed}")
    return links


class ChainSettings(Settings):
    """A file of `configs/chain/`: links, in the order in which they are run."""

    experiment: str
    links: Annotated[list[LinkSettings], Field(min_length=1), AfterValidator(each_seed), AfterValidator(check_links)]


Strings = list[str]  # `list` is one of the settings


class RunChainSettings(Settings):
    """`configs/run_chain.yaml`: the links of a chain, one after another."""

    chain: ChainSettings
    output_dir: str
    overrides: Strings
    launch: str | None
    link: str | None
    list: bool


def like(pattern: str, what: str) -> BeforeValidator:
    """Refuses what does not match, whole, and says what would."""

    def check(value: Any) -> Any:
        if value is not None and (not isinstance(value, str) or not re.fullmatch(pattern, value)):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return BeforeValidator(check)


Word = Annotated[str | None, like(r"[\w.-]+", "a name")]
Memory = Annotated[str | None, like(r"\d+[MGT]", "an amount of memory such as 200G")]
Duration = Annotated[str | None, like(r"(\d+-)?\d+:\d\d:\d\d", "a time such as 12:00:00 or 2-00:00:00")]
Option = Annotated[str, like(r"--[a-z][a-z-]*(=\S+)?", "an option of sbatch such as --qos=high")]


class SlurmSettings(Settings):
    """Of a job: `slurm` in `configs/submit.yaml`. What is null is left to the cluster."""

    script: Literal["train", "make_trajectories"]
    nodes: Positive
    gpus_per_node: Positive | None
    processes_per_node: Positive | None
    cpus_per_task: Positive | None
    mem: Memory
    time: Duration
    partition: Word
    account: Word
    array: Positive | None
    options: list[Option]
    grace_seconds: Annotated[int, Field(ge=90, strict=True)]
    max_failures: Natural


class SubmitSettings(TrainSettings):
    """`configs/submit.yaml`: a run, and the job that it is to be."""

    slurm: SlurmSettings
    dry_run: bool


S = TypeVar("S", bound=Settings)


def load(config_name: str, schema: type[S], overrides: Sequence[str]) -> S:
    """Composes `configs/<config_name>.yaml` with the overrides and checks it.

    Raises:
        ConfigError: one line about the first mistake.
    """
    for override in overrides:
        check_override(override)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            values = _plain_values(config_name, overrides)
            composed = compose(config_name, overrides=[o for o in overrides if o not in values])
            for given_value in values.values():
                OmegaConf.update(composed, given_value.key_or_group, given_value.value())
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_hydra_line(error, config_name)) from None
        except (yaml.YAMLError, ValueError, TypeError, OSError, RecursionError) as error:  # Hydra's own stumbles
            raise ConfigError(f"the settings cannot be composed: {_first_line(error)}") from None
    return check(composed, schema)


def _plain_values(config_name: str, overrides: Sequence[str]) -> dict[str, Override]:
    """The overrides of keys that have a plain value here, yet the name of a group, which Hydra takes them for.

    Raises what Hydra's parser raises.
    """
    own = yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text())
    plain = {key for key, value in own.items() if not isinstance(value, (dict, list)) and (CONFIGS / key).is_dir()}
    parser = OverridesParser.create()
    return {o: parser.parse_override(o) for o in overrides if o.partition("=")[0] in plain}


def check_override(override: str) -> None:
    """Refuses what Hydra's parser would take minutes over. Raises ConfigError."""
    depth = deepest = 0
    for character in override:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    if len(override) > MAX_OVERRIDE or deepest > MAX_NESTING:
        found = f"{len(override)} characters, {deepest} brackets deep"
        raise ConfigError(
            f"{short(override)} is too much for a setting ({found}): allowed are {MAX_OVERRIDE} and {MAX_NESTING}"
        )


def check(composed: DictConfig, schema: type[S]) -> S:
    """The composed config as checked settings; interpolations resolved.

    Raises:
        ConfigError: one line about the first mistake.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} has no value: set {missing[0]}=...")
        return validated(OmegaConf.to_container(composed, resolve=True), schema)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}" if error.full_key else _first_line(error)) from None
    except RecursionError:
        raise ConfigError("the settings are nested too deeply") from None


def validated(settings: Any, schema: type[S]) -> S:
    """Raises ConfigError: one line about the first mistake."""
    try:
        return schema.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_validation_line(error, schema)) from None
    except RecursionError:
        raise ConfigError("the settings are nested too deeply") from None


def read_settings(path: str | Path, schema: type[S]) -> S:
    """Settings that were written down whole, as `--cfg` prints them and a run's folder holds them.

    Raises:
        ConfigError: one line about the first mistake.
        FileNotFoundError: no such file.
    """
    try:
        return validated(read_yaml(path), schema)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_yaml(path: str | Path) -> Any:
    """What a YAML file says, be it anyone's.

    Raises:
        ConfigError: it is not YAML, too long, nested too deeply, or says a key twice.
        FileNotFoundError: no such file.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_SETTINGS_BYTES + 1)
    if len(data) > MAX_SETTINGS_BYTES:
        raise ConfigError(f"it has more than the {MAX_SETTINGS_BYTES} bytes that are allowed for settings")
    try:
        return yaml.load(data, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"it is not YAML for settings: {_first_line(error)}") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML in which nothing is said twice, and without aliases, with which a short text fills any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not allowed{self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [name for name, following in pairwise(sorted(names)) if name == following]:
            raise yaml.YAMLError(f"{short(repr(repeated[0]))} is said twice")
        return super().construct_mapping(node, deep)


def given(arguments: Sequence[str], config_name: str, schema: type[S]) -> S:
    """The settings of a command line: overrides of a config, or `settings=FILE`, which has them all.

    Raises:
        ConfigError: one line about the first mistake.
        FileNotFoundError: no such file.
    """
    files = [argument.removeprefix("settings=") for argument in arguments if argument.startswith("settings=")]
    if not files:
        return load(config_name, schema, arguments)
    if len(arguments) > 1:
        raise ConfigError(f"settings={files[0]} is all of the settings: nothing may be given beside it")
    return read_settings(files[0], schema)


def build(node: Mapping[str, Any], **objects: Any) -> Any:
    """Instantiates a node; `objects` are the arguments that are built things.

    Raises:
        ConfigError: what the constructor, which checks its own ranges, had to say.
    """
    try:
        return instantiate(dict(node), _convert_="all", **objects)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise ConfigError(str(error.__cause__)) from None
        raise


@contextmanager
def checking(what: str = "") -> Iterator[None]:
    """Turns a ValueError of whatever is checked inside into a ConfigError: the user's to mend, not a bug."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{what}{error}") from None


def run_script(main: Callable[[S], None], config_name: str, schema: type[S]) -> None:
    """What every script calls: settings from the command line, one line and exit code 2 for what the user can mend.

    `--cfg` prints the composed settings and stops; `settings=FILE` takes what it printed, instead of composing any.
    """
    arguments = sys.argv[1:]
    show = [a for a in arguments if a in ("--cfg", "--help", "-h")]
    try:
        flags = [a for a in arguments if a.startswith("-") and a not in show]
        if flags:
            raise ConfigError(f"unknown flag {flags[0]}: settings are given as key=value, and --cfg prints them")
        settings = given([a for a in arguments if a not in show], config_name, schema)
        if show:
            print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
            return
        main(settings)
    except (ConfigError, StoreError, FileNotFoundError) as error:
        sys.exit(fail(error))


def fail(error: Exception) -> int:
    """Prints the one line of a mistake; returns exit code 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _bundled(name: str) -> Path:
    """${toy:teacher} and ${toy:prompts.txt}: what comes with the package."""
    return Path(__file__).resolve().parents[1] / "toy" / name


def _hydra_line(error: Exception, config_name: str) -> str:
    text = f"{error}\n{error.__cause__ or ''}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        known = list(_leaves(yaml_keys(config_name)))
        return f"unknown key {short(repr(unknown[1]))}{_suggest(unknown[1], known)}"
    group = re.search(r"Could not find '([^']+)'", text)
    if group:
        folder, _, name = group[1].rpartition("/")
        options = sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))
        return short(f"unknown {folder}={name}{_suggest(name, options)}; allowed: {', '.join(options)}", MAX_LINE)
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return short(next(iter(str(error).splitlines()), "") or type(error).__name__, MAX_LINE)


def yaml_keys(config_name: str) -> dict[str, Any]:
    """The keys of a config without overrides, for suggestions."""
    composed = compose(config_name)
    return OmegaConf.to_container(composed, resolve=False)  # type: ignore[return-value]


def _leaves(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in node.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return keys


def _validation_line(error: ValidationError, schema: type[Settings]) -> str:
    # A wrong flat key is wrong in the nodes that take it over too: say the one that was set.
    first = min(error.errors(), key=lambda e: e["type"] == "value_error")
    # Names of union members and the like stand in `loc` beside keys; only keys help the reader.
    path = [str(part) for part in first["loc"] if re.fullmatch(r"[a-z_]\w*|\d+", str(part)) and part not in _KINDS]
    key = short(".".join(path) or "the whole")
    if first["type"] == "extra_forbidden":
        key = short(".".join(map(str, first["loc"])))
        return f"unknown key {key!r}{_suggest(key, _fields(schema))}"
    if first["type"] == "value_error":
        return short(f"{key}: {_sentence(first['msg'].removeprefix('Value error, '))}", MAX_LINE)
    same = [e for e in error.errors() if e["loc"][:1] == first["loc"][:1]]
    allowed = "; or ".join(dict.fromkeys(_sentence(e["msg"]) for e in same))
    return short(f"{key}={short(repr(first['input']))}: {allowed}", MAX_LINE)


_KINDS = {"int", "float", "str", "bool", "constrained", "none", "tuple", "list", "literal"}


def _fields(schema: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in schema.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Settings):
            names += _fields(nested, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _suggest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _sentence(message: str) -> str:
    return message[:1].lower() + message[1:]
