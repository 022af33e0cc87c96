"""Launches `distill chain`, which says what it does: `distill chain --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("chain")
