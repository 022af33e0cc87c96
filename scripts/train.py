"""Launches `distill.commands.train`, which says what it does."""

from distill.commands import run

if __name__ == "__main__":
    run("train")
