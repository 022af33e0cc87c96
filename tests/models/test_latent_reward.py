"""The way from a score to latents: through the decoder, in slices, with activations held or computed again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.models.latent_reward import LatentReward
from tests.tiny import save_tiny

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


class Taste(nn.Module):
    """Likes what a random convolution sees in a picture, times the length of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.eye = nn.Conv2d(3, 4, 3)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append(images.detach())
        return self.eye(images).square().mean((1, 2, 3)) * torch.tensor([len(p) for p in prompts])


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_teacher(save_tiny(tmp_path_factory.mktemp("teacher"), request.param), parts=("vae",))


def latents(teacher: Teacher) -> Tensor:
    return 0.5 * torch.randn(5, *teacher.latent_shape, generator=torch.Generator().manual_seed(2))


def test_scores_are_the_rewards_of_the_decoded_pictures(teacher: Teacher) -> None:
    taste = Taste()
    (found,) = LatentReward(teacher, taste, slice_size=2)(latents(teacher), PROMPTS)
    pictures = (teacher.decode(latents(teacher)) + 1) / 2
    torch.testing.assert_close(found, taste(pictures, PROMPTS))
    assert [len(images) for images in taste.seen[:3]] == [2, 2, 1]
    assert min(float(images.min()) for images in taste.seen) >= 0 and max(float(x.max()) for x in taste.seen) <= 1


def test_pictures_are_decoded_once_for_all_lists(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = LatentReward(teacher, Taste())
    alone = [reward(latents(teacher), words)[0] for words in (PROMPTS, PROMPTS[::-1])]
    decoded, pictures = [], teacher.pictures

    def counted(z: Tensor) -> Tensor:
        decoded.append(len(z))
        return pictures(z)

    monkeypatch.setattr(teacher, "pictures", counted)
    both = reward(latents(teacher), PROMPTS, PROMPTS[::-1])
    assert len(both) == 2 and all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    assert decoded == [1] * 5


def gradient(teacher: Teacher, **settings: object) -> tuple[Tensor, int]:
    """Of the sum of the scores, and the bytes that the forward pass held for it."""
    z, held = latents(teacher).requires_grad_(), 0

    def pack(x: Tensor) -> Tensor:
        nonlocal held
        held += x.nbytes
        return x

    reward = LatentReward(teacher, Taste(), **settings)  # type: ignore[arg-type]
    with saved_tensors_hooks(pack, lambda x: x):
        scores = reward(z, PROMPTS)[0]
    scores.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())
    assert z.grad is not None
    return z.grad, held


def test_gradients_do_not_depend_on_slices_and_checkpoints_but_memory_does(teacher: Teacher) -> None:
    whole, most = gradient(teacher, slice_size=5, checkpoint=False)
    assert (whole.flatten(1).abs().amax(1) > 0).all()
    for size in (1, 2, 5):
        for checkpoint in (True, False):
            found, held = gradient(teacher, slice_size=size, checkpoint=checkpoint)
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)
            assert held < most / 50 if checkpoint else held > most / 2


def test_the_gradient_is_that_of_the_score(teacher: Teacher) -> None:
    """Against a difference quotient along it."""
    found, _ = gradient(teacher)
    reward, step = LatentReward(teacher, Taste()), 1e-2 * found / found.norm()
    with torch.no_grad():
        rise = reward(latents(teacher) + step, PROMPTS)[0].sum() - reward(latents(teacher) - step, PROMPTS)[0].sum()
    assert float(rise / 2) == pytest.approx(float((found * step).sum()), rel=0.05)


def test_a_teacher_without_an_autoencoder_is_refused(tmp_path: Path) -> None:
    teacher = load_teacher(save_tiny(tmp_path), parts=())
    with pytest.raises(ValueError, match="without its 'vae'"):
        LatentReward(teacher, Taste())


def test_an_empty_slice_is_refused(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LatentReward(teacher, Taste(), slice_size=0)
