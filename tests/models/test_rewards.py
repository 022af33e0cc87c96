"""Rewards of pictures: the preprocessing and scores of transformers and open_clip, with a gradient; files refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, CLIPConfig, CLIPImageProcessor, CLIPModel

from distill.models.rewards import (
    Pixels,
    Reward,
    load_clip_reward,
    load_hps_reward,
    load_image_reward,
)
from tests.tiny import TOKENS, _tokenizer

PROMPTS = ["a red boat", "two owls at night, in a forest far away", ""]


def pictures(H: int = 40, W: int = 40, n: int = 3) -> Tensor:
    """Smooth ones with some noise, in whole 1/255."""
    random = torch.Generator().manual_seed(H)
    coarse = torch.rand(n, 3, 5, 5, generator=random)
    smooth = nn.functional.interpolate(coarse, (H, W), mode="bilinear")
    return ((smooth + 0.1 * torch.rand(n, 3, H, W, generator=random)).clamp(0, 1) * 255).round() / 255


# ---- what the networks are shown --------------------------------------------------------------------------------


@pytest.mark.parametrize(("H", "W"), [(224, 224), (32, 32), (512, 512), (300, 200), (240, 500)])
def test_pixels_are_those_of_clips_image_processor(H: int, W: int) -> None:
    """Whose bicubic filter rounds to 1/255 twice: 1/255 is 0.015 of a channel's deviation."""
    images = pictures(H, W)
    theirs = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    arrays = [np.asarray((x * 255).round().byte().permute(1, 2, 0)) for x in images]
    expected = torch.as_tensor(np.stack(theirs(arrays, return_tensors="np").pixel_values))
    difference = (Pixels(224)(images) - expected).abs()
    assert difference.max() < 0.04 and difference.mean() < 0.006


def test_pixels_show_the_gradient_everything() -> None:
    images = (pictures(300, 300) * 0.8 + 0.1).requires_grad_()
    Pixels(64)(images).sum().backward()
    assert images.grad is not None and (images.grad != 0).all()


# ---- the scores --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, Path]:
    """A tiny CLIP model, and its folder."""
    torch.manual_seed(0)
    sides = {"hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 514, "max_position_embeddings": TOKENS, "bos_token_id": 512, "eos_token_id": 513}
    config = CLIPConfig(
        text_config=sides | text | {"pad_token_id": 513},
        vision_config=sides | {"image_size": 28, "patch_size": 7},
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return model, folder


def test_clip_scores_are_transformers_logits(clip: tuple[CLIPModel, Path]) -> None:
    model, folder = clip
    tokens = _tokenizer()(PROMPTS, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, pixel_values=Pixels(28)(pictures())).logits_per_image.diagonal()
    found = load_clip_reward(str(folder))(pictures(), PROMPTS)
    torch.testing.assert_close(found, expected)
    assert expected.std() > 0.05  # or nothing would be shown


TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 7},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[nn.Module, Path]]:
    """A tiny open_clip model, and a file of its weights as HPSv2's are published."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / "tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-hps.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-hps").eval()
    torch.save({"epoch": 3, "name": "tiny", "state_dict": model.state_dict()}, folder / "weights.pt")
    yield model, folder / "weights.pt"


def test_hps_scores_are_open_clips_cosines(hps: tuple[nn.Module, Path]) -> None:
    model, file = hps
    with torch.no_grad():
        image, text, _ = model(Pixels(28)(pictures()), open_clip.tokenize(PROMPTS))
    expected = nn.functional.cosine_similarity(image, text)
    once = load_hps_reward(str(file), "tiny-hps", scale=1.0)(pictures(), PROMPTS)
    torch.testing.assert_close(once, expected, rtol=0, atol=2e-6)  # 16 float32 roundings of a cosine: other products
    torch.testing.assert_close(load_hps_reward(str(file), "tiny-hps")(pictures(), PROMPTS), 100 * once)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlipForImageTextRetrieval, dict[str, Tensor], Path, str]:
    """A tiny BLIP in transformers, its weights and a head under their published names, their file, a tokenizer."""
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz,", "red", "boat", "two", "owl"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    vision = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = vision | {"hidden_size": 64, "num_attention_heads": 1, "encoder_hidden_size": 128}
    config = BlipConfig(
        vision_config=vision | {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "initializer_range": 0.1},
        text_config=text | {"vocab_size": len(words), "max_position_embeddings": 48, "initializer_range": 0.1},
    )
    model = BlipForImageTextRetrieval(config).eval()
    widths = {0: (64, 40), 2: (40, 20), 4: (20, 10), 6: (10, 5), 7: (5, 1)}  # dropout between the first four
    head = {f"mlp.layers.{i}.weight": torch.randn(n, m) for i, (m, n) in widths.items()}
    head |= {f"mlp.layers.{i}.bias": torch.randn(n) for i, (_, n) in widths.items()}
    weights = head | published(model)
    torch.save(weights, folder / "weights.pt")
    return model, weights, folder / "weights.pt", str(folder)


def published(model: BlipForImageTextRetrieval) -> dict[str, Tensor]:
    """Weights by the names that BLIP's own vit.py and med.py give them."""
    names = [
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("post_layernorm", "norm"),
        ("encoder.layers", "blocks"),
        (r"layer_norm(\d)", r"norm\1"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn.qkv", "attn.qkv"),
    ]
    found = {f"blip.text_encoder.{name}": x for name, x in model.text_encoder.state_dict().items()}
    found["blip.text_encoder.embeddings.position_ids"] = torch.arange(48)[None]
    found["blip.itm_head.weight"] = torch.zeros(2, 64)  # of BLIP, and of no use here
    for name, x in model.vision_model.state_dict().items():
        for pattern, theirs in names:
            name = re.sub(pattern, theirs, name)
        found[f"blip.visual_encoder.{name}"] = x
    return found


def test_image_reward_is_its_head_over_transformers_blip(
    blip: tuple[BlipForImageTextRetrieval, dict[str, Tensor], Path, str],
) -> None:
    model, weights, file, tokenizer = blip
    tokens = BertTokenizer.from_pretrained(tokenizer)(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    with torch.no_grad():
        found = model(tokens.input_ids, Pixels(32)(pictures()), attention_mask=tokens.attention_mask)
        x = found.question_embeds[:, 0]  # the text encoder's states, after cross-attention
        for i in (0, 2, 4, 6, 7):
            x = x @ weights[f"mlp.layers.{i}.weight"].T + weights[f"mlp.layers.{i}.bias"]
    expected = (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
    reward = load_image_reward(str(file), tokenizer)
    torch.testing.assert_close(reward(pictures(), PROMPTS), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 1 and (reward(pictures().flip(0), PROMPTS) - expected).abs().max() > 0.1


def test_image_reward_names_a_weight_that_is_missing(
    blip: tuple[BlipForImageTextRetrieval, dict[str, Tensor], Path, str], tmp_path: Path
) -> None:
    _, weights, _, tokenizer = blip
    gone = {
        "blip.visual_encoder.blocks.1.attn.qkv.bias": "encoder.layers.1.self_attn.qkv.bias .* is missing",
        "blip.text_encoder.embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
        "mlp.layers.2.bias": "it has no weight '2.bias'",
    }
    for name, message in gone.items():
        torch.save({k: x for k, x in weights.items() if k != name}, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=message) as error:
            load_image_reward(str(tmp_path / "weights.pt"), tokenizer)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(params=["clip", "hps", "image_reward"])
def reward(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "clip":
        return load_clip_reward(str(request.getfixturevalue("clip")[1]))
    if request.param == "hps":
        return load_hps_reward(str(request.getfixturevalue("hps")[1]), "tiny-hps")
    _, _, file, tokenizer = request.getfixturevalue("blip")
    return load_image_reward(str(file), tokenizer)


def test_a_rewards_gradient_reaches_every_picture_and_no_weight(reward: nn.Module) -> None:
    images = (pictures() * 0.8 + 0.1).requires_grad_()
    scores = reward(images, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    scores.sum().backward()
    assert images.grad is not None and (images.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters()) and not reward.training
    climbed = images.detach() + 0.01 * images.grad / images.grad.abs().amax()
    assert reward(climbed, PROMPTS).sum() > scores.sum()


def test_a_reward_scores_each_picture_by_itself(reward: Reward) -> None:
    scores = reward(pictures(), PROMPTS)
    alone = torch.cat([reward(pictures()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"B prompts, got \(3, 3, 40, 40\) and 2"):
        reward(pictures(), PROMPTS[:2])


# ---- files --------------------------------------------------------------------------------------------------------


def test_weights_are_read_from_safetensors_too(hps: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, file = hps
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, tmp_path / "weights.safetensors")
    found = load_hps_reward(str(tmp_path / "weights.safetensors"), "tiny-hps")(pictures(), PROMPTS)
    assert torch.equal(found, load_hps_reward(str(file), "tiny-hps")(pictures(), PROMPTS))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize("content", [Evil(), {"state_dict": Evil()}, nn.Linear(2, 2), {"x": "text"}, [], {}])
@pytest.mark.parametrize("load", [load_hps_reward, load_image_reward])
def test_pickles_of_more_than_tensors_are_refused(load: object, content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights.pt is refused: it is not a state dict of plain tensors"):
        load(str(tmp_path / "weights.pt"))  # type: ignore[operator]


def test_files_that_are_missing_or_another_models_are_named(hps: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, file = hps
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_hps_reward(str(tmp_path / "nowhere.pt"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_clip_reward(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="weights.pt is not ImageReward's: it has no blip.visual_encoder"):
        load_image_reward(str(file))
    wrong = dict(model.state_dict()) | {"logit_scale": torch.zeros(3)}
    torch.save(wrong, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=r"wrong.pt does not fit CLIP: logit_scale \[\] is \(3,\)"):
        load_hps_reward(str(tmp_path / "wrong.pt"), "tiny-hps")


def test_weights_that_are_not_used_are_told(
    hps: tuple[nn.Module, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({**hps[0].state_dict(), "score_predictor.weight": torch.zeros(1)}, tmp_path / "more.pt")
    load_hps_reward(str(tmp_path / "more.pt"), "tiny-hps")
    assert "1 tensors are not used, such as score_predictor.weight" in caplog.text
