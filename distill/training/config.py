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
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

OmegaConf.register_new_resolver("toy", lambda name: str(_bundled(name)), replace=True)


class ConfigError(ValueError):
    """A setting is wrong; the message is one line for the person who set it."""


def check_component(node: dict[str, Any]) -> dict[str, Any]:
    """Checks a node's keys and value types against the signature of its `_target_`.

    Arguments without a value in the node are left to be passed as built objects.

    Raises:
        ValueError: no such target, an argument it does not take, or a value of the wrong type.
    """
    module, _, name = str(node.get("_target_", "")).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"_target_ {node.get('_target_')!r} does not exist") from None
    constructor = target.__init__ if inspect.isclass(target) else target
    allowed = [p for p in inspect.signature(target).parameters]
    hints = get_type_hints(constructor, include_extras=True)
    for key, value in node.items():
        if key.startswith("_"):
            continue
        if key not in allowed:
            raise ValueError(f"unknown key {key!r}{_suggest(key, allowed)}; allowed: {', '.join(allowed)}")
        try:
            TypeAdapter(hints.get(key, Any), config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{key}={value!r}: {_sentence(error.errors()[0]['msg'])}") from None
    return node


Component = Annotated[dict[str, Any], AfterValidator(check_component)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


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
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 2.0
    crop: Literal["center", "random"] = "center"
    vae: str | None = None
    num_samples: Positive | None = 2000
    samples_per_shard: Positive = 100
    solver: Literal["ddim", "heun", "dpmpp_2m"] = "ddim"
    solver_steps: Positive = 50
    guidance: Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None
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
    learning_rate: Annotated[float, Field(gt=0)]
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    lr_warmup_steps: Natural
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    mixed_precision: Literal["no", "bf16"]
    gradient_checkpointing: bool
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    lora_rank: Positive
    lora_alpha: Annotated[float, Field(gt=0)]
    dataloader_num_workers: Natural
    resume_from_checkpoint: str | int | None
    checkpointing_steps: Positive
    checkpoints_total_limit: Positive | None
    validation_prompts: list[str] | str | None
    validation_steps: Positive
    validation_sampling_steps: Positive
    validation_guidance: Annotated[float, Field(ge=0)] = 7.5  # runs of before it existed have none
    validation_diversity_seeds: Several = 0
    report_to: list[Literal["jsonl", "wandb", "tensorboard"]] | Literal["jsonl", "wandb", "tensorboard"]
    log_every: Positive


class SampleSettings(Settings):
    """`configs/sample.yaml`: pictures from a pipeline, with or without a LoRA, or from a run, or a sweep over them."""

    model: ModelSettings
    run: str | None
    lora: str | None
    lora_scale: float
    prompts: str | list[str]
    negative_prompt: str | None
    sweep: Literal["steps", "guidance", "lora"] | None
    steps: Positive | list[Positive] | None
    guidance: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=1)]] | None
    sampler: Literal["lcm", "euler", "ddim", "heun", "dpmpp_2m"] | None
    spacing: Literal["lcm", "trailing", "leading", "milestones"] | None
    teacher: str | None
    teacher_steps: Positive
    teacher_guidance: Annotated[float, Field(ge=0)]
    num_images_per_prompt: Positive
    batch_size: Positive
    seed: Natural
    output_dir: str


class PlugInSettings(Settings):
    """`configs/plug_in.yaml`: the toy LCM-LoRA on a fine-tuned teacher and beside a style LoRA."""

    lora: str
    output_dir: str
    n: Annotated[int, Field(ge=100)]
    steps: list[Positive]
    weights: list[float]
    teacher_steps: Positive
    guidance: Annotated[float, Field(ge=0)]
    guidances: list[Annotated[float, Field(ge=0)]]
    fine_tune_steps: Positive
    style_steps: Positive
    style_rank: Positive
    style_alpha: Annotated[float, Field(gt=0)]
    pictures: Positive
    train_batch_size: Positive
    batch_size: Positive
    seed: Natural


class ToyControlSettings(Settings):
    """`configs/toy_control.yaml`: the toy LCM-LoRA under a ControlNet of its teacher, and from pictures."""

    lora: str
    output_dir: str
    n: Annotated[int, Field(ge=100)]
    steps: Annotated[list[Positive], Field(min_length=1)]
    strength: Annotated[float, Field(gt=0, le=1)]
    teacher_steps: Positive
    guidance: Annotated[float, Field(ge=0)]
    guidances: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]
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
    checkpoint: str | int
    use_ema: bool
    output_dir: str
    formats: Annotated[list[str], Field(min_length=1)] | None
    dtype: Literal["float16", "bfloat16", "float32"]
    card_prompts: list[str] | None
    metrics: str | None
    push_to_hub: Repository
    hub_private: bool


class EvaluateSettings(Settings):
    """`configs/evaluate.yaml`: a student of the toy teacher beside it."""

    run: str
    lora: str
    guidance: Annotated[float, Field(ge=0)] | None
    output_dir: str
    n: Annotated[int, Field(ge=100)]
    tuning_n: Annotated[int, Field(ge=100)]
    steps: list[Positive]
    guidances: list[Annotated[float, Field(ge=0)]]
    batch_size: Positive


class ScoreRewardSettings(Settings):
    """`configs/score_reward.yaml`: the checkpoints of toy runs, by a reward and by the judge."""

    reward: Component
    run: str | Annotated[list[str], Field(min_length=1)]
    output_dir: str
    steps: Positive
    n: Annotated[int, Field(ge=100)]
    batch_size: Positive


class ShowSettings(Settings):
    """`configs/show_lightning.yaml`: students of several kinds on the toy world, with several seeds."""

    output_dir: str
    overrides: list[str]
    seeds: Annotated[list[Natural], Field(min_length=1)]
    n: Annotated[int, Field(ge=100)]
    tuning_n: Annotated[int, Field(ge=100)]
    guidances: list[Annotated[float, Field(ge=0)]]
    batch_size: Positive


class ShowMLCMSettings(ShowSettings):
    """`configs/show_mlcm.yaml`: MLCM-LoRA beside LCM-LoRA on the toy world."""

    steps: list[Positive]


class LinkSettings(Settings):
    """A link of a chain: a run of `script` with `overrides` of the chain's experiment.

    A training run is exported when it is finished, in the formats `export` (null: its student's usual ones); `teacher`
    and `start` name the earlier links whose exports become those settings of it.
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    script: Literal["train", "make_trajectories"] = "train"
    overrides: list[str] = []
    teacher: str | None = None
    start: str | None = None
    export: Annotated[list[str], Field(min_length=1)] | None = None


def check_links(links: list[LinkSettings]) -> list[LinkSettings]:
    """Raises ValueError for a name that is given twice, or a link that builds on none of those before it."""
    names = [link.name for link in links]
    for i, link in enumerate(links):
        before = [other.name for other in links[:i] if other.script == "train"]
        if link.name in names[:i]:
            raise ValueError(f"two links are called {link.name!r}")
        if link.script != "train" and (link.start or link.export):
            raise ValueError(f"{link.name}: start and export are for links with script: train")
        for key, name in {"teacher": link.teacher, "start": link.start}.items():
            if name in names[i:]:
                raise ValueError(f"{link.name}: {key} {name!r} is not before it in the chain")
            if name is not None and name not in before:
                allowed = ", ".join(before) or "none, it is the first"
                raise ValueError(f"{link.name}: no {key} {name!r}{_suggest(name, before)}; allowed: {allowed}")
    return links


class ChainSettings(Settings):
    """A file of `configs/chain/`: links, in the order in which they are run."""

    experiment: str
    links: Annotated[list[LinkSettings], Field(min_length=1), AfterValidator(check_links)]


Strings = list[str]  # `list` is one of the settings


class RunChainSettings(Settings):
    """`configs/run_chain.yaml`: the links of a chain, one after another."""

    chain: ChainSettings
    output_dir: str
    overrides: Strings
    launch: str | None
    link: str | None
    list: bool


S = TypeVar("S", bound=Settings)


def load(config_name: str, schema: type[S], overrides: Sequence[str]) -> S:
    """Composes `configs/<config_name>.yaml` with the overrides and checks it.

    Raises:
        ConfigError: one line about the first mistake.
    """
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            composed = compose(config_name, overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_hydra_line(error, config_name)) from None
    return check(composed, schema)


def check(composed: DictConfig, schema: type[S]) -> S:
    """The composed config as checked settings; interpolations resolved.

    Raises:
        ConfigError: one line about the first mistake.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: set {missing[0]}=...")
    try:
        return schema.model_validate(OmegaConf.to_container(composed, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    except ValidationError as error:
        raise ConfigError(_validation_line(error, schema)) from None


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

    `--cfg` prints the composed settings and stops.
    """
    arguments = sys.argv[1:]
    show = [a for a in arguments if a in ("--cfg", "--help", "-h")]
    try:
        flags = [a for a in arguments if a.startswith("-") and a not in show]
        if flags:
            raise ConfigError(f"unknown flag {flags[0]}: settings are given as key=value, and --cfg prints them")
        settings = load(config_name, schema, [a for a in arguments if a not in show])
        if show:
            print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
            return
        main(settings)
    except (ConfigError, FileNotFoundError) as error:
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
        return f"unknown key {unknown[1]!r}{_suggest(unknown[1], known)}"
    group = re.search(r"Could not find '([^']+)'", text)
    if group:
        folder, _, name = group[1].rpartition("/")
        options = sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))
        return f"unknown {folder}={name}{_suggest(name, options)}; allowed: {', '.join(options)}"
    return str(error).splitlines()[0]


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
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_suggest(key, _fields(schema))}"
    if first["type"] == "value_error":
        return f"{key}: {_sentence(first['msg'].removeprefix('Value error, '))}"
    allowed = "; or ".join(dict.fromkeys(_sentence(e["msg"]) for e in error.errors() if e["loc"][0] == first["loc"][0]))
    return f"{key}={first['input']!r}: {allowed}"


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
