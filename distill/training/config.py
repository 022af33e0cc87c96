"""From a command line to checked settings, and from settings to built objects.

Hydra composes `configs/`; pydantic checks the flat keys against the classes below, and every node with a `_target_`
against the signature of what it names. A mistake is one line that names the key, the value and what is allowed, and
exit code 2, before any network is built.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from distill.data.errors import AGAIN, ReadError, StoreError, short
from distill.training import signatures

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TARGETS = (
    "distill.methods.",
    "distill.models.",
    "distill.toy.",
    "distill.training.engine.",
    "distill.training.health.",
    "torch.optim.",
)
"""Where what settings may build is defined. A run's settings may be another person's: they must not call anything."""
MAX_OVERRIDE = 20_000
MAX_NESTING = 20
MAX_SETTINGS_BYTES = 1 << 18
MAX_LINE = 400

OmegaConf.register_new_resolver("toy", lambda name: str(_bundled(name)), replace=True)


class ConfigError(ValueError):
    """A setting is wrong; the message is one line for the person who set it."""


class Settings(BaseModel):
    """A group of settings; a key that it does not list is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


S = TypeVar("S", bound=Settings)


def check_component(node: dict[str, Any]) -> dict[str, Any]:
    """Checks a node's keys and value types against the signature of its `_target_`.

    Arguments without a value in the node are left to be passed as built objects. Where torch is not loaded yet, the
    signature is read from the source, and what is not seen there is left to `check_components`.

    Raises:
        ValueError: a target that does not exist or is not for settings to name, an argument it does not take, or a
            value of the wrong type.
    """
    hints = arguments_of(node.get("_target_"))
    for key, value in node.items():
        if key == "_target_" or (key == "_partial_" and isinstance(value, bool)):
            continue
        if hints is not None and key not in hints:
            shown = short(repr(key))
            raise ValueError(f"unknown key {shown}{suggest(key, list(hints))}; allowed: {', '.join(hints)}")
        if _instructs(value):
            raise ValueError(f"{key}={short(repr(value))}: only a node itself has a _target_ and the like")
        node[key] = _checked(key, value, (hints or {}).get(key, Any))
    return node


def check_components(settings: S) -> S:
    """The settings with every component checked against the real signature of its target, which is imported.

    Raises:
        ConfigError: one line about the first mistake.
    """
    return settings.model_copy(
        update={name: _nodes(name, getattr(settings, name)) for name in type(settings).model_fields}
    )


def _nodes(name: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {key: _nodes(f"{name}.{key}", inner) for key, inner in value.items()}
    importlib.import_module("torch")  # so that it is the signature that counts
    with checking(f"{name}: "):
        return check_component(dict(value))


def arguments_of(target: object) -> dict[str, Any] | None:
    """The arguments that a `_target_` takes, each with its type; None if they cannot be read without importing it.

    Raises:
        ValueError: it does not exist, or is not for settings to name.
    """
    if "torch" not in sys.modules:
        return _read_arguments(target)
    found = _target(target)
    hints = get_type_hints(found.__init__ if inspect.isclass(found) else found, include_extras=True)
    return {name: hints.get(name, Any) for name in inspect.signature(found).parameters}


def defaults_of(target: object) -> dict[str, Any]:
    """The arguments that a `_target_` has values for, where a node gives none; it is imported. {} if it is gone."""
    try:
        parameters = inspect.signature(_target(target)).parameters.values()
    except ValueError:
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty and not callable(p.default)}


def _read_arguments(path: object) -> dict[str, Any] | None:
    module, name = _allowed_target(path)
    try:
        home = signatures.defining_module(module, name)
        found = signatures.parameters(module, name)
    except signatures.NoSuchName:
        raise ValueError(f"_target_ {short(repr(path))} does not exist") from None
    if not f"{home}.".startswith(TARGETS):
        raise ValueError(f"_target_ {short(repr(path))} is no class or function of its own module")
    return found


def _target(path: object) -> Any:
    """The class or function that a node names: one that this package, or torch.optim, defines for that."""
    module, name = _allowed_target(path)
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"_target_ {short(repr(path))} does not exist") from None
    if not (inspect.isclass(target) or inspect.isfunction(target)) or not f"{target.__module__}.".startswith(TARGETS):
        raise ValueError(f"_target_ {short(repr(path))} is no class or function of its own module")
    return target


def _allowed_target(path: object) -> tuple[str, str]:
    """The module and the name."""
    module, _, name = str(path).rpartition(".")
    if not str(path).startswith(TARGETS):
        raise ValueError(f"_target_ {short(repr(path))} is not one of {', '.join(f'{start}*' for start in TARGETS)}")
    return module, name


def _instructs(value: Any) -> bool:
    """Whether a node within a node would make Hydra call something."""
    if isinstance(value, dict):
        return any(str(key).startswith("_") for key in value) or any(map(_instructs, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_instructs, value))


def _checked(key: str, value: Any, hint: Any) -> Any:
    """The value of an argument; a whole number for one may be written 20.0, but not "20" or true."""
    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        found = TypeAdapter(hint, config=config).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{key}={short(repr(value))}: {_sentence(error.errors()[0]['msg'])}") from None
    if isinstance(value, (bool, str)) and isinstance(found, (bool, int, float)) and type(found) is not type(value):
        raise ValueError(f"{key}={value!r}: must be {type(found).__name__}, not {type(value).__name__}")
    return found if type(found) is int and type(value) is float else value


def load(config_name: str, schema: type[S], overrides: Sequence[str]) -> S:
    """Composes `configs/<config_name>.yaml` with the overrides and checks it.

    Raises:
        ConfigError: one line about the first mistake.
    """
    for override in overrides:
        check_override(override)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            values = _plain_values(config_name, overrides)
            composed = compose(config_name, overrides=[o for o in overrides if o not in values])
            for given_value in values.values():
                OmegaConf.update(composed, given_value.key_or_group, given_value.value())
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_hydra_line(error, schema)) from None
        except (yaml.YAMLError, ValueError, TypeError, OSError, RecursionError) as error:  # Hydra's own stumbles
            raise ConfigError(f"the settings cannot be composed: {_first_line(error)}") from None
    return check(composed, schema)


def _plain_values(config_name: str, overrides: Sequence[str]) -> dict[str, Override]:
    """The overrides of keys that have a plain value here, yet the name of a group, which Hydra takes them for.

    Raises what Hydra's parser raises.
    """
    own = yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text())
    plain = {key for key, value in own.items() if not isinstance(value, (dict, list)) and (CONFIGS / key).is_dir()}
    parser = OverridesParser.create()
    return {o: parser.parse_override(o) for o in overrides if o.partition("=")[0] in plain}


def check_override(override: str) -> None:
    """Refuses what Hydra's parser would take minutes over. Raises ConfigError."""
    depth = deepest = 0
    for character in override:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    if len(override) > MAX_OVERRIDE or deepest > MAX_NESTING:
        found = f"{len(override)} characters, {deepest} brackets deep"
        raise ConfigError(
            f"{short(override)} is too much for a setting ({found}): allowed are {MAX_OVERRIDE} and {MAX_NESTING}"
        )


def check(composed: DictConfig, schema: type[S]) -> S:
    """The composed config as checked settings; interpolations resolved.

    Raises:
        ConfigError: one line about the first mistake.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} has no value: set {missing[0]}=...")
        return validated(OmegaConf.to_container(composed, resolve=True), schema)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}" if error.full_key else _first_line(error)) from None
    except RecursionError:
        raise ConfigError("the settings are nested too deeply") from None


def validated(settings: Any, schema: type[S]) -> S:
    """Raises ConfigError: one line about the first mistake."""
    try:
        return schema.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_validation_line(error, schema)) from None
    except RecursionError:
        raise ConfigError("the settings are nested too deeply") from None


def read_settings(path: str | Path, schema: type[S]) -> S:
    """Settings that were written down whole, as `--cfg` prints them and a run's folder holds them.

    Raises:
        ConfigError: one line about the first mistake.
        FileNotFoundError: no such file.
    """
    try:
        return validated(read_yaml(path), schema)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_yaml(path: str | Path) -> Any:
    """What a YAML file says, be it anyone's.

    Raises:
        ConfigError: it is not YAML, too long, nested too deeply, or says a key twice.
        FileNotFoundError: no such file.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_SETTINGS_BYTES + 1)
    if len(data) > MAX_SETTINGS_BYTES:
        raise ConfigError(f"it has more than the {MAX_SETTINGS_BYTES} bytes that are allowed for settings")
    try:
        return yaml.load(data, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"it is not YAML for settings: {_first_line(error)}") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML in which nothing is said twice, and without aliases, with which a short text fills any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not allowed{self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [name for name, following in pairwise(sorted(names)) if name == following]:
            raise yaml.YAMLError(f"{short(repr(repeated[0]))} is said twice")
        return super().construct_mapping(node, deep)


def given(arguments: Sequence[str], config_name: str, schema: type[S]) -> S:
    """The settings of a command line: overrides of a config, or `settings=FILE`, which has them all.

    Raises:
        ConfigError: one line about the first mistake.
        FileNotFoundError: no such file.
    """
    files = [argument.removeprefix("settings=") for argument in arguments if argument.startswith("settings=")]
    if not files:
        return load(config_name, schema, arguments)
    if len(arguments) > 1:
        raise ConfigError(f"settings={files[0]} is all of the settings: nothing may be given beside it")
    return read_settings(files[0], schema)


def build(node: Mapping[str, Any], **objects: Any) -> Any:
    """Instantiates a node; `objects` are the arguments that are built things.

    Raises:
        ConfigError: what the constructor, which checks its own ranges, had to say.
    """
    try:
        return instantiate(dict(node), _convert_="all", **objects)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise ConfigError(str(error.__cause__)) from None
        raise


@contextmanager
def checking(what: str = "") -> Iterator[None]:
    """Turns a ValueError of whatever is checked inside into a ConfigError: the user's to mend, not a bug."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{what}{error}") from None


def run_script(main: Callable[[S], None] | str, config_name: str, schema: type[S]) -> None:
    """What every command calls: settings from the command line, one line and exit code 2 for what the user can mend.

    `--cfg` prints the composed settings and stops; `settings=FILE` takes what it printed, instead of composing any.

    Args:
        main: what runs with the settings, or the module whose `main` does, which is imported once they are right.
    """
    arguments = sys.argv[1:]
    show = [a for a in arguments if a in ("--cfg", "--help", "-h")]
    try:
        flags = [a for a in arguments if a.startswith("-") and a not in show]
        if flags:
            raise ConfigError(f"unknown flag {flags[0]}: settings are given as key=value, and --cfg prints them")
        settings = given([a for a in arguments if a not in show], config_name, schema)
        if show:
            print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
            return
        # Nothing above loads torch: what has to be set before it is loaded is set here.
        body: Callable[[S], None] = importlib.import_module(main).main if isinstance(main, str) else main
        body(check_components(settings))
    except ReadError as error:
        sys.exit(fail(error, AGAIN))
    except (ConfigError, StoreError, FileNotFoundError) as error:
        sys.exit(fail(error))


def fail(error: Exception, code: int = 2) -> int:
    """Prints the one line of what ends the program; returns its exit code, which is 2 for a mistake."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _bundled(name: str) -> Path:
    """${toy:teacher} and ${toy:prompts.txt}: what comes with the package."""
    return Path(__file__).resolve().parents[1] / "toy" / name


def _hydra_line(error: Exception, schema: type[Settings]) -> str:
    text = f"{error}\n{error.__cause__ or ''}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return f"unknown key {short(repr(unknown[1]))}{suggest(unknown[1], _fields(schema))}"
    group = re.search(r"Could not find '([^']+)'", text)
    if group:
        folder, _, name = group[1].rpartition("/")
        options = sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))
        return short(f"unknown {folder}={name}{suggest(name, options)}; allowed: {', '.join(options)}", MAX_LINE)
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return short(next(iter(str(error).splitlines()), "") or type(error).__name__, MAX_LINE)


def _validation_line(error: ValidationError, schema: type[Settings]) -> str:
    # A wrong flat key is wrong in the nodes that take it over too: say the one that was set.
    first = min(error.errors(), key=lambda e: e["type"] == "value_error")
    # Names of union members and the like stand in `loc` beside keys; only keys help the reader.
    path = [str(part) for part in first["loc"] if re.fullmatch(r"[a-z_]\w*|\d+", str(part)) and part not in _KINDS]
    key = short(".".join(path) or "the whole")
    if first["type"] == "extra_forbidden":
        key = short(".".join(map(str, first["loc"])))
        return f"unknown key {key!r}{suggest(key, _fields(schema))}"
    if first["type"] == "value_error":
        return short(f"{key}: {_sentence(first['msg'].removeprefix('Value error, '))}", MAX_LINE)
    same = [e for e in error.errors() if e["loc"][:1] == first["loc"][:1]]
    allowed = "; or ".join(dict.fromkeys(_sentence(e["msg"]) for e in same))
    return short(f"{key}={short(repr(first['input']))}: {allowed}", MAX_LINE)


_KINDS = {"int", "float", "str", "bool", "constrained", "none", "tuple", "list", "literal"}


def _fields(schema: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in schema.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Settings):
            names += _fields(nested, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def suggest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _sentence(message: str) -> str:
    return message[:1].lower() + message[1:]
