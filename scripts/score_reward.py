"""Launches `distill study score_reward`, which says what it does: `distill study score_reward --help`."""

from distill.studies.study import run

if __name__ == "__main__":
    run("score_reward")
