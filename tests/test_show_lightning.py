"""The script that sets the game beside mean squared error: what it compares is what its chain makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.config.loading import load
from distill.config.settings import RunChainSettings, ShowSettings
from distill.studies.lightning import CHAIN, STUDENTS
from distill.training.chain import Link, links_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Link]:
    chain = load("run_chain", RunChainSettings, [f"chain={CHAIN}"]).chain
    return {link.name: link for link in links_of(chain, tmp_path_factory.mktemp("links"))}


def test_its_students_are_links_of_the_chain_that_start_alike(links: dict[str, Link]) -> None:
    """Of one number of steps all go on from one student and learn from one teacher, and draw in as many steps."""
    seeds = load("show_lightning", ShowSettings, []).seeds
    for student, seed in ((student, seed) for student in STUDENTS for seed in seeds):
        link = links[student.link(seed)]
        assert link.settings.method["student_steps"] == student.steps
        assert link.settings.method["x_T"] == "noise"  # as Setting's "ddim" starts
        if student.kind != "m":
            assert link.settings.seed == seed
            first = links[f"e{student.steps}-{seed}"]
            assert (link.settings.start, link.settings.teacher) == (first.settings.start, first.settings.teacher)
            assert link.settings.start == str(links[f"m{student.steps}"].export)


@pytest.mark.parametrize("kind", "vc")
def test_the_games_differ_in_what_the_discriminator_sees(kind: str, links: dict[str, Link]) -> None:
    discriminator = links[f"{kind}1-0"].settings.networks["discriminator"]
    assert discriminator["conditional"] == (kind == "c")
