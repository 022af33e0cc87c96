"""Launches `distill latents`, which says what it does: `distill latents --help`."""

from distill.commands import run

if __name__ == "__main__":
    run("latents")
