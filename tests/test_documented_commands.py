"""Every command of README and docs/ for a real teacher fits the machine that the line `# on …` before it names.

`# on 1 x 24 GB` is one GPU, `# on 8 x 80 GB` a machine with eight, `# on 4 x 8 x 80 GB` four of those. What is walked
through takes minutes for SDXL: in the default run that is counted as far as its states go, under `slow` whole.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from distill.config.composition import yaml_of
from distill.config.loading import CONFIGS, ConfigError, load
from distill.config.settings import ClusterSettings, ModelSettings, PlanSettings, RunChainSettings
from distill.planning.chains import kind_of, planned_links, settings_of
from distill.planning.inference import Inference, inference
from distill.planning.phases import GIB, PlannedRun, prepared, ranks_of, recommended, unwalked, usable
from distill.training.chain import links_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MACHINE = re.compile(r"^\s*# on (?:(\d+) x )?(\d+) x (\d+) GB\b")
GPUS = {16: "t4-16gb-x1", 24: "rtx4090-24gb-x1", 40: "a100-40gb-x8", 80: "a100-80gb-x8"}
PLANNED = ("train", "trajectories", "latents", "chain", "submit", "evaluate", "sample")


@dataclass(frozen=True)
class Documented:
    """A command for a real teacher.

    Args:
        settings: those that a plan reads, as they are typed.
    """

    page: str
    line: str
    name: str
    machine: tuple[int, int, int] | None
    settings: tuple[str, ...]

    @property
    def cluster(self) -> ClusterSettings:
        assert self.machine is not None
        nodes, gpus, memory = self.machine
        found = {**yaml_of("cluster/a100-80gb-x8.yaml"), **yaml_of(f"cluster/{GPUS[memory]}.yaml")}
        found.pop("defaults", None)
        return ClusterSettings.model_validate({**found, "nodes": nodes, "gpus_per_node": gpus})

    def value(self, key: str, default: str) -> str:
        return next((s.partition("=")[2] for s in self.settings if s.startswith(f"{key}=")), default)

    def planned(self) -> PlanSettings:
        """As it is typed, of the experiment's own teacher, and with one value of each that is swept over."""
        left_out = ("model.", "output_dir", "slurm", "data.images")
        given = [s for s in self.settings if not s.startswith(left_out)]
        given = [re.sub(r"=([\w.e-]+),[\w.,e-]+$", r"=\1", s) for s in given]
        cfg = load("plan", PlanSettings, given)
        return cfg.model_copy(update={"cluster": self.cluster})


def commands() -> Iterator[Documented]:
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            machine = None
            for line in block.replace("\\\n", " ").splitlines():
                if found := MACHINE.match(line):
                    nodes, gpus, memory = found.groups()
                    machine = int(nodes or 1), int(gpus), int(memory)
                if line.startswith("distill ") and "…" not in line and "--help" not in line and "--cfg" not in line:
                    words = [w for w in shlex.split(line, comments=True)[1:] if not w.startswith("-")]
                    name = next((w for w in words if w in PLANNED), "")
                    settings = tuple(w for w in words if "=" in w)
                    if name and is_real(settings):
                        yield Documented(page.name, " ".join(line.split()), name, machine, settings)


def is_real(settings: tuple[str, ...]) -> bool:
    """Whether it is for a teacher other than the bundled toy, as far as the page says which."""
    chosen = [s for s in settings if s.startswith(("experiment=", "chain=", "student="))]
    return not any(re.search(r"=(\w*toy|quickstart|mine|lightning_compare|outputs/\w*toy/\w+)$", s) for s in chosen)


DOCUMENTED = list(commands())
named = pytest.mark.parametrize("command", DOCUMENTED, ids=lambda c: f"{c.page} {c.line[8:60]}")


def test_the_pages_have_commands() -> None:
    assert len(DOCUMENTED) > 14 and {command.name for command in DOCUMENTED} == {*PLANNED}


@named
def test_a_command_names_its_machine(command: Documented) -> None:
    assert command.machine is not None, f"{command.page}: write `# on 8 x 80 GB` before {command.line}"
    assert command.machine[2] in GPUS
    if command.name == "submit":
        asked = command.value("slurm.nodes", "1"), command.value("slurm.gpus_per_node", "")
        assert asked == tuple(str(n) for n in command.machine[:2])


@named
def test_a_command_fits_the_machine_that_it_names(command: Documented) -> None:
    """As far as that is known without a walk through large networks."""
    needed = bytes_of(command, whole="experiment=lcm_lora_sd15" in command.settings)
    assert needed <= usable(command.cluster), f"{needed / GIB:.1f} GiB: {command.line}"


@pytest.mark.slow
@named
def test_a_command_fits_the_machine_that_it_names_with_all_that_it_computes(command: Documented) -> None:
    needed = bytes_of(command, whole=True)
    assert needed <= usable(command.cluster), f"{needed / GIB:.1f} GiB: {command.line}"


def bytes_of(command: Documented, whole: bool) -> float:
    """Of a GPU. Without a walk, one sample is as large as the largest of docs/recipes.md."""
    if command.name in ("evaluate", "sample"):  # of SDXL, where the page does not say
        model = load("plan", PlanSettings, ["model=sdxl"]).model
        return answering(model.model_dump_json(), "dtype=bfloat16" in command.settings).sampling_bytes(
            int(command.value("batch_size", "8"))
        )
    if any(s.startswith("chain=") for s in command.settings):
        return chain_bytes(command, whole)
    cfg = command.planned()
    if "slurm.script=trajectories" in command.settings or command.name == "trajectories":
        return answering(cfg.model.model_dump_json(), half=True).solve_bytes(cfg.data)
    if command.name == "latents":
        return answering(cfg.model.model_dump_json(), half=True).encoding_bytes(cfg.data)
    return run_bytes(cfg, whole)


@cache
def answering(model: str, half: bool) -> Inference:
    return inference(ModelSettings.model_validate_json(model), half)


def run_bytes(cfg: PlanSettings, whole: bool) -> float:
    if whole:
        if (kind := kind_of(cfg)) not in WALKED:
            WALKED[kind] = prepared(cfg, alone=True)
        run = replace(WALKED[kind], cfg=cfg)
        return run.memory(run.engine, cfg.gradient_checkpointing, run.samples)
    run, _ = unwalked(cfg)
    return run.held(run.engine).states + LARGEST[cfg.gradient_checkpointing]


LARGEST = {False: 11.0 * GIB, True: 1.06 * GIB}
"""Activations of a sample, plain and checkpointed: a link of SDXL-Lightning with a conditional discriminator."""


WALKED: dict[str, PlannedRun] = {}


def chain_bytes(command: Documented, whole: bool) -> float:
    """Of the link that takes most."""
    given = [s for s in command.settings if s.startswith(("chain=", "output_dir=", "overrides="))]
    cfg = load("run_chain", RunChainSettings, given)
    links = links_of(cfg.chain, cfg.output_dir, cfg.overrides)
    if whole:
        return max(link.memory for link in planned_links(links, command.cluster))
    kinds = {}
    for link in links:
        if link.trains:
            found = settings_of(link, links, command.cluster)
            kinds[str(found.student), found.teacher, str(found.networks), str(found.method["_target_"])] = found
    return max(run_bytes(found, whole=False) for found in kinds.values())


def test_a_command_that_does_not_fit_is_found() -> None:
    """What a page once printed: all 96 samples at once on one GPU, and a whole student on GPUs that are too small."""
    before = Documented("", "", "train", (1, 1, 24), ("experiment=lcm_lora_sd15", "engine=zero2"))
    assert bytes_of(before, whole=True) <= usable(before.cluster)
    at_once = Documented("", "", "train", (1, 1, 24), (*before.settings, "micro_batch_size=null"))
    assert bytes_of(at_once, whole=True) > 3 * usable(before.cluster)
    small = Documented("", "", "train", (1, 1, 24), ("experiment=lcm_sdxl", "engine=zero2"))
    assert bytes_of(small, whole=False) > usable(small.cluster)


def test_every_real_experiment_leaves_its_micro_batch_to_be_found() -> None:
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        if "toy" not in path.stem and path.stem != "quickstart":
            assert load("plan", PlanSettings, [f"experiment={path.stem}"]).micro_batch_size == "auto", path.stem


def test_a_plan_of_several_gpus_takes_the_engine_that_it_recommends() -> None:
    run = prepared(load("plan", PlanSettings, ["experiment=quickstart", "engine=single", "cluster=a100-80gb-x8"]))
    assert run.engine == "ddp" and ranks_of(run.cfg.cluster) == 8
    least = min((run.memory(engine, False, run.samples), engine) for engine in ("ddp", "zero2", "zero3"))
    room = run.memory("ddp", False, run.samples)
    cluster = run.cfg.cluster.model_copy(update={"memory_gib": 1.01 * room / GIB, "usable": 1.0})
    tight = replace(run, cfg=run.cfg.model_copy(update={"cluster": cluster}))
    assert least[1] == recommended(tight) == "ddp"  # ZeRO's buffers are larger than what it shares out here


def test_a_chain_whose_engine_is_one_process_is_one_line() -> None:
    cfg = load("run_chain", RunChainSettings, ["chain=lightning_toy"])
    cluster = Documented("", "", "chain", (1, 8, 80), ()).cluster
    links = links_of(cfg.chain, cfg.output_dir, ["engine=single"])
    with pytest.raises(ConfigError, match="link a-lora: engine=single is one process, there are 8 GPUs"):
        planned_links(links, cluster)
