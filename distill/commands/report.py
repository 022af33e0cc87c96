"""Puts finished evaluations side by side on one page:

distill report evaluations=[outputs/a,outputs/b] output_dir=outputs/a_and_b
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("report")

from pathlib import Path

from distill.config.loading import ConfigError, checking
from distill.config.settings import ReportSettings
from distill.diffusion.registry import import_plugins
from distill.evaluation.side_by_side import write_side_by_side


def main(cfg: ReportSettings) -> None:
    reports = {Path(folder).resolve().name: Path(folder) / "report" for folder in cfg.evaluations}
    if len(reports) < len(cfg.evaluations):
        raise ConfigError(f"evaluations are named by their folders, and two are called alike: {', '.join(reports)}")
    with checking():
        import_plugins()  # whose metrics the reports may have
        write_side_by_side(Path(cfg.output_dir) / "report", reports)
    print(f"report: {cfg.output_dir}/report/index.html")
