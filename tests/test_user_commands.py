"""The commands of the README, on pipelines of somebody else's: odd sizes, trained elsewhere, no hub name."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image
from safetensors.torch import load_file

from distill.data.reader import open_store
from distill.models.lora import LORA_FILE
from tests.clocks import is_clock
from tests.forked import python, settled
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
FLAGS = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
PROMPTS = ["a red boat", "two owls", "a bridge at night", "snow"]


def launcher(processes: int, *flags: str) -> list[str]:
    return [python(), "-m", "accelerate.commands.launch", *FLAGS, "--num_processes", str(processes), *flags]


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
@pytest.mark.parametrize("family, processes", [("sd15", 2), pytest.param("sdxl", 1, marks=pytest.mark.slow)])
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
    launch = launcher(processes, *(["--multi_gpu"] if processes > 1 else []))
    run(*launch, "scripts/make_trajectories.py", *settings, ACCELERATE_USE_CPU="true")
    assert len(open_store(str(tmp_path / "store"))) == 24

    sizes = [
        "global_batch_size=8",
        "lora_rank=4",
        "lora_alpha=2",
        "max_train_steps=6",
        "lr_warmup_steps=0",
        "learning_rate=0.03",
    ]
    more = ["log_every=1", "checkpointing_steps=3", "validation_steps=3", "validation_prompts=[snow]", "engine=zero2"]
    more += ["validation_teacher_steps=2"]
    run(
        *launcher(processes, "--use_deepspeed"),
        "scripts/train.py",
        *settings,
        *sizes,
        *more,
        "dataloader_num_workers=1",
    )
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss" in row] == [1, 2, 3, 4, 5, 6]
    validated = [row for row in metrics if "validation/diversity" in row]
    assert [row["step"] for row in validated] == [3, 6] and (tmp_path / "run" / "validation.safetensors").is_file()
    assert all(row["validation/teacher_consistency"] > 0 and row["validation/share"] < 1 for row in validated)
    assert {"loss", "lr", "grad_norm", "samples_per_second", "data_wait", "peak_memory_gib"} <= metrics[0].keys()
    assert (tmp_path / "run" / "samples" / "step-000003" / "validation-00.png").is_file()

    run(python(), "scripts/export.py", f"run={tmp_path}/run", f"output_dir={tmp_path}/lora")
    run(
        python(),
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
    pipeline.load_lora_weights(str(tmp_path / "lora"), weight_name=LORA_FILE)
    after = pipeline(PROMPTS[1], num_inference_steps=4, guidance_scale=1.0, generator=torch.manual_seed(1)).images[0]
    assert _difference(after, drawn[1]) <= 1
    assert _difference(before, drawn[1]) > 1


def write_store(folder: Path) -> list[str]:
    """A tiny SDXL-shaped teacher and its store in `folder`; the settings that name them."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    settings = [
        "experiment=lcm_lora_sdxl",
        f"model.pretrained_model_name_or_path={save_tiny(folder / 'teacher', 'sdxl')}",
        f"data.prompts={folder}/prompts.txt",
        f"data.store={folder}/store",
        "data.num_samples=12",
        "mixed_precision=no",
    ]
    run(python(), "scripts/make_trajectories.py", *settings)
    return settings


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_store(tmp_path_factory.mktemp("xl"))


@pytest.mark.parametrize(
    ("engine", "processes", "steps"),
    [
        ("single", 1, 16),
        pytest.param("single", 1, 60, marks=pytest.mark.faults),
        pytest.param("zero2", 2, 60, marks=[pytest.mark.faults, pytest.mark.distributed]),
    ],
)
def test_killed_and_run_again_is_as_if_it_had_not_been(
    engine: str, processes: int, steps: int, xl: list[str], tmp_path: Path
) -> None:
    """Weights, moving average and metrics, bit for bit, with loader workers. A short one is in the default run."""
    command = [python()] if processes == 1 else launcher(processes, "--use_deepspeed")
    command += ["scripts/train.py", *xl, f"engine={engine}", "global_batch_size=4", "lora_rank=2", "lora_alpha=2"]
    command += [f"max_train_steps={steps}", "lr_warmup_steps=5", "lr_scheduler=cosine", "ema_decay=0.9", "log_every=1"]
    command += [f"checkpointing_steps={steps // 6}", "dataloader_num_workers=2", "gradient_accumulation_steps=2"]
    run(*command, f"output_dir={tmp_path}/whole")
    _kill_at_step(steps // 4 + 1, tmp_path / "killed", [*command, f"output_dir={tmp_path}/killed"])
    run(*command, f"output_dir={tmp_path}/killed")

    whole, killed = (_lasting(tmp_path / name, steps) for name in ("whole", "killed"))
    assert killed["metrics"] == whole["metrics"] and len(whole["metrics"]) == steps
    assert killed["weights"].keys() == whole["weights"].keys() and len(whole["weights"]) > 20
    assert all(torch.equal(w, killed["weights"][name]) for name, w in whole["weights"].items())


def _kill_at_step(step: int, folder: Path, command: list[str]) -> None:
    """Starts a run and kills all of its processes, without a word, once it has logged `step`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        time.sleep(0.01)
    doomed = [process, *process.children(recursive=True)]  # a launcher's workers have sessions of their own
    for one in doomed:
        one.kill()
    psutil.wait_procs(doomed, timeout=60)
    settled(process.create_time())
    assert not (folder / "DONE").exists()


def _lasting(folder: Path, steps: int) -> dict[str, Any]:
    """What of a run must not depend on when it was interrupted."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = sorted((folder / "checkpoints" / f"step-{steps:08d}").rglob("*.safetensors"))
    weights = {f"{file.name}/{name}": w for file in files for name, w in load_file(file).items()}
    return {"metrics": [{k: v for k, v in row.items() if not is_clock(k)} for row in rows], "weights": weights}


def _difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures in any channel, of 255."""
    return max(abs(x - y) for x, y in zip(a.convert("RGB").tobytes(), b.convert("RGB").tobytes(), strict=True))
