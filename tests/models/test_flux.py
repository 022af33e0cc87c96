"""FLUX.1 as a family: texts, calls, guidance, LoRAs and critics as diffusers' own pipeline has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors import safe_open
from torch import Tensor, nn

from distill.diffusion.guidance import guided
from distill.diffusion.prediction import Denoised
from distill.diffusion.solver import make_times, solve
from distill.models.denoiser import NetworkDenoiser
from distill.models.discriminator import Discriminator
from distill.models.families.flux import fused_state_dict, image_ids, pack, unpack
from distill.models.families.loading import load_teacher
from distill.models.families.registry import FAMILIES, published
from distill.models.families.teacher import Teacher
from distill.models.full_size import build_network
from distill.models.lora import add_lora, fill_lora, load_lora, lora_state_dict, only_adapter, save_lora, save_lora_file
from distill.models.schedulers import make_scheduler, sigmas_for
from tests.tiny import CHANNELS
from tests.tiny_flux import PIXELS, save_tiny_flux, tiny_flux, tiny_flux_conditioning

FLUX = FAMILIES["flux"]
PROMPTS = ["a cat", "a dog on a log that is longer than CLIP reads"]
SEEDS = [3, 4]
T = torch.tensor([10, 999])
W = 3.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny_flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return load_teacher(folder, parts=("network", "text", "vae")).at_resolution(PIXELS)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return plain(folder)


def plain(folder: Path) -> Any:
    pipeline = FluxPipeline.from_pretrained(folder)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, steps: int, w: float, pixels: int = PIXELS) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    named = {"height": pixels, "width": pixels, "num_inference_steps": steps, "guidance_scale": w}
    return pipeline(PROMPTS, generator=generators, output_type="pt", **named).images * 2 - 1


@torch.no_grad()
def ours(teacher: Teacher, denoiser: NetworkDenoiser, steps: int, w: float) -> Tensor:
    shape = teacher.latent_shape
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    follow = guided(denoiser, teacher.unconditional(), w)
    times = make_times("trailing", teacher.schedule.T, steps)
    *_, (_, x) = solve(follow, teacher.schedule, x, times, teacher.encode(PROMPTS), "ddim")
    return teacher.decode(x)


def states(batch: int = 2) -> Tensor:
    return torch.randn(batch, CHANNELS, 8, 6, generator=torch.Generator().manual_seed(7))


def distilled(network: Any, alpha: float = 2.0, which: str | None = None) -> Any:
    """The network with a LoRA of rank 3 that is not zero."""
    add_lora(network, 3, alpha, targets=FLUX.lora.chosen(network, which))
    random = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    return network


def called(network: Any, w: float | None = W, **changes: Tensor) -> Tensor:
    c = tiny_flux_conditioning(2, w=w) | changes
    with torch.no_grad():
        return FLUX.predict(network, states(), 1000 * torch.tensor([0.1, 0.9]), c, torch.float32)


# --- what a folder says ---


def test_the_shift_follows_the_tokens_of_the_picture_by_the_pipelines_own_rule(teacher: Teacher) -> None:
    for pixels, tokens, shift in ((64, 256, 1.6487), (128, 1024, 1.8776), (256, 4096, 3.1582)):
        sized = teacher.at_resolution(pixels)
        assert sized.image_tokens == tokens and sized.schedule.shift == pytest.approx(shift, abs=5e-5)
    assert len({teacher.at_resolution(p).schedule.fingerprint for p in (16, 32, 256)}) == 3
    assert (teacher.latent_shape, teacher.prediction.value) == ((CHANNELS, 8, 8), "flow_prediction")


def test_a_shift_only_labels_the_noise_levels(teacher: Teacher) -> None:
    """At one sigma, by whatever time, the network is called alike."""
    c, x = tiny_flux_conditioning(2), states()
    with torch.no_grad():
        found = [
            teacher.at_shift(shift).denoiser()(x, torch.tensor([t, t]), c).x0 for shift, t in ((1.0, 500), (3.0, 250))
        ]
    assert torch.equal(*found)


def test_a_network_without_an_input_of_guidance_is_given_none(tmp_path: Path) -> None:
    schnell = save_tiny_flux(tmp_path / "schnell", guidance_embeds=False)
    network = load_teacher(schnell, allow_distilled=True).network
    assert torch.equal(called(network), called(network, w=None))


# --- texts, packing, calls ---


def test_prompts_are_encoded_as_the_pipeline_encodes_them(teacher: Teacher, pipeline: Any) -> None:
    """Long ones are cut where it cuts them, by CLIP sooner than by T5."""
    found = teacher.encode(PROMPTS)
    with torch.no_grad():
        text, pooled, _ = pipeline.encode_prompt(PROMPTS)
    assert torch.equal(found["encoder_hidden_states"], text) and torch.equal(found["pooled_projections"], pooled)
    assert text.shape == (2, 512, 14) and teacher.text[0].cuts(PROMPTS) == PROMPTS[1:]


def test_states_are_packed_as_the_pipeline_packs_them() -> None:
    counting = torch.arange(2 * CHANNELS * 8 * 6, dtype=torch.float32).reshape(2, CHANNELS, 8, 6)
    packed = pack(counting)
    assert torch.equal(packed, FluxPipeline._pack_latents(counting, 2, CHANNELS, 8, 6))
    assert torch.equal(unpack(packed, (8, 6)), counting)
    assert packed[0, 0].tolist()[:4] == [0, 1, 6, 7], "a channel's four entries stand together"
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 3, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids((8, 6), torch.device("cpu")), ids)


@pytest.mark.parametrize(("steps", "w"), [(1, W), (2, 1.0), (4, W), (8, 6.0)])
def test_our_sampler_draws_the_plain_pipelines_pictures(teacher: Teacher, pipeline: Any, steps: int, w: float) -> None:
    """On its own scheduler, whose shift it computes from the picture's size; the same noise, text and guidance."""
    torch.testing.assert_close(
        ours(teacher, teacher.denoiser(), steps, w), theirs(pipeline, steps, w), atol=5e-6, rtol=0
    )


def test_an_export_is_pinned_to_the_noise_levels_that_were_learned(
    teacher: Teacher, folder: Path, pipeline: Any
) -> None:
    """The pinned scheduler ignores the shift that the pipeline computes, at another size too."""
    pinned = plain(folder)
    pinned.scheduler = make_scheduler(teacher.noise, "ddim", "trailing")
    assert pinned.scheduler.config["shift"] == teacher.schedule.shift
    for pixels in (PIXELS, 64):
        theirs(pinned, 4, W, pixels)
        expected = teacher.schedule.sigma(torch.tensor([1000, 750, 500, 250, 0]), torch.zeros(5)).flatten()
        torch.testing.assert_close(pinned.scheduler.sigmas, expected, atol=2e-7, rtol=0)
    theirs(pipeline, 4, W, 64)
    assert (pipeline.scheduler.sigmas - pinned.scheduler.sigmas).abs().max() > 5e-3, "unpinned it follows the size"
    assert sigmas_for(pinned.scheduler, "trailing", 4) == [1.0, 0.75, 0.5, 0.25], "what the pipeline hands over itself"


def test_latents_are_shifted_and_scaled(teacher: Teacher, pipeline: Any) -> None:
    x = states()
    with torch.no_grad():
        config = pipeline.vae.config
        expected = pipeline.vae.decode(x / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        posterior = pipeline.vae.encode(expected.clamp(-1, 1))[0]
        again = (posterior.mean - config.shift_factor) * config.scaling_factor
    assert config.shift_factor != 0
    torch.testing.assert_close(teacher.decode(x), expected.clamp(-1, 1))
    noise = torch.zeros(2, CHANNELS, 8, 6)
    torch.testing.assert_close(teacher.encode_pictures(expected.clamp(-1, 1), noise), again, atol=1e-6, rtol=0)


@pytest.mark.parametrize("key", ["encoder_hidden_states", "pooled_projections", "guidance"])
def test_every_input_counts(key: str) -> None:
    network = tiny_flux().requires_grad_(False)
    c = tiny_flux_conditioning(2)
    assert (called(network) - called(network, **{key: c[key] + 0.5})).abs().max() > 1e-3


# --- guidance ---


class Calls(nn.Module):
    """A network that notes what it is called with."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.config = network, network.config  # type: ignore[assignment]
        self.seen: list[Mapping[str, Any]] = []

    def forward(self, **named: Any) -> Any:
        self.seen.append(named)
        return self.network(**named)


@pytest.mark.parametrize("w", [1.0, 3.5, torch.tensor([1.0, 8.0])])
def test_guidance_reaches_the_network_in_one_pass_and_at_one_as_well(teacher: Teacher, w: Tensor | float) -> None:
    counting = Calls(tiny_flux().requires_grad_(False))
    denoiser = guided(teacher.denoiser_of(counting), teacher.unconditional(), w)
    found: Denoised = denoiser(states(), T, tiny_flux_conditioning(2, w=None))
    assert found.x0.shape == states().shape
    (call,) = counting.seen
    assert call["guidance"].dtype == torch.float32
    assert torch.equal(call["guidance"], torch.as_tensor(w, dtype=torch.float32).expand(2))
    assert call["timestep"].dtype == torch.float32 and len(call["hidden_states"]) == 2


def test_a_w_can_be_built_in(folder: Path) -> None:
    network = tiny_flux().requires_grad_(False)
    at_w, at_one = called(network), called(network, w=1.0)
    FLUX.guidance.build_in(network, W)
    assert not FLUX.guidance.taken(network.config)
    plain = FluxTransformer2DModel(**{**network.config, "guidance_embeds": False})
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(called(plain, w=None), at_w, atol=2e-5, rtol=0)
    assert (at_one - at_w).abs().max() > 1e-2
    with pytest.raises(ValueError, match="takes no guidance"):
        FLUX.guidance.build_in(network, W)
    with pytest.raises(
        ValueError, match="cannot be given guidance as an input: set student.guidance_embedding_dim=null"
    ):
        FLUX.guidance.add(network, 256)


# --- LoRAs ---


@pytest.fixture(scope="module")
def full_size() -> Any:
    """FLUX.1 [dev] without memory."""
    family, known = published("flux_dev")
    return build_network(family.network.kind, known.network, device="meta")


@pytest.mark.parametrize(
    ("which", "modules", "millions"), [("attention", 190, 74.7), ("blocks", 418, 261.5), ("all", 504, 347.0)]
)
def test_the_published_network_has_as_many_adapters_as_are_known(
    which: str, modules: int, millions: float, full_size: Any
) -> None:
    assert sum(p.numel() for p in full_size.parameters()) == 11_901_408_320
    ends = tuple(f".{target}" for target in FLUX.lora.chosen(full_size, which))
    adapted = [m for name, m in full_size.named_modules() if isinstance(m, nn.Linear) and f".{name}".endswith(ends)]
    assert len(adapted) == modules
    assert 64 * sum(m.in_features + m.out_features for m in adapted) / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_networks_own_end_is_not_adapted_with_the_blocks() -> None:
    names = FLUX.lora.chosen(tiny_flux())
    assert "proj_out" not in names and "single_transformer_blocks.0.proj_out" in names


def loaded(folder: Path, file: Path) -> Any:
    """A plain pipeline's network with a LoRA file."""
    pipeline = plain(folder)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipeline.transformer


@pytest.mark.parametrize("which", ["blocks", "all"])
@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_a_plain_pipeline_computes_with_a_lora_of_another_alpha_than_rank(
    format: str, which: str, teacher: Teacher, folder: Path, tmp_path: Path
) -> None:
    network = distilled(load_teacher(folder).network, which=which)
    file = tmp_path / f"{format}.safetensors"
    save_lora_file(file, network, format=format)
    other = loaded(folder, file)
    torch.testing.assert_close(called(other), called(network), atol=1e-5, rtol=0)
    assert (called(network) - called(teacher.network)).abs().max() > 1e-2
    assert torch.equal(called(other.eval()), called(other))
    with safe_open(file, "pt") as stored:
        assert ("lora_adapter_metadata" in stored.metadata()) == (format == "diffusers"), "alpha is said once"


def test_a_lora_is_taken_up_again_bit_for_bit_and_off_it_is_the_teacher(folder: Path, tmp_path: Path) -> None:
    network = load_teacher(folder).network
    before = called(network)
    distilled(network)
    with only_adapter(network, None):
        assert torch.equal(called(network), before)
    save_lora(tmp_path / "first", network)
    again = load_teacher(folder).network
    load_lora(again, tmp_path / "first")
    assert again.peft_config["default"].lora_alpha == 2.0
    first, second = lora_state_dict(network), lora_state_dict(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    fill_lora(again, tmp_path / "first")
    save_lora(tmp_path / "second", again)
    files = [safe_open(tmp_path / name / "pytorch_lora_weights.safetensors", "pt") for name in ("first", "second")]
    assert files[0].metadata() == files[1].metadata() and set(files[0].keys()) == set(files[1].keys())
    assert all(torch.equal(files[0].get_tensor(key), files[1].get_tensor(key)) for key in files[0].keys())


# --- kohya's files, in which layers are fused ---

WIDTH = 3072
"""Of FLUX.1, which diffusers' converter has written into it."""


def random_lora(shapes: Mapping[str, tuple[int, int]], rank: int = 2) -> dict[str, Tensor]:
    random, lora = torch.Generator().manual_seed(0), {}
    for module, (outputs, inputs) in shapes.items():
        lora[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=random)
        lora[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=random)
    return lora


def converted(weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """What diffusers makes of a kohya file, as products alpha / rank B A of a few rows, by modules."""
    config = published("flux_dev")[1].network
    theirs = _convert_kohya_flux_lora_to_diffusers(fused_state_dict(weights, alpha, config, torch.float32))
    assert all(key.startswith("transformer.") for key in theirs)
    return {key.removeprefix("transformer."): x for key, x in theirs.items()}


def assert_same(weights: Mapping[str, Tensor], found: Mapping[str, Tensor], alpha: float) -> None:
    for module in {name.rsplit(".", 2)[0] for name in weights}:
        A, B = (weights[f"{module}.lora_{f}.weight"] for f in "AB")
        theirs = found[f"{module}.lora_B.weight"][:64] @ found[f"{module}.lora_A.weight"]
        torch.testing.assert_close(theirs, alpha / len(A) * B[:64] @ A, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("which", ["blocks", "attention"])
def test_fused_layers_are_split_again_at_the_published_width(which: str) -> None:
    """One block of each kind; what is not adapted has zeros."""
    double = {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "attn.to_out.0": 1}
    single = {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1}
    shapes = {f"transformer_blocks.18.{m}": (WIDTH, WIDTH) for m in double}
    shapes |= {f"single_transformer_blocks.37.{m}": (WIDTH, WIDTH) for m in single}
    if which == "blocks":
        texts = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        shapes |= {f"transformer_blocks.18.attn.{m}": (WIDTH, WIDTH) for m in texts}
        for ff in ("ff", "ff_context"):
            shapes |= {f"transformer_blocks.18.{ff}.net.0.proj": (4 * WIDTH, WIDTH)}
            shapes |= {f"transformer_blocks.18.{ff}.net.2": (WIDTH, 4 * WIDTH)}
        shapes |= {"single_transformer_blocks.37.proj_mlp": (4 * WIDTH, WIDTH)}
        shapes |= {"single_transformer_blocks.37.proj_out": (WIDTH, 5 * WIDTH)}
    weights = random_lora(shapes)
    found = converted(weights, alpha=3.0)
    assert_same(weights, found, alpha=3.0)
    extra = {name.rsplit(".", 2)[0] for name in found} - set(shapes)
    assert extra == (set() if which == "blocks" else {"single_transformer_blocks.37.proj_mlp"})
    assert all(not found[f"{module}.lora_{f}.weight"].any() for module in extra for f in "AB")


def test_a_fused_file_has_the_names_and_alphas_of_the_original_layers(tmp_path: Path) -> None:
    network = distilled(tiny_flux(), alpha=2.0)
    save_lora_file(tmp_path / "k.safetensors", network, format="kohya")
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        keys = set(file.keys())
        double = [f"{s}_{n}" for s in ("img", "txt") for n in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2")]
        names = {f"lora_unet_double_blocks_1_{n}" for n in double}
        names |= {f"lora_unet_single_blocks_1_{n}" for n in ("linear1", "linear2")}
        assert {key.split(".")[0] for key in keys if "blocks_1_" in key} == names
        assert file.get_tensor("lora_unet_double_blocks_0_img_attn_qkv.alpha") == 3 * 2.0
        assert file.get_tensor("lora_unet_single_blocks_0_linear1.alpha") == 4 * 2.0
        assert file.get_tensor("lora_unet_single_blocks_0_linear2.alpha") == 2.0
        assert file.get_slice("lora_unet_single_blocks_0_linear1.lora_down.weight").get_shape() == [4 * 3, 24]
        assert file.get_slice("lora_unet_single_blocks_0_linear1.lora_up.weight").get_shape() == [7 * 24, 4 * 3]
        assert file.metadata()["ss_network_module"] == "networks.lora_flux"


def test_kohyas_files_have_no_names_for_a_networks_ends(tmp_path: Path) -> None:
    network = distilled(tiny_flux(), which="all")
    with pytest.raises(ValueError, match="kohya-ss' files have no name for .*: export formats="):
        save_lora_file(tmp_path / "k.safetensors", network, format="kohya")


# --- critics ---


@pytest.mark.parametrize(("layers", "kept"), [((2, 3), (2, 0)), ((1, 4), (1, 1))])
def test_a_critics_features_are_the_hidden_states_of_the_middle_block(
    layers: tuple[int, int], kept: tuple[int, int]
) -> None:
    network = tiny_flux(num_layers=layers[0], num_single_layers=layers[1]).requires_grad_(False)
    found: list[Tensor] = []
    block = network.single_transformer_blocks[0] if kept[1] else network.transformer_blocks[1]
    handle = block.register_forward_hook(lambda module, given, output: found.append(output[1]))
    called(network)
    handle.remove()
    encoder = FLUX.critic.encoder(network)
    assert (len(encoder.transformer_blocks), len(encoder.single_transformer_blocks)) == kept
    assert (len(network.transformer_blocks), len(network.single_transformer_blocks)) == layers
    c, told = tiny_flux_conditioning(2), 1000 * torch.tensor([0.1, 0.9])
    features = FLUX.critic.features(encoder, states(), told, c, torch.float32)
    assert features.shape == (2, *FLUX.critic.shape(network, (8, 6))) == (2, 24, 4, 3)
    assert torch.equal(features.flatten(2).transpose(1, 2), found[0])


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("layers", [(2, 3), (1, 4)])
def test_all_that_a_discriminator_trains_gets_a_gradient_and_all_that_it_reads_counts(
    layers: tuple[int, int], conditional: bool, rank: int | None, folder: Path
) -> None:
    network = tiny_flux(num_layers=layers[0], num_single_layers=layers[1]).requires_grad_(False)
    teacher = load_teacher(folder, parts=()).at_resolution(PIXELS)
    teacher.parts["network"] = network
    D = Discriminator.of(teacher, conditional, rank=rank, alpha=4.0)
    for name, parameter in D.module.named_parameters():
        if "lora_B" in name or name.startswith("head.logit"):  # which start at zero
            parameter.data.add_(0.1)
    x, c = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0)), tiny_flux_conditioning(2, w=1.0)
    origin = (x.flip(0), T) if conditional else None
    (logits,) = D([x], T, c, origin)
    logits.sum().backward()
    trained = {name: p for name, p in D.module.named_parameters() if p.requires_grad}
    assert trained and [name for name, p in trained.items() if p.grad is None] == []
    with torch.no_grad():
        for other in (c | {k: v + 1} for k, v in c.items()):
            assert not torch.equal(D([x], T, other, origin)[0], logits)
        if conditional:
            assert not torch.equal(D([x], T, c, (x, T))[0], logits)


def test_a_published_critic_has_the_first_half_of_the_blocks_and_a_head_that_is_not_too_wide(full_size: Any) -> None:
    encoder = FLUX.critic.encoder(full_size, on_its_weights=True)
    assert (len(encoder.transformer_blocks), len(encoder.single_transformer_blocks)) == (19, 9)
    assert sum(p.numel() for p in encoder.parameters()) / 1e9 == pytest.approx(7.8, abs=0.1)
    assert FLUX.critic.widest_head == 1024
