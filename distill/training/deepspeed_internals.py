"""Every private or undocumented part of DeepSpeed that is used, and nothing else of it.

pyproject.toml bounds DeepSpeed to `>=0.19.8,<0.20`: these names may change in any release, for DeepSpeed has no public
way to set the share of a weight or of an optimizer's state, to make a network compute with masters that were changed,
to take what it would save and write it later, to keep a write that fails from stopping one rank alone, or to read its
files without an engine. A test holds that each name of `NAMES` exists in the installed version, and that no other
module of this package has one of them.

An engine is a `DeepSpeedEngine`; its `optimizer` is a ZeRO optimizer (`DeepSpeedZeroOptimizer` for stages 1 and 2,
`BF16_Optimizer` for stage 1 in bfloat16 with float32 gradients, `DeepSpeedZeroOptimizer_Stage3`). Inside is torch's.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.training.rank_writes import Writes
from distill.training.resharding import NotElastic, WholeState, shared_value

_ZERO_12 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
_ZERO_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
_LINKED = ("update_lp_params", "_lazy_init_hp_params_optimizer_state", "_hp_optimizer_states_linked")

NAMES: dict[str, tuple[str, ...]] = {
    _ZERO_12: ("optimizer", "single_partition_of_fp32_groups", "loss_scaler", "cur_scale", *_LINKED),
    _BF16: ("optimizer", "fp32_groups_flat_partition", *_LINKED),
    _ZERO_3: (
        "optimizer",
        "fp32_partitioned_groups_flat",
        "persistent_parameters",
        "invalidate_secondary_tensor",
        "loss_scaler",
        "cur_scale",
        "_get_fp32_opt_state_partition",
        "_get_param_partition_rank",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    _ENGINE: ("checkpoint_engine", "_copy_recovery_script"),
    "deepspeed.runtime.zero.partition_parameters": ("ds_id", "ds_shape"),
    "deepspeed.runtime.zero.stage3": ("_z3_optimizer",),
    "deepspeed.utils.mixed_precision_linkage": ("_hp_mapping",),
    "deepspeed.utils.tensor_fragment.tensor_fragment": ("lp_fragment_address", "get_hp_fragment"),
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.checkpoint.constants": (
        "OPTIMIZER_STATE_DICT",
        "BASE_OPTIMIZER_STATE",
        "SINGLE_PARTITION_OF_FP32_GROUPS",
        "PARAM_SLICE_MAPPINGS",
        "FP32_FLAT_GROUPS",
        "PARAM_SHAPES",
    ),
}
"""What is named here, by the class or module that has it."""

IN_ITS_FILES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
"""What the pickles of ZeRO-1, 2 and 3 hold beside tensors, numbers and texts."""


def forget_shared_memory() -> None:
    """Leaves out a transport through shared memory for ranks on CPUs: to compile it takes a minute and a compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# ---- weights and the optimizer's state of a running engine ----------------------------------------------------------


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside, which DeepSpeed has replaced by its own if it is an Adagrad."""
    return engine.optimizer.optimizer


def flat_groups(optimizer: Any) -> list[Tensor]:
    """This rank's float32 shares of the weights, which the optimizer inside updates; not copies."""
    for attribute in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if partitions := getattr(optimizer, attribute, None):
            return list(partitions)
    raise RuntimeError(f"this DeepSpeed's {type(optimizer).__name__} does not show its float32 partitions")


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of a weight, also where this rank holds a share of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def share_of(parameter: Any) -> tuple[int, int]:
    """Of which elements of a weight, flat, this rank holds master and optimizer's state: the first one, and the end."""
    if hasattr(parameter, "ds_id"):
        optimizer = parameter._z3_optimizer
        share, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=None)
        first = share.numel() * optimizer._get_param_partition_rank(parameter)
        whole = whole_shape(parameter).numel()
        return min(first, whole), min(first + share.numel(), whole)
    if parameter._hp_mapping is None:
        return 0, 0
    place = parameter._hp_mapping.lp_fragment_address
    return place.start, place.start + place.numel


@torch.no_grad()
def set_share(parameter: Any, values: Tensor, key: str | None = None) -> None:
    """Sets this rank's share of a weight's float32 master, or of what the optimizer keeps for it under `key`.

    DeepSpeed's own setters want full values, and at ZeRO-3 cannot set those that the ranks do not share evenly.

    Args:
        values: flat, those of the elements that `share_of` names.
    """
    if hasattr(parameter, "ds_id"):
        optimizer = parameter._z3_optimizer
        share, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
        share[: values.numel()].copy_(values)
    elif parameter._hp_mapping is not None:
        parameter._hp_mapping.get_hp_fragment(optim_state_key=key).copy_(values)


@torch.no_grad()
def clear_padding(parameter: Any) -> None:
    """Sets to zero what fills up this rank's share of a weight's master: ZeRO-3 leaves there what memory held before,
    which may look like a weight that is not finite, and would be saved."""
    if hasattr(parameter, "ds_id"):
        optimizer, (first, end) = parameter._z3_optimizer, share_of(parameter)
        share, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=None)
        share[end - first :].zero_()


def begin_state(optimizer: Any, state: WholeState) -> None:
    """Gives the optimizer inside, which has not taken a step, the state that its first one would; of zeros."""
    inside = optimizer.optimizer
    on_device = any(group.get("fused") or group.get("capturable") for group in inside.param_groups)
    for flat in flat_groups(optimizer):
        shared = state.new_shared()
        if on_device and isinstance(shared.get("step"), Tensor):
            shared["step"] = shared["step"].to(flat.device, torch.float32)
        inside.state[flat] = {**shared, **{key: torch.zeros_like(flat.detach()) for key in state.keys}}
    _link_state(optimizer)


def set_loss_scale(optimizer: Any, scale: float) -> None:
    """Sets by what losses are multiplied from now on, and gradients divided, under fp16 with a fixed scale."""
    optimizer.loss_scaler.cur_scale = scale


def renew_state(optimizer: Any, make: Callable[[Sequence[Any]], torch.optim.Optimizer]) -> None:
    """Puts the state of a new optimizer, as `make` makes it, in the place of what the one inside has gathered."""
    new = make(flat_groups(optimizer)).state  # empty, unless it has a state before its first step
    optimizer.optimizer.state.clear()
    optimizer.optimizer.state.update(new)
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False  # after the next step it links each weight to the new state


def _link_state(optimizer: Any) -> None:
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()  # so that the setters find it


@torch.no_grad()
def spread_partitions(optimizer: Any) -> None:
    """Makes the network compute with the float32 partitions as they are now."""
    if hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2: every rank holds whole weights, gathered from all
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    optimizer.invalidate_secondary_tensor()


@contextmanager
def capturing(engine: Any, keep: Callable[[Any, str], None], writes: Writes) -> Iterator[None]:
    """Inside, what DeepSpeed would pickle is given to `keep`, with the path of its file.

    What fails is kept in `writes`: DeepSpeed saves between barriers, and must miss none.
    """

    def save(state_dict: Any, path: str) -> None:
        writes(keep, state_dict, path)

    engine.checkpoint_engine.save = save
    engine._copy_recovery_script = functools.partial(writes, engine._copy_recovery_script)
    try:
        yield
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script


class Place(NamedTuple):
    """Where in one of this rank's flat groups its share of a weight lies."""

    name: str
    group: int
    begin: int
    end: int


def places(states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> list[Place]:
    """Where this rank holds which weights, from all that it would pickle.

    Args:
        states: as `capturing` gives them.
    """
    from deepspeed.checkpoint import constants as keys

    of_optimizer: Mapping[str, Any] = next(
        (state[keys.OPTIMIZER_STATE_DICT] for state in states if keys.OPTIMIZER_STATE_DICT in state), {}
    )
    if keys.PARAM_SLICE_MAPPINGS in of_optimizer:
        return [
            Place(name, group, place.start, place.start + place.numel)
            for group, found in enumerate(of_optimizer[keys.PARAM_SLICE_MAPPINGS])
            for name, place in found.items()
        ]
    shapes = next((state[keys.PARAM_SHAPES] for state in states if keys.PARAM_SHAPES in state), ())
    cut = _cut_of_stage_3(shapes, ranks)
    return [Place(n, g, start, start + count) for n, r, g, start, count in cut if r == rank and count]


# ---- its files ------------------------------------------------------------------------------------------------------

Piece = tuple[int, int, int, int]
"""A piece of a weight: rank, group, where in that rank's flat group it begins, and how many elements it has."""


def has_state(folder: Path) -> bool:
    """Whether the folder of a network has the files of ranks that held shares of its optimizer's state."""
    return bool(_state_files(folder))


def read_state(folder: Path, shapes: Mapping[str, torch.Size]) -> WholeState:
    """The optimizer's state, unsharded, from the files of all ranks in a checkpoint's folder. It unpickles them.

    Args:
        shapes: of the trained weights.

    Raises:
        NotElastic: a value that is neither one for each element of the weights nor the same for all of them, or files
            that do not hold all of a weight.
    """
    from deepspeed.checkpoint import constants as keys

    saved = [_load(file)[keys.OPTIMIZER_STATE_DICT] for file in _state_files(folder)]
    if keys.FP32_FLAT_GROUPS in saved[0]:
        states = [rank[keys.OPTIMIZER_STATE_DICT]["state"] for rank in saved]
        flat = [rank[keys.FP32_FLAT_GROUPS] for rank in saved]
        pieces = _pieces_of_stage_3(folder, len(saved), keys.PARAM_SHAPES)
    else:
        states = [rank[keys.BASE_OPTIMIZER_STATE]["state"] for rank in saved]
        flat = [rank[keys.SINGLE_PARTITION_OF_FP32_GROUPS] for rank in saved]
        pieces = _pieces_of_mappings([rank[keys.PARAM_SLICE_MAPPINGS] for rank in saved])
    per_element, shared = _split(folder, states, flat)
    if per_element:
        _check_whole(folder, pieces, shapes)

    def part(name: str, begin: int, end: int) -> dict[str, Tensor]:
        wanted = _within(pieces[name], begin, end)
        parts = {key: [states[r][g][key][start : start + n] for r, g, start, n in wanted] for key in per_element}
        return {key: torch.cat(values) if len(values) > 1 else values[0] for key, values in parts.items() if values}

    return WholeState(lambda name: part(name, 0, shapes[name].numel()), part, per_element, shared)


def _within(pieces: Sequence[Piece], begin: int, end: int) -> list[Piece]:
    """What lies between two elements of a weight, of the pieces that it consists of."""
    found, at = [], 0
    for rank, group, start, count in pieces:
        first, last = max(begin, at), min(end, at + count)
        if first < last:
            found.append((rank, group, start + first - at, last - first))
        at += count
    return found


def _state_files(folder: Path) -> list[Path]:
    """The files of the optimizer's state, in the order of ranks."""
    return sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False, mmap=True)


def _rank_of(file: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else -1


def _pieces_of_mappings(ranks: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[Piece]]:
    """Stages 1 and 2 write down where in its flat groups a rank holds which weight."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for rank, groups in enumerate(ranks):
        for group, places in enumerate(groups):
            for name, place in places.items():
                pieces[name].append((rank, group, place.start, place.numel))
    return pieces


def _pieces_of_stage_3(folder: Path, ranks: int, shapes_key: str) -> dict[str, list[Piece]]:
    pieces: dict[str, list[Piece]] = defaultdict(list)
    shapes = _load(next(folder.glob("*zero_pp_rank_0_*model_states.pt")))[shapes_key]
    for name, *piece in _cut_of_stage_3(shapes, ranks):
        pieces[name].append((piece[0], piece[1], piece[2], piece[3]))
    return pieces


def _cut_of_stage_3(groups: Sequence[Mapping[str, torch.Size]], ranks: int) -> Iterator[tuple[str, int, int, int, int]]:
    """Stage 3 cuts each weight into as many pieces of one size as there are ranks, the last of them filled up.

    Yields:
        the weight's name, rank, group, where in its flat group the piece begins, and how many elements it has.
    """
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            whole = math.prod(shape)
            piece = -(-whole // ranks)
            for rank in range(ranks):
                yield name, rank, group, start, max(0, min(piece, whole - rank * piece))
            start += piece


def _split(
    folder: Path, states: Sequence[Mapping[int, Mapping[str, Any]]], flat: Sequence[Sequence[Tensor]]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The keys of what is kept for each element, and the values that are kept once."""
    per_element: set[str] = set()
    once: dict[str, list[Any]] = defaultdict(list)
    for state, groups in zip(states, flat, strict=True):
        for group, values in state.items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.ndim == 1 and value.numel() >= groups[group].numel():
                    per_element.add(key)  # flat, and perhaps filled up at its end
                elif value is not None:
                    once[key].append(value)
    return tuple(sorted(per_element)), {key: shared_value(folder, key, values) for key, values in once.items()}


def _check_whole(folder: Path, pieces: Mapping[str, Sequence[Piece]], shapes: Mapping[str, torch.Size]) -> None:
    for name, shape in shapes.items():
        found = sum(n for *_, n in pieces.get(name, ()))
        if found != shape.numel():
            raise NotElastic(f"{folder} holds the optimizer's state of {found:,} of the {shape.numel():,} in {name}")
