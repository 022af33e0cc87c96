"""Students as they are in folders, and the settings that they and their teachers are sampled with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill.diffusion.samplers import read_sampling, usual_spacing
from distill.diffusion.solver import make_times
from distill.evaluation.compare import ComparisonPlan, Setting
from distill.evaluation.pipelines import sampling_of
from distill.methods.sampling import Sampling
from distill.models.denoiser import NetworkDenoiser
from distill.models.exported import FACTS, read_export
from distill.models.families.loading import load_network
from distill.models.families.teacher import Teacher
from distill.models.folder import stored_tensors, weight_files, weights_hash
from distill.models.lora import ADAPTER, load_lora, lora_file


@dataclass(frozen=True)
class LoadedStudent:
    """A student on its teacher's schedule, the hash of its weights, and how it is sampled."""

    denoiser: NetworkDenoiser
    weights: str
    sampling: Sampling

    @property
    def embedded(self) -> bool:
        """Whether guidance is an input of its network."""
        return self.denoiser.takes_guidance


def load_student(folder: str | Path, teacher: Teacher) -> LoadedStudent:
    """The student in a folder: a LoRA, which is put onto the teacher's network, or a whole network.

    An export says how it is sampled; the student of any other folder is taken to be one for LCM's sampler.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: an export of another model than the teacher, or one that cannot be read.
    """
    folder = Path(folder).expanduser()
    export = read_export(folder) if (folder / FACTS).is_file() else None
    if export is not None:
        export.require_base(teacher.teacher_hash)
    sampling = sampling_of(folder) or Sampling()
    name = teacher.family.network.folder
    if not (folder / name).is_dir():
        digest = weights_hash(stored_tensors([lora_file(folder)]))
        adapters, dtype = load_lora(teacher.network, folder, family=teacher.family), teacher.network.dtype
        for adapter in adapters:  # to be sampled, not to be trained: in the network's dtype
            adapter.data = adapter.data.to(dtype)
        return LoadedStudent(replace(teacher.denoiser(), adapter=ADAPTER), digest, sampling)
    dtype = next(teacher.network.parameters()).dtype
    network = load_network(folder, teacher.family, teacher.network.config, dtype)
    prediction = export.prediction if export is not None else None
    denoiser = teacher.denoiser_of(network.eval().requires_grad_(False), prediction)
    return LoadedStudent(denoiser, weights_hash(stored_tensors(weight_files(folder, name))), sampling)


def parse_sampler(text: str, own: Sampling) -> Sampling:
    """`SAMPLER`, `SAMPLER/SPACING` or `SAMPLER/SPACING/GAMMA`; what is left out is the student's own where the sampler
    is, and else the sampler's usual spacing and a gamma of 0.

    Raises ValueError: a name that is not known, two that do not go together, or a gamma that the sampler cannot have.
    """
    sampler, spacing, gamma = read_sampling(text)
    same = sampler == own.sampler
    usual = own.spacing if same else usual_spacing(sampler)
    return Sampling(sampler, spacing or usual, own.steps, (own.gamma if same else 0.0) if gamma is None else gamma)


def with_student(
    plan: ComparisonPlan, student: LoadedStudent, samplings: Sequence[Sampling], guidances: Sequence[float]
) -> ComparisonPlan:
    """The plan with rows of the student by every sampler and guidance; the first of each are its usual ones.

    Raises:
        ValueError: more steps than a sampler has times.
    """
    first = samplings[0]
    settings = [
        Setting("student", sampling.sampler, steps, w, sampling.spacing, student.embedded, sampling.gamma)
        for sampling in samplings
        for w in guidances
        for steps in plan.steps
    ]
    for setting in settings:
        make_times(setting.spacing, student.denoiser.schedule.T, setting.steps)
    plan = replace(
        plan,
        student_sampler=first.sampler,
        student_spacing=first.spacing,
        student_guidance=guidances[0],
        student_embedded=student.embedded,
        student_gamma=first.gamma,
    )
    return replace(plan, more=(*plan.more, *settings[len(plan.steps) :], *_at_equal_cost(plan, settings)))


def _at_equal_cost(plan: ComparisonPlan, students: Sequence[Setting]) -> Iterator[Setting]:
    """The teacher in as many network evaluations as each student takes, where the plan has no such row of it.

    Guided steps take two, unless guidance is an input: an odd number of evaluations is one of steps without guidance.
    """
    embedded = plan.teacher_embedded
    tuned = len(plan.candidates(1)) > 1
    for nfe in dict.fromkeys(student.nfe for student in students):
        guided = plan.guidance != 1 and (embedded or nfe % 2 == 0)
        steps = nfe // 2 if guided and not embedded else nfe
        if steps not in plan.steps or (not guided and plan.guidance != 1 and not tuned):
            yield Setting("teacher", "ddim", steps, plan.guidance if guided else 1.0, plan.spacings[-1], embedded)
