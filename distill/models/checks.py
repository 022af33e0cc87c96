"""A pipeline folder is checked before anything is made of it: classes, sizes, weights, and that nothing in it is code.

A folder from elsewhere may hold anything. What this project loads of it are parts of known classes by their own
loaders, and tensors of safetensors files; a folder that would have other programs run its code is refused all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from distill.diffusion.noise import short
from distill.models.folder import read_json

MOST = 1_000_000
"""The largest whole number in a network's config: more than any published one's vocabulary or width."""
MOST_LAYERS = 200
MOST_ENTRIES = 1000  # of a list or a dictionary in a config
LIBRARIES = ("diffusers", "transformers")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of a pipeline that have no part in what is done here: they are never loaded, and may be missing."""


def check_folder(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a pipeline folder, once nothing in the folder is code or has code run.

    Raises:
        FileNotFoundError, ValueError: there is none, it is malformed, or there is code. It names the file.
    """
    index = read_json(folder, "model_index.json")
    where = folder / "model_index.json"
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(
            f"{where}: _class_name is {short(index.get('_class_name'))}, it must be the name of a pipeline"
        )
    for name in index:
        library, kind = component(folder, index, name) if _is_used(index, name) else (None, None)
        if kind is None:
            continue
        if library not in LIBRARIES:
            raise ValueError(
                f"{where}: {name} comes from {short(library)}, which is no library of models but code of the folder's "
                f"own, and is not run; allowed: {', '.join(LIBRARIES)}"
            )
        for path in sorted((folder / name).glob("*.py")):
            raise ValueError(f"{path} is Python code, which is not run: a teacher's folder must not hold any")
        for path in sorted((folder / name).glob("*config.json")):
            if "auto_map" in read_json(folder, f"{name}/{path.name}"):
                raise ValueError(f"{path} has an auto_map, which names Python code to be run, and is not: remove it")
    return index


def _is_used(index: Mapping[str, Any], name: str) -> bool:
    """Whether an entry names a component that is loaded here; other entries are settings."""
    return not name.startswith("_") and name not in UNUSED and isinstance(index[name], list)


def component(folder: Path, index: Mapping[str, Any], name: str) -> tuple[str | None, str | None]:
    """The library and the class that an index gives a component; None and None where it has none.

    Raises:
        ValueError: something else than a pair of names stands there.
    """
    said = index.get(name)
    if said is None:
        return None, None
    if not isinstance(said, list) or len(said) != 2 or not all(isinstance(part, (str, type(None))) for part in said):
        where = folder / "model_index.json"
        raise ValueError(f'{where}: {name} is {short(said)}, it must be ["library", "class"]')
    return said[0], said[1]


def check_sizes(path: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError for a number in a network's config that no network has, before it is made with it."""
    if "quantization_config" in config:
        raise ValueError(f"{path}: quantized weights cannot be opened here, take the model as it was published")
    for key, value in _leaves(path, config):
        most = MOST_LAYERS if "layers" in key else MOST
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > most:
            raise ValueError(f"{path}: {key} is {short(value)}; no network has more than {most}")


def _leaves(path: Path, tree: object, key: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    if depth > 8:
        raise ValueError(f"{path}: {key or 'it'} is nested too deeply")
    if isinstance(tree, (dict, list)) and len(tree) > MOST_ENTRIES:
        raise ValueError(f"{path}: {key or 'it'} has {len(tree)} entries; no network has more than {MOST_ENTRIES}")
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(path, value, str(name) if not key else key, depth + 1)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(path, value, key, depth + 1)
    else:
        yield key, tree


def positive(path: Path, config: Mapping[str, Any], key: str, most: int = MOST) -> int:
    """A whole number of a config; raises ValueError for anything else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{path}: {key} is {short(value)}; it must be one whole number from 1 to {most}")
    return value


def levels(path: Path, config: Mapping[str, Any]) -> int:
    """How many widths `block_out_channels` has: a network halves its pictures one time fewer."""
    widths = config.get("block_out_channels")
    good = isinstance(widths, list) and widths and all(isinstance(w, int) and 1 <= w <= MOST for w in widths)
    if not good or len(widths) > 16:  # type: ignore[arg-type]
        raise ValueError(f"{path}: block_out_channels is {short(widths)}; it must be a list of widths")
    return len(widths)  # type: ignore[arg-type]


def load_checked(folder: Path, files: Sequence[Path], make: Callable[[], nn.Module], load: Callable[[], Any]) -> Any:
    """What `load` gives of a component, a network with its loading info, once its files are seen to hold it.

    Args:
        folder: of the component.
        files: its safetensors files.
        make: the network without weights, from its config; it is called on the meta device.
        load: diffusers' or transformers' own loader.

    Raises:
        ValueError: a config that no network can be made of, weights that are missing, cut off, of another network, or
            not finite. It names the file, and nothing was allocated for what its files cannot hold.
    """
    stored = sum(elements(file) for file in files)
    with naming(folder / "config.json"), torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in make().parameters())
    if wanted > stored:
        raise ValueError(
            f"{folder / 'config.json'} describes a network of {wanted:,} weights, its files hold {stored:,}: "
            "they belong to another, or are not complete"
        )
    with naming(folder):
        network, info = load()
    for what in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, info.get(what) or ())):
            raise ValueError(f"{folder}: {len(found)} of its weights are missing or of another shape, as {found[0]}")
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter.detach().sum(dtype=torch.float32)) and not parameter.isfinite().all():
            raise ValueError(f"{folder}: the weights are broken, {name} has values that are not finite")
    return network


def elements(file: Path) -> int:
    """How many numbers a safetensors file holds, by its header; raises ValueError for one that is not readable."""
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is not a complete safetensors file ({first_line(error)})") from None
    return sum(torch.Size(shape).numel() for shape in shapes)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns whatever a library raises of a config or file it does not understand into a line with the path."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of all kinds, as a config is wrong in all ways: KeyError, TypeError, RuntimeError, ...
        raise ValueError(f"{path} cannot be opened ({type(error).__name__}: {first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The beginning of what an error says."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:197]}..."
