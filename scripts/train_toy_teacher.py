"""Launches `distill study toy_teacher`, which says what it does: `distill study toy_teacher --help`."""

from distill.studies.study import run

if __name__ == "__main__":
    run("toy_teacher")
