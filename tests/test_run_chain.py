"""A chain of real runs on a tiny pipeline: killed, run again, listed, stopped, failing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from distill.commands.chain import locked, main
from distill.config.loading import ConfigError, load
from distill.config.settings import RunChainSettings
from distill.training.chain import links_of
from tests.forked import python, settled
from tests.test_user_commands import PROMPTS, ROOT, run
from tests.tiny import save_tiny

GAME = ["method.teacher_steps=4", "method.student_steps=2", "networks.discriminator.conditional=true"]
LINKS: list[dict[str, Any]] = [
    {"name": "store", "script": "make_trajectories"},
    {
        "name": "mse",
        "export": ["diffusers"],
        "overrides": ["method=lightning_mse", "method.teacher_steps=8", "method.student_steps=4", "max_train_steps=2"],
    },
    {
        "name": "game",
        "teacher": "mse",
        "start": "mse",
        "export": ["diffusers"],
        "overrides": [*GAME, "max_train_steps=12", "learning_rate=1e-3"],
    },
]
CONVERT = {
    "name": "convert",
    "teacher": "game",
    "start": "game",
    "overrides": [
        "method=lightning_convert",
        "student=full_unguided",
        "student.prediction=sample",
        "max_train_steps=2",
    ],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny SDXL-shaped teacher, and settings that make runs short."""
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    teacher = f"model.pretrained_model_name_or_path={save_tiny(folder / 'teacher', 'sdxl')}"
    data = [f"data.prompts={folder}/prompts.txt", "data.num_samples=12", "data.solver_steps=8", "data.keep=all"]
    sizes = ["global_batch_size=4", "lora_rank=2", "lora_alpha=2", "mixed_precision=no", "dataloader_num_workers=0"]
    return [teacher, *data, *sizes, "log_every=1", "checkpointing_steps=4"]


def arguments(output_dir: Path, tiny: list[str], *more: str) -> list[str]:
    """Of scripts/run_chain.py, with `LINKS` in the place of a shipped chain's."""
    given = ["chain=lightning_sdxl", f"chain.links={hydra(LINKS)}", f"overrides={hydra(tiny)}"]
    return [*given, f"output_dir={output_dir}", *more]


def hydra(value: Any) -> str:
    """A value as Hydra's command lines spell it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(x)}" for key, x in value.items()) + "}"
    return "[" + ",".join(map(hydra, value)) + "]" if isinstance(value, list) else f'"{value}"'


def chain(output_dir: Path, tiny: list[str], *more: str) -> None:
    """Runs a chain in this process; its links have processes of their own."""
    main(load("run_chain", RunChainSettings, arguments(output_dir, tiny, *more)))


def listed(output_dir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """Of each link its state and command, as `list=commands` says them."""
    capsys.readouterr()
    chain(output_dir, tiny, "list=commands")
    lines = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    return {name: (state, command) for name, state, _, command in lines}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the runner logs. Its children need this project on their path."""
    monkeypatch.setattr("distill.commands.chain.setup_logging", lambda: None)  # which would take the log away from here
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", python())
    monkeypatch.chdir(ROOT)
    caplog.set_level(logging.INFO, "distill")
    return caplog


@pytest.fixture(scope="module")
def killed(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain all of whose processes were killed in the middle of its third link, between two checkpoints."""
    folder = tmp_path_factory.mktemp("chain") / "out"
    command = [python(), "scripts/run_chain.py", *arguments(folder, tiny)]
    process = psutil.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    metrics = folder / "game" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 6):
        time.sleep(0.01)
    doomed = [process, *process.children(recursive=True)]
    for one in doomed:
        one.kill()
    psutil.wait_procs(doomed, timeout=60)
    settled(process.create_time())
    return folder


def test_a_killed_chain_goes_on_to_the_same_weights(
    killed: Path, tiny: list[str], said: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit; then there is nothing left to do."""
    before = listed(killed, tiny, capsys)
    assert [state for state, _ in before.values()][:2] == ["done", "done"]
    assert before["game"][0] in ("at step 4 of 12", "at step 8 of 12")
    chain(killed, tiny)
    lines = [record.getMessage() for record in said.records]
    assert lines[:2] == ["link 1 of 3: store is done", "link 2 of 3: mse is done"]
    assert lines[2].startswith(f"link 3 of 3: game, {before['game'][0]}; about 00:") and len(lines) == 3
    assert {state for state, _ in listed(killed, tiny, capsys).values()} == {"done"}

    run("bash", "-c", before["game"][1].replace(f"output_dir={killed}/game", f"output_dir={killed}/whole"))
    whole, again = weights(killed / "whole"), weights(killed / "game")
    assert whole.keys() == again.keys() and {name.split("/")[0] for name in whole} == {"student", "discriminator"}
    assert all(torch.equal(w, again[name]) for name, w in whole.items())

    said.clear()
    written = times(killed)
    chain(killed, tiny)
    assert [record.getMessage()[-4:] for record in said.records] == ["done"] * 3 and times(killed) == written
    for other, line in {
        "learning_rate=1e-5": "link mse: .*/mse was made with learning_rate=.*, this chain has 1e-05: choose another",
        "max_train_steps=5": "link game: .*/game was made with max_train_steps=12, this chain has 5",
        "data.solver_steps=16": "link store: .*/store was made with data.solver_steps=.*, this chain has 16",
    }.items():
        with pytest.raises(ConfigError, match=line):
            chain(killed, [*tiny, other])
    assert times(killed) == written


def test_a_damaged_store_ends_the_chain_where_it_is_verified(
    killed: Path, tiny: list[str], tmp_path: Path, said: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(killed / "store", tmp_path / "store")
    shard = tmp_path / "store" / "shard-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    links = f"chain.links={hydra([LINKS[0], {'name': 'verify', 'script': 'verify_shards'}])}"
    with pytest.raises(SystemExit) as ended:
        chain(tmp_path, tiny, links)
    assert ended.value.code == 1
    assert "error: link verify ended with exit code 1" in capfd.readouterr().err
    shard.write_bytes(whole)
    chain(tmp_path, tiny, links)
    said.clear()
    chain(tmp_path, tiny, links)
    assert said.records[-1].getMessage() == "link 2 of 2: verify is done"


@pytest.mark.slow
def test_a_link_is_added_whose_network_predicts_clean_data(
    killed: Path, tiny: list[str], said: pytest.LogCaptureFixture
) -> None:
    """A whole network that starts from a LoRA and is taught by it."""
    chain(killed, tiny, f"chain.links={hydra([*LINKS, CONVERT])}")
    exported = killed / "convert" / "export"
    assert json.loads((exported / "distill.json").read_text())["prediction"] == "sample"
    unet = UNet2DConditionModel.from_pretrained(exported / "unet")
    assert not any("lora" in name for name, _ in unet.named_parameters())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints" / "step-00000012").rglob("*.safetensors"))
    return {f"{file.parent.name}/{file.name}/{name}": w for file in files for name, w in load_file(file).items()}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_failing_link_ends_the_chain_in_one_line_with_its_exit_code(
    tiny: list[str], tmp_path: Path, said: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        chain(tmp_path, tiny, "launch='bash -c \"exit 7\"'")
    line = f"error: link store ended with exit code 7, see above; its run is {tmp_path}/store\n"
    assert ended.value.code == 7 and capfd.readouterr().err == line
    with pytest.raises(ConfigError, match="link=game builds on store, which is not started, not done"):
        chain(tmp_path, tiny, "link=game")


@pytest.mark.parametrize("code", ["75", "1"])
def test_a_preempted_link_ends_the_chain_with_75_under_a_launcher_too(
    code: str, tiny: list[str], tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    """A launcher exits with 1 whatever its processes say; that a run was stopped shows in the mark it left, if new."""
    marker = tmp_path / "store" / "PREEMPTED"
    marker.parent.mkdir()
    marker.write_text("2\n")
    with pytest.raises(SystemExit) as ended:
        chain(tmp_path, tiny, f"launch='bash -c \"exit {code}\"'")
    assert ended.value.code == int(code)
    with pytest.raises(SystemExit) as ended:
        chain(tmp_path, tiny, f"launch='bash -c \"sleep .01; touch {marker}; exit {code}\"'")
    assert ended.value.code == 75
    assert said.records[-1].getMessage().startswith("link store was stopped and is saved")


def test_a_signal_reaches_the_running_link_and_ends_the_chain(
    tiny: list[str], tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    """The link has the time it needs to save."""
    (tmp_path / "child.sh").write_text("trap 'sleep .2; exit 75' TERM; touch $0.ready; while :; do sleep .01; done")

    def interrupt() -> None:
        while not (tmp_path / "child.sh.ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as ended:
        chain(tmp_path, tiny, f"launch='bash {tmp_path}/child.sh'")
    thread.join()
    assert ended.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_link_is_not_run_twice_at_once_even_if_its_runner_was_killed(tiny: list[str], tmp_path: Path) -> None:
    """What the runner had started may live on, and then holds the lock. A store may have several writers."""
    alone = f"chain.links={hydra([LINKS[1] | {'overrides': [*LINKS[1]['overrides'], 'data.store=S']}])}"
    (mse,) = links_of(load("run_chain", RunChainSettings, arguments(tmp_path, tiny, alone)).chain, tmp_path, tiny)
    with locked(mse) as lock:
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    with pytest.raises(ConfigError, match="link mse is being run in .* by another process"):
        chain(tmp_path, tiny, alone)
    orphan.kill()
    orphan.wait()
    with locked(mse):
        pass
    store, *_ = links_of(load("run_chain", RunChainSettings, arguments(tmp_path, tiny)).chain, tmp_path, tiny)
    with locked(store), locked(store):
        pass
