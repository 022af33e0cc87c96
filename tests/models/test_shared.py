"""Several networks on the weights of one: what is in memory once, what is each one's own, and its gradients."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill.diffusion.random import generator
from distill.models.discriminator import LatentDiscriminator
from distill.models.fake_score import FakeScore
from distill.models.shared import on_the_weights_of, part_from
from distill.models.student import FullStudent
from tests.tiny import CHANNELS, tiny_conditioning, tiny_unet
from tests.training.engine_worker import TWO_LEVELS, on_one_network, tiny_teacher

TRAINED = ("student", "fake_score", "discriminator")
B = 2
T = torch.tensor([300, 1000])


def latents(name: str) -> torch.Tensor:
    return torch.randn(B, CHANNELS, 8, 8, generator=generator(name))


def own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def test_every_frozen_weight_is_in_memory_once_and_what_is_trained_belongs_to_one_network() -> None:
    networks = on_one_network()
    base = {id(p) for n, p in networks["teacher"].module.named_parameters() if ".lora_" not in n}
    for name in TRAINED:
        frozen = {id(p) for p in networks[name].module.parameters() if not p.requires_grad}
        assert frozen and frozen <= base, name
    trained = [id(p) for name in TRAINED for p in own(networks[name].module).values()]
    assert len(trained) == len(set(trained))
    assert all("lora_" in n or n.startswith("head.") for name in TRAINED for n in own(networks[name].module))


def gradients(networks: dict[str, Any], recomputed: bool) -> dict[str, torch.Tensor]:
    """Of one loss of all networks, each of which is called again before anything is differentiated."""
    for name in TRAINED if recomputed else ():
        networks[name].module.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
    for name in TRAINED:
        networks[name].module.train()
    c = tiny_conditioning("sdxl", B)
    x = networks["student"](latents("x"), T, c).x0
    learned = networks["fake_score"](x, T, c).eps
    with torch.no_grad():
        taught = networks["teacher"](latents("y"), T, c).x0
    real, fake = networks["discriminator"]([taught, x], T, c, (latents("x"), T))
    again = networks["student"](latents("z"), T, c).x0
    (x.square().mean() + learned.mean() + (fake - real).mean() + (again - taught).square().mean()).backward()
    return {f"{name}/{n}": p.grad for name in TRAINED for n, p in own(networks[name].module).items()}


@pytest.mark.parametrize("quantized", [None, "int8"])
def test_recomputed_gradients_are_those_of_networks_of_their_own(quantized: str | None) -> None:
    """With adapters that were switched on one module, the recomputation of one would meet those of another."""
    together = gradients(on_one_network(quantized), recomputed=True)
    apart = gradients(on_one_network(quantized, parted=True), recomputed=False)
    assert together.keys() == apart.keys() and all(g.any() for name, g in apart.items() if "lora_B" in name)
    for name, gradient in apart.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("of_another", [False, True])
def test_a_student_that_is_trained_whole_leaves_weights_alone_that_others_compute_with(of_another: bool) -> None:
    teacher = tiny_teacher({"network": tiny_unet("sdxl", **TWO_LEVELS).requires_grad_(False)})
    judge, untouched = LatentDiscriminator(rank=2).network(teacher), teacher.network
    networks = FullStudent(None).networks(teacher, keep_teacher=of_another)
    trained = {id(p) for p in own(networks["student"].module).values()}
    assert not trained & {id(p) for p in judge.module.parameters()}
    assert not trained & {id(p) for p in untouched.parameters()} and not own(untouched)


def test_a_copy_that_is_trained_whole_shares_nothing() -> None:
    teacher = tiny_teacher({"network": tiny_unet("sdxl", **TWO_LEVELS).requires_grad_(False)})
    for whole in (FakeScore(rank=None), LatentDiscriminator()):
        module = whole.network(teacher).module
        assert not {id(p) for p in module.parameters()} & {id(p) for p in teacher.network.parameters()}
    assert not teacher.lent


def test_modules_are_a_networks_own_and_its_tensors_are_not() -> None:
    first = tiny_unet("sd15")
    second = on_the_weights_of(first)
    first.eval(), second.train()
    assert not any(part.training for part in first.modules()) and all(part.training for part in second.modules())
    part_from(second, [first, second])
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(a is not b and torch.equal(a, b) and not b.requires_grad for a, b in pairs)


@pytest.mark.parametrize("network", [LatentDiscriminator, FakeScore])
def test_a_rank_out_of_range_is_named(network: Any) -> None:
    with pytest.raises(ValueError, match=r"networks\.\w+\.rank must be at least 1, or null"):
        network(rank=0)
    with pytest.raises(ValueError, match=r"networks\.\w+\.alpha must be above 0"):
        network(rank=1, alpha=0)
