from __future__ import annotations

import pytest
import torch

from distill.toy.world import (
    CAPTIONS,
    COLOURS,
    PATTERNS,
    balanced_labels,
    draw_scene,
    label_of,
    labels_of,
    paint,
    render,
    sample,
)


def test_same_seed_same_pictures_other_seed_others() -> None:
    images, captions, labels = sample(50, seed=3)
    again, captions_again, labels_again = sample(50, seed=3)
    assert torch.equal(images, again) and captions == captions_again and torch.equal(labels, labels_again)
    assert not torch.equal(images, sample(50, seed=4)[0])
    assert images.shape == (50, 3, 32, 32) and images.dtype == torch.float32
    assert -1 <= images.min() and images.max() <= 1


def test_sampling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    sample(10, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_labels_and_captions_name_each_other() -> None:
    assert len(set(CAPTIONS)) == len(CAPTIONS) == len(COLOURS) * len(PATTERNS)
    assert labels_of(CAPTIONS).tolist() == list(range(len(CAPTIONS)))
    _, captions, labels = sample(40, seed=0)
    assert [label_of(caption) for caption in captions] == labels.tolist()
    assert balanced_labels(1000).bincount().tolist() == [1000 // len(CAPTIONS)] * len(CAPTIONS)


@pytest.mark.parametrize("caption", ["pink stripes", "red", "", "Red stripes"])
def test_unknown_captions_are_refused_by_name(caption: str) -> None:
    with pytest.raises(ValueError, match="unknown toy caption"):
        label_of(caption)


@pytest.mark.parametrize("labels", [torch.tensor([len(CAPTIONS)]), torch.tensor([-1]), torch.zeros(2, 2).long()])
def test_labels_out_of_range_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="toy labels"):
        render(labels, torch.Generator())


@pytest.mark.parametrize("label", range(len(CAPTIONS)))
def test_pictures_hold_two_colours_the_caption_s_and_the_background_s(label: int) -> None:
    scene = draw_scene(torch.full((64,), label), torch.Generator().manual_seed(label))
    colours = (paint(scene).clamp(-1, 1) + 1) / 2
    to_foreground = (colours - scene.foreground[:, :, None, None]).abs().amax(1) < 0.01
    to_background = (colours - scene.background[:, :, None, None]).abs().amax(1) < 0.01
    assert (to_foreground | to_background).float().mean() > 0.6  # the rest is edges, one pixel wide
    assert to_foreground.float().mean() > 0.08 and to_background.float().mean() > 0.2
    named = torch.tensor(COLOURS[CAPTIONS[label].split()[0]])
    assert (scene.foreground - named).abs().max() < 0.031


def test_a_caption_has_many_modes() -> None:
    """The mean picture of a caption is nearly flat, though each picture is not: averaging modes must blur."""
    for label in range(len(CAPTIONS)):
        pictures = render(torch.full((400,), label), torch.Generator().manual_seed(0))
        centre = pictures[:, :, 8:-8, 8:-8]
        assert centre.mean(0).flatten(1).std(dim=1).max() < 0.2 * centre.flatten(2).std(dim=2).mean()
        brightest = pictures.amax(dim=(1, 2, 3))
        assert 0.35 < scene_dark_share(label) < 0.65 and brightest.min() > -0.5


def scene_dark_share(label: int) -> float:
    return draw_scene(torch.full((400,), label), torch.Generator().manual_seed(0)).dark.float().mean().item()


def test_discs_do_not_overlap_and_stay_inside() -> None:
    scene = draw_scene(labels_of(["red dots"] * 500), torch.Generator().manual_seed(1))
    radius = 0.42 * scene.period
    drawn = torch.arange(5) < scene.dot_count[:, None]
    assert scene.dot_count.min() >= 1 and scene.dot_count.float().mean() > 2.5
    distance = torch.cdist(scene.dots, scene.dots) + 1e3 * torch.eye(5)
    both = drawn[:, :, None] & drawn[:, None, :]
    assert (distance > 2 * radius[:, None, None])[both].all()
    inside = (scene.dots >= radius[:, None, None] - 1e-4) & (scene.dots <= 31 - radius[:, None, None] + 1e-4)
    assert inside.all()
