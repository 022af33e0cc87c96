"""What a plan says, against what runs do: memory, FLOPs, files and failures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.config.loading import load
from distill.config.settings import TrainSettings
from distill.data.index import StorePlan
from distill.data.reader import open_store
from distill.data.record import Layout, describe
from distill.data.writer import write_store
from distill.diffusion.random import Context
from distill.diffusion.trajectory import Trajectory
from distill.methods.lcm import LCM
from distill.planning.counting import Cost, architecture, cast, count, forward
from distill.planning.counting import batch_of as batch_on_meta
from distill.planning.estimates import (
    Held,
    best_interval,
    checkpoint_bytes,
    counted,
    held,
    lost_share,
    most_samples,
    read_bytes,
    sample_layout,
    stored_bytes,
)
from distill.planning.phases import Saving
from distill.training.trained_network import optimizer_bytes
from tests.tiny import CHANNELS, tiny_conditioning, tiny_transformer
from tests.training.planning_worker import SCHEDULE, adamw, batch_of, game_of, student_of, teacher_of

ROOT = Path(__file__).resolve().parents[2]
# Both families, both students, both ways to hold activations, with a teacher in the step and with an average.
STEPS: list[dict[str, Any]] = [
    {"family": "sd15", "student": "lora", "checkpointed": False, "ema": False, "method": {"source": "noised"}},
    {"family": "sd15", "student": "full", "checkpointed": True, "ema": True, "method": {"target": "ema"}},
    {"family": "sdxl", "student": "lora", "checkpointed": True, "ema": False, "method": {}, "samples": 12},
    {"family": "sdxl", "student": "full", "checkpointed": False, "ema": False, "method": {}},
]


def measured(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.training.planning_worker", json.dumps(steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def planned(step: dict[str, Any], engine: str = "single", bf16: bool = False, bucket: int = 0) -> tuple[Held, Cost]:
    """States and the turn of a step, from networks without weights. The turn is walked through with two samples."""
    teacher = teacher_of(step["family"], "meta", step["side"])
    method = LCM(SCHEDULE, **step["method"])
    with torch.device("meta"):
        networks: dict[str, Any] = dict(student_of(step["student"]).networks(teacher, 0, "teacher" in method.requires))
    networks["student_ema"] = networks["student"]
    cast(networks, ["student"], bf16, masters=engine != "single")
    batch = batch_of(teacher, 2, states=1 if "teacher" in method.requires else 2).to("meta")
    (turn,) = method.turns(0)
    cost = count(turn, networks, batch, Context(0, 0, batch.positions), checkpointed=step["checkpointed"])
    student = counted(networks["student"].module)
    state = optimizer_bytes(adamw)
    return held(student, engine, 1, bf16=bf16, optimizer=state, averaged=step["ema"], bucket=bucket), cost


def test_memory_is_what_real_steps_take() -> None:
    """Within a twentieth, as the profiler counts the bytes of tensors, of which activations are a third at least."""
    steps = [{"samples": 3, "side": 24, **step} for step in STEPS]
    for step, found in zip(steps, measured(steps), strict=True):
        states, cost = planned(step)
        expected = states.states - states.gradients + cost.peak(step["samples"])
        print(step, f"planned {expected / 1e6:.1f} MB, measured {found['peak'] / 1e6:.1f} MB")
        assert states.states - states.gradients == pytest.approx(found["before"], rel=0.02)
        assert expected == pytest.approx(found["peak"], rel=0.05)
        assert cost.activations(step["samples"]) > found["peak"] / 3


GAMES: list[dict[str, Any]] = [{"family": "sd15", "quantized": None}, {"family": "sdxl", "quantized": "int8"}]


@pytest.mark.slow
def test_memory_of_four_networks_on_one_is_what_a_real_step_takes() -> None:
    """Of which the weights that all compute with are counted once."""
    steps = [{"samples": 3, "side": 24, **game} for game in GAMES]
    for step, found in zip(steps, measured(steps), strict=True):
        with torch.device("meta"):
            teacher = teacher_of(step["family"], "meta", step["side"])
            method, networks = game_of(teacher, step["quantized"])
        cast(networks, method.trains, bf16=False, masters=False)
        batch = batch_of(teacher, 2, states=1).to("meta")
        context = Context(0, 0, batch.positions)
        costs = [count(turn, networks, batch, context, checkpointed=True) for turn in method.turns(0)]
        seen: set[int] = set()
        weights = [counted(networks[name].module, seen) for name in method.trains]
        state = optimizer_bytes(adamw)
        parts = [held(w, "single", 1, bf16=False, optimizer=state, averaged=False) for w in weights]
        states = sum(part.states - part.gradients for part in parts)
        expected = states + max(cost.peak(step["samples"]) for cost in costs)
        print(step, f"planned {expected / 1e6:.1f} MB, measured {found['peak'] / 1e6:.1f} MB")
        assert states == pytest.approx(found["before"], rel=0.03)
        assert expected == pytest.approx(found["peak"], rel=0.07)
        assert all(w.shared for w in weights[1:])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_memory_of_zero_is_what_deepspeed_takes_on_one_rank(stage: int, precision: str) -> None:
    """Of states; a latent of 4 x 4 has next to no activations."""
    zero = {"stage": stage, "reduce_bucket_size": 100_000}
    step = {**STEPS[3], "samples": 1, "side": 4}
    engine = {"kind": "deepspeed", "deepspeed": {"zero_optimization": zero}, "mixed_precision": precision}
    engine["deepspeed"]["data_types"] = {"grad_accum_dtype": "fp32"}  # type: ignore[index]
    (found,) = measured([{**step, **engine}])
    states, cost = planned(step, f"zero{stage}", precision == "bf16", bucket=100_000)
    print(stage, precision, f"planned {states.total(0) / 1e6:.1f} MB, measured {found['peak'] / 1e6:.1f} MB")
    assert states.total(cost.activations(1)) == pytest.approx(found["peak"], rel=0.1)


def test_flops_are_those_of_torchs_own_counter() -> None:
    """On the same turn with real numbers, where attention is another kernel, counted by hand."""
    step = {**STEPS[3], "side": 8}
    _, cost = planned(step)
    teacher = teacher_of("sdxl", "cpu", 8)
    networks = student_of("full").networks(teacher, 0, False)
    batch = batch_of(teacher, 2)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (turn,) = LCM(SCHEDULE).turns(0)
        turn.loss(networks, batch, Context(0, 0, batch.positions)).total.backward()
    # In its backward pass flash attention multiplies query and key again: a fifth of the pass, which is a small part.
    assert counter.get_total_flops() <= 2 * cost.flops <= 1.02 * counter.get_total_flops()
    assert cost.evaluations == {"student": 2} and cost.with_gradient == {"student": 1}


def flux_of(kind: str, device: str) -> tuple[Any, dict[str, Any]]:
    """A small transformer whose attention diffusers calls by keywords, and its inputs for two samples."""
    if kind == "SD3Transformer2DModel":
        with torch.device(device):
            states, text = torch.zeros(2, CHANNELS, 6, 6), tiny_conditioning("sd3", 2)
            inputs = {name: x.to(device) for name, x in text.items()}
            return tiny_transformer(), {"hidden_states": states, "timestep": torch.zeros(2), **inputs}
    sizes: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "in_channels": 8, "joint_attention_dim": 12}
    if kind == "FluxTransformer2DModel":
        sizes |= {"pooled_projection_dim": 6, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)}
    else:
        sizes |= {"guidance_embeds": False, "axes_dims_rope": (4, 4, 4, 4)}
    axes = len(sizes["axes_dims_rope"])
    with torch.device(device):
        inputs = {"hidden_states": torch.zeros(2, 64, 8), "encoder_hidden_states": torch.zeros(2, 7, 12)}
        inputs |= {"timestep": torch.zeros(2), "guidance": torch.ones(2)}
        if sizes["guidance_embeds"]:
            inputs |= {"pooled_projections": torch.zeros(2, 6)}
        inputs |= {"img_ids": torch.zeros(64, axes), "txt_ids": torch.zeros(7, axes)}
        return getattr(diffusers, kind)(**sizes), inputs


@pytest.mark.parametrize("kind", ["SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel"])
def test_flops_of_attention_that_is_called_by_keywords_are_those_of_torchs_own_counter(kind: str) -> None:
    """SD3's, FLUX.1's and FLUX.2's networks."""
    network, inputs = flux_of(kind, "cpu")
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, kernel, torch.no_grad():
        network(**inputs)
    network, inputs = flux_of(kind, "meta")
    assert 2 * forward(network, 2, **inputs)[0] == counter.get_total_flops()


def test_a_published_model_is_counted_with_its_own_form_of_guidance_and_length_of_prompts() -> None:
    """FLUX.1 takes w in its only pass; a second one would double the hours of its solves."""

    def of(name: str, **settings: Any) -> Any:
        given = load("train", TrainSettings, [f"experiment=lcm_lora_{name}", "data.store=s", "output_dir=o"]).model
        return architecture(given.model_copy(update=settings))

    flux, klein, short = of("flux_dev"), of("flux2_klein"), of("sd35_medium", max_tokens=100)
    assert (flux.teacher.second_pass, klein.teacher.second_pass) == (False, True)
    assert (flux.tokens, short.tokens, klein.tokens) == (512, 77 + 100, 512)
    assert batch_on_meta(flux, 2).unconditional == {} != batch_on_meta(klein, 2).unconditional


def test_attention_under_a_mask_is_counted_without_a_map_of_all_pairs() -> None:
    with torch.device("meta"):
        x, mask = torch.empty(1, 1, 4096, 8), torch.empty(1, 1, 1, 4096, dtype=torch.bool)

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor, **mask: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query=x, key=x, value=x, **mask)

    (plain, bytes_plain), (masked, bytes_masked) = (forward(Attention(), 1, x, **m) for m in ({}, {"attn_mask": mask}))
    assert plain == masked == 4 * 4096**2 * 8
    assert max(bytes_plain, bytes_masked) < 20 * 4 * 4096 * 8 < 4096**2


def test_activations_grow_with_the_batch_and_gradients_do_not() -> None:
    _, cost = planned({**STEPS[3], "side": 8})
    teacher = teacher_of("sdxl", "meta", 8)
    weights = sum(p.numel() for p in teacher.network.parameters())
    assert cost.peak(1000) == pytest.approx(1000 * cost.peaks[0][0], rel=0.05)
    assert cost.peaks[-1][1] == pytest.approx(4 * weights, rel=0.01) and cost.peaks[0][1] < weights


def test_recomputing_costs_a_forward_pass_and_saves_memory() -> None:
    (_, plain), (_, again) = (planned({**STEPS[3], "side": 16, "checkpointed": c}) for c in (False, True))
    assert again.activations(1) < plain.activations(1) / 2
    assert 1.15 < again.flops / plain.flops < 1.34  # of two forward passes and a backward one, most of one


def test_a_checkpoint_has_the_planned_size(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "single": {},
        "zero2": {"kind": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}},
    }
    step = {**STEPS[1], "samples": 1, "side": 4, "checkpointed": False, "method": {}}
    steps = [{**step, **engine, "saved": str(tmp_path / name)} for name, engine in kinds.items()]
    network = counted(teacher_of("sd15", "meta", 4).unet.requires_grad_(True))
    for name, found in zip(kinds, measured(steps), strict=True):
        expected = checkpoint_bytes(network, name, bf16=False, optimizer=optimizer_bytes(adamw), averaged=True)
        assert expected == pytest.approx(found["saved"], rel=0.02)


def test_a_stored_sample_has_the_planned_size(tmp_path: Path) -> None:
    times = (1000, 750, 500, 250, 0)
    conditioning = {"encoder_hidden_states": torch.zeros(7, 32, dtype=torch.float16)}

    def solve(indices: Any, prompts: Any) -> Trajectory:
        many = {name: x.expand(len(indices), *x.shape) for name, x in conditioning.items()}
        return Trajectory(torch.zeros(len(indices), 5, 4, 32, 32), times, many, torch.ones(len(indices)), (0,) * 4)

    facts = {"teacher_id": "t", "teacher_hash": "0" * 16, "schedule_fingerprint": "0" * 16, "spacing": "trailing"}
    plan = StorePlan(
        **facts,
        solver="ddim",
        solver_steps=4,
        guidance=1.0,
        times=times,
        resolution=256,
        prompt_source="p",
        seed=0,
        samples=4,
        samples_per_shard=4,
        batch_size=4,
    )
    write_store(str(tmp_path), plan, ["red"], {}, solve)
    index = open_store(str(tmp_path)).index
    (shard,) = index.shards
    layout = sample_layout(torch.zeros(5, 4, 32, 32, dtype=torch.float16), times, conditioning)
    assert layout.header == index.layout.header
    said = {**facts, "key": "000000-000000", "index": 0, "prompt": "red", "seed": 0, "guidance": 1.0}
    assert 4 * stored_bytes(layout, {**said, "solver": "ddim", "solver_steps": 4}) + 1024 == shard.bytes
    state, text = 4 * 32 * 32 * 2, 7 * 32 * 2
    assert 0 < read_bytes(layout, (1, 3)) - 2 * state - text < 2048  # headers, times and guidance


def test_the_published_sample_of_sdxl_takes_what_the_reader_was_measured_to_take() -> None:
    """5.43 MiB with 41 states, and 0.55 MiB of it read for two, as docs/mlcm.md says, of a store that was written."""
    text = {"encoder_hidden_states": torch.zeros(77, 2048).half(), "text_embeds": torch.zeros(1280).half()}
    layout: Layout = sample_layout(torch.zeros(41, 4, 128, 128).half(), range(40, -1, -1), text)
    assert stored_bytes(layout, {"prompt": ""}) / 2**20 == pytest.approx(5.43, abs=0.01)
    assert read_bytes(layout, (3, 20)) / 2**20 == pytest.approx(0.55, abs=0.01)
    assert len(describe(prompt="")) < 100


@pytest.mark.parametrize(("interval", "save", "mtbf", "restart"), [(900, 60, 7200, 300), (7200, 60, 7200, 300)])
def test_lost_time_is_that_of_simulated_failures(interval: float, save: float, mtbf: float, restart: float) -> None:
    random = torch.Generator().manual_seed(0)
    failures = iter((-mtbf * torch.rand(400_000, generator=random, dtype=torch.float64).log()).tolist())
    clock, done, left, segments = 0.0, 0, next(failures), 6000
    need = interval + save
    while done < segments:
        if left >= need:
            clock, left, need, done = clock + need, left - need, interval + save, done + 1
        else:
            clock, left, need = clock + left, next(failures), restart + interval + save
    assert lost_share(interval, save, mtbf, restart) == pytest.approx(1 - done * interval / clock, abs=0.01)


@pytest.mark.parametrize(("interval", "written"), [(900, 300), (900, 20), (3600, 600)])
def test_lost_time_beside_saves_in_the_background_is_that_of_failures(interval: float, written: float) -> None:
    """Where a failure comes before a checkpoint is complete, it costs what has been done since the one before."""
    stood, mtbf, restart = 10.0, 7200.0, 300.0
    random = torch.Generator().manual_seed(0)
    failures = -mtbf * torch.rand(200_000, generator=random, dtype=torch.float64).log()
    complete = ((failures - restart + stood - written) / (interval + stood)).floor().clamp(min=0)
    lost = Saving(size=0, written=written, stood=stood, mtbf=mtbf, restart=restart).lost(interval)
    assert lost == pytest.approx(1 - (complete * interval).sum().item() / failures.sum().item(), abs=0.01)


def test_the_best_interval_loses_least_and_begins_as_youngs() -> None:
    save, mtbf, restart = 60.0, 20_000.0, 600.0
    best = best_interval(save, mtbf)
    least = lost_share(best, save, mtbf, restart)
    assert all(lost_share(best * f, save, mtbf, restart) > least for f in (0.7, 0.9, 1.1, 1.4))
    assert best_interval(1e-3, mtbf) == pytest.approx(math.sqrt(2e-3 * mtbf), rel=1e-3)
    assert lost_share(1e7, save, mtbf, restart) == pytest.approx(1.0)


def test_the_most_samples_fit_and_one_more_does_not() -> None:
    states = Held(weights=10.0, step=5.0)
    assert most_samples(100, states, 9) == 10
    assert states.total(10 * 9) <= 100 < states.total(11 * 9)
    assert most_samples(14, states, 9) == 0
