"""The noise that a diffusers scheduler stands for, decided by its class; pure data, without torch.

Schedulers of other classes reuse the same keys for other things, so a config says nothing until its class is known.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

_log = logging.getLogger(__name__)

MOST_LEVELS = 100_000
"""Noise levels that a schedule may have; published ones have 1000."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

RESCALES = {  # the classes whose noise is variance-preserving and discrete: whether they know rescale_betas_zero_snr
    "DDIMScheduler": True,
    "DDIMParallelScheduler": True,
    "DDPMScheduler": True,
    "DDPMParallelScheduler": True,
    "DEISMultistepScheduler": False,
    "DPMSolverMultistepScheduler": True,
    "DPMSolverSDEScheduler": False,
    "DPMSolverSinglestepScheduler": False,
    "EulerAncestralDiscreteScheduler": True,
    "EulerDiscreteScheduler": True,
    "HeunDiscreteScheduler": False,
    "KDPM2AncestralDiscreteScheduler": False,
    "KDPM2DiscreteScheduler": False,
    "LCMScheduler": True,
    "LMSDiscreteScheduler": False,
    "PNDMScheduler": False,
    "SASolverScheduler": False,
    "TCDScheduler": True,
    "UniPCMultistepScheduler": True,
}
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
"""The classes of flow matching."""
FLOW_BY_OPTION = ("DPMSolverMultistepScheduler",)
"""Classes of variance-preserving noise that `use_flow_sigmas` makes ones of flow matching, shifted by `flow_shift`."""
FLOW_PREDICTION = "flow_prediction"
TIME_SHIFTS = ("exponential", "linear")
_OTHER_FLOW = (  # options that visit other noise levels, run backwards or add noise
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "stochastic_sampling",
    "scale_factors",
)
_ALWAYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")  # every version of these classes writes
_SAME_NOISE: dict[str, tuple[Any, ...]] = {  # options at whose other values the network knows another noise
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "snr_shift_scale": (1,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}


@dataclass(frozen=True)
class Noise:
    """Variance-preserving noise: what a network was trained on and answers, by the names of the keys of diffusers'
    scheduler configs.

    Args:
        num_train_timesteps: noise levels.
        beta_schedule: one of `BETA_SCHEDULES`.
        trained_betas: the betas themselves, one a level, in the place of the three above.
        rescale_betas_zero_snr: whether the noisiest level holds no signal at all.
        prediction_type: one of `PREDICTIONS`.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"

    def settings(self) -> dict[str, Any]:
        """The keys as a scheduler's constructor takes them, without those that are false or None in every class."""
        keys = {key: value for key, value in asdict(self).items() if value not in (None, False)}
        return keys | ({} if self.trained_betas is None else {"trained_betas": list(self.trained_betas)})

    def at(self, tokens: int | None = None, shift: float | None = None) -> Noise:
        """The same noise: it does not depend on how many `tokens` a picture has.

        Raises:
            ValueError: a shift.
        """
        if shift is not None:
            raise ValueError(
                f"shift {shift} is for flow-matching teachers, and this one's noise is variance-preserving: leave it "
                "null"
            )
        return self


@dataclass(frozen=True)
class DynamicShift:
    """A shift that depends on how many tokens a picture has in the network, by the keys of diffusers' configs.

    Args:
        base_shift, max_shift: mu at `base_image_seq_len` and at `max_image_seq_len` tokens; elsewhere on their line.
        time_shift_type: one of `TIME_SHIFTS`: the shift is e^mu, or mu.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"

    def at(self, tokens: int) -> float:
        """The shift for a picture of so many tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = self.base_shift + slope * (tokens - self.base_image_seq_len)
        if self.time_shift_type == "linear":
            return mu
        return math.exp(mu) if mu < 700 else math.inf


@dataclass(frozen=True)
class FlowNoise:
    """Flow matching, x_t = (1 - sigma) x_0 + sigma eps: which sigma the noise levels have, and what a network answers.

    Args:
        num_train_timesteps: noise levels.
        shift: s of sigma = s u / (1 + (s - 1) u); None where it is not known before the picture's size.
        dynamic: how the shift depends on that; None where it does not.
        prediction_type: diffusers' word for the velocity eps - x_0.
    """

    num_train_timesteps: int = 1000
    shift: float | None = 1.0
    dynamic: DynamicShift | None = None
    prediction_type: str = FLOW_PREDICTION

    def at(self, tokens: int | None = None, shift: float | None = None) -> FlowNoise:
        """The same noise, its shift settled for a picture of so many `tokens`; or by `shift`, for all of them.

        Raises:
            ValueError: a shift that is not above 0.
        """
        if shift is not None:
            if not 0 < shift < math.inf:
                raise ValueError(f"shift must be above 0, got {shift}")
            return replace(self, shift=float(shift), dynamic=None)
        if self.dynamic is None or tokens is None:
            return self
        found = self.dynamic.at(tokens)
        if not 0 < found < math.inf:
            raise ValueError(f"shift must be above 0, and the scheduler's config makes it {found} at {tokens} tokens")
        return replace(self, shift=found)

    @property
    def settled_shift(self) -> float:
        """The shift.

        Raises:
            ValueError: it depends on the picture's size, which nobody has said.
        """
        if self.shift is None:
            raise ValueError("the shift of its scheduler depends on the picture's size (use_dynamic_shifting): give it")
        return self.shift

    def settings(self) -> dict[str, Any]:
        """The keys as a flow-matching scheduler's constructor takes them: the shift is fixed, whatever a pipeline says.

        Raises:
            ValueError: see `settled_shift`.
        """
        fixed = {"use_dynamic_shifting": False, "shift_terminal": None}
        return {"num_train_timesteps": self.num_train_timesteps, "shift": self.settled_shift} | fixed


AnyNoise = Noise | FlowNoise


def read_noise(scheduler: object, config: Mapping[str, Any]) -> AnyNoise:
    """The noise of a scheduler of this class name with this config.

    A key that the class always writes has no default here. Options of sampling (Karras' sigmas, thresholding, spacing,
    solver orders) say nothing about variance-preserving noise and are left aside; of flow matching, those that would
    have a pipeline visit other noise levels are refused.

    Raises:
        ValueError: a class or an option that is not understood; it names them and what is understood.
    """
    if not isinstance(scheduler, str) or scheduler not in (*RESCALES, *FLOW_MATCHING):
        known = ", ".join(name.removesuffix("Scheduler") for name in (*RESCALES, *FLOW_MATCHING))
        raise ValueError(f"the noise of its scheduler, {short(scheduler)}, is not understood; understood are: {known}")
    if scheduler in FLOW_MATCHING:
        return _read_flow(scheduler, config, "shift")
    if scheduler in FLOW_BY_OPTION and _flag(scheduler, "use_flow_sigmas", config):
        _one_of(scheduler, "prediction_type", config.get("prediction_type"), (FLOW_PREDICTION,))
        if _flag(scheduler, "use_dynamic_shifting", config):
            raise ValueError(f"its scheduler, {scheduler}, has use_dynamic_shifting True; understood: False")
        return _read_flow(scheduler, config, "flow_shift")
    return _read_variance_preserving(scheduler, config)


def _read_flow(scheduler: str, config: Mapping[str, Any], shift: str) -> FlowNoise:
    """Flow matching, whose shift has the key `shift`. Early versions write no options beside it."""
    _require(scheduler, config, ("num_train_timesteps", shift))
    for key in _OTHER_FLOW:
        if config.get(key) not in (None, False):
            raise ValueError(
                f"its scheduler, {scheduler}, has {key} {short(config[key])}; understood: none (set it to null)"
            )
    levels = _levels(scheduler, config)
    if (terminal := config.get("shift_terminal")) is not None:
        _tell_once(
            f"shift_terminal {short(terminal)} of {scheduler} is left aside: it bends the times that its pipeline "
            "visits, and not the noise"
        )
    if not _flag(scheduler, "use_dynamic_shifting", config):
        return FlowNoise(levels, _positive(scheduler, shift, config))
    return FlowNoise(levels, None, _dynamic(scheduler, config))


def _dynamic(scheduler: str, config: Mapping[str, Any]) -> DynamicShift:
    _require(scheduler, config, ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"))
    least, most = (_positive(scheduler, f"{end}_image_seq_len", config) for end in ("base", "max"))
    if least >= most:
        raise ValueError(f"its scheduler, {scheduler}, has base_image_seq_len {least:g}; it must be below {most:g}")
    return DynamicShift(
        base_shift=_number(scheduler, "base_shift", config),
        max_shift=_number(scheduler, "max_shift", config),
        base_image_seq_len=round(least),
        max_image_seq_len=round(most),
        time_shift_type=_one_of(
            scheduler, "time_shift_type", config.get("time_shift_type", "exponential"), TIME_SHIFTS
        ),
    )


@cache
def _tell_once(line: str) -> None:
    _log.warning("%s (said once)", line)


def _require(scheduler: str, config: Mapping[str, Any], always: tuple[str, ...]) -> None:
    if missing := [key for key in always if key not in config]:
        raise ValueError(f"its scheduler, {scheduler}, lacks {', '.join(missing)}, which every such config holds")


def _read_variance_preserving(scheduler: str, config: Mapping[str, Any]) -> Noise:
    _require(scheduler, config, _ALWAYS)
    for key, allowed in _SAME_NOISE.items():
        if config.get(key) is not None and config[key] not in allowed:
            said = " or ".join(short(value) for value in allowed)
            raise ValueError(f"its scheduler, {scheduler}, has {key} {short(config[key])}; understood: {said}")
    noise = Noise(
        num_train_timesteps=_levels(scheduler, config),
        beta_start=_beta(scheduler, "beta_start", config["beta_start"]),
        beta_end=_beta(scheduler, "beta_end", config["beta_end"]),
        beta_schedule=_one_of(scheduler, "beta_schedule", config["beta_schedule"], BETA_SCHEDULES),
        trained_betas=_trained(scheduler, config),
        rescale_betas_zero_snr=_flag(scheduler, "rescale_betas_zero_snr", config),
        prediction_type=_one_of(scheduler, "prediction_type", config.get("prediction_type", "epsilon"), PREDICTIONS),
    )
    if noise.rescale_betas_zero_snr and not RESCALES[scheduler]:
        raise ValueError(
            f"its scheduler, {scheduler}, has rescale_betas_zero_snr, which this class ignores: name a scheduler that "
            "knows it (DDIMScheduler), or remove the key"
        )
    return noise


def _levels(scheduler: str, config: Mapping[str, Any]) -> int:
    levels = config["num_train_timesteps"]
    if not isinstance(levels, int) or isinstance(levels, bool) or not 1 <= levels <= MOST_LEVELS:
        raise ValueError(
            f"its scheduler, {scheduler}, has num_train_timesteps {short(levels)}; allowed: 1 to {MOST_LEVELS}"
        )
    return levels


def _trained(scheduler: str, config: Mapping[str, Any]) -> tuple[float, ...] | None:
    betas = config.get("trained_betas")
    if betas is None:
        return None
    levels = config["num_train_timesteps"]
    if not isinstance(betas, (list, tuple)) or len(betas) != levels:
        many = f"{len(betas)} numbers" if isinstance(betas, (list, tuple)) else short(betas)
        raise ValueError(
            f"its scheduler, {scheduler}, has trained_betas of {many}; it must be one for each of {levels}"
        )
    return tuple(_beta(scheduler, "trained_betas", beta) for beta in betas)


def _beta(scheduler: str, key: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < 1:
        raise ValueError(f"its scheduler, {scheduler}, has {key} {short(value)}; it must be a number between 0 and 1")
    return float(value)


def _number(scheduler: str, key: str, config: Mapping[str, Any]) -> float:
    value = config[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e9 < value < 1e9:
        raise ValueError(f"its scheduler, {scheduler}, has {key} {short(value)}; it must be a number")
    return float(value)


def _positive(scheduler: str, key: str, config: Mapping[str, Any]) -> float:
    if (value := _number(scheduler, key, config)) <= 0:
        raise ValueError(f"its scheduler, {scheduler}, has {key} {value:g}; it must be above 0")
    return value


def _one_of(scheduler: str, key: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"its scheduler, {scheduler}, has {key} {short(value)}; allowed: {', '.join(allowed)}")
    return str(value)


def _flag(scheduler: str, key: str, config: Mapping[str, Any]) -> bool:
    value = config.get(key)
    if value not in (None, False, True):
        raise ValueError(f"its scheduler, {scheduler}, has {key} {short(value)}; it must be true or false")
    return bool(value)


def short(value: object) -> str:
    """A value out of a file, in so few characters that it fits into a line."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
