"""Qwen3 as a text encoder: a language model that reads a prompt as a message in a chat, and whose states are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config

from distill.models.checks import naming
from distill.models.families.base import Text
from distill.models.families.towers import TextTower, Tower, check_vocabulary

TEXT = "encoder_hidden_states"
"""The conditioning's entry of text states."""
CHAT_TOKENS = 512
"""Tokens of a prompt within its chat: what diffusers' pipelines with Qwen3 read by default."""


class Qwen3Text(Text):
    """Prompts as a Qwen3 reads them. Its middle layers' states are too large for float16."""

    max_tokens = CHAT_TOKENS
    stored = "bfloat16"
    shared = True


@dataclass(frozen=True)
class ChatTower(TextTower):
    """A tokenizer with a chat template, and a Qwen3 that reads one message written by it.

    Args:
        thinking: what the template is told of `enable_thinking`.
        limit: tokens after which a prompt is cut, the words of the template included.
    """

    thinking: bool = False
    limit: int = CHAT_TOKENS

    @property
    def length(self) -> int:
        return self.limit

    def at_most(self, tokens: int) -> ChatTower:
        return replace(self, limit=tokens)

    def __call__(self, prompts: Sequence[str]) -> tuple[Sequence[Tensor], Tensor]:
        """Hidden states, the embeddings first, each [B, tokens, width], and a mask [B, tokens] bool of what was read.

        Prompts are padded to one length. The template is rendered in transformers' sandbox, which runs no code.

        Raises:
            ValueError: a template that does not render.
        """
        device = self.encoder.device
        tokens = self.tokenizer(
            self.written(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask.to(device)
        body = getattr(self.encoder, "model", self.encoder)  # without a head: next words are not asked for
        output = body(tokens.input_ids.to(device), attention_mask=mask, output_hidden_states=True, use_cache=False)
        return output.hidden_states, mask.bool()

    def written(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as messages of a chat, up to where the answer would begin."""
        with naming(Path(str(self.tokenizer.name_or_path)) / "chat_template"):
            return [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=self.thinking,
                )
                for prompt in prompts
            ]

    def cuts(self, prompts: Sequence[str]) -> list[str]:
        ids = self.tokenizer(self.written(prompts), verbose=False).input_ids
        return [prompt for prompt, own in zip(prompts, ids, strict=True) if len(own) > self.length]


@dataclass(frozen=True)
class Qwen3Tower(Tower):
    """A Qwen3 whose tokenizer has a chat template; `encoder_kind` says whether it has a head for next words.

    Args:
        thinking: what the template is told of `enable_thinking`.
    """

    thinking: bool = False

    def load(self, folder: Path, dtype: torch.dtype, variant: str | None) -> ChatTower:
        if dtype == torch.float16:  # which its activations overflow
            dtype = torch.bfloat16
        cls: Any = getattr(transformers, self.encoder_kind)
        model = self.load_encoder(folder, cls, lambda place: cls(Qwen3Config.from_pretrained(place)), dtype, variant)
        words_of = folder / self.tokenizer
        with naming(words_of):
            words = Qwen2Tokenizer.from_pretrained(words_of)
        if not isinstance(words.chat_template, str):
            raise ValueError(f"{words_of} has no chat template (chat_template.jinja, or in tokenizer_config.json)")
        check_vocabulary(words_of, words, model)
        return ChatTower(words, model, self.thinking)

    def tokens(self, folder: Path) -> int:
        return CHAT_TOKENS


def check_states(path: str, reads: object, makes: int, layers: int, wanted: int) -> None:
    """Raises ValueError for a text encoder of fewer `layers` than are `wanted`, or of states of another width.

    Args:
        path: of the pipeline, for messages.
        reads: the width that the network reads.
        makes: the width that the text encoder's states have together.
    """
    if layers < wanted:
        raise ValueError(
            f"{path} cannot be a teacher: its text encoder has {layers} layers, and the states of layer {wanted} are "
            "read"
        )
    if reads != makes:
        raise ValueError(
            f"{path} cannot be a teacher: its network reads text of width {reads}, its text encoder makes {makes}"
        )
