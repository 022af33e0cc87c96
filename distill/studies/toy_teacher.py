"""Trains a toy teacher, the toy's classifier (judge) and its reward from nothing, and measures them.

    distill study toy_teacher output_dir=runs/toy-teacher                  # all four; resumes
    distill study toy_teacher output_dir=runs/toy-teacher stages=[reward]
    distill study toy_teacher output_dir=runs/toy-teacher evaluate=true    # the table, of what is there
    distill study toy_teacher output_dir=runs/toy-teacher stages=[denoiser] teacher=flow    # SD3's shape

The folder gets `teacher/` (a diffusers pipeline of the current averaged weights, rewritten every few minutes, so the
run may be stopped at any time), `judge.safetensors`, `reward.safetensors`, `checkpoints/`, `evaluation.json` and
`evaluation.md`. It takes about an hour and a half on one CPU core. Copy `teacher/` and the two files into
`distill/toy/` to bundle them.

`teacher=flow` trains and measures the flow-matching teacher in their place: `teacher_flow/`, in an hour or two, and
`evaluation_flow.json` and `.md`. It has the same captions, autoencoder and classifier: those of the folder, or the
bundled ones where the folder has none.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.config.settings import ToyTeacherSettings
from distill.diffusion.random import generator, seed_of
from distill.evaluation.pipelines import load_pipeline
from distill.studies.toy_flow import (
    flow_matching_loss,
    generate_flow_images,
    untrained_flow_pipeline,
)
from distill.toy import teacher as toy
from distill.toy.judge import Judge, frechet_distance, judge_file, load_judge, sharpness
from distill.toy.reward import ToyReward
from distill.toy.world import CAPTIONS, PATTERNS, Scene, balanced_labels, draw_scene, paint, render

STEPS = (50, 8, 4, 2, 1)
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def main(cfg: ToyTeacherSettings) -> None:
    output = Path(cfg.output_dir)
    recipe = RECIPES[cfg.teacher]
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    if cfg.evaluate:
        evaluate(recipe, output, cfg.samples, cfg.tuning_samples)
        return
    if "vae" in cfg.stages:
        train_vae(output, cfg.vae_steps, cfg.seed)
    if "judge" in cfg.stages:
        train_judge(output, cfg.judge_steps, cfg.seed)
    if "denoiser" in cfg.stages:
        train_denoiser(recipe, output, cfg.steps or recipe.steps, cfg.batch_size, cfg.pictures, cfg.seed)
    if "reward" in cfg.stages:
        train_reward(output, cfg.reward_steps, cfg.seed)


# ---------------------------------------------------------------------------------------------------------------- VAE


def train_vae(output: Path, steps: int, seed: int, batch_size: int = 32) -> None:
    """Reconstruction (squared, absolute and edge differences) with a slight pull to a unit Gaussian."""
    torch.manual_seed(seed)
    vae = toy.build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    file = output / "checkpoints" / "vae.pt"
    first = resume(file, model=vae, optimizer=optimizer)
    for step in progress("vae", first, steps):
        set_rate(optimizer, 2e-3, step, steps, decay=0.6)
        generator = step_generator(seed, "vae", step)
        pictures = render(torch.randint(len(CAPTIONS), (batch_size,), generator=generator), generator)
        posterior = vae.encode(pictures).latent_dist
        difference = vae.decode(posterior.sample(generator)).sample - pictures
        loss = difference.square().mean() + 0.5 * difference.abs().mean() + 0.5 * edges(difference)
        loss = loss + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        descend(loss, optimizer)
        if done(step, steps, 500):
            note(step, squared_error=difference.square().mean(), latent_std=posterior.mean.std())
            save(file, step + 1, model=vae, optimizer=optimizer)
    measure_scale(vae, seed)
    vae.save_pretrained(output / "checkpoints" / "vae")


def edges(difference: Tensor) -> Tensor:
    """Mean absolute finite difference, along both axes: without it small shapes stay soft."""
    across = difference[..., 1:] - difference[..., :-1]
    down = difference[..., 1:, :] - difference[..., :-1, :]
    return across.abs().mean() + down.abs().mean()


@torch.no_grad()
def measure_scale(vae: AutoencoderKL, seed: int) -> None:
    """Centres the latents' channels (an exact shift inside the VAE); measures the scaling factor to unit variance."""
    generator = step_generator(seed, "scale", 0)
    latents = vae.encode(render(balanced_labels(2000), generator)).latent_dist.mean
    mean = latents.mean(dim=(0, 2, 3))
    assert isinstance(vae.quant_conv, nn.Conv2d) and isinstance(vae.post_quant_conv, nn.Conv2d)
    assert vae.quant_conv.bias is not None and vae.post_quant_conv.bias is not None
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=round(1 / (latents - mean[:, None, None]).std().item(), 5))


# -------------------------------------------------------------------------------------------------------------- judge


def train_judge(output: Path, steps: int, seed: int, batch_size: int = 64) -> None:
    """Captions, and what they leave open, from renders that are partly blurred and noisy."""
    torch.manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    file = output / "checkpoints" / "judge.pt"
    first = resume(file, model=judge, optimizer=optimizer)
    for step in progress("judge", first, steps):
        set_rate(optimizer, 2e-3, step, steps, decay=0.6)
        generator = step_generator(seed, "judge", step)
        scene = draw_scene(torch.randint(len(CAPTIONS), (batch_size,), generator=generator), generator)
        pictures, blur = spoil(paint(scene), generator)
        logits, details = judge(pictures)
        wanted, known = open_details(scene, blur)
        caption_loss = F.cross_entropy(logits, scene.labels)
        detail_loss = ((details - wanted).square() * known).mean()
        descend(caption_loss + detail_loss, optimizer)
        if done(step, steps, 500):
            note(step, caption=caption_loss, details=detail_loss)
            save(file, step + 1, model=judge, optimizer=optimizer)
    with torch.no_grad():  # features() is the identity so far: mean 0, deviation 1
        features = judge.eval().features(render(balanced_labels(5000), step_generator(seed, "scale", 1)))
    judge.feature_mean, judge.feature_std = features.mean(0), features.std(0)
    save_file(judge.state_dict(), output / "judge.safetensors")


def spoil(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures blended with their blur by a random share (0 for half of them) plus slight noise, and that share [B]."""
    count = len(pictures)
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    weight = torch.outer(kernel, kernel).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(pictures, (2, 2, 2, 2), mode="reflect"), weight, groups=3)
    share = (torch.rand(count, generator=generator) * 2 - 1).clamp(min=0)
    noise = torch.randn(pictures.shape, generator=generator) * 0.08 * torch.rand(count, 1, 1, 1, generator=generator)
    return torch.lerp(pictures, blurred, share[:, None, None, None]) + noise, share


def open_details(scene: Scene, blur: Tensor) -> tuple[Tensor, Tensor]:
    """What the classifier regresses beside the caption, and where it is defined: both [B, 8]."""
    pattern = scene.labels % len(PATTERNS)
    stripes, dots, checks = (pattern == PATTERNS.index(name) for name in ("stripes", "dots", "checks"))
    always = torch.ones_like(stripes)
    columns = [
        (scene.dark.float() * 2 - 1, always),
        (blur * 2, always),
        ((scene.period - 10) / 2, always),
        ((scene.dot_count - 3.5) / 1.5, dots),
        ((2 * scene.angle).cos(), stripes),
        ((2 * scene.angle).sin(), stripes),
        ((4 * scene.angle).cos(), checks),
        ((4 * scene.angle).sin(), checks),
    ]
    return torch.stack([value for value, _ in columns], dim=1), torch.stack([known for _, known in columns], dim=1)


# ------------------------------------------------------------------------------------------------------------- reward


def train_reward(output: Path, steps: int, seed: int, batch_size: int = 64) -> None:
    """Captions, from sharp renders with slight noise: what the classifier is shown is blurred too."""
    torch.manual_seed(seed_of(seed, "reward"))
    reward = ToyReward()
    optimizer = torch.optim.AdamW(reward.parameters(), lr=3e-3, weight_decay=0.01)
    file = output / "checkpoints" / "reward.pt"
    first = resume(file, model=reward, optimizer=optimizer)
    for step in progress("reward", first, steps):
        set_rate(optimizer, 3e-3, step, steps, decay=0.6)
        random = generator(seed, "reward", step)
        labels = torch.randint(len(CAPTIONS), (batch_size,), generator=random)
        pictures = render(labels, random)
        pictures = pictures + 0.05 * torch.randn(pictures.shape, generator=random)
        loss = F.cross_entropy(reward.logits((pictures + 1) / 2), labels)
        descend(loss, optimizer)
        if done(step, steps, 500):
            note(step, caption=loss)
            save(file, step + 1, model=reward, optimizer=optimizer)
    save_file(reward.state_dict(), output / "reward.safetensors")


# ----------------------------------------------------------------------------------------------------------- denoiser


class Generator(nn.Module):
    """The parts of a pipeline that learn together: the text encoders and the denoiser."""

    def __init__(self, pipeline: toy.Pipeline, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, getattr(pipeline, name))


def train_denoiser(recipe: ToyRecipe, output: Path, steps: int, batch_size: int, pictures: int, seed: int) -> None:
    """The recipe's loss, with a tenth of the captions dropped as its pipeline drops them for guidance."""
    vae = trained_vae(output)
    torch.manual_seed(seed)
    pipeline = recipe.untrained(vae, seed)
    latents, labels = encoded_pictures(recipe, output, pipeline.vae, pictures, seed)
    online = Generator(pipeline, recipe.learning)
    average = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.AdamW(online.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.01)
    file = output / "checkpoints" / f"denoiser{recipe.suffix}.pt"
    first = resume(file, model=online, average=average, optimizer=optimizer)
    running = None
    for step in progress("denoiser", first, steps):
        if recipe.text_steps is not None and step >= recipe.text_steps:
            freeze(online, average, recipe.learning[:-1])
        set_rate(optimizer, recipe.rate, step, steps, decay=0.4)
        generator = step_generator(seed, "denoiser", step)
        chosen = torch.randint(len(latents), (batch_size,), generator=generator)
        loss = recipe.loss(pipeline, latents[chosen], labels[chosen], generator)
        descend(loss, optimizer)
        follow(average, online, min(0.9995, (1 + step) / (10 + step)))
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if done(step, steps, 1000):
            note(step, loss=running)
            save(file, step + 1, model=online, average=average, optimizer=optimizer)
            export(output / f"teacher{recipe.suffix}", pipeline, average)


def freeze(online: Generator, average: Generator, names: tuple[str, ...]) -> None:
    """Ends the training of these parts, whose average is from now on what they are."""
    for name in names:
        part, averaged = getattr(online, name), getattr(average, name)
        if next(part.parameters()).requires_grad:
            part.requires_grad_(False)
            averaged.load_state_dict(part.state_dict())


def trained_vae(output: Path) -> AutoencoderKL:
    """The autoencoder that was trained in the folder, or the bundled teacher's where none was."""
    folder = output / "checkpoints" / "vae"
    if not folder.exists():
        folder = toy.teacher_folder() / "vae"
        print("the autoencoder is the bundled teacher's", flush=True)
    vae = AutoencoderKL.from_pretrained(folder)
    vae.register_to_config(_name_or_path=None)  # or this machine's path would be stored with the weights
    return vae


def untrained_pipeline(vae: AutoencoderKL, seed: int) -> StableDiffusionXLPipeline:
    pipeline = toy.build_pipeline()
    pipeline.register_modules(vae=vae)
    return pipeline


def noise_loss(pipeline: toy.Pipeline, clean: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    return denoising_loss(pipeline, pipeline.scheduler.alphas_cumprod, clean, labels, generator)


def denoising_loss(
    pipeline: StableDiffusionXLPipeline, alphas: Tensor, clean: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Squared error of the predicted noise; timesteps are stratified over the batch, a tenth has no caption."""
    count = len(clean)
    strata = torch.arange(count) + torch.rand(count, generator=generator)
    timestep = (strata / count * len(alphas)).long().clamp(max=len(alphas) - 1)
    noise = torch.randn(clean.shape, generator=generator)
    alpha = alphas[timestep][:, None, None, None]
    keep = (torch.rand(count, generator=generator) >= 0.1).float()
    prompt, pooled = toy.encode_captions(pipeline, list(CAPTIONS))  # all of them: there are few
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    text, pooled_text = prompt[labels] * keep[:, None, None], pooled[labels] * keep[:, None]
    return F.mse_loss(denoise(pipeline, noisy, timestep, text, pooled_text), noise)


@torch.no_grad()
def encoded_pictures(
    recipe: ToyRecipe, output: Path, vae: AutoencoderKL, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Scaled latents [count, C, 8, 8] of random pictures and their labels [count], encoded once and kept in a file."""
    file = output / "checkpoints" / f"latents{recipe.suffix}-{count}.pt"
    if file.exists():
        stored = torch.load(file)
        return stored["latents"], stored["labels"]
    batch = 500
    shift, scale = vae.config["shift_factor"] or 0.0, vae.config["scaling_factor"]
    labels, latents = [], []
    for index in progress("latents", 0, count // batch):
        generator = step_generator(seed, "latents", index)
        labels.append(torch.randint(len(CAPTIONS), (batch,), generator=generator))
        latents.append((vae.encode(render(labels[-1], generator)).latent_dist.mean - shift) * scale)
    stored = {"latents": torch.cat(latents), "labels": torch.cat(labels)}
    torch.save(stored, file)
    return stored["latents"], stored["labels"]


@torch.no_grad()
def follow(average: nn.Module, online: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), 1 - decay)


def export(folder: Path, pipeline: toy.Pipeline, average: Generator) -> None:
    """Writes the averaged weights as a stock pipeline's folder."""
    online = {name: getattr(pipeline, name) for name, _ in average.named_children()}
    pipeline.register_modules(**dict(average.named_children()))
    pipeline.save_pretrained(folder)
    pipeline.register_modules(**online)


# --------------------------------------------------------------------------------------------------- common to stages


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """Randomness of one step, from the seed, the stage and the step alone: a resumed run needs no stored state."""
    names = ("vae", "judge", "denoiser", "latents", "scale")
    return torch.Generator().manual_seed((seed * len(names) + names.index(stage)) * 10_000_019 + step)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int, decay: float) -> None:
    """Linear warm-up over 200 steps, then constant, then linear to 1 % over the last share `decay` of the run."""
    factor = min(1.0, (step + 1) / 200, max(0.01, (1 - step / steps) / decay))
    for group in optimizer.param_groups:
        group["lr"] = rate * factor


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def progress(name: str, first: int, steps: int) -> Iterator[int]:
    """Steps from `first`, with a line and the time left about every half minute."""
    start = last = time.monotonic()
    for step in range(first, steps):
        yield step
        now = time.monotonic()
        if now - last > 30 or step == steps - 1:
            last = now
            left = (now - start) / (step + 1 - first) * (steps - step - 1)
            print(f"{name}: {step + 1}/{steps}, {left / 60:.1f} min left", flush=True)


def done(step: int, steps: int, every: int) -> bool:
    return (step + 1) % every == 0 or step + 1 == steps


def note(step: int, **values: Tensor | float) -> None:
    shown = ", ".join(f"{name} {torch.as_tensor(value).item():.5f}" for name, value in values.items())
    print(f"  step {step + 1}: {shown}", flush=True)


def save(file: Path, step: int, **parts: nn.Module | torch.optim.Optimizer) -> None:
    unfinished = file.with_suffix(".part")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, unfinished)
    unfinished.replace(file)


def resume(file: Path, **parts: nn.Module | torch.optim.Optimizer) -> int:
    """Loads the parts of a checkpoint if there is one; returns the step to resume from."""
    if not file.exists():
        return 0
    stored = torch.load(file)
    for name, part in parts.items():
        part.load_state_dict(stored[name])
    print(f"resuming {file.stem} at step {stored['step']}", flush=True)
    return stored["step"]


# --------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Row:
    """One line of the table: means over the seeds, and the standard error of the accuracy and of the distance."""

    name: str
    steps: int | None
    spacing: str | None
    guidance: float | None
    accuracy: float
    accuracy_error: float
    distance: float
    distance_error: float
    sharpness: float


class ToyScorer:
    """Scores pictures of balanced captions against 10,000 real ones."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.reference = render(balanced_labels(10_000), torch.Generator().manual_seed(987_654_321))
        self.reference_features = self.features(self.reference)

    def features(self, pictures: Tensor) -> Tensor:
        return torch.cat([self.judge.features(part) for part in pictures.split(500)])

    def __call__(
        self,
        name: str,
        runs: list[Tensor],
        steps: int | None = None,
        spacing: str | None = None,
        guidance: float | None = None,
    ) -> Row:
        captions = [CAPTIONS[label] for label in balanced_labels(len(runs[0]))]
        accuracy = torch.tensor([self.judge.caption_accuracy(run, captions)[0] for run in runs])
        distance = torch.tensor([frechet_distance(self.features(run), self.reference_features) for run in runs])
        share = accuracy.mean().item()
        return Row(
            name=name,
            steps=steps,
            spacing=spacing,
            guidance=guidance,
            accuracy=share,
            accuracy_error=(share * (1 - share) / (len(runs) * len(captions))) ** 0.5,
            distance=distance.mean().item(),
            distance_error=distance.std().item() / len(runs) ** 0.5 if len(runs) > 1 else float("nan"),
            sharpness=sum(sharpness(run, self.reference) for run in runs) / len(runs),
        )


@torch.no_grad()
def evaluate(recipe: ToyRecipe, output: Path, count: int, tuning_count: int) -> None:
    """Tunes spacing and guidance for every number of steps on one seed, reports the best on three others."""
    pipeline = load_pipeline(str(output / f"teacher{recipe.suffix}"), own_scheduler=True)
    judge = output / "judge.safetensors"
    measure = ToyScorer(load_judge(judge if judge.exists() else judge_file()))
    seeds = (101, 102, 103)
    real = [render(balanced_labels(count), torch.Generator().manual_seed(seed)) for seed in seeds]
    rows = [measure("real", real), measure("VAE", [reconstruct(pipeline.vae, pictures) for pictures in real])]
    tuning = []
    for steps in STEPS:
        tried = []
        for spacing in recipe.spacings:
            for guidance in GUIDANCE:
                pictures = recipe.generate(pipeline, tuning_count, 7, steps, spacing, guidance)
                tried.append(measure("tuning", [pictures], steps, spacing, guidance))
                print(describe(tried[-1]), flush=True)
        tuning += tried
        best = min(tried, key=lambda row: row.distance)
        spacing, guidance = str(best.spacing), float(best.guidance or 0)
        sampled = [recipe.generate(pipeline, count, seed, steps, spacing, guidance) for seed in seeds]
        rows.append(measure("teacher", sampled, steps, spacing, guidance))
        print(describe(rows[-1]), flush=True)
    stored = {
        "samples": count,
        "seeds": seeds,
        "rows": [asdict(r) for r in rows],
        "tuning": [asdict(r) for r in tuning],
    }
    (output / f"evaluation{recipe.suffix}.json").write_text(json.dumps(stored, indent=1) + "\n")
    table = markdown(rows, count * len(seeds))
    (output / f"evaluation{recipe.suffix}.md").write_text(table)
    print(table)


def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(250)]
    return torch.cat(parts).clamp(-1, 1)


@torch.no_grad()
def generate_images(
    pipeline: StableDiffusionXLPipeline, count: int, seed: int, steps: int, spacing: str, guidance: float
) -> Tensor:
    """Pictures [count, 3, 32, 32] of balanced captions by DDIM, the pipeline's own arithmetic without its overhead."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    prompt, pooled = toy.encode_captions(pipeline, list(CAPTIONS))
    labels = balanced_labels(count)
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    pictures = []
    for latents, part in zip(noise.split(250), labels.split(250), strict=True):
        text, texts = prompt[part], pooled[part]
        for timestep in scheduler.timesteps:
            estimate = denoise(pipeline, latents, timestep, text, texts)
            if guidance != 1.0:
                bare = denoise(pipeline, latents, timestep, torch.zeros_like(text), torch.zeros_like(texts))
                estimate = bare + guidance * (estimate - bare)
            latents = scheduler.step(estimate, timestep, latents).prev_sample
        pictures.append(pipeline.vae.decode(latents / pipeline.vae.config["scaling_factor"]).sample.clamp(-1, 1))
    return torch.cat(pictures)


def denoise(pipeline: StableDiffusionXLPipeline, x: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    extra = {"text_embeds": pooled, "time_ids": toy.time_ids(len(x))}
    return pipeline.unet(x, timestep, text, added_cond_kwargs=extra).sample


def describe(row: Row) -> str:
    setting = "" if row.steps is None else f" {row.steps} steps, {row.spacing}, guidance {row.guidance}"
    return f"{row.name}{setting}: accuracy {row.accuracy:.3f}, distance {row.distance:.3f}, sharp {row.sharpness:.3f}"


def markdown(rows: list[Row], pictures: int) -> str:
    lines = [
        f"Best setting of each number of steps, tuned on another seed; {pictures} pictures a row.",
        "",
        "| pictures | steps | spacing | guidance | caption accuracy | Frechet distance | sharpness |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        accuracy = f"{row.accuracy:.3f} ± {row.accuracy_error:.3f}"
        distance = f"{row.distance:.3f} ± {row.distance_error:.3f}"
        setting = " | ".join("" if value is None else str(value) for value in (row.steps, row.spacing, row.guidance))
        lines.append(f"| {row.name} | {setting} | {accuracy} | {distance} | {row.sharpness:.3f} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------ recipes


@dataclass(frozen=True)
class ToyRecipe:
    """What is a teacher's own in its training and its evaluation.

    Args:
        suffix: of its files and of its folder.
        steps, rate: of its training.
        learning: the parts of its pipeline that learn together, the denoiser last.
        text_steps: how long the others learn, which is a quarter of a step's cost; None is as long as the denoiser.
        spacings: of the times that it is sampled at.
        untrained: trained VAE, seed -> its pipeline before training.
        loss: pipeline, scaled latents [B, C, 8, 8], labels [B], random numbers -> scalar.
        generate: pipeline, count, seed, steps, spacing, guidance -> pictures [count, 3, 32, 32] in [-1, 1].
    """

    suffix: str
    steps: int
    rate: float
    learning: tuple[str, ...]
    text_steps: int | None
    spacings: tuple[str, ...]
    untrained: Callable[[AutoencoderKL, int], toy.Pipeline]
    loss: Callable[[toy.Pipeline, Tensor, Tensor, torch.Generator], Tensor]
    generate: Callable[[toy.Pipeline, int, int, int, str, float], Tensor]


RECIPES = {
    "vp": ToyRecipe(
        suffix="",
        steps=19_000,
        rate=1e-3,
        learning=("text_encoder", "text_encoder_2", "unet"),
        text_steps=None,
        spacings=("leading", "trailing"),
        untrained=untrained_pipeline,
        loss=noise_loss,
        generate=generate_images,
    ),
    "flow": ToyRecipe(
        suffix="_flow",
        steps=24_000,
        rate=2e-3,
        learning=("text_encoder", "text_encoder_2", "text_encoder_3", "transformer"),
        text_steps=1000,
        spacings=("default", "trailing"),
        untrained=untrained_flow_pipeline,
        loss=flow_matching_loss,
        generate=generate_flow_images,
    ),
}
