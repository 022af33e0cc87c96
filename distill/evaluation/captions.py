"""The prompts of an evaluation: from a file of COCO's captions, or from any source of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill.data.prompts import find_files, read_prompts
from distill.data.texts import coco_captions, parsed


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
            whatever `distill.data.prompts.read_prompts` reads: text, JSON, JSONL, tables.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: fewer than n, or a file that is not understood.
    """
    found = _read(source)
    if len(found.prompts) < n:
        raise ValueError(f"prompts in {source}: there are {len(found.prompts)}, the protocol takes {n}")
    return Captions(found.prompts[:n], None if found.pictures is None else found.pictures[:n])


def _read(source: str) -> Captions:
    if source.lower().endswith(".json") and len(files := find_files(source)) == 1:
        with files[0] as stream:
            try:
                content = parsed(stream.read())
                if isinstance(content, dict) and "annotations" in content:
                    return Captions(*coco_captions(content))
            except ValueError as error:
                raise ValueError(f"prompts in {source}: {error}") from None
    return Captions(read_prompts(source))
