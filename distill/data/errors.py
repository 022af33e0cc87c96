"""What can be wrong with a store, and how it is put into a message. Without torch, for those who only report it."""

from __future__ import annotations


class StoreError(ValueError):
    """Something about a trajectory store that the reader or writer does not accept."""


class BadShard(StoreError):
    """A shard that is missing or not what the index says; the message names it."""


class BadSample(BadShard):
    """A sample that is not what the index says; the message names its key and its shard."""


class ReadError(OSError):
    """A file could not be read for as long as reads are tried again; one line that names it and says why.

    Not damage: what the file holds is unknown, and the same read may succeed later or elsewhere. So a program that ends
    for it has the exit code `AGAIN`, which puts a job back into the queue.
    """


class NotWritten(OSError):
    """A store could not be written, as on a full disk; one line. What is finished of it stays."""


NOT_WRITTEN = 74  # EX_IOERR
AGAIN = 75  # EX_TEMPFAIL: to be run again


def short(said: object, most: int = 120) -> str:
    """A text on one line and of bounded length, for messages about what others wrote."""
    text = " ".join(str(said).encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
