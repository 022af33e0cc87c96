"""Launches `distill.commands.verify_shards`, which says what it does."""

from distill.commands.verify_shards import run

if __name__ == "__main__":
    run()
