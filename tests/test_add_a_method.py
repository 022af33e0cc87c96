"""The page "Extending", "Add a method", done as it says: its file, YAML and command; what comes out can be exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

from tests.forked import python

ROOT = Path(__file__).parents[1]
SMALL = ["data.num_samples=8", "data.samples_per_shard=8", "data.batch_size=8", "global_batch_size=4"]
SMALL += ["data.solver_steps=10", "max_train_steps=3", "lr_warmup_steps=0", "checkpointing_steps=3", "log_every=1"]
SMALL += ["validation_prompts=null", "engine=single", "dataloader_num_workers=0"]


def test_the_method_of_the_page_trains_and_is_exported_with_its_title(tmp_path: Path) -> None:
    section = (ROOT / "docs/extending.md").read_text().partition("## Add a method")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))
    for folder in ("distill", "configs", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for block, file in re.findall(r"`((?:distill|configs)/\S+\.(?:py|yaml))`:\n\n```(\w+)", section):
        (tmp_path / block).write_text(blocks[file])
    store = [f"data.store={tmp_path}/store", f"output_dir={tmp_path}/run"]
    program, *command = blocks["bash"].split()
    said = run(
        tmp_path,
        ["trajectories", "experiment=quickstart", *SMALL, *store],
        [*command, *SMALL, *store],
        ["export", f"run={tmp_path}/run", f"output_dir={tmp_path}/export", "card_prompts=[]"],
    )
    assert program == "distill" and "experiment=quickstart sets method.skip for method=lcm" in said
    assert "weight: 0.5" in (tmp_path / "run" / "config.yaml").read_text()
    assert re.search(r"title = \"(.+)\"", blocks["python"])[1] in (tmp_path / "export" / "README.md").read_text()


ONE_AFTER_ANOTHER = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = ["distill", *command]
    try:
        runpy.run_module("distill", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
"""


def run(folder: Path, *commands: list[str]) -> str:
    """Those of the copy in `folder`, not of the repository; in one process, which loads torch once."""
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(
        [python(), "-c", ONE_AFTER_ANOTHER, json.dumps(commands)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.stdout + ended.stderr
