"""The commands before their work begins: a mistake shows at once, and nothing heavy is loaded for it."""

from __future__ import annotations

import errno
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distill.commands import COMMANDS
from distill.commands.flags import with_words
from distill.commands.running import run_script
from distill.config.composition import CONFIG_DIRS
from distill.config.describe import described
from distill.config.loading import load
from distill.config.overrides import fields_of, kinds_of
from distill.config.settings import TrainSettings, VerifySettings

ROOT = Path(__file__).parents[1]
WITH_SETTINGS = [name for name, command in COMMANDS.items() if command.settings is not None]
HEAVY = ["torch", "transformers", "diffusers", "accelerate", "deepspeed", "numpy", "huggingface_hub"]
NEEDED = {
    "evaluate": ["protocol=toy", "output_dir=e"],
    "export": ["run=r", "output_dir=e"],
    "plan": ["cluster=laptop", "experiment=quickstart"],
    "quickstart": ["output_dir=q"],
    "report": ["evaluations=[a,b]", "output_dir=e"],
    "chain": ["chain=lcm_toy"],
    "sample": ["prompts=[a]", "output_dir=p"],
    "submit": ["experiment=quickstart"],
    "verify": ["store=s"],
    "watch": ["runs=[r]"],
    "benchmark": ["measure=memory"],
}
ALL_COMMANDS = """
import contextlib, io, json, sys
from distill.commands import run
ended, heavy, needed = {}, sys.argv[1].split(), json.loads(sys.argv[2])
for name, arguments in needed.items():
    for more in (["no_such_key=1"], ["--cfg"]):
        sys.argv = [f"{name}.py", *arguments, *more]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                run(name)
            except SystemExit as end:
                said = [out.getvalue(), err.getvalue()]
                ended[f"{name} {more[0]}"] = [end.code or 0, *said, [one for one in heavy if one in sys.modules]]
print(json.dumps(ended))
"""


def test_settings_are_checked_and_shown_before_anything_heavy_is_imported() -> None:
    needed = {name: NEEDED.get(name, ["experiment=quickstart"]) for name in WITH_SETTINGS}
    command = [sys.executable, "-c", ALL_COMMANDS, " ".join(HEAVY), json.dumps(needed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    ended = json.loads(done.stdout)
    assert len(ended) == 2 * len(WITH_SETTINGS)
    for name, (code, out, err, heavy) in ended.items():
        assert not heavy, name
        if name.endswith("--cfg"):
            assert code == 0 and out.count("\n") > 2 and not err, (name, err)
        else:
            assert code == 2 and err.startswith("error: ") and "no_such_key" in err and not out, (name, err)


@pytest.mark.parametrize("command", [["scripts/train.py"], ["-m", "distill.commands.train"]], ids=["script", "module"])
def test_a_mistake_shows_within_a_second_and_a_half(command: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = [sys.executable, *command, "experiment=quickstart", "no_such_key=1"]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    # The processor's time: the clock's depends on what else the machine does.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.5


def said_by(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code and output of a command, in this process."""
    monkeypatch.setattr(sys, "argv", [f"distill {name}", *arguments])
    capsys.readouterr()
    try:
        code = COMMANDS[name].run([name])
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_help_says_what_a_command_does_and_which_settings_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = said_by("train", monkeypatch, capsys, "--help")
    assert code == 0 and said.startswith("Trains a few-step student") and "  max_train_steps=4000" in said
    assert "engine: ddp, single, zero1" in said


def test_every_command_line_is_read_in_one_way() -> None:
    """Key=value, by one reader of settings: no parser of flags beside it."""
    files = [path for folder in ("distill", "scripts", "slurm") for path in (ROOT / folder).rglob("*.*")]
    assert len(files) > 200
    for path in files:
        if path.suffix in (".py", ".sh", ".sbatch"):
            assert not re.search(r"argparse|getopt|optparse|import click|import fire", path.read_text()), path


INFORMATION = {
    "defaults": ["experiment/quickstart", "the top", "/configs/experiment/quickstart.yaml"],
    "defaults-tree": ["    experiment: quickstart", "    reward@validation_reward: toy", "    model: toy"],
    "searchpath": ["/configs"],
    "plugins": ["torch.optim.*", "distill.methods.*"],
    "config": ["max_train_steps: 350"],
}


def test_information_says_which_files_settings_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(CONFIG_DIRS, "")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /model: toy\n")
    given = ["data.store=s", "experiment=quickstart"]
    for kind, expected in INFORMATION.items():
        code, said, err = said_by("train", monkeypatch, capsys, *given, "--info", kind)
        assert (code, err) == (0, "") and all(part in said for part in expected), said
    code, said, _ = said_by("train", monkeypatch, capsys, *given, "--info")
    assert code == 0 and all(part in said for parts in INFORMATION.values() for part in parts)
    mine = ["data.store=s", "experiment=mine", "--config-dir", str(tmp_path)]
    assert f"{tmp_path}/experiment/mine.yaml" in said_by("train", monkeypatch, capsys, *mine, "--info=defaults")[1]
    assert f"--config-dir  {tmp_path}" in said_by("train", monkeypatch, capsys, *mine, "--info", "searchpath")[1]


def test_a_part_of_the_settings_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    toy = ["experiment=quickstart"]
    assert said_by("train", monkeypatch, capsys, *toy, "--cfg", "-p", "data.dtype")[:2] == (0, "float16\n\n")
    _, said, _ = said_by("train", monkeypatch, capsys, *toy, "--cfg=job", "--package=optimizer")
    assert yaml.safe_load(said)["_target_"] == "torch.optim.AdamW"
    whole = said_by("train", monkeypatch, capsys, *toy, "--cfg", "all")
    assert whole == said_by("train", monkeypatch, capsys, *toy, "--cfg") and whole[0] == 0


@pytest.mark.parametrize(
    "words, settings",
    [
        (["runs/lr=1e-4/store"], ["store=runs/lr=1e-4/store"]),
        (["s3://x/y?v=1", "a.tar", "b's.tar"], ["store=s3://x/y?v=1", r"shards=['a.tar','b\'s.tar']"]),
        (["store=s", "add_checksums=true"], ["store=s", "add_checksums=true"]),
        (["s", "add_checksums=true"], ["add_checksums=true", "store=s"]),
        (["."], ["store=."]),
    ],
)
def test_words_stand_for_settings(words: list[str], settings: list[str]) -> None:
    assert with_words(words, ("store", "shards"), VerifySettings) == settings
    read = load("verify", VerifySettings, settings)
    assert read.store == settings[-1 if "add" in settings[0] else 0].partition("=")[2]
    assert read.shards == (["a.tar", "b's.tar"] if len(words) == 3 else [])


def test_a_benchmark_has_the_settings_that_it_measures_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, said, _ = said_by("benchmark", monkeypatch, capsys, "step", "size=sd15", "--cfg")
    assert yaml.safe_load(said) | {"repeats": 5, "batch_size": 1, "samples": None} == yaml.safe_load(said)
    for wrong, line in WRONG_BENCHMARKS.items():
        code, _, said = said_by("benchmark", monkeypatch, capsys, *wrong.split())
        assert code == 2 and line in said and said.count("\n") == 1, said


WRONG_BENCHMARKS = {
    "memory size=toy": "size is without effect on measure=memory, whose settings are: none",
    "lcm batch_size=3": "batch_size is without effect on measure=lcm, whose settings are: size, rounds, repeats",
    "lcm deterministic=false": "deterministic is a setting of measure=step",
    "reader samples=[1,2]": "samples of measure=reader are one number",
    "stop": "measure='stop': must be 'step', ",
    "step lcm": "'lcm' is one word too many: allowed are MEASURE, and key=value",
    "step --size sd15": "settings have no dashes, write size=sd15",
}


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_every_setting_says_what_it_means(name: str) -> None:
    command = COMMANDS[name]
    assert command.settings is not None
    found = {one.key: one for one in described(command.config, command.settings)}
    assert [key for key, one in found.items() if not one.said or not one.default] == []
    flat = {key for key, hint in fields_of(command.settings).items() if kinds_of(hint) != {dict}}
    assert {key for key in flat if key not in found} <= NOT_BY_DEFAULT, name
    assert all(one.kind for key, one in found.items() if key in flat)


NOT_BY_DEFAULT = {f"data.{key}" for key in ("images", "min_size", "max_aspect_ratio", "crop", "vae")}
NOT_BY_DEFAULT |= {"cluster.device", "protocol.tuning_n", "chain.experiment", "chain.overrides", "chain.links"}
"""Keys of files that a group does not choose by itself."""


@pytest.mark.parametrize(
    "typed",
    [
        ["scripts/train.py", "experiment=quickstart", "--cfg"],
        ["-m", "distill", "--help"],
        ["-m", "distill", "configs"],
        ["-m", "distill", "doctor", "--help"],
        ["-m", "distill", "study", "compare", "--help"],
        ["-m", "distill", "-sc", "install=bash"],
    ],
    ids=" ".join,
)
def test_output_that_nobody_reads_to_its_end_is_no_error(typed: list[str]) -> None:
    command = [sys.executable, *typed]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        said = running.stderr.read()
    assert said == "" and running.returncode in (0, 141)


FLAGS = {
    "a flag for a key": (["--output_dir=runs/x"], "write output_dir=runs/x"),
    "a flag and its value": (["--max_train_steps", "300"], "write max_train_steps=300"),
    "another script's name": (["--train_batch_size", "4"], "did you mean 'global_batch_size'"),
    "another script's key": (["train_batch_size=4"], "did you mean 'global_batch_size'"),
    "a key without its group": (["resolution=512"], "did you mean 'model.resolution'"),
    "a list without brackets": (["preemption_signals=SIGTERM,SIGUSR1"], "preemption_signals=[SIGTERM,SIGUSR1]"),
    "a range without brackets": (["data.guidance=4,16"], "data.guidance=[4,16]"),
    "two numbers for one": (["max_train_steps=2,4"], "one value is wanted"),
    "a list that the shell cut": (["preemption_signals=[SIGTERM,", "SIGUSR1]"], "put into quotes"),
    "a key of another file": (["data.images=x"], "add data=images"),
    "a key of another file, the other way": (["data=images", "data.solver=ddim"], "add data=trajectories"),
    "a folder for a group": (["model=/a/teacher"], "model.pretrained_model_name_or_path="),
    "a part of what is not chosen": (["reward.path=x"], "set reward=NAME"),
    "another word for true": (["gradient_checkpointing=yes"], "must be true or false"),
    "an old flag": (["--gradient_checkpointing"], "write gradient_checkpointing=true"),
    "Hydra's name of a file": (["--config-name=train"], "choose a file by its group, such as experiment=NAME"),
    "Hydra's folder of a run": (["hydra.run.dir=x"], "did you mean 'output_dir'"),
    "information that there is not": (["--info", "parts"], "allowed are all, config, defaults"),
    "a part without the settings": (["--package", "data"], "add --cfg"),
    "a part that there is not": (["--cfg", "--package", "dota"], "there is no such key"),
    "nothing": (["global_batch_size=null"], "global_batch_size=null: must be an integer"),
}


@pytest.mark.parametrize("kind", FLAGS)
def test_a_line_says_what_to_type(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = FLAGS[kind]
    monkeypatch.setattr(sys, "argv", ["train.py", "data.store=s", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_script(lambda settings: None, "train", TrainSettings)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and expected in said, said


@pytest.mark.parametrize(
    "error, code, expected",
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "/a/b: permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xxx"), 2, "xxx: file name too long"),
        (OSError(errno.ENOSPC, "No space left on device"), 74, "no space left on device"),
        (ModuleNotFoundError("No module named 'no_such'", name="no_such.part"), 2, "pip install no_such"),
        (ImportError("Install s3fs to access S3"), 2, "Install s3fs"),
    ],
)
def test_what_is_wrong_around_a_command_is_one_line(
    error: Exception, code: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended_with(error, monkeypatch) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and expected in said


@pytest.mark.parametrize(
    "bug",
    [OSError(errno.EBADF, "Bad file descriptor"), ImportError("cannot import", name="distill.data"), KeyError("x")],
)
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(bug)):
        ended_with(bug, monkeypatch)


def ended_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command whose work raises this."""

    def work(settings: object) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py", "data.store=s"])
    with pytest.raises(SystemExit) as ended:
        run_script(work, "train", TrainSettings)
    return ended.value.code


def test_a_library_that_warns_at_import_does_not_reach_the_user() -> None:
    program = """
import logging, sys
from distill.commands import COMMANDS, run_command
sys.argv = ["distill doctor", "--help"]
try:
    run_command(["doctor"], COMMANDS["doctor"])
except SystemExit:
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("install kernels")
    logging.getLogger("distill").warning("a word of our own")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "a word of our own" in ran.stderr and "kernels" not in ran.stderr
