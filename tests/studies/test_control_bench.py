"""The exported LoRA in other plain diffusers pipelines: from a picture, under a ControlNet, from embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from torch import Tensor

from distill.diffusion.random import starting_noise
from distill.diffusion.schedule import add_noise
from distill.diffusion.solver import lcm_times
from distill.evaluation.pipelines import load_pipeline, use_adapters, use_sampler
from distill.methods.sampling import sample
from distill.models.families.teacher import Teacher
from distill.models.lora import ADAPTER, save_lora
from distill.studies.control_bench import nominal_steps, start_time
from distill.toy.control import controlled
from tests.evaluation.test_proof import PROMPTS, SEEDS, trained_student
from tests.tiny import FAMILIES, TOKENS, UNETS, save_tiny

FROM_PICTURE = {"sd15": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline}
UNDER_CONTROL = {"sd15": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}
EMBEDDING_WIDTHS = {"sd15": (4, 8, 12), "sdxl": (4, 8)}  # one strided layer less than there are: 4 and 2 times smaller
PIXELS = 24


@dataclass(frozen=True)
class Student:
    """The same student twice: ours, and a plain pipeline that has loaded its exported LoRA."""

    family: str
    folder: str
    teacher: Teacher
    pipeline: Any


@pytest.fixture(scope="module", params=FAMILIES)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp(request.param)
    path = save_tiny(folder / "teacher", request.param)
    teacher = trained_student(path)
    save_lora(folder / "lora", teacher.network)
    pipeline = load_pipeline(path, folder / "lora")
    use_sampler(pipeline, "lcm", "lcm")
    return Student(request.param, path, teacher, pipeline)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def drawn(pipeline: Any, steps: int = 3, **more: Any) -> Tensor:
    """Pictures in [-1, 1]; without embeddings, of PROMPTS."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = {} if "prompt_embeds" in more else {"prompt": PROMPTS}
    made = pipeline(
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=generators(),
        output_type="pt",
        **prompts,
        **more,
    )
    return made.images * 2 - 1


def pictures(seed: int) -> Tensor:
    """[2, 3, 24, 24] in [0, 1]."""
    return torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def ours(teacher: Teacher, x: Tensor, times: list[int], conditioning: Mapping[str, Tensor], g: Any) -> Tensor:
    network = replace(teacher.denoiser(), adapter=ADAPTER)
    return teacher.decode(sample(network, teacher.schedule, x, times, conditioning, "lcm", g))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# ------------------------------------------------------------------------------------------------------- from a picture


@pytest.mark.parametrize(
    ("asked", "strength", "times"),
    [
        (4, 0.5, [500, 260, 0]),
        (4, 0.6, [500, 260, 0]),  # int(4 * 0.6) is still 2: strength is coarse at few steps
        (4, 0.75, [760, 500, 260, 0]),
        (7, 0.6, [580, 440, 300, 160, 0]),
        (2, 0.5, [500, 0]),
        (3, 1.0, [1000, 680, 340, 0]),
    ],
)
def test_a_picture_is_noised_to_a_distilled_time_and_re_noised_from_there(
    student: Student, asked: int, strength: float, times: list[int]
) -> None:
    """LCMScheduler takes the last int(asked * strength) of the times that it takes from noise."""
    source, teacher = pictures(0), student.teacher
    got = drawn(FROM_PICTURE[student.family].from_pipe(student.pipeline), asked, image=source, strength=strength)

    g = generators()
    posterior_noise, noise = (starting_noise(g, tuple(teacher.latent_shape)) for _ in range(2))
    clean = teacher.encode_pictures(source * 2 - 1, posterior_noise)
    x = add_noise(teacher.schedule, clean, noise, times[0])
    expected = ours(teacher, x, times, teacher.encode(PROMPTS), g)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_what_is_kept_of_a_picture_falls_with_strength(student: Student) -> None:
    """Two sources, one noise: what is drawn from them differs less, the more noise there is."""
    pipeline = FROM_PICTURE[student.family].from_pipe(student.pipeline)
    differences = []
    for strength in (0.25, 0.5, 1.0):
        one, other = (drawn(pipeline, 4, image=pictures(seed), strength=strength) for seed in (1, 2))
        differences.append(float((one - other).square().mean()))
    assert differences[0] > differences[1] > differences[2] > 0


@pytest.mark.parametrize(("sampler", "spacing"), [("lcm", "lcm"), ("ddim", "trailing"), ("ddim", "leading")])
@pytest.mark.parametrize(("steps", "strength"), [(1, 0.6), (2, 0.6), (4, 0.6), (3, 0.3), (5, 1.0)])
def test_a_pipeline_starts_where_we_say_it_does(
    student: Student, sampler: str, spacing: str, steps: int, strength: float
) -> None:
    pipeline = FROM_PICTURE[student.family].from_pipe(student.pipeline)
    use_sampler(pipeline, sampler, spacing)
    asked = nominal_steps(steps, strength)
    pipeline.scheduler.set_timesteps(asked)
    taken = pipeline.get_timesteps(asked, strength, "cpu")[0]
    assert len(taken) == steps
    assert start_time(spacing, 1000, steps, strength) == int(taken[0]) + 1


@pytest.mark.parametrize("strength", [0.1, 0.29, 0.3, 0.6, 0.7, 0.999, 1.0])
def test_the_fewest_steps_are_asked_for_that_give_the_wanted(strength: float) -> None:
    for steps in range(1, 60):
        asked = nominal_steps(steps, strength)
        assert int(asked * strength) == steps and (asked == 1 or int((asked - 1) * strength) < steps)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.1])
def test_a_strength_at_which_no_steps_are_taken_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=rf"^strength must be in \(0, 1\], got {strength:g}$"):
        nominal_steps(2, strength)


# ------------------------------------------------------------------------------------------------------ under a control


def under_controlnet(student: Student, trained: bool) -> Any:
    """The student's pipeline with a ControlNet of its teacher's network; `trained` fills the layers of zeros."""
    plain = load_pipeline(student.folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        widths = EMBEDDING_WIDTHS[student.family]
        net = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=widths)
        zeros = [net.controlnet_cond_embedding.conv_out, net.controlnet_mid_block, *net.controlnet_down_blocks]
        for parameter in (parameter for layer in zeros for parameter in layer.parameters()):
            assert parameter.abs().max() == 0
            torch.nn.init.normal_(parameter, std=0.3 if trained else 0.0)
        if trained:  # a random embedding hardly tells one picture from another
            net.controlnet_cond_embedding.conv_out.weight.data *= 30
    return UNDER_CONTROL[student.family].from_pipe(student.pipeline, controlnet=net)


def test_an_untrained_controlnet_changes_nothing(student: Student) -> None:
    pipeline = under_controlnet(student, trained=False)
    assert apart(drawn(pipeline, image=pictures(0)), drawn(student.pipeline)) < 1e-5


def test_a_trained_controlnet_acts_beside_the_lora_as_much_as_it_is_told(student: Student) -> None:
    alone = drawn(student.pipeline)
    pipeline = under_controlnet(student, trained=True)
    weak, whole = (drawn(pipeline, image=pictures(0), controlnet_conditioning_scale=c) for c in (0.01, 1.0))
    assert apart(drawn(pipeline, image=pictures(0), controlnet_conditioning_scale=0.0), alone) < 1e-5
    assert 0 < apart(weak, alone) < apart(whole, alone) and apart(whole, alone) > 0.05
    assert apart(drawn(pipeline, image=pictures(1)), whole) > 0.01  # the control's picture matters
    use_adapters(pipeline, {})
    bare = drawn(pipeline, image=pictures(0))
    use_adapters(pipeline, {"student": 1.0})
    assert apart(bare, whole) > 0.01  # and so does the LoRA under it
    assert apart(drawn(pipeline, image=pictures(0)), whole) == 0


def test_under_a_control_it_draws_what_our_sampler_draws_with_the_controlled_network(student: Student) -> None:
    """The network as the toy's ControlNet is trained with it: the pipeline shows it the control unscaled."""
    teacher, pipeline = student.teacher, under_controlnet(student, trained=True)
    got = drawn(pipeline, image=pictures(0))
    denoiser = controlled(pipeline.unet, pipeline.controlnet, pictures(0), teacher.schedule)
    g = generators()
    x = starting_noise(g, tuple(teacher.latent_shape))
    latents = sample(denoiser, teacher.schedule, x, lcm_times(1000, 3), teacher.encode(PROMPTS), "lcm", g)
    torch.testing.assert_close(got, teacher.decode(latents), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ from embeddings


def embeddings(conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pipeline's arguments for the text of a conditioning."""
    names = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
    return {names[key]: value for key, value in conditioning.items() if key in names}


def test_embeddings_draw_what_their_prompts_draw(student: Student) -> None:
    text = embeddings(student.teacher.encode(PROMPTS))
    assert apart(drawn(student.pipeline, **text), drawn(student.pipeline)) < 1e-5


@pytest.mark.parametrize("tokens", [TOKENS - 4, TOKENS + 6])
def test_another_encoder_s_embeddings_are_followed(student: Student, tokens: int) -> None:
    """Of another number of tokens, from no text encoder of the pipeline: drawn as our sampler draws from them."""
    teacher, pipeline = student.teacher, student.pipeline
    random = torch.Generator().manual_seed(tokens)
    text = torch.randn(2, tokens, UNETS[student.family]["cross_attention_dim"], generator=random)
    conditioning = dict(teacher.encode(PROMPTS)) | {"encoder_hidden_states": text}
    if student.family == "sdxl":
        conditioning["text_embeds"] = torch.randn(conditioning["text_embeds"].shape, generator=random)
    got = drawn(pipeline, **embeddings(conditioning))
    g = generators()
    expected = ours(teacher, starting_noise(g, tuple(teacher.latent_shape)), lcm_times(1000, 3), conditioning, g)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert apart(drawn(pipeline, **embeddings(conditioning | {"encoder_hidden_states": -text})), got) > 0.01
