"""The comparison on a world whose truth is known: fair counts, honest choices, and going on after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.diffusion.guidance import guided
from distill.diffusion.prediction import Conditioning, Denoised
from distill.evaluation.blocks import Cache, network_hash
from distill.evaluation.compare import DECODING, FIRST_SEED, Setting, generate, seeds_of
from tests.analytic import gaussian, gaussian_flow
from tests.evaluation.world import MEANS, SCHEDULE, SD, SHAPE, GaussianDenoiser, PixelScorer, Surroundings, comparison

PROMPTS = ["up", "down", "down", "up", "up"]


def latents(setting: Setting, batch_size: int = 64, prompts: list[str] = PROMPTS, first: int = 5) -> torch.Tensor:
    seeds = list(range(first, first + len(prompts)))
    batches = generate(Surroundings(), GaussianDenoiser(), prompts, seeds, setting, batch_size)
    return torch.cat([batch.latents for batch in batches])


@pytest.mark.parametrize(
    ("setting", "nfe"),
    [
        (Setting("teacher", "ddim", 4, 1.0), 4),
        (Setting("teacher", "ddim", 4, 3.0), 8),
        (Setting("teacher", "ddim", 4, 0.0, "leading"), 8),
        (Setting("teacher", "heun", 3, 1.0), 5),
        (Setting("teacher", "heun", 3, 2.0), 10),
        (Setting("teacher", "dpmpp_2m", 5, 2.0), 10),
        (Setting("student", "lcm", 2, 1.0, "lcm"), 2),
        (Setting("student", "lcm", 2, 7.5, "lcm", embedded=True), 2),
    ],
)
def test_nfe_is_what_the_network_is_asked(setting: Setting, nfe: int) -> None:
    denoiser = GaussianDenoiser()
    told: list[int] = []
    list(generate(Surroundings(), denoiser, PROMPTS, range(5), setting, 2, told.append))
    assert setting.nfe == nfe
    assert denoiser.evaluations == nfe * len(PROMPTS)
    assert sum(told) == len(PROMPTS) * setting.work


@pytest.mark.parametrize("w", [1.0, 4.0])
def test_a_network_that_takes_the_guidance_is_told_it(w: float) -> None:
    """One that answers as its guided teacher does draws the guided teacher's pictures, in half the evaluations."""
    teacher, told = GaussianDenoiser(), []

    def student(x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> Denoised:
        told.append(conditioning["guidance"])
        return guided(teacher, Surroundings().unconditional(), conditioning["guidance"])(x_t, t, plain(conditioning))

    def plain(conditioning: Conditioning) -> Conditioning:
        return {name: x for name, x in conditioning.items() if name != "guidance"}

    setting = Setting("s", "ddim", 5, w, embedded=True)
    batches = list(generate(Surroundings(), student, PROMPTS, range(5, 10), setting, 2))
    expected = latents(Setting("t", "ddim", 5, w))
    torch.testing.assert_close(torch.cat([b.latents for b in batches]), expected, rtol=0, atol=1e-5)
    assert [t.tolist() for t in told[::5]] == [[w, w], [w, w], [w]]


@pytest.mark.parametrize("setting", [Setting("t", "ddim", 5, 2.0), Setting("t", "lcm", 4, 1.0, "lcm")])
def test_a_picture_depends_on_its_own_prompt_and_seed_alone(setting: Setting) -> None:
    together = latents(setting)
    torch.testing.assert_close(latents(setting, batch_size=2), together, rtol=0, atol=1e-6)
    torch.testing.assert_close(latents(setting, prompts=["up"], first=8), together[3:4], rtol=0, atol=1e-6)
    assert (together[0] - together[3]).abs().max() > 0.05  # the same prompt, another seed


def test_the_teacher_follows_the_flow_of_its_data() -> None:
    """1000 DDIM steps from the noise of `torch.Generator().manual_seed(seed)` against the flow's closed form."""
    found = latents(Setting("teacher", "ddim", 1000), prompts=["up"], first=3)
    x = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(3))
    exact = gaussian_flow(gaussian(SCHEDULE, torch.full(SHAPE, MEANS["up"]), SD), x, 1000, 0)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-2)


def test_bad_settings_are_one_clear_line() -> None:
    with pytest.raises(ValueError, match="^sampler 'rk4' is not known; allowed: lcm, "):
        Setting("teacher", "rk4", 4)
    with pytest.raises(ValueError, match="^spacing 'even' is not known; allowed: trailing"):
        Setting("teacher", "ddim", 4, spacing="even")
    with pytest.raises(ValueError, match="^need one seed per prompt, got 1 for 2$"):
        next(generate(Surroundings(), GaussianDenoiser(), ["up", "down"], [1], Setting("teacher", "ddim", 1)))


class TestRows:
    def test_which_and_in_which_order(self, tmp_path: Path) -> None:
        rows = comparison(tmp_path).rows()
        assert [(row["model"], row["sampler"], row["steps"]) for row in rows] == [
            ("teacher", "ddim", 50),
            *(("teacher", "ddim", 1), ("teacher", "lcm", 1), ("student", "lcm", 1)),
            *(("teacher", "ddim", 4), ("teacher", "lcm", 4), ("student", "lcm", 4)),
        ]
        names = {"model", "sampler", "steps", "guidance", "spacing", "nfe", "n", "frechet", "teacher_consistency"}
        assert all(names <= row.keys() and row["n"] == 64 for row in rows)

    def test_consistency_is_the_distance_from_the_full_teacher(self, tmp_path: Path) -> None:
        rows = comparison(tmp_path).rows()
        full, tuned = rows[0], next(row for row in rows if row["steps"] == 4 and row["sampler"] == "ddim")
        assert full["teacher_consistency"] == 0 and full["teacher_consistency_se"] == 0
        ends, mine = (
            latents(
                Setting("teacher", "ddim", steps, w, spacing), prompts=["up", "down"] * 32, first=FIRST_SEED["report"]
            )
            for steps, w, spacing in ((50, 1.0, "trailing"), (4, tuned["guidance"], tuned["spacing"]))
        )
        assert tuned["teacher_consistency"] == pytest.approx(float((ends - mine).square().mean()), rel=1e-4)

    def test_what_each_picture_has_is_kept_and_makes_up_the_row(self, tmp_path: Path) -> None:
        study = comparison(tmp_path)
        setting = study.plan.student(4)
        row, measured = study.row(setting), study.measured(setting)
        distance = measured["teacher_distance"]
        assert row["teacher_consistency"] == float(distance.mean()) > 0 and len(distance) == 64
        assert row["teacher_consistency_se"] == pytest.approx(float(distance.std()) / 8)
        prompts = study.scorer.prompts("report", 64)
        pixels = latents(setting, prompts=prompts, first=FIRST_SEED["report"]).clamp(-1, 1).flatten(1)
        torch.testing.assert_close(measured["pixels"], pixels, rtol=0, atol=1e-6)
        again = comparison(tmp_path)
        assert all(torch.equal(x, measured[name]) for name, x in again.measured(setting).items())
        assert again.denoisers["student"].evaluations == 0  # type: ignore[attr-defined]

    def test_a_perfect_student_beats_the_undistilled_teacher_at_one_step(self, tmp_path: Path) -> None:
        """A student whose single jump is the ODE's flow has the teacher's pictures."""

        class Flow:
            def __call__(self, x_t, t, conditioning):  # type: ignore[no-untyped-def]
                teacher = gaussian(SCHEDULE, torch.zeros(SHAPE), SD)
                mean = conditioning["mean"].reshape(-1, 1, 1, 1)
                x0 = gaussian_flow(teacher, x_t - SCHEDULE.alpha(t, x_t) * mean, t, 0) + mean
                return replace(GaussianDenoiser()(x_t, t, conditioning), x0=x0)

        rows = comparison(tmp_path, student=Flow(), steps=(1,)).rows()
        by = {(row["model"], row["sampler"]): row for row in rows[1:]}
        student, undistilled = by["student", "lcm"], by["teacher", "lcm"]
        assert (
            student["teacher_consistency"] < undistilled["teacher_consistency"] / 20
        )  # 50 steps are not quite the flow
        assert student["frechet"] == pytest.approx(rows[0]["frechet"], abs=0.05)
        assert undistilled["frechet"] > student["frechet"] + 0.2


class TestTuning:
    def test_the_choice_is_the_best_of_the_grid_on_other_noise(self, tmp_path: Path) -> None:
        study = comparison(tmp_path)
        tuned = study.tune()
        for steps, chosen in tuned.items():
            others = {s: study._tuning_row(s)["frechet"] for s in study.plan.candidates(steps)}
            assert len(others) == 4 and others[chosen] == min(others.values())

    def test_it_never_sees_what_is_reported(self, tmp_path: Path) -> None:
        assert not set(seeds_of("report", 100_000)) & set(seeds_of("tuning", 100_000))
        scorer = PixelScorer()
        comparison(tmp_path, scorer=scorer, tuning_n=64).rows()
        reported = {tuple(p.tolist()) for pixels in scorer.seen["report"] for p in pixels}
        assert not any(tuple(p.tolist()) in reported for pixels in scorer.seen["tuning"] for p in pixels)


class TestResume:
    @pytest.mark.parametrize("lives", [0, 5, 17, 25, 33])
    def test_killed_and_started_again_it_goes_on(self, tmp_path: Path, lives: int) -> None:
        whole = comparison(tmp_path / "whole")
        expected = whole.rows()
        first = comparison(tmp_path / "killed", scorer=PixelScorer(lives=lives))
        with pytest.raises(KeyboardInterrupt):
            first.rows()
        again = comparison(tmp_path / "killed")
        assert again.rows() == expected
        # nothing is done twice but the one piece it was killed in
        counts = [sum(d.evaluations for d in study.denoisers.values()) for study in (first, again, whole)]  # type: ignore[attr-defined]
        assert counts[0] + counts[1] <= counts[2] + 64 * 8

    def test_nothing_is_drawn_again(self, tmp_path: Path) -> None:
        expected = comparison(tmp_path).rows()
        again = comparison(tmp_path)
        assert again.rows() == expected
        assert [d.evaluations for d in again.denoisers.values()] == [0, 0]  # type: ignore[attr-defined]

    def test_another_student_leaves_only_the_teacher_s_rows(self, tmp_path: Path) -> None:
        comparison(tmp_path).rows()
        again = comparison(tmp_path, student=GaussianDenoiser(sd=0.1), student_hash="other")
        again.rows()
        assert [again.denoisers[name].evaluations for name in ("teacher", "student")] == [0, 64 * (1 + 4)]  # type: ignore[attr-defined]

    def test_a_torn_line_is_computed_again(self, tmp_path: Path) -> None:
        expected = comparison(tmp_path).rows()
        file = tmp_path / "cache.jsonl"
        file.write_text(file.read_text()[:-30])
        assert comparison(tmp_path).rows() == expected
        again = comparison(tmp_path)
        again.rows()
        assert again.denoisers["student"].evaluations == 0  # type: ignore[attr-defined]


def test_the_cache_knows_facts_apart(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    values = [cache.value({"steps": steps}, lambda steps=steps: {"v": steps}) for steps in (1, 2, 1)]  # type: ignore[misc]
    assert values == [{"v": 1}, {"v": 2}, {"v": 1}]
    assert {"steps": 2} in Cache(tmp_path) and {"steps": 3} not in Cache(tmp_path)


def test_the_hash_sees_every_weight() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    before = network_hash(network)
    assert before == network_hash(network)
    for tensor in network.state_dict().values():
        tensor.view(-1)[-1:] += 1
        assert network_hash(network) != before
        tensor.view(-1)[-1:] -= 1


def test_progress_goes_on_within_a_batch_and_ends_at_the_whole(tmp_path: Path) -> None:
    """A batch of 50 guided steps takes minutes on a processor: work is reported by network evaluations."""
    study = comparison(tmp_path)
    for setting in (Setting("teacher", "ddim", 5, 3.0), Setting("teacher", "ddim", 5), Setting("teacher", "heun", 3)):
        told: list[int] = []
        study.pictures(setting, range(30), told.append)  # in batches of 25
        assert sum(told) == 30 * setting.work and max(told) <= 2 * 25 + DECODING * 25
        assert len(told) >= 2 * (setting.nfe if setting.guidance == 1 else setting.nfe // 2)


def test_only_the_teachers_best_is_marked_as_tuned(tmp_path: Path) -> None:
    tuned = [row for row in comparison(tmp_path / "tuned").rows() if row.get("tuned")]
    assert [(row["model"], row["sampler"]) for row in tuned] == [("teacher", "ddim")] * 2
    assert [row["steps"] for row in tuned] == [1, 4]
    untuned = comparison(tmp_path / "not", guidances=(1.0,), spacings=("trailing",)).rows()
    assert not any(row.get("tuned") for row in untuned)
