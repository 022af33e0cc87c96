"""Launches `distill study lightning`, which says what it does: `distill study lightning --help`."""

from distill.studies.study import run

if __name__ == "__main__":
    run("lightning")
