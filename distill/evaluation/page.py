"""A page of results that opens from disk: one file with its pictures and curves inside, in light and dark."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from distill.data.words import counted
from distill.evaluation.figures import GridRow, cell_picture

INK = "#010203"  # of figures to come; the page's own ink takes its place, and changes with its theme
SMALL = 96  # pixels a side: smaller pictures are magnified pixel by pixel


def write_page(path: Path, title: str, parts: Iterable[str], magnified: bool = False) -> None:
    """The page, of parts that the functions below have made. It loads nothing from a network.

    Args:
        magnified: its pictures are small: their pixels stay squares.
    """
    template = Template((files("distill.evaluation") / "page.html").read_text(encoding="utf-8"))
    body, rendering = "\n".join(parts), "pixelated" if magnified else "auto"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.substitute(title=html.escape(title), body=body, rendering=rendering), encoding="utf-8")


def section(title: str, *parts: str) -> str:
    """Parts below a heading."""
    return f"<section><h2>{html.escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def text(paragraph: str, code: bool = False) -> str:
    """A paragraph; or a list, of lines that begin with "- ". `code`: backticks set code."""
    marked = _marked if code else html.escape
    lines = [line for line in paragraph.strip().splitlines() if line]
    if not all(line.startswith(("- ", "  ")) for line in lines):
        return f"<p>{marked(' '.join(lines))}</p>"
    items = re.split(r"^- ", paragraph.strip(), flags=re.M)[1:]
    return "<ul>" + "".join(f"<li>{marked(' '.join(item.split()))}</li>" for item in items) + "</ul>"


def _marked(words: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(words))


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """Rows with their standard errors (`KEY_se`), as `format_table` has them; rows of students are set off.

    `columns` maps a row's keys to headings and formats; a column that no row has is left out.
    """
    keys = [key for key in columns if any(key in row for row in rows)]
    words = {key: ' class="word"' if any(isinstance(row.get(key), str) for row in rows) else "" for key in keys}
    head = "".join(f"<th{words[key]}>{html.escape(columns[key][0])}</th>" for key in keys)
    lines = []
    for row in rows:
        cells = "".join(f"<td{words[key]}>{_cell(row, key, columns[key][1])}</td>" for key in keys)
        lines.append(f'<tr class="student">{cells}</tr>' if row.get("model") == "student" else f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(row: Mapping[str, Any], key: str, pattern: str) -> str:
    if row.get(key) is None:
        return "—"
    error = f" <small>± {pattern.format(row[f'{key}_se'])}</small>" if f"{key}_se" in row else ""
    return html.escape(pattern.format(row[key])) + error


def curves(figures: Mapping[str, Figure]) -> str:
    """Figures side by side, drawn in the page's ink on its paper; their names are read out where they are not seen."""
    return '<div class="curves">' + "".join(_svg(name, figure) for name, figure in figures.items()) + "</div>"


def _svg(name: str, figure: Figure) -> str:
    """Text stays text, which the reader's own font draws; ids are made this figure's, so that two do not meet."""
    for axis in figure.axes:
        axis.set_facecolor("none")
        axis.tick_params(colors=INK)
        for spine in axis.spines.values():
            spine.set_edgecolor(INK)
        for label in (axis.title, axis.xaxis.label, axis.yaxis.label):
            label.set_color(INK)
    for legend in (*figure.legends, *filter(None, (axis.get_legend() for axis in figure.axes))):
        for entry in legend.get_texts():
            entry.set_color(INK)
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()[drawn.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S).replace(INK, "currentColor")
    own = re.sub(r"\W+", "-", name)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(name)}"', 1)


def grid(columns: Sequence[str], groups: Sequence[Sequence[GridRow]], cell: int = SMALL) -> str:
    """Rows of pictures, each under its title; every column has one prompt and one starting noise."""
    spans = "".join(f"<span>{html.escape(column)}</span>" for column in columns)
    prompts = f'<div class="prompts" style="grid-template-columns: repeat({len(columns)}, 1fr)">{spans}</div>'
    rows = "".join(f'<div class="group">{"".join(_strip(row, cell) for row in group)}</div>' for group in groups)
    return f'<div class="scroll">{prompts}{rows}</div>'


def _strip(row: GridRow, cell: int) -> str:
    pictures = [cell_picture(image, cell) for image in row.images]
    strip = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)))
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width
    title, detail, count = html.escape(row.title), html.escape(row.detail), counted(len(pictures), "picture")
    return (
        f"<figure><figcaption>{title}<small>{detail}</small></figcaption>"
        f'<img alt="{title}, {count}" src="{_data(strip)}"></figure>'
    )


def _data(picture: Image.Image) -> str:
    """The picture as a data URL: a small one, whose pixels matter, without loss; a large one as a JPEG."""
    file = io.BytesIO()
    kind = "png" if picture.height <= SMALL else "jpeg"
    picture.save(file, format=kind, optimize=True, quality=88)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def picture(file: Path) -> str:
    """A picture from a file."""
    with Image.open(file, formats=("PNG",)) as found:
        source = _data(found.convert("RGB"))
    return f'<div class="scroll"><figure><img alt="{html.escape(file.stem)}" src="{source}"></figure></div>'


def facts(values: Mapping[str, Any]) -> str:
    """Names and values."""
    return (
        "<dl>"
        + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in values.items())
        + "</dl>"
    )


def changes(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Settings that are not their experiment's: (there, here) by key."""
    if not found:
        return "<p>None: every setting is the experiment's.</p>"
    line = '<dt>{}</dt><dd><span class="was">{}</span> → <span class="is">{}</span></dd>'
    return (
        "<dl>" + "".join(line.format(*(html.escape(str(v)) for v in (k, *pair))) for k, pair in found.items()) + "</dl>"
    )


def code(commands: str) -> str:
    """Commands to copy."""
    return f"<pre>{html.escape(commands.strip())}</pre>"


def folded(title: str, content: str) -> str:
    """Text as it is, which a click unfolds."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(content.strip())}</pre></details>"
