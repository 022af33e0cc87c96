"""A run's student as files for diffusers and PEFT: `python scripts/export.py run=runs/a output_dir=exports/a`."""

from __future__ import annotations

from distill.training.config import ExportSettings, run_script
from distill.training.export import export_run
from distill.training.tracking import setup_logging


def main(cfg: ExportSettings) -> None:
    setup_logging()
    folder = export_run(cfg.run, cfg.output_dir, cfg.checkpoint, cfg.use_ema)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        print(f"{path.stat().st_size / 2**20:9.2f} MiB  {path}")


if __name__ == "__main__":
    run_script(main, "export", ExportSettings)
