"""The page of results: whole in one file, and as a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from distill.evaluation.figures import GridRow
from distill.evaluation.page import changes, curves, facts, folded, grid, section, table, text, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIGHT, DARK = (255, 255, 255), (0x19, 0x19, 0x18)
ROWS = [
    {"model": "teacher", "steps": 50, "fid": 20.0, "fid_se": 0.5},
    {"model": "student", "steps": 4, "fid": None, "note": "<b>left out & why</b>"},
]
COLUMNS = {"model": ("model", "{}"), "steps": ("steps", "{}"), "fid": ("FID", "{:.1f}"), "note": ("note", "{}")}


def page(folder: Path) -> Path:
    figures = {}
    for name in ("loss", "rate of learning"):
        figures[name] = Figure(figsize=(4, 3))
        axis = figures[name].subplots()
        axis.plot([0, 1], [1, 2], label="of both")
        axis.legend()
        axis.set_title(name)
    pictures = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = [GridRow("teacher, 50 steps", "FID 20", pictures), GridRow("student, 4 steps", "", -pictures)]
    parts = [
        text("What was distilled\nfrom what."),
        section("Results", table(ROWS, COLUMNS), text("- one `a < b` thing\n- another,\n  on two lines", code=True)),
        section("Curves", curves(figures)),
        section("Pictures", grid([f"prompt {i}" for i in range(10)], [rows])),
        section("Settings", changes({"learning_rate": (1e-4, 1e-3)}), folded("config.yaml", "a: <1>")),
        section("Environment", facts({"torch": "2.14", "a long path": "/" + "x" * 300})),
    ]
    write_page(folder / "report" / "index.html", "A student & its teacher", parts, magnified=True)
    return folder / "report" / "index.html"


def test_the_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    written = page(tmp_path).read_text()
    assert set(re.findall(r'(?:src|href)="([a-z]*:|#)', written)) == {"data:", "#"}
    assert not re.findall(r"@import|<script|url\((?!#)", written)
    assert "<title>A student &amp; its teacher</title>" in written
    assert "20.0 <small>± 0.5</small>" in written and "<td>—</td>" in written
    assert "&lt;b&gt;left out &amp; why&lt;/b&gt;" in written and "<b>left" not in written
    assert "<li>another, on two lines</li>" in written and "one <code>a &lt; b</code> thing" in written
    ids = re.findall(r'\bid="([^"]+)"', written)
    assert len(ids) == len(set(ids)) > 10  # of two figures; a browser would take the first of two alike
    assert set(re.findall(r'href="#([^"]+)"', written)) <= set(ids)
    assert "currentColor" in written and "#010203" not in written


def shot(written: Path, to: Path, width: int, height: int = 1500, dark: bool = False) -> tuple[Image.Image, str]:
    """The page as a headless browser shows it, and what it printed to its console."""
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *theme]
        + ["--enable-logging=stderr", f"--user-data-dir={to.parent / 'profile'}", f"--window-size={width},{height}"]
        + [f"--screenshot={to}", written.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return Image.open(to).convert("RGB"), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (420, False)])
def test_a_browser_shows_it_without_complaint_in_both_themes_and_on_a_phone(
    tmp_path: Path, width: int, dark: bool
) -> None:
    picture, console = shot(page(tmp_path), tmp_path / "shot.png", width, dark=dark)
    assert console == ""
    paper, ink = (DARK, 150) if dark else (LIGHT, 100)
    assert picture.getpixel((2, 2)) == paper
    right = picture.crop((width - 6, 0, width, picture.height))  # nothing sticks out of a narrow window
    assert [colour for _, colour in right.getcolors() or ()] == [paper]
    title = picture.crop((0, 0, width // 2, 90)).convert("L").getextrema()
    assert (title[1] > ink) if dark else (title[0] < ink)
    assert len(picture.resize((200, 250)).getcolors(50_000)) > 200  # pictures and curves are there
