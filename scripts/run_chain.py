"""Launches `distill.commands.run_chain`, which says what it does."""

from distill.commands import run

if __name__ == "__main__":
    run("run_chain")
