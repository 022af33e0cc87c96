"""Critics of which heads alone are trained, one over each level of the teacher's frozen encoder, in every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.diffusion.adversarial import Adversary
from distill.diffusion.prediction import Conditioning
from distill.diffusion.random import Context
from distill.models.discriminator import CriticNetwork, Discriminator, Heads, LatentDiscriminator
from distill.models.execution import bare
from distill.models.families.loading import load_teacher
from distill.models.families.registry import FAMILIES, published
from distill.models.families.teacher import Teacher
from distill.models.full_size import build_network
from tests.tiny import save_tiny
from tests.tiny_flux import save_tiny_flux
from tests.tiny_qwen import SIDE, save, tiny_klein, tiny_z_image

T = torch.tensor([300, 800])
SAVE: dict[str, tuple[Callable[[Path], str], int | None]] = {
    "sd15": (partial(save_tiny, family="sd15"), None),
    "sdxl": (partial(save_tiny, family="sdxl"), None),
    "sd3": (partial(save_tiny, family="sd3"), None),
    "flux": (save_tiny_flux, 16),
    "flux2": (lambda folder: save(tiny_klein(), folder), SIDE),
    "z_image": (lambda folder: save(tiny_z_image(), folder), SIDE),
}
"""How a tiny pipeline of each family is saved, and the side of the pictures that it is opened for."""
LAST: dict[str, Callable[[Any], nn.Module]] = {
    "sd15": lambda encoder: encoder.mid_block,
    "sdxl": lambda encoder: encoder.mid_block,
    "sd3": lambda encoder: encoder.transformer_blocks[-1],
    "flux": lambda encoder: [*encoder.transformer_blocks, *encoder.single_transformer_blocks][-1],
    "flux2": lambda encoder: encoder.single_transformer_blocks[-1],
    "z_image": lambda encoder: encoder.layers[-1],
}
"""The block whose output the features are."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Teacher]:
    def make(name: str) -> Teacher:
        write, side = SAVE[name]
        teacher = load_teacher(write(tmp_path_factory.mktemp(name)), parts=("network", "text"))
        return teacher if side is None else teacher.at_resolution(side)

    return cache(make)


@pytest.fixture(params=SAVE)
def teacher(request: pytest.FixtureRequest, opened: Callable[[str], Teacher]) -> Teacher:
    return opened(request.param)


def inputs(teacher: Teacher, seed: int = 0) -> tuple[Tensor, Conditioning]:
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))
    c = teacher.encode(["a cat", "two dogs"])
    return x, c | ({"guidance": torch.ones(2)} if not teacher.second_pass else {})


def critic(teacher: Teacher, **settings: Any) -> Discriminator:
    """Whose heads have an opinion already."""
    made = LatentDiscriminator(trained="heads", levels="all", **settings).network(teacher)
    for name, p in made.module.named_parameters():
        if name.endswith("logit.weight"):
            p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    return made


def test_every_family_with_critics_is_here() -> None:
    assert set(SAVE) == set(FAMILIES)


def test_levels_are_maps_of_the_shapes_that_the_family_says_and_the_last_one_is_the_features(teacher: Teacher) -> None:
    (x, c), family = inputs(teacher), teacher.family.critic
    encoder = family.encoder(teacher.network, on_its_weights=True)
    told = teacher.schedule.told(T)
    levels = family.levels(encoder, x, told, c, torch.float32)
    shapes = family.level_shapes(teacher.network, encoder, teacher.latent_shape[1:])
    assert [tuple(level.shape[1:]) for level in levels] == shapes and len(levels) >= 2
    assert torch.equal(levels[-1], family.features(encoder, x, told, c, torch.float32))


def test_what_a_block_puts_out_is_read_as_the_features_are(teacher: Teacher) -> None:
    """The map in the output of the last block is the features, which are made of all that follows it."""
    (x, c), family, outputs = inputs(teacher), teacher.family.critic, []
    encoder = family.encoder(teacher.network, on_its_weights=True)
    hook = LAST[teacher.family.name](encoder).register_forward_hook(lambda _, __, output: outputs.append(output))
    features = family.features(encoder, x, teacher.schedule.told(T), c, torch.float32)
    hook.remove()
    found = outputs[0] if hasattr(encoder, "mid_block") else family.tapped(encoder, outputs[0], x)
    assert torch.equal(found, features)


@pytest.mark.parametrize("conditional", [False, True])
def test_heads_learn_and_the_teachers_encoder_is_theirs_and_stays(teacher: Teacher, conditional: bool) -> None:
    (x, c), before = inputs(teacher), [p.clone() for p in teacher.network.parameters()]
    judge = critic(teacher, conditional=conditional)
    origin = (inputs(teacher, 3)[0], T) if conditional else None
    real, fake = judge([x, inputs(teacher, 1)[0]], T, c, origin)
    assert real.dtype == torch.float32 and real.shape == fake.shape and real.shape[0] == 2 and real.shape[1] > 1
    Adversary(teacher.schedule).discriminator(judge, x, -x, c, Context(0, 0, (0, 1)), origin).loss.mean().backward()
    module: Any = bare(judge.module)
    assert isinstance(module.head, Heads)
    assert all(p.grad is not None and p.grad.any() for p in module.head.parameters())
    own = {id(p) for p in teacher.network.parameters()}
    assert all(id(p) in own and p.grad is None and not p.requires_grad for p in module.encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.network.parameters(), strict=True))


def test_a_student_hears_of_every_level(teacher: Teacher) -> None:
    """In its turn the heads are frozen; each level alone has a gradient for the samples."""
    (x, c), judge = inputs(teacher), critic(teacher)
    judge.module.requires_grad_(False)
    fake = x.clone().requires_grad_()
    (logits,) = judge([fake], T, c)
    module: Any = bare(judge.module)
    for level in logits.chunk(len(module.head.levels), 1):
        (gradient,) = torch.autograd.grad(level.sum(), fake, retain_graph=True)
        assert gradient.any()


def test_recomputed_activations_change_no_gradient(teacher: Teacher) -> None:
    (x, c), found = inputs(teacher), []
    for again in (False, True):
        judge = critic(teacher)
        judge.module.requires_grad_(False).train()
        if again:
            judge.module.enable_gradient_checkpointing()
        fake = x.clone().requires_grad_()
        judge([fake], T, c)[0].square().sum().backward()
        found.append(fake.grad)
    assert found[0] is not None and torch.equal(*found)


def test_each_level_weighs_as_much_however_fine_it_is() -> None:
    """The mean of the logits is the mean over levels of their means over places."""
    heads = Heads([8, 12, 16])
    for level, head in enumerate(heads.levels):
        nn.init.zeros_(head.logit.weight)
        nn.init.constant_(head.logit.bias, float(level))
    maps = [torch.randn(2, width, side, side) for width, side in ((8, 8), (12, 4), (16, 2))]
    logits = heads(*maps)
    assert logits.shape == (2, 3 * 64) and logits.mean(1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained": "head"}, "networks.discriminator.trained must be one of all, heads, got 'head'"),
        ({"levels": "first"}, "networks.discriminator.levels must be one of last, all, got 'first'"),
        (
            {"trained": "heads", "rank": 4},
            "networks.discriminator.rank=4 is of a LoRA on the encoder, and trained=heads trains none: set rank "
            "to null, or trained to all",
        ),
    ],
)
def test_refuses_what_cannot_be_trained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        LatentDiscriminator(**settings)
    assert str(raised.value) == message


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35_medium", "flux_dev", "flux2_klein", "z_image"])
def test_a_published_network_has_four_levels_or_those_of_its_unet(name: str) -> None:
    family, known = published(name)
    network = build_network(family.network.kind, known.network, device="meta")
    made = CriticNetwork(network, (64, 64), family=family, trained="heads", levels="all")
    module: Any = made.head
    assert len(module.levels) == {"sd15": 5}.get(name, 4)
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in made.head.parameters())
    assert sum(p.numel() for p in made.encoder.parameters()) > 3 * trained
