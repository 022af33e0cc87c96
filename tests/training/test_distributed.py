"""Two real processes over gloo, and real ZeRO, against one process.

Each launch costs seconds before its first step, so there are three for all tests: one trains every case, one goes on
from the checkpoints of the first, and one runs ZeRO as `accelerate launch` starts it without being told anything.
Further pairs of stages and networks are behind the marker `slow`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.diffusion.random import Context
from distill.methods.mlcm import MLCM
from distill.training.checkpoint import CheckpointError, _write_manifest, read_weights
from tests.forked import python
from tests.training.engine_worker import GLOBAL_BATCH, ROLLOUT, SCHEDULE, relative_distance
from tests.training.engine_worker import run as run_here
from tests.training.test_checkpoint import Bomb

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
MAX_GRAD_NORM = 0.02
STEPS = 6
POISON = {"1": [7]}  # the last sample of the second step's global batch: on one rank of two, in its second micro-batch
TWO = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


def engine(name: str, **changes: Any) -> dict[str, Any]:
    """Settings of an engine, by its name; two micro-batches a step, and clipping that takes hold."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_grad_norm": MAX_GRAD_NORM, **changes}
    if not name.startswith("zero"):
        return {**settings, "kind": name}
    stage, _, other = name.removeprefix("zero").partition("/")  # zero3/2: the discriminator at stage 2
    zero: dict[str, Any] = {"stage": int(stage), "reduce_bucket_size": 1_000_000}
    if stage == "3":
        zero["stage3_param_persistence_threshold"] = 20  # biases stay whole; by default all of so small a network would
    deepspeed = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}
    stages = {"stages": {"discriminator": int(other)}} if other else {}
    return {**settings, "kind": "deepspeed", "deepspeed": deepspeed, **stages}


# name of the case: engine, method, and what is special about it
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddp-lora": ("ddp", "distance", {"poison": POISON, "save_at": [3], "validate": True}),
    "zero1-lcm": ("zero1", "lcm", {"save_at": [2, 3], "unwritable": [1, 3]}),
    "zero2-lora": ("zero2", "distance", {"poison": POISON, "signal": [1, 3]}),
    "zero2-duel": ("zero2", "duel", {"save_at": [3, 6]}),
    "zero2-critics": ("zero2", "critics", {"save_at": [3, 6]}),
    "zero2-rewarded": ("zero2", "rewarded", {}),
    "zero2-rcm": ("zero2", "rcm", {"save_at": [3, 6]}),  # its student trains in every second step: 3 is within a period
    "zero2-fp16": ("zero2", "distance", {"mixed_precision": "fp16", "save_at": [3, 6]}),
    "zero2-one-network": ("zero2", "one-network", {"gradient_checkpointing": True, "save_at": [3]}),
    # ZeRO-3 replaces torch's linear for the rest of the process: what comes after it rounds in another way
    "zero3-lora": ("zero3", "distance", {"poison": POISON, "save_at": [3, 6], "validate": True}),
    "zero2-sgd": ("zero2", "distance", {"optimizer": "sgd", "save_at": [3]}),
    "zero2-bf16": ("zero2", "distance", {"mixed_precision": "bf16"}),
    "ddp-lcm": ("ddp", "lcm-ema", {}),
    "zero3-lcm": ("zero3", "lcm-ema", {"save_at": [3, 6]}),
    "ddp-game": ("ddp", "game", {"gradient_checkpointing": True}),
    "zero2-game-lora": ("zero2", "game-lora", {"gradient_checkpointing": True, "save_at": [3, 6]}),
    "zero32-game": ("zero3/2", "game", {"gradient_checkpointing": True, "save_at": [3, 6]}),
    # Last: ZeRO-3 numbers the weights of a process, and its files, which are compared to the bit, have the numbers.
    "zero3-adagrad": ("zero3", "distance", {"optimizer": "adagrad", "save_at": [3]}),
}
OF_ENGINE = ("mixed_precision", "gradient_checkpointing", "compute_twice_steps")
TWICE = ("ddp-game", "zero1-lcm", "zero2-duel", "zero2-bf16", "zero3-lcm", "zero32-game")
RESUMED = {"zero2-lora": "latest", "zero2-duel": "latest", "zero2-critics": 3, "zero2-rcm": 3, "zero2-fp16": 3}
RESUMED |= {"zero3-lora": 3, "zero3-lcm": 3, "zero2-game-lora": 3, "zero32-game": 3}
HALVES = ("bf16", "fp16")
HAS_FP16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
"""Whether DeepSpeed computes in float16 here: on CPUs it asks this, and refuses it on many."""
if not HAS_FP16:
    del CASES["zero2-fp16"], RESUMED["zero2-fp16"]
needs_fp16 = pytest.mark.skipif(not HAS_FP16, reason="DeepSpeed has no float16 on this processor")
# Games under every stage and pair of stages that is not among the cases above, a whole student and a LoRA each.
GAMES = {
    f"{kind.replace('/', '')}-{method}": (kind, method, {"gradient_checkpointing": True})
    for method in ("game", "game-lora")
    for kind in ("ddp", "zero1", "zero2", "zero3", "zero3/2", "zero2/1", "zero1/3")
    if f"{kind.replace('/', '')}-{method}" not in CASES
}
# What the cases above have under other engines.
OTHERS = {f"ddp-{method}": ("ddp", method, {}) for method in ("duel", "critics", "rewarded", "one-network")}
OTHERS["zero2-lcm"] = ("zero2", "lcm-ema", {})
OTHERS["zero3-rollout"] = ("zero3", "rollout", {})
OTHERS |= {f"{kind}-{method}": (kind, method, {}) for kind in ("zero2", "zero3") for method in ("tcd", "pcm")}
# A student that trains at some steps only, and gradients through frozen networks that are partitioned.
OTHERS |= {f"{kind}-dmd2": (kind, "dmd2", {}) for kind in ("zero2", "zero3")}
OTHERS |= {f"{kind}-sid": (kind, "sid", {"gradient_checkpointing": True}) for kind in ("zero2", "zero3")}
ALONG_SOLVES = ("scm", "rcm", "flash", "kd", "ladd")
OTHERS |= {f"{kind}-{method}": (kind, method, {}) for kind in ("zero2", "zero3") for method in ALONG_SOLVES}
OTHERS.pop("zero2-rcm")  # is among the cases above
OTHERS["zero3-rectified"] = ("zero3", "rectified", {})
OF_FP16 = ("ddp", "zero1", "zero3") if HAS_FP16 else ("ddp",)
OTHERS |= {f"{kind}-fp16": (kind, "distance", {"mixed_precision": "fp16"}) for kind in OF_FP16}


def case(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    kind, method, special = (CASES | GAMES | OTHERS)[name]
    special = {**special, **changes}
    of_engine = {key: special.pop(key) for key in OF_ENGINE if key in special}
    common = {"engine": engine(kind, **of_engine), "method": method, "steps": STEPS}
    return {**common, "run": str(folder / name), **special}


def launch(folder: Path, cases: dict[str, Any], *flags: str) -> tuple[dict[str, dict[str, Any]], str]:
    """What rank 0 wrote for each case, and what all ranks printed."""
    folder.mkdir()
    plan = folder / "cases.json"
    plan.write_text(json.dumps({"out": str(folder), "cases": cases}))
    command = [python(), "-m", "accelerate.commands.launch", *flags, "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-m", "tests.training.engine_worker", str(plan)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return {name: torch.load(folder / f"{name}.pt") for name in cases}, done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Every case, from its start on two processes; of some, every second step is computed twice, which changes nothing:
    so it is in no other launch."""
    twice = {name: {"compute_twice_steps": 2} for name in TWICE}
    cases = {name: case(name, folder, **twice.get(name, {})) for name in CASES}
    return launch(folder / "first", cases, "--use_deepspeed", *TWO)


@pytest.fixture(scope="module")
def second(folder: Path, first: Any) -> tuple[dict[str, dict[str, Any]], str]:
    """Some cases, from the checkpoints of the first launch; one of those has been poisoned."""
    shutil.copytree(folder / "zero2-duel", folder / "uninterrupted" / "zero2-duel")
    for name in RESUMED.keys() - {"zero2-lora", "zero2-duel"}:
        shutil.copytree(folder / name, folder / "uninterrupted" / name)
    file = next((folder / "zero2-duel/checkpoints/step-00000006/student").glob("*rank_1*optim_states.pt"))
    file.write_bytes(pickle.dumps(Bomb(folder / "executed")))
    cases = {name: case(name, folder, resume=where, signal=None) for name, where in RESUMED.items()}
    return launch(folder / "second", cases, "--use_deepspeed", *TWO)


@functools.cache
def alone(
    method: str, poison: bool, mixed_precision: str = "no", steps: int = STEPS, optimizer: str = "adamw"
) -> dict[str, Any]:
    """The same training by one process without Accelerate's launcher or DeepSpeed."""
    settings = engine("single", gradient_accumulation_steps=1, mixed_precision=mixed_precision)
    special = {"poison": POISON, "validate": True} if poison else {}
    case = {"engine": settings, "method": method, "steps": steps, "optimizer": optimizer, **special}
    started, result = run_here(case)
    started.release()
    return result


def assert_agree(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Scalars, weights, averages, and what the averaged network answers."""
    for row, expected in zip(found["scalars"], wanted["scalars"][found["start"] :], strict=True):
        skipped = {key.replace("skipped", "grad_norm") for key, value in expected.items() if "skipped" in key and value}
        for key in expected.keys() - skipped:  # the norm of a skipped step is inf here and nan there
            assert row[key] == pytest.approx(expected[key], rel=10 * tolerance, nan_ok=True), key
    for part in ("weights", "ema"):
        for network in wanted[part]:
            assert relative_distance(found[part][network], wanted[part][network]) < tolerance, (part, network)
    assert relative_distance({"": found["ema_output"]}, {"": wanted["ema_output"]}) < 10 * tolerance


@pytest.mark.parametrize("name", [n for n in CASES if n != "zero2-lora" and not n.endswith(HALVES)])
def test_two_processes_compute_what_one_does(first: Any, name: str) -> None:
    _, method, special = CASES[name]
    assert_agree(first[0][name], alone(method, "poison" in special, optimizer=special.get("optimizer", "adamw")))


@pytest.mark.slow
def test_two_processes_compute_what_one_does_under_the_other_engines(folder: Path) -> None:
    found, _ = launch(folder / "others", {name: case(name, folder) for name in OTHERS}, "--use_deepspeed", *TWO)
    for name, result in found.items():
        _, method, special = OTHERS[name]
        half = special.get("mixed_precision", "no")
        assert_agree(result, alone(method, False, half), tolerance=TOLERANCE if half == "no" else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["game", "game-lora"])
def test_two_processes_play_as_one_does_under_every_stage(method: str, folder: Path) -> None:
    """Student and discriminator at one stage or at two, zero3/2 the student's and the discriminator's."""
    cases = {name: case(name, folder) for name, (_, played, _) in GAMES.items() if played == method}
    for result in launch(folder / method, cases, "--use_deepspeed", *TWO)[0].values():
        assert_agree(result, alone(method, False))


def test_the_ranks_of_a_rollout_go_different_ways_and_call_networks_alike() -> None:
    """So that the two of zero3-rollout, each of which holds half of the teacher, come to an end together."""
    method = MLCM(SCHEDULE, ROLLOUT, guidance=1.0)
    lengths = []
    for step in range(STEPS):
        starts = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH, 2)  # of two ranks' two micro-batches
        times = [
            method.sample_time(method.stages[0], Context(0, step, (i, i + 1)), torch.device("cpu")) for i in starts
        ]
        lengths.append([int((4 - method.segments[4].index(t)).max()) for t in times])
    assert any(there[0] != there[2] or there[1] != there[3] for there in lengths)


@pytest.mark.parametrize("name", ["ddp-lora", "zero3-lora"])
def test_two_ranks_that_share_a_validation_find_what_one_does(first: Any, name: str) -> None:
    found, wanted = first[0][name]["validated"], alone("distance", True)["validated"]
    assert found.keys() == wanted.keys()
    for key in ("validation/diversity", "validation/teacher_consistency", "validation/reward"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-4), key


def test_ranks_agree_on_flags(first: Any) -> None:
    for result in first[0].values():
        assert result["said"] == [(True, True, False), (False, True, False)]


def test_zero3_cuts_the_weights_and_the_others_do_not(first: Any) -> None:
    for name, result in first[0].items():
        assert (result["cut"] > 0.4) if name.startswith("zero3") else (result["cut"] == 0), name
    assert first[0]["zero3-lora"]["cut"] == 1  # of a whole network the biases stay


@pytest.mark.parametrize("method", ["lcm", "lcm-ema", "distance", "duel", "critics", "rewarded", "game", "game-lora"])
def test_every_step_of_those_was_clipped_and_moved_the_weights(method: str) -> None:
    """Without which the agreement above would be worth little."""
    result, start = alone(method, False), alone(method, False, steps=0)
    norms = [value for row in result["scalars"] for key, value in row.items() if key.endswith("grad_norm")]
    assert min(norms) > MAX_GRAD_NORM
    for network, weights in result["weights"].items():
        assert relative_distance(weights, start["weights"][network]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["zero2-bf16", pytest.param("zero2-fp16", marks=needs_fp16)])
def test_a_half_precision_on_two_processes_stays_near_the_same_on_one(first: Any, name: str) -> None:
    """All weights are half copies of masters under ZeRO, trained ones under autocast elsewhere: alike, not equal."""
    assert_agree(first[0][name], alone("distance", False, name[-4:]), tolerance=1e-2)


@needs_fp16
def test_a_loss_scale_goes_along_to_other_ranks_and_another_engine(second: Any, folder: Path, tmp_path: Path) -> None:
    going_on = moved("zero2-fp16", folder, tmp_path, "single", 4)
    going_on["engine"]["mixed_precision"] = "fp16"
    started, rest = run_here(going_on)
    started.release()
    assert rest["start"] == 3
    assert_agree(rest, alone("distance", False, "fp16"), tolerance=1e-2)
    assert rest["engine_state"]["loss_scales"] == {"student": {"value": 65536.0, "since": STEPS}}


@pytest.mark.parametrize("name", ["ddp-lora", "zero3-lora"])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(first: Any, name: str) -> None:
    rows = first[0][name]["scalars"]
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0, 0, 0]
    assert math.isnan(rows[1]["loss"])
    assert "step 1: student skipped" in first[1] and "sample-14 sample-15" in first[1]


def test_a_rank_that_alone_cannot_write_is_an_error_of_both_and_the_run_goes_on(first: Any, folder: Path) -> None:
    """Its checkpoint is not there, the one before is, and the steps after it are those of one process."""
    found = first[0]["zero1-lcm"]
    assert [len(said) for said in found["unwritten"]] == [1, 1]
    (here,), (there,) = found["unwritten"]
    assert "step-00000003 could not be written (rank 1: " in here
    assert here.partition(";")[0] == there.partition(";")[0]  # each rank has looked for itself how much room is left
    kept = {path.name for path in (folder / "zero1-lcm/checkpoints").iterdir()}
    assert kept == {"latest", "step-00000002"}


def test_one_signalled_rank_stops_both_at_one_step_and_the_run_goes_on(first: Any, second: Any, folder: Path) -> None:
    stopped, rest = first[0]["zero2-lora"], second[0]["zero2-lora"]
    assert len(stopped["scalars"]) == 3
    assert (rest["start"], rest["state"]) == (3, {"note": "preempted"})
    assert_agree(rest, alone("distance", True))
    assert not (folder / "zero2-lora/PREEMPTED").exists()  # the second run took it away; the first had left it:
    assert (folder / "zero2-lora/checkpoints/latest").read_text() == "step-00000003\n"


@pytest.mark.parametrize("name", [name for name in RESUMED if name != "zero2-lora"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(first: Any, second: Any, folder: Path, name: str) -> None:
    whole, rest = first[0][name], second[0][name]
    assert (rest["start"], rest["state"]) == (3, {"note": "after 3"})
    assert rest["scalars"] == whole["scalars"][3:]
    place = f"{name}/checkpoints/step-00000006/manifest.json"
    manifests = [json.loads((root / place).read_text()) for root in (folder, folder / "uninterrupted")]
    assert manifests[0]["files"] == manifests[1]["files"]  # every byte of weights, averages and optimizer states
    assert manifests[0]["engine_state"] == manifests[1]["engine_state"]


def test_a_poisoned_checkpoint_is_passed_over_by_all_ranks_and_not_opened(second: Any, folder: Path) -> None:
    assert not (folder / "executed").exists()
    assert "checkpoint step-00000006 is damaged (student/zero_pp_rank_1" in second[1]


def test_weights_of_a_zero3_checkpoint_are_read_without_deepspeed(first: Any, second: Any, folder: Path) -> None:
    for ema, part in ((False, "weights"), (True, "ema")):
        step, weights = read_weights(folder / "uninterrupted/zero3-lora/checkpoints", "student", ema=ema)
        wanted = first[0]["zero3-lora"][part]["student"]
        assert step == 6 and all(torch.equal(weights[n], w) for n, w in wanted.items())
        assert all("lora" in name for name in weights)


def test_one_process_goes_on_where_two_under_ddp_stopped(first: Any, folder: Path) -> None:
    going_on = case("ddp-lora", folder, resume=3, save_at=[])
    going_on["engine"] = engine("single", gradient_accumulation_steps=4)
    started, rest = run_here(going_on)
    started.release()
    assert rest["start"] == 3
    assert_agree(rest, alone("distance", True))


def moved(name: str, folder: Path, there: Path, kind: str, accumulation: int) -> dict[str, Any]:
    """The case that goes on from another one's third step, in a folder of its own, under another engine."""
    root = folder / "uninterrupted" if (folder / "uninterrupted" / name).is_dir() else folder
    shutil.copytree(root / name / "checkpoints/step-00000003", there / name / "checkpoints/step-00000003")
    return case(name, there, resume=3, save_at=[]) | {"engine": engine(kind, gradient_accumulation_steps=accumulation)}


MOVED = ["zero2-duel", "zero2-critics", "zero3-lcm", "zero2-game-lora", "zero32-game", "zero2-sgd", "zero3-adagrad"]


@pytest.mark.parametrize("name", MOVED)
def test_one_process_goes_on_where_two_under_zero_stopped(second: Any, folder: Path, tmp_path: Path, name: str) -> None:
    """With whatever the optimizer keeps: Adam's moments, the momentum of SGD, the sums of Adagrad."""
    started, rest = run_here(moved(name, folder, tmp_path, "single", 4))
    started.release()
    assert rest["start"] == 3
    _, method, special = CASES[name]
    assert_agree(rest, alone(method, False, optimizer=special.get("optimizer", "adamw")))
    assert [path.name for path in (tmp_path / name / "checkpoints").iterdir() if path.is_dir()] == ["step-00000003"]


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped_under_another_stage(second: Any, folder: Path) -> None:
    """From two of ZeRO-3 and DDP to four of ZeRO-2 and 3: as if one had gone on all the time."""
    stages = {"zero3-lcm": "zero2", "ddp-lora": "zero3"}
    cases = {name: moved(name, folder, folder / "moved", kind, 1) for name, kind in stages.items()}
    results, printed = launch(folder / "four", cases, "--use_deepspeed", "--num_processes", "4", *TWO[2:])
    for name, rest in results.items():
        assert rest["start"] == 3
        assert_agree(rest, alone(CASES[name][1], "poison" in CASES[name][2]))
    assert "saved by zero3 on 2, this is zero2 on 4" in printed


def test_an_optimizers_state_that_is_not_whole_is_refused_in_a_line(second: Any, folder: Path, tmp_path: Path) -> None:
    settings = moved("zero2-duel", folder, tmp_path, "single", 4)
    checkpoint = tmp_path / "zero2-duel/checkpoints/step-00000003"
    for file in (checkpoint / "student").glob("*rank_1*optim_states.pt"):
        file.unlink()  # as if a rank had never written it
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {path: about for path, about in manifest["files"].items() if (checkpoint / path).is_file()}
    manifest.pop("seal")
    _write_manifest(checkpoint, manifest)
    with pytest.raises(CheckpointError, match=r"student holds the optimizer's state of [\d,]+ of the [\d,]+ in \S+$"):
        run_here(settings)


def test_zero_runs_in_the_one_process_of_a_plain_launch_and_then_again(
    first: Any, folder: Path, tmp_path: Path
) -> None:
    """`accelerate launch` without a config and without GPUs starts one process without a process group.

    It also takes over from two processes under another stage, with what SGD and Adagrad keep.
    """
    cases = {
        name: {
            "engine": engine(name),
            "method": "distance",
            "steps": STEPS,
            "run": str(tmp_path / name),
            "save_at": [3],
        }
        for name in ("zero2", "zero3")
    }
    stages = {"zero2-sgd": "zero3", "zero3-adagrad": "zero2"}
    cases |= {name: moved(name, folder, tmp_path / "moved", kind, 4) for name, kind in stages.items()}
    results, printed = launch(tmp_path / "one", cases, "--num_machines", "1")
    for name, result in results.items():
        assert_agree(result, alone("distance", False, optimizer=cases[name].get("optimizer", "adamw")))
    assert printed.count("\n") < 26, printed  # DeepSpeed is kept quiet
