"""LoRA adapters on a network of diffusers (Hu et al. 2021): adding, switching off, saving, loading and merging them.

The base stays frozen and the adapters are float32 whatever the base's dtype: at a learning rate of 1e-4 a bfloat16
weight would not feel most updates.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.diffusion.random import generator
from distill.models.checks import first_line
from distill.models.families.base import Family
from distill.models.families.registry import family_of_network
from distill.models.files import rounded, save_file

ADAPTER = "default"
"""The adapter that is trained: a network at rest computes with it, and with no other."""
TEACHING = "teacher"
"""A frozen one beside it, of an earlier student that teaches."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that `pipe.load_lora_weights(folder)` looks for."""
_RECORD = "distill_lora"  # our key in a LoRA file's header; diffusers' own would be read beside the alphas, and refused
_EARLIER_RECORD = "lora_adapter_metadata"  # in files of earlier versions, which are in peft's names
_PEFT_FOLDER = "peft"


def check_sizes(where: str, rank: int | None, alpha: float) -> None:
    """Raises ValueError for a rank or an alpha that no LoRA has; a rank of None is none at all, all weights train."""
    if rank is not None and rank < 1:
        raise ValueError(f"{where}.rank must be at least 1, or null to train all of it, got {rank}")
    if alpha <= 0:
        raise ValueError(f"{where}.alpha must be above 0, got {alpha}")


def check_takes_lora(network: nn.Module) -> None:
    """Raises ValueError if the class of `network` cannot be given adapters."""
    if not hasattr(network, "add_adapter"):
        raise ValueError(
            f"a {type(network).__name__} takes no LoRA, because its class is no PeftAdapterMixin of diffusers: train "
            "all its weights with student=full, and set rank=null in networks.fake_score and networks.discriminator"
        )


def add_lora(
    network: Any,
    rank: int,
    alpha: float,
    *,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    adapter: str = ADAPTER,
    family: Family | None = None,
) -> list[nn.Parameter]:
    """Freezes `network`, gives the modules that `targets` name an adapter, and returns the adapters.

    `targets` are peft's `target_modules`, ends of modules' names; without them they are the usual ones of the network's
    `family`, which is found by its class where it is not given.

    An adapted layer computes `base(x) + alpha / rank * B A x`. B starts at zero, so the network starts unchanged; A
    starts as in torch's Linear, with random numbers that depend on `seed` and the layer's name.

    Raises:
        ValueError: for a network of a class that takes no adapters; a rank, alpha or dropout out of range; a target
            that no module matches.
    """
    check_takes_lora(network)
    family = family or family_of_network(network)
    targets = family.lora.chosen(network) if targets is None else list(targets)
    _check(network, rank, alpha, dropout, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft samples A globally; ours replaces it
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant
        network.add_adapter(config, adapter_name=adapter)  # freezes the rest, earlier adapters too, which are then off
    for name, parameter in adapters(network, adapter).items():
        parameter.data = parameter.data.float()
        if "lora_A" in name and not parameter.is_meta:
            bound = parameter[0].numel() ** -0.5
            start = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator("lora", seed, name))
            parameter.data.copy_(start)
    return list(adapters(network, adapter).values())


def _check(network: nn.Module, rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> None:
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")
    if alpha <= 0:
        raise ValueError(f"lora_alpha must be positive, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout must lie in [0, 1), got {dropout}")
    for target in targets:
        if not _matches(network, target):
            raise ValueError(f"LoRA target {target!r} matches no module of the network")


def _matches(network: nn.Module, target: str) -> bool:
    return any(f".{name}".endswith(f".{target}") for name, _ in network.named_modules())


def adapters(module: nn.Module, adapter: str = ADAPTER) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their names in `module`, which may be wrapped by DDP or DeepSpeed."""
    return {name: p for name, p in module.named_parameters() if f".{adapter}." in name and ".lora_" in name}


def lora_layers(module: nn.Module) -> list[BaseTunerLayer]:
    """The adapted layers of `module`. The walk takes 16 ms on SDXL: keep the list where speed matters."""
    return [m for m in module.modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def only_adapter(module: nn.Module | Iterable[BaseTunerLayer], adapter: str | None) -> Iterator[None]:
    """Inside, `module` computes with this adapter alone. Takes a module or its `lora_layers`.

    With None it computes what it did before `add_lora`, to the bit. Afterwards it is as it was; what is recomputed in a
    backward pass (gradient checkpointing) has to be put into the same state again: `as_now` does.

    Flips two fields a layer and leaves `requires_grad` alone: peft's own `enable_adapters` and `set_adapter` change it,
    which breaks the hooks of an engine that is built on it (ZeRO).
    """
    layers = lora_layers(module) if isinstance(module, nn.Module) else list(module)
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        for layer, (off, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = off, active


def as_now(layers: Sequence[BaseTunerLayer]) -> AbstractContextManager[None]:
    """A context for later, inside which a network computes with the adapters that it computes with now.

    Args:
        layers: all `lora_layers` of the network, or none; they are switched together, by `only_adapter`.
    """
    return _AsThen(layers, (layers[0]._disable_adapters, layers[0]._active_adapter)) if layers else nullcontext()


class _AsThen(AbstractContextManager[None]):
    """See `as_now`. Where nothing has been switched since, it costs nothing: it is entered once for each block."""

    def __init__(self, layers: Sequence[BaseTunerLayer], then: tuple[bool, Any]) -> None:
        self.layers, self.then = layers, then
        self.since: tuple[bool, Any] | None = None

    def __enter__(self) -> None:
        first = self.layers[0]
        now = (first._disable_adapters, first._active_adapter)
        if now != self.then:
            self.since = now
            self._set(*self.then)

    def __exit__(self, *error: Any) -> None:
        if self.since is not None:
            self._set(*self.since)
            self.since = None

    def _set(self, off: bool, active: Any) -> None:
        for layer in self.layers:
            layer._disable_adapters, layer._active_adapter = off, active


def recomputed_with_its_adapters(
    module: nn.Module,
) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """The `context_fn` of torch's checkpoint for blocks of `module`: they are recomputed with the adapters that they
    were computed with, which may be off by the time of the backward pass, or on."""
    layers = lora_layers(module)
    return lambda: (nullcontext(), as_now(layers))


def lora_config(network: Any) -> LoraConfig:
    """Rank, alpha and targets of the trained adapters; raises ValueError if there are none."""
    if ADAPTER not in (getattr(network, "peft_config", None) or ()):
        raise ValueError("the network has no LoRA adapter")
    return network.peft_config[ADAPTER]


def lora_state_dict(network: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapters on the CPU under peft's names, `down_blocks.….to_q.lora_A.weight`.

    `state` replaces the values, under the names of `network.named_parameters()`: an average of them, or parameters
    gathered from ZeRO-3's partitions.

    Raises:
        ValueError: if there is no adapter, or `state` lacks one of them.
    """
    values = _values(network, state)
    return {
        name.replace(f".{ADAPTER}.", "."): value.detach().to("cpu", copy=True).contiguous()
        for name, value in values.items()
    }


def _values(network: Any, state: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    lora_config(network)
    own: Mapping[str, Tensor] = adapters(network)
    if state is None:
        return own
    for name in own:
        if name not in state:
            raise ValueError(f"the state to export lacks the LoRA parameter {name!r}")
    return {name: state[name] for name in own}


def save_lora(
    folder: str | Path,
    network: Any,
    state: Mapping[str, Tensor] | None = None,
    *,
    formats: Sequence[str] = ("diffusers", "peft"),
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    family: Family | None = None,
) -> None:
    """Writes the adapters, alpha included: for diffusers and, in the sub-folder `peft`, for peft.

    `pipe.load_lora_weights(folder)` of its family's pipeline and `PeftModel.from_pretrained(network, folder / "peft")`
    then compute what `network` computes. For `state` see `lora_state_dict`, for the first file `save_lora_file`.

    Raises:
        ValueError: an adapter that `state` lacks, or a value that the dtype cannot hold.
    """
    if "diffusers" in formats:
        save_lora_file(Path(folder) / LORA_FILE, network, state, dtype=dtype, metadata=metadata, family=family)
    if "peft" in formats:
        peft_folder = Path(folder) / _PEFT_FOLDER
        peft_folder.mkdir(parents=True, exist_ok=True)
        weights = lora_state_dict(network, state)
        prefixed = {f"base_model.model.{name}": rounded(name, tensor, dtype) for name, tensor in weights.items()}
        save_file(prefixed, peft_folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = _portable(lora_config(network)) | _OF_PEFTS_FILE
        (peft_folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_lora_file(
    path: Path,
    network: Any,
    state: Mapping[str, Tensor] | None = None,
    *,
    format: str = "diffusers",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    family: Family | None = None,
) -> None:
    """Writes the adapters to one file, under the names of the family's files.

    Args:
        state: see `lora_state_dict`.
        format: one of the `formats` of the family's LoRAs.
        metadata: further entries of the file's header.
        family: the network's, which is found by its class where it is not given.

    Raises:
        ValueError: an adapter that `state` lacks, or a value that the dtype cannot hold.
    """
    config = lora_config(network)
    family = family or family_of_network(network)
    file = family.lora.file(format, lora_state_dict(network, state), config, network.config, dtype)
    said = _portable(config) | ({"lora_alpha": config.r} if file.folded else {})
    header = {"format": "pt", _RECORD: json.dumps(said)} | dict(metadata or {}) | file.header
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(file.tensors, path, metadata=header)


def merge_lora(network: Any, state: Mapping[str, Tensor] | None = None) -> None:
    """Adds the adapters to the weights they adapt and takes them off: an ordinary network that computes the same.

    For `state` see `lora_state_dict`.

    Raises:
        ValueError: if there is no adapter, or `state` lacks one of them.
    """
    values = _values(network, state)
    for name, parameter in adapters(network).items():
        parameter.data.copy_(values[name])
    network.fuse_lora()
    network.unload_lora()


def _portable(config: LoraConfig) -> dict[str, Any]:
    # A reader builds `LoraConfig(**record)`, and an older peft refuses the fields that a newer one added.
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(config.target_modules or ()),
        "rank_pattern": {},
        "alpha_pattern": {},
    }


_OF_PEFTS_FILE: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_rslora": False,
}
"""What `adapter_config.json` has beside `_portable`: fields that peft has had since 0.7."""


def load_lora(
    network: Any, folder: str | Path, adapter: str = ADAPTER, family: Family | None = None
) -> list[nn.Parameter]:
    """Gives `network` the adapters that `save_lora` wrote to `folder`, to be trained on; returns them like `add_lora`.

    Raises what `lora_settings` and `fill_lora` raise.
    """
    settings = lora_settings(folder)
    add_lora(
        network,
        settings["r"],
        settings["lora_alpha"],
        dropout=settings["lora_dropout"],
        targets=settings["target_modules"],
        adapter=adapter,
        family=family,
    )
    return fill_lora(network, folder, adapter, family)


def lora_file(folder: str | Path) -> Path:
    """The file that diffusers reads of a folder that `save_lora` wrote; raises FileNotFoundError if there is none."""
    path = Path(folder) / LORA_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA in {folder}: {LORA_FILE} is missing")
    return path


def lora_settings(folder: str | Path) -> dict[str, Any]:
    """What is needed to add the adapters that `save_lora` wrote to `folder`: `r`, `lora_alpha` and others of peft's.

    Raises:
        FileNotFoundError: there is no LoRA in `folder`.
        ValueError: its rank and alpha are not recorded.
    """
    path = lora_file(folder)
    with _opened(path) as file:
        header = file.metadata() or {}
        sides = {side for name in file.keys() for side in file.get_slice(name).get_shape()}
    try:
        found = json.loads(header.get(_RECORD) or header.get(_EARLIER_RECORD) or "{}")
        settings = {name.removeprefix("unet."): value for name, value in found.items()}
        return _checked({name: settings[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules")}, sides)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(
            f"{path} does not record its rank and alpha: it is not a LoRA that was exported here"
        ) from None


def _checked(settings: dict[str, Any], sides: Collection[int]) -> dict[str, Any]:
    """Raises ValueError for settings that no LoRA with tensors of these sides has."""
    rank, alpha, dropout, targets = (settings[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules"))
    numbers = type(rank) is int and rank in sides and all(type(x) in (int, float) for x in (alpha, dropout))
    if not numbers or not 0 < alpha < 1e9 or not 0 <= dropout < 1:
        raise ValueError("rank, alpha or dropout")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError("target modules")
    return settings


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises ValueError for one that is none, or not complete."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({first_line(error)})") from None


def fill_lora(
    network: Any, folder: str | Path, adapter: str = ADAPTER, family: Family | None = None
) -> list[nn.Parameter]:
    """Sets the adapters that `network` has to the values that `save_lora` wrote to `folder`, and returns them.

    Raises:
        FileNotFoundError: there is no LoRA in `folder`.
        ValueError: it was made for another network, or is of another rank.
    """
    path = lora_file(folder)
    expected = {name.replace(f".{adapter}.", "."): parameter for name, parameter in adapters(network, adapter).items()}
    with _opened(path) as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
        header = file.metadata() or {}
        earlier = _EARLIER_RECORD in header and _RECORD not in header  # diffusers' entry is in later files as well
    if earlier:
        saved = {name.removeprefix("unet."): tensor for name, tensor in stored.items()}
    else:
        modules = sorted({name.rsplit(".", 2)[0] for name in expected})
        saved = (family or family_of_network(network)).lora.read(stored, modules, network.config)
    for name in sorted(saved.keys() ^ expected.keys()):
        raise ValueError(
            f"{path} was made for another network, or for other lora_targets: {name} is in only one of the two"
        )
    for name, parameter in expected.items():
        if saved[name].shape != parameter.shape:
            raise ValueError(f"{path}: {name} is {list(saved[name].shape)}, the network's {list(parameter.shape)}")
        if not saved[name].is_floating_point() or not bool(saved[name].isfinite().all()):
            raise ValueError(f"{path}: {name} has values that are not finite numbers")
        parameter.data.copy_(saved[name])
    return list(expected.values())
