"""Launches `distill evaluate`, which says what it does: `distill evaluate --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("evaluate")
