"""Launches `distill report`, which says what it does: `distill report --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("report")
