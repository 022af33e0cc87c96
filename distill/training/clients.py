"""What other programs have to be set to, so that they sample an exported student at the times it was trained for.

Facts of their code, read and in part run on 2026-11-28: ComfyUI 0.3.64 (its samplers against diffusers' schedulers, on
random weights), A1111 of February 2024 and Forge dfdcbab (read), InvokeAI 8e71a8a (read).
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.diffusion.prediction import Prediction
from distill.methods.sampling import Sampling
from distill.models.formats import NETWORK

COMFYUI, WEBUI, INVOKEAI = "ComfyUI", "A1111, Forge", "InvokeAI"
LORA, CHECKPOINT, FOLDER, _FOLDED = "kohya", "checkpoint", "pipeline", "comfyui"
"""Formats of exports: the files that these programs load."""


@dataclass(frozen=True)
class Client:
    """How a program samples a student, in the program's own words.

    Args:
        program: its name.
        formats: those that it loads.
        sampler, scheduler: as its menus call them; an empty sampler: it cannot sample the student.
        further: what else is to be set, or why it cannot.
        exact: whether its times, its noise and its steps are the student's own.
    """

    program: str
    formats: tuple[str, ...]
    sampler: str
    scheduler: str
    further: str
    exact: bool


_FILES = {COMFYUI: (LORA, NETWORK, CHECKPOINT), WEBUI: (LORA, CHECKPOINT), INVOKEAI: (LORA, CHECKPOINT, FOLDER)}
_BY_THE_FOLDER = "from the `pipeline` folder, which says `trailing`; on another model its times are others"
_NEVER_DDIM = "never DDIM, whose times are others whatever the schedule type says"
_NO_TIMES = "it cannot be given the student's times"
_X0_NODE = "node ModelSamplingDiscrete, sampling `x0`: without it the picture is 30 times off, with no error"
_V_NODE = "node ModelSamplingDiscrete, sampling `v_prediction`, but not for a LoRA or a checkpoint of SDXL or SD 2"
_NO_X0 = "it has no setting for a network that predicts clean data"

# By sampler and spacing: for each program its sampler, its scheduler, what else, and whether that is exact.
_SETTINGS: dict[tuple[str, str], dict[str, tuple[str, str, str, bool]]] = {
    ("lcm", "lcm"): {
        COMFYUI: ("lcm", "simple", "node ModelSamplingDiscrete, sampling `lcm`", True),
        WEBUI: ("LCM", "", "its times are its own, all among those that the student was trained for", False),
        INVOKEAI: ("LCM", "", "", True),
    },
    ("ddim", "trailing"): {
        COMFYUI: ("euler", "simple", "", True),
        WEBUI: (
            "Euler",
            "SGM Uniform",
            f"option `SGM noise multiplier` on; {_NEVER_DDIM}",
            False,
        ),
        INVOKEAI: ("DDIM", "", _BY_THE_FOLDER, False),
    },
    ("euler", "trailing"): {
        COMFYUI: ("euler", "simple", "its noise is 0.2 % off", False),
        WEBUI: ("Euler", "SGM Uniform", _NEVER_DDIM, False),
        INVOKEAI: ("Euler", "", _BY_THE_FOLDER, False),
    },
}
_FLOW: dict[tuple[str, str], tuple[str, str]] = {
    ("ddim", "trailing"): ("euler", "simple"),
    ("lcm", "trailing"): ("lcm", "simple"),
}
"""Flow matching in ComfyUI: whether a network is read rightly is not for a sampler to say there."""
_NOT_TRIED = "not tried with a student of flow matching"
LCM_WITHOUT_NODE = "no node: its LCM node reads every network as predicting noise; 1.5 % off at 4 steps, 3.6 % at 8"


def clients_of(sampling: Sampling, prediction: Prediction) -> list[Client]:
    """How each program samples such a student."""
    if prediction is Prediction.FLOW:
        return _of_flow(sampling)
    known = _SETTINGS.get((sampling.sampler, sampling.spacing))
    if known is None:
        return [Client(program, formats, "", "", _NO_TIMES, False) for program, formats in _FILES.items()]
    return [_predicting(Client(program, _FILES[program], *known[program]), prediction) for program in _FILES]


def _of_flow(sampling: Sampling) -> list[Client]:
    found = [Client(program, formats, "", "", _NOT_TRIED, False) for program, formats in _FILES.items()]
    sampler, scheduler = _FLOW.get((sampling.sampler, sampling.spacing), ("", ""))
    further = "node of the family's noise levels, at the student's shift" if sampler else _NO_TIMES
    own = Client(COMFYUI, (_FOLDED, NETWORK, CHECKPOINT), sampler, scheduler, further, False)
    return [own, *(client for client in found if client.program != COMFYUI)]


def _predicting(client: Client, prediction: Prediction) -> Client:
    """The same for a network that does not predict noise."""
    node = client.program == COMFYUI and client.sampler == "lcm"
    if prediction is Prediction.EPSILON:
        return client
    if prediction not in (Prediction.V, Prediction.SAMPLE):
        raise ValueError(f"nothing is known of how {client.program} reads a network that predicts {prediction.value}")
    if prediction is Prediction.SAMPLE and (client.program == WEBUI or node):
        return Client(client.program, client.formats, "", "", _NO_X0, False)
    if client.program == COMFYUI and node:
        return Client(client.program, client.formats, client.sampler, client.scheduler, LCM_WITHOUT_NODE, False)
    if client.program == COMFYUI:
        further = ", ".join(filter(None, [_X0_NODE if prediction is Prediction.SAMPLE else _V_NODE, client.further]))
        return Client(client.program, client.formats, client.sampler, client.scheduler, further, client.exact)
    if client.program == INVOKEAI and prediction is Prediction.SAMPLE:
        further = "from the `pipeline` folder, whose scheduler says what the network predicts"
        return Client(client.program, (FOLDER,), client.sampler, client.scheduler, further, False)
    return client
