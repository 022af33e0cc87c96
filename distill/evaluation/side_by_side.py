"""Finished reports beside each other: one page, in which rows share a table only if they share a protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from PIL import Image

from distill.evaluation import page
from distill.evaluation.compare import Row, by_protocol
from distill.evaluation.figures import line_figures, line_of, measured_in, series_of
from distill.evaluation.metrics import LEGEND, METRICS
from distill.evaluation.report import CONFIG, all_columns, format_table, markdown

TITLE = "Students compared"


def write_side_by_side(folder: Path, reports: Mapping[str, Path]) -> None:
    """index.html, report.md, metrics.json and the reports' grids (NAME.png) in `folder`.

    Args:
        reports: folders that `write_report` has written, by the names that their rows are to have.

    Raises:
        FileNotFoundError: a folder without a report.
        ValueError: one that is not as `write_report` writes it; names the file.
    """
    rows = {name: _rows(there) for name, there in reports.items()}
    folder.mkdir(parents=True, exist_ok=True)
    together = _together(rows)
    parts, text = [page.text(_about(reports))], [f"# {TITLE}", markdown(_about(reports))]
    columns = {"evaluation": ("evaluation", "{}")} | all_columns()
    for protocol, of_one in by_protocol(together).items():
        figures = line_figures(_lines(of_one), measured_in(of_one))
        parts += [page.section(f"Protocol: {protocol}", page.table(of_one, columns), page.curves(figures))]
        text += [f"## Protocol: {markdown(protocol)}", format_table(of_one, columns)]
    for name, there in reports.items():
        grid = folder / f"{name}.png"
        read_grid(there / "grid.png").save(grid)
        parts.append(page.section(f"Pictures of {name}", page.picture(grid)))
        text.append(f"## Pictures of {markdown(name)}\n\n![pictures]({quote(grid.name)})")
    if apart := _apart(reports):
        settings = [{"setting": key} | values for key, values in apart.items()]
        headings = {key: (key, "{}") for key in ("setting", *reports)}
        parts.append(page.section("Settings in which the runs differ", page.table(settings, headings)))
        text.append(f"## Settings in which the runs differ\n\n{format_table(settings, headings)}")
    (folder / "metrics.json").write_text(json.dumps(together, indent=1) + "\n")
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
    page.write_page(folder / "index.html", TITLE, parts)


def _rows(there: Path) -> list[Row]:
    """The rows of a report, which may be another person's."""
    file = there / "metrics.json"
    if not file.is_file():
        raise FileNotFoundError(f"{there}: no report there (distill evaluate writes OUTPUT_DIR/report)")
    try:
        return [_checked(row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file}: not the rows of a report ({type(error).__name__} {error})") from None


def _checked(row: Row) -> Row:
    """Raises TypeError or KeyError for what is no row."""
    texts, numbers = ("model", "sampler", "spacing", "protocol"), ["steps", "guidance", "nfe", "n", *METRICS]
    kinds: dict[str, Any] = dict.fromkeys(texts, str)
    kinds |= dict.fromkeys([*numbers, *(f"{name}_se" for name in METRICS)], (int, float))
    for name in ("model", "sampler", "steps"):
        row[name]
    for name, kind in kinds.items():
        if name in row and not isinstance(row[name], kind):
            raise TypeError(f"{name} is {type(row[name]).__name__}")
    return row


def read_grid(file: Path) -> Image.Image:
    """A report's grid. Raises ValueError: it is no PNG."""
    try:
        with Image.open(file, formats=("PNG",)) as found:
            return found.convert("RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything
        raise ValueError(f"{file}: not a PNG ({type(error).__name__})") from None


def _together(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """A teacher's row that several evaluations have is one row, of no evaluation."""
    found: list[Row] = []
    for name, own in rows.items():
        for row in own:
            row = {"evaluation": name if row["model"] == "student" else "—"} | row
            if row not in found:
                found.append(row)
    return sorted(found, key=lambda row: (row["model"] != "teacher", row["steps"]))


def _lines(rows: Sequence[Row]) -> dict[str, Sequence[Row]]:
    """Students' rows, and the teacher's of as few steps, by the line that they belong to."""
    most = max((row["steps"] for row in rows if row["model"] == "student"), default=0)
    few = [row for row in rows if row["model"] == "student" or row["steps"] <= max(most, 1)]
    lines = series_of(row for row in few if line_of(row) != "undistilled")
    return {line.label: [dict(row) for row in line.rows] for line in lines}


def _about(reports: Mapping[str, Path]) -> str:
    return f"Beside each other: {', '.join(reports)}. A dash for an evaluation: the teacher, which they share. {LEGEND}"


def _apart(reports: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Settings of the runs, where all of them are known, that are not the same in all."""
    files = {name: there / CONFIG for name, there in reports.items()}
    if not all(file.is_file() for file in files.values()):
        return {}
    settings = {name: flat(_settings(file)) for name, file in files.items()}
    keys = dict.fromkeys(key for one in settings.values() for key in one)
    values = {key: {name: str(one.get(key, "—")) for name, one in settings.items()} for key in keys}
    return {key: found for key, found in values.items() if len(set(found.values())) > 1}


def _settings(file: Path) -> dict[str, Any]:
    """Raises ValueError: it is no YAML of settings. Aliases, with which a short text fills any memory, are refused."""
    try:
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has aliases")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not the settings of a run ({' '.join(str(error).split())[:200]})") from None
    return found if isinstance(found, dict) else {}


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {above + key: value}
    return found
