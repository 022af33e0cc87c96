"""Finished reports beside each other: one page, in which rows share a table only if they share a protocol."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.evaluation import page
from distill.evaluation.compare import Row, by_protocol
from distill.evaluation.figures import METRICS, line_figures, line_of
from distill.evaluation.report import COLUMNS, CONFIG, format_table

TITLE = "Students compared"


def write_together(folder: Path, reports: Mapping[str, Path]) -> None:
    """index.html, report.md, metrics.json and the reports' grids (NAME.png) in `folder`.

    Args:
        reports: folders that `write_report` has written, by the names that their rows are to have.

    Raises:
        FileNotFoundError: a folder without a report.
    """
    rows = {name: _rows(there) for name, there in reports.items()}
    folder.mkdir(parents=True, exist_ok=True)
    together = _together(rows)
    parts, text = [page.text(_about(reports))], [f"# {TITLE}", _about(reports)]
    columns = {"evaluation": ("evaluation", "{}")} | COLUMNS
    for protocol, of_one in by_protocol(together).items():
        figures = line_figures(_lines(of_one), [name for name in METRICS if all(name in row for row in of_one)])
        parts += [page.section(f"Protocol: {protocol}", page.table(of_one, columns), page.curves(figures))]
        text += [f"## Protocol: {protocol}", format_table(of_one, columns)]
    for name, there in reports.items():
        shutil.copyfile(there / "grid.png", folder / f"{name}.png")
        parts.append(page.section(f"Pictures of {name}", page.picture(folder / f"{name}.png")))
        text.append(f"## Pictures of {name}\n\n![pictures]({name}.png)")
    if apart := _apart(reports):
        settings = [{"setting": key} | values for key, values in apart.items()]
        headings = {key: (key, "{}") for key in ("setting", *reports)}
        parts.append(page.section("Settings in which the runs differ", page.table(settings, headings)))
        text.append(f"## Settings in which the runs differ\n\n{format_table(settings, headings)}")
    (folder / "metrics.json").write_text(json.dumps(together, indent=1) + "\n")
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
    page.write_page(folder / "index.html", TITLE, parts)


def _rows(there: Path) -> list[Row]:
    if not (there / "metrics.json").is_file():
        raise FileNotFoundError(f"{there}: no report there (scripts/evaluate.py writes OUTPUT_DIR/report)")
    return json.loads((there / "metrics.json").read_text())


def _together(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """A teacher's row that several evaluations have is one row, of no evaluation."""
    found: list[Row] = []
    for name, own in rows.items():
        for row in own:
            row = {"evaluation": name if row["model"] == "student" else "—"} | row
            if row not in found:
                found.append(row)
    return sorted(found, key=lambda row: (row["model"] != "teacher", row["steps"]))


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    most = max((row["steps"] for row in rows if row["model"] == "student"), default=0)
    for row in rows:
        kind = line_of(row)
        if kind == "student":
            lines.setdefault(f"{row['evaluation']}, {row['sampler']}", []).append(row)
        elif kind == "teacher" and row["steps"] <= max(most, 1):
            lines.setdefault("teacher", []).append(row)
    return lines


def _about(reports: Mapping[str, Path]) -> str:
    return f"Beside each other: {', '.join(reports)}. A dash for an evaluation: the teacher, which they share."


def _apart(reports: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Settings of the runs, where all of them are known, that are not the same in all."""
    files = {name: there / CONFIG for name, there in reports.items()}
    if not all(file.is_file() for file in files.values()):
        return {}
    settings = {name: flat(yaml.safe_load(file.read_text())) for name, file in files.items()}
    keys = dict.fromkeys(key for one in settings.values() for key in one)
    values = {key: {name: str(one.get(key, "—")) for name, one in settings.items()} for key in keys}
    return {key: found for key, found in values.items() if len(set(found.values())) > 1}


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {above + key: value}
    return found
