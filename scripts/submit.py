"""Launches `distill.commands.submit`, which says what it does."""

from distill.commands.submit import run

if __name__ == "__main__":
    run()
