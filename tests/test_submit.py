"""scripts/submit.py without a cluster: what it refuses, and what it writes. With one: tests/slurm."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from distill.commands.submit import main
from distill.config.loading import ConfigError, given, load
from distill.config.settings import SubmitSettings, TrainSettings

TOY = ["experiment=lcm_toy", "slurm.script=make_trajectories"]


def submit(*settings: str) -> None:
    main(load("submit", SubmitSettings, settings))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["slurm.nodes=0"], "slurm.nodes=0: must be greater than or equal to 1"),
        (["slurm.time=1h"], "slurm.time: '1h' is not a time such as 12:00:00 or 2-00:00:00"),
        (["slurm.time=60"], "slurm.time: '60' is not a time such as 12:00:00 or 2-00:00:00"),
        (["slurm.mem=lots"], "slurm.mem: 'lots' is not an amount of memory such as 200G"),
        (["slurm.account='a\n#SBATCH --x'"], "slurm.account: 'a\\n#SBATCH --x' is not a name"),
        (["slurm.options=['--qos=high low']"], "slurm.options.0: '--qos=high low' is not an option of sbatch such as"),
        (["slurm.partitoin=a"], "unknown key 'slurm.partitoin' (did you mean 'slurm.partition'?)"),
        (["slurm.script=train", "slurm.array=4"], "slurm.array is for slurm.script=make_trajectories"),
        (["slurm.script=train", "slurm.nodes=2"], "engine=single is one process, and the job has 2: set engine=zero2"),
        (
            ["slurm.script=train", "engine=zero2", "slurm.nodes=3", "slurm.gpus_per_node=7"],
            "global_batch_size=64 must be a multiple of 21: 21 processes x gradient_accumulation_steps=1",
        ),
        (["data.prompts=null"], "data.prompts has no value: set data.prompts=FILE"),
    ],
)
def test_what_the_job_would_end_with_is_said_before_it_is_submitted(
    settings: list[str], line: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        submit(*TOY, f"output_dir={tmp_path}/run", *settings)
    assert str(error.value).startswith(line)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_what_a_job_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a run"
    shape = ["slurm.array=3", "slurm.nodes=2", "slurm.time=1:00:00", "slurm.mem=8G", "slurm.grace_seconds=300"]
    submit(*TOY, f"output_dir={folder}", *shape, "slurm.options=['--qos=high']", "dry_run=true")
    written = folder / "slurm" / "make_trajectories.yaml"
    assert given([f"settings={written}"], "train", TrainSettings) == load(
        "train", TrainSettings, [TOY[0], f"output_dir={folder}"]
    )
    script = (folder / "slurm" / "trajectories.sbatch").read_text()
    assert capsys.readouterr().out == f"{script}\n{written.read_text()}\n"
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.splitlines()
    said = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--array=0-2", "--nodes=2", "--time=1:00:00", "--mem=8G", "--qos=high", "--requeue"} <= set(said)
    assert f'--output="{folder}/slurm/%x-%A-%a.log"' in said
    assert said.index("--signal=B:USR1@300") > said.index("--signal=B:USR1@180")  # sbatch takes the last
    assert not any("gpus" in line or "None" in line for line in said)
    assert f"set -- 'settings={written}'" in lines and "export GRACE_SECONDS=300" in lines
    with pytest.raises(ConfigError, match="is all of the settings: nothing may be given beside it"):
        given([f"settings={written}", "seed=1"], "train", TrainSettings)


def test_the_settings_of_a_job_are_not_composed_again(tmp_path: Path) -> None:
    """What a job runs is what was submitted, whatever has become of configs/ since."""
    submit(*TOY, f"output_dir={tmp_path}/run", "dry_run=true")
    written = tmp_path / "run" / "slurm" / "make_trajectories.yaml"
    changed = yaml.safe_load(written.read_text()) | {"lr_warmup_steps": 77}  # as no config says it
    written.write_text(yaml.safe_dump(changed))
    assert given([f"settings={written}"], "train", TrainSettings).lr_warmup_steps == 77


def test_without_sbatch_the_script_is_written_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not installed here; .* is written"):
        submit(*TOY, f"output_dir={tmp_path}/run")
    assert (tmp_path / "run" / "slurm" / "trajectories.sbatch").is_file()
