"""Reports beside each other: what compares shares a table, what does not has one of its own."""

from __future__ import annotations

import html
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from distill.evaluation.side_by_side import write_side_by_side

TEACHER = {"model": "teacher", "sampler": "ddim", "steps": 50, "frechet": 0.2, "protocol": "toy, N = 100"}
STUDENT = {"model": "student", "sampler": "lcm", "steps": 4, "frechet": 0.3, "protocol": "toy, N = 100"}


def report(folder: Path, rows: list[dict], rate: float) -> Path:  # type: ignore[type-arg]
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(rows))
    (folder / "config.yaml").write_text(f"seed: 0\noptimizer: {{lr: {rate}}}\n")
    Image.new("RGB", (40, 20), "red").save(folder / "grid.png")
    return folder


def test_a_teacher_they_share_is_one_row_and_settings_that_differ_are_told(tmp_path: Path) -> None:
    worse = STUDENT | {"frechet": 0.5}
    reports = {
        "a": report(tmp_path / "a", [TEACHER, STUDENT], 0.1),
        "b": report(tmp_path / "b", [TEACHER, worse], 0.2),
    }
    write_side_by_side(tmp_path / "both", reports)
    rows = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert [(row["evaluation"], row["frechet"]) for row in rows] == [("—", 0.2), ("a", 0.3), ("b", 0.5)]
    text = (tmp_path / "both" / "report.md").read_text()
    assert "optimizer.lr" in text and "seed" not in text
    told = html.unescape((tmp_path / "both" / "index.html").read_text())
    assert told.count("<table>") == 2 and "optimizer.lr" in told and 'alt="b"' in told


def test_protocols_do_not_share_a_table(tmp_path: Path) -> None:
    other = STUDENT | {"protocol": "coco2017-5k, N = 5000", "clip_score": 33.0}
    reports = {"a": report(tmp_path / "a", [STUDENT], 0.1), "b": report(tmp_path / "b", [other], 0.1)}
    write_side_by_side(tmp_path / "both", reports)
    told = (tmp_path / "both" / "index.html").read_text()
    assert told.count("<table>") == 2 and told.count("<h2>Protocol: ") == 2


def test_a_folder_without_a_report_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none: no report there \(distill evaluate writes"):
        write_side_by_side(tmp_path / "both", {"none": tmp_path / "none"})
    assert not (tmp_path / "both").exists()


HOSTILE = [
    "<script>alert(1)<_script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "$\\frac{$ and $x$",
    "_hidden",
    "a | b `c` [d](javascript:alert(1))",
    "--><b>&amp;",
]


class Markup(HTMLParser):
    """The tags of a page, and its attributes of which a browser does something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.acts: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name.startswith("on") or (
                name in ("href", "src", "xlink:href")
                and value
                and value[:5] not in ("data:", "#")
                and not value.startswith("#")
            ):
                self.acts.add(f"{tag} {name}={value}")


@pytest.mark.filterwarnings("error")
def test_names_of_strangers_are_text_on_every_page(tmp_path: Path) -> None:
    usual = {name: report(tmp_path / name, [TEACHER, STUDENT], rate) for name, rate in (("a", 0.1), ("b", 0.2))}
    write_side_by_side(tmp_path / "usual", usual)
    expected = Markup((tmp_path / "usual" / "index.html").read_text())
    rows = [
        {**TEACHER, "protocol": HOSTILE[0]},
        *({**STUDENT, "protocol": HOSTILE[0], "steps": n, "sampler": name} for n, name in enumerate(HOSTILE, 1)),
    ]
    strange = {name: report(tmp_path / f"{n}", rows, n) for n, name in enumerate(HOSTILE)}
    for n, name in enumerate(HOSTILE):
        (tmp_path / f"{n}" / "config.yaml").write_text(json.dumps({name: name, "n": n}))
    write_side_by_side(tmp_path / "all", strange)
    page, text = ((tmp_path / "all" / name).read_text() for name in ("index.html", "report.md"))
    found = Markup(page)
    assert found.tags <= expected.tags and found.acts == expected.acts == set()
    assert "alert(1)" in page  # it is there, as text
    assert (
        "<script" not in text
        and "<img" not in text
        and "<svg" not in text
        and "](javascript" not in text.replace(r"\[d]", "")
    )
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.replace(r"\|", "").count("|") for line in table[: len(rows)]}) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", b"[1]"),
        ("metrics.json", b"{"),
        ("metrics.json", b"[" * 100_000),
        ("metrics.json", json.dumps([STUDENT | {"frechet": "<b>"}]).encode()),
        ("grid.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("config.yaml", b"a: &a [1]\nb: [*a, *a]"),
        ("config.yaml", b"a: ["),
    ],
)
def test_a_report_that_is_none_is_one_clear_line(tmp_path: Path, name: str, content: bytes) -> None:
    reports = {"a": report(tmp_path / "a", [STUDENT], 0.1), "b": report(tmp_path / "b", [STUDENT], 0.2)}
    (tmp_path / "b" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"b/{name}: (not|.*aliases)") as error:
        write_side_by_side(tmp_path / "both", reports)
    assert "\n" not in str(error.value)
