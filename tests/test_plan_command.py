"""`scripts/plan.py`: what it says of the bundled toy, of every experiment and cluster, and of what cannot be."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.commands import plan, plan_chain
from distill.config.loading import CONFIGS, ConfigError, build, load
from distill.config.settings import ChainSettings, PlanSettings
from distill.diffusion.prediction import Prediction
from distill.diffusion.random import Context
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.trajectory import Batch, CleanEnd
from distill.methods.base import Losses, Method, Networks, Turn
from distill.models.denoiser import NetworkDenoiser
from distill.planning import phases as plan_run
from distill.planning.chains import planned_links
from distill.planning.counting import architecture, count
from distill.training.chain import links_of
from distill.training.fitting import say_unlogged
from tests.forked import python

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
CLUSTERS = sorted(p.stem for p in (CONFIGS / "cluster").glob("*.yaml"))


def settings(*overrides: str) -> PlanSettings:
    return load("plan", PlanSettings, overrides)


@pytest.fixture(scope="module")
def run() -> plan_run.PlannedRun:
    """The game of the toy on eight GPUs: two networks that are trained, and a teacher in the first one."""
    return plan_run.prepared(settings("experiment=lightning_toy", "cluster=a100-80gb-x8", "engine=zero2"))


def changed(run: plan_run.PlannedRun, **changes: Any) -> plan_run.PlannedRun:
    cluster = run.cfg.cluster.model_copy(update=changes.pop("cluster", {}))
    return replace(run, cfg=run.cfg.model_copy(update={"cluster": cluster, **changes}))


def said(part: Iterator[str]) -> str:
    return "\n".join(part)


def test_the_command_prints_a_report() -> None:
    """Of a machine without a GPU it speaks of none."""
    command = [python(), "scripts/plan.py", "experiment=quickstart", "cluster=laptop", "engine=single"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for word in ("Memory", "Communication", "Store", "Reading", "samples/s", "Checkpoint", "Failures", "engine=single"):
        assert word in done.stdout
    assert done.stdout.splitlines()[-2] == "engine=single fits."
    assert "GPU" not in done.stdout and "Memory of a CPU" in done.stdout and "CPU hours" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster=a100-80g-x64", "unknown cluster=a100-80g-x64 (did you mean 'a100-80gb-x64'?)"),
        ("cluster.nodes=0", "cluster.nodes=0"),
        ("cluster.mfu=1.5", "cluster.mfu=1.5"),
        ("model.pretrained_model_name_or_path=nobody/nothing", "model 'nobody/nothing' is no folder here"),
        ("teacher=runs/a/export", "allowed: lora, whole, null"),
        ("measured_step_seconds=0", "measured_step_seconds=0"),
        ("method.skip=30", "method.skip must divide"),
        ("data.keep=[1000,0]", "skip 200 is off the stored grid"),
        ("+engine.deepspeed.zero_optimization.offload_optimizer={device:cpu}", "a plan knows no offloading"),
    ],
)
def test_a_mistake_is_told(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan_run.prepared(settings("experiment=quickstart", override))
    assert message in str(raised.value)


def test_a_rollout_is_as_long_for_every_sample() -> None:
    """From noise to the sample's time in 8 steps, of which some stand still, and one more: guided, two calls each."""
    stage = "{segments: 8, skip: 25, iterations: 1300, source: rollout}"
    run = plan_run.prepared(settings("experiment=mlcm_toy", "cluster=laptop", f"method.stages=[{stage}]"))
    costs = [cost for walk in run.walks.values() for phase in walk for cost in phase]
    assert costs and all(cost.evaluations["teacher"] == 2 * (8 + 1) for cost in costs)


class EveryFifth(Method):
    """A student that trains at every fifth step, and calls its network more often at every tenth."""

    trains = ("student", "fake_score")
    period = 10

    def reads(self, step: int = 0) -> CleanEnd:
        return CleanEnd()

    def turns(self, step: int) -> Iterator[Turn]:
        yield Turn("fake_score", self.loss)
        if (step + 1) % 5 == 0:
            yield Turn("student", self.loss, kind=str(step % 10 // 5))

    def loss(self, networks: Networks, batch: Batch, context: Context) -> Losses:
        raise NotImplementedError


def test_turns_that_repeat_are_walked_through_once_each_and_count_as_often_as_they_come() -> None:
    """19,003 steps have three kinds of steps, and not 7,600 phases."""
    phases = plan_run.phases_of(EveryFifth(), 19003)
    assert [(phase.first, phase.last, phase.steps) for phase in phases] == [
        (0, 19002, 19003 - 3800),
        (4, 18994, 1900),
        (9, 18999, 1900),
    ]
    assert [str(phase) for phase in phases] == ["15203 of 0 ... 19002", "1900 of 4 ... 18994", "1900 of 9 ... 18999"]
    turn = EveryFifth().held_out(0)
    assert turn is not None and turn.updates == "student"  # though step 0 has no turn of it


def test_lines_of_steps_that_lack_numbers_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    for every, said in ((10, 0), (20, 0), (7, 1)):
        caplog.clear()
        say_unlogged(settings("experiment=quickstart", f"log_every={every}"), EveryFifth())
        assert len(caplog.records) == said
    assert "log_every=7 is no multiple of the 10 steps after which the method's turns repeat" in caplog.text


def test_what_depends_on_random_numbers_is_not_counted_but_said() -> None:
    network = NetworkDenoiser(nn.Linear(2, 2, device="meta"), NoiseSchedule.scaled_linear(), Prediction.EPSILON)
    x = torch.empty(1, 1, 2, device="meta")
    batch = Batch(x, torch.zeros(1, 1, dtype=torch.int64), {}, {}, torch.ones(1))

    def loss(networks: Any, batch: Batch, context: Context) -> Any:
        for _ in range(int(batch.states.sum())):
            networks["student"](batch.states[:, 0], batch.times[:, 0], {})

    with pytest.raises(ValueError, match="how often networks are called depends on random numbers"):
        count(Turn("student", loss), {"student": network}, batch, Context(0, 0, (0,)), checkpointed=False)


def test_a_mistake_is_one_line() -> None:
    command = [python(), "scripts/plan.py", "experiment=quickstart", "cluster=none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown cluster=none") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_can_be_planned(experiment: str) -> None:
    """As far as that goes without walking through its turns: sizes, phases, and what its store holds and is read."""
    cfg = settings(f"experiment={experiment}")
    built = architecture(cfg.model)
    method = build(cfg.method, schedule=built.teacher.schedule)
    phases = plan_run.phases_of(method, cfg.max_train_steps)
    assert sum(phase.steps for phase in phases) == cfg.max_train_steps
    warm_up = 0 < getattr(method, "warmup", 0) < cfg.max_train_steps  # of a discriminator, alone
    assert len(method.starts) <= len(phases) <= len(method.starts) * method.period + warm_up
    sample = plan_run.sample_of(cfg, built)
    assert sample.size > sample.layout.payload_bytes > len(sample.times) * sample.layout.state_bytes
    for phase in phases:
        method.reads(phase.first).check(sample.times)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_cluster_is_the_size_its_name_says(cluster: str) -> None:
    found = settings(f"cluster={cluster}").cluster
    gpus = 1 if cluster == "laptop" else int(cluster.rpartition("-x")[2])
    assert plan_run.ranks_of(found) == gpus
    if cluster != "laptop":
        assert found.gpus_per_node == min(gpus, 8) and cluster.split("-")[0] in found.gpu.lower()


def test_a_game_counts_both_turns_and_what_they_ask(run: plan_run.PlannedRun) -> None:
    judged, drawn = run.costs("zero2", False)[0]
    assert (judged.updates, drawn.updates) == ("discriminator", "student")
    assert judged.evaluations == {"teacher": 4, "student": 1, "discriminator": 2}  # 32 steps in 8, at guidance 1
    assert drawn.evaluations == {"student": 1, "discriminator": 1}
    assert judged.with_gradient == {"discriminator": 2} and drawn.with_gradient == {"student": 1, "discriminator": 1}


def test_zero_cuts_what_it_says_and_ddp_nothing(run: plan_run.PlannedRun) -> None:
    names = ("ddp", "zero1", "zero2", "zero3")
    ddp, one, two, three = (run.held(engine) for engine in names)
    assert one.optimizer == two.optimizer == three.optimizer == pytest.approx(ddp.optimizer / 8)
    assert three.weights == pytest.approx(two.weights / 8) and two.weights == one.weights == ddp.weights
    assert two.gradients == pytest.approx(one.gradients / 8)
    sent = [run.traffic(engine, False, 0) for engine in names]
    assert sent[3].gathered > 3 * sent[2].gathered > 0 == sent[0].gathered


def test_networks_of_several_stages_are_cut_as_they_are_asked_for(run: plan_run.PlannedRun) -> None:
    mixed = changed(run, engine={**run.cfg.engine, "stages": {"discriminator": 3}})
    assert run.held("zero3").weights < mixed.held("zero2").weights < run.held("zero2").weights
    assert mixed.held("zero3") == run.held("zero3")


def test_what_does_not_fit_is_said_with_what_would(run: plan_run.PlannedRun) -> None:
    assert said(plan.verdict(run)) == "engine=zero2 fits."
    large = changed(run, global_batch_size=4096)
    room = sum(large.memory("ddp", c, large.samples) for c in (False, True)) / 2
    tight = changed(large, cluster={"memory_gib": room / plan_run.GIB, "usable": 1.0})
    assert "engine=zero2 needs" in said(plan.verdict(tight))
    assert "take engine=ddp gradient_checkpointing=true" in said(plan.verdict(tight))
    room = sum(large.memory(e, True, large.samples // n) for e, n in (("ddp", 2), ("ddp", 1))) / 2
    tighter = changed(large, cluster={"memory_gib": room / plan_run.GIB, "usable": 1.0})
    assert f"gradient_checkpointing=true micro_batch_size={large.samples // 2}" in said(plan.verdict(tighter))
    none = changed(run, cluster={"memory_gib": 1e-4})
    assert "GPUs with more memory" in said(plan.verdict(none))


def test_a_batch_that_does_not_divide_is_said_with_one_that_does(run: plan_run.PlannedRun) -> None:
    odd = changed(run, global_batch_size=20)
    assert "global_batch_size=20 is no multiple of 8 GPUs x 1 micro-batches: take 16 or 24" in said(plan.verdict(odd))
    assert "24 samples a step" in said(plan.heading(odd))


def test_a_measured_step_takes_the_place_of_the_estimate(run: plan_run.PlannedRun) -> None:
    measured = changed(run, measured_step_seconds=9.0, max_train_steps=200)
    assert "A step: 9.000 s as measured; 7.1 samples/s" in said(plan.speed(measured))
    assert "200 steps: 0.50 h, 4.0 GPU hours" in said(plan.speed(measured))


def test_twice_the_failures_and_rarer_checkpoints_lose_more(run: plan_run.PlannedRun) -> None:
    slow = changed(run, measured_step_seconds=60.0)
    worse = changed(slow, cluster={"node_mtbf_hours": 5.0})
    assert "% of the time is lost to saving and failures" in said(plan.verdict(worse))
    assert "engine=zero2 fits." in said(plan.verdict(slow))


def test_a_link_of_a_chain_that_calls_a_reward_is_named_and_in_no_sum(tmp_path: Path) -> None:
    stage = "method.stages=[{segments:1,skip:25,iterations:2%s}]"
    links = [
        {"name": "store", "script": "make_trajectories"},
        {"name": "plain", "overrides": ["max_train_steps=2", stage % ""]},
        {"name": "liked", "overrides": ["max_train_steps=2", stage % ",reward:0.1", "reward=toy"]},
    ]
    chain = ChainSettings.model_validate({"experiment": "mlcm_toy", "links": links})
    cluster = settings("experiment=quickstart", "cluster=laptop", "engine=single").cluster
    store, plain, liked = planned_links(links_of(chain, tmp_path), cluster)
    assert liked.not_counted.startswith("a plan knows no reward") and plain.memory > 0 == liked.memory
    said = list(plan_chain.report([store, plain, liked], cluster))
    assert "Not counted, and in no sum: liked: a plan knows no reward" in said
    assert [line for line in said if line.startswith("liked")][0].split()[-5:] == ["?"] * 5
    sums = [line.split()[2:] for line in plan_chain.report([store, plain], cluster) if line.startswith("in all")]
    assert [line.split()[2:] for line in said if line.startswith("in all")] == sums
