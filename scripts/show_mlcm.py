"""Launches `distill study mlcm`, which says what it does: `distill study mlcm --help`."""

from distill.studies.study import run

if __name__ == "__main__":
    run("mlcm")
