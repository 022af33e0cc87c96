"""Pictures while training: drawn as the method's students are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.diffusion.solver import lcm_times, trailing_times
from distill.methods.sampling import Sampling, sample, starting_noise
from distill.models.families import load_teacher
from distill.training.engine import Engine, TrainedNetwork
from distill.training.tracking import to_pictures
from distill.training.validation import Validation
from tests.tiny import save_tiny

PROMPTS, USUAL_STEPS = ["snow", "a red boat"], 3


class Gallery:
    """A tracker that keeps its pictures."""

    def images(self, name: str, images: list[Image.Image], step: int, captions: list[str]) -> None:
        self.shown = images


@pytest.mark.parametrize(
    ("sampling", "times"),
    [
        (Sampling(), lcm_times(1000, USUAL_STEPS)),
        (Sampling("ddim", "trailing", 2), trailing_times(1000, 2)),
        (Sampling("euler", "trailing", 4), trailing_times(1000, 4)),
        (Sampling("euler", "trailing"), trailing_times(1000, USUAL_STEPS)),
    ],
)
def test_pictures_are_drawn_as_the_method_says(sampling: Sampling, times: list[int], tmp_path: Path) -> None:
    teacher = load_teacher(save_tiny(tmp_path), parts=("unet", "text", "vae"))
    teacher.unet.requires_grad_(True)
    student, conditioning = teacher.denoiser(), teacher.encode(PROMPTS)
    validation = Validation(teacher, PROMPTS, conditioning, USUAL_STEPS, seed=0, sampling=sampling)
    gallery, engine = Gallery(), Engine().start()
    engine.prepare({"student": student}, {"student": TrainedNetwork(torch.optim.SGD)})
    validation(engine, gallery, 1)  # type: ignore[arg-type]
    engine.release()

    generators = [torch.Generator().manual_seed(seed) for seed in validation.seeds]
    x = starting_noise(generators, teacher.latent_shape)
    latents = sample(student, teacher.schedule, x, times, conditioning, sampling.sampler, generators)
    expected = to_pictures(torch.cat([teacher.decode(latent[None]) for latent in latents]))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(gallery.shown, expected, strict=True))
