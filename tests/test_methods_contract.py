"""What every `configs/method/*.yaml` promises, a new one too: no list here names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor, nn

from distill.config.loading import CONFIGS, build, check_component
from distill.diffusion.adversarial import Origin
from distill.diffusion.prediction import Conditioning, Denoised, Prediction, to_denoised
from distill.diffusion.random import Context, generator
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import trailing_times
from distill.diffusion.trajectory import Batch
from distill.methods.base import Method

SCHEDULE = NoiseSchedule.scaled_linear()
TIMES = trailing_times(SCHEDULE.T, SCHEDULE.T)
METHODS = sorted((CONFIGS / "method").glob("*.yaml"))


class Network(nn.Module):
    """A denoiser small enough to write down: one linear map of state, time and text."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 1)
        self.text = nn.Linear(3, 4)

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        c = self.text(conditioning["encoder_hidden_states"]).mean(1)[:, :, None, None]
        return to_denoised(Prediction.EPSILON, self.mix(x_t) + c * t[:, None, None, None] / 1000, x_t, t, SCHEDULE)


class Critic(nn.Module):
    """A discriminator of two numbers a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2, 1, bias=False)  # whose gradient is 0 within the margins of a hinge

    def forward(
        self, samples: Sequence[Tensor], t: Tensor, conditioning: Conditioning, origin: Origin | None = None
    ) -> list[Tensor]:
        return [self.mix(torch.stack([9 * x.float().flatten(1).mean(1), t / 1000], 1))[:, 0] for x in samples]


def batch(method: Method, positions: tuple[int, ...], step: int = 0) -> Batch:
    reads = method.reads(step)
    reads.check(TIMES)
    picked = [reads.pick(TIMES, generator("pick", p)) for p in positions]
    kept = len(picked[0])
    states = [torch.randn(kept, 4, 5, 6, generator=generator("state", p)) for p in positions]
    text = [torch.randn(2, 3, generator=generator("text", p)) for p in positions]
    return Batch(
        states=torch.stack(states),
        times=torch.tensor([[TIMES[i] for i in picks] for picks in picked]),
        conditioning={"encoder_hidden_states": torch.stack(text)},
        unconditional={"encoder_hidden_states": torch.zeros(len(positions), 2, 3)},
        guidance=torch.full((len(positions),), 7.5),
        positions=positions,
    )


def steps(method: Method) -> list[int]:
    """Those of the first period of each stage; of the first stage alone where others call helpers, a reward say."""
    starts = method.starts[:1] if method.helpers else method.starts
    return [start + i for start in starts for i in range(method.period)]


@pytest.fixture(params=METHODS, ids=lambda path: path.stem)
def method(request: pytest.FixtureRequest) -> Method:
    written = OmegaConf.create({"model": {"family": "sd15"}, "method": yaml.safe_load(Path(request.param).read_text())})
    node = OmegaConf.to_container(written, resolve=True)["method"]  # type: ignore[call-overload,index]
    return build(check_component(node), schedule=SCHEDULE)


@pytest.fixture
def networks(method: Method) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    names = sorted({*method.trains, "student", "teacher"})
    return {name: Critic() if name == "discriminator" else Network() for name in names}


def test_each_turn_trains_its_network_and_no_other(method: Method, networks: dict[str, nn.Module]) -> None:
    for step in steps(method):
        for turn in method.turns(step):
            assert turn.updates in method.trains
            losses = turn.loss(
                networks, batch(method, (0, 1, 2), step), Context(seed=0, step=step, positions=(0, 1, 2))
            )
            assert losses.total.ndim == 0 and torch.isfinite(losses.total)
            losses.total.backward()
            for name, network in networks.items():
                gradients = [p.grad for p in network.parameters()]
                if name == turn.updates:
                    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
                elif name not in method.trains:
                    assert all(g is None for g in gradients)
                network.zero_grad(set_to_none=True)


def test_turns_repeat_after_a_period_in_which_the_student_comes_last(method: Method) -> None:
    """Then a logged step, at a multiple of the period, has the numbers of all networks."""

    def period(first: int) -> list[list[str]]:
        return [[turn.updates for turn in method.turns(first + i)] for i in range(method.period)]

    for start in method.starts:
        names = period(start)
        if any("student" in turns for turns in names):  # not where another network warms up alone
            assert names[-1][-1] == "student" and start % method.period == 0
        if not any(start < other < start + 2 * method.period for other in method.starts):
            assert period(start + method.period) == names
    assert {name for start in method.starts for turns in period(start) for name in turns} == set(method.trains)


def test_a_loss_is_a_mean_over_samples_however_they_are_grouped(method: Method, networks: dict[str, nn.Module]) -> None:
    for step in range(3, 3 + method.period):
        for turn in method.turns(step):

            def loss(positions: tuple[int, ...], turn=turn, step=step) -> float:  # type: ignore[no-untyped-def]
                context = Context(seed=5, step=step, positions=positions)
                return float(turn.loss(networks, batch(method, positions, step), context).total.detach())

            whole, halves = loss((8, 9, 10, 11)), [loss((8, 9)), loss((10, 11))]
            assert whole == pytest.approx(sum(halves) / 2, rel=1e-5)
            assert loss((8, 9)) != pytest.approx(loss((10, 11)), rel=1e-3)


def test_the_global_generator_is_left_alone(method: Method, networks: dict[str, nn.Module]) -> None:
    before = torch.get_rng_state()
    for step in steps(method):
        for turn in method.turns(step):
            turn.loss(networks, batch(method, (0, 1), step), Context(seed=0, step=step, positions=(0, 1)))
    assert torch.equal(before, torch.get_rng_state())
