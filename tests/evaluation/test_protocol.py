"""Protocols: their prompts, what every row says of them, what is left out and why, and that they never mix."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from distill.config.loading import CONFIGS, load
from distill.config.settings import EvaluateSettings
from distill.evaluation.compare import by_protocol
from distill.evaluation.inception import FEATURES, Inception, resized
from distill.evaluation.metrics import METRICS, known_weights, protocol_metrics
from distill.evaluation.protocol import (
    Captions,
    MetricScorer,
    Protocol,
    Reference,
    build_scorer,
    read_captions,
)
from distill.evaluation.reference import Statistics
from distill.evaluation.report import format_table, write_report
from distill.evaluation.scores import ScoreMetric
from tests.evaluation.test_scores import pictures, quarters, save
from tests.evaluation.world import comparison

PROTOCOL = Protocol(
    name="tiny",
    used_by="this test",
    n=64,
    side=2,
    reference=None,
    matching=False,
    shown_at=None,
    clip="ViT-Tiny",
    clip_weights="none",
    clip_prefix="",
    metrics=("hps",),
)
CAPTIONS = Captions(["up", "down"] * 32)
NO_WEIGHTS: dict[str, str | None] = {}


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    assert images.min() >= 0 and images.max() <= 1 and len(images) == len(prompts)
    return 100 * images.flatten(1).mean(1)


def scorer(**changes: Any) -> MetricScorer:
    metric = ScoreMetric("hps", "brightness", brightness)
    return MetricScorer(replace(PROTOCOL, **changes), CAPTIONS, [metric], {"clip_score": "no weights here"}, "")


def rows(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Of a teacher that is not tuned: nothing here is a Fréchet distance."""
    plan = {"guidances": (1.0,), "spacings": ("trailing",)}
    return comparison(folder, scorer=scorer(**changes), **plan).rows()  # type: ignore[arg-type]


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path: Path) -> str:
    """COCO's layout: several captions a picture, out of order, with line ends in them."""
    said = [(9, "Two dogs\n"), (4, "a  cat"), (9, "dogs, again"), (7, "A boat."), (4, "the cat")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(said)]
    images = [{"id": image, "file_name": f"val_{image:03d}.jpg"} for image in (4, 7, 9)]
    (tmp_path / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return str(tmp_path / "captions.json")


def test_cocos_captions_are_the_first_of_each_picture(coco: str) -> None:
    found = read_captions(coco, 3)
    assert list(found.prompts) == ["Two dogs", "a cat", "A boat."]
    assert found.pictures is not None and list(found.pictures) == ["val_009.jpg", "val_004.jpg", "val_007.jpg"]
    assert list(read_captions(coco, 2).prompts) == ["Two dogs", "a cat"]


@pytest.mark.parametrize(("name", "text"), [("p.txt", "one\ntwo\n"), ("p.jsonl", '"one"\n{"prompt": "two"}\n')])
def test_other_prompts_say_no_pictures(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_captions(str(tmp_path / name), 2) == Captions(["one", "two"])


def test_prompts_that_will_not_do_are_one_clear_line(coco: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="captions.json: there are 3, the protocol takes 4$"):
        read_captions(coco, 4)
    for content, said in (
        ('{"annotations": [], "pictures": []}', "not in the layout of COCO's captions"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": 3}]}', "annotation 0"),
        ("3", "a list of texts or objects is needed"),
        ("[" * 100_000, "nested too deeply"),
    ):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match=f"other.json: .*{said}"):
            read_captions(str(tmp_path / "other.json"), 1)
    (tmp_path / "list.json").write_text('["a cat", {"prompt": "a dog"}]')
    assert list(read_captions(str(tmp_path / "list.json"), 2).prompts) == ["a cat", "a dog"]
    with pytest.raises(FileNotFoundError, match="no prompts at"):
        read_captions(str(tmp_path / "nowhere.json"), 1)


# ---- what rows say ---------------------------------------------------------------------------------------------------


def test_every_row_says_how_it_was_measured(tmp_path: Path) -> None:
    for row in rows(tmp_path):
        assert row["protocol"].startswith("tiny: 2 px, CLIP ViT-Tiny none, prompts ")
        assert row["protocol"].endswith(", N = 64") and row["n"] == 64 and row["judged_by"].endswith("; brightness")
        assert row["seeds"] == [10_000_000, 10_000_063] and row["weights"] in ("t", "s")
        assert len(row["times"]) == row["steps"] + 1 and row["times"][0] == 1000 and row["times"][-1] == 0
        assert row["left_out"] == {"clip_score": "no weights here"} and "clip_score" not in row
        assert row["hps_se"] > 0


def test_pictures_are_measured_as_files_hold_them(tmp_path: Path) -> None:
    measured = scorer().measure(
        torch.tensor([-1.0, 1.0, 0.1234]).expand(1, 2, 3).unsqueeze(1).expand(1, 3, 2, 3), ["up"]
    )
    byte = round((0.1234 + 1) / 2 * 255)
    assert float(measured["hps_scores"]) == pytest.approx(100 * (0 + 255 + byte) / 3 / 255, rel=1e-6)


@pytest.mark.parametrize(
    "changes", [{"side": 4}, {"shown_at": 256}, {"clip": "ViT-L"}, {"clip_prefix": "A "}, {"name": "b"}]
)
def test_rows_of_different_protocols_never_share_a_table(tmp_path: Path, changes: dict[str, Any]) -> None:
    these, others = rows(tmp_path), rows(tmp_path, **changes)
    with pytest.raises(ValueError, match="^rows of different protocols cannot share a table: tiny: "):
        format_table([these[0], others[0]])
    tables = by_protocol([*these, *others])
    assert list(tables.values()) == [these, others]
    assert all(format_table(own) for own in tables.values())


def test_another_n_is_another_protocol(tmp_path: Path) -> None:
    (one, *_), (other, *_) = (comparison(tmp_path, n=n).rows() for n in (32, 64))
    with pytest.raises(ValueError, match="pixels, N = 32 | pixels, N = 64$"):
        format_table([one, other])


def test_the_report_says_it_too(tmp_path: Path) -> None:
    plan = {"guidances": (1.0,), "spacings": ("trailing",)}
    study = comparison(tmp_path / "cache", scorer=scorer(), **plan)  # type: ignore[arg-type]
    write_report(tmp_path, study, about="A Gaussian.", reproduce="again")
    text = " ".join((tmp_path / "report.md").read_text().split())
    assert "Left out: clip_score, no weights here" in text and "Protocol tiny, as in: this test." in text
    assert "N = 64" in text and "not tuned" in text and "by Fréchet distance" not in text and "brightness" in text


# ---- what can be measured --------------------------------------------------------------------------------------------


def test_what_is_not_there_is_left_out_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    everything = replace(
        PROTOCOL,
        metrics=tuple(protocol_metrics()),
        n=FEATURES + 1,
        side=512,
        clip="ViT-g-14",
        clip_weights="laion2b_s12b_b42k",
    )
    found = build_scorer(everything, CAPTIONS, NO_WEIGHTS, tmp_path, "cpu")
    assert list(found.left_out) == protocol_metrics() and not found.metrics
    assert all(caplog.text.count(f"{name} is left out: ") == 1 for name in protocol_metrics())
    assert found.left_out["fid"].startswith("no real pictures: set protocol.reference=")
    assert found.left_out["clip_score"].startswith("open_clip cannot fetch ViT-g-14 laion2b_s12b_b42k")
    assert found.left_out["hps"] == "no weights: set weights.hps=FILE"
    (tmp_path / "real").mkdir()
    torch.save({}, tmp_path / "real" / "x.png")
    few = replace(everything, n=FEATURES, metrics=("fid",), reference=str(tmp_path / "real"))
    assert (
        "it takes more than 2048 pictures" in build_scorer(few, CAPTIONS, NO_WEIGHTS, tmp_path, "cpu").left_out["fid"]
    )
    small = replace(everything, side=298, metrics=("fid_patch",))
    assert "have no patch" in build_scorer(small, CAPTIONS, NO_WEIGHTS, tmp_path, "cpu").left_out["fid_patch"]
    blind = replace(everything, reference=str(tmp_path / "real"), matching=True, metrics=("fid",))
    assert "which pictures they describe" in build_scorer(blind, CAPTIONS, NO_WEIGHTS, tmp_path, "cpu").left_out["fid"]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    folder = tmp_path / "real"
    folder.mkdir()
    save(folder, pictures(40))
    return folder


def test_a_reference_is_measured_once_and_can_be_given_as_what_was_kept(real: Path, tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, reference=str(real))
    shown: list[int] = []

    def network(images: Tensor) -> Tensor:
        shown.append(len(images))
        return quarters(images)

    def found(reference: str) -> Statistics:
        at = Reference.find(replace(protocol, reference=reference), CAPTIONS, tmp_path / "kept")
        return at.statistics("fid", "quarters", resized, network)

    first = found(str(real))
    (kept,) = (tmp_path / "kept").iterdir()
    for again in (str(real), str(kept)):
        assert torch.equal(found(again).mean, first.mean) and found(again).n == 40
    assert sum(shown) == 40
    with pytest.raises(ValueError, match="has no statistics for fid_patch, it has: fid$"):
        Reference.find(replace(protocol, reference=str(kept)), CAPTIONS, tmp_path).statistics(
            "fid_patch", "", resized, network
        )
    with pytest.raises(ValueError, match="it is of the protocol 'tiny', this one is 'other'$"):
        Reference.find(replace(protocol, reference=str(kept), name="other"), CAPTIONS, tmp_path)


def test_fid_is_there_when_its_weights_and_its_reference_are(real: Path, tmp_path: Path) -> None:
    torch.save(Inception().network.state_dict(), tmp_path / "inception.pth")
    protocol = replace(
        PROTOCOL, reference=str(real), n=FEATURES + 1, side=512, shown_at=256, metrics=("fid", "fid_patch")
    )
    found = build_scorer(protocol, CAPTIONS, {"inception": str(tmp_path / "inception.pth")}, tmp_path / "kept", "cpu")
    assert not found.left_out and found.against.startswith("40 pictures ") and found.against in found.protocol
    measured = found.measure(torch.rand(1, 3, 512, 512) * 2 - 1, ["up"])
    assert measured["fid_features"].shape == measured["fid_patch_features"].shape == (1, FEATURES)
    assert (measured["fid_features"] - measured["fid_patch_features"]).abs().max() > 0
    assert found.name.count("Inception ") == 2 and "FID at 256 px" in found.name and "FID-patch" in found.name


def test_a_metric_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="^metric 'fidd' is not known; allowed: precision, recall, coverage, fid, fd_dinov2, cmmd, fid_patch, ",
    ):
        build_scorer(replace(PROTOCOL, metrics=("fidd",)), CAPTIONS, NO_WEIGHTS, tmp_path, "cpu")


@dataclass(frozen=True)
class Published:
    """What papers report by a protocol."""

    n: int
    clip: str
    metrics: set[str]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("coco2014-30k", Published(30_000, "ViT-g-14", {"fid", "clip_score"})),
        ("coco2014-10k", Published(10_000, "ViT-g-14", {"fid", "fid_patch", "clip_score"})),
        ("coco2017-5k", Published(5_000, "ViT-g-14", {"fid", "clip_score", "aesthetic", "image_reward"})),
    ],
)
def test_protocols_by_name(name: str, published: Published) -> None:
    cfg = load("evaluate", EvaluateSettings, [f"protocol={name}", "protocol.prompts=p.json", "output_dir=o"])
    assert cfg.protocol.name == name and cfg.protocol.n == published.n and cfg.protocol.clip == published.clip
    assert published.metrics <= set(cfg.protocol.metrics) <= set(protocol_metrics()) and cfg.protocol.tuning_n == 0


def test_every_protocol_is_tested() -> None:
    found = {path.stem for path in (CONFIGS / "protocol").glob("*.yaml")}
    assert found == {"toy", "coco2014-30k", "coco2014-10k", "coco2017-5k"}
    assert load("evaluate", EvaluateSettings, ["output_dir=o"]).protocol.metrics == ["judge"]


def test_the_weights_that_can_be_set_are_those_of_the_metrics() -> None:
    settings = yaml.safe_load((Path(__file__).parents[2] / "configs/evaluate.yaml").read_text())
    assert sorted(settings["weights"]) == sorted(known_weights())


def test_each_metric_of_a_protocol_has_a_loader_and_a_paper() -> None:
    for name in protocol_metrics():
        assert callable(METRICS[name].loader()) and METRICS[name].paper and METRICS[name].better
