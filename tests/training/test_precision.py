"""What half precisions cost the teacher's answers, and in what stores are made."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from distill.commands import trajectories
from distill.config.loading import ConfigError, load
from distill.config.settings import TrainSettings
from distill.data.index import StorePlan
from distill.data.reader import open_store
from distill.diffusion.solver import make_times
from distill.models.families.loading import load_teacher
from distill.models.families.teacher import Teacher
from distill.toy.teacher import teacher_folder
from distill.toy.world import CAPTIONS
from distill.training.teacher import inference_dtype
from distill.training.trajectories import TrajectorySolver
from tests.tiny import save_tiny

HALVES = (torch.float16, torch.bfloat16)
PROMPTS = list(CAPTIONS)[:16]


@cache
def toy(dtype: torch.dtype = torch.float32) -> Teacher:
    return load_teacher(teacher_folder(), parts=("network", "text"), dtype=dtype)


def relative_rms(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@torch.no_grad()
def x0(dtype: torch.dtype, t: int) -> torch.Tensor:
    x = torch.randn(len(PROMPTS), *toy().latent_shape, generator=torch.Generator().manual_seed(0))
    return toy(dtype).denoiser()(x, torch.full((len(x),), t), toy(dtype).encode(PROMPTS)).x0


@pytest.mark.parametrize("t, float16, bfloat16", [(1000, 0.015, 0.06), (900, 0.01, 0.04), (500, 0.0025, 0.01)])
def test_float16_loses_an_eighth_of_what_bfloat16_does_of_x0(t: int, float16: float, bfloat16: float) -> None:
    """The noisier the time, the more of x0 = (x - sigma eps) / alpha is the rounding of eps."""
    exact = x0(torch.float32, t)
    lost = {dtype: relative_rms(x0(dtype, t), exact) for dtype in HALVES}
    assert lost[torch.float16] < float16
    assert lost[torch.bfloat16] > bfloat16  # more, or there would be no need for another default
    assert lost[torch.float16] < lost[torch.bfloat16] / 6


def test_solves_in_float16_end_near_those_in_float32() -> None:
    plan = StorePlan(
        teacher_id="toy",
        teacher_hash="0",
        schedule_fingerprint="0",
        solver="ddim",
        solver_steps=10,
        spacing="trailing",
        guidance=2.0,
        times=tuple(make_times("trailing", 1000, 10)),
        resolution=32,
        prompt_source="-",
        seed=3,
        samples=8,
        samples_per_shard=8,
        batch_size=8,
        dtype="float32",
    )
    ends = {d: TrajectorySolver(toy(d), plan, "cpu")(range(8), PROMPTS[:8]).states for d in (torch.float32, *HALVES)}
    lost = {dtype: relative_rms(ends[dtype][:, 1:], ends[torch.float32][:, 1:]) for dtype in HALVES}
    assert lost[torch.float16] < 0.01
    assert lost[torch.float16] < lost[torch.bfloat16] / 4


@pytest.mark.parametrize(
    "setting, device, expected",
    [
        ("auto", "cuda:3", torch.float16),
        ("auto", "cpu", torch.float32),
        ("float32", "cuda:0", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_a_store_is_made_in_what_loses_least_at_full_speed(setting: str, device: str, expected: torch.dtype) -> None:
    assert inference_dtype(setting, torch.device(device)) == expected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    return [
        f"model.pretrained_model_name_or_path={save_tiny(folder / 'teacher')}",
        'data.prompts="a cat"',
        "data.num_samples=2",
        "data.solver_steps=2",
    ]


def made(settings: list[str], store: Path, *overrides: str) -> str:
    """Writes a store, and says what its index has recorded."""
    trajectories.main(load("train", TrainSettings, [*settings, f"data.store={store}", *overrides]))
    return open_store(str(store)).index.teacher_dtype


def test_a_stores_index_says_what_the_teacher_computed_in(tiny: list[str], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        assert made(tiny, tmp_path / "auto") == "float32"
    assert made(tiny, tmp_path / "half", "data.teacher_dtype=float16") == "float16"
    assert made(tiny, tmp_path / "half", "data.teacher_dtype=float16", "data.num_samples=3") == "float16"
    with pytest.raises(ConfigError, match=r"teacher_dtype is 'float16' in the store .* data.teacher_dtype"):
        made(tiny, tmp_path / "half", "data.teacher_dtype=float32", "data.num_samples=4")
