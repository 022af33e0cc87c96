"""Text encoders with their tokenizers: where a pipeline has them, how they are loaded, and how they read prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from distill.diffusion.noise import short
from distill.models.checks import check_sizes, load_checked, naming, positive
from distill.models.folder import read_json, variant_of, weight_files

MOST_TOKENS = 10**6
"""Stands for a tokenizer that does not say how many tokens it takes."""


@dataclass(frozen=True)
class TextTower:
    """A tokenizer, whose `model_max_length` the encoder has positions for, and the encoder that reads its tokens.

    It is called as CLIP's are: prompts of one length, the padding read like words. Another kind is a subclass.
    """

    tokenizer: Any
    encoder: Any

    @property
    def length(self) -> int:
        """Tokens after which a prompt is cut."""
        return int(self.tokenizer.model_max_length)

    def __call__(self, prompts: Sequence[str]) -> Any:
        """The encoder's output with all hidden states [B, tokens, width], prompts cut or padded to one length."""
        device = self.encoder.device
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        masked = getattr(self.encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        return self.encoder(tokens.input_ids.to(device), attention_mask=mask, output_hidden_states=True)

    def at_most(self, tokens: int) -> TextTower:
        """The same tower for prompts of so many tokens; itself where its encoder fixes their number."""
        return self

    def cuts(self, prompts: Sequence[str]) -> list[str]:
        """Those prompts that are too long to be read to their end."""
        ids = self.tokenizer(list(prompts), verbose=False).input_ids
        return [prompt for prompt, own in zip(prompts, ids, strict=True) if len(own) > self.length]


@dataclass(frozen=True)
class Tower(ABC):
    """Where a pipeline has a tower, and of which classes of transformers it must be.

    Args:
        tokenizer, encoder: their sub-folders, which are also their names in the pipeline.
        tokenizer_kind, encoder_kind: their classes; a tokenizer may be of the class with `Fast` behind it as well.
        optional: whether a pipeline may lack it. `Text.encode` is then given the others, which stand before it.
    """

    tokenizer: str
    encoder: str
    tokenizer_kind: str
    encoder_kind: str
    optional: bool = False
    renames = False  # whether its weights are saved under other names by some versions of transformers

    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype, variant: str | None) -> TextTower:
        """The tower of the pipeline in `folder`, checked.

        Args:
            dtype: float32, or what a user has chosen; a tower that does not bear it takes another.

        Raises:
            FileNotFoundError, ValueError: a file is missing, damaged, or belongs to something else.
        """

    @abstractmethod
    def tokens(self, folder: Path) -> int:
        """The length of a prompt, by the configs of the pipeline in `folder`; raises like `load`."""

    def load_encoder(
        self, folder: Path, cls: Any, empty: Callable[[Path], Any], dtype: torch.dtype, variant: str | None
    ) -> Any:
        """The text encoder, of a class of transformers; raises like `load`.

        Args:
            empty: makes one without weights, of the config in a folder.
        """
        place, files = folder / self.encoder, weight_files(folder, self.encoder, variant)
        check_sizes(place / "config.json", read_json(folder, f"{self.encoder}/config.json"))
        return load_checked(
            place,
            files,
            lambda: empty(place),
            lambda: cls.from_pretrained(
                place,
                dtype=dtype,
                variant=variant_of(folder, self.encoder, variant),
                use_safetensors=True,
                output_loading_info=True,
            ),
        )

    def positions(self, folder: Path) -> int:
        """The most tokens that the encoder in `folder` reads, which are a prompt's where the tokenizer says nothing."""
        return self.tokens(folder)


class CLIPTower(Tower):
    """A CLIP text encoder; `encoder_kind` says whether it has a projection."""

    renames = True

    def load(self, folder: Path, dtype: torch.dtype, variant: str | None) -> TextTower:
        cls: type[CLIPTextModel] | type[CLIPTextModelWithProjection] = getattr(transformers, self.encoder_kind)
        model = self.load_encoder(folder, cls, lambda place: cls(CLIPTextConfig.from_pretrained(place)), dtype, variant)
        words_of = folder / self.tokenizer
        with naming(words_of):
            words = CLIPTokenizer.from_pretrained(words_of)
        words.model_max_length = length_of(words_of, words.model_max_length, model.config.max_position_embeddings)
        check_vocabulary(words_of, words, model)
        return TextTower(words, model)

    def tokens(self, folder: Path) -> int:
        said = read_json(folder, f"{self.tokenizer}/tokenizer_config.json").get("model_max_length", MOST_TOKENS)
        return length_of(folder / self.tokenizer / "tokenizer_config.json", said, self.positions(folder))

    def positions(self, folder: Path) -> int:
        config = read_json(folder, f"{self.encoder}/config.json")
        return positive(
            folder / self.encoder / "config.json", {"max_position_embeddings": 77} | config, "max_position_embeddings"
        )


@dataclass(frozen=True)
class T5Text(TextTower):
    """A T5 encoder, whose positions are relative: the length of a prompt is for the pipeline to say. No mask: the
    padding is read like words.

    Args:
        most: tokens of a prompt.
    """

    most: int = 256

    @property
    def length(self) -> int:
        return self.most

    def at_most(self, tokens: int) -> T5Text:
        return replace(self, most=tokens)

    def __call__(self, prompts: Sequence[str]) -> Any:
        """The encoder's last states [B, tokens, width]."""
        read = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.most, truncation=True, return_tensors="pt"
        )
        return self.encoder(read.input_ids.to(self.encoder.device))[0]


class T5Tower(Tower):
    """The encoder half of a T5."""

    def load(self, folder: Path, dtype: torch.dtype, variant: str | None) -> TextTower:
        if dtype == torch.float16:  # which its activations overflow
            dtype = torch.bfloat16
        model = self.load_encoder(
            folder, T5EncoderModel, lambda place: T5EncoderModel(T5Config.from_pretrained(place)), dtype, variant
        )
        words_of = folder / self.tokenizer
        with naming(words_of):
            words = T5Tokenizer.from_pretrained(words_of)
        check_vocabulary(words_of, words, model)
        return T5Text(words, model)

    def tokens(self, folder: Path) -> int:
        return T5Text.most


def check_vocabulary(path: Path, words: Any, encoder: Any) -> None:
    """Raises ValueError for a tokenizer, in `path`, of more tokens than its encoder reads."""
    if len(words) > encoder.config.vocab_size:
        raise ValueError(
            f"{path} has {len(words)} tokens, its text encoder reads {encoder.config.vocab_size}: they do not belong "
            "together"
        )


def length_of(path: Path, said: object, positions: int) -> int:
    """How many tokens a prompt has: what the tokenizer says, where it says something that the encoder can read.

    Raises ValueError, with `path`, for a length that no prompt has.
    """
    if isinstance(said, bool) or not isinstance(said, (int, float)) or not said > 2:
        raise ValueError(f"{path}: model_max_length is {short(said)}; a prompt takes at least 3 tokens")
    return min(int(said), positions)
