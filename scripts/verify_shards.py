"""Launches `distill.commands.verify_shards`, which says what it does."""

from distill.commands import run

if __name__ == "__main__":
    run("verify_shards")
