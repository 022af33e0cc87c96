"""The notebook of docs/: its code cells, in their order, in one process, as a kernel runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/quickstart.ipynb"
SIZES = "SAMPLES, STEPS, BATCH = 300, 100, 32"


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def code() -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells("code"))


def ran(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, str(NOTEBOOK), "exec"), names)
    return names


def test_it_distils_the_toy_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = code().replace(SIZES, "SAMPLES, STEPS, BATCH = 8, 2, 4")
    small = (
        small.replace("[*CAPTIONS] * 3", "[*CAPTIONS]")
        .replace('"steps=50"', '"steps=8"')
        .replace("*settings,\n", '*settings,\n    "lr_warmup_steps=0",\n')
    )
    names = ran(
        small.replace('num_samples={SAMPLES}"]', 'num_samples={SAMPLES}", "data.solver_steps=10"]'),
        tmp_path,
        monkeypatch,
    )
    said = capsys.readouterr().out
    assert "8 samples; the first is" in said and "1 steps: teacher " in said
    assert len(names["store"]) == 8
    assert (tmp_path / "outputs/notebook/lora/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_after_the_steps_it_takes_the_student_beats_its_teacher_at_so_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ran(code(), tmp_path, monkeypatch)
    for teacher, student in names["found"].values():
        assert student > teacher


def test_what_is_shown_is_of_the_code_and_small() -> None:
    assert SIZES in code() and NOTEBOOK.stat().st_size < 300_000
    for number, cell in enumerate(cells("code"), 1):
        assert cell["execution_count"] == number  # run once, in order, from a new kernel
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream", "execute_result"}
    shown = [output for cell in cells("code") for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(shown) == 3
    assert "/tmp" not in NOTEBOOK.read_text(encoding="utf-8")
