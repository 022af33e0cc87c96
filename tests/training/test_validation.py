"""Pictures while training: drawn as the method's students are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.diffusion.guidance import guided
from distill.diffusion.random import starting_noise
from distill.diffusion.solver import lcm_times, trailing_times
from distill.methods.sampling import Sampling, sample
from distill.models.families.loading import load_teacher
from distill.training.engine import EngineSettings
from distill.training.tracking import to_pictures
from distill.training.trained_network import TrainingRecipe
from distill.training.validation import Validation, kept_ends, teacher_ends, validation_seeds
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
    teacher = load_teacher(save_tiny(tmp_path), parts=("network", "text", "vae"))
    teacher.network.requires_grad_(True)
    student, conditioning = teacher.denoiser(), teacher.encode(PROMPTS)
    validation = Validation(teacher, PROMPTS, conditioning, USUAL_STEPS, seed=0, sampling=sampling)
    gallery, engine = Gallery(), EngineSettings().start()
    engine.prepare({"student": student}, {"student": TrainingRecipe(torch.optim.SGD)})
    validation(engine, gallery, 1)  # type: ignore[arg-type]
    engine.release()

    generators = [torch.Generator().manual_seed(seed) for seed in validation.seeds]
    x = starting_noise(generators, teacher.latent_shape)
    latents = sample(student, teacher.schedule, x, times, conditioning, sampling.sampler, generators)
    expected = to_pictures(torch.cat([teacher.decode(latent[None]) for latent in latents]))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(gallery.shown, expected, strict=True))


def brightness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images.mean((1, 2, 3)) * len(prompts[0])


def test_the_student_is_measured_against_its_teachers_ends_and_by_a_reward(tmp_path: Path) -> None:
    """A student that is its teacher, drawn as the teacher is, is no further away than rounding; another one is."""
    teacher = load_teacher(save_tiny(tmp_path), parts=("network", "text", "vae"))
    teacher.network.requires_grad_(True)
    conditioning, seeds, kept = teacher.encode(PROMPTS), validation_seeds(0, 2), tmp_path / "run" / "ends.safetensors"
    told: list[int] = []
    engine, gallery, found = EngineSettings().start(), Gallery(), []
    processes = engine.processes

    def ends_at(guidance: float) -> Tensor:
        follow = guided(teacher.denoiser(), teacher.unconditional(), guidance)
        make = partial(teacher_ends, teacher, follow, conditioning, seeds, 2, processes, told.append)
        return torch.stack(list(kept_ends(kept, seeds, 2, guidance, processes, make)))

    ends = ends_at(1.0)
    assert ends.shape == (2, *teacher.latent_shape) and told == [1, 1]
    assert torch.equal(ends_at(1.0), ends) and told == [1, 1]  # generated once
    assert not torch.equal(ends_at(3.0), ends) and told == [1, 1, 1, 1]  # of another guidance: again

    engine.prepare({"student": teacher.denoiser()}, {"student": TrainingRecipe(torch.optim.SGD)})
    for steps in (2, 1):
        sampling = Sampling("ddim", "trailing", steps)
        validation = Validation(teacher, PROMPTS, conditioning, 2, 0, 0, sampling, ends, brightness)
        found.append(validation(engine, gallery, 1))  # type: ignore[arg-type]
    engine.release()
    assert found[0]["validation/teacher_consistency"] < 1e-10 < 1e-3 < found[1]["validation/teacher_consistency"]
    shown = [torch.tensor(list(picture.tobytes())).double().mean() / 255 for picture in gallery.shown]
    expected = sum(float(mean) * len(prompt) for mean, prompt in zip(shown, PROMPTS, strict=True)) / 2
    assert found[1]["validation/reward"] == pytest.approx(expected, abs=0.02)  # pictures are rounded to 8 bits
    assert 0 < found[1]["validation/share"] <= 1 and found[1]["validation/seconds"] > 0
