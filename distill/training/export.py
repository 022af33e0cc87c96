"""From a run's checkpoint to files that other people's programs load."""

from __future__ import annotations

import json
from pathlib import Path

from distill.models.families import load_teacher
from distill.training.checkpoint import read_weights
from distill.training.config import build, checking
from distill.training.run import checkpoints_of, read_run


def export_run(run: str | Path, output_dir: str | Path, checkpoint: str | int = "latest", use_ema: bool = True) -> Path:
    """Writes the student of a run to `output_dir` and returns that folder.

    Args:
        checkpoint: `latest` or a step.
        use_ema: the moving average of the weights, where the run keeps one.

    Raises:
        FileNotFoundError: no run there.
        ConfigError: no such checkpoint, or a damaged one.
    """
    settings = read_run(run)
    with checking():
        step, weights = read_weights(checkpoints_of(run), "student", checkpoint, use_ema)
    model = settings.model
    teacher = load_teacher(model.pretrained_model_name_or_path, revision=model.revision, variant=model.variant)
    student = build(settings.student)
    student.networks(teacher)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    student.export(folder, teacher, weights)
    facts = {"step": step, "use_ema": use_ema, "settings": settings.model_dump(mode="json")}
    (folder / "distill.json").write_text(json.dumps(facts, indent=1) + "\n")
    return folder
