"""Pictures from any diffusers pipeline, with or without a LoRA, or from a training run.

python scripts/sample.py model.pretrained_model_name_or_path=DIR_OR_HUB_ID lora=exports/a steps=4 prompts=prompts.txt \
    output_dir=pictures
python scripts/sample.py run=runs/a steps=[1,2,4,8] prompts='["a cat"]' output_dir=pictures
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import save_image
from tqdm import tqdm

from distill.data.prompts import read_prompts
from distill.evaluation.pipelines import draw, load_pipeline, use_sampler
from distill.training.config import ModelSettings, SampleSettings, run_script
from distill.training.export import export_run
from distill.training.run import read_run
from distill.training.tracking import setup_logging


def main(cfg: SampleSettings) -> None:
    setup_logging()
    student = cfg.run is not None or cfg.lora is not None
    sampler = cfg.sampler or ("lcm" if student else "ddim")
    spacing = cfg.spacing or ("lcm" if sampler == "lcm" else "trailing")
    guidance = cfg.guidance if cfg.guidance is not None else (1.0 if student else 7.5)
    prompts = cfg.prompts if isinstance(cfg.prompts, list) else read_prompts(cfg.prompts)
    prompts = [prompt for prompt in prompts for _ in range(cfg.num_images_per_prompt)]

    with tempfile.TemporaryDirectory() as scratch:
        model: ModelSettings = cfg.model
        lora = cfg.lora
        if cfg.run is not None:
            model = read_run(cfg.run).model
            lora = export_run(cfg.run, scratch)
        pipeline = load_pipeline(
            model.pretrained_model_name_or_path, lora, cfg.lora_scale, model.revision, model.variant
        )
    if torch.cuda.is_available():
        pipeline.to("cuda", torch.float16)

    use_sampler(pipeline, sampler, spacing)
    facts = {"guidance": guidance, "sampler": sampler}
    several = isinstance(cfg.steps, list)
    for steps in cfg.steps if isinstance(cfg.steps, list) else [cfg.steps]:
        folder = Path(cfg.output_dir) / (f"steps-{steps}" if several else "")
        folder.mkdir(parents=True, exist_ok=True)
        pictures: list[dict[str, Any]] = []
        for start in tqdm(range(0, len(prompts), cfg.batch_size), desc=f"{steps} steps", unit="batch"):
            chunk = prompts[start : start + cfg.batch_size]
            seeds = [cfg.seed + start + i for i in range(len(chunk))]
            images = draw(pipeline, chunk, seeds, steps, guidance, model.resolution)
            for prompt, seed, image in zip(chunk, seeds, images, strict=True):
                name = f"{len(pictures):05d}.png"
                save_image(image, folder / name)
                pictures.append({"file": name, "prompt": prompt, "seed": seed, "steps": steps, **facts})
        (folder / "pictures.json").write_text(json.dumps(pictures, indent=1) + "\n")
        print(f"{len(pictures)} pictures in {folder}")


if __name__ == "__main__":
    run_script(main, "sample", SampleSettings)
