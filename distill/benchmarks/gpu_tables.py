"""The tables of `distill benchmark gpu` and `distill benchmark sample`, from the rows of their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
GOALS = (
    "Goals for SDXL: at least 50 % of the matrix peak; from trajectories at least 1.8 times as fast as the usual "
    "recipe, in at most 0.7 of its memory; at most 3 % outside the networks."
)


def tables(rows: Sequence[Row]) -> str:
    """Everything that was measured, as Markdown; parts that were not are left out."""
    parts = [heading(rows), lcm_table(rows), lightning_table(rows), others(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(rows: Sequence[Row]) -> str:
    for row in of(rows, "machine"):
        peaks = ", ".join(f"{peak['tflops']:g} TFLOP/s in {peak['dtype']}" for peak in of(rows, "peak"))
        measured = f" Matrix products reach {peaks}." if peaks else ""
        return f"{row['described']}; {row['date']}, `{row['command']}`.{measured}"
    return ""


def lcm_table(rows: Sequence[Row]) -> str:
    """LCM-LoRA's steps, and the usual recipe's of as many samples beside them."""
    usual = {(row["size"], row["samples"]): row for row in of(rows, "recipe")}
    lines = []
    for row in [*of(rows, "lcm"), *usual.values()]:
        other = usual.get((row["size"], row["samples"])) if row["section"] == "lcm" else None
        alike = other if other is not None and row.get("checkpointed") == other.get("checkpointed") else None
        lines.append(
            [
                row["size"],
                "usual recipe" if row["section"] == "recipe" else f"from {row['source']}",
                row["samples"],
                "yes" if row.get("checkpointed") else "no",
                "yes" if row.get("compiled") else "no",
                "out of memory" if row.get("out_of_memory") else number(row.get("samples_per_second")),
                percent(row.get("share_of_peak")),
                percent(row.get("outside_networks")),
                number(row.get("peak_gib")),
                ratio(row, alike, "samples_per_second"),
                ratio(row, alike, "peak_gib"),
            ]
        )
    if not lines:
        return ""
    heads = ["network", "step", "samples", "checkpointed", "compiled", "samples/s", "of the matrix peak"]
    heads += ["outside the networks", "memory, GiB", "times the recipe's speed", "of its memory"]
    return f"{markdown(heads, lines)}\n\n{GOALS}"


def lightning_table(rows: Sequence[Row]) -> str:
    """Turns of adversarial training."""
    heads = ["discriminator", "samples", "its turn, s", "student's turn, s", "samples/s", "memory, GiB"]
    lines = [
        [
            "conditional" if row["conditional"] else "unconditional",
            row["samples"],
            "out of memory" if row.get("out_of_memory") else number(row.get("discriminator_seconds")),
            number(row.get("student_seconds")),
            number(row.get("samples_per_second")),
            number(row.get("peak_gib")),
        ]
        for row in of(rows, "lightning")
    ]
    return f"SDXL-Lightning, checkpointed:\n\n{markdown(heads, lines)}" if lines else ""


def others(rows: Sequence[Row]) -> str:
    """Repeatability, commands, and what is missing and why; a line each."""
    lines = []
    for row in rows:
        if row["section"] == "repeat" and "differ" in row:
            said = "deterministic" if row["deterministic"] else "not deterministic"
            lines.append(
                f"- three steps twice ({said}): {row['differ']:,} of {row['weights']:,} weights differ, "
                f"by {row['largest']:.1e} at most; {row['step_seconds']:.3g} s a step"
            )
        elif row["section"] == "command" and "exit" in row:
            lines.append(f"- `{row['name']}`: exit code {row['exit']} after {row['seconds']:g} s")
        elif "skipped" in row:
            lines.append(f"- {row.get('name', row['section'])}: left out ({row['skipped']})")
        elif "failed" in row:
            lines.append(f"- {row['section']}: failed ({row['failed']})")
    return "\n".join(lines)


def of(rows: Sequence[Row], section: str) -> list[Row]:
    """The measurements of a section."""
    return [row for row in rows if row["section"] == section and "skipped" not in row and "failed" not in row]


def markdown(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table; the first two columns are text."""
    rule = "|---" * min(2, len(heads)) + "|--:" * (len(heads) - 2) + "|"
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(map(str, line))} |" for line in lines)])


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def ratio(row: Row, other: Row | None, key: str) -> str:
    return "" if other is None or key not in row or key not in other else f"{row[key] / other[key]:.2f}"
