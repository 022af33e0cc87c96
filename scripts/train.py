"""Launches `distill train`, which says what it does: `distill train --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("train")
