"""Launches `distill plan`, which says what it does: `distill plan --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("plan")
