"""How mistakes in settings are said: in one line, in this project's words, with what to type instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distill.data.errors import short

MAX_LINE = 400

FAMILIAR = {
    "hydra.run.dir": "output_dir",
    "train_batch_size": "global_batch_size",
    "batch_size": "global_batch_size",
    "per_device_train_batch_size": "global_batch_size",
    "num_train_epochs": "max_train_steps",
    "num_train_steps": "max_train_steps",
    "pretrained_teacher_model": "model.pretrained_model_name_or_path",
    "pretrained_model": "model.pretrained_model_name_or_path",
    "teacher_model": "model.pretrained_model_name_or_path",
    "teacher_revision": "model.revision",
    "non_ema_revision": "model.revision",
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "lr": "learning_rate",
    "train_data_dir": "data.images",
    "instance_data_dir": "data.images",
    "train_shards_path_or_url": "data.images",
    "dataset_name": "data.images",
    "max_train_samples": "data.num_samples",
    "caption_column": "data.prompt_column",
    "validation_prompt": "validation_prompts",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "loss_type": "method.loss",
    "huber_c": "method.huber_c",
    "use_ema": "ema_decay",
    "save_steps": "checkpointing_steps",
    "logging_steps": "log_every",
    "tracker": "tracking",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "prompt": "prompts",
    "lora_path": "lora",
    "lora_weights": "lora",
    "pretrained_lora": "lora",
    "model_path": "model.pretrained_model_name_or_path",
}
"""What people know from other training scripts, and its name here."""


class ConfigError(ValueError):
    """A setting is wrong; the message is one line for the person who set it."""


def suggest(key: str, known: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, of a known key: the same by another script's name, or in a group, or spelt alike."""
    bare = key.replace("-", "_")
    if FAMILIAR.get(bare) in known:
        near = [FAMILIAR[bare]]
    elif bare in known:
        near = [bare]
    else:
        grouped = [other for other in known if other.rpartition(".")[2] == bare]
        near = grouped[:1] if len(grouped) == 1 else difflib.get_close_matches(bare, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


@contextmanager
def checking(what: str = "") -> Iterator[None]:
    """Turns a ValueError of whatever is checked inside into a ConfigError: a mistake in the settings, not a bug."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{what}{error}") from None


_RULES = {
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_parsing_size": "must be an integer of fewer digits",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "number": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a string",
    "string_sub_type": "must be a string",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_short": "must have at least {min_length} characters",
    "literal_error": "must be {expected}",
    "none_required": "must be null",
    "list_type": "must be a list, such as [a,b]",
    "tuple_type": "must be a list, such as [a,b]",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "missing": "has no value",
    "dict_type": "must be a group of keys (a dictionary)",
    "model_type": "must be a group of keys (a dictionary)",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be greater than or equal to {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be less than or equal to {le}",
    "extra_forbidden": "is no key",
    "is_instance_of": "must be of type {class}",
}


def rule(error: Mapping[str, Any]) -> str:
    """What a value breaks, of an error of pydantic's."""
    said = str(error["msg"]).removeprefix("Value error, ")
    text = _RULES.get(error["type"], said[:1].lower() + said[1:])
    return text.format(**error.get("ctx", {})) if error["type"] in _RULES else text


def shown(value: object) -> str:
    """A value as it is typed, of bounded length."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value)) or short(repr(value))


def first_line(error: Exception) -> str:
    return short(next(iter(str(error).splitlines()), "") or type(error).__name__, MAX_LINE)
