"""Launches `distill sample`, which says what it does: `distill sample --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("sample")
