"""Makes weights for `perceptual=latent_lpips`: trains them on the toy world, or converts published ones:

distill study latent_lpips                                 # hours on one CPU core
distill study latent_lpips weights=FILE.safetensors        # takes its layers by their order, whatever their names

There are no people to ask on the toy world. So what is learned from is what must be so: of a picture that is changed a
little and one that is changed more in the same way, the first is nearer to the original; and so is another picture of
the same caption than one of another caption. Loss and constraint are those of LPIPS (Zhang et al. 2018,
arXiv 1801.03924): a logistic one on the difference of distances, with heads that are not negative.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.config.loading import ConfigError, checking
from distill.config.settings import LatentLPIPSSettings
from distill.data.progress import Progress
from distill.diffusion.losses import l2
from distill.diffusion.random import generator
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.models.files import save_file
from distill.models.perceptual import LatentPerceptual, load_latent_perceptual
from distill.toy.teacher import teacher_folder
from distill.toy.world import CAPTIONS, render
from distill.training.tracking import setup_logging

FILE = "latent_lpips.safetensors"
Distance = Callable[[Tensor, Tensor], Tensor]


def main(cfg: LatentLPIPSSettings) -> None:
    setup_logging()
    output = Path(cfg.output_dir)
    report: dict[str, float | str] = {}
    if cfg.weights is not None:
        if not cfg.weights.endswith(".safetensors"):
            raise ConfigError(
                f"weights={cfg.weights}: only .safetensors files are converted, for a pickle may hold code. "
                "perceptual.path itself reads a .pth, if it holds nothing but tensors"
            )
        with checking("weights: "):
            model = load_latent_perceptual(cfg.weights, cfg.scale)
    else:
        teacher = load_teacher(teacher_folder(), parts=("vae",))
        model, report = trained(cfg, teacher)
    output.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: x.contiguous() for name, x in model.state_dict().items()}, output / FILE, {"scale": f"{cfg.scale}"}
    )
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    scale = "" if cfg.scale == 1 else f" perceptual.scale={cfg.scale:g}"
    print(f"made: perceptual=latent_lpips perceptual.path={output / FILE}{scale}")


def trained(cfg: LatentLPIPSSettings, teacher: Teacher) -> tuple[LatentPerceptual, dict[str, float | str]]:
    """A distance, and the shares of held-out triplets in which it and the mean squared difference are right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = LatentPerceptual(teacher.latent_shape[0])
        start(model)
    sharpness = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.Adam([*model.requires_grad_(True).parameters(), sharpness], lr=cfg.learning_rate)
    progress = Progress("learning distances of latents", cfg.steps, "steps")
    for step in range(cfg.steps):
        original, near, far = triplets(teacher, cfg.batch_size, generator("latent lpips", cfg.seed, step))
        loss = F.softplus(sharpness.exp() * (model(original, near) - model(original, far))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for weight in model.heads.parameters():
                weight.clamp_(min=0)
        progress.update(1)
    model.requires_grad_(False)
    return model, {
        "triplets": cfg.pictures,
        "right": right(model, teacher, cfg),
        "right by mean squared difference": right(l2, teacher, cfg),
        "last loss": float(loss.detach()),
    }


def start(model: LatentPerceptual) -> None:
    """Convolutions for ReLU, heads that weigh all features alike."""
    for name, weight in model.convolutions.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(weight)
        else:
            torch.nn.init.kaiming_normal_(weight)
    for weight in model.heads.parameters():
        torch.nn.init.ones_(weight)


@torch.no_grad()
def right(distance: Distance, teacher: Teacher, cfg: LatentLPIPSSettings) -> float:
    """The share of held-out triplets in which the nearer one has the smaller distance."""
    found = []
    for first in range(0, cfg.pictures, cfg.batch_size):
        count = min(cfg.batch_size, cfg.pictures - first)
        original, near, far = triplets(teacher, count, generator("latent lpips", "measured", cfg.seed, first))
        found.append(distance(original, near) < distance(original, far))
    return float(torch.cat(found).double().mean())


@torch.no_grad()
def triplets(teacher: Teacher, count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [count, C, h, w] of pictures, of something near to each, and of something further away."""
    labels = torch.randint(len(CAPTIONS), (count,), generator=random)
    pictures = render(labels, random)
    weak, strong = (torch.rand(2, count, generator=random) + torch.tensor([[0.0], [1.0]])).unbind()
    changes = (noisy, blurred, tinted, moved)
    kinds = torch.randint(len(changes) + 1, (count,), generator=random)
    seed = int(torch.randint(2**31, (), generator=random))
    near, far = render(labels, random), render((labels + 1 + labels % (len(CAPTIONS) - 1)) % len(CAPTIONS), random)
    for kind, change in enumerate(changes):
        chosen = kinds == kind
        for target, strength in ((near, weak), (far, strong)):
            same = torch.Generator().manual_seed(seed)  # the same change, weaker and stronger
            target[chosen] = change(pictures, strength[:, None, None, None], same)[chosen]
    noise = torch.zeros(count, *teacher.latent_shape)  # the mean of each posterior
    first, second, third = (teacher.encode_pictures(x.clamp(-1, 1), noise) for x in (pictures, near, far))
    return first, second, third


def noisy(pictures: Tensor, strength: Tensor, random: torch.Generator) -> Tensor:
    return pictures + 0.3 * strength * torch.randn(pictures.shape, generator=random)


def blurred(pictures: Tensor, strength: Tensor, random: torch.Generator) -> Tensor:
    return torch.lerp(pictures, F.avg_pool2d(pictures, 5, 1, 2, count_include_pad=False), strength / 2)


def tinted(pictures: Tensor, strength: Tensor, random: torch.Generator) -> Tensor:
    return pictures + 0.4 * strength * torch.randn(len(pictures), 3, 1, 1, generator=random).sign()


def moved(pictures: Tensor, strength: Tensor, random: torch.Generator) -> Tensor:
    """Pictures moved along the x axis by up to four pixels; what leaves comes in at the other side."""
    shifts = (2 * strength.flatten()).ceil().int().tolist()
    return torch.stack([picture.roll(shift, -1) for picture, shift in zip(pictures, shifts, strict=True)])
