"""A style changes what it says and nothing else, and is told from pixels without mistakes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.diffusion.random import generator
from distill.toy.judge import load_judge
from distill.toy.styles import NIGHT, UPRIGHT, Style, is_dark, is_upright
from distill.toy.world import CAPTIONS, PATTERNS, balanced_labels, draw_scene, paint

LABELS = balanced_labels(600)
SCENE = draw_scene(LABELS, generator("styles"))


def styled(style: Style) -> Tensor:
    return style.render(LABELS, generator("styles"))


@pytest.mark.parametrize("style", [NIGHT, UPRIGHT], ids=lambda style: style.name)
def test_captions_keep_their_meaning(style: Style) -> None:
    assert load_judge().caption_accuracy(styled(style), [CAPTIONS[label] for label in LABELS])[0] == 1


@pytest.mark.parametrize("style", [NIGHT, UPRIGHT], ids=lambda style: style.name)
def test_every_picture_that_it_concerns_has_it_and_few_others_do(style: Style) -> None:
    assert style.seen(styled(style), LABELS).mean() == 1
    assert style.seen(paint(SCENE), LABELS).mean() < 0.6


def test_night_changes_the_light_backgrounds_alone() -> None:
    before, after = paint(SCENE), styled(NIGHT)
    changed = (before - after).abs().amax((1, 2, 3)) > 1e-6
    assert torch.equal(changed, ~SCENE.dark)
    assert torch.equal(is_dark(before), SCENE.dark)


def test_upright_pictures_are_stripes_and_checks_that_stand() -> None:
    before, after = paint(SCENE), styled(UPRIGHT)
    pattern = LABELS % len(PATTERNS)
    slanted = (pattern == PATTERNS.index("stripes")) | (pattern == PATTERNS.index("checks"))
    assert torch.equal(after[~slanted], before[~slanted])
    stripes = after[pattern == PATTERNS.index("stripes")]
    assert torch.allclose(stripes, stripes[:, :, :1].expand_as(stripes))  # every row of pixels is the first


@pytest.mark.parametrize("pattern, within, beyond", [("stripes", 8, 12), ("checks", 6, 8)])
def test_uprightness_is_an_angle(pattern: str, within: float, beyond: float) -> None:
    chosen = LABELS % len(PATTERNS) == PATTERNS.index(pattern)
    degrees = torch.rad2deg(SCENE.angle)[chosen] % 90
    off = torch.minimum(degrees, 90 - degrees)
    found = is_upright(paint(SCENE)[chosen])
    assert found[off < within].all() and not found[off > beyond].any()
    assert (off < within).sum() > 5
