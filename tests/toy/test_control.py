"""Following a control is told from pixels, and an untrained ControlNet leaves the teacher as it is."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from distill.diffusion.random import generator
from distill.diffusion.schedule import NoiseSchedule
from distill.models.schedulers import noise_of
from distill.toy.control import as_control, build_controlnet, controlled, follows
from distill.toy.teacher import encode_captions, teacher_folder, time_ids
from distill.toy.world import CAPTIONS, balanced_labels, coverage, draw_scene, paint

SCENE = draw_scene(balanced_labels(400), generator("control"))


def test_real_pictures_follow_their_own_coverage_and_no_other() -> None:
    images, masks = paint(SCENE), coverage(SCENE)
    assert follows(images, masks).min() > 0.9999
    assert follows(images, 1 - masks).max() < -0.9999
    others = follows(images, masks.roll(len(CAPTIONS), 0))  # of the same captions
    assert others.mean().abs() < 0.1 and others.max() < 0.95


def test_following_is_blind_to_colour_and_background_but_not_to_place() -> None:
    other = draw_scene((SCENE.labels + 4) % len(CAPTIONS), generator("control"))  # the next colour, the same draws
    assert (paint(SCENE) - paint(other)).abs().amax((1, 2, 3)).min() > 0.1
    assert torch.equal(coverage(SCENE), coverage(other))
    moved = follows(paint(SCENE).roll(3, -1), coverage(SCENE))
    assert moved.mean() < 0.7


def test_a_flat_picture_follows_nothing() -> None:
    flat = torch.tensor([0.9, -0.2, -0.8])[None, :, None, None].expand(400, 3, 32, 32)
    assert follows(flat, coverage(SCENE)).abs().max() == 0


def test_coverage_is_what_is_painted() -> None:
    dark = SCENE.dark[:, None, None, None]
    brightness = (paint(SCENE) + 1) / 2
    background = SCENE.background[:, :, None, None].expand_as(brightness)
    bare = (coverage(SCENE) == 0).expand_as(brightness)
    assert bare.float().mean() > 0.2 and dark.any() and not dark.all()
    assert torch.allclose(brightness[bare], background[bare], atol=1e-6)


def test_an_untrained_controlnet_is_no_control_and_a_gradient_reaches_it() -> None:
    before = torch.get_rng_state()
    pipeline = StableDiffusionXLPipeline.from_pretrained(teacher_folder())
    unet = pipeline.unet.requires_grad_(False)
    net = build_controlnet(unet, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    text, pooled = (part[:4].detach() for part in encode_captions(pipeline, list(CAPTIONS)))
    x = torch.randn(4, 4, 8, 8, generator=generator("x"))
    conditioning = {"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": time_ids(4)}
    schedule = NoiseSchedule.of(noise_of(pipeline.scheduler))
    t = torch.tensor([1, 300, 700, 1000])
    under = controlled(unet, net, as_control(coverage(SCENE)[:4]), schedule)

    def output() -> Tensor:
        return under(x, t, conditioning).eps

    first = output()
    added = {"text_embeds": pooled, "time_ids": time_ids(4)}
    assert torch.equal(first, unet(x, t - 1, text, added_cond_kwargs=added).sample)
    first.square().mean().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert (output() - first).abs().max() > 1e-3


def test_an_untrained_controlnet_tells_one_mask_from_another() -> None:
    net = build_controlnet(StableDiffusionXLPipeline.from_pretrained(teacher_folder()).unet, seed=3)
    shown = net.controlnet_cond_embedding(as_control(coverage(SCENE)[:50]))
    assert shown.shape[1:] == (32, 8, 8)
    assert shown.std(0).mean() > 0.05  # the masks' own is 0.5
