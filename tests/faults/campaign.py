"""A whole chain of the toy that meets faults of all kinds at random: `python -m tests.faults.campaign FOLDER 50`.

The chain is lightning_toy with few steps: a store, trainings of one and of two networks, and their exports. It is
started again and again, each time with one fault more, until all have been met and it is done. Every end that a fault
brings must be one of: a run that goes on by itself, one that the same command resumes, or one line that says what a
person must do, which is then done. In the end all exported weights are those of a chain that met none.

What is set makes the chain short, and lets it end at once where a step is not finite (engine.max_nonfinite_steps=1, and
no way back by spikes.rollbacks): with samples that are passed over it would be another chain. All else is as it comes.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.faults.ranks import ROOT
from tests.faults.runs import bits
from tests.forked import python

log = logging.getLogger("campaign")

STEPS, EVERY, SAMPLES = 12, 4, 32
OVERRIDES = [
    f"max_train_steps={STEPS}",
    f"checkpointing_steps={EVERY}",
    f"data.num_samples={SAMPLES}",
    "data.batch_size=16",
    "global_batch_size=8",
    "log_every=1",
    "engine.max_nonfinite_steps=1",
    "spikes.rollbacks=0",
    "watchdog_minutes=0.5",
]
SHORTER = ((r"max_train_steps=\d+", f"max_train_steps={STEPS}"), (r"warmup=\d+", "warmup=2"))
PATIENCE = 900.0  # of one start of the chain
RESUMES = {74, 75, -signal.SIGKILL, -signal.SIGTERM, 1, 3, 4, 130, 137, 143}  # the same command goes on


@dataclass
class Met:
    """One fault, and how the start of the chain that met it ended."""

    kind: str
    code: int
    seconds: float
    said: str
    repaired: str = ""

    @property
    def row(self) -> tuple[str, str]:
        """Its kind, and what followed: it went on, it was resumed, or a person did what a line said."""
        if self.code == 0 or self.repaired == "none needed":
            return self.kind, "went on by itself"
        return self.kind, f"repaired: {self.repaired}" if self.repaired else "resumed by the same command"


def inside(**fault: Any) -> Callable[[Campaign], str]:
    """A fault within the process that trains, of tests/faults/sabotage.py."""

    def put(campaign: Campaign) -> str:
        campaign.faults.write_text(json.dumps([{"rank": 0, **fault}]))
        return ""

    return put


def outside(do: Callable[[Campaign, psutil.Process], None]) -> Callable[[Campaign], str]:
    """A fault from outside, at a moment that is drawn."""

    def put(campaign: Campaign) -> str:
        campaign.act = do
        return ""

    return put


class Campaign:
    """The chain, in a folder, and the faults that it has met."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self.faults, self.spent = folder / "faults.json", folder / "spent"
        self.out, self.act = folder / "disturbed", None
        self.met: list[Met] = []
        text = (ROOT / "configs/chain/lightning_toy.yaml").read_text()
        for pattern, shorter in SHORTER:
            text = re.sub(pattern, shorter, text)
        (folder / "configs/chain").mkdir(parents=True, exist_ok=True)
        (folder / "configs/chain/short.yaml").write_text(text)

    def command(self, out: Path, launch: bool) -> list[str]:
        given = ["--config-dir", str(self.folder / "configs"), "chain=short", f"output_dir={out}"]
        given.append(f"overrides=[{','.join(OVERRIDES)}]")
        if launch:
            given.append(f"launch='{python()} -m tests.faults.once {self.spent} {self.faults}'")
        return [python(), "-m", "distill", "chain", *given]

    def start(self, out: Path, launch: bool = True) -> tuple[int, str, float]:
        """One start of the chain, with what is to happen; its exit code, what it said, and seconds."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
        begun = time.monotonic()
        process = psutil.Popen(
            self.command(out, launch), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if self.act is not None:
            self._in_time(process, out)
        try:
            said, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._end(process)
            raise AssertionError(f"the chain hung:\n{process.communicate()[0].decode()[-4000:]}") from None
        return process.returncode, said.decode(errors="replace"), time.monotonic() - begun

    def _in_time(self, process: psutil.Process, out: Path) -> None:
        """Does what is to happen: some way into whatever link runs, wherever its processes then are."""
        rows = count_rows(out)
        until = rows + self.random.randrange(0, 2 * STEPS)
        more = self.random.random()
        while process.poll() is None and count_rows(out) < until:
            time.sleep(0.05)
        time.sleep(more)
        if process.poll() is None and self.act is not None:
            self.spent.write_text("outside")
            self.act(self, process)

    def _end(self, process: psutil.Process) -> None:
        for one in [process, *process.children(recursive=True)]:
            one.kill()

    # ---- faults ---------------------------------------------------------------------------------------------------

    def kinds(self) -> dict[str, Callable[[Campaign], str]]:
        """What may happen, drawn anew for each start."""
        step = self.random.randrange(STEPS)
        touch = self.random.randrange(1, 40)
        return {
            "SIGKILL of the process that trains": outside(lambda c, p: trainer(p, signal.SIGKILL)),
            "SIGKILL of the launcher": outside(lambda c, p: p.kill()),
            "SIGKILL of every process": outside(lambda c, p: c._end(p)),
            "SIGTERM": outside(lambda c, p: p.terminate()),
            "SIGUSR1": outside(lambda c, p: p.send_signal(signal.SIGUSR1)),
            "SIGSTOP for 5 s": outside(stopped),
            "SIGKILL in a save": inside(do="kill", save=1, touch=touch),
            "a read error for a moment": inside(do="unreadable", batch=1 + step, **{"for": 2}),
            "disk full": inside(do="limit", bytes=8000, step=step),
            "a loss that is not finite": inside(do="nan", of="loss", step=step),
            "a gradient that is not finite": inside(do="inf", of="gradient", step=step),
            "a hang": inside(do="hang", step=step),
            "the clock set forward": inside(do="clock", by=3 * 3600.0, step=step),
            "the clock set back": inside(do="clock", by=-3 * 3600.0, step=step),
            "a checkpoint cut": damaged_checkpoint,
            "a bit of a shard flipped": damaged_shard,
        }

    def meet(self, kind: str) -> Met:
        """Starts the chain with one fault, and does what a line then asks for."""
        self.spent.unlink(missing_ok=True)
        self.faults.write_text("[]")
        self.act = None
        repaired = self.kinds()[kind](self)
        code, said, seconds = self.start(self.out)
        assert "Traceback" not in said, f"{kind}:\n{said[-6000:]}"
        met = Met(kind, code, seconds, said)
        if code not in {0, *RESUMES}:
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            assert lines, f"{kind} ended with {code} and no line:\n{said[-6000:]}"
            met.repaired = self.repair(lines[0])
        elif repaired:
            met.repaired = repaired
        self.wait_for_orphans()
        return met

    def repair(self, line: str) -> str:
        """Does what the line says that a person must do."""
        damage = self.folder / "damage.json"
        if damage.exists() and ("checksum" in line or "damaged" in line or "shard" in line):
            file, offset, byte = json.loads(damage.read_text())
            write_byte(Path(file), offset, byte)
            damage.unlink()
            return "the shard was put back"
        raise AssertionError(f"nobody knows what to do about: {line}")

    def _is_of(self, process: psutil.Process) -> bool:
        return any(str(self.out) in word for word in process.info["cmdline"] or [])

    def wait_for_orphans(self) -> None:
        """The trainer of a launcher that was killed ends by itself."""
        until = time.monotonic() + 120
        while left := [
            p for p in psutil.process_iter(["cmdline"]) if str(self.out) in " ".join(p.info["cmdline"] or [])
        ]:
            assert time.monotonic() < until, left
            time.sleep(0.1)

    def run(self, count: int) -> None:
        """The undisturbed chain, then one that meets `count` faults, each kind in turn in an order that is drawn."""
        code, said, seconds = self.start(self.folder / "undisturbed", launch=False)
        assert code == 0, said[-4000:]
        log.info("undisturbed: %.0f s", seconds)
        kinds: list[str] = []
        begun = time.monotonic()
        while len(self.met) < count:
            if not kinds:
                kinds = list(self.kinds())
                self.random.shuffle(kinds)
            met = self.meet(kinds.pop())
            if not self.spent.exists() and not met.repaired and met.code == 0:
                log.info("the chain was done before %s came", met.kind)
                break
            self.met.append(met)
            eta = (time.monotonic() - begun) / len(self.met) * (count - len(self.met))
            log.info(
                "%d of %d: %s: code %d, %s (%.0f s, eta %.0f s)",
                len(self.met),
                count,
                *met.row[:1],
                met.code,
                met.row[1],
                met.seconds,
                eta,
            )
        self.faults.write_text("[]")
        self.act = None
        code, said, _ = self.start(self.out)
        assert code == 0, said[-4000:]

    def difference(self) -> tuple[int, int]:
        """Tensors of all weights that the chains have exported, and bits in which they differ."""
        from safetensors.numpy import load_file

        compared = differ = 0
        files = sorted((self.folder / "undisturbed").glob("*/export/**/*.safetensors"))
        for file in files:
            other = self.out / file.relative_to(self.folder / "undisturbed")
            ours, theirs = load_file(file), load_file(other)
            assert ours.keys() == theirs.keys(), file
            compared += len(ours)
            differ += sum(bits(ours[name], theirs[name]) for name in ours)
        assert compared > 100, files
        return compared, differ

    def table(self) -> list[str]:
        rows = sorted({met.row for met in self.met})
        count = {row: sum(met.row == row for met in self.met) for row in rows}
        return [
            "| fault | times | what followed |",
            "|---|--:|---|",
            *(f"| {a} | {count[a, b]} | {b} |" for a, b in rows),
        ]


def trainer(launcher: psutil.Process, number: int) -> None:
    for one in launcher.children(recursive=True)[-1:]:
        one.send_signal(number)


def stopped(campaign: Campaign, launcher: psutil.Process) -> None:
    doomed = launcher.children(recursive=True)
    for one in doomed:
        one.suspend()
    time.sleep(5)
    for one in doomed:
        one.resume()


def damaged_checkpoint(campaign: Campaign) -> str:
    """The newest checkpoint of the link that is not done is cut in its middle; if none is there, nothing is."""
    found = sorted(campaign.out.glob("*/checkpoints/step-*/**/*.safetensors"), key=lambda p: p.stat().st_mtime)
    unfinished = [file for file in found if not list(file.parents[2].parent.glob("DONE"))]
    if unfinished:
        os.truncate(unfinished[-1], unfinished[-1].stat().st_size // 2)
    campaign.spent.write_text("checkpoint")
    return "none needed"


def damaged_shard(campaign: Campaign) -> str:
    shards = sorted(campaign.out.glob("store/*.tar")) or sorted(campaign.out.rglob("shard-*.tar"))
    campaign.spent.write_text("shard")
    if not shards:
        return "none needed"
    file = shards[0]
    with file.open("rb") as opened:
        content = opened.read()
    offset = campaign.random.randrange(4096, len(content) // 2)
    (campaign.folder / "damage.json").write_text(json.dumps([str(file), offset, content[offset]]))
    write_byte(file, offset, content[offset] ^ 16)
    return ""


def write_byte(file: Path, offset: int, byte: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(bytes([byte]))


def count_rows(out: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in out.glob("*/metrics.jsonl"))


def main(folder: Path, count: int, seed: int = 0) -> Campaign:
    campaign = Campaign(folder, seed)
    campaign.run(count)
    compared, differ = campaign.difference()
    print("\n".join(campaign.table()))
    print(f"{len(campaign.met)} faults, {compared} tensors compared, {differ} bits different")
    assert differ == 0
    return campaign


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:]))
