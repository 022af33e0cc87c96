"""Files of tensors: in their dtype, and with permissions that follow the umask, whatever a library would give them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file as _save_file
from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions that `open` gives a new file there.

    safetensors writes into a temporary file of mode 0600 and renames it, so that under any umask nobody but the owner
    could read the result. Use this in the place of `safetensors.torch.save_file`.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    _save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    share(Path(path))


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in the dtype of a file.

    Raises:
        ValueError: a value that is not finite, or not in that dtype.
    """
    stored = tensor.to(dtype)
    if tensor.is_floating_point() and not stored.isfinite().all():
        if not tensor.isfinite().all():
            raise ValueError(f"the weights are broken: {name} has values that are not finite")
        raise ValueError(f"{name} holds {float(tensor.abs().max()):.3g}, too much for dtype={str(dtype)[6:]}")
    return stored


def share(path: Path) -> None:
    """Gives a file, or all files below a folder, the permissions that `open` gives a new file there.

    For what other libraries have written (`save_pretrained`). Links, and files on systems that know no permissions,
    stay as they are.
    """
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    mode = _usual_mode(path if path.is_dir() else path.parent)
    for file in files:
        if not file.is_symlink():
            with suppress(OSError):
                file.chmod(mode)


def _usual_mode(folder: Path) -> int:
    """The permissions of a file that `open` makes in `folder`.

    A file is made to see them: reading the umask would change it for a moment in all threads, and it is not all that
    decides (a folder may have default access lists).
    """
    probe = folder / f".{secrets.token_hex(6)}.tmp"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()
