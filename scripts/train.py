"""Launches `distill.commands.train`, which says what it does."""

from distill.commands.train import run

if __name__ == "__main__":
    run()
