"""Whatever a pipeline folder holds: it opens right, or it is one line with the file, and nothing in it is run."""

from __future__ import annotations

import ast
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

import distill
from distill.evaluation.pipelines import generate_images, load_pipeline
from distill.models.copied import copy_parts
from distill.models.families.loading import load_teacher, open_pipeline, prompt_tokens
from distill.models.families.registry import FAMILIES
from distill.models.families.teacher import PARTS
from distill.models.formats import save_pipeline
from distill.models.lora import add_lora, save_lora
from distill.models.schedulers import make_scheduler
from tests.faults.mutate import damaged_bytes, damaged_text, damaged_tree
from tests.tiny import TOKENS, save_tiny, tiny_pipeline, tiny_unet

EVIL = "raise SystemExit('code of the folder was run')\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("teacher") / "teacher"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "teacher"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path) -> str:
    """The line with which all ways to open it end."""
    said = []
    for way in (lambda: load_teacher(folder, parts=PARTS), lambda: load_pipeline(str(folder))):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            way()
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0] and len(said[0]) < 700
    return said[0]


INDEX, UNET, VAE, TEXT = "model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"
MALFORMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "class in a list": (INDEX, {"_class_name": [1]}, "model_index.json: _class_name is [1], it must be the name"),
    "class of code": (INDEX, {"_class_name": ["evil", "Pipeline"]}, "model_index.json: _class_name is ['evil', 'Pipe"),
    "class in an object": (INDEX, {"_class_name": {}}, "_class_name is {}"),
    "part without a pair": (INDEX, {"unet": "x"}, 'unet is \'x\', it must be ["library", "class"]'),
    "part with three": (INDEX, {"unet": ["a", "b", "c"]}, "unet is ['a', 'b', 'c'], it must be"),
    "part of numbers": (INDEX, {"vae": [1, 2]}, "vae is [1, 2], it must be"),
    "part of code": (INDEX, {"unet": ["evil", "UNet2DConditionModel"]}, "unet comes from 'evil', which is no library"),
    "unknown part of code": (INDEX, {"more": ["evil", "Thing"]}, "more comes from 'evil'"),
    "scheduler of the index": (
        INDEX,
        {"scheduler": ["diffusers", "EDMEulerScheduler"]},
        "'EDMEulerScheduler', is not und",
    ),
    "scheduler of its file": (
        "scheduler/scheduler_config.json",
        {"_class_name": "EDMEulerScheduler"},
        "is not understood",
    ),
    "no zero snr": (
        "scheduler/scheduler_config.json",
        {"rescale_betas_zero_snr": True},
        "rescale_betas_zero_snr with prediction_type epsilon",
    ),
    "wide": (UNET, {"sample_size": 10**9}, "unet/config.json: sample_size is 1000000000; no network has more than"),
    "wide enough": (UNET, {"sample_size": 100_000}, "sample_size is 100000; it must be one whole number from 1 to"),
    "two sides": (UNET, {"sample_size": [6, 6]}, "sample_size is [6, 6]; it must be one whole number"),
    "channels": (UNET, {"block_out_channels": [10**7, 10**7]}, "block_out_channels is 10000000; no network has more"),
    "many channels": (UNET, {"block_out_channels": [16_000, 24_000]}, "describes a network of"),
    "null": (UNET, {"block_out_channels": None}, "unet/config.json: block_out_channels is None; it must be a list"),
    "layers": (UNET, {"layers_per_block": 10**5}, "layers_per_block is 100000; no network has more than"),
    "deeper": (UNET, {"layers_per_block": 3}, "describes a network of"),
    "no such block": (UNET, {"down_block_types": ["x", "y"]}, "unet/config.json cannot be opened (ValueError: "),
    "in words": (UNET, {"layers_per_block": "many"}, "unet/config.json cannot be opened ("),
    "labels": (UNET, {"class_embed_type": "timestep"}, "its UNet has class_embed_type 'timestep', an input of its own"),
    "quantized": (UNET, {"quantization_config": {"load_in_8bit": True}}, "quantized weights cannot be opened"),
    "autoencoder": (VAE, {"block_out_channels": {}}, "vae/config.json: block_out_channels is {}; it must be a list"),
    "of another width": (UNET, {"cross_attention_dim": 12}, ""),
    "text": (TEXT, {"hidden_size": 2**40}, "text_encoder/config.json: hidden_size is 1099511627776; no network has"),
    "layers of text": (TEXT, {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; no network has more than"),
    "code of text": (TEXT, {"auto_map": {"AutoModel": "evil.Model"}}, "text_encoder/config.json has an auto_map"),
    "words": ("tokenizer/tokenizer_config.json", {"model_max_length": 0}, "model_max_length is 0; a prompt takes at"),
}


@pytest.mark.parametrize(("file", "changes", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_config_is_one_line_with_its_file(
    folder: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(folder / file, **changes)
    assert message in refused(folder)


@pytest.mark.parametrize(
    "file", [INDEX, UNET, VAE, TEXT, "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"]
)
def test_a_config_that_is_no_json_is_named(folder: Path, file: str) -> None:
    for text in ("", "{", "[1]", "[" * 100_000, '{"a": ' * 100_000, "\0"):
        (folder / file).write_text(text)
        assert file in refused(folder)
    if not file.startswith("tokenizer"):
        (folder / file).unlink()
        assert file in refused(folder)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def with_a_huge_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**40) + file.read_bytes()[8:])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def with_nan(file: Path) -> None:
    weights = load_file(file)
    name = min(weights)
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, file, {"format": "pt"})


def without_one(file: Path) -> None:
    weights = load_file(file)
    del weights[min(weights)]
    save_file(weights | {"of another": torch.zeros(10_000)}, file, {"format": "pt"})


@pytest.mark.parametrize("damage", [cut, with_a_huge_header, emptied, with_nan, without_one])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_weights_are_one_line_with_their_folder(
    folder: Path, part: str, damage: Callable[[Path], None]
) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    damage(file)
    assert str(folder / part) in refused(folder)


@pytest.mark.parametrize(
    "place", ["unet/diffusers.py", "unet/evil.py", "text_encoder/transformers.py", "tokenizer/x.py"]
)
def test_python_beside_a_part_is_refused_and_not_run(folder: Path, place: str) -> None:
    """Versions of diffusers took UNET/LIBRARY.py for the part's own class, whatever the library was."""
    (folder / place).write_text(EVIL)
    assert f"{place} is Python code, which is not run" in refused(folder)


CALLS = {"from_pretrained", "from_single_file"}
BY_NAME = {  # classes of this project's own choice, which read tensors and configs of the parts that they are named for
    "distill/models/families/loading.py": {"cls"},  # of its family
    "distill/models/families/towers.py": {
        "cls",
        "CLIPTextConfig",
        "CLIPTokenizer",
        "T5Config",
        "T5EncoderModel",
        "T5Tokenizer",
    },
    "distill/models/families/qwen3.py": {"cls", "Qwen3Config", "Qwen2Tokenizer"},
    "distill/models/from_file.py": {"cls"},  # of the family's network, configured by a local folder
    "distill/models/rewards.py": {"CLIPModel", "AutoTokenizer"},
    "distill/evaluation/features.py": {"cls"},  # a network of features that a user names for metrics
    "distill/commands/export.py": {"PeftModel", "cls"},  # of the export that was just written
    "distill/studies/control.py": {"ControlNetModel"},  # these have written what they read
    "distill/studies/toy_teacher.py": {"AutoencoderKL"},
}


def test_no_pipeline_is_opened_but_by_its_parts() -> None:
    """`DiffusionPipeline.from_pretrained` looks up classes by a folder's word: nothing in the package calls it."""
    root = Path(distill.__file__).parent
    found = 0
    for path in sorted(root.rglob("*.py")):
        name = f"distill/{path.relative_to(root).as_posix()}"
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
                or node.func.attr not in CALLS
            ):
                continue
            found += 1
            owner = ast.unparse(node.func.value)
            assert owner in BY_NAME.get(name, set()), f"{name}:{node.lineno}: {owner}.{node.func.attr}"
            trusts = [k for k in node.keywords if k.arg in ("trust_remote_code", "custom_pipeline")]
            assert all(isinstance(k.value, ast.Constant) and not k.value.value for k in trusts)
    assert found > 5


def test_a_tokenizer_that_says_no_length_has_the_encoders(folder: Path) -> None:
    file = folder / "tokenizer/tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    assert load_teacher(folder, parts=("text",)).encode(["a"])["encoder_hidden_states"].shape[1] == TOKENS
    assert prompt_tokens(folder) == TOKENS
    pipeline = load_pipeline(str(folder))
    assert pipeline.tokenizer.model_max_length == TOKENS
    assert generate_images(pipeline, ["a cat"], [0], 1).shape[0] == 1
    copy_parts(folder, folder.with_name("copied"), FAMILIES["sd15"])
    copied = json.loads((folder.with_name("copied") / "tokenizer/tokenizer_config.json").read_text())
    assert copied["model_max_length"] == TOKENS, "plain diffusers reads it there"


def test_a_variant_of_some_parts_is_theirs_and_the_others_are_plain(folder: Path) -> None:
    half = tiny_pipeline().to(torch.float16)
    shutil.rmtree(folder / "unet")
    half.unet.save_pretrained(folder / "unet", variant="fp16")
    teacher = load_teacher(folder, parts=PARTS, variant="fp16")
    assert teacher.network.dtype == torch.float32
    assert generate_images(load_pipeline(str(folder), variant="fp16"), ["a cat"], [0], 1).isfinite().all()
    with pytest.raises(FileNotFoundError, match="of variant 'fp61'"):
        load_teacher(folder, parts=PARTS, variant="fp61")


def with_checker(folder: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = small | {"image_size": 32, "patch_size": 16}, small | {"vocab_size": 514}
    config = CLIPConfig(projection_dim=16, vision_config=vision, text_config=text)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder / "feature_extractor")
    edit(
        folder / INDEX,
        requires_safety_checker=True,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],  # of transformers 4, gone since
    )


@pytest.mark.parametrize("checker", ["whole", "pickled", "missing"])
def test_a_safety_checker_hinders_nothing_whatever_its_state(folder: Path, tmp_path: Path, checker: str) -> None:
    with_checker(folder)
    weights = folder / "safety_checker/model.safetensors"
    if checker == "pickled":
        weights.rename(weights.with_name("pytorch_model.bin"))
    elif checker == "missing":
        shutil.rmtree(folder / "safety_checker")
    assert load_pipeline(str(folder)).safety_checker is None
    save_pipeline(
        tmp_path / "export",
        load_teacher(folder).network,
        str(folder),
        torch.float16,
        lambda noise: make_scheduler(noise, "lcm", "lcm"),
    )
    whole: Any = DiffusionPipeline.from_pretrained(tmp_path / "export")
    assert (whole.safety_checker is not None) == (checker == "whole")
    assert generate_images(load_pipeline(str(tmp_path / "export")), ["a cat"], [0], 1).isfinite().all()


def test_a_student_that_takes_guidance_is_no_teacher_but_opens_as_a_pipeline(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.register_modules(unet=tiny_unet(time_cond_proj_dim=8))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes guidance as an input .* take the model that it was distilled from"):
        load_teacher(tmp_path)
    assert open_pipeline(str(tmp_path))[0].unet.config.time_cond_proj_dim == 8


def test_a_lora_of_another_model_is_one_line(sound: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "sdxl", "sdxl")
    for owner, model in ((str(sound), other), (other, str(sound))):
        unet = load_teacher(owner).network
        add_lora(unet, rank=2, alpha=2.0)
        lora = tmp_path / f"lora of {Path(owner).name}"
        save_lora(lora, unet)
        with pytest.raises(ValueError, match="is not of this model: .* of its .* tensors have no place") as caught:
            load_pipeline(model, lora)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        assert load_pipeline(owner, lora).get_list_adapters()


@pytest.mark.parametrize("inputs", [40, pytest.param(3000, marks=pytest.mark.faults)])
def test_mutated_configs_are_refused_in_a_line_or_open(sound: Path, tmp_path: Path, inputs: int) -> None:
    """By everything that reads them; what opens gives pictures' shapes that a machine has."""
    files = [INDEX, UNET, VAE, "scheduler/scheduler_config.json", TEXT, "tokenizer/tokenizer_config.json"]
    folder = Path(shutil.copytree(sound, tmp_path / "mutated"))
    refusals = 0
    for number in range(inputs):
        rng = random.Random(number)
        file = rng.choice(files)
        whole = (sound / file).read_text()
        kind = rng.randrange(3)
        tree = damaged_tree(rng, json.loads(whole)) if kind == 0 else None
        data = (
            damaged_text(rng, whole).encode(errors="surrogatepass") if kind == 1 else damaged_bytes(rng, whole.encode())
        )
        (folder / file).write_bytes(json.dumps(tree).encode() if kind == 0 else data)
        try:
            teacher = load_teacher(folder, parts=PARTS)
            assert 0 < teacher.resolution < 2**20 and len(teacher.latent_shape) == 3
        except (ValueError, FileNotFoundError) as error:
            refusals += 1
            said = str(error)
            assert said and "\n" not in said and len(said) < 700, f"input {number}: {said[:300]}"
        (folder / file).write_text(whole)
    assert refusals > inputs // 10
