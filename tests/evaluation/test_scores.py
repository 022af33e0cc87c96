"""Metrics against closed forms and against open_clip's own forward pass, at random weights."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from distill.evaluation.inception import patch, resized, to_bytes
from distill.evaluation.reference import (
    Statistics,
    decoded,
    find_pictures,
    read_statistics,
    statistics_of,
    write_statistics,
)
from distill.evaluation.scores import (
    Aesthetic,
    ClipScore,
    FrechetMetric,
    ScoreMetric,
    fid,
    load_aesthetic_head,
    load_open_clip,
)
from distill.evaluation.statistics import frechet_distance, frechet_to_statistics_with_error, frechet_with_error
from distill.models.rewards import Pixels
from tests.evaluation.test_statistics import draws, whitened

PROMPTS = ["a red boat", "two owls at night, in a forest far away", ""]
ARCHITECTURE = "tiny-metrics"
TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 7},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def statistics(x: Tensor) -> Statistics:
    return Statistics(x.mean(0), x.T.cov(), len(x))


def pictures(n: int, H: int = 20, W: int = 20, seed: int = 0) -> Tensor:
    """Each of a tone of its own, in whole 1/255."""
    random = torch.Generator().manual_seed(seed)
    tones = torch.rand(n, 3, 1, 1, generator=random)
    return to_bytes((tones + 0.3 * torch.rand(n, 3, H, W, generator=random)).clamp(0, 1)).float() / 255


def save(folder: Path, images: Tensor) -> None:
    for i, image in enumerate(to_bytes(images)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")


def quarters(images: Tensor) -> Tensor:
    """A network that can be read: the mean colour of each quarter, [B, 12]."""
    return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


# ---- Fréchet distances -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "a", "b"), [(0.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.5, 0.2, 4.0)])
def test_two_gaussians_are_at_the_distance_of_the_closed_form(shift: float, a: float, b: float) -> None:
    x, y = a * whitened(200, 5, 0), b * whitened(300, 5, 1) + shift
    expected = 5 * (shift**2 + (a - b) ** 2)
    assert fid(x, statistics(y)) == pytest.approx(expected, abs=1e-9)
    assert frechet_to_statistics_with_error(x, y.mean(0), y.T.cov())[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_torchmetrics_and_our_own_agree(seed: int) -> None:
    mix = torch.eye(8, dtype=torch.float64) + 0.3 * draws(8, 8, seed)
    x, y = draws(400, 8, seed + 10) @ mix, 1.2 * draws(400, 8, seed + 20) + 0.3
    assert fid(x, statistics(y)) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    with_error = frechet_to_statistics_with_error(x, y.mean(0), y.T.cov())
    assert with_error == pytest.approx(frechet_with_error(x, y), rel=1e-9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, pictures(60))
    return tmp_path


def metric(source: Path | str) -> FrechetMetric:
    real = find_pictures(str(source))
    return FrechetMetric("fid", "quarters", quarters, resized, lambda: statistics_of(real, resized, quarters))


def test_pictures_are_at_no_distance_from_themselves(folder: Path) -> None:
    """From files on one side and as tensors on the other."""
    frechet = metric(folder)
    found = frechet.summarise(frechet.measure(pictures(60), [""] * 60))
    assert found["fid"] == pytest.approx(0, abs=1e-9) and found["fid_n_real"] == 60
    others = frechet.summarise(frechet.measure(pictures(60, seed=1) * 0.5, [""] * 60))
    assert others["fid"] > 0.05 and 0 < others["fid_se"] < others["fid"]


def test_a_tar_holds_the_same_pictures(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "real.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for file in reversed(sorted(folder.glob("*.png"))):
            archive.add(file, file.name)
    real = [statistics_of(find_pictures(str(source)), resized, quarters) for source in (folder, tmp_path / "real.tar")]
    for name in ("mean", "covariance"):
        torch.testing.assert_close(getattr(real[0], name), getattr(real[1], name), rtol=0, atol=1e-12)


def test_statistics_are_those_of_the_features(folder: Path) -> None:
    found, features = (
        statistics_of(find_pictures(str(folder)), resized, quarters),
        quarters(resized(pictures(60))).double(),
    )
    torch.testing.assert_close(found.mean, features.mean(0), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.covariance, features.T.cov(), rtol=0, atol=1e-7)


def test_real_pictures_without_a_patch_are_left_out_and_counted(tmp_path: Path) -> None:
    save(tmp_path, pictures(3, 300, 310))
    Image.fromarray(np.zeros((298, 400, 3), np.uint8)).save(tmp_path / "small.png")
    assert statistics_of(find_pictures(str(tmp_path)), patch, quarters).n == 3


def test_the_prompts_own_pictures_can_be_taken_alone(folder: Path) -> None:
    found = find_pictures(str(folder), ["005.png", "003.png"])
    assert list(found.names) == ["003.png", "005.png"] and found.identity != find_pictures(str(folder)).identity
    torch.testing.assert_close(decoded(next(iter(found))), pictures(60)[3:4], rtol=0, atol=1e-6)
    with pytest.raises(FileNotFoundError, match="2 of the prompts' pictures are missing: 060.png$"):
        find_pictures(str(folder), ["003.png", "060.png", "061.png"])


def test_a_damaged_or_missing_reference_is_one_clear_line(folder: Path) -> None:
    (folder / "000.png").write_bytes((folder / "001.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="^reference picture 000.png: not decoded"):
        statistics_of(find_pictures(str(folder)), resized, quarters)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder$"):
        find_pictures(str(folder / "nowhere"))


def test_statistics_go_through_a_file_of_their_protocol(tmp_path: Path) -> None:
    own = statistics(whitened(40, 4))
    write_statistics(tmp_path / "s.safetensors", {"fid": own, "fid_patch": statistics(whitened(9, 4))}, "coco")
    found = read_statistics(tmp_path / "s.safetensors", "coco")
    assert set(found) == {"fid", "fid_patch"} and torch.equal(found["fid"].covariance, own.covariance)
    assert found["fid"].n == 40
    with pytest.raises(ValueError, match="it is of the protocol 'coco', this one is 'other'$"):
        read_statistics(tmp_path / "s.safetensors", "other")


# ---- scores of each picture ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[nn.Module, Path]]:
    """A tiny open_clip model, and a file of its weights."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE).eval()
    torch.save(model.state_dict(), folder / "clip.pt")
    yield model, folder / "clip.pt"


@pytest.mark.parametrize("prefix", ["", "A photo depicts "])
def test_the_clip_score_is_a_hundred_cosines_of_open_clips_own_forward(
    clip: tuple[nn.Module, Path], prefix: str
) -> None:
    model, file = clip
    images = pictures(3, 40, 40)
    with torch.no_grad():
        image, text, _ = model(Pixels(28)(images), open_clip.tokenize([prefix + prompt for prompt in PROMPTS]))
    expected = 100 * nn.functional.cosine_similarity(image, text).double()
    score = ClipScore(load_open_clip(ARCHITECTURE, str(file)), open_clip.get_tokenizer(ARCHITECTURE), prefix)
    own = ScoreMetric("clip_score", "tiny", score)
    measured = own.measure(images, PROMPTS)
    torch.testing.assert_close(measured["clip_score_scores"], expected, rtol=1e-5, atol=1e-4)
    found = own.summarise(measured)
    assert found["clip_score"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found["clip_score_se"] == pytest.approx(float(expected.std()) / 3**0.5, rel=1e-4) and expected.std() > 0.1


@pytest.mark.parametrize("version", [1, 2])
def test_the_aesthetic_score_is_linear_on_an_embedding_of_length_1(
    clip: tuple[nn.Module, Path], version: int, tmp_path: Path
) -> None:
    model, images = clip[0], pictures(3, 40, 40)
    torch.manual_seed(1)
    layers = [nn.Linear(12, 1)] if version == 1 else [nn.Linear(12, 8), nn.Linear(8, 4), nn.Linear(4, 1)]
    published = (
        layers[0] if version == 1 else nn.ModuleDict({"layers": nn.Sequential(layers[0], nn.Dropout(), *layers[1:])})
    )
    torch.save(published.state_dict(), tmp_path / "head.pth")
    with torch.no_grad():
        embedding = model.encode_image(Pixels(28)(images))  # type: ignore[operator]
        expected = nn.Sequential(*layers)(embedding / embedding.norm(dim=1, keepdim=True))[:, 0]
    head = load_aesthetic_head(str(tmp_path / "head.pth"), 12)
    torch.testing.assert_close(Aesthetic(model, head)(images, PROMPTS), expected)
    with pytest.raises(ValueError, match=r"does not lead from 768 features to 1: \[\[(1|8), 12\]"):
        load_aesthetic_head(str(tmp_path / "head.pth"), 768)


def test_weights_that_are_not_there_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^no file 'nowhere.pt', and open_clip has no tiny.* known: none$"):
        load_open_clip(ARCHITECTURE, "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"^open_clip cannot fetch ViT-L-14-quickgelu openai: "):
        load_open_clip("ViT-L-14-quickgelu", "openai")  # there is no network in tests
