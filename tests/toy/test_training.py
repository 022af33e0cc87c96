"""The training script, at a few steps: it builds all from nothing, the same twice, and goes on where it stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from distill.config.loading import load
from distill.config.settings import ToyTeacherSettings
from distill.studies import toy_teacher as training
from distill.toy.judge import load_judge
from distill.toy.reward import load_reward


def train(output: Path, *overrides: str) -> None:
    sizes = ["vae_steps=1", "judge_steps=1", "reward_steps=1", "pictures=500", "batch_size=4"]
    training.main(load("toy_teacher", ToyTeacherSettings, [f"output_dir={output}", *sizes, *overrides]))


def weights(output: Path) -> dict[str, torch.Tensor]:
    return StableDiffusionXLPipeline.from_pretrained(output / "teacher").unet.state_dict()


def test_training_from_nothing_is_reproducible_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "one", "steps=2")
    shutil.copytree(tmp_path / "one" / "checkpoints" / "vae", tmp_path / "two" / "checkpoints" / "vae")
    train(tmp_path / "two", "steps=2", "stages=[denoiser]")
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert load_judge(tmp_path / "one" / "judge.safetensors").logits(torch.zeros(2, 3, 32, 32)).shape == (2, 20)
    assert load_reward(str(tmp_path / "one" / "reward.safetensors")).logits(torch.zeros(2, 3, 32, 32)).shape == (2, 20)
    capsys.readouterr()
    train(tmp_path / "one", "steps=4", "stages=[denoiser]")
    assert "resuming denoiser at step 2" in capsys.readouterr().out
    assert any(not torch.equal(first[key], value) for key, value in weights(tmp_path / "one").items())


@pytest.mark.slow
def test_the_flow_teacher_trains_beside_the_other_with_the_same_autoencoder_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def transformer(name: str) -> dict[str, torch.Tensor]:
        return training.load_pipeline(str(tmp_path / name / "teacher_flow")).transformer.state_dict()

    train(tmp_path / "one", "steps=2", "stages=[denoiser]", "teacher=flow")
    assert "the autoencoder is the bundled teacher's" in capsys.readouterr().out
    (tmp_path / "two" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "one" / "checkpoints" / "latents_flow-500.pt", tmp_path / "two" / "checkpoints")
    train(tmp_path / "two", "steps=2", "stages=[denoiser]", "teacher=flow")
    first, second = transformer("one"), transformer("two")
    assert all(torch.equal(first[key], second[key]) for key in first)
    train(tmp_path / "one", "steps=4", "stages=[denoiser]", "teacher=flow")
    assert "resuming denoiser_flow at step 2" in capsys.readouterr().out
    assert any(not torch.equal(first[key], value) for key, value in transformer("one").items())
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"checkpoints", "teacher_flow"}


def test_the_flow_loss_trains_every_part_and_reads_the_caption() -> None:
    torch.manual_seed(0)
    pipeline = training.untrained_flow_pipeline(training.toy.build_vae(), seed=0)
    online = training.Generator(pipeline, training.RECIPES["flow"].learning)
    optimizer = torch.optim.AdamW(online.parameters(), lr=2e-3)
    clean, labels = torch.randn(32, 4, 8, 8), training.balanced_labels(32)
    losses = []
    for step in range(15):
        loss = training.flow_matching_loss(pipeline, clean, labels, torch.Generator().manual_seed(step))
        training.descend(loss, optimizer)
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    learning = {name.partition(".")[0] for name, p in online.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"text_encoder", "text_encoder_2", "text_encoder_3", "transformer"}


def test_the_measured_scale_makes_unit_variance_without_changing_reconstructions() -> None:
    torch.manual_seed(0)
    vae = training.toy.build_vae()
    pictures = training.render(training.balanced_labels(100), torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        training.measure_scale(vae, seed=0)
        latents = vae.encode(pictures).latent_dist.mean
        assert torch.allclose(vae.decode(latents).sample, before, atol=1e-4)
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.15)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.15 * latents.std()


def test_the_evaluation_draws_what_the_pipeline_draws() -> None:
    torch.manual_seed(0)
    pipeline = training.toy.build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    ours = training.generate_images(pipeline, 20, seed=3, steps=3, spacing="trailing", guidance=2.0)
    pipeline.scheduler = training.DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    noise = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        list(training.CAPTIONS),
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=2.0,
        latents=noise,
        output_type="pt",
    ).images
    assert torch.allclose(ours, theirs * 2 - 1, atol=1e-5)
