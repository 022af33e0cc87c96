"""Chains as they are written down: what is refused, what the shipped ones ask of each other, how far a link is."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from distill.commands import export, trajectories
from distill.commands.chain import table
from distill.config.loading import CONFIGS, ConfigError, build, load
from distill.config.settings import ChainSettings, ExportSettings, RunChainSettings
from distill.data.index import kept_times
from distill.diffusion.schedule import NoiseSchedule
from distill.diffusion.solver import make_times
from distill.methods.base import Method
from distill.methods.sampling import Sampling
from distill.models.lora import LORA_FILE
from distill.training.assembly import train_run
from distill.training.chain import Link, links_of, one_of, seconds_left
from distill.training.fitting import check_read
from tests.training.test_recorded import begun

CHAINS = sorted(path.stem for path in (CONFIGS / "chain").glob("*.yaml"))
STORE = {"name": "store", "script": "make_trajectories"}
VERIFY = {"name": "verify", "script": "verify_shards"}


def chain(*links: dict[str, Any]) -> ChainSettings:
    return ChainSettings.model_validate({"experiment": "lcm_toy", "links": links})


@cache
def shipped(name: str) -> list[Link]:
    return links_of(load("run_chain", RunChainSettings, [f"chain={name}"]).chain, "OUT")


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ([{"name": "a"}, {"name": "a"}], ["two links are called 'a'"]),
        ([{"name": "first"}, {"name": "b", "teacher": "frist"}], ["b: no teacher 'frist'", "mean 'first'?", "first"]),
        ([{"name": "a", "start": "b"}, {"name": "b"}], ["a: start 'b' is not before it"]),
        ([{"name": "a", "start": "a"}], ["a: start 'a' is not before it"]),
        ([STORE, {"name": "a", "teacher": "store"}], ["a: no teacher 'store'", "none, it is the first"]),
        (
            [{"name": "a"}, STORE | {"start": "a"}],
            ["store: start and export are for links with script: train"],
        ),
        ([{"name": "a/b"}], ["a/b"]),
        ([{"name": "a", "overides": []}], ["overides"]),
        ([{"name": "a", "script": "export"}], ["'train', 'make_trajectories'", "'sample'"]),
        ([{"name": "a", "script": "verify_shards"}], ["a: no link before it writes a store that it could verify"]),
        ([STORE, VERIFY | {"overrides": ["a=1"]}], ["verify: verify_shards has no settings to override"]),
        ([STORE, {"name": "a", "script": "sample"}], ["a: run is for links with script: evaluate or sample"]),
        ([{"name": "a"}, {"name": "b", "run": "a"}], ["b: run is for links with script: evaluate or sample"]),
        ([STORE, {"name": "a", "script": "sample", "run": "store"}], ["a: no run 'store'"]),
        ([{"name": "a"}, {"name": "b", "script": "sample", "run": "a", "teacher": "a"}], ["b: teacher is for links"]),
        ([], ["at least 1 item"]),
    ],
)
def test_a_chain_that_does_not_hold_together_is_refused(links: list[dict[str, Any]], words: list[str]) -> None:
    with pytest.raises(ValidationError) as error:
        chain(*links)
    assert len(error.value.errors()) == 1 and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("chain.links=[{name: a, overides: [x]}]", "unknown key 'chain.links.0.overides'"),
        ("chain.links=[{name: a, start: b}]", "chain.links: a: no start 'b'; allowed: none, it is the first"),
        ("chain=lightning_tooy", "unknown chain=lightning_tooy (did you mean 'lightning_toy'?)"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        load("run_chain", RunChainSettings, ["chain=lightning_toy", override][override.startswith("chain=") :])
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    ("link", "line"),
    [
        ({"overrides": ["method=lcn"]}, "link a: unknown method=lcn (did you mean 'lcm'?)"),
        ({"overrides": ["method.skipp=2"]}, "link a: unknown key 'method.skipp'"),
        ({"export": ["kohya"]}, "link a: formats: a FullStudent cannot be exported as 'kohya'"),
    ],
)
def test_a_links_settings_are_checked_before_any_link_is_run(link: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        links_of(chain(STORE, {"name": "a"} | link), tmp_path)
    assert str(error.value).startswith(line)


def test_a_link_is_told_where_the_others_are_and_what_the_user_says_comes_last(tmp_path: Path) -> None:
    first = {"name": "a", "overrides": ["seed=1", "log_every=3"]}
    links = links_of(chain(STORE, first, {"name": "b", "teacher": "a", "start": "a"}), tmp_path, ["seed=2"])
    store, a, b = (link.settings for link in links)
    assert store.data.store == a.data.store == b.data.store == str(tmp_path / "store")
    assert (a.seed, a.log_every, b.seed) == (2, 3, 2)
    assert (a.output_dir, a.teacher, a.start) == (str(tmp_path / "a"), None, None)
    assert b.teacher == b.start == str(tmp_path / "a" / "export")
    assert [link.needs for link in links] == [(), ("store",), ("store", "a")]
    elsewhere = links_of(chain({"name": "a"}, STORE, {"name": "b"}), tmp_path, ["data.store=S"])
    assert {link.settings.data.store for link in elsewhere} == {"S"}


def test_an_override_of_the_chain_is_for_the_links_that_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link without a LoRA takes no offence at a rank; what no link reads is refused, with the reason."""
    lora = {"name": "lora", "overrides": ["student=lora"]}
    ranks = ["lora_rank=8", "lora_alpha=4"]
    store, with_lora, whole = links_of(chain(STORE, lora, {"name": "whole"}), tmp_path, ranks)
    assert with_lora.settings.student["rank"] == 8
    for link in (with_lora, whole):
        monkeypatch.setattr(sys, "argv", ["train", *link.arguments])
        check_read(link.settings, build(link.settings.method, schedule=NoiseSchedule.scaled_linear()))
    line = "overrides: reward_batch_size is set, and has no effect in any link: the method uses no reward"
    with pytest.raises(ConfigError, match=line):
        links_of(chain(STORE, lora), tmp_path, ["reward_batch_size=2"])


@pytest.mark.parametrize("name", CHAINS)
def test_a_shipped_chain_is_whole(name: str) -> None:
    """Every link builds; its teacher takes the steps that it expects; the store keeps every state that is read."""
    links = {link.name: link for link in shipped(name)}
    data = links["store"].settings.data
    times = kept_times(make_times("trailing", 1000, data.solver_steps), data.keep, data.segments)
    for link in links.values():
        if not link.trains:
            continue
        method: Method = build(link.settings.method, schedule=NoiseSchedule.scaled_linear())
        method.reads().check(times)
        assert set(method.trains) <= {"student", *link.settings.networks}
        teacher = link.settings.teacher and links[Path(link.settings.teacher).parent.name].settings.method
        steps = link.settings.method.get("teacher_steps")
        if teacher and steps:
            assert teacher["student_steps"] == steps > link.settings.method["student_steps"]


@pytest.mark.parametrize("name", ["lightning_sdxl", "lightning_sd15", "lightning_toy"])
def test_lightnings_chain_is_the_papers(name: str) -> None:
    """arXiv 2402.13929, sections 3.4, 3.6 and 3.7."""
    trained = [link for link in shipped(name) if link.trains]
    steps = [link.settings.method["student_steps"] for link in trained]
    assert list(dict.fromkeys(steps)) == [32, 8, 4, 2, 1] and steps == sorted(steps, reverse=True)
    assert trained[0].settings.method["teacher_steps"] == 128
    for link in trained:
        lora = "LoRAStudent" in link.settings.student["_target_"]
        game = "Adversarial" in link.settings.method["_target_"]
        assert lora == ("-lora" in link.name) and not (lora and link.settings.method["student_steps"] == 1)
        assert link.settings.networks["discriminator"]["conditional"] == link.name.endswith("-cond")
        assert link.settings.optimizer["betas"] == ([0.0, 0.99] if game else [0.9, 0.999])
        assert link.settings.optimizer["weight_decay"] == 0
        every = link.settings.method["student_steps"] <= 2
        if name == "lightning_toy":  # its games are too short to spend on times that are not drawn from
            every = "Convert" in link.settings.method["_target_"]
        else:
            assert link.settings.learning_rate == (1e-5 if not game else 1e-6 if lora else 5e-7)
        assert link.settings.method["times"] == ([250, 500, 750, 1000] if every else None)
    starts = [Path(link.settings.start).parent.name for link in trained if link.settings.start]
    loras = [link.name for link in trained if "-lora" in link.name]
    assert all(start in starts for start, _ in pairwise(loras))  # each goes on from the one before


def test_hyper_sds_chain_is_the_papers() -> None:
    """arXiv 2404.13686, sections 3 and 4.1: segments that merge, feedback, and matching in one step from T."""
    for name in ("hyper_sd_sdxl", "hyper_sd_sd15", "hyper_sd_toy"):
        trained = {link.name: link.settings for link in shipped(name) if link.trains}
        assert list(trained) == ["tscd8", "tscd4", "tscd2", "tscd1", "feedback", "one-step"]
        assert all("LoRAStudent" in settings.student["_target_"] for settings in trained.values())
        starts = [settings.start for settings in trained.values()]
        assert starts == [None, *(f"OUT/{before}/export" for before in list(trained)[:-1])]
        tscd = {name: s for name, s in trained.items() if name.startswith("tscd")}
        stages = [stage for settings in tscd.values() for stage in settings.method["stages"]]
        assert [stage["segments"] for stage in stages] == [8, 4, 2, 1]
        assert (shares := [stage.get("adversarial", 0.0) for stage in stages]) == sorted(shares) and shares[0] == 0
        if name != "hyper_sd_toy":
            assert {(s.learning_rate, s.global_batch_size) for s in tscd.values()} == {(1e-6, 512)}
        assert trained["feedback"].reward is not None and trained["feedback"].method["stages"][0]["reward"] > 0
        last = build(trained["one-step"].method, schedule=NoiseSchedule.scaled_linear())
        assert last.regression > 0 and last.sampling == Sampling("lcm", "trailing", 1)


@pytest.mark.slow
def test_hyper_sds_chain_runs_a_few_steps_of_each_link_on_the_toy(tmp_path: Path) -> None:
    """Each link starts from the LoRA before it, and trains what it is for."""
    whole = load("run_chain", RunChainSettings, ["chain=hyper_sd_toy"]).chain.model_dump()
    for link in whole["links"]:
        link["overrides"] = [
            re.sub("iterations:[0-9]+", "iterations:2", re.sub("=[1-9][0-9]+$", "=2", text))
            if re.match("method.stages|max_train_steps|method.fake_warmup", text)
            else text
            for text in link["overrides"]
        ]
    few = ["data.num_samples=8", "data.heldout_samples=0", "data.samples_per_shard=8", "data.batch_size=8"]
    few += ["engine=single", "global_batch_size=4", "lr_warmup_steps=0", "log_every=1", "dataloader_num_workers=0"]
    weights: list[dict[str, torch.Tensor]] = []
    for link in links_of(ChainSettings.model_validate(whole), tmp_path, few):
        if link.writes:
            trajectories.main(link.settings)
            continue
        steps = 4 if link.name == "one-step" else 2
        cfg = link.settings.model_copy(update={"max_train_steps": steps})
        assert train_run(cfg) == 0
        export.main(load("export", ExportSettings, link.export_arguments()))
        weights.append(load_file(link.export / LORA_FILE))
        logged = [json.loads(line) for line in (link.folder / "metrics.jsonl").read_text().splitlines()]
        keys = {key for row in logged for key in row}
        assert ("discriminator/loss" in keys) == (link.name in ("tscd4", "tscd2", "tscd1"))
        assert any("reward" in key for key in keys) == (link.name == "feedback")
        assert ("student/matching_loss" in keys and "student/regression_loss" in keys) == (link.name == "one-step")
    for before, after in pairwise(weights):
        moved = sum(float((after[name] - before[name]).square().sum()) for name in after)
        size = sum(float(before[name].square().sum()) for name in before)
        assert 0 < moved < 0.1 * size  # it went on from there


# ---- how far a link is ----------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Link:
    (link,) = links_of(chain({"name": "a", "export": ["unet"]}), tmp_path, ["data.store=S", "max_train_steps=6"])
    return link


def exported(link: Link, step: int) -> None:
    link.export.mkdir(parents=True, exist_ok=True)
    (link.export / "weights").write_text("12345")
    facts = {"step": step, "formats": ["unet"], "files": {"weights": 5}}
    (link.export / "distill.json").write_text(json.dumps(facts))


def test_a_link_is_done_when_it_is_finished_and_exported_as_it_is(trained: Link) -> None:
    assert trained.state() == "not started"
    (trained.folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (trained.folder / "checkpoints" / "step-00000004" / "manifest.json").write_text("{}")
    assert trained.state() == "at step 4 of 6"
    (trained.folder / "DONE").write_text("6\n")
    assert trained.state() == "to be exported"
    exported(trained, step=4)
    assert trained.state() == "to be exported"
    exported(trained, step=6)
    assert trained.state() == "done"
    (trained.export / "weights").write_text("1234")
    assert trained.state() == "to be exported"


def test_a_link_whose_run_shall_be_longer_is_not_done(trained: Link, tmp_path: Path) -> None:
    (trained.folder).mkdir()
    (trained.folder / "DONE").write_text("6\n")
    exported(trained, step=6)
    (longer,) = links_of(chain({"name": "a"}), tmp_path, ["data.store=S", "max_train_steps=7"])
    assert trained.done() and not longer.done()


def test_one_link_is_refused_while_what_it_builds_on_is_not_done(tmp_path: Path) -> None:
    links = links_of(chain({"name": "a"}, {"name": "b", "teacher": "a"}), tmp_path, ["data.store=S"])
    assert one_of(links, "a") is links[0]
    with pytest.raises(ConfigError, match="link=b builds on a, which is not started, not done"):
        one_of(links, "b")
    with pytest.raises(ConfigError, match="link=c: no such link; allowed: a, b"):
        one_of(links, "c")


def test_a_link_that_looks_at_what_was_made_is_done_until_that_changes(tmp_path: Path) -> None:
    report = {"name": "report", "script": "evaluate", "run": "run", "overrides": ["n=100"]}
    links = links_of(chain(STORE, VERIFY, {"name": "run"}, report), tmp_path)
    store, verify, run, evaluate = links
    assert [link.needs for link in links] == [(), ("store",), ("store", "verify"), ("run",)]
    assert verify.arguments == (f"{tmp_path}/store",)
    assert evaluate.arguments == (f"student={run.folder}", "n=100", f"output_dir={evaluate.folder}")
    store.folder.mkdir()
    exported(run, step=6)
    for link, seen in ((verify, store.folder / "index.json"), (evaluate, run.export / "distill.json")):
        seen.write_text("one")
        assert link.state() == "not started" and link.steps() == (0, 1)
        link.mark()
        assert link.state() == "done" and link.steps() == (1, 1)
        seen.write_text("another")
        assert link.state() == "not started"
    changed = links_of(chain(STORE, VERIFY, {"name": "run"}, report | {"overrides": ["n=200"]}), tmp_path)
    evaluate.mark()
    assert evaluate.done() and not changed[-1].done()


def test_the_settings_of_a_link_that_looks_are_checked_before_any_link_is_run(tmp_path: Path) -> None:
    for override, line in (("nn=3", "link a: unknown key 'nn'"), ("n=0", "link a: n=0: must be greater")):
        looks = {"name": "a", "script": "evaluate", "run": "run", "overrides": [override]}
        with pytest.raises(ConfigError, match=line):
            links_of(chain({"name": "run"}, looks), tmp_path)


def test_the_time_left_is_of_the_steps_left_at_the_pace_so_far(tmp_path: Path) -> None:
    links = links_of(chain({"name": "a"}, {"name": "b"}), tmp_path, ["data.store=S", "max_train_steps=10"])
    assert seconds_left(links) is None
    links[0].folder.mkdir()
    rows = [{"step": 9, "step_seconds": 9.0}, {"step": 10, "step_seconds": 0.5}]
    (links[0].folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert seconds_left(links) == pytest.approx(20 * 0.5)
    (links[0].folder / "DONE").write_text("10\n")
    assert seconds_left(links) == pytest.approx(10 * 0.5)


def test_a_later_store_may_be_solved_by_an_earlier_link(tmp_path: Path) -> None:
    """And those after it read that one: what a stage learns from are then its teacher's own solves."""
    again = {"name": "again", "script": "make_trajectories", "teacher": "a"}
    links = {x.name: x for x in links_of(chain(STORE, {"name": "a"}, again, {"name": "b", "teacher": "a"}), tmp_path)}
    assert f"teacher={links['a'].export}" in links["again"].arguments and links["again"].needs == ("a",)
    assert f"data.store={tmp_path / 'again'}" in links["b"].arguments and links["b"].needs == ("again", "a")


def test_the_table_says_how_far_each_link_is(tmp_path: Path) -> None:
    links = links_of(chain(STORE, {"name": "a"}, {"name": "b", "start": "a"}), tmp_path, ["max_train_steps=8"])
    begun(tmp_path / "a", 4)
    rows = [line.split() for line in table(links).splitlines()]
    assert rows[0] == ["link", "script", "size", "state"]
    assert rows[1] == ["store", "make_trajectories", "1500", "samples", "not", "started"]
    assert rows[2][:6] == ["a", "train", "8", "steps", "at", "step"] and rows[2][-2:] == ["other", "settings"]
    assert rows[3] == ["b", "train", "8", "steps", "waits", "for", "store,", "a"]
    conflict = links[1].conflict()
    assert conflict is not None and f"link a: {tmp_path}/a was made with " in conflict
    with pytest.raises(ConfigError, match="link a: .* was made with"):
        one_of(links, "a")
