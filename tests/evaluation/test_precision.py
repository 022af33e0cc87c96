"""In which precision students and teachers are sampled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.evaluation import pipelines
from distill.evaluation.pipelines import generate_images, images_at_once
from distill.evaluation.students import load_student
from distill.models.families.loading import load_teacher
from distill.models.lora import add_lora, save_lora
from tests.tiny import save_tiny, tiny_pipeline

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")


class Products(TorchDispatchMode):
    """Counts products of matrices, and convolutions, by the dtype of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS or "attention" in func.overloadpacket.__name__:
            first = answer[0] if isinstance(answer, tuple) else answer
            self.found[first.dtype] += 1
        return answer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lora_multiplies_in_the_dtype_of_the_network_that_it_is_put_onto(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", "sdxl")
    trained = load_teacher(folder).network
    random = torch.Generator().manual_seed(1)
    for parameter in add_lora(trained, rank=3, alpha=3.0):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=random))
    save_lora(tmp_path / "lora", trained)

    answers, counts = {}, {}
    for kind in (torch.float32, dtype):
        teacher = load_teacher(folder, parts=("network", "text"), dtype=kind)
        conditioning = teacher.encode(["a cat"])
        x, t = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
        student = load_student(tmp_path / "lora", teacher).denoiser
        for name, denoiser in (("student", student), ("teacher", teacher.denoiser())):
            with torch.no_grad(), Products() as products:
                answers[name, kind] = denoiser(x, t, conditioning).x0
            counts[name, kind] = products.found
    for name in ("student", "teacher"):
        assert counts[name, dtype].keys() == {dtype}, name
        assert counts[name, dtype][dtype] == counts[name, torch.float32][torch.float32]
    assert counts["student", dtype][dtype] > counts["teacher", dtype][dtype]  # the adapters are among them
    student, exact, off = answers["student", dtype], answers["student", torch.float32], answers["teacher", dtype]
    assert (student - exact).norm() < 0.1 * (exact - off).norm()  # and they do what they did


def test_large_pictures_are_sampled_few_at_a_time() -> None:
    assert [images_at_once(side) for side in (32, 512, 768, 1024, 4096)] == [100, 16, 7, 4, 1]


def test_a_half_pipeline_decodes_large_pictures_one_by_one_and_in_what_its_autoencoder_bears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The SDXL autoencoder overflows in float16 and says so in its config: diffusers takes it to float32 and back."""
    monkeypatch.setattr(pipelines, "DECODED_PIXELS", 24 * 24)
    pipeline = tiny_pipeline("sdxl").to(torch.float16)
    assert pipeline.vae.config.force_upcast
    pipeline.set_progress_bar_config(disable=True)
    decoded: list[tuple[int, torch.dtype]] = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append((len(args[0]), args[0].dtype)))
    pictures = generate_images(pipeline, ["a cat", "two dogs"], [0, 1], steps=1)
    assert decoded == [(1, torch.float32)] * 2
    assert pictures.isfinite().all() and pictures.std() > 0
