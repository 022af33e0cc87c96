"""Workflows for ComfyUI beside an export: nodes, sampler, scheduler, steps and CFG that it was trained for.

They are in ComfyUI's API format, which its window opens as well. Nodes and their slots are those of ComfyUI 0.3.64
(nodes.py; comfy_extras/nodes_model_advanced.py; comfy/samplers.py for the times), read 2026-11-28.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.diffusion.noise import Noise
from distill.diffusion.prediction import Prediction
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


@dataclass(frozen=True)
class Base:
    """A network that ComfyUI recognises by its sizes.

    Args:
        name: for people.
        file: of the published model, as ComfyUI's own examples call it.
        side: of the pictures, in pixels.
        marks_velocity: whether its checkpoints say themselves that they predict the velocity.
    """

    name: str
    file: str
    side: int
    marks_velocity: bool


BASES = {
    "sd15": Base("SD 1.5", "v1-5-pruned-emaonly.safetensors", 512, False),
    "sdxl": Base("SDXL", "sd_xl_base_1.0.safetensors", 1024, True),
    "ssd1b": Base("SSD-1B", "SSD-1B.safetensors", 1024, True),
}
"""What is known of published models, by the names that `distill.models.full_size` has for them."""
_PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "segmind/SSD-1B",
}
"""Hub ids whose files are called as `Base.file` says."""

_FILES = {
    LORA: ("lora", "kohya/{name}.safetensors", "loras"),
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
    for format in filter(export.holds, _FILES):
        name, source, models = (part.format(name=export.name, network=export.network) for part in _FILES[format])
        file = f"{export.name}.safetensors"
        workflow = f"{FOLDER}/{name}.json"
        found.append(Workflow(workflow, source, f"models/{models}/{file}", _nodes(export, format, file)))
    return found


def why_none(export: Export) -> str:
    """Why ComfyUI cannot generate with this export as it was trained, in words for its card; empty if it can."""
    base, client = BASES.get(export.architecture or ""), _client(export)
    if base is None:
        return f"its network is not that of {', '.join(known.name for known in BASES.values())}"
    if export.takes_guidance:
        return "it leaves out the network's input of guidance"
    if export.noise != Noise(prediction_type=export.noise.prediction_type):
        return "the teacher's noise levels are not those that it gives such a network"
    if not client.sampler:
        return client.further
    steps, node = _steps(export), _sampling(client, export, NETWORK)
    if _visited(steps, node) != [t - 1 for t in export.sampling.times(export.noise.num_train_timesteps, steps)[:-1]]:
        return f"in {steps} steps it visits other times than the student was trained at"
    return ""


def _client(export: Export) -> Client:
    clients = clients_of(export.sampling, Prediction(export.prediction))
    return next(client for client in clients if client.program == COMFYUI)


def _steps(export: Export) -> int:
    return export.sampling.steps or _USUAL_STEPS


def _visited(steps: int, sampling: str | None) -> list[int]:
    """Scheduler `simple`: from the noisiest of the model's levels on, every (levels / steps)-th, as network indices."""
    stride = 1000 // _LCM_LEVELS if sampling == "lcm" else 1
    levels = range(stride - 1, 1000, stride)
    return [levels[-(1 + int(i * len(levels) / steps))] for i in range(steps)]


def _sampling(client: Client, export: Export, format: str) -> str | None:
    """What ModelSamplingDiscrete is set to; None where ComfyUI reads the network rightly without that node."""
    prediction = Prediction(export.prediction)
    if prediction is Prediction.SAMPLE:
        return "x0"
    if prediction is Prediction.V:
        seen = BASES[export.architecture or ""].marks_velocity and format != NETWORK
        return None if seen else "v_prediction"
    return "lcm" if client.sampler == "lcm" else None


def _nodes(export: Export, format: str, file: str) -> dict[str, Node]:
    """The graph: what loads the export, what says how its network is read, prompts, sampler and picture."""
    base, client = BASES[export.architecture or ""], _client(export)
    graph = _Graph()
    own = format == CHECKPOINT
    title = "the student" if own else f"the model it was distilled from: {export.base_model}"
    loaded = graph.add("CheckpointLoaderSimple", title, ckpt_name=file if own else _base_file(export, base))
    model, clip, vae = (loaded, 0), (loaded, 1), (loaded, 2)
    if format == LORA:
        lora = graph.add("LoraLoaderModelOnly", "the student", model=model, lora_name=file, strength_model=1.0)
        model = (lora, 0)
    if format == NETWORK:
        model = (graph.add("UNETLoader", "the student", unet_name=file, weight_dtype="default"), 0)
    if (sampling := _sampling(client, export, format)) is not None:
        title = "how its network is read"
        model = (graph.add("ModelSamplingDiscrete", title, model=model, sampling=sampling, zsnr=False), 0)
    positive = graph.add("CLIPTextEncode", "prompt", text=_PROMPT, clip=clip)
    negative = graph.add("CLIPTextEncode", "negative prompt (no effect at CFG 1)", text="", clip=clip)
    side = export.settings.model.resolution or base.side
    latent = graph.add("EmptyLatentImage", "size", width=side, height=side, batch_size=1)
    sampled = graph.add(
        "KSampler",
        "steps, CFG, sampler and scheduler of the student",
        model=model,
        seed=0,
        steps=_steps(export),
        cfg=export.guidance_scale,
        sampler_name=client.sampler,
        scheduler=client.scheduler,
        positive=(positive, 0),
        negative=(negative, 0),
        latent_image=(latent, 0),
        denoise=1.0,
    )
    decoded = graph.add("VAEDecode", "picture", samples=(sampled, 0), vae=vae)
    graph.add("SaveImage", "file", images=(decoded, 0), filename_prefix=re.sub(r"[^\w.-]", "_", export.name))
    return graph.nodes


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


def _base_file(export: Export, base: Base) -> str:
    """The base model as its file is likely called; ComfyUI lets people choose another."""
    if export.base_model in _PUBLISHED:
        return base.file
    return re.sub(r"[^\w.-]", "_", export.base_model.rpartition("/")[2]) + ".safetensors"
