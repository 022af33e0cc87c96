"""Launches `distill benchmark`, which says what it does: `distill benchmark --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("benchmark")
