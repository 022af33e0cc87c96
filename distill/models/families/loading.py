"""Opening teachers and students: a pipeline folder is recognised by its configs, checked, and its parts are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from distill.diffusion.noise import AnyNoise, Noise, read_noise, short
from distill.diffusion.prediction import Prediction
from distill.models.checks import check_folder, check_sizes, component, first_line, load_checked, naming
from distill.models.families.base import Config, Family
from distill.models.families.registry import FAMILIES, family_of_pipeline
from distill.models.families.teacher import PARTS, Teacher, modules_of, part_named
from distill.models.folder import find_pipeline, read_json, variant_of, weight_files


@dataclass(frozen=True)
class PipelineFacts:
    """What the configs of a pipeline folder say, checked.

    Args:
        path: as it was given, for messages.
        folder: on disk.
        index, network, vae, scheduler: its `model_index.json` and the configs of these components.
        scheduler_class: as the index names it.
    """

    path: str
    folder: Path
    family: Family
    noise: AnyNoise
    index: Config
    network: Config
    vae: Config
    scheduler: Config
    scheduler_class: str

    @property
    def zeros_for_empty(self) -> bool:
        """Whether "no prompt" is zeros: what the index says, else what the family's pipeline does by itself."""
        usual = self.family.arguments(True).get("force_zeros_for_empty_prompt", False)
        return bool(self.index.get("force_zeros_for_empty_prompt", usual))

    @property
    def guidance_form(self) -> str:
        """What guides the network; see `Guidance.form`. It may be known by the pipeline's name alone."""
        return self.family.guidance.form(self.network, {"_name_or_path": self.path, **self.index})

    def own_scheduler(self) -> Any:
        """The pipeline's scheduler as it comes, of a class of diffusers whose noise is understood."""
        with naming(self.folder / "scheduler"):
            return getattr(diffusers, self.scheduler_class).from_config(dict(self.scheduler))


def check_pipeline(path: str, folder: Path) -> PipelineFacts:
    """Reads and checks a pipeline folder's configs: nothing in it is run, and no weights are opened.

    Every pipeline that is opened here is opened by it, and made of parts of the classes that it allows.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, code, another family, a network that is not
            text to image, noise that is not understood, or sizes that no machine has. One line, which names the file.
    """
    index = check_folder(folder)
    family = family_of_pipeline(path, index["_class_name"])
    name = family.network.folder
    network, vae, scheduler = (
        read_json(folder, file)
        for file in (f"{name}/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    )
    for part, config in ((name, network), ("vae", vae)):
        check_sizes(folder / part / "config.json", config)
    _check_components(path, folder, index, family)
    family.latents.check(folder / "vae/config.json", vae)
    family.network.check(path, folder / name / "config.json", network, vae)
    kind = component(folder, index, "scheduler")[1]
    try:
        noise = read_noise(kind, scheduler)
        read_noise(scheduler.get("_class_name", kind), scheduler)
    except ValueError as error:
        raise ValueError(f"{path} cannot be a teacher: {error}") from None
    if isinstance(noise, Noise) and noise.rescale_betas_zero_snr and noise.prediction_type == Prediction.EPSILON.value:
        raise ValueError(
            f"{path} cannot be a teacher: its scheduler has rescale_betas_zero_snr with prediction_type epsilon, which "
            "says nothing about a picture at the noisiest time"
        )
    return PipelineFacts(path, folder, family, noise, index, network, vae, scheduler, str(kind))


def _check_components(path: str, folder: Path, index: Config, family: Family) -> None:
    """Raises ValueError where model_index.json gives a part another class than the family's, or a part is missing."""
    for name, wanted in _classes(family, folder, index).items():
        found = component(folder, index, name)[1]
        if found is None or found.removesuffix("Fast") != wanted.removesuffix("Fast"):
            raise ValueError(f"{path} cannot be a teacher: its {name} is {found}, it must be a {wanted}")


def _classes(family: Family, folder: Path, index: Config) -> dict[str, str]:
    """The class that model_index.json must give for each component; an SDXL refiner lacks some."""
    classes = {family.network.folder: family.network.kind, "vae": family.latents.kind}
    for tower in family.text.towers:
        if not tower.optional or component(folder, index, tower.encoder)[1] is not None:
            classes |= {tower.tokenizer: tower.tokenizer_kind, tower.encoder: tower.encoder_kind}
    return classes


def load_teacher(
    pretrained_model_name_or_path: str | Path,
    *,
    parts: Sequence[str] = ("network",),
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | Path | None = None,
    vae_dtype: torch.dtype | None = None,
    family: str | None = None,
    text_dtype: torch.dtype = torch.float32,
    max_tokens: int | None = None,
    allow_distilled: bool = False,
) -> Teacher:
    """Loads a teacher from a diffusers pipeline folder or from the hub: the named parts, frozen, and its configs.

    Only safetensors weights are read, never pickles. `revision` and `variant` (`"fp16"`) mean what they mean in
    diffusers. `dtype` is the network's. The teacher's own autoencoder is float32, and so are text encoders unless
    `text_dtype` says otherwise: they are called once a picture, and what they round is in all that follows.

    `max_tokens` is the length of a prompt where text encoders leave it open; None is the pipeline's own.

    `family` is the only one wanted, by its name; None takes any. A network that was distilled already is refused
    unless `allow_distilled`.

    `vae` is the folder or hub id of an autoencoder to take the place of the teacher's, of the same latents; in
    `vae_dtype`, but in float32 where its config says that it overflows in float16 (`force_upcast`).

    Raises:
        FileNotFoundError: if there is no such pipeline or autoencoder, or a file of it is missing.
        ValueError: see `check_pipeline`; or weights that are damaged or of another network, a network that
            was distilled already, another family, or a `vae` of other latents.
    """
    path = str(pretrained_model_name_or_path)
    teacher, described = _open(path, parts, revision, variant)
    require_family(path, described.family, family)
    if not allow_distilled:
        _refuse_students(described)
    for part in map(part_named, parts):
        if part == "vae" and vae is not None:
            teacher.parts[part] = _load_vae(described, str(vae), vae_dtype or torch.float32)
        else:
            wanted = {"network": dtype, "text": text_dtype}.get(part, torch.float32)
            teacher.parts[part] = load_part(part, described, wanted, variant, max_tokens)
    for module in modules_of(teacher.parts):
        module.requires_grad_(False).eval()
    return teacher


def require_family(path: str, found: Family, wanted: str | None) -> None:
    """Raises ValueError for a teacher of another family than settings were chosen for."""
    if wanted is not None and wanted != found.name:
        title = FAMILIES.find(wanted).title
        raise ValueError(
            f"{path} is a {found.title}, the settings are for a {title} (model.family={wanted}): choose an experiment "
            f"for {found.name}, or set model.family=null"
        )


def open_pipeline(
    path: str, revision: str | None = None, variant: str | None = None, network: Any = None
) -> tuple[Any, PipelineFacts]:
    """A stock diffusers pipeline in float32, a teacher's or an exported student's, and what its folder says.

    What `DiffusionPipeline.from_pretrained` gives, without a safety checker; but the folder has no say in what is run.

    Args:
        network: in the place of its own, which then is not loaded.

    Raises:
        FileNotFoundError, ValueError: as `load_teacher`.
    """
    parts = [part for part in PARTS if part != "network" or network is None]
    teacher, described = _open(path, parts, revision, variant)
    for part in parts:
        teacher.parts[part] = load_part(part, described, torch.float32, variant)
    if network is not None:
        teacher.parts["network"] = network
    return teacher.pipeline(described.own_scheduler()), described


def _open(path: str, parts: Sequence[str], revision: str | None, variant: str | None) -> tuple[Teacher, PipelineFacts]:
    """A teacher without its parts."""
    components = folders_of("network") + [name for part in parts for name in folders_of(part_named(part))]
    described = check_pipeline(path, find_pipeline(path, components, revision, variant))
    folder, family = described.folder, described.family
    teacher = Teacher.of(
        family,
        described.network,
        described.vae,
        described.noise,
        _identity(path, folder, revision),
        zeros_for_empty=described.zeros_for_empty,
        second_pass=described.guidance_form == "cfg",
        weight_files=weight_files(folder, family.network.folder, variant),
    )
    return teacher, described


def folders_of(part: str) -> list[str]:
    """The sub-folders that a part may live in, of whatever family the pipeline is."""
    if part == "vae":
        return ["vae"]
    if part == "network":
        return list(dict.fromkeys(family.network.folder for family in FAMILIES.values()))
    towers = [tower for family in FAMILIES.values() for tower in family.text.towers]
    return list(dict.fromkeys(name for tower in towers for name in (tower.tokenizer, tower.encoder)))


def _refuse_students(described: PipelineFacts) -> None:
    """Raises ValueError for a network that was distilled already."""
    if described.guidance_form == "none":
        raise ValueError(
            f"{described.path} cannot be a teacher: its network takes guidance as an input or needs none, so it is a "
            "student already; take the model that it was distilled from, or set model.allow_distilled=true"
        )


def _identity(path: str, folder: Path, revision: str | None) -> str:
    if Path(path).expanduser().exists():
        return folder.resolve().name
    return f"{path}@{revision}" if revision else path


def load_part(
    part: str, described: PipelineFacts, dtype: torch.dtype, variant: str | None, max_tokens: int | None = None
) -> Any:
    """One of the parts of a pipeline that `check_pipeline` has checked; for errors see `load_teacher`."""
    folder, family, index = described.folder, described.family, described.index
    if part == "text":
        towers = family.text.load(folder, index, described.network, dtype, variant, max_tokens)
        family.text.check(described.path, described.network, towers)
        return towers
    name, kind, config = {
        "network": (family.network.folder, family.network.kind, described.network),
        "vae": ("vae", family.latents.kind, described.vae),
    }[part]
    return _load_model(getattr(diffusers, kind), folder, name, config, dtype, variant)


def _load_model(
    cls: Any, folder: Path, name: str, config: Config, dtype: torch.dtype, variant: str | None = None
) -> Any:
    return load_checked(
        folder / name,
        weight_files(folder, name, variant),
        lambda: cls.from_config(dict(config)),
        lambda: cls.from_pretrained(
            folder / name,
            torch_dtype=dtype,
            variant=variant_of(folder, name, variant),
            use_safetensors=True,
            output_loading_info=True,
        ),
    )


def load_network(folder: Path, family: Family, like: Config, dtype: torch.dtype) -> Any:
    """The network of an export, which is to take the place of a pipeline's whose network has the config `like`.

    Args:
        folder: of the export.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged, or of another model.
    """
    name = family.network.folder
    config, file = read_json(folder, f"{name}/config.json"), folder / name / "config.json"
    check_sizes(file, config)
    for key in family.network.same:
        if _plain(config.get(key)) != _plain(like.get(key)):
            raise ValueError(
                f"{folder / name} is the network of another model: its {key} is {short(config.get(key))}, the model's "
                f"is {short(like.get(key))}"
            )
    return _load_model(getattr(diffusers, family.network.kind), folder, name, config, dtype)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _load_vae(described: PipelineFacts, path: str, dtype: torch.dtype) -> Any:
    """Another autoencoder for a teacher, of the same latents as its own."""
    cls = getattr(diffusers, described.family.latents.kind)
    try:
        given = cls.load_config(path)
        _same_latents(path, given, described)
        check_sizes(Path(path) / "config.json", given)
        if dtype == torch.float16 and given.get("force_upcast", True):
            dtype = torch.float32
        return cls.from_pretrained(path, torch_dtype=dtype, use_safetensors=True)
    except (OSError, HFValidationError) as error:  # what diffusers and the hub client raise
        raise FileNotFoundError(f"no autoencoder with safetensors weights at {path!r}: {first_line(error)}") from error
    except (RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the autoencoder {path} cannot be opened ({first_line(error)})") from error


def _same_latents(path: str, given: Config, described: PipelineFacts) -> None:
    latents, own, file = described.family.latents, described.vae, Path(path) / "config.json"
    if given.get("_class_name") != latents.kind:
        raise ValueError(f"{path} is a {given.get('_class_name')}, not an {latents.kind}")
    defaults = signature(getattr(diffusers, latents.kind)).parameters
    for name in latents.same:
        theirs, ours = (config.get(name, defaults[name].default) for config in (given, own))
        if theirs != ours:
            raise ValueError(f"the autoencoder {path} has {name} {theirs}, the teacher's own has {ours}")
    latents.check(file, given)
    if latents.factor(given) != latents.factor(own):
        raise ValueError(f"the autoencoder {path} halves its pictures more or less often than the teacher's own")


def prompt_tokens(folder: Path, max_tokens: int | None = None) -> int:
    """The tokens of a prompt of the pipeline in `folder`, by its configs; for `max_tokens` see `Text.load`.

    Raises:
        FileNotFoundError, ValueError: configs that do not say it, or a pipeline of no known family.
    """
    family = family_of_pipeline(str(folder), read_json(folder, "model_index.json").get("_class_name"))
    return family.text.tokens(folder, max_tokens)
