"""The noise schedule: x_t = alpha(t) x_0 + sigma(t) eps for integer times t = 0 ... T, where 0 is clean data.

Diffusers numbers the T noise levels 0 ... T-1 and has no index for clean data. Here t = 0 means alpha 1, sigma 0: a
chain that ends, ends at data. What a network is told of a time t is the schedule's matter too (`told`).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from distill.diffusion.noise import AnyNoise, FlowNoise, Noise


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider: bf16 arithmetic on x0 is wrong by 6 % at the noisy end."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class NoiseSchedule:
    """Three tables over t = 0 ... T: alpha, sigma (float64), and what a network is told. Made by `vp`, `linear`, `of`.

    Args:
        alpha, sigma: [T + 1], the shares of signal and noise; (1, 0) at t = 0.
        told: [T + 1], what a network is told of each time.
        shift: of flow matching, where alpha + sigma = 1; None: variance-preserving, where alpha² + sigma² = 1.
        alphas_cumprod: [T + 1], alpha² to the last bit, of a variance-preserving schedule.
    """

    def __init__(
        self,
        alpha: Tensor,
        sigma: Tensor,
        told: Tensor,
        shift: float | None = None,
        alphas_cumprod: Tensor | None = None,
    ) -> None:
        self.shift = shift
        self._tables = {"alpha": alpha, "sigma": sigma, "told": told}
        self._alphas_cumprod = alphas_cumprod
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def vp(cls, alphas_cumprod: Tensor) -> NoiseSchedule:
        """Variance preserving. Networks are told the index t - 1 of the noise level, int64.

        Args:
            alphas_cumprod: [T], the cumulative products ᾱ of the T noise levels, cleanest first, each in [0, 1).

        Raises:
            ValueError: ᾱ that do not fall strictly within that range.
        """
        table = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) == 0:
            raise ValueError(f"alphas_cumprod must be one-dimensional and not empty, got shape {tuple(table.shape)}")
        if not (bool((table >= 0).all()) and bool((table < 1).all()) and bool((table.diff() < 0).all())):
            raise ValueError("alphas_cumprod must lie in [0, 1) and fall strictly with time")
        table = torch.cat([torch.ones(1, dtype=torch.float64), table])  # [T + 1], index 0 is clean data
        told = (torch.arange(len(table)) - 1).clamp(min=0)  # clean data has no index: it is shown as the cleanest level
        return cls(table.sqrt(), (1 - table).sqrt(), told, alphas_cumprod=table)

    @classmethod
    def linear(cls, shift: float = 1.0, T: int = 1000) -> NoiseSchedule:
        """Flow matching: sigma = shift u / (1 + (shift - 1) u) for u = t / T, alpha = 1 - sigma, and pure noise at T.

        Networks are told T sigma(t) in float32, as diffusers' flow-matching schedulers do. So they know no shift: it
        says which noise levels the whole numbers stand for.

        Raises:
            ValueError: a shift that is not above 0, or no noise level.
        """
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be above 0, got {shift}")
        if T < 1:
            raise ValueError(f"T must be at least 1, got {T}")
        u = torch.arange(T + 1, dtype=torch.float64) / T
        sigma = shift * u / (1 + (shift - 1) * u)
        sigma[-1] = 1  # which the division may miss by its last bit
        return cls(1 - sigma, sigma, (T * sigma).float(), shift=float(shift))

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, T: int = 1000) -> NoiseSchedule:
        """The schedule of Stable Diffusion 1.x, 2.x and XL: betas linear in their square root."""
        return cls.of(Noise(num_train_timesteps=T, beta_start=beta_start, beta_end=beta_end))

    @classmethod
    def of(cls, noise: AnyNoise, tokens: int | None = None, shift: float | None = None) -> NoiseSchedule:
        """The schedule of the noise that a diffusers scheduler stands for.

        Args:
            tokens: of a picture in the network, on which the shift of some flow-matching noise depends.
            shift: in the place of the noise's own, for flow matching.

        Raises:
            ValueError: betas with which the signal does not fall from level to level; a shift that depends on `tokens`
                without them; and see `Noise.at` and `FlowNoise.at`.
        """
        noise = noise.at(tokens, shift)
        if isinstance(noise, FlowNoise):
            return cls.linear(noise.settled_shift, noise.num_train_timesteps)
        abar = (1 - _betas(noise)).cumprod(0)
        if noise.rescale_betas_zero_snr:
            abar = _zero_terminal_snr(abar)
        return cls.vp(abar)

    @property
    def T(self) -> int:
        """The noisiest time."""
        return len(self._tables["alpha"]) - 1

    @property
    def is_linear(self) -> bool:
        """Whether alpha + sigma = 1: flow matching. Methods have no need to ask."""
        return self.shift is not None

    @property
    def usual_sampling(self) -> tuple[str, str]:
        """The sampler and the spacing of students whose method leaves both open.

        Of flow matching it is Euler: pipelines hand LCM's scheduler no generator there, so that what it draws would not
        depend on a picture's seed alone.
        """
        return ("ddim", "trailing") if self.is_linear else ("lcm", "lcm")

    def stochastic_sampling(self, gamma: float | None, setting: str) -> tuple[str, str, float]:
        """Sampler, spacing and gamma of students that may jump to any time, with a share `gamma` of fresh noise.

        None is TCD's .3; for flow matching, where diffusers has no such sampler, it is none.

        Raises:
            ValueError: a gamma, which is called `setting`, that flow matching has no sampler for.
        """
        if not self.is_linear:
            return "tcd", "lcm", 0.3 if gamma is None else gamma
        if gamma not in (None, 0, 1):
            raise ValueError(
                f"{setting}={gamma:g}: diffusers has no such sampler for flow matching, set 0 (ddim), 1 (lcm) or null"
            )
        return ("lcm" if gamma == 1 else "ddim"), "trailing", 0.0

    @property
    def kind(self) -> str:
        """What messages call such noise."""
        return "flow-matching" if self.is_linear else "variance-preserving"

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of a variance-preserving schedule, [T + 1] float64, 1 at clean data.

        Raises:
            ValueError: a flow-matching schedule, which has none.
        """
        if self._alphas_cumprod is None:
            raise ValueError("alphas_cumprod are of variance-preserving noise: a flow-matching schedule has none")
        return self._alphas_cumprod

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ when any ᾱ (of flow matching: sigma) differs by more than 1e-6.

        They are of rounded numbers, because configs are written in decimal.
        """
        kind, table = (b"linear", self._tables["sigma"]) if self.is_linear else (b"", self.alphas_cumprod)
        rounded = (table * 1e6).round().to(torch.int64)
        return hashlib.sha256(kind + rounded.numpy().astype("<i8").tobytes()).hexdigest()[:16]

    def alpha(self, t: Tensor | int, like: Tensor) -> Tensor:
        """Signal share at time t: [B, 1, ...] to multiply `like` [B, ...] (a scalar if t is one), in its wide dtype."""
        return self._at("alpha", t, like)

    def sigma(self, t: Tensor | int, like: Tensor) -> Tensor:
        """Noise share at time t, shaped like `alpha`."""
        return self._at("sigma", t, like)

    def told(self, t: Tensor | int) -> Tensor:
        """What a network is told of t [B], on its device: an index, int64, or T sigma(t), float32. [B]

        Not to be rounded to half precision, which merges neighbouring times.
        """
        device = t.device if isinstance(t, Tensor) else torch.device("cpu")
        return self._copy("told", device, self._tables["told"].dtype)[t]

    def clean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The consistency function of a network that answers x0 at x_t [B, ...] and t [B]; x_t itself at t = 0.

        Variance-preserving noise has LCM's scalings, c_skip(t) x_t + c_out(t) x0; flow matching needs none, as in
        diffusers' FlowMatchLCMScheduler: it is x0 at all times above 0.
        """
        if self.is_linear:
            return torch.where((t == 0).to(x0.device).reshape(-1, *[1] * (x0.ndim - 1)), wide(x_t), x0)
        c_skip, c_out = boundary_scalings(t, x_t)
        return c_skip * x_t + c_out * x0

    @property
    def published(self) -> NoiseSchedule:
        """The schedule whose times papers print: this one, or Stable Diffusion's where this one is of flow matching.

        `same_snr` takes a time of it to one of this schedule.
        """
        return NoiseSchedule.scaled_linear() if self.is_linear else self

    def check_scaled_start(self, setting: str, instead: str) -> None:
        """Raises ValueError, which names `setting`, where it is without effect: sigma(T) = 1 by definition."""
        if self.is_linear:
            raise ValueError(
                f"{setting} multiplies the starting noise by sigma(T), which is 1 for a flow-matching teacher: set "
                f"{instead}"
            )

    def _noise_share(self) -> Tensor:
        """sigma / (alpha + sigma), [T + 1]: it orders noise levels by their ratio of signal to noise."""
        alpha, sigma = self._tables["alpha"], self._tables["sigma"]
        return sigma / (alpha + sigma)

    def _at(self, name: str, t: Tensor | int, like: Tensor) -> Tensor:
        values = self._copy(name, like.device, torch.promote_types(like.dtype, torch.float32))[t]
        return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values

    def _copy(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        # One copy per device and dtype: indexing a CPU table with a CUDA time would stall the stream at every step.
        key = (name, device, dtype)
        if key not in self._copies:
            self._copies[key] = self._tables[name].to(device, dtype)
        return self._copies[key]


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
    """The forward process: alpha(t) x0 + sigma(t) noise, [B, ...]."""
    x0, noise = wide(x0), wide(noise)
    return schedule.alpha(t, x0) * x0 + schedule.sigma(t, x0) * noise


def travel(schedule: NoiseSchedule, x: Tensor, s: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The forward process from x at time s [B] on to t >= s [B]: it has the law of x_t where x has that of x_s.

    r x + sqrt(sigma(t)² - r² sigma(s)²) noise with r = alpha(t)/alpha(s): on variance-preserving noise the second
    factor is sqrt(1 - r²) (PCM's noise_travel). From s = 0 it is `add_noise`, and where t = s it is x itself.
    """
    x, noise = wide(x), wide(noise)
    r = schedule.alpha(t, x) / schedule.alpha(s, x)
    had = r * schedule.sigma(s, x)
    has = schedule.sigma(t, x)
    further = ((has - had) * (has + had)).clamp(min=0).sqrt()
    stays = (t == s).to(x.device).reshape(-1, *[1] * (x.ndim - 1))  # also at T without signal, where r is 0/0
    return torch.where(stays, x, r * x + further * noise)


def same_snr(source: NoiseSchedule, t: int, target: NoiseSchedule) -> int:
    """The time of `target`, 1 ... T, whose ratio of signal to noise is nearest to that of `source` at t.

    Raises:
        ValueError: t that is not within 1 ... T of `source`.
    """
    if not 1 <= t <= source.T:
        raise ValueError(f"a time must be within 1 ... {source.T}, got {t}")
    if source is target:
        return t
    wanted = source._noise_share()[t]
    return 1 + int((target._noise_share()[1:] - wanted).abs().argmin())


def boundary_scalings(
    t: Tensor, like: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Tensor, Tensor]:
    """LCM's c_skip and c_out at t [B], shaped to multiply `like` (Luo et al. 2023, eq. 9; diffusers' LCMScheduler).

    They are functions of the network's index t - 1, and (1, 0) at clean data, where the jump is the identity.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    r = timestep_scaling * (t.to(like.device) - 1).clamp(min=0).to(dtype)
    c_skip, c_out = sigma_data**2 / (r**2 + sigma_data**2), r / (r**2 + sigma_data**2).sqrt()
    shape = (-1, *[1] * (like.ndim - 1))
    return c_skip.reshape(shape), c_out.reshape(shape)


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
