"""Packages that not every run needs: which extra of this one installs them, and one line where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from distill.config.mistakes import ConfigError

EXTRAS = {
    "aiohttp": "remote",
    "bitsandbytes": "8bit",
    "deepspeed": "deepspeed",
    "open_clip": "evaluation",
    "optuna": "sweeps",
    "pyarrow": "parquet",
    "s3fs": "remote",
    "tensorboard": "tensorboard",
    "torchmetrics": "evaluation",
    "torchvision": "evaluation",
    "wandb": "wandb",
    "webdataset": "webdataset",
}
"""The extra of pyproject.toml that installs a package, by the name under which it is imported."""


def is_installed(package: str) -> bool:
    """Whether a package can be found; it is not imported."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # what a finder of somebody else's, or a half-removed package, raises
        return False


def install_line(package: str) -> str:
    """What to type for a package that is missing."""
    if package in EXTRAS:
        return f"pip install 'distill[{EXTRAS[package]}]'"
    return f"pip install {package}"


def require(what: str, *packages: str) -> None:
    """Called before the work that needs the packages begins.

    Args:
        what: the setting that needs them, as it is typed.

    Raises:
        ConfigError: one is not installed; the line says what to type.
    """
    for package in packages:
        if not is_installed(package):
            raise ConfigError(f"{what} needs the package {package}, which is not installed: {install_line(package)}")
