"""LCM on real UNets under the engine, against the recipe of the published scripts as a plain loop.

The loop holds what those scripts hold: a second UNet as the teacher, asked with the prompt and without it one after the
other, and for a full network a third one, its moving average. `recipe` is their loss, from its formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from distill.diffusion.prediction import Conditioning, Prediction
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.trajectory import Batch
from distill.methods.lcm import LCM
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.models.families.unet import LCM_LORA_TARGETS
from distill.models.student import FullStudent, LoRAStudent
from distill.training.engine import Engine, EngineSettings
from distill.training.trained_network import TrainingRecipe
from tests.methods.test_lcm import Raw, recipe
from tests.tiny import CHANNELS, save_tiny, tiny_conditioning

STEPS, B, RATE, CLIP, MU = 3, 4, 1e-3, 0.05, 0.95
SEED = 5


def batch_of(step: int, skip: int = 20) -> Batch:
    """Clean latents whose noised source will not draw the lowest interval, on which the recipe ends elsewhere."""
    t = Context(SEED, step, tuple(range(50 * step, 50 * step + 50))).integers(1, 1000 // skip + 1, "t")
    positions = tuple(50 * step + int(i) for i in torch.where(t > 1)[0][:B])
    random = torch.Generator().manual_seed(step)
    empty = tiny_conditioning("sd15", 1, seed=99)
    return Batch(
        states=torch.randn(B, 1, CHANNELS, 6, 6, generator=random),
        times=torch.zeros(B, 1, dtype=torch.int64),
        conditioning=tiny_conditioning("sd15", B, seed=step),
        unconditional={k: v.expand(B, -1, -1) for k, v in empty.items()},
        guidance=torch.ones(B),
        positions=positions,
    )


def raw(unet: UNet2DConditionModel, w: Tensor) -> Raw:
    """The network as a script calls it; `w` as printed, shown to a network that takes it as the pipelines do."""
    width = unet.config.time_cond_proj_dim

    def call(z: Tensor, index: Tensor, conditioning: Conditioning) -> Tensor:
        told = width and StableDiffusionPipeline.get_guidance_scale_embedding(None, w.float(), embedding_dim=width)
        return unet(z.float(), index, conditioning["prompt"], timestep_cond=told).sample.double()

    return call


def plain_loop(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, prediction: Prediction, average: bool
) -> tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Losses, the clipped gradients of each step, and the weights at the end."""
    target = copy.deepcopy(student) if average else student
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE)
    losses, gradients = [], []
    for step in range(STEPS):
        batch, context = batch_of(step), Context(SEED, step, batch_of(step).positions)
        z0 = batch.states[:, 0].double()
        i, w = context.integers(1, 51, "t") - 1, context.uniform(4.0, 16.0, "w").double() - 1
        noise = context.normal(batch.states[:, 0], "noise").double()
        c, u = (x["encoder_hidden_states"] for x in (batch.conditioning, batch.unconditional))
        networks = raw(student, w), raw(target, w), raw(teacher, w)
        loss, _, _ = recipe(*networks, prediction, z0, noise, i, w, c, u, 20, "huber", 0.001)
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), CLIP)
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        if average:
            with torch.no_grad():
                for p, q in zip(target.parameters(), student.parameters(), strict=True):
                    p.mul_(MU).add_(q, alpha=1 - MU)
    return losses, gradients, {name: p.detach() for name, p in trained.items()}


class Recorder(torch.optim.AdamW):
    """AdamW that keeps the gradients it was given."""

    seen: list[list[Tensor]]

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return super().step(closure)


@pytest.fixture(params=["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
def teacher(request: pytest.FixtureRequest, tmp_path) -> Teacher:  # type: ignore[no-untyped-def]
    return load_teacher(save_tiny(tmp_path / "teacher", "sd15", prediction_type=request.param))


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = EngineSettings(max_grad_norm=CLIP, seed=SEED).start()
    yield engine
    engine.release()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_losses_gradients_and_weights_are_those_of_the_recipe(kind: str, teacher: Teacher, engine: Engine) -> None:
    original = copy.deepcopy(teacher.network)
    student = LoRAStudent(rank=4, alpha=3) if kind == "lora" else FullStudent(guidance_embedding_dim=8)
    method = LCM(NoiseSchedule.scaled_linear(), "noised", target="ema" if kind == "full" else "student")
    networks = student.networks(teacher, keep_teacher="teacher" in method.requires)
    if kind == "full":  # else w would have no effect on the first loss, the projection being zero
        nn.init.normal_(teacher.network.time_embedding.cond_proj.weight, std=0.1)
    expected = plain_loop(copy.deepcopy(teacher.network), original, teacher.prediction, average=kind == "full")

    optimizers: list[Recorder] = []

    def optimizer(parameters):  # type: ignore[no-untyped-def]
        optimizers.append(Recorder(parameters, lr=RATE))
        optimizers[0].seen = []
        return optimizers[0]

    engine.prepare(networks, {"student": TrainingRecipe(optimizer, ema_decay=MU if kind == "full" else None)})
    (turn,) = method.turns(0)
    losses = [engine.updated(turn, [batch_of(step)], step)["loss"] for step in range(STEPS)]

    assert losses[0] == pytest.approx(expected[0][0], rel=1e-5) and losses[0] > 1e-3
    assert losses == pytest.approx(expected[0], rel=2e-4)  # AdamW's first steps enlarge what rounding leaves
    for step, (ours, theirs) in enumerate(zip(optimizers[0].seen, expected[1], strict=True)):
        assert_close(ours, list(theirs.values()), 1e-3 if step else 1e-4)
    weights = engine.export_weights("student")
    assert weights.keys() == expected[2].keys()
    assert_close(list(weights.values()), list(expected[2].values()), 1e-4)
    for name, p in original.named_parameters():  # the teacher is what it was
        assert torch.equal(p, dict(networks["teacher"].module.named_parameters())[base(name, kind)])


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """All tensors together, relative to their norm."""
    a, b = (torch.cat([x.flatten() for x in xs]).double() for xs in (ours, theirs))
    assert (a - b).norm() <= tolerance * b.norm()


def base(name: str, kind: str) -> str:
    """Where an adapted module keeps its own weight."""
    module, _, leaf = name.rpartition(".")
    adapted = kind == "lora" and any(f".{module}".endswith(f".{t}") for t in LCM_LORA_TARGETS)
    return f"{module}.base_layer.{leaf}" if adapted else name
