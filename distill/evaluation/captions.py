"""The prompts of an evaluation: from a file of COCO's captions, or from any source of prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.data.prompts import find_files, read_prompts


@dataclass(frozen=True)
class Captions:
    """Prompts in their order and, if it is known, the name of the picture that each describes."""

    prompts: Sequence[str]
    pictures: Sequence[str] | None = None


def read_captions(source: str, n: int) -> Captions:
    """The first n prompts of a source.

    Args:
        source: a `.json` in the layout of COCO's captions: `annotations` with `image_id` and `caption`, and `images`
            with `id` and `file_name`. Taken is the first caption of each picture, in the order of the file. Or
            whatever `distill.data.prompts.read_prompts` reads: text, JSONL, tables.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: fewer than n, or a file that is not understood.
    """
    found = _coco(source) if source.lower().endswith(".json") else Captions(read_prompts(source))
    if len(found.prompts) < n:
        raise ValueError(f"prompts in {source}: there are {len(found.prompts)}, the protocol takes {n}")
    return Captions(found.prompts[:n], None if found.pictures is None else found.pictures[:n])


def _coco(source: str) -> Captions:
    with find_files(source)[0] as file:
        try:
            content = json.load(file)
            names: Mapping[Any, str] = {image["id"]: str(image["file_name"]) for image in content["images"]}
            first: dict[Any, str] = {}
            for annotation in content["annotations"]:
                first.setdefault(annotation["image_id"], " ".join(str(annotation["caption"]).split()))
            return Captions(list(first.values()), [names[key] for key in first])
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
            raise ValueError(f"prompts in {source}: not in the layout of COCO's captions ({reason})") from None
