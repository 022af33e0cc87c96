"""Uses a few-step LoRA of the toy teacher under a ControlNet of its teacher and from pictures, and measures it there:

distill study control lora=outputs/quickstart/lora

Trains the ControlNet on the teacher first; what is there is not trained again, and finished rows are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models import ControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl import StableDiffusionXLControlNetPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from torch import Tensor

from distill.config.settings import ToyControlSettings
from distill.data.progress import Progress
from distill.diffusion.matching import denoising_loss
from distill.diffusion.prediction import Conditioning, Denoiser
from distill.diffusion.random import generator, seed_of
from distill.diffusion.schedule import NoiseSchedule
from distill.evaluation.blocks import Cache
from distill.evaluation.compare import Row, Setting
from distill.evaluation.figures import GridRow, draw_grid
from distill.evaluation.pipelines import load_pipeline
from distill.evaluation.report import format_table
from distill.evaluation.toy import JudgeScorer
from distill.models.schedulers import noise_of
from distill.studies.control_bench import (
    COLUMNS,
    Arguments,
    ControlBench,
    ControlRow,
    from_picture,
    start_time,
    under_control,
)
from distill.studies.plug_in import STUDENT, check_lora, few_steps, frozen_teacher, student, trained
from distill.studies.toy_teacher import descend, reconstruct, set_rate
from distill.toy.control import as_control, build_controlnet, controlled
from distill.toy.judge import load_judge
from distill.toy.teacher import encode_captions, teacher_folder, time_ids
from distill.toy.world import CAPTIONS, PATTERNS, Scene, balanced_labels, coverage, draw_scene, paint
from distill.training.tracking import setup_logging

GRID_COLUMNS = 10
RATE = 3e-3  # of learning the control
BEST = "true pictures, through the VAE"


def main(cfg: ToyControlSettings) -> None:
    setup_logging()
    check_lora(cfg.lora, cfg.steps)
    output = Path(cfg.output_dir)
    facts = {"steps": cfg.control_steps, "pictures": cfg.pictures, "batch_size": cfg.train_batch_size, "seed": cfg.seed}
    controlnet = trained(output / "controlnet", facts, lambda folder: train_controlnet(cfg, folder))
    pipeline = load_pipeline(str(teacher_folder()), cfg.lora)
    write_report(output, cfg, [control_part(cfg, pipeline, controlnet), restyle_part(cfg, pipeline)])


# ------------------------------------------------------------------------------------------------------------ training


def train_controlnet(cfg: ToyControlSettings, folder: Path) -> None:
    """Trains the ControlNet alone, which is shown the pattern's mask; the teacher is frozen."""
    pipeline = frozen_teacher()
    controlnet = build_controlnet(pipeline.unet, seed_of("toy control", cfg.seed, "start"))
    schedule = NoiseSchedule.of(noise_of(pipeline.scheduler))
    scene = draw_scene(balanced_labels(cfg.pictures), generator("toy control", cfg.seed, "pictures"))
    latents, masks = encoded(pipeline.vae, paint(scene)), coverage(scene)
    captions = encode_captions(pipeline, list(CAPTIONS))
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=RATE, weight_decay=0.0)
    progress = Progress("learning the control", cfg.control_steps, "steps")
    for step in range(cfg.control_steps):
        set_rate(optimizer, RATE, step, cfg.control_steps, decay=0.5)
        random = generator("toy control", cfg.seed, "steps", step)
        chosen = torch.randint(len(latents), (cfg.train_batch_size,), generator=random)
        under = controlled(pipeline.unet, controlnet, as_control(masks[chosen]), schedule)
        conditioning = some_captions(captions, scene.labels[chosen], random)
        descend(velocity_loss(schedule, under, latents[chosen], conditioning, random), optimizer)
        progress.update(1)
    controlnet.save_pretrained(folder)


def some_captions(captions: tuple[Tensor, Tensor], labels: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """Conditioning for labels [B], a tenth of them dropped, as in the teacher's training: guidance needs it."""
    keep = (torch.rand(len(labels), generator=random) >= 0.1).float()
    text, pooled = (embedding[labels] for embedding in captions)
    return {
        "encoder_hidden_states": text * keep[:, None, None],
        "text_embeds": pooled * keep[:, None],
        "time_ids": time_ids(len(labels)),
    }


def velocity_loss(
    schedule: NoiseSchedule, denoiser: Denoiser, clean: Tensor, conditioning: Conditioning, random: torch.Generator
) -> Tensor:
    """Squared error of the noise over alpha², which is that of the velocity; times are stratified over the batch.

    A picture's layout is decided at noisy times, where an error of the noise itself is small whatever the layout.
    """
    strata = (torch.arange(len(clean)) + torch.rand(len(clean), generator=random)) / len(clean)
    t = 1 + (strata * schedule.T).long().clamp(max=schedule.T - 1)
    noise = torch.randn(clean.shape, generator=random)
    error = denoising_loss(schedule, denoiser, clean, t, noise, conditioning)  # [B]
    return (error / schedule.alpha(t, clean).flatten().square()).mean()


@torch.no_grad()
def encoded(vae: Any, images: Tensor) -> Tensor:
    """Scaled latents [n, 4, 8, 8] of pictures [n, 3, 32, 32]."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(500)]) * vae.config.scaling_factor


# ---------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class UseSection:
    """A section of the report: its rows are generated in `ways`, after `others`, pictures that are only scored.

    `given` names the pictures that the pipeline is given.
    """

    title: str
    name: str
    given: str
    use: ControlBench
    ways: Sequence[ControlRow]
    others: Mapping[str, Tensor]


def control_part(cfg: ToyControlSettings, pipeline: Any, controlnet: Path) -> UseSection:
    """Pictures under masks, and with masks of no weight: the floor."""
    scene = draw_scene(balanced_labels(cfg.n), generator("toy control", cfg.seed, "controls"))
    ways = [floor(cfg, 0.0), ControlRow([teacher(cfg)], {}, 0.0), ControlRow([teacher(cfg)], {}, 1.0)]
    for steps in cfg.steps:
        ways += [
            ControlRow(few_steps(cfg, "teacher", steps), {}, 1.0),
            ControlRow([student(cfg, "student", steps)], STUDENT, 1.0),
        ]
    under = StableDiffusionXLControlNetPipeline.from_pipe(
        pipeline, controlnet=ControlNetModel.from_pretrained(controlnet)
    )
    use = the_use(cfg, under, under_control, as_control(coverage(scene)), scene)
    return UseSection("Under a control", "control", "control", use, ways, {BEST: best(pipeline, scene)})


def restyle_part(cfg: ToyControlSettings, pipeline: Any) -> UseSection:
    """Pictures of every caption, to be changed to the next colour in the same layout. The floor: from noise."""
    labels = balanced_labels(cfg.n)
    before, wanted = (  # the same random numbers, so the same layout
        draw_scene(which, generator("toy control", cfg.seed, "sources"))
        for which in ((labels - len(PATTERNS)) % len(CAPTIONS), labels)
    )
    source = paint(before)
    ways = [floor(cfg, 1.0), ControlRow([teacher(cfg)], {}, cfg.strength)]
    for steps in cfg.steps:
        tried = [Setting("teacher", "ddim", steps, w) for w in cfg.guidances]  # leading times would start far too late
        ways += [
            ControlRow(tried, {}, cfg.strength),
            ControlRow([student(cfg, "student", steps)], STUDENT, cfg.strength),
        ]
    image_to_image = StableDiffusionXLImg2ImgPipeline.from_pipe(pipeline)
    use = the_use(cfg, image_to_image, from_picture, (source + 1) / 2, before)
    others = {BEST: best(pipeline, wanted), "sources, as they are": source}
    return UseSection("From a picture", "restyle", "source", use, ways, others)


@torch.no_grad()
def best(pipeline: Any, scene: Scene) -> Tensor:
    """What no latents can surpass."""
    return reconstruct(pipeline.vae, paint(scene))


def teacher(cfg: ToyControlSettings) -> Setting:
    return Setting("teacher", "ddim", cfg.teacher_steps, cfg.guidance)


def floor(cfg: ToyControlSettings, strength: float) -> ControlRow:
    return ControlRow([student(cfg, "student", max(cfg.steps))], STUDENT, strength)


def the_use(cfg: ToyControlSettings, pipeline: Any, arguments: Arguments, images: Tensor, scene: Scene) -> ControlBench:
    pipeline.set_progress_bar_config(disable=True)
    cache = Cache(Path(cfg.output_dir) / "evaluation")
    return ControlBench(pipeline, arguments, images, coverage(scene), JudgeScorer(load_judge()), cache, cfg.batch_size)


# -------------------------------------------------------------------------------------------------------------- report


def write_report(output: Path, cfg: ToyControlSettings, parts: Sequence[UseSection]) -> None:
    """report.md, report.json and a grid for each part, in `output`."""
    results: dict[str, list[Row]] = {}
    sections = ["# A few-step LoRA in other pipelines", protocol(cfg)]
    for part in parts:
        rows = part.use.rows(part.name, part.ways)
        draw_part(output / f"{part.name}.png", part, rows)
        if part.name == "restyle":
            rows = [row | {"from": starts(row)} for row in rows]
        results[part.name] = [{"model": name} | part.use.scored(images) for name, images in part.others.items()] + rows
        sections += [f"## {part.title}", format_table(results[part.name], COLUMNS), f"![pictures]({part.name}.png)"]
    (output / "report.md").write_text("\n\n".join(sections) + "\n")
    (output / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(sections))


def starts(row: Row) -> int:
    return start_time(row["spacing"], 1000, row["steps"], row["strength"])


def draw_part(path: Path, part: UseSection, rows: Sequence[Row]) -> None:
    places = [9 * i % len(part.use.images) for i in range(GRID_COLUMNS)]  # prompts in turn: 9 apart, all differs
    groups: dict[Any, list[GridRow]] = {0: [GridRow(part.given, "", part.use.images[places] * 2 - 1)]}
    for way, row in zip(part.ways, rows, strict=True):
        detail = f"captions {row['caption_accuracy']:.0%}   follows {row['follows']:.2f}"
        title = f"{row['model']}, {row['steps']} steps, strength {row['strength']:g}"
        groups.setdefault(row["steps"], []).append(GridRow(title, detail, part.use.pictures(row, way, places)))
    draw_grid(path, [CAPTIONS[place % len(CAPTIONS)] for place in places], list(groups.values()))


def protocol(cfg: ToyControlSettings) -> str:
    w = ", ".join(f"{w:g}" for w in cfg.guidances)
    return f"""The LoRA was distilled from the bundled teacher, from prompts alone. The ControlNet was trained for
{cfg.control_steps} steps on that teacher, undistilled, with masks of the pattern (white where there is foreground); the
student is used with it as it is. From a picture: image-to-image with the prompt's next colour, the pattern kept.

- Every row: the same {cfg.n} prompts, noises and given pictures. ± is the standard error over these, of one training.
- follows: correlation over pixels of the picture's colourfulness with the mask (of the source picture, in the second
  table), measured without the classifier. "{BEST}" shows what can be reached.
- strength: of the control, 0 for none; of image-to-image, where 1 starts from noise that hides the picture.
- steps: those that are taken. For these an image-to-image pipeline needs a larger number: of n it takes the last
  int(n × strength), from the time t that stands in the table, which at few steps is not strength × 1000.
- ddim, below {cfg.teacher_steps} steps: the undistilled teacher's best, by Fréchet distance, of w in {{{w}}}, and under
  a control of {{leading, trailing}} times, chosen on the very pictures that are reported, which favours it.
- w: guidance, 1 is none. NFE: evaluations of the network per picture; the ControlNet is evaluated as often."""
