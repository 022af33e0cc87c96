"""Texts that samples of a prompt share: the first sample of a prompt holds its text, the others say which one that is.

Which sample holds a text depends on the plan and the prompts alone, so processes that write a store need not talk, and
a store that grows refers back to what it has. Where that text lies, only a reader has to know, who has the whole index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, takewhile

from distill.data.index import ShardInfo, StoreIndex, StorePlan, texts_of
from distill.data.record import BadShard, shard_name

TEXT_OF = "text_of"
"""What a sample's JSON calls the key of the sample that holds its text."""


class Holders:
    """Which sample holds the text of another.

    Args:
        size_of: which of the plan's sizes a sample has.
    """

    def __init__(self, plan: StorePlan, prompts: Sequence[str], size_of: Callable[[int], int]) -> None:
        self.plan, self.prompts, self.size_of = plan, prompts, size_of
        self._places = {text: n for n, text in reversed([*enumerate(prompts)])} if plan.shared else {}
        self._firsts: dict[str, int] = {}
        self._first_of_sizes: dict[int, int] = {}

    def back(self, i: int) -> int:
        """How many samples before sample i the one is that holds its text; 0: it does itself.

        So does the first sample of each size, from which the index has what all of them look like.
        """
        if not self.plan.shared or self._is_first_of_its_size(i):
            return 0
        text = self.plan.prompt_of(i, self.prompts)
        if text not in self._firsts:
            before = takewhile(lambda j: j <= i, self._candidates(text))
            found = next((j for j in before if self.plan.prompt_of(j, self.prompts) == text), None)
            if found is None:  # a prompt that is twice among the prompts, whose first sample has none
                return 0
            self._firsts[text] = found
        return max(0, i - self._firsts[text])

    def _candidates(self, text: str) -> Iterator[int]:
        """Samples that may be the first one with a text, in their order."""
        if text == "" and self.plan.empty_prompts:  # any sample may be without a prompt
            return count()
        return count(self._places[text], len(self.prompts))

    def _is_first_of_its_size(self, i: int) -> bool:
        if len(self.plan.image_sizes) == 1:
            return False
        size = self.size_of(i)
        if size not in self._first_of_sizes:
            self._first_of_sizes[size] = next(j for j in range(i + 1) if self.size_of(j) == size)
        return self._first_of_sizes[size] == i


def back_of(shard: ShardInfo, line: int) -> int:
    """How many samples before a shard's sample the one is that holds its text; 0: it does itself. Raises BadShard."""
    return int(texts_of(shard)[line])


def held_by(
    index: StoreIndex, shard: ShardInfo, line: int, back: Callable[[ShardInfo, int], int] = back_of
) -> tuple[ShardInfo, int]:
    """Shard, and line in it, of the sample that holds the text of a sample: its own, or another's.

    Args:
        back: `back_of`, or what knows it faster.

    Raises:
        BadShard: there is no such sample, or it holds none.
    """
    before = back(shard, line)
    i = shard.number * index.samples_per_shard + line - before
    if i < 0:
        raise BadShard(f"its text should lie {before} samples before it, where there is none")
    number, place = divmod(i, index.samples_per_shard)
    holder = index.numbered.get(number)
    if holder is None:
        raise BadShard(f"its text is in {shard_name(number)}, which is not finished")
    if before and (place >= holder.samples or back(holder, place)):
        raise BadShard(f"its text should be in {index.key_of(i)} of {holder.name}, which holds none")
    return holder, place
