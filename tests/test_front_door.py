"""The installed package, away from any checkout: one command, its help, its configs, and its functions."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import distill
from distill.__main__ import main
from distill.commands import COMMANDS, configs
from distill.commands.flags import flags_of
from distill.config.composition import CONFIG_DIRS, CONFIGS, group_files
from distill.config.loading import ConfigError, load
from distill.config.settings import TrainSettings
from distill.studies.study import STUDIES

ROOT = Path(__file__).parents[1]
MINE = """# @package _global_
# One of my own.
defaults:
  - override /model: toy

seed: 5
max_train_steps: 7
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked: nothing else of the repository is within reach."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("distill", "configs", "pyproject.toml", "README.md", "LICENSE"):  # a build leaves folders behind
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, timeout=300)
    with zipfile.ZipFile(next(folder.glob("distill-*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def ran(folder: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(site), "HOME": str(folder), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "distill", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_wheel_holds_what_the_checkout_does(site: Path) -> None:
    rooms = {path.parent.relative_to(ROOT) for path in (ROOT / "distill").rglob("*.py")}
    assert {path.parent.relative_to(site) for path in (site / "distill").rglob("*.py")} == rooms
    held = {path.relative_to(site / "distill/configs"): path.read_bytes() for path in site.rglob("configs/**/*.yaml")}
    assert held == {path.relative_to(CONFIGS): path.read_bytes() for path in CONFIGS.rglob("*.yaml")}
    toy = [path.relative_to(ROOT) for path in (ROOT / "distill/toy").rglob("*") if path.suffix in (".json", ".txt")]
    assert toy and all((site / path).is_file() for path in [*toy, Path("distill/py.typed")])


def test_a_command_composes_its_settings_away_from_the_checkout(site: Path, tmp_path: Path) -> None:
    done = ran(tmp_path, site, "train", "experiment=quickstart", "--cfg")
    assert done.returncode == 0 and "max_train_steps: 350" in done.stdout and str(site) in done.stdout, done.stderr


def test_an_experiment_of_ones_own_needs_no_checkout(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ./configs of the working directory, or in a folder that --config-dir names; copied out and edited, or new."""
    copied = ran(tmp_path, site, "configs", "copy", "experiment/quickstart", "mine")
    assert copied.returncode == 0 and "experiment=mine" in copied.stdout
    mine = tmp_path / "configs/experiment/mine.yaml"
    assert mine.read_bytes() == (CONFIGS / "experiment/quickstart.yaml").read_bytes()
    mine.write_text(MINE)
    given = ["train", "experiment=mine", "data.store=s", "--cfg"]
    done = ran(tmp_path, site, *given)
    assert done.returncode == 0 and "max_train_steps: 7" in done.stdout and "seed: 5" in done.stdout, done.stderr
    other = tmp_path / "other"
    other.mkdir()
    done = ran(other, site, *given, f"--config-dir={tmp_path}/configs")
    assert done.returncode == 0 and "max_train_steps: 7" in done.stdout, done.stderr
    monkeypatch.setenv(CONFIG_DIRS, "")
    monkeypatch.chdir(other)
    assert flags_of([*given[1:], "--config-dir", str(tmp_path / "configs")]).rest == given[1:-1]
    assert load("train", TrainSettings, given[1:-1]).max_train_steps == 7
    assert "One of my own" in configs.answer(["experiment"])
    monkeypatch.setenv(CONFIG_DIRS, "")
    with pytest.raises(ConfigError, match="^unknown experiment=mine;"):
        load("train", TrainSettings, given[1:-1])


HELP = """
import contextlib, io, json, sys, time
from distill.__main__ import main
begun, found = time.process_time(), {}
for line in json.loads(sys.argv[1]):
    sys.argv, before = ["distill", *line.split(), "--help"], time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            seconds = begun + time.process_time() - before
            found[line] = [end.code or 0, out.getvalue(), err.getvalue(), seconds]
print(json.dumps([found, "torch" in sys.modules]))
"""


def test_every_command_and_study_helps(tmp_path: Path) -> None:
    lines = [*COMMANDS, *(f"study {name}" for name in STUDIES)]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", HELP, json.dumps(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found, heavy = json.loads(done.stdout)
    assert list(found) == lines and not heavy
    for name, (code, out, err, seconds) in found.items():
        assert code == 0 and "distill" in out and not err, (name, err)
        assert seconds < 2, name  # of the processor, its start and imports included


def test_the_command_line_without_a_command_names_them_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["distill", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    code, said, _ = ended("--help")
    assert code == 0
    for name in COMMANDS:
        (line,) = [line for line in said.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 3, line
    assert ended()[0] == 2
    assert ended("--version") == (0, f"distill {distill.__version__}\n", "")
    code, out, err = ended("trian", "x=1")
    assert (code, out) == (2, "") and "did you mean train?" in err


# ---- configs --------------------------------------------------------------------------------------------------------


def test_configs_are_listed_and_shown() -> None:
    line = next(line for line in configs.answer([]).splitlines() if line.startswith("experiment: "))
    assert {"lcm_lora_flux2_klein", "rectified_toy", "compare/lcm"} < set(line.removeprefix("experiment: ").split(", "))
    listed = configs.answer(["method"])
    assert len(listed.splitlines()) == len(list((CONFIGS / "method").glob("*.yaml"))) and "arXiv 2310.04378" in listed
    assert (
        configs.answer(["show", "experiment/mlcm_toy"]) == (CONFIGS / "experiment/mlcm_toy.yaml").read_text().rstrip()
    )
    assert configs.answer(["show", "train"]).startswith("# Everything a run is")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["experimnt"], "did you mean 'experiment'"),
        (["show", "experiment/none"], "unknown 'none'"),
        (["show", "none/none"], "unknown 'none'"),
        (["copy", "train"], "no file of a group"),
        (["copy"], "allowed are GROUP"),
        (["copy", "experiment/mlcm_toy", "mlcm_toy"], "already"),
    ],
)
def test_a_mistake_about_configs_is_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        configs.answer(arguments)


def test_a_file_with_the_name_of_a_bundled_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/quickstart.yaml").write_text(MINE)
    (tmp_path / "experiment/mine.yaml").write_text(MINE)
    monkeypatch.setenv(CONFIG_DIRS, str(tmp_path))
    assert group_files("experiment")["quickstart"] == CONFIGS / "experiment/quickstart.yaml"
    assert load("train", TrainSettings, ["experiment=mine", "data.store=s"]).seed == 5
    with pytest.raises(ConfigError, match="has the name of .*: give it another name"):
        load("train", TrainSettings, ["experiment=quickstart"])
    (tmp_path / "experiment/torn.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"torn\.yaml"):
        load("train", TrainSettings, ["experiment=torn", "data.store=s"])


# ---- functions ------------------------------------------------------------------------------------------------------


def test_the_toy_is_distilled_from_python(tmp_path: Path) -> None:
    toy = ["experiment=quickstart", "engine=single", f"data.store={tmp_path}/store", "data.num_samples=8"]
    toy += ["data.samples_per_shard=8", "data.solver_steps=10", "method.skip=200"]
    distill.trajectories(*toy)
    steps = {"max_train_steps": 2, "lr_warmup_steps": 0, "global_batch_size": 4, "dataloader_num_workers": 0}
    distill.train(*toy, output_dir=tmp_path / "run", validation_prompts=None, **steps)
    distill.export(run=tmp_path / "run", output_dir=tmp_path / "lora", card_prompts=[])
    distill.sample(run=tmp_path / "run", prompts=["a cat, or two"], output_dir=tmp_path / "pictures", steps=[1])
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "pictures/grid.png").is_file()


def test_what_is_public_is_there_and_costs_nothing_until_it_is_used() -> None:
    assert all(getattr(distill, name) is not None for name in distill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trane'; it has trajectories"):
        getattr(distill, "trane")  # noqa: B009
    code = "import sys, distill; assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    "before, now", [("training.config", "config.loading"), ("training.settings", "config.settings")]
)
def test_programs_of_before_find_what_they_import(before: str, now: str) -> None:
    old, new = (importlib.import_module(f"distill.{name}") for name in (before, now))
    assert old.__all__ and all(getattr(old, name) is getattr(new, name) for name in old.__all__)
