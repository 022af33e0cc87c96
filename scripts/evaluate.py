"""Launches `distill.commands.evaluate`, which says what it does."""

from distill.commands.evaluate import run

if __name__ == "__main__":
    run()
