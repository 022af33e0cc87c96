"""README and docs/: links, commands and names exist, messages are the code's, the map shows every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import distill
from distill.commands import COMMANDS
from distill.diffusion.samplers import SAMPLERS
from distill.evaluation.metrics import METRICS
from distill.studies.study import STUDIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
NAMED = (
    "experiment",
    "chain",
    "method",
    "protocol",
    "cluster",
    "engine",
    "reward",
    "networks",
    "student",
    "data",
    "tracking",
    "helpers",
)
PATHS = re.compile(r"student=(?=[\w./]*/)")  # of an evaluation: a folder
PLACEHOLDERS = {"dino", "mine", "NAME", "MINE", "regression"}  # files that a page tells to write


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"src=\"([^\"]+)\"", text)
    for target in targets:
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs both make them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_names_of_files_exist(page: Path) -> None:
    text = page.read_text()
    for line in "\n".join(FENCED.findall(text)).splitlines() + re.findall(r"`(distill [^`]+)`", text):
        for name, following in re.findall(r"(?<!\S)distill (?!launch\b)([a-z]\w*)(?: (\w+)\b(?!=))?", line):
            assert name in COMMANDS, line
            assert name != "study" or following in ("", "NAME", *STUDIES), line
        for flags in re.findall(r"distill launch (.*)", line):
            (name,) = re.findall(r"^(?:--\w+ \w+ )*([a-z]\w+)\b", flags) or ["train"]
            assert name in COMMANDS, line
    for group in NAMED:
        for name in re.findall(rf"(?<![\w.]){group}=([\w-]+)(?![\w/.-]*/)", text):
            known = {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")} | PLACEHOLDERS
            assert name in known or name == name.upper(), f"{group}={name}"
    for group, name in re.findall(r"distill configs (?:show|copy) (\w+)/(\w+)", text):
        assert (ROOT / "configs" / group / f"{name}.yaml").is_file() or name == name.upper(), f"{group}/{name}"


def test_the_table_of_methods_names_experiments() -> None:
    table = re.findall(r"^\| \[.*", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = [name for row in table for name in re.findall(r"`(\w+)`", row)]
    assert len(table) >= 4 and len(named) >= 2 * 4
    assert all((ROOT / f"configs/experiment/{name}.yaml").is_file() for name in named)


# ---- architecture ---------------------------------------------------------------------------------------------------


def test_the_tree_has_a_line_for_every_module_and_no_other() -> None:
    modules = {path for path in (ROOT / "distill").rglob("*.py") if path.name != "__init__.py"}
    packages = {path.parent for path in (ROOT / "distill").rglob("__init__.py")}
    lines = list(tree((ROOT / "docs/architecture.md").read_text()))
    assert {path for path, _ in lines} == modules | packages
    assert len({path for path, _ in lines}) == len(lines) and all(said for _, said in lines)


def tree(text: str) -> Iterator[tuple[Path, str]]:
    """The path and the words of each line of the block that begins with `distill/`."""
    above: list[str] = []
    for line in re.findall(r"```text\n(distill/ .*?)```", text, re.DOTALL)[0].splitlines():
        name, _, said = line.strip().partition(" ")
        above[(len(line) - len(line.lstrip())) // 2 :] = [name]
        yield ROOT / "".join(above), said.strip()


# ---- tables of records ----------------------------------------------------------------------------------------------


def sampler_table() -> str:
    lines = [
        "| `sampler` | | `spacing` | evaluations of 4 steps | diffusers | for flow matching | `data.solver` |",
        "|---|---|---|--:|---|---|---|",
    ]
    for sampler in SAMPLERS.values():
        schedulers = {f"`{scheduler[0]}`": None for scheduler in sampler.schedulers.values() if scheduler}
        cells = [
            f"`{sampler.name}`",
            sampler.title,
            ", ".join(f"`{spacing}`" for spacing in sampler.schedulers),
            str(sampler.evaluations(4)),
            ", ".join(schedulers),
            f"`{sampler.flow[0]}`" if sampler.flow else "—",
            "yes" if sampler.solves else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def metric_table() -> str:
    lines = ["| metric | column | better | | paper | weights |", "|---|---|---|---|---|---|"]
    for metric in METRICS.values():
        if metric.load or metric.paper:
            optional = [f"{name} (optional)" for name in metric.optional_weights]
            weights = ", ".join([*metric.weights, *optional])
            better = metric.better or "—"
            lines.append(
                f"| `{metric.name}` | {metric.heading} | {better} | {metric.unit} | {metric.paper} | {weights} |"
            )
    return "\n".join(lines)


TABLES = [("exports.md", "samplers", sampler_table), ("evaluation.md", "metrics", metric_table)]


@pytest.mark.parametrize(("page", "name", "table"), TABLES)
def test_a_table_of_records_is_theirs(page: str, name: str, table: Callable[[], str]) -> None:
    """What stands between the marks is what the code knows; where it is not, the failure shows what to paste."""
    found = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert found == [table() + "\n"]


# ---- messages -------------------------------------------------------------------------------------------------------


def test_messages_are_the_codes_own() -> None:
    """Each first cell of the tables of messages: what stands between its ellipses is somewhere in distill/."""
    said = texts()
    cells = re.findall(r"^\| (`.*?`) \| ", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(cells) > 60
    for message in re.findall(r"`([^`]+)`", "\n".join(cells)):
        pieces = [piece.strip(" '()=?;:") for piece in message.split("…")]
        assert [piece for piece in pieces if len(piece) > 5 and piece not in said] == [], message


@cache
def texts() -> str:
    """All strings of the code, the values in them as an ellipsis."""
    found = []
    for path in (ROOT / "distill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


# ---- the site -------------------------------------------------------------------------------------------------------


def test_the_site_has_every_page_and_every_public_name() -> None:
    class Loader(yaml.SafeLoader):
        pass

    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    listed = [next(iter(page.values())) for part in site["nav"] for page in pages_of(part)]
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:])
    documented = re.findall(r"^::: (\S+)\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert {name: module for module, name in documented} == distill._PUBLIC


def pages_of(part: dict[str, object]) -> list[dict[str, str]]:
    (held,) = part.values()
    return held if isinstance(held, list) else [{"": str(held)}]
