"""What the card says of other programs, against the times by which their code samples.

The formulas are those of ComfyUI 0.3.64 (comfy/samplers.py, comfy_extras/nodes_model_advanced.py) and of A1111 of
February 2024 (modules/sd_samplers_lcm.py, sd_samplers_timesteps.py), read 2026-11-28. Times are network indices, one
less than this project's.
"""

from __future__ import annotations

import pytest

from distill.diffusion.prediction import Prediction
from distill.diffusion.solver import make_times
from distill.methods.sampling import Sampling
from distill.training.clients import COMFYUI, INVOKEAI, WEBUI, Client, clients_of

T = 1000
STEPS = (1, 2, 4, 8)


def comfy_simple(steps: int, trained: list[int]) -> list[int]:
    """Scheduler `simple`: from the noisiest down, by whole strides of what the model has."""
    return [trained[-(1 + int(i * len(trained) / steps))] for i in range(steps)]


def comfy_sgm_uniform(steps: int, trained: list[int]) -> list[int]:
    """Scheduler `sgm_uniform`: evenly from the last to the first, the first left out, rounded to what is nearest."""
    first, last = trained[0], trained[-1]
    return [round(last + (first - last) * i / steps) for i in range(steps)]


def comfy_normal(steps: int, trained: list[int]) -> list[int]:
    return [round(trained[-1] * (1 - i / (steps - 1))) if steps > 1 else trained[-1] for i in range(steps)]


def webui_ddim(steps: int) -> list[int]:
    """A1111's and Forge's DDIM, whatever the schedule type says."""
    return [1 + i * (T // steps) for i in reversed(range(steps))]


def webui_lcm(steps: int) -> list[int]:
    """A1111's and Forge's LCM: of the fifty, evenly from the last to the first."""
    return [FIFTY[round(49 * (1 - i / (steps - 1))) if steps > 1 else 49] for i in range(steps)]


ALL, FIFTY = list(range(T)), [20 * i + 19 for i in range(50)]  # by default, and with the node's `lcm`


def times(spacing: str, steps: int) -> list[int]:
    return [t - 1 for t in make_times(spacing, T, steps)[:-1]]


def client(program: str, sampler: str, spacing: str, prediction: Prediction = Prediction.EPSILON) -> Client:
    (found,) = [c for c in clients_of(Sampling(sampler, spacing), prediction) if c.program == program]
    return found


@pytest.mark.parametrize("steps", STEPS)
def test_comfyuis_simple_visits_the_students_times(steps: int) -> None:
    assert comfy_simple(steps, FIFTY) == times("lcm", steps)
    assert comfy_simple(steps, ALL) == times("trailing", steps)
    lcm, lightning = client(COMFYUI, "lcm", "lcm"), client(COMFYUI, "ddim", "trailing")
    assert (lcm.sampler, lcm.scheduler, lcm.exact) == ("lcm", "simple", True) and "`lcm`" in lcm.further
    assert (lightning.sampler, lightning.scheduler, lightning.further) == ("euler", "simple", "")


def test_other_schedulers_of_comfyui_do_not() -> None:
    assert times("trailing", 4) == [999, 749, 499, 249]
    assert comfy_sgm_uniform(4, ALL) != times("trailing", 4)  # 749 500 250: near, and not exact
    assert comfy_normal(4, ALL) == [999, 666, 333, 0] and comfy_simple(4, ALL) != times("lcm", 4)
    for sampling in (Sampling("lcm", "lcm"), Sampling("ddim", "trailing"), Sampling("euler", "trailing")):
        for found in clients_of(sampling, Prediction.EPSILON):
            assert found.program != COMFYUI or found.scheduler == "simple"


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_the_web_uis_ddim_is_never_named_and_their_lcm_is_only_for_lcm(steps: int) -> None:
    assert not set(webui_ddim(steps)) & set(times("trailing", steps))
    assert set(webui_lcm(steps)) <= set(FIFTY) and webui_lcm(4) == [999, 679, 339, 19]
    assert not set(webui_lcm(steps)[1:]) & set(times("trailing", steps))
    for sampler in ("ddim", "euler"):
        found = client(WEBUI, sampler, "trailing")
        assert (found.sampler, found.scheduler) == ("Euler", "SGM Uniform") and "never DDIM" in found.further
    assert client(WEBUI, "lcm", "lcm").sampler == "LCM"


def test_no_program_is_named_for_times_that_it_cannot_be_given() -> None:
    for sampler in ("lcm", "ddim"):
        for found in clients_of(Sampling(sampler, "milestones"), Prediction.EPSILON):
            assert found.sampler == "" and not found.exact and "cannot be given" in found.further


def test_a_network_of_clean_data_needs_its_node_and_has_no_web_ui() -> None:
    comfy = client(COMFYUI, "ddim", "trailing", Prediction.SAMPLE)
    assert "sampling `x0`" in comfy.further and comfy.exact
    assert client(WEBUI, "ddim", "trailing", Prediction.SAMPLE).sampler == ""
    assert client(INVOKEAI, "ddim", "trailing", Prediction.SAMPLE).formats == ("pipeline",)
    assert client(COMFYUI, "lcm", "lcm", Prediction.SAMPLE).sampler == ""


def test_comfyuis_lcm_node_is_not_for_velocities() -> None:
    assert "no node" in client(COMFYUI, "lcm", "lcm", Prediction.V).further
    assert "`v_prediction`" in client(COMFYUI, "ddim", "trailing", Prediction.V).further
