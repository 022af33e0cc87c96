"""The toy's reward: it knows captions, it is not the judge, and pictures can please it."""

from __future__ import annotations

import pytest
import torch

from distill.models.families.loading import load_teacher
from distill.models.latent_reward import LatentReward
from distill.toy.judge import frechet_distance, load_judge
from distill.toy.reward import ToyReward, load_reward, reward_file
from distill.toy.teacher import teacher_folder
from distill.toy.world import CAPTIONS, render, sample


@pytest.fixture(scope="module")
def reward() -> ToyReward:
    return load_reward()


def test_real_pictures_please_it_with_their_own_caption_only(reward: ToyReward) -> None:
    images, captions, labels = sample(1000, seed=31)
    wrong = [CAPTIONS[(label + 7) % len(CAPTIONS)] for label in labels.tolist()]
    own, other = reward((images + 1) / 2, captions), reward((images + 1) / 2, wrong)
    assert (own > 0).double().mean() > 0.995 and (other < 0).double().mean() > 0.995
    assert 10 < own.mean() < 40  # MLCM's target of 16 is of its scale


def test_it_is_the_log_odds_of_its_own_logits(reward: ToyReward) -> None:
    images, captions, labels = sample(5, seed=32)
    images = 0.7 * images  # duller, so that no probability is 1 in float64
    p = reward.logits((images + 1) / 2).double().softmax(1)[range(5), labels]
    torch.testing.assert_close(reward((images + 1) / 2, captions).double(), (p / (1 - p)).log(), rtol=1e-3, atol=1e-3)


def test_its_gradient_goes_through_the_teachers_decoder(reward: ToyReward) -> None:
    """A climb in latent space raises the score, and no weight has a gradient."""
    teacher = load_teacher(teacher_folder(), parts=("vae",))
    images, captions, _ = sample(4, seed=33)
    z = teacher.encode_pictures(images, torch.zeros(4, *teacher.latent_shape)).requires_grad_()
    latent = LatentReward(teacher, reward, slice_size=2)
    (before,) = latent(z, captions)
    before.sum().backward()
    assert z.grad is not None and all(p.grad is None for p in latent.parameters())
    step = z.grad / z.grad.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        (after,) = latent(z + 0.3 * step, captions)
    assert (after > before).all()


def test_it_can_be_pleased_with_what_the_judge_does_not_take_for_real(reward: ToyReward) -> None:
    """Else there would be no over-optimisation to see: a climb among pixels outdoes real pictures, and looks it."""
    judge, random, labels = load_judge(), torch.Generator().manual_seed(34), torch.arange(20).repeat(15)
    real, other, captions = render(labels, random), render(labels, random), [CAPTIONS[label] for label in labels]
    images = real.clone()
    for _ in range(25):
        images.requires_grad_()
        (slope,) = torch.autograd.grad(reward((images + 1) / 2, captions).sum(), images)
        images = (images + 0.02 * slope.sign()).detach().clamp(-1, 1)
    assert reward((images + 1) / 2, captions).mean() > 2 * reward((real + 1) / 2, captions).mean()
    climbed, floor = (frechet_distance(judge.features(x), judge.features(other)) for x in (images, real))
    assert climbed > 2 * floor


def test_it_is_small_frozen_and_knows_only_the_worlds_captions(reward: ToyReward) -> None:
    assert reward_file().stat().st_size < 300_000
    assert not any(p.requires_grad for p in reward.parameters())
    with pytest.raises(ValueError, match="unknown toy caption 'a cat'"):
        reward(torch.zeros(1, 3, 32, 32), ["a cat"])
