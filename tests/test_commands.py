"""The commands before their work begins: a mistake shows at once, and nothing heavy is loaded for it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from distill.commands import SETTINGS

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "transformers", "diffusers", "accelerate", "deepspeed", "numpy", "huggingface_hub"]
NEEDED = {
    "evaluate": ["protocol=toy", "output_dir=e"],
    "export": ["run=r", "output_dir=e"],
    "plan": ["cluster=laptop", "experiment=quickstart"],
    "report": ["evaluations=[a,b]", "output_dir=e"],
    "run_chain": ["chain=lcm_toy"],
    "sample": ["prompts=[a]", "output_dir=p"],
    "submit": ["experiment=quickstart"],
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
    needed = {name: NEEDED.get(name, ["experiment=quickstart"]) for name in SETTINGS}
    command = [sys.executable, "-c", ALL_COMMANDS, " ".join(HEAVY), json.dumps(needed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    ended = json.loads(done.stdout)
    assert len(ended) == 2 * len(SETTINGS)
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
