"""The noise schedule: x_t = alpha(t) x_0 + sigma(t) eps for integer times t = 0 ... T, where 0 is clean data.

Diffusers numbers the T noise levels 0 ... T-1 and has no index for clean data. Here the network's timestep index is
t - 1, and t = 0 means alpha 1, sigma 0: a chain that ends, ends at data.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from distill.diffusion.noise import Noise


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider: bf16 arithmetic on x0 is wrong by 6 % at the noisy end."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class NoiseSchedule:
    """Variance-preserving schedule with alpha² + sigma² = 1, tabulated in float64.

    Args:
        alphas_cumprod: [T], the cumulative products ᾱ of the T noise levels, cleanest first, each in [0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(f"alphas_cumprod must be one-dimensional and not empty, got shape {tuple(table.shape)}")
        if not (bool((table >= 0).all()) and bool((table < 1).all()) and bool((table.diff() < 0).all())):
            raise ValueError("alphas_cumprod must lie in [0, 1) and fall strictly with time")
        one = torch.ones(1, dtype=torch.float64)
        self.alphas_cumprod = torch.cat([one, table])  # [T + 1], index 0 is clean data
        self._coefficients: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, T: int = 1000) -> NoiseSchedule:
        """The schedule of Stable Diffusion 1.x, 2.x and XL: betas linear in their square root."""
        return cls.of(Noise(num_train_timesteps=T, beta_start=beta_start, beta_end=beta_end))

    @classmethod
    def of(cls, noise: Noise) -> NoiseSchedule:
        """The schedule of the noise that a diffusers scheduler stands for.

        Raises:
            ValueError: betas with which the signal does not fall from level to level.
        """
        abar = (1 - _betas(noise)).cumprod(0)
        if noise.rescale_betas_zero_snr:
            abar = _zero_terminal_snr(abar)
        return cls(abar)

    @property
    def T(self) -> int:
        """The noisiest time."""
        return len(self.alphas_cumprod) - 1

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ when any ᾱ differs by more than 1e-6 (configs are written in decimal)."""
        rounded = (self.alphas_cumprod * 1e6).round().to(torch.int64)
        return hashlib.sha256(rounded.numpy().astype("<i8").tobytes()).hexdigest()[:16]

    def alpha(self, t: Tensor | int, like: Tensor) -> Tensor:
        """Signal share at time t: [B, 1, ...] to multiply `like` [B, ...] (a scalar if t is one), in its wide dtype."""
        return self._at("alpha", t, like)

    def sigma(self, t: Tensor | int, like: Tensor) -> Tensor:
        """Noise share at time t, shaped like `alpha`."""
        return self._at("sigma", t, like)

    def _at(self, name: str, t: Tensor | int, like: Tensor) -> Tensor:
        values = self._table(name, like)[t]
        return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values

    def _table(self, name: str, like: Tensor) -> Tensor:
        # One copy per device and dtype: indexing a CPU table with a CUDA time would stall the stream at every step.
        key = (name, like.device, torch.promote_types(like.dtype, torch.float32))
        if key not in self._coefficients:
            squared = self.alphas_cumprod if name == "alpha" else 1 - self.alphas_cumprod
            self._coefficients[key] = squared.sqrt().to(like.device, key[2])
        return self._coefficients[key]


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
    """The forward process: alpha(t) x0 + sigma(t) noise, [B, ...]."""
    x0, noise = wide(x0), wide(noise)
    return schedule.alpha(t, x0) * x0 + schedule.sigma(t, x0) * noise


def _betas(noise: Noise) -> Tensor:
    T, start, end = noise.num_train_timesteps, noise.beta_start, noise.beta_end
    if noise.trained_betas is not None:
        return torch.tensor(noise.trained_betas, dtype=torch.float64)
    if noise.beta_schedule == "linear":
        return torch.linspace(start, end, T, dtype=torch.float64)
    if noise.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
    u = torch.arange(T + 1, dtype=torch.float64) / T  # squaredcos_cap_v2: Nichol & Dhariwal 2021, eq. 17
    f = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def _zero_terminal_snr(abar: Tensor) -> Tensor:
    """Shifts and scales sqrt(ᾱ) so that it ends at exactly 0 (Lin et al. 2023, algorithm 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
