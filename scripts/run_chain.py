"""Launches `distill.commands.run_chain`, which says what it does."""

from distill.commands.run_chain import run

if __name__ == "__main__":
    run()
