"""Launches `distill.commands.launch`, which says what it does."""

from distill.commands.launch import run

if __name__ == "__main__":
    run()
