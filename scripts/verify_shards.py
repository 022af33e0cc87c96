"""Launches `distill verify`, which says what it does: `distill verify --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("verify")
