"""Launches `distill submit`, which says what it does: `distill submit --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("submit")
