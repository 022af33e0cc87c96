"""Launches `distill launch`, which says what it does: `distill launch --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("launch")
