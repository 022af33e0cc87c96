"""Launches `distill.commands.plan`, which says what it does."""

from distill.commands import run

if __name__ == "__main__":
    run("plan")
