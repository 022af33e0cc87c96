"""The four commands of the README, on a pipeline of somebody else's: odd sizes, trained elsewhere, no hub name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image

from distill.data.reader import open_store
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no"]
PROMPTS = ["a red boat", "two owls", "a bridge at night", "snow"]


def run(*command: str, **environment: str) -> str:
    ended = subprocess.run(
        [*command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.stdout + ended.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("family, processes", [("sd15", 2), ("sdxl", 1)])
def test_four_commands_from_prompts_to_pictures(family: str, processes: int, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", family, prediction_type="v_prediction" if family == "sd15" else "epsilon")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    settings = [
        f"experiment=lcm_lora_{family}",
        f"model.pretrained_model_name_or_path={teacher}",
        f"data.prompts={tmp_path}/prompts.txt",
        f"data.store={tmp_path}/store",
        "data.num_samples=24",
        "data.samples_per_shard=8",
        f"output_dir={tmp_path}/run",
        "mixed_precision=no",
    ]
    several = ["--num_processes", str(processes)]

    launch = [*LAUNCH, *several, *(["--multi_gpu"] if processes > 1 else [])]
    run(*launch, "scripts/make_trajectories.py", *settings, ACCELERATE_USE_CPU="true")
    assert len(open_store(str(tmp_path / "store"))) == 24

    sizes = ["global_batch_size=8", "lora_rank=4", "lora_alpha=2", "max_train_steps=6", "lr_warmup_steps=0"]
    more = ["log_every=1", "checkpointing_steps=3", "validation_steps=3", "validation_prompts=[snow]", "engine=zero2"]
    deepspeed = [*LAUNCH, *several, "--use_deepspeed"]
    run(*deepspeed, "scripts/train.py", *settings, *sizes, *more, "dataloader_num_workers=1")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "lr", "grad_norm", "samples_per_second", "data_wait", "peak_memory_gib"} <= metrics[0].keys()
    assert (tmp_path / "run" / "samples" / "step-000003" / "validation-00.png").is_file()

    run(sys.executable, "scripts/export.py", f"run={tmp_path}/run", f"output_dir={tmp_path}/lora")
    run(
        sys.executable,
        "scripts/sample.py",
        f"model.pretrained_model_name_or_path={teacher}",
        f"lora={tmp_path}/lora",
        "steps=4",
        f"prompts={tmp_path}/prompts.txt",
        f"output_dir={tmp_path}/pictures",
    )
    drawn = [Image.open(tmp_path / "pictures" / f"{i:05d}.png") for i in range(len(PROMPTS))]

    pipeline = DiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    before = pipeline(PROMPTS[1], num_inference_steps=4, guidance_scale=1.0, generator=torch.manual_seed(1)).images[0]
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    after = pipeline(PROMPTS[1], num_inference_steps=4, guidance_scale=1.0, generator=torch.manual_seed(1)).images[0]
    assert _difference(after, drawn[1]) <= 1
    assert _difference(before, drawn[1]) > 1


def _difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures in any channel, of 255."""
    return max(abs(x - y) for x, y in zip(a.convert("RGB").tobytes(), b.convert("RGB").tobytes(), strict=True))
