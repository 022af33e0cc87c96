"""What every fault is tried with: each test notes its outcome, and the run ends in one table.

    python -m pytest tests/faults -m "faults or not faults"

prints it whole; the long campaigns (many kills, tens of thousands of mutated inputs) have the marker `faults`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from tests.data.conftest import copy, pictures_url, store_url  # noqa: F401, fixtures
from tests.faults.runs import Runs


@dataclass
class Outcome:
    """One row: how often a fault was tried and survived, and what it cost.

    Attributes:
        seconds: from the fault to work going on (or to the clean end that is asked for), the longest of the tries.
        samples_lost: samples that were neither trained on (written, read) nor counted as skipped.
        bits_different: bits in which the result differs from that of an undisturbed run; None where there is no result.
    """

    number: int  # orders the table
    fault: str
    tries: int = 0
    survived: int = 0
    seconds: float | None = None
    samples_lost: int = 0
    bits_different: int | None = None

    def tried(
        self,
        survived: bool = True,
        seconds: float | None = None,
        samples_lost: int = 0,
        bits_different: int | None = None,
    ) -> None:
        """Notes one more try."""
        self.tries += 1
        self.survived += survived
        self.samples_lost += samples_lost
        if seconds is not None:
            self.seconds = max(seconds, self.seconds or 0.0)
        if bits_different is not None:
            self.bits_different = bits_different + (self.bits_different or 0)


@dataclass
class Outcomes:
    """The rows of a session by their faults' names."""

    rows: dict[str, Outcome] = field(default_factory=dict)

    def row(self, number: int, fault: str) -> Outcome:
        return self.rows.setdefault(fault, Outcome(number, fault))

    def table(self) -> list[str]:
        head = ("fault", "tries", "survived", "seconds", "samples lost", "bits different")
        body = [
            (
                row.fault,
                str(row.tries),
                str(row.survived),
                "-" if row.seconds is None else f"{row.seconds:.1f}",
                str(row.samples_lost),
                "-" if row.bits_different is None else str(row.bits_different),
            )
            for row in sorted(self.rows.values(), key=lambda row: (row.number, row.fault))
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        form = "  ".join(["{:<%d}", *["{:>%d}"] * (len(head) - 1)]) % tuple(widths)
        return [form.format(*cells) for cells in (head, *body)]


_OUTCOMES = pytest.StashKey[Outcomes]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OUTCOMES] = Outcomes()


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Callable[[int, str], Outcome]:
    """`fault(number, name)` is the row of the table that the test adds its tries to."""
    return request.config.stash[_OUTCOMES].row


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Training runs of a tiny teacher, and one server for them all that starts their processes."""
    made = Runs(tmp_path_factory.mktemp("runs"))
    yield made
    made.ranks.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes = config.stash[_OUTCOMES]
    if outcomes.rows:
        terminalreporter.section("faults")
        for line in outcomes.table():
            terminalreporter.write_line(line)
