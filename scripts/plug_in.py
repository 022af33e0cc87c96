"""Launches `distill study plug_in`, which says what it does: `distill study plug_in --help`."""

from distill.studies.study import run

if __name__ == "__main__":
    run("plug_in")
