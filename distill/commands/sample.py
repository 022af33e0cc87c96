"""Generates images from a pipeline, with or without a LoRA, or from a run; or sweeps over settings:

distill sample model.pretrained_model_name_or_path=DIR_OR_HUB_ID lora=exports/a steps=4 prompts=prompts.txt \
    output_dir=pictures
distill sample run=runs/a steps=[1,2,4,8] prompts='["a cat"]' output_dir=pictures
distill sample run=runs/a size=[1024x1024,1152x896] prompts='["a cat"]' output_dir=pictures
distill sample run=runs/a sweep=lora prompts='["a cat"]' output_dir=pictures
distill sample run=runs/a sweep=guidance guidance=[1,2] negative_prompt=blurry prompts='["a cat"]' \
    output_dir=pictures
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("sample")

import json
import logging
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from distill.commands.owned_files import Written
from distill.config.loading import ConfigError, checking
from distill.config.settings import ModelSettings, SampleSettings
from distill.data.progress import begin
from distill.data.prompts import read_prompts
from distill.data.sizes import ImageSize, read_sizes
from distill.data.words import counted
from distill.diffusion.noise import FlowNoise
from distill.diffusion.samplers import check_pair, usual_spacing
from distill.evaluation.figures import CELL, GridRow, draw_grid
from distill.evaluation.pipelines import (
    arguments_of,
    embeds_guidance,
    generate_images,
    is_student,
    load_pipeline,
    sampling_of,
    side_multiple,
    takes_negative_prompts,
    use_sampler,
)
from distill.evaluation.sweeps import (
    GUIDANCES,
    LORA_STEPS,
    STEPS,
    Models,
    Right,
    Sweep,
    SweepSetting,
    guidance_sweep,
    lora_sweep,
    run_sweep,
    steps_sweep,
)
from distill.evaluation.toy import captions_right
from distill.methods.sampling import Sampling
from distill.models.derived import WeightedLoRA
from distill.models.devices import described, own_device
from distill.models.execution import execute
from distill.models.exported import read_export
from distill.models.families.registry import network_of
from distill.models.schedulers import noise_of
from distill.toy.judge import load_judge
from distill.toy.teacher import teacher_folder
from distill.toy.world import CAPTIONS
from distill.training.export import export_run
from distill.training.micro_batch import within_memory
from distill.training.run import read_run
from distill.training.teacher import located
from distill.training.tracking import setup_logging
from distill.training.watchdog import watched

log = logging.getLogger("distill")

SOME_STEPS = 4
GRID_COLUMNS = 10
LARGEST_CELL = 256  # pixels of a picture in the grid


@watched
@within_memory("set a smaller batch_size")
def main(cfg: SampleSettings) -> None:
    setup_logging()
    check(cfg)
    with checking():
        prompts = read_prompts(cfg.prompts)
    prompts = [prompt for prompt in prompts for _ in range(cfg.num_images_per_prompt)]
    model = cfg.model if cfg.run is None else read_run(cfg.run).model
    if cfg.sweep is not None and model.shift is not None:
        raise ConfigError("a sweep compares at the pipeline's own noise levels: leave model.shift null")
    begin("the pipeline")
    pipeline, sampling, usual = load_student(cfg, model)
    if cfg.guidance is None and cfg.sweep != "guidance":
        cfg = cfg.model_copy(update={"guidance": usual})
    if cfg.negative_prompt is not None and not takes_negative_prompts(pipeline):
        raise ConfigError(f"negative_prompt: a {type(pipeline).__name__} takes none, leave it null")
    pipeline = on_device(cfg, pipeline)
    if cfg.sweep is None:
        sample_pictures(cfg, pipeline, sampling, model, prompts)
    elif sampling is not None and sampling.sampler != "lcm":
        raise ConfigError(f"a sweep uses LCM's sampler, and this student is for {sampling.sampler}")
    else:
        sample_sweep(cfg, pipeline, model, prompts)


def check(cfg: SampleSettings) -> None:
    """Raises ConfigError for settings that do not go together."""
    if isinstance(cfg.guidance, list) and cfg.sweep != "guidance":
        raise ConfigError("guidance is a list, which only sweep=guidance takes")
    if cfg.sweep == "guidance" and isinstance(cfg.steps, list):
        raise ConfigError("steps is a list, but sweep=guidance takes one number")
    if cfg.sweep == "guidance" and cfg.negative_prompt is None:
        raise ConfigError("sweep=guidance compares with and without a negative prompt: set negative_prompt=...")
    if cfg.sweep is not None and (cfg.sampler or cfg.spacing or cfg.gamma is not None):
        raise ConfigError("a sweep uses LCM's sampler and the pipeline's own: leave sampler, spacing and gamma null")
    if cfg.sweep is not None and cfg.loras:
        raise ConfigError("a sweep compares a student with its teacher, without further LoRAs: leave loras empty")
    if cfg.lora is None and cfg.run is None and cfg.lora_scale != 1:
        raise ConfigError("lora_scale is the weight of the student's LoRA, and there is none: set lora=... or run=...")
    if cfg.sampler is not None and cfg.spacing is not None:
        with checking():
            check_pair(cfg.sampler, cfg.spacing)
    if cfg.sweep is not None and cfg.size is not None and len(cfg.size) > 1:
        raise ConfigError(f"a sweep has one size, and size lists {len(cfg.size)}")
    if cfg.size is not None and cfg.model.resolution is not None:
        raise ConfigError("size and model.resolution are both set: leave one of them null")
    if cfg.sweep is None and cfg.teacher is not None:
        raise ConfigError("teacher is the reference of a sweep: set sweep=steps or sweep=guidance, or leave it null")


def load_student(cfg: SampleSettings, model: ModelSettings) -> tuple[Any, Sampling | None, float | None]:
    """The pipeline, how its student is sampled, and the guidance that it learned, if it takes that as an input.

    The latter two are None for a pipeline that is not known to be a student's.
    """
    model = located(model)
    path = model.pretrained_model_name_or_path
    with tempfile.TemporaryDirectory() as scratch, checking():
        files = cfg.lora if cfg.run is None else export_run(cfg.run, Path(scratch) / "student")
        sampling = sampling_of(files or path)
        usual = None if sampling is None else read_export(files or path).learned(cfg.teacher_guidance)
        chosen_sampling(cfg, sampling)  # before anything is loaded
        swept = cfg.sweep is not None  # beside the model itself, which keeps its own scheduler
        beside = [WeightedLoRA.read(text) for text in cfg.loras]
        loading: dict[str, Any] = {"own_scheduler": swept, "beside": beside}
        pipeline = load_pipeline(path, files, cfg.lora_scale, model.revision, model.variant, **loading)
    own = sampling or (Sampling() if is_student(pipeline) else None)
    return pipeline, own, usual if embeds_guidance(pipeline) else None


def on_device(cfg: SampleSettings, pipeline: Any) -> Any:
    """The pipeline where it computes, its network executed as the settings say."""
    with checking():
        device = own_device()
    log.info("%s", described(device))
    pipeline = pipeline.to(device, torch.float16) if device.type == "cuda" else pipeline
    execute(network_of(pipeline), cfg.compile, cfg.channels_last)
    return pipeline


def one_guidance(cfg: SampleSettings, pipeline: Any, student: bool) -> float:
    """Guidance 1 for a student that does not take it as an input: its teacher's is built in; otherwise the set one."""
    if isinstance(cfg.guidance, float):
        return cfg.guidance
    return 1.0 if student and not embeds_guidance(pipeline) else cfg.teacher_guidance


def chosen_sampling(cfg: SampleSettings, own: Sampling | None) -> Sampling:
    """How to sample: by the settings; where they say nothing, as the student was made for, or as teachers are."""
    own = own or Sampling("ddim", "trailing")
    sampler = cfg.sampler or own.sampler
    same = sampler == own.sampler
    usual = own.spacing if same else usual_spacing(sampler)
    gamma = cfg.gamma if cfg.gamma is not None else own.gamma if same else 0.0
    with checking():
        return Sampling(sampler, cfg.spacing or usual, own.steps, gamma)


def sample_pictures(
    cfg: SampleSettings, pipeline: Any, own: Sampling | None, model: ModelSettings, prompts: Sequence[str]
) -> None:
    """A folder of pictures, or one for each number of steps, and a grid of the first of them."""
    sampling = chosen_sampling(cfg, own)
    guidance = one_guidance(cfg, pipeline, own is not None)
    numbers = cfg.steps if isinstance(cfg.steps, list) else [cfg.steps or sampling.steps or SOME_STEPS]
    sizes = sizes_of(cfg, pipeline, model)
    with checking("model."):
        noise = noise_of(pipeline.scheduler).at(shift=model.shift)
        if len(sizes) > 1 and isinstance(noise, FlowNoise) and noise.shift is None:
            raise ValueError("shift is null, and the pipeline's own depends on the size: set it, or sample in one size")
    with checking():
        use_sampler(pipeline, sampling.sampler, sampling.spacing, shift=model.shift, size=sizes[0])
    with checking("steps: "):
        arguments = {n: arguments_of(pipeline, sampling.spacing, n, model.max_tokens, sampling.gamma) for n in numbers}
    facts = {"guidance": guidance, "sampler": sampling.sampler, "negative_prompt": cfg.negative_prompt}
    facts |= {"gamma": sampling.gamma} if sampling.gamma else {}
    written = Written(Path(cfg.output_dir), claimed=pictures_of(Path(cfg.output_dir)))
    written.clear()
    rows = []
    for size, steps in product(sizes, numbers):
        if sampling.steps not in (None, steps):
            log.warning(
                "the student was made for %s, and is sampled in %d", counted(sampling.steps or 0, "step"), steps
            )
        under = (f"{size}/" if len(sizes) > 1 else "") + (f"steps-{steps}/" if isinstance(cfg.steps, list) else "")
        pictures: list[dict[str, Any]] = []
        shown: list[Tensor] = []
        of_size = {} if cfg.size is None else {"size": str(size)}
        for start in tqdm(range(0, len(prompts), cfg.batch_size), desc=counted(steps, "step"), unit="batch"):
            chunk = prompts[start : start + cfg.batch_size]
            begin(f"pictures in {counted(steps, 'step')}: {start} of {len(prompts)} done")
            seeds = [cfg.seed + start + i for i in range(len(chunk))]
            images = generate_images(
                pipeline, chunk, seeds, steps, guidance, size, cfg.negative_prompt, arguments[steps]
            )
            for prompt, seed, image in zip(chunk, seeds, images, strict=True):
                name = f"{len(pictures):05d}.png"
                with checking():
                    written.save(under + name, partial(save_picture, image))
                pictures.append({"file": name, "prompt": prompt, "seed": seed, "steps": steps, **of_size, **facts})
            shown += images[: max(0, GRID_COLUMNS - len(shown))].float().cpu()
        listed = json.dumps(pictures, indent=1) + "\n"
        with checking():
            written.save(f"{under}pictures.json", partial(write_text, listed))
        title = counted(steps, "step") + (f", {size}" if len(sizes) > 1 else "")
        rows.append(GridRow(title, f"{sampling.sampler}, w {guidance:g}", torch.stack(shown) * 2 - 1))
        print(f"{counted(len(pictures), 'picture')} in {Path(cfg.output_dir) / under}")
    with checking():
        longest = max(side for row in rows for side in row.images.shape[-2:])
        cell = max(CELL, min(LARGEST_CELL, longest))
        written.save("grid.png", lambda path: draw_grid(path, prompts[:GRID_COLUMNS], [rows], cell))
    print(f"{cfg.output_dir}/grid.png" + (f" shows the first {GRID_COLUMNS}" if len(prompts) > GRID_COLUMNS else ""))


def sizes_of(cfg: SampleSettings, pipeline: Any, model: ModelSettings) -> list[ImageSize | int | None]:
    """The sizes to sample in: those of the settings, or the model's square.

    Raises:
        ConfigError: a side that the pipeline cannot make.
    """
    if cfg.size is None:
        return [model.resolution]
    sizes, step = read_sizes(cfg.size), side_multiple(pipeline)
    for size in sizes:
        if size.height % step or size.width % step:
            raise ConfigError(f"size: the sides of {size} must be multiples of {step} pixels")
    return list(sizes)


def save_picture(image: Tensor, path: Path) -> None:
    """A picture [3, H, W] in [0, 1] as a file of 8 bits."""
    values = (image.float() * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    Image.fromarray(values.permute(1, 2, 0).cpu().numpy()).save(path)


def write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def pictures_of(folder: Path) -> list[str]:
    """Files of an earlier call that has left no list of what it wrote, by its pictures.json."""
    found = []
    for file in [folder / "pictures.json", *folder.glob("steps-*/pictures.json")]:
        under = file.parent.relative_to(folder).as_posix().removeprefix(".")
        with suppress(OSError, ValueError, TypeError, KeyError):
            names = [row["file"] for row in json.loads(file.read_text(encoding="utf-8"))]
            found += [f"{under}/{name}".lstrip("/") for name in [*names, file.name]]
    return found


def sample_sweep(cfg: SampleSettings, pipeline: Any, model: ModelSettings, prompts: Sequence[str]) -> None:
    """One grid and one table."""
    if not is_student(pipeline):
        raise ConfigError("a sweep needs a student: set run=... or lora=..., or a pipeline that has an LCMScheduler")
    models = Models.of(pipeline, load_teacher(cfg, pipeline, model), cfg.lora_scale)
    sweep = chosen_sweep(cfg, models)
    text = run_sweep(
        Path(cfg.output_dir),
        sweep,
        models,
        prompts,
        [cfg.seed + i for i in range(len(prompts))],
        batch_size=cfg.batch_size,
        resolution=sizes_of(cfg, pipeline, model)[0],
        right=judge_of(model, prompts),
    )
    print(f"{text}\n{cfg.output_dir}/{sweep.name}.png, .md, .json")


def load_teacher(cfg: SampleSettings, pipeline: Any, model: ModelSettings) -> Any | None:
    """The undistilled pipeline, where it is not the student's own without its LoRA and is known."""
    if cfg.teacher is not None:
        return on_device(cfg, load_pipeline(cfg.teacher))
    if (cfg.run or cfg.lora) and not pipeline.get_list_adapters():  # a full network has taken its teacher's place
        model = located(model)
        path = model.pretrained_model_name_or_path
        return on_device(cfg, load_pipeline(path, revision=model.revision, variant=model.variant))
    return None


def chosen_sweep(cfg: SampleSettings, models: Models) -> Sweep:
    known = models.undistilled is not None
    negative_prompt = None if cfg.sweep == "guidance" else cfg.negative_prompt
    reference = SweepSetting(False, cfg.teacher_steps, cfg.teacher_guidance, negative_prompt) if known else None
    guidance = one_guidance(cfg, models.student, student=True)
    steps = cfg.steps if isinstance(cfg.steps, list) else [cfg.steps] if cfg.steps else None
    if cfg.sweep == "guidance":
        assert cfg.negative_prompt is not None  # checked
        guidances = cfg.guidance if isinstance(cfg.guidance, list) else [cfg.guidance] if cfg.guidance else GUIDANCES
        return guidance_sweep(guidances, cfg.negative_prompt, (steps or [SOME_STEPS])[0], reference)
    if cfg.sweep == "steps":
        return steps_sweep(steps or STEPS, guidance, negative_prompt, reference)
    if reference is None or not models.adapters:
        raise ConfigError("sweep=lora needs a LoRA: set run=... or lora=...")
    return lora_sweep(steps or LORA_STEPS, guidance, reference)


def judge_of(model: ModelSettings, prompts: Sequence[str]) -> Right | None:
    """The toy's classifier, for the toy's teacher and captions."""
    toy = Path(model.pretrained_model_name_or_path) == teacher_folder() and set(prompts) <= set(CAPTIONS)
    return partial(captions_right, load_judge()) if toy else None
