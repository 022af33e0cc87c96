"""FLUX.2 klein and Z-Image: everything that they do in their own way, against diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline, compute_empirical_mu
from torch import Tensor, nn

from distill.diffusion.guidance import guided
from distill.diffusion.random import starting_noise
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import make_times
from distill.methods.sampling import sample
from distill.models.denoiser import NetworkDenoiser
from distill.models.discriminator import CriticNetwork, Discriminator
from distill.models.families.flux2 import USUAL_STEPS, empirical_mu, pack, unpack
from distill.models.families.loading import load_teacher, open_pipeline
from distill.models.families.registry import FAMILIES, published
from distill.models.families.teacher import Teacher
from distill.models.folder import stored_tensors
from distill.models.full_size import build_network
from distill.models.lora import ADAPTER, adapters, add_lora, fill_lora, load_lora, lora_config, save_lora_file
from distill.models.lora import LORA_FILE as FILE
from distill.models.schedulers import make_scheduler
from tests.tiny_qwen import SIDE, save, tiny_klein, tiny_z_image

MAKE = {"flux2": tiny_klein, "z_image": tiny_z_image}
PROMPTS, SEEDS = ["a cat", "two dogs and " + "a very long list of animals " * 20], [3, 10_000_000]
T = 1000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: save(make(), tmp_path_factory.mktemp(name)) for name, make in MAKE.items()}


@pytest.fixture(scope="module", params=list(MAKE))
def teacher(request: pytest.FixtureRequest, folders: dict[str, str]) -> Teacher:
    return load_teacher(folders[request.param], parts=("network", "text", "vae")).at_resolution(SIDE)


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, str]) -> dict[str, Any]:
    """Plain diffusers' own, from the folders."""
    found = {name: diffusers.DiffusionPipeline.from_pretrained(folder) for name, folder in folders.items()}
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
    return found


def inputs(teacher: Teacher, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(x_t, t, conditioning) for two pictures."""
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([200, T]), teacher.encode(PROMPTS)


def pictures(teacher: Teacher, denoiser: Any, steps: int) -> Tensor:
    """[B, 3, H, W] in [0, 1], by our own sampler."""
    x = starting_noise([torch.Generator().manual_seed(seed) for seed in SEEDS], teacher.latent_shape)
    times = make_times("trailing", T, steps)
    return (teacher.decode(sample(denoiser, teacher.schedule, x, times, teacher.encode(PROMPTS), "ddim")) + 1) / 2


def plain(pipeline: Any, guidance_scale: float, steps: int) -> Tensor:
    return pipeline(
        prompt=list(PROMPTS),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        height=SIDE,
        width=SIDE,
        output_type="pt",
    ).images


# --- the call ---


@pytest.mark.parametrize("w", [1.0, 5.0])
def test_pictures_are_those_of_the_plain_pipeline(teacher: Teacher, pipelines: dict[str, Any], w: float) -> None:
    """In 1, 2, 4 and 8 steps the largest difference of a pixel was 1.5e-5 for klein, 4e-6 for Z-Image."""
    pipeline = pipelines[teacher.family.name]
    pipeline.scheduler = make_scheduler(teacher.noise, "ddim", "trailing")
    denoiser = guided(teacher.denoiser(), teacher.unconditional(), w)
    for steps in (1, 4):
        found = plain(pipeline, teacher.family.guidance.to_pipeline(w), steps)
        assert found.std() > 0.1
        torch.testing.assert_close(pictures(teacher, denoiser, steps), found, rtol=0, atol=5e-5)


def test_guidance_of_z_image_is_printed_as_one_less() -> None:
    assert FAMILIES["z_image"].guidance.to_pipeline(1.0) == 0 and FAMILIES["flux2"].guidance.to_pipeline(1.0) == 1


def test_z_image_is_told_1_minus_sigma_and_answers_the_opposite_velocity(folders: dict[str, str]) -> None:
    teacher = load_teacher(folders["z_image"], parts=("network", "text")).at_resolution(SIDE)
    seen: dict[str, Any] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["args"], seen["output"] = args, output[0]

    handle = teacher.network.register_forward_hook(look, with_kwargs=True)
    x, t, c = inputs(teacher)
    out = teacher.family.predict(teacher.network, x, teacher.schedule.told(t), c, torch.float32)
    handle.remove()
    states, told, prompts = seen["args"]
    torch.testing.assert_close(told, 1 - teacher.schedule.sigma(t, x).flatten())
    assert [one.shape for one in states] == [(5, 1, 12, 12)] * 2
    assert [len(one) for one in prompts] == c["text_mask"].sum(1).tolist() and len(prompts[0]) < len(prompts[1]) == 512
    assert torch.equal(out, -torch.stack(seen["output"]).squeeze(2))


def test_padding_of_a_prompt_is_not_read_by_z_image(folders: dict[str, str]) -> None:
    teacher = load_teacher(folders["z_image"], parts=("network", "text")).at_resolution(SIDE)
    x, t, c = inputs(teacher)
    told = teacher.schedule.told(t)
    other = c | {"encoder_hidden_states": c["encoder_hidden_states"] + ~c["text_mask"][..., None] * 7.0}
    found = [teacher.family.predict(teacher.network, x, told, one, torch.float32) for one in (c, other)]
    assert torch.equal(*found)


def test_a_network_without_values_reads_whole_prompts(teacher: Teacher) -> None:
    """On the meta device, where plans count what a step takes."""
    x, t, c = inputs(teacher)
    network: Any = build_network(teacher.family.network.kind, dict(teacher.network.config), device="meta")
    meta = {key: entry.to("meta") for key, entry in c.items()}
    told = teacher.schedule.told(t).to("meta")
    assert teacher.family.predict(network, x.to("meta"), told, meta, torch.float32).shape == x.shape


def test_conditioning_that_is_not_known_or_missing_is_refused(teacher: Teacher) -> None:
    x, t, c = inputs(teacher)
    told = teacher.schedule.told(t)
    with pytest.raises(ValueError, match="conditioning 'time_ids' is not known; allowed: encoder_hidden_states"):
        teacher.family.predict(teacher.network, x, told, c | {"time_ids": t}, torch.float32)
    with pytest.raises(ValueError, match="the conditioning lacks 'encoder_hidden_states'"):
        teacher.family.predict(teacher.network, x, told, {}, torch.float32)
    with_w = teacher.family.predict(teacher.network, x, told, c | {"guidance": torch.ones(2)}, torch.float32)
    assert torch.equal(with_w, teacher.family.predict(teacher.network, x, told, c, torch.float32))


def test_text_time_and_each_sample_have_their_own_effect(teacher: Teacher) -> None:
    x, t, c = inputs(teacher)
    denoiser = teacher.denoiser()
    both = denoiser(x, t, c).x0
    alone = denoiser(x[1:], t[1:], {key: entry[1:] for key, entry in c.items()}).x0
    torch.testing.assert_close(alone, both[1:], rtol=0, atol=2e-5)
    swapped = denoiser(x, t, {key: entry.flip(0) for key, entry in c.items()}).x0
    later = denoiser(x, t.flip(0), c).x0
    assert (swapped - both).abs().max() > 1e-4 and (later - both).abs().max() > 1e-3


# --- the schedule ---


def test_klein_has_the_shift_of_its_pipeline_at_its_usual_steps(folders: dict[str, str]) -> None:
    for tokens in (256, 1024, 4096, 4300, 8100):
        assert empirical_mu(tokens, USUAL_STEPS) == pytest.approx(compute_empirical_mu(tokens, USUAL_STEPS), rel=1e-12)
    teacher = load_teacher(folders["flux2"], parts=()).at_resolution(4 * 64)
    assert teacher.image_tokens == 4096 and teacher.schedule.shift == pytest.approx(7.56, abs=0.01)
    smaller = teacher.at_resolution(SIDE)
    assert smaller.schedule.shift == pytest.approx(4.946, abs=1e-3)
    assert smaller.schedule.fingerprint != teacher.schedule.fingerprint


def test_the_pinned_scheduler_of_klein_leaves_its_pipelines_mu_aside(folders: dict[str, str]) -> None:
    teacher = load_teacher(folders["flux2"], parts=()).at_resolution(SIDE)
    scheduler = make_scheduler(teacher.noise, "ddim", "trailing")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=compute_empirical_mu(36, 4))
    wanted = [float(teacher.schedule.sigma(t, torch.zeros(()))) for t in (1000, 750, 500, 250, 0)]
    assert scheduler.sigmas.tolist() == pytest.approx(wanted, abs=1e-6)


def test_z_image_has_the_shift_of_its_scheduler(folders: dict[str, str]) -> None:
    teacher = load_teacher(folders["z_image"], parts=())
    assert teacher.schedule.shift == teacher.at_resolution(SIDE).schedule.shift == 3.0
    assert teacher.schedule.fingerprint == NoiseSchedule.linear(3.0).fingerprint


# --- prompts ---


def test_prompts_are_encoded_as_the_pipeline_encodes_them(teacher: Teacher, pipelines: dict[str, Any]) -> None:
    """From a folder that was saved and opened again by either side; the second prompt is cut where it cuts."""
    assert teacher.text[0].cuts(PROMPTS) == [PROMPTS[1]]
    found = teacher.encode(PROMPTS)
    wanted, *_ = pipelines[teacher.family.name].encode_prompt(list(PROMPTS))
    if teacher.family.name == "flux2":
        assert torch.equal(found["encoder_hidden_states"], wanted)
        return
    for states, mask, own in zip(found["encoder_hidden_states"], found["text_mask"], wanted, strict=True):
        assert torch.equal(states[mask], own) and not states[~mask].any()


def test_the_template_decides_what_is_read(teacher: Teacher) -> None:
    written = teacher.text[0].written(["a cat"])[0]
    thinks = teacher.family.name == "z_image"
    assert written.startswith("<|im_start|>user\na cat<|im_end|>") and ("<think>" in written) != thinks


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for m in messages %}"])
def test_a_template_runs_no_code_and_a_broken_one_is_a_line(tmp_path: Path, template: str) -> None:
    pipeline = tiny_z_image()
    pipeline.tokenizer.chat_template = template
    teacher = load_teacher(save(pipeline, tmp_path), parts=("text",))
    with pytest.raises(ValueError, match="chat_template cannot be opened .*(Security|TemplateSyntax)Error") as caught:
        teacher.encode(["a cat"])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_z_image()
    pipeline.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        load_teacher(save(pipeline, tmp_path), parts=("text",))


# --- latents ---


def test_packing_is_that_of_the_pipeline() -> None:
    """FLUX.1 orders a token's numbers alike; what differs is that its starting noise is made before it is packed."""
    z = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    assert torch.equal(pack(z), Flux2KleinPipeline._patchify_latents(z)) and torch.equal(unpack(pack(z)), z)
    tokens = pack(z).flatten(2).transpose(1, 2)
    assert torch.equal(tokens, Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(z)))
    assert torch.equal(tokens, FluxPipeline._pack_latents(z, 2, 3, 4, 6))


def test_starting_noise_is_the_pipelines_for_a_seed(teacher: Teacher, pipelines: dict[str, Any]) -> None:
    own = starting_noise([torch.Generator().manual_seed(5)], teacher.latent_shape)
    arguments = {"height": SIDE, "width": SIDE, "dtype": torch.float32, "device": "cpu"}
    generator = torch.Generator().manual_seed(5)
    if teacher.family.name == "flux2":
        packed, _ = pipelines["flux2"].prepare_latents(1, 3, **arguments, generator=generator)
        assert torch.equal(own.flatten(2).transpose(1, 2), packed)
    else:
        found = pipelines["z_image"].prepare_latents(1, 5, **arguments, generator=generator)
        assert torch.equal(own, found)


def test_latents_are_normalised_both_ways(teacher: Teacher, pipelines: dict[str, Any]) -> None:
    """With a posterior without spread, encoding is the pipeline's own, and decoding undoes its normalisation."""
    family, vae = teacher.family, teacher.vae
    picture = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.zeros(1, *teacher.latent_shape)
    states = family.latents.encode(vae, picture, noise)
    mean = vae.encode(picture).latent_dist.mean
    if family.name == "flux2":
        torch.testing.assert_close(states, pipelines["flux2"]._encode_vae_image(picture, torch.Generator()))
    else:
        torch.testing.assert_close(states, (mean - 0.1) * 0.4)
    torch.testing.assert_close(family.latents.decode(vae, states), vae.decode(mean).sample, rtol=0, atol=2e-5)
    spread = family.latents.encode(vae, picture, noise + 1) - states
    assert spread.shape == states.shape and (spread > 0).all()


# --- which networks ---


# --- LoRA files, with alpha unlike the rank ---


@pytest.fixture
def student(teacher: Teacher) -> Iterator[tuple[Teacher, NetworkDenoiser]]:
    """A LoRA student of the tiny teacher, far from it."""
    own = load_teacher(_saved(teacher), parts=("network", "text", "vae")).at_resolution(SIDE)
    add_lora(own.network, 4, 2.5, family=own.family)
    random = torch.Generator().manual_seed(1)
    for parameter in adapters(own.network).values():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=random))
    yield own, own.denoiser_of(own.network, adapter=ADAPTER)


def _saved(teacher: Teacher) -> Path:
    return teacher.weight_files[0].parents[1]


def test_every_format_of_a_lora_loads_as_what_was_trained(
    student: tuple[Teacher, NetworkDenoiser], tmp_path: Path
) -> None:
    """`diffusers` to the bit of a merge, alpha from the header; `comfyui` and `kohya` with alpha in the tensors."""
    own, denoiser = student
    x, t, c = inputs(own)
    told = own.schedule.told(t)
    wanted = own.family.predict(own.network, x, told, c, torch.float32)
    without = load_teacher(_saved(own), parts=("network",))
    assert (own.family.predict(without.network, x, told, c, torch.float32) - wanted).abs().max() > 0.05
    for format in set(own.family.lora.formats) - {"peft"}:
        file = tmp_path / format / FILE
        save_lora_file(file, own.network, format=format, family=own.family)
        pipeline, _ = open_pipeline(str(_saved(own)))
        modules = {name for name, _ in pipeline.transformer.named_modules()}
        seen = own.family.lora.seen(pipeline, str(file.parent), weight_name=FILE, use_safetensors=True)
        assert len(seen) == len(adapters(own.network)) and {key.rsplit(".", 2)[0] for key in seen} <= modules
        pipeline.load_lora_weights(str(file.parent), weight_name=FILE)
        found = own.family.predict(pipeline.transformer, x, told, c, torch.float32)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0 if format == "diffusers" else 2e-5)


def test_a_lora_that_is_read_again_is_the_same_to_the_bit(
    student: tuple[Teacher, NetworkDenoiser], tmp_path: Path
) -> None:
    own, _ = student
    before = {name: p.detach().clone() for name, p in adapters(own.network).items()}
    save_lora_file(tmp_path / FILE, own.network, family=own.family)
    again = load_teacher(_saved(own), parts=("network",))
    load_lora(again.network, tmp_path, family=own.family)
    assert lora_config(again.network).lora_alpha == 2.5
    assert all(torch.equal(before[name], p) for name, p in adapters(again.network).items())
    fill_lora(own.network, tmp_path, family=own.family)
    save_lora_file(tmp_path / "twice" / FILE, own.network, family=own.family)
    first, second = ({name: x for name, x in stored_tensors([path / FILE])} for path in (tmp_path, tmp_path / "twice"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_lora_that_is_off_leaves_the_teacher_to_the_bit(student: tuple[Teacher, NetworkDenoiser]) -> None:
    own, _ = student
    x, t, c = inputs(own)
    teacher = load_teacher(_saved(own), parts=("network",)).at_resolution(SIDE)
    assert torch.equal(own.denoiser()(x, t, c).x0, teacher.denoiser()(x, t, c).x0)


def test_names_that_load_nothing_are_not_offered() -> None:
    assert FAMILIES["flux2"].lora.formats == ("diffusers", "peft", "comfyui")
    assert set(FAMILIES["z_image"].lora.formats) == {"diffusers", "peft", "comfyui", "kohya"}


# --- critics ---


def test_critic_features_are_the_hidden_state_of_the_middle_block(teacher: Teacher) -> None:
    x, t, c = inputs(teacher)
    network, critic = teacher.network, teacher.family.critic
    klein = teacher.family.name == "flux2"
    middle = network.single_transformer_blocks[0] if klein else network.layers[1]
    seen: list[Tensor] = []
    handle = middle.register_forward_hook(lambda module, args, output: seen.append(output))
    told = teacher.schedule.told(t)
    teacher.family.predict(network, x, told, c, torch.float32)
    handle.remove()
    width, h, w = critic.shape(network, teacher.latent_shape[1:])
    tokens = seen[0][:, 512:] if klein else seen[0][:, : h * w]  # klein's text stands before the image
    for encoder in (critic.encoder(network), critic.encoder(network, on_its_weights=True)):
        found = critic.features(encoder, x, told, c, torch.float32)
        assert found.shape == (2, width, h, w)
        assert torch.equal(found.flatten(2).transpose(1, 2), tokens)


def test_every_trained_weight_of_a_critic_has_a_gradient_and_text_and_origin_count(teacher: Teacher) -> None:
    x, t, c = inputs(teacher)
    critic = CriticNetwork(teacher.network, teacher.latent_shape[1:], conditional=True, family=teacher.family)
    with torch.no_grad():
        critic.head.logit.weight.normal_(generator=torch.Generator().manual_seed(0))
    discriminator = Discriminator(critic, teacher.schedule)
    logits = discriminator([x], t, c, (x + 1, t))[0]
    logits.sum().backward()
    assert [name for name, p in critic.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(p.requires_grad for p in teacher.network.parameters())
    with torch.no_grad():
        other_text = discriminator([x], t, {key: entry.flip(0) for key, entry in c.items()}, (x + 1, t))[0]
        other_origin = discriminator([x], t, c, (x - 1, t))[0]
    assert (other_text - logits).abs().max() > 1e-4 and (other_origin - logits).abs().max() > 1e-4


def test_a_critic_on_the_teachers_weights_trains_a_lora(teacher: Teacher) -> None:
    x, t, c = inputs(teacher)
    critic = CriticNetwork(teacher.network, teacher.latent_shape[1:], rank=2, family=teacher.family)
    with torch.no_grad():
        critic.head.logit.weight.fill_(0.1)
    Discriminator(critic, teacher.schedule)([x], t, c)[0].sum().backward()
    assert [name for name, p in critic.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {id(p) for p in teacher.network.parameters()} & {id(p) for p in critic.parameters()}


def test_a_head_is_at_most_1024_wide() -> None:
    for name in ("flux2_klein", "z_image"):
        family, known = published(name)
        config = known.network
        network = build_network(family.network.kind, config, device="meta")
        critic = CriticNetwork(network, (64, 64), family=family)
        assert critic.head.convs[0].weight.shape[0] == 1024 < critic.head.convs[0].weight.shape[1]


def test_blocks_are_recomputed_without_a_difference(teacher: Teacher) -> None:
    x, t, c = inputs(teacher)
    gradients = []
    for recompute in (False, True):
        network: Any = load_teacher(_saved(teacher), parts=("network",)).network
        trained = add_lora(network, 2, 2, family=teacher.family)
        if recompute:
            network.enable_gradient_checkpointing()
        teacher.family.predict(network, x, teacher.schedule.told(t), c, torch.float32).square().mean().backward()
        gradients.append([p.grad for p in trained])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
