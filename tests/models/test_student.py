"""Students that start from earlier ones and learn from them: two adapters on one network are two networks."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.diffusion.prediction import Denoised, Prediction
from distill.models.denoiser import NetworkDenoiser
from distill.models.exported import FACTS, Exported, open_export
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.models.families.unet import UNetGuidance
from distill.models.formats import save_network
from distill.models.lora import TEACHING, adapters, add_lora, lora_layers, merge_lora, save_lora
from distill.models.student import FullStudent, LoRAStudent
from tests.tiny import CHANNELS, FAMILIES, save_tiny, tiny_conditioning, tiny_unet

RANK, ALPHA = 3, 1.5
T = torch.tensor([7, 400, 1000])


def noisy(seed: int = 0) -> Tensor:
    return torch.randn(len(T), CHANNELS, 4, 4, generator=torch.Generator().manual_seed(seed))


def answer(denoiser: NetworkDenoiser, family: str) -> Denoised:
    w = {"guidance": torch.full((len(T),), 3.0)}
    return denoiser(noisy(), T, tiny_conditioning(family, len(T)) | w)


def raw(denoiser: NetworkDenoiser, family: str) -> Tensor:
    """What the network says of noise, whatever that is read as. [B, C, h, w]"""
    denoised = answer(denoiser, family)
    return denoised.x0 if denoiser.prediction is Prediction.SAMPLE else denoised.eps


def with_lora(family: str, seed: int, rank: int = RANK, alpha: float = ALPHA) -> UNet2DConditionModel:
    """The family's tiny network with adapters that are far from zero."""
    unet, random = tiny_unet(family), torch.Generator().manual_seed(seed)
    for p in add_lora(unet, rank, alpha):
        nn.init.normal_(p, std=0.3, generator=random)
    return unet


def plain(family: str, seed: int = 0) -> UNet2DConditionModel:
    return tiny_unet(family, seed).requires_grad_(False)  # torch rounds otherwise where weights are trainable


def merged(family: str, seed: int) -> UNet2DConditionModel:
    unet = with_lora(family, seed)
    merge_lora(unet)
    return unet.requires_grad_(False)


def alone(unet: UNet2DConditionModel, teacher: Teacher) -> NetworkDenoiser:
    return NetworkDenoiser(unet, teacher.schedule, Prediction.EPSILON)


def export(folder: Path, **facts: Any) -> Exported:
    """`folder` as an export, read back."""
    (folder / FACTS).write_text(json.dumps({"base_hash": "0123456789abcdef"} | facts))
    return open_export(folder)


def lora_export(folder: Path, family: str, seed: int, rank: int = RANK, alpha: float = ALPHA) -> Exported:
    save_lora(folder, with_lora(family, seed, rank, alpha), formats=["diffusers"])
    return export(folder, formats=["diffusers"], prediction="epsilon")


def unet_export(folder: Path, unet: UNet2DConditionModel, prediction: str) -> Exported:
    save_network(folder, unet, torch.float32)
    return export(folder, formats=["unet"], prediction=prediction)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: save_tiny(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def teacher(family: str, folders: dict[str, str]) -> Iterator[Teacher]:
    yield load_teacher(folders[family])


# ---- a LoRA ---------------------------------------------------------------------------------------------------------


def test_two_adapters_on_one_network_are_three_networks(family: str, teacher: Teacher, tmp_path: Path) -> None:
    base = raw(alone(plain(family), teacher), family)
    student = LoRAStudent(RANK, ALPHA)
    start, taught_by = (lora_export(tmp_path / f"{seed}", family, seed) for seed in (1, 2))
    networks = student.networks(teacher, start=start, taught_by=taught_by)
    original = teacher.denoiser()
    assert networks["student"].module is networks["teacher"].module is original.module
    expected = {name: raw(alone(merged(family, seed), teacher), family) for name, seed in (("1", 1), ("2", 2))}
    assert (expected["1"] - expected["2"]).abs().max() > 0.1
    for _ in range(2):  # whoever spoke before
        with torch.no_grad():
            torch.testing.assert_close(raw(networks["student"], family), expected["1"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(raw(networks["teacher"], family), expected["2"], rtol=1e-4, atol=1e-4)
            assert torch.equal(raw(original, family), base)


def test_only_the_students_adapter_is_trained_whoever_is_asked(family: str, teacher: Teacher, tmp_path: Path) -> None:
    taught_by = lora_export(tmp_path, family, 2, rank=2 * RANK)  # of another rank: it is another's
    networks = LoRAStudent(RANK, ALPHA).networks(teacher, taught_by=taught_by)
    trained = {name for name, p in teacher.network.named_parameters() if p.requires_grad}
    assert trained == adapters(teacher.network).keys() and trained
    assert len(adapters(teacher.network, TEACHING)) == len(trained)
    resting = [(layer._disable_adapters, layer.active_adapters) for layer in lora_layers(teacher.network)]
    assert set(map(str, resting)) == {"(False, ['default'])"}

    with torch.no_grad():
        target = answer(networks["teacher"], family).x0
    loss = (answer(networks["student"], family).x0 - target).square().mean()
    with torch.no_grad():
        answer(networks["teacher"], family)  # between forward and backward
    loss.backward()
    assert {name for name, p in teacher.network.named_parameters() if p.grad is not None} == trained
    assert {name for name, p in teacher.network.named_parameters() if p.requires_grad} == trained
    assert [(layer._disable_adapters, layer.active_adapters) for layer in lora_layers(teacher.network)] == resting


def test_an_error_in_a_call_leaves_the_network_at_rest(family: str, teacher: Teacher, tmp_path: Path) -> None:
    networks = LoRAStudent(RANK, ALPHA).networks(teacher, taught_by=lora_export(tmp_path, family, 2))
    with torch.no_grad():
        before = raw(networks["student"], family)
        with pytest.raises(RuntimeError):
            networks["teacher"](noisy()[..., :1, :1].expand(-1, 3, -1, -1), T, tiny_conditioning(family, len(T)))
        assert torch.equal(raw(networks["student"], family), before)


def test_gradients_are_the_same_where_activations_are_computed_twice(
    family: str, teacher: Teacher, folders: dict[str, str], tmp_path: Path
) -> None:
    """The second computation lies in the backward pass, after the teacher has spoken on the same network."""
    start, taught_by = (lora_export(tmp_path / f"{seed}", family, seed) for seed in (1, 2))

    def gradients(teacher: Teacher, twice: bool) -> list[Tensor]:
        networks = LoRAStudent(RANK, ALPHA).networks(teacher, start=start, taught_by=taught_by)
        teacher.network.train()
        if twice:
            teacher.network.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
        drawn = answer(networks["student"], family).x0
        with torch.no_grad():
            target = answer(networks["teacher"], family).x0
        (drawn - target).square().mean().backward()
        return [p.grad for p in adapters(teacher.network).values() if p.grad is not None]

    once, twice = gradients(load_teacher(folders[family]), False), gradients(teacher, True)
    assert len(once) == len(twice) == len(adapters(teacher.network))
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_lora_is_taught_by_a_whole_network(teacher: Teacher, family: str, tmp_path: Path) -> None:
    other = plain(family, 7)
    taught_by = unet_export(tmp_path, other, "sample")
    networks = LoRAStudent(RANK, ALPHA).networks(teacher, taught_by=taught_by)
    assert networks["teacher"].prediction is Prediction.SAMPLE and networks["student"].prediction is Prediction.EPSILON
    with torch.no_grad():
        assert torch.equal(answer(networks["teacher"], family).x0, raw(alone(other, teacher), family))
    assert not any(p.requires_grad for p in networks["teacher"].module.parameters())


def test_without_earlier_students_it_is_its_own_teacher(teacher: Teacher, family: str) -> None:
    base = raw(alone(plain(family), teacher), family)
    networks = LoRAStudent(RANK, ALPHA).networks(teacher)
    with torch.no_grad():
        assert torch.equal(raw(networks["teacher"], family), base)
        torch.testing.assert_close(raw(networks["student"], family), base)  # B is zero


def test_an_adapter_that_is_not_there_is_no_teacher(teacher: Teacher, family: str) -> None:
    LoRAStudent(RANK, ALPHA).networks(teacher)
    nobody = NetworkDenoiser(teacher.network, teacher.schedule, teacher.prediction, adapter=TEACHING)
    with pytest.raises(ValueError, match="^the network has no adapter 'teacher'$"):
        answer(nobody, family)


# ---- a whole network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [None, 6])
def test_a_network_that_starts_from_a_lora_starts_merged(
    dim: int | None, teacher: Teacher, family: str, tmp_path: Path
) -> None:
    networks = FullStudent(dim).networks(teacher, start=lora_export(tmp_path, family, 1))
    assert networks["student"].module is teacher.network and not lora_layers(teacher.network)
    assert all(p.requires_grad for p in teacher.network.parameters())
    expected = merged(family, 1).state_dict()
    own = teacher.network.state_dict()
    assert own.keys() - expected.keys() == ({"time_embedding.cond_proj.weight"} if dim else set())
    for name, weight in expected.items():
        torch.testing.assert_close(own[name], weight, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        untouched = raw(alone(plain(family), teacher), family)
        assert torch.equal(raw(networks["teacher"], family), untouched)


@pytest.mark.parametrize("teaches", ["lora", "unet"])
def test_a_network_is_taught_by_an_earlier_student(teaches: str, teacher: Teacher, family: str, tmp_path: Path) -> None:
    is_lora = teaches == "lora"
    other = merged(family, 2) if is_lora else plain(family, 7)
    taught_by = lora_export(tmp_path, family, 2) if is_lora else unet_export(tmp_path, other, "epsilon")
    networks = FullStudent(None).networks(teacher, taught_by=taught_by)
    with torch.no_grad():
        torch.testing.assert_close(
            raw(networks["teacher"], family), raw(alone(other, teacher), family), rtol=1e-5, atol=1e-5
        )
        base = raw(alone(plain(family), teacher), family)
        torch.testing.assert_close(raw(networks["student"], family), base)
    weights = {id(p) for p in networks["student"].module.parameters()}
    assert not any(id(p) in weights or p.requires_grad for p in networks["teacher"].module.parameters())


def test_what_the_output_is_read_as_changes_with_the_weights_as_they_were(
    teacher: Teacher, family: str, tmp_path: Path
) -> None:
    other = plain(family, 7)
    start = unet_export(tmp_path, other, "epsilon")
    student = FullStudent(None, "sample").networks(teacher, start=start)["student"]
    with torch.no_grad():
        denoised, output = answer(student, family), raw(alone(other, teacher), family)
    torch.testing.assert_close(denoised.x0, output)
    alpha, sigma = teacher.schedule.alpha(T, output), teacher.schedule.sigma(T, output)
    torch.testing.assert_close(alpha * denoised.x0 + sigma * denoised.eps, noisy(), rtol=1e-4, atol=1e-4)


def test_a_start_says_what_its_output_is_read_as(teacher: Teacher, family: str, tmp_path: Path) -> None:
    start = unet_export(tmp_path, tiny_unet(family, seed=7), "sample")
    assert FullStudent(None).networks(teacher, start=start)["student"].prediction is Prediction.SAMPLE
    assert FullStudent(None).settle(start) == {"prediction": "sample"}  # then it can be built without the start
    assert FullStudent(None, "epsilon").settle(start) == {}


def test_a_start_that_is_told_guidance_stays_so_or_is_refused(teacher: Teacher, family: str, tmp_path: Path) -> None:
    told = tiny_unet(family, seed=7)
    UNetGuidance().add(told, 6)
    told.time_embedding.cond_proj.weight.data.fill_(0.1)
    start = unet_export(tmp_path, told, "epsilon")
    with pytest.raises(ValueError, match=r"its time_embedding.cond_proj.weight .* is not in this student \(student.g"):
        FullStudent(None).networks(teacher, keep_teacher=False, start=start)
    student = FullStudent(6).networks(teacher, keep_teacher=False, start=start)["student"]
    with torch.no_grad():
        torch.testing.assert_close(raw(student, family), raw(alone(told, teacher), family))


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "alpha", "words"), [(4, ALPHA, "a LoRA of rank 3, this run has lora_rank=4"), (RANK, 8, "alpha 1.5, .*=8")]
)
def test_a_lora_of_another_size_is_no_start(rank: int, alpha: float, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        LoRAStudent(rank, alpha).settle(lora_export(tmp_path, "sd15", 1))


def test_a_whole_network_is_no_start_of_a_lora(tmp_path: Path) -> None:
    start = unet_export(tmp_path, tiny_unet(), "epsilon")
    with pytest.raises(ValueError, match="holds no LoRA for diffusers, and a LoRA cannot start from anything else$"):
        LoRAStudent().settle(start)


def test_a_network_of_another_shape_is_no_start(folders: dict[str, str], tmp_path: Path) -> None:
    start = unet_export(tmp_path, tiny_unet(cross_attention_dim=21), "epsilon")
    with pytest.raises(ValueError, match=r"does not fit: its down_blocks.* \[16, 21\] is \[16, 20\]$"):
        FullStudent(None).networks(load_teacher(folders["sd15"]), start=start)


def test_a_folder_that_is_no_export_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not an export: it has no distill.json"):
        open_export(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds kohya: a run takes up a LoRA for diffusers or a whole network"):
        export(tmp_path, formats=["kohya"])
    with pytest.raises(ValueError, match="no LoRA in .*: pytorch_lora_weights.safetensors is missing"):
        export(tmp_path, formats=["diffusers"])
    for facts, reason in (({"formats": None}, "TypeError"), ({"formats": ["unet"], "prediction": "x1"}, "ValueError")):
        with pytest.raises(ValueError, match=f"distill.json is not readable .{reason}"):
            export(tmp_path, **facts)


def test_an_export_of_another_model_is_refused(tmp_path: Path) -> None:
    found = lora_export(tmp_path, "sd15", 1)
    found.require_base("0123456789abcdef")
    with pytest.raises(ValueError, match="an export of another model: its base_hash is 0123456789abcdef, .* is fedc$"):
        found.require_base("fedc")


def test_the_hash_is_of_the_bytes_that_are_there(tmp_path: Path) -> None:
    hashes = [lora_export(tmp_path, "sd15", seed).weights_hash for seed in (1, 2, 1)]
    assert hashes[0] == hashes[2] != hashes[1]
