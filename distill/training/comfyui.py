"""Workflows for ComfyUI beside an export: nodes, sampler, scheduler, steps and CFG that it was trained for.

They are in ComfyUI's API format, which its window opens as well. Nodes and their slots are those of ComfyUI 0.3.64
(nodes.py; comfy_extras/nodes_model_advanced.py; comfy/samplers.py for the times), read 2026-11-28. Which of them a kind
of models wants, its family says (`Family.comfyui`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.diffusion.noise import FlowNoise, Noise
from distill.diffusion.prediction import Prediction
from distill.models.families.comfy import ComfyModel, ComfyUI
from distill.models.families.registry import FAMILIES
from distill.models.formats import NETWORK
from distill.training.clients import CHECKPOINT, COMFYUI, LORA, Client, clients_of
from distill.training.export import Export

FOLDER = "comfyui"
_PROMPT = "a lighthouse in the snow"
_USUAL_STEPS = 4
_LCM_LEVELS = 50  # of ModelSamplingDiscrete's `lcm`: every 20th of the 1000
Node = dict[str, Any]
Slot = tuple[str, int]
"""A node by its id, and which of its outputs."""


_PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "segmind/SSD-1B",
    "stabilityai/stable-diffusion-3-medium-diffusers",
    "stabilityai/stable-diffusion-3.5-medium",
    "stabilityai/stable-diffusion-3.5-large",
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.2-klein-base-4B",
    "black-forest-labs/FLUX.2-klein-base-9B",
    "Tongyi-MAI/Z-Image",
}
"""Hub ids whose files are called as `ComfyModel.file` says."""

_LORAS = (LORA, "comfyui")
_FILES = {
    LORA: ("lora", "kohya/{name}.safetensors", "loras"),
    "comfyui": ("lora", "comfyui/{name}.safetensors", "loras"),
    NETWORK: ("{network}", "{network}/diffusion_pytorch_model.safetensors", "diffusion_models"),
    CHECKPOINT: ("checkpoint", "checkpoint/{name}.safetensors", "checkpoints"),
}
"""For each format: the workflow's name, the export's file, and in which folder of models ComfyUI looks for it."""


@dataclass(frozen=True)
class Workflow:
    """A workflow of an export.

    Args:
        path: below the export's folder.
        source: the export's file that it uses; target: where that is copied to, below ComfyUI's folder.
        nodes: by their ids, in the API format.
    """

    path: str
    source: str
    target: str
    nodes: dict[str, Node]


def write_workflows(folder: Path, export: Export) -> list[Path]:
    """Writes the workflows of an export, if any, below its folder, and returns their paths."""
    written = []
    for workflow in workflows_of(export):
        path = folder / workflow.path
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(workflow.nodes, indent=1) + "\n", encoding="utf-8")
        written.append(path)
    return written


def workflows_of(export: Export) -> list[Workflow]:
    """One for each format that ComfyUI loads; none where it would generate other pictures (`why_none`)."""
    if why_none(export):
        return []
    found = []
    for format in filter(export.holds, _comfyui(export).formats):
        name, source, models = (part.format(name=export.name, network=export.network) for part in _FILES[format])
        if format == CHECKPOINT and not _whole(export):
            models = _FILES[NETWORK][2]
        file = f"{export.name}.safetensors"
        workflow = f"{FOLDER}/{name}.json"
        found.append(Workflow(workflow, source, f"models/{models}/{file}", _nodes(export, format, file)))
    return found


def why_none(export: Export) -> str:
    """Why ComfyUI cannot generate with this export as it was trained, in words for its card; empty if it can."""
    family = FAMILIES.find(export.family)
    if family.comfyui is None:
        return f"how it opens models of {family.title} is not known here"
    if export.architecture not in family.comfyui.models:
        return f"its network is not that of {', '.join(known.title for known in family.comfyui.models.values())}"
    if not any(map(export.holds, family.comfyui.formats)):
        return f"it reads {family.title} from formats=[{','.join(family.comfyui.formats)}] alone"
    if export.takes_guidance and family.comfyui.guidance is None:
        return "it leaves out the network's input of guidance"
    is_flow = isinstance(export.noise, FlowNoise)
    if not is_flow and export.noise != Noise(prediction_type=export.noise.prediction_type):
        return "the teacher's noise levels are not those that it gives such a network"
    client = _client(export)
    if not client.sampler:
        return client.further
    steps = _steps(export)
    visited = _visited(export, client, steps)
    if visited != export.sampling.times(export.noise.num_train_timesteps, steps)[:-1]:
        return f"in {steps} steps it visits other times than the student was trained at"
    return ""


def _comfyui(export: Export) -> ComfyUI:
    found = FAMILIES.find(export.family).comfyui
    assert found is not None
    return found


def _whole(export: Export) -> bool:
    """Whether a checkpoint has the autoencoder and the text encoders too."""
    layout = FAMILIES.find(export.family).network.one_file
    return layout is not None and bool(layout.parts)


def _client(export: Export) -> Client:
    clients = clients_of(export.sampling, Prediction(export.prediction))
    return next(client for client in clients if client.program == COMFYUI)


def _steps(export: Export) -> int:
    return export.sampling.steps or _USUAL_STEPS


def _visited(export: Export, client: Client, steps: int) -> list[float]:
    """The times of scheduler `simple`: from the noisiest of the model's levels on, every (levels / steps)-th."""
    if isinstance(export.noise, FlowNoise):
        levels = _comfyui(export).levels
        return [1000 * (levels - int(i * levels / steps)) / levels for i in range(steps)]
    stride = 1000 // _LCM_LEVELS if _sampling(client, export, NETWORK) == "lcm" else 1
    times = range(stride, 1001, stride)
    return [times[-(1 + int(i * len(times) / steps))] for i in range(steps)]


def _sampling(client: Client, export: Export, format: str) -> str | None:
    """What ModelSamplingDiscrete is set to; None where ComfyUI reads the network rightly without that node."""
    prediction = Prediction(export.prediction)
    if prediction is Prediction.SAMPLE:
        return "x0"
    if prediction is Prediction.V:
        return None if _comfyui(export).says_velocity and format != NETWORK else "v_prediction"
    return "lcm" if client.sampler == "lcm" and prediction is Prediction.EPSILON else None


def _nodes(export: Export, format: str, file: str) -> dict[str, Node]:
    """The graph: what loads the export, what says how its network is read, prompts, sampler and picture."""
    comfyui, client, graph = _comfyui(export), _client(export), _Graph()
    side = export.settings.model.resolution or comfyui.models[export.architecture or ""].side
    model, clip, vae = _loaded(graph, export, format, file)
    model = _read_as(graph, export, format, model, side)
    positive: Slot = (graph.add("CLIPTextEncode", "prompt", text=_PROMPT, clip=clip), 0)
    negative = graph.add("CLIPTextEncode", "negative prompt (no effect at CFG 1)", text="", clip=clip)
    cfg = export.guidance_scale
    if export.takes_guidance and comfyui.guidance is not None:
        title = "the network's own input of guidance"
        positive = (graph.add(comfyui.guidance, title, conditioning=positive, guidance=cfg), 0)
        cfg = 1.0
    latent = graph.add(comfyui.latent, "size", width=side, height=side, batch_size=1)
    sampled = graph.add(
        "KSampler",
        "steps, CFG, sampler and scheduler of the student",
        model=model,
        seed=0,
        steps=_steps(export),
        cfg=cfg,
        sampler_name=client.sampler,
        scheduler=client.scheduler,
        positive=positive,
        negative=(negative, 0),
        latent_image=(latent, 0),
        denoise=1.0,
    )
    decoded = graph.add("VAEDecode", "picture", samples=(sampled, 0), vae=vae)
    graph.add("SaveImage", "file", images=(decoded, 0), filename_prefix=re.sub(r"[^\w.-]", "_", export.name))
    return graph.nodes


def _loaded(graph: _Graph, export: Export, format: str, file: str) -> tuple[Slot, Slot, Slot]:
    """The student's network, and the text encoders and the autoencoder that belong to it."""
    comfyui = _comfyui(export)
    base_title = f"the model it was distilled from: {export.base_model}"
    base_file = _base_file(export, comfyui.models[export.architecture or ""])
    own = format == CHECKPOINT and _whole(export)
    alone = format == NETWORK or (format == CHECKPOINT and not own)
    checkpoint = ""
    if own or comfyui.loader == "CheckpointLoaderSimple":
        title, name = ("the student", file) if own else (base_title, base_file)
        checkpoint = graph.add("CheckpointLoaderSimple", title, ckpt_name=name)
    clip, vae = (checkpoint, 1), (checkpoint, 2)
    if comfyui.text is not None and not own:
        kind, inputs = comfyui.text
        clip = (graph.add(kind, "the model's text encoders", **inputs), 0)
    if comfyui.vae is not None and not own:
        vae = (graph.add("VAELoader", "the model's autoencoder", vae_name=comfyui.vae), 0)
    if alone:
        return (graph.add("UNETLoader", "the student", unet_name=file, weight_dtype="default"), 0), clip, vae
    model: Slot = (checkpoint, 0)
    if not checkpoint:
        model = (graph.add("UNETLoader", base_title, unet_name=base_file, weight_dtype="default"), 0)
    if format in _LORAS:
        lora = graph.add("LoraLoaderModelOnly", "the student", model=model, lora_name=file, strength_model=1.0)
        model = (lora, 0)
    return model, clip, vae


def _read_as(graph: _Graph, export: Export, format: str, model: Slot, side: int) -> Slot:
    """The network with its noise levels and what it predicts, where ComfyUI does not know them by itself."""
    comfyui = _comfyui(export)
    if isinstance(export.noise, FlowNoise):
        if comfyui.shift is None:
            return model
        kind, inputs = comfyui.shift(export.noise.settled_shift, side)
        return graph.add(kind, "the noise levels that the student learned", model=model, **inputs), 0
    if (sampling := _sampling(_client(export), export, format)) is None:
        return model
    return graph.add("ModelSamplingDiscrete", "how its network is read", model=model, sampling=sampling, zsnr=False), 0


class _Graph:
    """Nodes as they are added, numbered from 1."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def add(self, kind: str, title: str, **inputs: Any) -> str:
        """Adds a node and returns its id; inputs that are slots become links."""
        links = {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
        node_id = str(len(self.nodes) + 1)
        self.nodes[node_id] = {"class_type": kind, "inputs": links, "_meta": {"title": title}}
        return node_id


def _base_file(export: Export, base: ComfyModel) -> str:
    """The base model as its file is likely called; ComfyUI lets people choose another."""
    if export.base_model in _PUBLISHED:
        return base.file
    return re.sub(r"[^\w.-]", "_", export.base_model.rpartition("/")[2]) + ".safetensors"
