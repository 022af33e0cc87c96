"""Launches `distill export`, which says what it does: `distill export --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("export")
