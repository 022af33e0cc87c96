"""The latent discriminator: a UNet's own features, one call for real and fake, and that it learns."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from distill.diffusion.adversarial import Adversary, Verdict
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule, add_noise
from distill.models.discriminator import (
    CriticNetwork,
    Discriminator,
    Head,
    LatentDiscriminator,
    MapNorm,
    groups_of,
    initialise,
)
from distill.models.fake_score import FakeScore
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.models.families.unet import UNetCritic
from distill.models.full_size import build_unet, unet_config
from distill.models.lora import add_lora
from distill.toy import world
from distill.toy.teacher import teacher_folder
from tests.test_experiments import full_size_batch
from tests.tiny import CHANNELS, save_tiny, tiny_conditioning, tiny_unet

SCHEDULE = NoiseSchedule.scaled_linear()
# SSD-1B's middle is one residual block
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("sd15", {}),
    "sdxl": ("sdxl", {}),
    "ssd1b": ("sdxl", {"mid_block_type": "UNetMidBlock2D"}),
}
B = 3
T = torch.tensor([10, 500, 1000])


def latents(seed: int = 0, size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.randn(B, CHANNELS, *size, generator=torch.Generator().manual_seed(seed))


def critic(family: str = "sd15", conditional: bool = False, seed: int = 0, **changes: Any) -> Discriminator:
    """With a last layer that is not zero, as after a step."""
    network = CriticNetwork(tiny_unet(family, **changes), (8, 8), conditional, seed)
    nn.init.normal_(network.head.logit.weight, generator=torch.Generator().manual_seed(1))
    return Discriminator(network)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_computes_in_float32_whatever_the_encoder_does(half: torch.dtype, autocast: bool) -> None:
    """All of a network's weights are halves under ZeRO; elsewhere it is autocast that multiplies in halves."""
    network = critic().module
    assert isinstance(network, CriticNetwork)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for module in network.head.modules():
        if isinstance(module, (nn.Conv2d, MapNorm)):
            module.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
    features = torch.randn(2, network.encoder.config["block_out_channels"][-1], 4, 4)
    exact = network.head(features)
    if not autocast:
        network = network.to(half)
        exact = copy.deepcopy(network.head).float()(features.to(half).float())
    with torch.autocast("cpu", half, enabled=autocast):
        found = network.head(features if autocast else features.to(half))
    assert set(seen) == {(torch.float32, torch.float32)} and found.dtype == torch.float32
    torch.testing.assert_close(found, exact)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.head.parameters())


# --- the encoder ---


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_features_are_the_unets_own_after_its_middle(shape: str) -> None:
    family, changes = SHAPES[shape]
    unet, c, seen = tiny_unet(family, **changes), tiny_conditioning(family, B), []
    added = {"added_cond_kwargs": {k: c[k] for k in ("text_embeds", "time_ids")}} if family == "sdxl" else {}
    hook = unet.mid_block.register_forward_hook(lambda _, __, output: seen.append(output))
    unet(latents(), T - 1, c["encoder_hidden_states"], **added)
    hook.remove()

    judge = Discriminator(CriticNetwork(unet, (8, 8)))
    judge.module.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    judge([latents()], T, c)
    assert torch.equal(*seen)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("conditional", [False, True])
def test_all_of_it_learns_and_the_unet_it_came_from_does_not(shape: str, conditional: bool) -> None:
    family, changes = SHAPES[shape]
    unet = tiny_unet(family, **changes).requires_grad_(False)
    network = CriticNetwork(unet, (8, 8), conditional)
    nn.init.ones_(network.head.logit.weight)
    origin = (latents(2), T) if conditional else None
    real, fake = Discriminator(network)([latents(), latents(1)], T, tiny_conditioning(family, B), origin)
    (real.sum() - 2 * fake.sum()).backward()
    untouched = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # of one key in self-attention over a 1 x 1 map, or of a bias before a norm, the gradient may be 0
    assert [name for name in untouched if "norm" not in name and not name.startswith("head.convs")] == []
    assert all(p.grad is None and not p.requires_grad for p in unet.parameters())
    own = {p.data_ptr() for p in unet.parameters()}
    assert not own & {p.data_ptr() for p in network.parameters()}


def test_the_decoder_is_not_copied() -> None:
    unet = tiny_unet()
    names = {name for name, _ in UNetCritic().encoder(unet).named_parameters()}
    left_out = ("up_blocks.", "conv_out.", "conv_norm_out.")
    assert names == {name for name, _ in unet.named_parameters() if not name.startswith(left_out)}
    assert len(unet.up_blocks) == 2 and isinstance(unet.conv_out, nn.Conv2d)  # the UNet is as it was


# --- one call ---


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@torch.no_grad()
def test_batches_in_one_call_are_judged_as_in_calls_of_their_own(family: str) -> None:
    c, samples = tiny_conditioning(family, B), [latents(0), latents(1), latents(2)]
    judge = critic(family)
    together = judge(samples, T, c)
    for x, logits in zip(samples, together, strict=True):
        assert logits.shape == (B,) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, judge([x], T, c)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@torch.no_grad()
def test_a_conditional_one_compares_with_where_the_samples_came_from() -> None:
    """Its features follow a sample's own, whose order matters."""
    judge, c, seen = critic("sdxl", conditional=True), tiny_conditioning("sdxl", B), []
    judge.module.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    real, fake = judge([latents(0), latents(1)], T, c, (latents(2), torch.full((B,), 1000)))
    (features,) = seen
    plain = Discriminator(CriticNetwork(tiny_unet("sdxl"), (8, 8)))
    plain.module.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain([latents(0), latents(1)], T, c)
    plain([latents(2)], torch.full((B,), 1000), c)
    torch.testing.assert_close(features, torch.cat([seen[1], torch.cat([seen[2]] * 2)], 1), rtol=1e-4, atol=1e-5)
    (alone,) = judge([latents(1)], T, c, (latents(2), torch.full((B,), 1000)))
    torch.testing.assert_close(fake, alone, rtol=1e-4, atol=1e-5)
    (other,) = judge([latents(1)], T, c, (latents(3), torch.full((B,), 1000)))
    assert not torch.allclose(alone, other, atol=1e-3)


@torch.no_grad()
def test_only_a_conditional_one_looks_at_where_the_samples_came_from() -> None:
    c = tiny_conditioning("sd15", B)
    with pytest.raises(ValueError, match="the discriminator is conditional: it needs the state that the samples were"):
        critic(conditional=True)([latents()], T, c)
    judge, calls = critic(), []
    judge.module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    assert torch.equal(judge([latents()], T, c, (latents(1), T))[0], judge([latents()], T, c)[0])
    assert calls == [B, B]


@torch.no_grad()
def test_it_reads_the_time_and_the_prompt() -> None:
    judge, c = critic("sdxl"), tiny_conditioning("sdxl", B)
    (logits,) = judge([latents()], T, c)
    for t, told in ((T - 9, c), (T, c | {"encoder_hidden_states": -c["encoder_hidden_states"]})):
        assert not torch.allclose(judge([latents()], t, told)[0], logits, atol=1e-4)


class Wrapper(nn.Module):
    """What an engine puts around a module; counts its calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        self.calls += 1
        return self.module(*args, **keywords)


@torch.no_grad()
def test_a_wrapped_network_is_called_once_for_all_and_answers_the_same() -> None:
    judge, c, origin = critic("sdxl", conditional=True), tiny_conditioning("sdxl", B), (latents(2), T)
    wrapper = Wrapper(judge.module)
    answers = replace(judge, module=wrapper)([latents(0), latents(1)], T, c, origin)
    assert wrapper.calls == 1
    assert all(torch.equal(a, b) for a, b in zip(answers, judge([latents(0), latents(1)], T, c, origin), strict=True))


@torch.no_grad()
def test_in_bfloat16_the_logits_are_float32() -> None:
    judge, c = critic("sdxl"), tiny_conditioning("sdxl", B)
    (logits,) = judge([latents()], T, c)
    nn.Module.to(judge.module, torch.bfloat16)
    (half,) = judge([latents()], T, c)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, logits, rtol=0.1, atol=0.1)


def test_recomputed_activations_change_nothing_but_the_work() -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        judge = critic("sdxl")
        judge.module.train()
        judge.module.encoder.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.append(None))
        if checkpointing:
            judge.module.enable_gradient_checkpointing()
        calls.clear()
        judge([latents()], T, tiny_conditioning("sdxl", B))[0].sum().backward()
        gradients.append([p.grad for p in judge.module.parameters()])
        assert len(calls) == (2 if checkpointing else 1)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- the head ---


def test_it_begins_without_an_opinion_and_from_its_seed_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (CriticNetwork(tiny_unet(), (8, 8), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        assert (Discriminator(first)([latents()], T, tiny_conditioning("sd15", B))[0] == 0).all()
    weights = [torch.cat([p.flatten() for p in n.head.convs.parameters()]) for n in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    (conv,) = first.head.convs
    assert conv.weight.std().item() == pytest.approx((3 * conv.weight[0].numel()) ** -0.5, rel=0.05)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (7, 16), (32, 32)])
@pytest.mark.parametrize("made_for", [1, 4, 32])
def test_a_head_takes_any_map_and_hears_all_of_it(size: tuple[int, int], made_for: int) -> None:
    head = Head(12, 12, Head.depth(made_for))
    initialise(head, 0)
    nn.init.ones_(head.logit.weight)
    x = torch.randn(2, 12, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = head(x)
    (logits * torch.tensor([1.0, 2.0])).sum().backward()
    assert logits.shape == (2,) and x.grad is not None
    assert (x.grad.abs().sum(1) > 0).all()
    assert all(p.grad is not None for p in head.parameters())  # or DDP would wait for it


def test_its_maps_end_near_2_by_2() -> None:
    for size, depth in {1: 1, 2: 1, 3: 1, 4: 1, 8: 2, 16: 3, 32: 4}.items():
        assert Head.depth(size) == depth


def test_a_single_value_is_not_normalised_away() -> None:
    """Of two values in a group GroupNorm leaves +1 and -1, whatever they were."""
    norm, x = MapNorm(4, 8), torch.randn(2, 8, 1, 1)
    assert torch.equal(norm(x), x)
    assert nn.GroupNorm(4, 8)(x).abs().sub(1).abs().max() < 0.1
    wide = torch.randn(2, 8, 3, 2)
    assert torch.equal(norm(wide), nn.GroupNorm(4, 8)(wide))


def test_groups_come_from_the_width() -> None:
    wanted = {3: 1, 8: 2, 24: 6, 64: 16, 320: 32, 1280: 32}
    assert {width: groups_of(width) for width in wanted} == wanted


# --- made of a teacher ---


def test_a_run_makes_it_of_its_teacher(tmp_path: Any) -> None:
    teacher = load_teacher(save_tiny(tmp_path, "sdxl"))
    plain, conditional = (LatentDiscriminator(flag).network(teacher, seed=3) for flag in (False, True))
    assert (plain.module.conditional, conditional.module.conditional) == (False, True)
    assert all(p.requires_grad for p in plain.module.parameters())
    assert not any(p.requires_grad for p in teacher.network.parameters())
    add_lora(teacher.network, rank=2, alpha=2)
    with pytest.raises(ValueError, match="before it is given a LoRA"):
        Discriminator.of(teacher)


# Encoder, head, head of a conditional one.
SIZES = {
    "sd15": (348_712_960, 52_437_761, 78_652_161),
    "sdxl": (1_243_367_040, 104_874_241, 131_088_641),
    "ssd1b": (444_318_080, 104_874_241, 131_088_641),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("conditional", [False, True])
def test_full_sizes(name: str, conditional: bool) -> None:
    unet = build_unet(unet_config(name), "meta")
    side = unet.config.sample_size
    network = CriticNetwork(unet, (side, side), conditional)
    encoder, *heads = SIZES[name]
    assert sum(p.numel() for p in network.encoder.parameters()) == encoder
    assert sum(p.numel() for p in network.head.parameters()) == heads[conditional]
    c = {k: v.to("meta") for k, v in full_size_batch(unet.config, states=1).conditioning.items()}
    x, t = torch.empty(1, 4, side, side, device="meta"), torch.ones(1, dtype=torch.int64, device="meta")
    real, fake = Discriminator(network)([x, x], t, c, (x, t) if conditional else None)
    assert real.shape == fake.shape == (1,)


@pytest.mark.slow
def test_a_full_size_discriminator_learns_from_a_real_and_a_fake() -> None:
    """SD 1.5's, float32, latents 32 x 32, conditional, with recomputed activations."""
    start = time.perf_counter()
    unet = build_unet(unet_config("sd15"))
    network = CriticNetwork(unet, (64, 64), conditional=True)
    c = full_size_batch(unet.config, states=1).conditioning
    del unet
    nn.init.normal_(network.head.logit.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    network.enable_gradient_checkpointing()
    real, fake, x = torch.randn(3, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    origin = (x, torch.tensor([1000]))
    verdict = Adversary(SCHEDULE).discriminator(
        Discriminator(network.train()), real, fake, c, Context(0, 0, (0,)), origin
    )
    verdict.loss.mean().backward()
    print(f"{time.perf_counter() - start:.0f} s")
    assert verdict.loss.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.encoder.conv_in.weight.grad.any()


# --- it learns ---


@pytest.fixture(scope="module")
def toy() -> Teacher:
    return load_teacher(teacher_folder(), parts=("network", "text", "vae"))


@pytest.mark.parametrize("conditional", [False, True])
def test_it_soon_tells_latents_of_pictures_from_a_frozen_blur_of_them(toy: Teacher, conditional: bool) -> None:
    """Fake is what the teacher makes in one step of almost nothing but noise: the mean of what may have been there.

    A discriminator that is dead and one at its best among equals both have a loss near 2 ln 2.
    """
    n, held_out, B = 320, 64, 48
    pictures, captions, _ = world.sample(n, seed=1)
    real = toy.encode_pictures(pictures, torch.randn(n, *toy.latent_shape, generator=torch.Generator().manual_seed(0)))
    c, t = toy.encode(captions), torch.full((n,), 900)
    with torch.no_grad():
        x_t = add_noise(toy.schedule, real, Context(0, 0, tuple(range(n))).normal(real, "noise"), t)
        fake = toy.denoiser()(x_t, t, c).x0
    judge, game = Discriminator.of(toy, conditional), Adversary(toy.schedule)
    optimizer = torch.optim.Adam(judge.module.parameters(), 3e-4, betas=(0.0, 0.99))

    def verdict(rows: Tensor, step: int) -> Verdict:
        told = {key: entry[rows] for key, entry in c.items()}
        origin = (x_t[rows], t[rows]) if conditional else None
        context = Context(0, step, tuple(rows.tolist()))
        return game.discriminator(judge, real[rows], fake[rows], told, context, origin)

    g = torch.Generator().manual_seed(0)
    for step in range(30):
        optimizer.zero_grad()
        verdict(torch.randint(n - held_out, (B,), generator=g), step).loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        unseen = [verdict(torch.arange(n - held_out, n), step) for step in range(100, 108)]
    shares = [float(sum(v.accuracies()[f"{name}_accuracy"] for v in unseen) / 8) for name in ("real", "fake")]
    loss = float(sum(v.loss.mean() for v in unseen) / 8)
    print(conditional, shares, loss)  # shown by -rP
    assert min(shares) > 0.6 and sum(shares) / 2 > 0.75 and loss < 1.25


# --- the score of the fakes ---


@pytest.mark.parametrize("rank", [None, 2])
@torch.no_grad()
def test_a_fake_score_starts_as_the_teacher_on_weights_of_its_own(tmp_path: Any, rank: int | None) -> None:
    teacher = load_teacher(save_tiny(tmp_path, "sdxl"))
    score = FakeScore(rank, alpha=2.0).network(teacher, seed=1)
    c = tiny_conditioning("sdxl", B)
    ours, theirs = (denoiser(latents(), T, c).eps for denoiser in (score, teacher.denoiser()))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    trained = {name for name, p in score.module.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in score.module.named_parameters() if rank is None or "lora" in name}
    assert not any(p.requires_grad for p in teacher.network.parameters())
    for p in score.module.parameters():
        p.add_(0.1)
    assert not torch.allclose(score(latents(), T, c).x0, teacher.denoiser()(latents(), T, c).x0, atol=1e-3)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": 0.0}])
def test_a_fake_score_refuses_what_is_no_lora(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"networks.fake_score.{next(iter(settings))} must be"):
        FakeScore(**settings)


# --- what is constant ---


def of_the_student(judge: Discriminator, fake: Tensor, trained: bool) -> tuple[list[Tensor], int]:
    """Logits and gradient of fakes against a conditional discriminator, and the FLOPs of both passes."""
    judge.module.requires_grad_(trained)
    fake = fake.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        (logits,) = judge([fake], T, tiny_conditioning("sdxl", B), (latents(7), T))
        logits.sum().backward()
    assert fake.grad is not None
    return [logits.detach(), fake.grad], counter.get_total_flops()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_state_that_samples_came_from_costs_a_student_no_pass_backwards(checkpointed: bool) -> None:
    """Frozen, the discriminator answers as it does in its own turn, and of the state makes features without a graph."""
    judge = critic("sdxl", conditional=True)
    if checkpointed:
        judge.module.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        judge.module.train()
    own, _ = of_the_student(judge, latents(1), trained=True)
    frozen, flops = of_the_student(judge, latents(1), trained=False)
    for a, b in zip(own, frozen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        judge([latents(1)], T, tiny_conditioning("sdxl", B), (latents(7), T))
    forward = counter.get_total_flops()  # of fakes and of the state
    # backwards once (and with checkpointing forwards once more) through the fakes' half, where it was through both
    assert 1.45 < flops / forward < (2.05 if checkpointed else 1.55)
