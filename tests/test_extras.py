"""Without the packages of the extras: training works, and what needs one says so before any work, in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config.mistakes import ConfigError
from distill.config.packages import EXTRAS, install_line, is_installed, require
from tests.test_floors import DISTRIBUTIONS
from tests.test_project_files import PYPROJECT

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_that_of_pyproject() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    declared = {
        re.split(r"[><=\[]", text)[0].lower(): name
        for name, texts in extras.items()
        if name not in ("all", "dev")
        for text in texts
    }
    assert {DISTRIBUTIONS.get(package, package).lower(): extra for package, extra in EXTRAS.items()} == declared
    assert extras["all"] == [f"distill[{','.join(sorted(set(declared.values())))}]"]


def test_a_missing_package_is_one_line() -> None:
    require("this", "torch")
    assert not is_installed("no_such_package")
    with pytest.raises(ConfigError, match=r"^this needs the package no_such_package, .*: pip install no_such_package$"):
        require("this", "torch", "no_such_package")
    assert install_line("open_clip") == "pip install 'distill[evaluation]'"


SCRIPT = '''
import importlib, json, sys
from contextlib import redirect_stderr
from importlib.machinery import PathFinder
from io import StringIO
from pathlib import Path


class Others:
    """What Python finds packages with, where some are not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in PACKAGES else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*context):
        found = PathFinder.find_distributions(*context)
        return (one for one in found if one.name.lower().replace("_torch", "") not in PACKAGES)


def ended(name, *arguments):
    sys.argv = [f"distill {name}", *arguments]
    with redirect_stderr(StringIO()) as stream:
        try:
            code = COMMANDS[name].run()
        except SystemExit as end:
            code = end.code
    return [code, (stream.getvalue().strip().splitlines() or [""])[-1]]


PACKAGES = set(json.loads(sys.argv[1]))
toy = json.loads(sys.argv[2])
sys.meta_path[sys.meta_path.index(PathFinder)] = Others
from distill.commands import COMMANDS

root = Path(sys.argv[3]) / "distill"
rooms = ("diffusion", "data", "models", "toy", "methods", "config", "training", "planning", "commands", "benchmarks")
for path in sorted(path for room in rooms for path in (root / room).glob("*.py")):
    importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"))
found = {
    "store": ended("trajectories", *toy),
    "zero2": ended("train", *toy, "engine=zero2", "output_dir=zero2"),
    "wandb": ended("train", *toy, "tracking=wandb", "output_dir=wandb"),
    "train": ended("train", *toy, "output_dir=run"),
    "sample": ended("sample", "run=run", "prompts=[a]", "steps=[1]", "output_dir=pictures"),
    "coco": ended("evaluate", "student=run", "protocol=coco2017-5k", "protocol.prompts=a.txt", "output_dir=coco"),
}
try:
    import distill

    distill.as_webdataset("store")
except ImportError as error:
    found["webdataset"] = [1, str(error)]
print(json.dumps(found))
'''


def test_training_needs_none_of_them_and_each_missing_one_is_said_before_any_work(tmp_path: Path) -> None:
    toy = ["experiment=quickstart", "engine=single", "data.store=store", "data.num_samples=4"]
    toy += ["data.samples_per_shard=4", "data.solver_steps=10", "global_batch_size=4", "max_train_steps=1"]
    toy += ["lr_warmup_steps=0", "dataloader_num_workers=0", "validation_prompts=null"]
    (tmp_path / "a.txt").write_text("a cat\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [json.dumps(sorted(EXTRAS)), json.dumps(toy), str(ROOT)]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for works in ("store", "train", "sample"):
        assert found[works][0] == 0, found[works]
    for name, extra in (("zero2", "deepspeed"), ("wandb", "wandb"), ("coco", "evaluation")):
        assert found[name][0] == 2 and found[name][1].endswith(f"pip install 'distill[{extra}]'"), found[name]
        assert not (tmp_path / name / "checkpoints").exists()
    assert found["webdataset"][1].endswith("pip install 'distill[webdataset]'")
    assert (tmp_path / "pictures/steps-1/00000.png").is_file()
