"""Further formats that are read, damaged by the thousand: sizes, exports, LoRAs, reports, jobs, entries of a cache.

Some of each are in the default run; with `-m faults` there are 10,000, or 1000 of what takes long. The same number is
the same input.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from distill.cluster.job import Job
from distill.data.cache import ReadCache, name_of
from distill.data.index import INDEX
from distill.data.reader import open_store
from distill.data.record import BadSample, StoreError
from distill.data.sizes import read_sizes
from distill.data.verify import verify_shard
from distill.evaluation.side_by_side import write_side_by_side
from distill.models.exported import FACTS, read_export
from distill.models.from_file import folder_of_file
from distill.models.lora import LORA_FILE, add_lora, load_lora, save_lora
from tests.data.stores import write
from tests.data.test_sizes import PLANNED, SIZES, sized
from tests.faults.conftest import Outcome
from tests.faults.mutate import damaged_bytes, damaged_text, damaged_tree
from tests.faults.test_fuzz import clear, sample_of, tried
from tests.tiny import save_tiny, tiny_unet

Fault = Callable[[int, str], Outcome]


def many(default: int, most: int = 10_000) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("inputs", [default, pytest.param(most, marks=pytest.mark.faults)])


def damaged_json(rng: random.Random, facts: Any) -> bytes:
    """Of the tree, of words, or of bytes."""
    whole, kind = json.dumps(facts), rng.randrange(3)
    if kind == 0:
        return json.dumps(damaged_tree(rng, facts)).encode()
    if kind == 1:
        return damaged_text(rng, whole).encode(errors="surrogatepass")
    return damaged_bytes(rng, whole.encode())


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Of the header's tree or text, with its length set right, or of bytes anywhere."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return damaged_bytes(rng, data)
    header = json.loads(data[8 : 8 + size])
    if isinstance(record := header.get("__metadata__"), dict) and record and rng.random() < 0.5:
        name = rng.choice(sorted(record))
        record[name] = damaged_json(rng, record[name]).decode(errors="replace")
        new = json.dumps(header).encode()
    else:
        new = damaged_json(rng, header)
    return len(new).to_bytes(8, "little") + new + data[8 + size :]


@many(30)
def test_an_index_of_several_sizes(inputs: int, tmp_path: Path, fault: Fault) -> None:
    """And of texts in bfloat16."""
    plan = replace(PLANNED, samples=9, samples_per_shard=5, text_dtype="bfloat16")

    def solve(indices: Any, prompts: Any) -> Any:
        made = sized(plan)(indices, prompts)
        text = made.conditioning["encoder_hidden_states"].bfloat16()
        mask = torch.ones(len(indices), 7, dtype=torch.bool)
        return replace(made, conditioning={**made.conditioning, "encoder_hidden_states": text, "mask": mask})

    folder = Path(write(tmp_path / "store", plan, solve=solve))
    whole = (folder / INDEX).read_bytes()

    def try_one(rng: random.Random) -> None:
        facts = json.loads(whole)
        if rng.random() < 0.4:
            size = rng.choice(sorted(facts["headers"]))
            facts["headers"][size] = json.dumps(damaged_tree(rng, json.loads(facts["headers"][size])))
            (folder / INDEX).write_text(json.dumps(facts))
        else:
            (folder / INDEX).write_bytes(damaged_json(rng, facts))
        try:
            store = open_store(str(folder), allow_partial=True, max_bad_fraction=0.5)
            for i in sample_of(len(store)):
                (found,) = store.read_many([(i, (0,))], prompts=True)
                if isinstance(found, BadSample):
                    clear(found)
                else:
                    assert found.states.shape[-2:] == store.index.layouts[store.size_of(i)].tensors["states"].shape[-2:]
                    assert torch.isfinite(found.states).all()
            for problem in verify_shard(store.folder, store.index, store.index.shards[0]).problems:
                clear(problem)
        except StoreError as error:
            clear(error)

    tried(fault, "index of several sizes, bfloat16 texts", inputs, try_one, tmp_path / "report")


@many(100)
def test_lists_of_sizes(inputs: int, tmp_path: Path, fault: Fault) -> None:
    def try_one(rng: random.Random) -> None:
        text = damaged_text(rng, rng.choice(SIZES)) if rng.random() < 0.5 else rng.choice(["sdxl", "١x2", "2×4", "0x8"])
        said: Any = text if rng.random() < 0.5 else [*SIZES, text]
        try:
            assert all(0 < side < 2**20 for size in read_sizes(said) for side in size)
        except ValueError as error:
            clear(error)

    tried(fault, "lists of sizes", inputs, try_one, tmp_path / "report")


EXPORT = {
    "formats": ["diffusers", "kohya"],
    "base_hash": "0123456789abcdef",
    "family": "sd15",
    "prediction": "epsilon",
    "sampling": {"sampler": "ddim", "spacing": "trailing", "steps": 4},
    "noise": {"shift": 3.0},
    "guidance": [1.0, 8.0],
}


@many(100)
def test_what_an_export_says_of_itself(inputs: int, tmp_path: Path, fault: Fault) -> None:
    def try_one(rng: random.Random) -> None:
        (tmp_path / FACTS).write_bytes(damaged_json(rng, EXPORT))
        try:
            found = read_export(tmp_path)
            assert found.learned(2.0) == found.learned(2.0) and isinstance(found.is_lora, bool)
            assert all(isinstance(one, str) for one in found.formats) and isinstance(found.base_hash, str)
            assert found.shift is None or found.shift > 0
            dict(found.sampling)
        except ValueError as error:
            clear(error)

    tried(fault, "facts of an export", inputs, try_one, tmp_path / "report")


@many(8, 1000)
def test_a_lora_file(inputs: int, tmp_path: Path, fault: Fault) -> None:
    """Read into its network, or refused."""
    network = tiny_unet()
    add_lora(network, rank=2, alpha=2)
    save_lora(tmp_path / "lora", network)
    file, fresh = tmp_path / "lora" / LORA_FILE, tiny_unet()
    whole = file.read_bytes()

    def try_one(rng: random.Random) -> None:
        file.write_bytes(damaged_safetensors(rng, whole))
        try:
            parameters = load_lora(bare(fresh), file.parent)
            assert parameters and all(p.is_floating_point() for p in parameters)
        except ValueError as error:
            clear(error)

    tried(fault, "LoRA files", inputs, try_one, tmp_path / "report")


def bare(network: nn.Module) -> nn.Module:
    """The network without what an earlier input has added to it."""
    for module in network.modules():
        for name, child in list(module.named_children()):
            if hasattr(child, "base_layer"):
                setattr(module, name, child.base_layer)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(network).pop(name, None)
    return network


@many(8, 1000)
def test_a_checkpoint_in_one_file(inputs: int, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as its header says what it holds; whoever made it up, nothing is made of it that is not complete."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    config, file = save_tiny(tmp_path / "teacher"), tmp_path / "model.safetensors"
    names = ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"]
    file.write_bytes(safetensors.torch.save({name: torch.zeros(4, 4) for name in names}, {"format": "pt"}))
    whole = file.read_bytes()

    def try_one(rng: random.Random) -> None:
        file.write_bytes(damaged_safetensors(rng, whole))
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            folder_of_file(str(file), str(config))
        clear(error.value)

    tried(fault, "checkpoints in one file", inputs, try_one, tmp_path / "report")


@many(5, 1000)
def test_a_report_beside_another(inputs: int, tmp_path: Path, fault: Fault) -> None:
    rows = [
        {"model": name, "sampler": "ddim", "spacing": "trailing", "protocol": "toy", "guidance": 7.5, "n": 9}
        | {"steps": steps, "nfe": steps, "caption_accuracy": 0.5, "caption_accuracy_se": 0.1}
        for name, steps in (("teacher", 25), ("teacher", 4), ("student", 4), ("student", 2))
    ]
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(rows))
        (tmp_path / name / "grid.png").write_bytes(picture.getvalue())

    def try_one(rng: random.Random) -> None:
        grid = rng.random() < 0.2
        (tmp_path / "a" / "metrics.json").write_bytes(json.dumps(rows).encode() if grid else damaged_json(rng, rows))
        found = damaged_bytes(rng, picture.getvalue()) if grid else picture.getvalue()
        (tmp_path / "a" / "grid.png").write_bytes(found)
        try:
            write_side_by_side(tmp_path / "out", {name: tmp_path / name for name in ("a", "b")})
            assert "<script>alert" not in (tmp_path / "out" / "index.html").read_text(errors="surrogatepass")
        except ValueError as error:
            clear(error)

    tried(fault, "reports", inputs, try_one, tmp_path / "report")


@many(100)
def test_a_job_file(inputs: int, tmp_path: Path, fault: Fault) -> None:
    job = Job("a", ("python", "-m", "distill", "train"), ("run", "runs/a"), "runs/a/slurm", 180, 3)
    job.write(tmp_path / "train.json")
    facts, file = json.loads((tmp_path / "train.json").read_text()), tmp_path / "train.json"

    def try_one(rng: random.Random) -> None:
        file.write_bytes(damaged_json(rng, facts))
        try:
            found = Job.read(file)
            found.write(file)
            assert Job.read(file) == found and found.grace_seconds + found.max_failures >= 0
            assert found.command and all(
                isinstance(word, str) for word in (*found.command, *found.progress, found.name)
            )
        except ValueError as error:
            clear(error)

    tried(fault, "job files", inputs, try_one, tmp_path / "report")


@many(100)
def test_an_entry_of_the_cache(inputs: int, tmp_path: Path, fault: Fault) -> None:
    """It gives what was put in, or nothing, and then it is gone."""
    cache, name, data = (
        ReadCache(tmp_path, 2.0**-10),
        name_of("shard", "file", 0, 3000),
        random.Random(0).randbytes(3000),
    )
    cache.add(name, [memoryview(data)])
    (path,) = tmp_path.glob("parts/??/*")
    whole, other = path.read_bytes(), b"another's"

    def try_one(rng: random.Random) -> None:
        damaged = damaged_bytes(rng, whole, [other])
        path.write_bytes(damaged)
        buffers = [memoryview(bytearray(1000)), memoryview(bytearray(2000))]
        found = cache.fill(name, buffers)
        assert found == (damaged == whole) == path.exists()
        assert not found or b"".join(buffers) == data
        cache.add(name, [memoryview(data)])

    tried(fault, "entries of a cache", inputs, try_one, tmp_path / "report")
