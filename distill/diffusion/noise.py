"""The noise that a diffusers scheduler stands for, decided by its class; pure data, without torch.

Schedulers of other classes reuse the same keys for other things, so a config says nothing until its class is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

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
    """What a network was trained on and answers, by the names of the keys of diffusers' scheduler configs.

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


def read_noise(scheduler: object, config: Mapping[str, Any]) -> Noise:
    """The noise of a scheduler of this class name with this config.

    A key that the class always writes has no default here. Options of sampling (Karras' sigmas, thresholding, spacing,
    solver orders) say nothing about the noise and are left aside.

    Raises:
        ValueError: a class or an option that is not understood; it names them and what is understood.
    """
    if not isinstance(scheduler, str) or scheduler not in RESCALES:
        known = ", ".join(name.removesuffix("Scheduler") for name in RESCALES)
        raise ValueError(f"the noise of its scheduler, {short(scheduler)}, is not understood; understood are: {known}")
    if missing := [key for key in _ALWAYS if key not in config]:
        raise ValueError(f"its scheduler, {scheduler}, lacks {', '.join(missing)}, which every such config holds")
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
