"""Launches `distill.commands.make_trajectories`, which says what it does."""

from distill.commands import run

if __name__ == "__main__":
    run("make_trajectories")
