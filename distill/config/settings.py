"""What the settings of each script are: the checked form of the files in `configs/`, key by key.

`distill/training/config.py` composes, checks and builds them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from distill.config.loading import Settings, check_component, suggest
from distill.data.sizes import PRESETS, read_size, read_sizes
from distill.diffusion.samplers import check_sampler, check_solver, check_spacing, read_sampling
from distill.models.derived import WeightedLoRA
from distill.models.families import check_family


def check_number(value: Any) -> Any:
    """Refuses true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


def check_path(text: str) -> str:
    """A path as it is opened: `~` is the home folder. Relative paths and URLs stay as they were written.

    Raises:
        ValueError: no path, or the home folder of a user that is unknown.
    """
    found = home_expanded(text)
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is no path: give one, or leave the setting out")
    if found.startswith("~"):
        raise ValueError(
            f"{text!r} begins with the home folder of an unknown user: write ./{text} for a file so called"
        )
    return found


def home_expanded(text: str) -> str:
    """The text with the home folder in the place of a `~` that begins it; a text that is no such path as it is."""
    return os.path.expanduser(text)


def _written(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


FilePath = Annotated[str, BeforeValidator(_written), AfterValidator(check_path)]
"""A file's, a folder's or a model's place: a path, a URL, or a name on the hub."""
TextOrPath = Annotated[str, BeforeValidator(_written), AfterValidator(home_expanded)]
"""A path, or the text itself that such a file would hold."""
Flag = Annotated[bool, Field(strict=True)]
Compile = Flag | Literal["inductor", "aot_eager", "eager"]
Attention = Literal["auto", "flash", "efficient", "cudnn", "math"]
Component = Annotated[dict[str, Any], AfterValidator(check_component)]
Number = Annotated[float, BeforeValidator(check_number), Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Minutes = Annotated[Number, Field(ge=0)] | None
"""A limit; 0 and null are none."""
Fraction = Annotated[Number, Field(ge=0, le=1)]


def check_size(text: str) -> str:
    """Raises ValueError for what is no WIDTHxHEIGHT."""
    return str(read_size(text))


def check_sizes(said: Any) -> Any:
    """Sizes as texts in a list, from a list, one size or the name of a list; `prompts` as it is.

    Raises:
        ValueError: none of them.
    """
    if said in (None, OF_PROMPTS):
        return said
    if not isinstance(said, (str, list, tuple)) or any(not isinstance(text, str) for text in said):
        raise ValueError(f"must be sizes such as [1024x1024,1152x896], or one of {', '.join(PRESETS)}")
    return [str(size) for size in read_sizes(said)]


OF_PROMPTS = "prompts"
"""What `data.sizes` says where the file of prompts has the size of each."""
ImageSizeText = Annotated[str, AfterValidator(check_size)]
SizeList = Annotated[list[str] | str, BeforeValidator(check_sizes)]
StoreSizes = Annotated[Literal["prompts"] | list[str] | None, BeforeValidator(check_sizes)]


def check_several(count: int) -> int:
    """Raises ValueError for 1: what is compared is none, or two or more."""
    if count == 1:
        raise ValueError("must be 0, or 2 or more: one has nothing to be compared with")
    return count


Several = Annotated[Natural, AfterValidator(check_several)]


def check_named(check: Callable[[str], None]) -> Callable[[str], str]:
    """A validator of what raises ValueError for a name that is not known."""

    def checked(name: str) -> str:
        check(name)
        return name

    return checked


def check_sampling(text: str) -> str:
    """Raises ValueError for what is no SAMPLER, SAMPLER/SPACING or SAMPLER/SPACING/GAMMA that go together."""
    read_sampling(text)
    return text


Sampler = Annotated[str, AfterValidator(check_named(check_sampler))]
Spacing = Annotated[str, AfterValidator(check_named(check_spacing))]
Solver = Annotated[str, AfterValidator(check_named(check_solver))]
FamilyName = Annotated[str, AfterValidator(check_named(check_family))]


def check_lora(text: str) -> str:
    """A LoRA with its weight, `PATH:WEIGHT`. Raises ValueError for anything else."""
    WeightedLoRA.read(text)
    return home_expanded(text)


LoRAText = Annotated[str, BeforeValidator(_written), AfterValidator(check_lora)]
"""A LoRA's file or folder, with its weight behind a colon; without one the weight is 1."""


class ModelSettings(Settings):
    """The teacher: a diffusers pipeline folder or hub id. `resolution` in pixels; null takes the teacher's own.

    It may be a checkpoint in one file too; then `config` is a pipeline folder, or hub id, of the same architecture,
    which gives what the file lacks: configs, tokenizers, and parts that it does not hold. `loras` are merged into it,
    each `PATH:WEIGHT`; what is learned from, hashed and exported is then the merged model. Both are made once, into the
    cache.

    `family` is the one that the other settings were chosen for, as experiments say it; null takes any. `shift` is for
    flow matching, sigma = shift u / (1 + (shift - 1) u) at u = t / T: the noise levels that a student learns; null
    takes what the teacher's scheduler says, by its config or by `resolution`. Text encoders compute in `text_dtype`.
    `max_tokens` is the length of a prompt where they leave it open (a T5, an LLM), a pipeline's `max_sequence_length`;
    null takes what the pipeline takes by itself.
    `allow_distilled` takes a model for which few steps are enough already, and from which there is little to learn.
    """

    pretrained_model_name_or_path: FilePath
    revision: str | None = None
    variant: str | None = None
    config: FilePath | None = None
    loras: list[LoRAText] = []
    resolution: Positive | None = None
    shift: Annotated[Number, Field(gt=0)] | None = None
    family: FamilyName | None = None
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    max_tokens: Positive | None = None
    allow_distilled: Flag = False


class DataSettings(Settings):
    """The store: how it is written (all but `heldout` and the last six) and read.

    `guidance` is the teacher's w in `uncond + w (cond - uncond)`: a number, or a range [w_min, w_max] from which
    each trajectory's is sampled; null where nothing was solved. `keep` is all, milestones (the edges of `segments`
    equal segments), or times. `teacher_dtype` is what the teacher's network computes in while it solves (from pictures:
    the autoencoder given as `vae`): auto is float16 on GPUs, which rounds x0 an eighth as much as bfloat16 does, and
    float32 on CPUs.

    `empty_prompts` is the share of samples without a prompt, from which students learn the unconditional answers that
    classifier-free guidance needs when they are sampled. With `share_texts` samples of a prompt share its text; auto:
    those of transformers do, whose texts are large.

    `sizes` are those of a store of several, as WIDTHxHEIGHT or the name of a list (null: squares of
    `model.resolution`). A trajectory has each as often as `size_weights` say (null: all alike), or, of `prompts`, the
    one that the columns width and height of its prompt say; a picture has the one whose aspect ratio is nearest.

    From pictures (`data=images`): `images` are tars or a folder, `min_size` is pixels of the shorter side (null: the
    teacher's resolution, or as many as a picture needs not to be enlarged to its size), `max_aspect_ratio` longer over
    shorter side, `vae` an autoencoder in place of the teacher's, `prompt_column` names the caption in JSON, and
    `num_samples` null takes them all.

    Held out, that is written beside the store, never learned from, and measured at every validation:
    `heldout_samples`, of which auto is a fiftieth of `num_samples` and 64 at most, and 0 neither writes nor measures
    any; or those of another store, `heldout`.

    Of a remote store, a request may take `read_timeout_seconds`, and what was read and found to be right is kept in the
    local folder `cache`, of `cache_gib` at most, which all processes of a node share and any number of runs may.
    """

    store: FilePath
    prompts: list[str] | TextOrPath | None = None
    prompt_column: str | None = None
    empty_prompts: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    share_texts: Literal["auto"] | Flag = "auto"
    images: FilePath | None = None
    sizes: StoreSizes = None
    size_weights: list[Annotated[Number, Field(gt=0)]] | None = None
    min_size: Positive | None = None
    max_aspect_ratio: Annotated[Number, Field(ge=1)] = 2.0
    crop: Literal["center", "random"] = "center"
    vae: FilePath | None = None
    num_samples: Positive | None = 2000
    heldout_samples: Literal["auto"] | Natural = "auto"
    heldout: FilePath | None = None
    samples_per_shard: Positive = 100
    solver: Solver = "ddim"
    solver_steps: Positive = 50
    guidance: (
        Annotated[Number, Field(ge=0)] | tuple[Annotated[Number, Field(ge=0)], Annotated[Number, Field(ge=0)]] | None
    )
    keep: Literal["all", "milestones"] | list[Natural] = "all"
    segments: Positive = 8
    dtype: Literal["float16", "float32"] = "float16"
    teacher_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    batch_size: Positive = 8
    max_bad_fraction: Fraction = 0.0
    verify_on_first_read: Flag = False
    read_retry_seconds: Annotated[Number, Field(ge=0)] = 120
    read_timeout_seconds: Annotated[Number, Field(gt=0)] = 60
    cache: FilePath | None = None
    cache_gib: Annotated[Number, Field(gt=0)] = 100


def follow_stages(steps: Any, info: ValidationInfo) -> Any:
    """Replaces null by what the stages of the method take. Raises ValueError: it has none."""
    if steps is not None or "method" not in info.data:  # which is wrong itself, and said to be so
        return 1 if steps is None else steps
    stages = info.data["method"].get("stages")
    lengths = [stage.get("iterations") for stage in stages or () if isinstance(stage, dict)]
    if not lengths or not all(type(length) is int for length in lengths):
        raise ValueError("null is for a method with stages, whose iterations it follows: set max_train_steps=...")
    return sum(lengths)


def check_trackers(trackers: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for settings of a tracker that is not chosen, or what `check_component` raises."""
    for name, node in trackers.items():
        if not isinstance(node, dict) or "_target_" not in node:
            raise ValueError(f"{name} is set, and nothing is sent there: set tracking={name} as well")
        check_component(node)
    return trackers


TRACKERS_BEFORE = {
    "wandb": "distill.training.tracking.WandbTracker",
    "tensorboard": "distill.training.tracking.TensorboardTracker",
}


def trackers_of_before(settings: Any) -> Any:
    """Settings with `tracking` in the place of `report_to` and `wandb`, by which runs of before have recorded it."""
    if not isinstance(settings, dict) or not settings.keys() & {"report_to", "wandb"}:
        return settings
    kept = {key: value for key, value in settings.items() if key not in ("report_to", "wandb")}
    said, own = settings.get("report_to") or [], settings.get("wandb") or {}
    names = [said] if isinstance(said, str) else said
    if unknown := [name for name in names if name not in ("jsonl", *TRACKERS_BEFORE)]:
        raise ValueError(f"report_to: {unknown[0]!r} is not known; allowed: jsonl, {', '.join(TRACKERS_BEFORE)}")
    found = {name: {"_target_": TRACKERS_BEFORE[name]} for name in names if name in TRACKERS_BEFORE}
    found |= {"wandb": found["wandb"] | own} if "wandb" in found else {}
    return kept | {"tracking": kept.get("tracking", {}) | found}


class TrainSettings(Settings):
    """All of `configs/train.yaml`, which the commands that write stores and train share.

    `learning_rate_multipliers` are factors of the student's learning rate for the weights whose dotted name has the key
    as a part: `cond_proj` is the projection of the guidance into the time embedding.
    """

    _before = model_validator(mode="before")(trackers_of_before)

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
    helpers: dict[str, Component] = {}
    teacher: FilePath | None = None
    start: FilePath | None = None
    health: Component = {"_target_": "distill.training.health.Health"}
    best: Component = {"_target_": "distill.training.best.Best"}  # runs of before it existed have none
    spikes: Component = {"_target_": "distill.training.spikes.SpikeSettings"}
    output_dir: FilePath
    seed: Natural
    max_train_steps: Annotated[Positive, BeforeValidator(follow_stages)]
    global_batch_size: Positive
    gradient_accumulation_steps: Positive
    micro_batch_size: Positive | Literal["auto"] | None = None  # runs of before it existed have none
    learning_rate: Annotated[Number, Field(gt=0, le=1e6)]
    learning_rate_multipliers: dict[str, Annotated[Number, Field(gt=0)]] = {}
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    lr_warmup_steps: Natural
    max_grad_norm: Annotated[Number, Field(gt=0)] | None
    mixed_precision: Literal["no", "bf16", "fp16"]
    gradient_checkpointing: Flag
    quantize: Literal["int8", "nf4"] | None = None
    compile: Compile = False  # runs of before have none of these three
    channels_last: Flag = False
    attention: Attention = "auto"
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None
    lora_rank: Positive
    lora_alpha: Annotated[Number, Field(gt=0)]
    lora_targets: str | Annotated[list[str], Field(min_length=1)] | None = None  # runs of before it existed have none
    dataloader_num_workers: Natural
    resume_from_checkpoint: FilePath | Natural | None
    checkpointing_steps: Positive
    checkpoints_total_limit: Positive | None
    checkpoints_in_background: Flag = True  # runs of before it existed have none
    preemption_signals: Annotated[list[str], Field(min_length=1)] = ["SIGTERM", "SIGUSR1"]
    watchdog_minutes: Minutes = 30
    compare_replicas_steps: Positive | None = None
    compute_twice_steps: Positive | None = None
    deterministic: Annotated[bool, Field(strict=True)] | Literal["auto"] = "auto"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    validation_prompts: list[str] | TextOrPath | None
    validation_sizes: SizeList | None = None
    validation_steps: Positive
    validation_sampling_steps: Positive
    validation_guidance: Annotated[Number, Field(ge=0)] = 7.5  # runs of before it existed have none
    validation_diversity_seeds: Several = 0
    validation_teacher_steps: Natural = 0
    validation_reward: Component | None = None
    tracking: Annotated[dict[str, Any], AfterValidator(check_trackers)] = {}
    log_every: Positive


class ClusterSettings(Settings):
    """A file of `configs/cluster/`: machines, a process a GPU, or a CPU if `device` says so; GiB are 2^30 bytes, GB and
    tera powers of ten.

    `usable` is the share of a GPU's memory for tensors, `mfu` the share of its arithmetic that a training step reaches,
    `link_efficiency` that of its links; the latter are of one direction.
    """

    gpu: str
    device: Literal["GPU", "CPU"] = "GPU"
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
    host_link_gb_s: Annotated[Number, Field(gt=0)]
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
    run: FilePath | None
    lora: FilePath | None
    lora_scale: Number
    loras: list[LoRAText] = []
    prompts: TextOrPath | list[str]
    negative_prompt: str | None
    sweep: Literal["steps", "guidance", "lora"] | None
    steps: Positive | list[Positive] | None
    guidance: Annotated[Number, Field(ge=0)] | list[Annotated[Number, Field(ge=1)]] | None
    sampler: Sampler | None
    spacing: Spacing | None
    gamma: Annotated[Number, Field(ge=0, le=1)] | None = None
    teacher: FilePath | None
    teacher_steps: Positive
    teacher_guidance: Annotated[Number, Field(ge=0)]
    num_images_per_prompt: Positive
    size: SizeList | None = None
    batch_size: Positive
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    compile: Compile = False
    channels_last: Flag = False
    attention: Attention = "auto"
    seed: Natural
    watchdog_minutes: Minutes = 30
    output_dir: FilePath


class PlugInSettings(Settings):
    """`configs/plug_in.yaml`: the toy LCM-LoRA on a fine-tuned teacher and beside a style LoRA."""

    lora: FilePath
    output_dir: FilePath
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

    lora: FilePath
    output_dir: FilePath
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
        from huggingface_hub.utils import HFValidationError, validate_repo_id  # which takes longer than all else here

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

    run: FilePath
    checkpoint: FilePath | Natural
    use_ema: Flag
    output_dir: FilePath
    formats: Annotated[list[str], Field(min_length=1)] | None
    dtype: Literal["float16", "bfloat16", "float32"]
    guidance: Annotated[Number, Field(ge=0)] | None
    card_prompts: list[str] | None
    metrics: FilePath | None
    push_to_hub: Repository
    hub_private: Flag
    watchdog_minutes: Minutes = 30


class EvaluatedModelSettings(Settings):
    """The teacher, as in `ModelSettings`; null is the student's own."""

    pretrained_model_name_or_path: FilePath | None
    revision: str | None
    variant: str | None
    config: FilePath | None = None
    loras: list[LoRAText] = []


class ProtocolSettings(Settings):
    """A file of `configs/protocol/`; see `distill.evaluation.protocol.Protocol`.

    `prompts` null are the toy's captions; `resolution` null is the teacher's; of `tuning_n` 0 no teacher is tuned.
    """

    name: str
    used_by: str
    prompts: FilePath | None
    n: Positive
    resolution: Positive | None
    reference: FilePath | None
    matching: Flag
    shown_at: Positive | None
    clip: FilePath | None
    clip_weights: FilePath | None
    clip_prefix: str
    metrics: Annotated[list[str], Field(min_length=1)]
    tuning_n: Natural
    tuning_guidances: list[Annotated[Number, Field(ge=0)]]


class EvaluateSettings(Settings):
    """`configs/evaluate.yaml`: a student beside its teacher, or a teacher alone, by a protocol.

    `weights` are what metrics are loaded from, files or hub ids, by the names that `distill.evaluation.metrics` has.
    """

    protocol: ProtocolSettings
    model: EvaluatedModelSettings
    student: FilePath | None
    watch: FilePath | None
    watch_metric: str
    watch_seconds: Positive
    guidance: Annotated[Number, Field(ge=0)] | None
    steps: Annotated[list[Positive], Field(min_length=1)] | None
    samplers: Annotated[list[Annotated[str, AfterValidator(check_sampling)]], Field(min_length=1)] | None
    guidances: Annotated[list[Annotated[Number, Field(ge=0)]], Field(min_length=1)] | None
    teacher_steps: Positive
    n: Positive | None
    store: FilePath | None
    store_samples: Positive
    weights: dict[str, FilePath | None]
    dtype: Literal["auto", "float16", "bfloat16", "float32"]
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    compile: Compile = False
    channels_last: Flag = False
    attention: Attention = "auto"
    batch_size: Positive | None
    block_size: Positive
    watchdog_minutes: Minutes = 30
    output_dir: FilePath


class ReportSettings(Settings):
    """`configs/report.yaml`: evaluations on one page."""

    evaluations: Annotated[list[FilePath], Field(min_length=1)]
    output_dir: FilePath


class ScoreRewardSettings(Settings):
    """`configs/score_reward.yaml`: the checkpoints of toy runs, by a reward and by the toy's classifier."""

    reward: Component
    run: FilePath | Annotated[list[FilePath], Field(min_length=1)]
    output_dir: FilePath
    steps: Positive
    n: Annotated[int, Field(ge=100, strict=True)]
    batch_size: Positive
    watchdog_minutes: Minutes = 30


class VerifySettings(Settings):
    """`configs/verify.yaml`: a store that is read from end to end."""

    store: FilePath
    shards: list[str]
    add_checksums: Flag
    watchdog_minutes: Minutes = 30


Size = Literal["toy", "sd15", "sdxl", "tiny", "full"]
GpuSection = Literal["machine", "peak", "sdxl", "commands", "lightning", "sd15", "repeat", "quickstart"]
GPU_SECTIONS = get_args(GpuSection)
BENCHMARK_SIZES = {"gpu": ("full", "tiny"), "sample": ("toy", "sd15", "sdxl")}
"""Sizes of those measurements that have others than toy and sd15."""
BENCHMARKS: dict[str, dict[str, Any]] = {
    "step": {"size": "toy", "repeats": {"toy": 40, "sd15": 5}, "batch_size": {"toy": 64, "sd15": 1}},
    "deterministic": {"size": "toy", "rounds": 5},
    "lcm": {"size": "toy", "rounds": 2, "repeats": {"toy": 20, "sd15": 3}},
    "memory": {},
    "reader": {"samples": [512], "workers": 1},
    "checksums": {},
    "texts": {},
    "checkpoint": {"size": "toy", "rounds": 3},
    "start": {"samples": [10**3, 10**5, 10**7]},
    "gpu": {"size": "full", "budget": 460, "sections": list(GPU_SECTIONS), "output_dir": "outputs/benchmark-gpu"},
    "sample": {
        "size": "toy",
        "repeats": {"toy": 5, "sd15": 1, "sdxl": 3},
        "batch_size": {"toy": 16, "sd15": 2, "sdxl": 4},
        "output_dir": "outputs/benchmark-sample",
    },
}
"""What is measured, and of each the settings that it has, with their defaults, which may depend on the size."""


class BenchmarkSettings(Settings):
    """`configs/benchmark.yaml`: what is measured, and how; null is the measurement's own default."""

    measure: Literal[
        "step", "deterministic", "lcm", "memory", "reader", "checksums", "texts", "checkpoint", "start", "gpu", "sample"
    ]
    size: Size | None
    repeats: Positive | None
    batch_size: Positive | None
    rounds: Positive | None
    samples: Annotated[list[Positive], Field(min_length=1)] | None
    workers: Natural | None
    budget: Positive | None
    sections: Annotated[list[GpuSection], Field(min_length=1)] | None
    output_dir: FilePath | None
    deterministic: Literal["auto"] | Annotated[bool, Field(strict=True)]

    @model_validator(mode="after")
    def filled_in(self) -> BenchmarkSettings:
        """Replaces null by the measurement's defaults. Raises ValueError for what the measurement does not use."""
        own = BENCHMARKS[self.measure]
        given = {name: value for name, value in self if name in BENCHMARK_KEYS and value is not None}
        if useless := [name for name in given if name not in own]:
            having = ", ".join(own) or "none"
            raise ValueError(f"{useless[0]} is without effect on measure={self.measure}, whose settings are: {having}")
        if self.deterministic != "auto" and self.measure != "step":
            raise ValueError("deterministic is a setting of measure=step")
        if self.measure == "reader" and len(self.samples or [0]) > 1:
            raise ValueError("samples of measure=reader are one number, such as [512]")
        sizes = BENCHMARK_SIZES.get(self.measure, ("toy", "sd15"))
        if self.size is not None and self.size not in sizes:
            raise ValueError(f"size of measure={self.measure} must be one of {', '.join(sizes)}, got {self.size!r}")
        for name, default in own.items():
            if name not in given:
                setattr(self, name, default[self.size] if isinstance(default, dict) else default)
        return self


BENCHMARK_KEYS = (
    "size",
    "repeats",
    "batch_size",
    "rounds",
    "samples",
    "workers",
    "budget",
    "sections",
    "output_dir",
)


class ToyTeacherSettings(Settings):
    """`configs/toy_teacher.yaml`: a toy teacher, the toy's classifier (judge) and its reward, from nothing."""

    output_dir: FilePath
    teacher: Literal["vp", "flow"]
    stages: Annotated[list[Literal["vae", "judge", "denoiser", "reward"]], Field(min_length=1)]
    seed: Natural
    vae_steps: Positive
    judge_steps: Positive
    reward_steps: Positive
    steps: Positive | None
    batch_size: Positive
    pictures: Positive
    evaluate: Flag
    samples: Annotated[int, Field(ge=20, strict=True)]
    tuning_samples: Annotated[int, Field(ge=20, strict=True)]


class ShowSettings(Settings):
    """`configs/show_lightning.yaml`: students of several kinds on the toy world, with several seeds."""

    output_dir: FilePath
    overrides: list[str]
    seeds: Annotated[list[Natural], Field(min_length=1)]
    n: Annotated[int, Field(ge=100, strict=True)]
    tuning_n: Annotated[int, Field(ge=100, strict=True)]
    guidances: list[Annotated[Number, Field(ge=0)]]
    batch_size: Positive


class ShowMLCMSettings(ShowSettings):
    """`configs/show_mlcm.yaml`: MLCM-LoRA beside LCM-LoRA on the toy world."""

    steps: list[Positive]


class LatentLPIPSSettings(Settings):
    """`configs/latent_lpips.yaml`: weights of a perceptual distance of latents, trained or converted."""

    output_dir: FilePath
    weights: FilePath | None
    scale: Annotated[Number, Field(gt=0)]
    steps: Positive
    batch_size: Positive
    learning_rate: Annotated[Number, Field(gt=0)]
    pictures: Positive
    seed: Natural


class SolvesSettings(Settings):
    """`configs/solves.yaml`: students of the toy over the number of solves that they learn from."""

    output_dir: FilePath
    teachers: Annotated[list[Literal["toy", "night"]], Field(min_length=1)]
    solves: Annotated[list[Positive], Field(min_length=1)]
    seeds: Annotated[list[Natural], Field(min_length=1)]
    fine_tune: list[str]
    overrides: list[str]
    steps: Annotated[list[Positive], Field(min_length=1)]
    n: Annotated[int, Field(ge=100, strict=True)]
    batch_size: Positive


class CompareSettings(Settings):
    """`configs/compare.yaml`: students of many methods, with one store and one budget."""

    output_dir: FilePath
    methods: Annotated[list[str], Field(min_length=1)]
    families: dict[str, list[str]]
    baseline: str
    starts: dict[str, str]
    start_share: Annotated[Number, Field(gt=0, lt=1)]
    model: FilePath | None
    store: FilePath | None
    overrides: list[str]
    quick: Flag
    tune: Flag
    rates: Annotated[list[Annotated[Number, Field(gt=0)]], Field(min_length=1)]
    knobs: dict[str, list[str]]
    budgets: Annotated[list[Literal["samples", "processing"]], Field(min_length=1)] | None
    samples_steps: Positive
    processing_steps: Positive | None
    seeds: Annotated[list[Natural], Field(min_length=1)] | None
    n: Annotated[int, Field(ge=100, strict=True)] | None
    tuning_n: Annotated[int, Field(ge=100, strict=True)] | None
    steps: Annotated[list[Positive], Field(min_length=1)]
    samplers: list[Annotated[str, AfterValidator(check_sampling)]]
    guidances: Annotated[list[Annotated[Number, Field(ge=0)]], Field(min_length=1)]
    teacher_steps: Positive
    metric: str
    protocol: ProtocolSettings
    weights: dict[str, FilePath | None]
    batch_size: Positive


class WatchSettings(Settings):
    """`configs/watch.yaml`: runs as they go by, on a page."""

    runs: Annotated[list[FilePath], Field(min_length=1)]
    page: FilePath | None
    port: Annotated[int, Field(ge=0, le=65535, strict=True)]
    seconds: Annotated[Number, Field(ge=0.2, le=3600)]


class SabotageCaseSettings(Settings):
    """A run of `method`, a file of `configs/experiment/compare/`, and what is wrong with it, in words and overrides.

    `start` is a method whose student it begins from; `small` has it learn from the small store.
    """

    what: str
    method: str
    overrides: list[str] = []
    start: str | None = None
    small: Flag = False
    length: Positive = 1  # of the usual steps


class SabotageSettings(Settings):
    """`configs/sabotage.yaml`: runs that go wrong, and whether the checkpoint that they choose is their best."""

    output_dir: FilePath
    store: FilePath | None
    overrides: list[str]
    cases: dict[str, SabotageCaseSettings]
    only: list[str] | None
    max_train_steps: Positive
    validations: Positive
    patience: Positive
    start_steps: Positive
    small_store: Positive
    n: Annotated[int, Field(ge=100, strict=True)]
    steps: Positive
    seed: Natural
    batch_size: Positive


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
    """Replaces each link that has seeds by one link per seed."""

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
                raise ValueError(f"{link.name}: no {key} {name!r}{suggest(name, before)}; allowed: {allowed}")
    return links


class ChainSettings(Settings):
    """A file of `configs/chain/`: links, in the order in which they are run."""

    experiment: str
    links: Annotated[list[LinkSettings], Field(min_length=1), AfterValidator(each_seed), AfterValidator(check_links)]


Strings = list[str]  # `list` is one of the settings


class RunChainSettings(Settings):
    """`configs/run_chain.yaml`: the links of a chain, one after another."""

    chain: ChainSettings
    output_dir: FilePath
    overrides: Strings
    launch: str | None
    link: str | None
    list: Flag | Literal["commands"]


class PlanChainSettings(Settings):
    """`configs/plan_chain.yaml`: a chain, and where it is to run."""

    chain: ChainSettings
    cluster: ClusterSettings
    output_dir: FilePath
    overrides: Strings


class QuickstartSettings(Settings):
    """`configs/quickstart.yaml`: the bundled toy teacher, from nothing to a report."""

    output_dir: FilePath
    processes: Positive | None
    overrides: list[str]
    prompts: Annotated[list[str], Field(min_length=1)]
    steps: Annotated[list[Positive], Field(min_length=1)]
    n: Annotated[int, Field(ge=100, strict=True)]
    tuning_n: Natural


def like(pattern: str, what: str) -> BeforeValidator:
    """Refuses a text that does not match from its beginning to its end, and says what would."""

    def check(value: Any) -> Any:
        if value is not None and (not isinstance(value, str) or not re.fullmatch(pattern, value)):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return BeforeValidator(check)


Word = Annotated[str | None, like(r"[\w.-]+", "a name")]
Memory = Annotated[str | None, like(r"\d+[MGT]", "an amount of memory such as 200G")]
Duration = Annotated[str | None, like(r"(\d+-)?\d+:\d\d:\d\d", "a time such as 12:00:00 or 2-00:00:00")]
Option = Annotated[str, like(r"--[a-z][a-z-]*(=\S+)?", "an option of sbatch such as --qos=high")]


Line = Annotated[str, like(r"[^\n]+", "a line of bash")]
Words = Annotated[str | None, like(r"[^\n]+", "a command, such as apptainer exec --nv distill.sif")]
Flags = list[Annotated[str, like(r"-\S+", "a flag of distill launch such as --use_fsdp")]]


def in_a_word(value: Any) -> Any:
    """The command that an earlier name stands for."""
    return "trajectories" if value == "make_trajectories" else value


class SlurmSettings(Settings):
    """Settings of jobs: the files of `configs/slurm/`. What is null is left to the cluster."""

    nodes: Positive
    gpus_per_node: Positive | None
    processes_per_node: Positive | None
    cpus_per_task: Positive | None
    mem: Memory
    time: Duration
    partition: Word
    account: Word
    array: Positive | None
    parallel: Positive | None
    options: list[Option]
    setup: list[Line]
    python: FilePath | None
    container: Words
    launch_flags: Flags
    grace_seconds: Annotated[int, Field(ge=90, strict=True)]
    max_failures: Natural


class JobSettings(SlurmSettings):
    """Settings of a job, and which command it runs: `slurm` in `configs/submit.yaml`."""

    script: Annotated[Literal["train", "trajectories"], BeforeValidator(in_a_word)]


class SubmitSettings(TrainSettings):
    """`configs/submit.yaml`: a run, and the job that runs it."""

    slurm: JobSettings
    dry_run: Flag


class SubmitChainSettings(Settings):
    """`configs/submit_chain.yaml`: a chain, and the jobs that run its links."""

    chain: ChainSettings
    output_dir: FilePath
    overrides: list[str]
    slurm: SlurmSettings
    dry_run: Flag
