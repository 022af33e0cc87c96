"""A turn of a training step, walked through on the meta device: FLOPs, bytes and network calls, without weights.

The loss and the networks are the real ones, forwards and backwards. Attention is that of GPUs (flash attention); left
alone, tensors of the meta device take the textbook one, whose maps would be most of the memory.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from distill.config.composition import yaml_of
from distill.config.loading import ConfigError, build, checking
from distill.config.settings import OF_PROMPTS, ModelSettings, TrainSettings
from distill.data.sizes import read_sizes
from distill.diffusion.random import Context
from distill.diffusion.trajectory import Batch
from distill.methods.base import Networks, Turn
from distill.models.families.base import Published
from distill.models.families.loading import load_teacher, prompt_tokens, require_family
from distill.models.families.registry import FAMILIES, published
from distill.models.families.teacher import Teacher
from distill.models.full_size import build_network
from distill.models.lora import TEACHING, add_lora, as_now, lora_layers
from distill.models.quantized import quantize
from distill.training.sizes import latent_shape, require_sizes
from distill.training.teacher import as_set

PUBLISHED = tuple(name for family in FAMILIES.values() for name in family.full_size)
"""Models of `configs/model/` whose sizes are known without a download."""
TEACHERS = ("lora", "whole")
"""What `teacher` may be where there is no export yet."""
# What CUDA's autocast computes in bfloat16, and in float32; of what the networks are made of.
_LOWER = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, F.scaled_dot_product_attention}
_FLOAT = {F.group_norm, F.layer_norm, F.softmax, F.interpolate}


@dataclass(frozen=True)
class Cost:
    """What a turn costs.

    Args:
        updates: the network that it trains.
        flops: a sample, forward, backward and what is recomputed; multiply-adds count as two.
        evaluations: of each network, a sample; a guided one is two.
        with_gradient: those of them that a backward pass follows.
        calls: of each network, a micro-batch; the same two ways.
        calls_with_gradient: likewise.
        peaks: bytes that live at once, (a sample, besides), at the moments of which none is below another in both;
            weights are not among them, gradients are besides.
    """

    updates: str
    flops: float
    evaluations: Mapping[str, float]
    with_gradient: Mapping[str, float]
    calls: Mapping[str, int]
    calls_with_gradient: Mapping[str, int]
    peaks: tuple[tuple[float, int], ...]

    def peak(self, samples: int) -> float:
        """Most bytes of a micro-batch that live at once beside weights and states, with gradients as they come."""
        return max(samples * growing + besides for growing, besides in self.peaks)

    def activations(self, samples: int) -> float:
        """The same without gradients."""
        return samples * max(growing for growing, _ in self.peaks)


def count(
    turn: Turn,
    networks: Networks,
    batch: Batch,
    context: Context,
    *,
    checkpointed: bool,
    autocast: Sequence[str] = (),
    repeated: dict[Any, Any] | None = None,
) -> Cost:
    """Walks through a turn, all of whose networks and batch are on the meta device.

    Args:
        checkpointed: networks with gradient checkpointing use it.
        autocast: names of networks whose modules compute under bfloat16 autocast.
        repeated: what calls of the same networks without a gradient cost; calls that are new are added to it.

    Raises:
        ValueError: the number of network calls depends on random numbers.
    """
    modules = {name: n.module for name, n in networks.items() if hasattr(n, "module")}
    trained = [p for p in modules[turn.updates].parameters() if p.requires_grad]
    others = {p for m in modules.values() for p in m.parameters() if p.requires_grad} - set(trained)
    walk = Walk([p for n in networks.values() for p in _parameters(n)], trained, repeated)
    wide = {id(modules[name]) for name in autocast}
    walked = {
        name: replace(n, module=_Watched(name, n.module, walk, id(n.module) in wide)) if name in modules else n
        for name, n in networks.items()
    }
    for p in others:
        p.requires_grad_(False)
    try:
        with walk:
            _checkpoint(modules.values(), checkpointed, wide)
            loss = turn.loss(walked, batch, context).total
            torch.autograd.backward(loss)
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
        raise ValueError("it cannot be counted: how often networks are called depends on random numbers") from None
    finally:
        for p in others:
            p.requires_grad_(True)
        for p in trained:
            p.grad = None
    return walk.cost(turn.updates, len(batch))


class Walk(TorchDispatchMode):
    """Counts, inside, the FLOPs of torch's own table and the bytes of tensors as they come and go.

    Args:
        known: tensors that are there anyway and do not count.
        trained: weights; a tensor of the shape of one is a gradient or a copy, and does not grow with the batch.
        repeated: see `count`.
    """

    def __init__(
        self, known: Sequence[Tensor], trained: Sequence[Tensor], repeated: dict[Any, Any] | None = None
    ) -> None:
        super().__init__()
        self.flops = 0
        self.evaluations: Counter[str] = Counter()
        self.with_gradient: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.calls_with_gradient: Counter[str] = Counter()
        self.repeated = {} if repeated is None else repeated
        self._there = {x.untyped_storage()._cdata for x in known}
        self._shapes = {tuple(p.shape) for p in trained}
        self._growing = self._fixed = self._most = self._highest = 0
        self._moments: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if flops := flop_registry.get(func._overloadpacket):
            self.flops += flops(*args, **(kwargs or {}), out_val=out)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self._note(x)
        return out

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if (key := storage._cdata) not in self._there:
            self._there.add(key)
            size, fixed = storage.nbytes(), tuple(x.shape) in self._shapes
            self._change(size, fixed)
            weakref.finalize(storage, self._gone, key, size, fixed).atexit = False

    def _gone(self, key: int, size: int, fixed: bool) -> None:
        self._there.discard(key)
        self._change(-size, fixed)

    def _change(self, size: int, fixed: bool) -> None:
        if fixed:
            self._moments.append((self._most, self._fixed))
            self._fixed += size
            self._most = self._growing
        else:
            self._growing += size
            self._most, self._highest = max(self._most, self._growing), max(self._highest, self._growing)

    def once(self, key: Any, call: Any) -> Any:
        """What `call` returns; it is walked through the first time only, and counts each time."""
        if key in self.repeated:
            flops, rise, shapes = self.repeated[key]
            self.flops += flops
            self._most = max(self._most, self._growing + rise)
            self._highest = max(self._highest, self._growing + rise)
            return tree_map(torch.empty_like, shapes)
        before, outer, self._highest = (self.flops, self._growing), self._highest, self._growing
        out = call()
        self.repeated[key] = self.flops - before[0], self._highest - before[1], tree_map(_shape_of, out)
        self._highest = max(outer, self._highest)
        return out

    @property
    def most(self) -> int:
        """Bytes that have lived at once."""
        return max([self._most, *(growing for growing, _ in self._moments)])

    def cost(self, updates: str, samples: int) -> Cost:
        """What was counted, for a batch of `samples`."""
        moments = sorted({*self._moments, (self._most, self._fixed)}, reverse=True)
        peaks: list[tuple[float, int]] = []
        for growing, fixed in moments:
            if not peaks or fixed > peaks[-1][1]:
                peaks.append((growing / samples, fixed))
        return Cost(
            updates,
            self.flops / samples,
            {name: n / samples for name, n in self.evaluations.items()},
            {name: n / samples for name, n in self.with_gradient.items()},
            dict(self.calls),
            dict(self.calls_with_gradient),
            tuple(peaks),
        )


def _shape_of(x: Tensor) -> Tensor:
    """A tensor of the same shape that takes no part in the count: made where no mode sees it."""
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.empty(x.shape, dtype=x.dtype, device="meta")


class _Watched(nn.Module):
    """A network that reports its calls to `walk`. Those without a gradient are alike: one is walked through."""

    def __init__(self, name: str, module: nn.Module, walk: Walk, autocast: bool) -> None:
        super().__init__()
        self.name, self.walk, self.autocast = name, walk, autocast
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graded = torch.is_grad_enabled()
        samples = len(args[0] if args else kwargs["hidden_states"])  # a batch, or a list of samples
        self.walk.evaluations[self.name] += samples
        self.walk.calls[self.name] += 1
        if graded:
            self.walk.with_gradient[self.name] += samples
            self.walk.calls_with_gradient[self.name] += 1
            return self._call(*args, **kwargs)
        shapes = tuple(tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return self.walk.once((self.name, shapes), lambda: self._call(*args, **kwargs))

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        with _Kernels(self.autocast):
            out = self.module(*args, **kwargs)
        return tree_map(lambda y: y.float(), out) if self.autocast else out  # as Accelerate does


class _Kernels(TorchFunctionMode):
    """Inside, tensors of the meta device compute with the kernels of a GPU: flash attention, and CUDA's autocast."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast and (func in _LOWER or func in _FLOAT):
            dtype = torch.bfloat16 if func in _LOWER else torch.float32
            args, kwargs = tree_map(functools.partial(self._cast, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, dtype: torch.dtype, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if not (isinstance(x, nn.Parameter) and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self._copies:  # autocast keeps those of trained weights
            self._copies[id(x)] = x.to(dtype)
        return self._copies[id(x)]


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **others: Any) -> Tensor:
    """Attention as a GPU computes it, without a map of all pairs: flash attention, and another kernel under a mask.

    Args:
        others: further arguments of torch's function, of which the costs do not depend: scale, causality.
    """
    if others.get("enable_gqa"):  # several heads share a key
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    pairs = (*query.shape[:-1], key.shape[-2])
    bias = attn_mask.to(query.dtype).expand(pairs)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, bias, torch.is_grad_enabled())[0]


def _checkpoint(modules: Iterable[Any], checkpointed: bool, wide: Collection[int]) -> None:
    for module in modules:
        if not checkpointed:
            for part in module.modules():
                if hasattr(part, "gradient_checkpointing"):
                    part.gradient_checkpointing = False
        elif hasattr(module, "enable_gradient_checkpointing"):
            context = functools.partial(_recomputed, id(module) in wide, lora_layers(module))
            again = functools.partial(checkpoint, use_reentrant=False, context_fn=context, preserve_rng_state=False)
            module.enable_gradient_checkpointing(again)


def _recomputed(autocast: bool, layers: Sequence[BaseTunerLayer]) -> tuple[Any, Any]:
    return nullcontext(), _again(_Kernels(autocast), as_now(layers))


@contextmanager
def _again(kernels: Any, adapters: Any) -> Iterator[None]:
    with kernels, adapters:
        yield


def _parameters(network: Any) -> Iterator[Tensor]:
    module = network if isinstance(network, nn.Module) else getattr(network, "module", None)
    if module is not None:
        yield from module.parameters()
        yield from module.buffers()


def forward(module: nn.Module, samples: int, *args: Any, **kwargs: Any) -> tuple[float, float]:
    """FLOPs per sample of a forward pass without gradients, and the bytes that then live at once beside the weights.

    Args:
        module: on the meta device, as are the arguments, of so many samples.
    """
    walk = Walk([*module.parameters(), *module.buffers()], [])
    with walk, torch.no_grad(), _Kernels(False):
        module(*args, **kwargs)
    return walk.flops / samples, walk.most / samples


# ---- what is walked through ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """A teacher without weights, on the meta device, how many tokens its prompts have, and what else is known of a
    published one."""

    teacher: Teacher
    tokens: int
    published: Published | None = None


def architecture(model: ModelSettings, sizes: Sequence[str] | str | None = None) -> Architecture:
    """The network of a pipeline folder, or of a published model by its name.

    Args:
        sizes: `data.sizes`, of which the largest is counted.

    Raises:
        ConfigError: neither of them; or the folder is no pipeline of a known family.
    """
    path = model.config or model.pretrained_model_name_or_path  # a single file has the sizes of its configs' folder
    names = {_settings_of(name)["pretrained_model_name_or_path"]: name for name in PUBLISHED if _settings_of(name)}
    known: Published | None = None
    if path in names:
        family, known = published(names[path])  # its files are not looked at
        second_pass = family.guidance.form(known.network, {"_name_or_path": path}) == "cfg"
        teacher = Teacher.of(family, known.network, known.vae, known.noise, path, second_pass=second_pass)
        network = build_network(family.network.kind, known.network, device="meta")
        with checking():
            require_family(path, family, model.family)
            chosen = family.text.prompt_tokens(model.max_tokens)
        tokens = known.tokens + (chosen or 0) - (family.text.max_tokens or 0)
    elif Path(path).is_dir():
        with checking():
            teacher = load_teacher(path, parts=(), family=model.family)
            tokens = prompt_tokens(Path(path), model.max_tokens)
        with torch.device("meta"):
            network = getattr(diffusers, teacher.family.network.kind).from_config(dict(teacher.config))
    else:
        raise ConfigError(f"model {path!r} is no folder here, and none whose sizes are known: {', '.join(names)}")
    teacher.parts["network"] = network.requires_grad_(False)
    teacher = as_set(teacher, model)
    if sizes and sizes != OF_PROMPTS:
        with checking("data.sizes: "):
            listed = read_sizes(sizes)
            require_sizes(teacher, listed)
        largest = latent_shape(teacher, max(listed, key=lambda size: size.pixels))
        teacher = replace(teacher, latent_shape=largest)
    return Architecture(teacher, tokens, known)


def _settings_of(name: str) -> dict[str, Any]:
    return yaml_of(f"model/{name}.yaml")


def networks_of(
    cfg: TrainSettings, teacher: Teacher, requires: Sequence[str], others: Mapping[str, Any]
) -> dict[str, Any]:
    """The networks of a run, made as the run makes them. `cfg.teacher` may be one of `TEACHERS`, without weights.

    Args:
        requires: what the method requires beside what it trains.
        others: what makes each further trained network.
    """
    if cfg.quantize is not None:
        quantize(teacher.network, cfg.quantize, teacher.family)
    with torch.device("meta"):
        networks = {name: other.network(teacher, cfg.seed) for name, other in others.items()}
        kind = cfg.teacher if "teacher" in requires else None
        teaching = teacher.denoiser()
        if kind == "lora":
            targets = teacher.family.lora.chosen(teacher.network, cfg.lora_targets)
            add_lora(
                teacher.network,
                cfg.lora_rank,
                cfg.lora_alpha,
                targets=targets,
                adapter=TEACHING,
                family=teacher.family,
            )
            teaching = replace(teaching, adapter=TEACHING)
        elif kind == "whole":
            kind, config = teacher.family.network.kind, teacher.network.config
            teaching = replace(teaching, module=build_network(kind, config, device="meta").requires_grad_(False))
        networks |= build(cfg.student).networks(teacher, cfg.seed, "teacher" in requires)
    if kind is not None:
        networks["teacher"] = teaching
    return networks


def cast(networks: Mapping[str, Any], trains: Sequence[str], bf16: bool, masters: bool) -> None:
    """Gives weights the dtypes of an engine; `masters`: it keeps float32 weights elsewhere, as DeepSpeed does."""
    low = torch.bfloat16 if bf16 else torch.float32
    trained = {id(networks[name].module) for name in trains}
    for network in networks.values():
        network.module.train(id(network.module) in trained)
        for p in network.module.parameters():
            if p.is_floating_point():
                p.data = p.data.to(torch.float32 if p.requires_grad and not masters else low)


def batch_of(architecture: Architecture, states: int, samples: int = 1) -> Batch:
    """What a store of this teacher gives, on the meta device."""
    teacher = architecture.teacher
    shapes = teacher.family.text.shapes(teacher.network.config, architecture.tokens)
    size = (teacher.resolution, teacher.resolution)
    sizes = teacher.family.sizes([size] * samples, [(0, 0)] * samples, size)
    with torch.device("meta"):
        text = {name: torch.empty(samples, *shape) for name, shape in shapes.items()}
        return Batch(
            states=torch.empty(samples, states, *teacher.latent_shape),
            times=torch.empty(samples, states, dtype=torch.int64),
            conditioning=text | {name: torch.empty(entry.shape) for name, entry in sizes.items()},
            unconditional=text if teacher.second_pass else {},
            guidance=torch.empty(samples),
            keys=("",) * samples,
            positions=tuple(range(samples)),
            prompts=("",) * samples,
            next_prompts=("",) * samples,
        )
