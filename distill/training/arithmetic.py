"""The arithmetic of a process: the same sums give the same bits each time, on whatever processor it runs.

A sum of floats depends on its order. Libraries choose the order by the processor, by the number of threads, and, on
some processors, by where in memory the numbers lie: there Intel's MKL gives two answers to one product, of which one
operand came from a file and the other from the allocator. Here is set what makes them choose the same each time, in one
place for all commands; `docs/reproducibility.md` says what follows from it.

Nothing here imports torch until it is needed: `prepare` is called before torch is loaded.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from distill.models.devices import gpu_is_used

Deterministic = bool | Literal["auto"]
MatmulPrecision = Literal["highest", "high", "medium"]
Attention = Literal["auto", "flash", "efficient", "cudnn", "math"]

VARIABLES = {
    # MKL: one order of summation at any alignment and on any number of threads ("strict conditional numerical
    # reproducibility"), with the processor's own instructions. COMPATIBLE would be several times slower.
    "MKL_CBWR": "AUTO,STRICT",
    # cuBLAS: workspaces that its streams do not share, without which torch refuses deterministic products.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""What is set for every command, where the user has not set it: by variable."""

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
ALLOCATORS = (ALLOCATOR, "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""How torch's allocator on a GPU is configured, under any of its names."""
EXPANDABLE = "expandable_segments:True"
"""Its blocks grow: batches and decoded images of changing sizes leave fewer gaps that nothing fits into."""

_INSTRUCTIONS = re.compile(r"avx\w*|amx\w*|fma\w*|f16c|sse4_\d|asimd\w*|sve\w*|bf16|i8mm")


def prepare(deterministic: Deterministic = "auto") -> None:
    """Sets the `VARIABLES` that the user has not set; false sets none. And the allocator's, which changes no number.

    They are read at the first product of matrices, so this comes before it, and best before torch is loaded. Processes
    that are started from this one inherit them.
    """
    if not any(name in os.environ for name in ALLOCATORS):
        os.environ[ALLOCATOR] = EXPANDABLE
    if deterministic is not False:
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)


def settle(deterministic: Deterministic = "auto", matmul_precision: MatmulPrecision = "highest") -> None:
    """Sets which kernels torch may use: "auto" is deterministic ones on CPUs, true on GPUs as well.

    An operation that has no deterministic kernel is then an error, which names it. `matmul_precision` is of float32
    products of matrices: all 24 bits, or those of TF32 ("high") and bfloat16 ("medium") where the device has them.
    Convolutions compute in TF32 below "highest".
    """
    import torch

    chosen = deterministic is True or (deterministic == "auto" and not gpu_is_used())
    torch.use_deterministic_algorithms(chosen)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
    torch.backends.cudnn.deterministic = chosen
    if deterministic is not False:
        torch.backends.cudnn.benchmark = False  # would choose kernels by their times
    if torch.get_float32_matmul_precision() != matmul_precision:
        torch.set_float32_matmul_precision(matmul_precision)
    # Convolutions round float32 as products of matrices do: torch's own default is TF32 for the one, not the other.
    torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"


def choose_attention(kernel: Attention = "auto") -> None:
    """Leaves torch only `kernel` for attention, and its own `math` for operands that this cannot take; auto: all.

    Flash attention, for instance, takes no float32 on a GPU.
    """
    import torch

    switches = {
        "flash": torch.backends.cuda.enable_flash_sdp,
        "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
        "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    }
    for name, switch in switches.items():
        switch(kernel in ("auto", name))
    torch.backends.cuda.enable_math_sdp(True)


def in_force() -> dict[str, Any]:
    """The processor, the libraries that compute, and their switches, as they are and not as they were set."""
    import torch

    return {
        "processor": _processor(),
        "torch": {
            "version": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "libraries": _libraries(torch.__config__.show()),
            "threads": torch.get_num_threads(),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "attention": [kernel for kernel, has in _attention_kernels().items() if has],
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn": {
                "version": torch.backends.cudnn.version(),
                "deterministic": torch.backends.cudnn.deterministic,
                "benchmark": torch.backends.cudnn.benchmark,
                "allow_tf32": torch.backends.cudnn.allow_tf32,
            },
        },
        "products_depend_on_alignment": products_depend_on_alignment(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def _attention_kernels() -> dict[str, bool]:
    """Which kernels torch may compute attention with."""
    import torch

    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }


def products_depend_on_alignment() -> bool:
    """Whether products of matrices, computed here and now, have other bits where an operand lies elsewhere in memory.

    Sizes and places are such that MKL without `MKL_CBWR` does differ on AMD's processors.
    """
    import torch
    from torch.nn.functional import linear

    random = torch.Generator().manual_seed(0)
    for rows, width, outputs in ((1, 5, 4), (1, 5, 24), (11, 20, 12), (22, 48, 1), (22, 64, 28)):
        x, w = torch.randn(rows, width, generator=random), torch.randn(outputs, width, generator=random)
        answers = [linear(at(x, place), at(w, other)) for place in (0, 4, 8, 32) for other in (0, 4, 8, 32)]
        if any(not torch.equal(answers[0], answer) for answer in answers):
            return True
    return False


def at(values: Any, offset: int) -> Any:
    """A copy of the tensor that begins `offset` bytes, a multiple of its elements' size, after a multiple of 64."""
    import torch

    memory = torch.empty(values.numel() * values.element_size() + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + offset
    place = memory[start : start + values.numel() * values.element_size()]
    return place.view(values.dtype).view(values.shape).copy_(values)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two records of `in_force` that bits may depend on, in words: "torch.threads 1, now 2"."""
    old, new = _flat(before), _flat(now)
    changed = [name for name in new if name in old and old[name] != new[name] and name != "processor.cores"]
    return [name if isinstance(new[name], list) else f"{name} {old[name]}, now {new[name]}" for name in changed]


def _processor() -> dict[str, Any]:
    about = _cpuinfo()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    instructions = about.get("flags", about.get("Features", "")).split()
    return {
        "name": about.get("model name") or platform.processor() or platform.machine(),
        "vendor": about.get("vendor_id") or about.get("CPU implementer"),
        "instructions": sorted(name for name in instructions if _INSTRUCTIONS.fullmatch(name)),
        "cores": usable,
    }


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first core; {} elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _libraries(built: str) -> list[str]:
    """The lines of `torch.__config__.show()` about what multiplies matrices."""
    lines = [line.strip(" -") for line in built.splitlines()]
    found = [line for line in lines if re.match(r"Intel|MKL|OpenBLAS|OpenMP|CUDA Runtime|CuDNN", line)]
    blas = re.search(r"BLAS_INFO=(\w+)", built)
    return [*([f"BLAS: {blas[1]}"] if blas else []), *found]


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        found.update(inner)
    return found
