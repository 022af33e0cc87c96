"""`scripts/evaluate.py`: students in every kind of folder, by a protocol of metrics and by the toy's; the refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

import distill
from distill.commands import evaluate, sample
from distill.config.loading import ConfigError, load
from distill.config.settings import EvaluateSettings, SampleSettings
from distill.evaluation.blocks import WorkShare
from distill.evaluation.compare import ComparisonPlan, Setting
from distill.evaluation.pipelines import load_pipeline
from distill.evaluation.students import load_student, parse_sampler, with_student
from distill.methods.sampling import Sampling
from distill.models.families.loading import load_teacher
from distill.models.formats import save_network
from distill.models.lora import add_lora, save_lora
from distill.training import arithmetic
from distill.training.checkpoint import _digest, _write_manifest, best_of
from distill.training.run import mark_finished
from tests.evaluation.test_scores import TINY
from tests.tiny import save_tiny
from tests.training.test_export import a_run

FACTS = {
    "formats": ["diffusers"],
    "prediction": "epsilon",
    "sampling": {"sampler": "ddim", "spacing": "trailing", "steps": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher, a LoRA and a UNet of it as exports, prompts, and a tiny CLIP."""
    root = tmp_path_factory.mktemp("evaluate")
    save_tiny(root / "teacher")
    teacher = load_teacher(root / "teacher")
    facts = FACTS | {"base_hash": teacher.teacher_hash, "settings": {"data": {"guidance": 2.0}}}
    random = torch.Generator().manual_seed(1)
    for parameter in add_lora(teacher.network, rank=3, alpha=2.0):
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    save_lora(root / "lora", teacher.network)
    save_lora(root / "foreign", teacher.network)
    (root / "lora" / "distill.json").write_text(json.dumps(facts))
    whole = load_teacher(root / "teacher").network
    save_network(root / "unet", whole, torch.float32)
    (root / "prompts.jsonl").write_text('"a cat"\n"two dogs"\n"a boat"\n')
    (root / "tiny-evaluate.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(root / "tiny-evaluate.json")
    torch.save(open_clip.create_model("tiny-evaluate").state_dict(), root / "clip.pt")
    return root


def usual(folder: Path, *overrides: str) -> list[str]:
    return [
        "protocol=coco2014-10k",
        f"protocol.prompts={folder / 'prompts.jsonl'}",
        "protocol.resolution=null",
        "protocol.clip=tiny-evaluate",
        f"weights.clip={folder / 'clip.pt'}",
        f"model.pretrained_model_name_or_path={folder / 'teacher'}",
        "n=3",
        "teacher_steps=3",
        "batch_size=2",
        *overrides,
    ]


def settings(folder: Path, output: Path, *overrides: str) -> EvaluateSettings:
    return load("evaluate", EvaluateSettings, usual(folder, f"output_dir={output}", *overrides))


def rows(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "report" / "metrics.json").read_text())


def test_an_export_is_judged_as_it_says(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(settings(folder, tmp_path, f"student={folder / 'lora'}", "samplers=[ddim,lcm]"))
    found = rows(tmp_path)
    drawn = [(row["model"], row["sampler"], row["spacing"], row["steps"], row["guidance"], row["nfe"]) for row in found]
    assert drawn == [
        ("teacher", "ddim", "trailing", 3, 2.0, 6),
        ("teacher", "ddim", "trailing", 2, 2.0, 4),
        ("student", "ddim", "trailing", 2, 1.0, 2),
        ("student", "lcm", "lcm", 2, 1.0, 2),
        ("teacher", "ddim", "trailing", 1, 2.0, 2),  # at the student's cost
    ]
    for row in found:
        assert row["n"] == 3 and row["protocol"].startswith("coco2014-10k: 24 px, CLIP tiny-evaluate")
        assert {"clip_score", "clip_score_se", "teacher_consistency"} <= row.keys()
        assert row["left_out"].keys() == {"fid", "fid_patch"}
    assert len({row["weights"] for row in found}) == 2
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Left out: fid, " in text and "N = 3" in text and "CLIP score" in capsys.readouterr().out


@contextmanager
def kernels() -> Iterator[set[str]]:
    """The names of what torch computes meanwhile."""
    names: set[str] = set()
    try:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            yield names
        names |= {event.name for event in seen.events()}
    finally:
        arithmetic.choose_attention()
        torch._dynamo.reset()


def test_settings_of_speed_change_how_pictures_are_made_and_hardly_the_pictures(folder: Path, tmp_path: Path) -> None:
    given = [f"model.pretrained_model_name_or_path={folder}/teacher", f"lora={folder}/lora", "prompts=a", "steps=1"]
    found = []
    for speed in ([], ["compile=eager", "attention=math"]):
        output = tmp_path / str(len(speed))
        with kernels() as names:
            distill.sample(*given, *speed, f"output_dir={output}")
        assert any(name.startswith("Torch-Compiled Region") for name in names) is bool(speed)
        assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in names) is not bool(speed)
        found.append(np.asarray(Image.open(output / "00000.png")).astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1


@pytest.mark.parametrize("student", ["lora", "unet"])
def test_all_that_draws_is_executed_as_settings_say(student: str, folder: Path, tmp_path: Path) -> None:
    """Once, where a LoRA and its teacher are one network; its blocks compiled, its channels innermost."""
    source = evaluate.Source(folder / student, None, {})
    for fast in (False, True):
        speed = [f"channels_last={str(fast).lower()}", f"compile={'eager' if fast else 'false'}"]
        cfg = settings(folder, tmp_path, "guidance=2", "steps=[2]", *speed)
        drawn: list[Any] = [view.module for view in evaluate.build(cfg, source, WorkShare()).denoisers.values()]  # type: ignore[attr-defined]
        assert len({id(unet) for unet in drawn}) == (1 if student == "lora" else 2)
        given = [f"model.pretrained_model_name_or_path={folder}/teacher", f"lora={folder / student}", "prompts=a"]
        chosen = load("sample", SampleSettings, [*given, f"output_dir={tmp_path}", *speed])
        drawn.append(sample.on_device(chosen, load_pipeline(str(folder / "teacher"), folder / student)).unet)
        for unet in drawn:
            assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last) is fast
            assert len(unet.conv_in._forward_pre_hooks) == int(fast)
            block = next(part for part in unet.modules() if type(part).__name__ == "BasicTransformerBlock")
            assert (block._compiled_call_impl is not None) is fast


def test_a_teacher_alone_and_any_student_s_folder(folder: Path, tmp_path: Path) -> None:
    evaluate.main(settings(folder, tmp_path / "teacher", "guidance=2", "steps=[1]", "dtype=bfloat16"))
    assert [(row["model"], row["steps"]) for row in rows(tmp_path / "teacher")] == [("teacher", 3), ("teacher", 1)]
    assert all(row["weights"].endswith(" in bfloat16") for row in rows(tmp_path / "teacher"))
    evaluate.main(settings(folder, tmp_path / "unet", "guidance=2", "steps=[1]", f"student={folder / 'unet'}"))
    student = next(row for row in rows(tmp_path / "unet") if row["model"] == "student")
    assert (student["sampler"], student["guidance"]) == ("lcm", 1.0)
    teacher = next(row for row in rows(tmp_path / "unet") if row["nfe"] == 1 and row["model"] == "teacher")
    for name in ("teacher_consistency", "clip_score"):  # its weights are the teacher's: one jump is one unguided step
        assert student[name] == pytest.approx(teacher[name], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=[1]"], r"the teacher's guidance is not known \(there is no run that says it\): set guidance=W"),
        (["guidance=2", "student=nowhere"], "^student=nowhere: no such folder$"),
        (["guidance=2", "n=4"], "prompts.jsonl: there are 3, the protocol takes 4$"),
        (
            ["guidance=2", "student={folder}/teacher/vae"],
            "no LoRA in .*vae: pytorch_lora_weights.safetensors is missing$",
        ),
        (["student={folder}/lora", "samplers=[rk4]"], "^samplers.0: sampler .rk4. is not known; allowed: lcm, "),
        (["student={folder}/lora", "samplers=[ddim/milestones]", "steps=[9]"], "steps must be within 1 ... 8, got 9"),
        (["guidance=2", "protocol=toy", "n=99"], "n=99: the judge's Fréchet distance takes at least 100 pictures$"),
        (["guidance=2", "model.pretrained_model_name_or_path=null"], "^which teacher. Set model.pretrained_model"),
        (["guidance=2", "weights.clip={folder}/prompts.jsonl"], "prompts.jsonl is refused: it is not a state dict"),
        (["guidance=2", "store={folder}/nowhere"], "no trajectory store at"),
    ],
)
def test_what_cannot_be_judged_is_one_clear_line(
    folder: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    given = [override.format(folder=folder) for override in overrides]
    with pytest.raises((ConfigError, FileNotFoundError, ValueError), match=message) as error:
        if "protocol=toy" in given:
            cfg = load("evaluate", EvaluateSettings, [*given, f"output_dir={tmp_path}"])
        else:
            cfg = settings(folder, tmp_path, *given)
        evaluate.main(cfg)
    assert "\n" not in str(error.value)


def test_an_export_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    facts = json.loads((folder / "lora" / "distill.json").read_text()) | {"base_hash": "0000"}
    (folder / "foreign" / "distill.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="is an export of another model: its base_hash is 0000"):
        evaluate.main(settings(folder, tmp_path, f"student={folder / 'foreign'}"))


def test_the_toy_s_protocol_needs_nothing_but_a_guidance(tmp_path: Path) -> None:
    few = ["n=100", "guidance=2", "teacher_steps=1", "steps=[1]", "protocol.tuning_n=0", f"output_dir={tmp_path}"]
    evaluate.main(load("evaluate", EvaluateSettings, few))
    (row,) = rows(tmp_path)
    assert (
        row["protocol"] == "toy, N = 100" and row["judged_by"].startswith("toy judge ") and 0 < row["caption_accuracy"]
    )


def test_the_key_student_is_a_value_and_not_hydra_s_group() -> None:
    assert load("evaluate", EvaluateSettings, ["student=runs/a", "output_dir=o"]).student == "runs/a"
    assert load("evaluate", EvaluateSettings, ["output_dir=o"]).student is None
    assert load("evaluate", EvaluateSettings, ["student=[a,b]", "output_dir=o"]).student == "[a,b]"  # a folder's name


def test_samplers_take_the_spacing_that_is_meant() -> None:
    lightning = Sampling("euler", "trailing", 4)
    assert parse_sampler("euler", lightning) == lightning
    assert parse_sampler("lcm", lightning) == Sampling("lcm", "lcm", 4)
    assert parse_sampler("ddim", Sampling()) == Sampling("ddim", "trailing")
    assert parse_sampler("ddim/milestones", Sampling()) == Sampling("ddim", "milestones")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_teacher_is_drawn_at_each_student_s_cost(folder: Path, guidance: float) -> None:
    student = load_student(folder / "lora", load_teacher(folder / "teacher"))
    plan = ComparisonPlan(guidance, steps=(1, 3, 8), guidances=(guidance,), spacings=("trailing",))
    full = with_student(plan, student, [Sampling()], [1.0, 2.0])
    of_student = [full.student(steps) for steps in plan.steps] + [s for s in full.more if s.model == "student"]
    assert {s.nfe for s in of_student} == {1, 3, 8, 2, 6, 16}
    of_teacher = {s.nfe for s in full.more if s.model == "teacher"} | {full.candidates(s)[0].nfe for s in plan.steps}
    assert {s.nfe for s in of_student} <= of_teacher
    assert Setting("student", "lcm", 8, 2.0, "lcm") in full.more
    tuned = with_student(replace(plan, guidances=(1.0, 2.0)), student, [Sampling()], [1.0])
    assert all(s.steps not in plan.steps for s in tuned.more)  # there the tuned teacher is


def test_each_checkpoint_of_a_run_is_judged_beside_it_and_the_best_is_marked(folder: Path, tmp_path: Path) -> None:
    """The second checkpoint's LoRA is zero: that student is its teacher, and nearer to it than the first."""
    trained = a_run(tmp_path, "sd15", "lora", "data.guidance=1.0", "max_train_steps=5")
    first = trained.folder / "checkpoints" / "step-00000003"
    second = Path(shutil.copytree(first, first.with_name("step-00000005")))
    manifest = json.loads((second / "manifest.json").read_text())
    del manifest["seal"]
    for path in (path for path in manifest["files"] if path.endswith(".safetensors")):
        save_file({name: torch.zeros_like(w) for name, w in load_file(second / path).items()}, second / path)
        manifest["files"][path] = _digest(second / path)
    _write_manifest(second, manifest | {"step": 5})
    mark_finished(trained.folder, 5)

    given = [f"watch={trained.folder}", f"model.pretrained_model_name_or_path={trained.teacher}", "guidance=1"]
    given += ["samplers=[ddim]", "steps=[1,3]", "watch_metric=teacher_consistency"]
    for _ in range(2):  # watched again, nothing is judged twice
        evaluate.main(settings(folder, tmp_path / "out", *given))
        lines = [json.loads(line) for line in (trained.folder / "evaluation/metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [3, 5]
    assert {"clip_score/1", "teacher_consistency/1", "teacher_consistency/3"} <= lines[0].keys()
    assert lines[1]["teacher_consistency/3"] < 1e-6 < lines[0]["teacher_consistency/3"]  # float16 of it was exported
    assert best_of(trained.folder / "checkpoints") == 5
    with pytest.raises(ConfigError, match="watch_metric=fidd is not known"):
        evaluate.main(settings(folder, tmp_path / "out", *given[:-1], "watch_metric=fidd"))


def test_pictures_are_of_the_teachers_side_unless_another_is_asked_for(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usual = load(
        "evaluate", EvaluateSettings, ["protocol=coco2014-10k", "protocol.prompts=x", f"output_dir={tmp_path}"]
    )
    assert usual.protocol.resolution is None
    teacher = load_teacher(folder / "teacher")
    assert evaluate.at_resolution(teacher, None).resolution == teacher.resolution == 24 and not caplog.records
    assert evaluate.at_resolution(teacher, 48).resolution == 48
    assert "pictures of 48 px are generated, as protocol.resolution says; the teacher's own is 24" in caplog.text
