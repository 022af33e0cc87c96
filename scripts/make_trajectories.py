"""Launches `distill trajectories`, which says what it does: `distill trajectories --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("trajectories")
