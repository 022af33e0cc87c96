"""Launches `distill study control`, which says what it does: `distill study control --help`."""

from distill.studies.study import run

if __name__ == "__main__":
    run("control")
