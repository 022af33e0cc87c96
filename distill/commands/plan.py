"""Says what a run needs, and what does not fit: `distill plan experiment=lcm_lora_sdxl cluster=a100-80gb-x64`.

Parameters, memory by engine, communication, storage, time, checkpoints and what failures cost, and what does not fit.
Nothing is loaded: the run's own losses are walked through on networks without weights. `cluster` is a file of
`configs/cluster/`; its numbers are overridden by their names (cluster.nodes=3 cluster.mfu=0.4).
"""

from __future__ import annotations

if __name__ == "__main__":  # before what is heavy is imported
    from distill.commands import run

    run("plan")

from collections.abc import Iterator, Sequence
from functools import partial

from distill.config.settings import ClusterSettings, PlanSettings
from distill.data.words import counted
from distill.diffusion.samplers import SAMPLERS
from distill.planning.estimates import most_samples
from distill.planning.inference import hours, inference
from distill.planning.phases import (
    GB,
    GIB,
    TERA,
    PlannedRun,
    averaged_over,
    bytes_sent,
    engine_of,
    engines_of,
    picked,
    prepared,
    rate_of,
    saving,
    sent_seconds,
    step_seconds,
    usable,
)
from distill.training.tracking import setup_logging

PICTURES = 10_000
"""How many an evaluation has, as in most protocols."""


def main(cfg: PlanSettings) -> None:
    setup_logging(0)
    run = prepared(cfg)
    for part in (heading, networks, memory, communication, storage, speed, checkpoints, around, verdict):
        print("\n".join(part(run)), end="\n\n", flush=True)


def heading(run: PlannedRun) -> Iterator[str]:
    cfg, cluster = run.cfg, run.cfg.cluster
    split = f"{counted(run.samples, 'sample')} a {cluster.device}" + (
        f" x {run.split.accumulated} micro-batches" if run.split.accumulated > 1 else ""
    )
    yield f"{type(run.method).__name__}, {counted(cfg.max_train_steps, 'step')}, on {machines(cluster)}"
    batch = f"{counted(run.global_batch, 'sample')} a step: {split}"
    yield f"engine={run.engine}, mixed_precision={cfg.mixed_precision}, {batch}"


def networks(run: PlannedRun) -> Iterator[str]:
    columns: dict[str, list[float]] = {
        "weights, M": [(w.trained + w.frozen) / 1e6 for w in run.modules.values()],
        "trained, M": [w.trained / 1e6 for w in run.modules.values()],
        "of another's, M": [w.shared / 1e6 for w in run.modules.values()],
        "quantized, GiB": [w.packed / GIB for w in run.modules.values()],
    }
    shown = [head for head, values in columns.items() if any(values)]  # what no network has is left out
    rows = zip(run.modules, *(columns[head] for head in shown), strict=True)
    yield from table(["network", *shown], [[" and ".join(names), *(f"{x:.1f}" for x in row)] for names, *row in rows])


def memory(run: PlannedRun) -> Iterator[str]:
    room = usable(run.cfg.cluster)
    what = f"Memory of a {run.cfg.cluster.device}, GiB; {room / GIB:.1f} are usable"
    yield f"{what}. Activations of {counted(run.samples, 'sample')}, at their most."
    heads = "engine,weights,masters,gradients,optimizer,average,buffers,step,activations,in all,fits,most samples"
    rows = []
    for engine in engines_of(run):
        held = run.held(engine)
        states = [held.weights, held.masters, held.gradients, held.optimizer, held.average, held.buffers, held.step]
        for checkpointed in (False, True):
            activations = run.activations(engine, checkpointed)
            total = run.memory(engine, checkpointed, run.samples)
            bytes_of = [*states, run.samples * activations, total]
            rows.append(
                [
                    engine + (", checkpointed" if checkpointed else ""),
                    *(f"{b / GIB:.2f}" for b in bytes_of),
                    "yes" if total <= room else "no",
                    str(most_samples(room, held, activations)),
                ]
            )
    yield from table(heads.split(","), rows)
    yield "Masters are float32 copies, step is what lives after the backward pass, when activations are gone."


def communication(run: PlannedRun) -> Iterator[str]:
    if run.ranks == 1:
        yield "Communication: none, there is one process"
        return
    yield f"Communication of a {run.cfg.cluster.device} in a step, in rings"
    rows = []
    for engine in engines_of(run):
        sent = averaged_over(run, partial(bytes_sent, run, engine))
        seconds = sent_seconds(run, engine)
        reduced = averaged_over(run, partial(bytes_reduced, run, engine))
        rows.append([engine, f"{reduced / GB:.3f}", f"{(sent - reduced) / GB:.3f}", f"{seconds:.3f}"])
    yield from table(["engine", "gradients, GB", "weights, GB", "seconds"], rows)


def bytes_reduced(run: PlannedRun, engine: str, phase: int) -> float:
    """Bytes of gradients among those that a GPU sends in a step."""
    return run.traffic(engine, run.cfg.gradient_checkpointing, phase).reduced


def storage(run: PlannedRun) -> Iterator[str]:
    cfg, cluster = run.cfg, run.cfg.cluster
    samples = cfg.data.num_samples
    sample = run.sample
    read = max(sample.read_bytes(picked(run, phase)) for phase in run.phases)
    rate = run.global_batch / step_seconds(run, run.engine)
    each = f"{sample.size / 2**20:.2f} MiB per sample of {len(sample.times)} states"
    if sample.bare is not None:
        each += f", {sample.bare_size / 2**20:.2f} after the first of each of {counted(sample.prompts, 'prompt')}"
    whole = f", {sample.store_bytes(samples) / GIB:.1f} GiB for {counted(samples, 'sample')}" if samples else ""
    yield f"Store: {each}{whole}"
    need = rate * read / cluster.nodes
    yield (
        f"Reading: {read / 2**20:.2f} MiB per sample, {need / 1e6:.1f} MB/s per node "
        f"({100 * need / (GB * cluster.read_gb_s):.1f} % of the {cluster.read_gb_s:g} GB/s it reads)"
    )


def speed(run: PlannedRun) -> Iterator[str]:
    cfg, cluster = run.cfg, run.cfg.cluster
    yield "Network evaluations per sample, and TFLOP (forward, backward and recomputed)"
    rows = []
    for i, phase in enumerate(run.phases):
        for cost in run.costs(run.engine, cfg.gradient_checkpointing)[i]:
            evaluations = ", ".join(f"{name} {n:g}" for name, n in cost.evaluations.items())
            graded = ", ".join(f"{name} {n:g}" for name, n in cost.with_gradient.items())
            rows.append([str(phase), cost.updates, evaluations, graded, f"{cost.flops / TERA:.2f}"])
    yield from table(["steps", "turn of", "evaluations", "of them with a gradient", "TFLOP"], rows)
    step = step_seconds(run, run.engine)
    how = "as measured" if cfg.measured_step_seconds else f"at {rate_of(run) / TERA:.4g} TFLOP/s per {cluster.device}"
    if not cfg.measured_step_seconds:
        how += f" (mfu {cluster.mfu:g}) and {sent_seconds(run, run.engine):.3f} s of communication beside nothing"
    yield f"A step: {step:.3f} s {how}; {run.global_batch / step:.1f} samples/s"
    hours = cfg.max_train_steps * step / 3600
    yield f"{counted(cfg.max_train_steps, 'step')}: {duration(run, hours)}, without saving and failures"


def checkpoints(run: PlannedRun) -> Iterator[str]:
    cfg = run.cfg
    costs, step = saving(run), step_seconds(run, run.engine)
    interval = min(cfg.checkpointing_steps, cfg.max_train_steps) * step
    lost, best = costs.lost(interval), costs.best_interval
    least = costs.lost(best)
    waits = f"{costs.stood:.1f} s of them training stands still" if costs.stood < costs.written else "training waits"
    yield f"Checkpoint: {costs.size / GIB:.2f} GiB, {costs.written:.1f} s to write it; {waits}"
    yield (
        f"Failures: one in {costs.mtbf / 3600:.0f} h; {100 * lost:.2f} % of the time is lost with a checkpoint every "
        f"{cfg.checkpointing_steps} steps ({interval / 60:.1f} min)"
    )
    yield (
        f"The least is {100 * least:.2f} %, every {max(1, round(best / step))} steps ({best / 60:.1f} min; "
        "Daly 2006, doi 10.1016/j.future.2004.11.016)"
    )
    hours = cfg.max_train_steps * step / 3600 / max(1 - lost, 1e-9)
    yield f"In all: {duration(run, hours)}"


def around(run: PlannedRun) -> Iterator[str]:
    """What is done before and after the run: solves, loading, evaluation."""
    cfg, cluster, model = run.cfg, run.cfg.cluster, inference(run.cfg.model, run.bf16, run.cfg.data.sizes)
    data = cfg.data
    if data.guidance is not None and data.num_samples is not None:
        used = hours(data.num_samples * model.solve_flops(data), cluster, run.bf16)
        evaluations = SAMPLERS[data.solver].evaluations(data.solver_steps) * model.passes(data)
        yield (
            f"The teacher's solves: {counted(data.num_samples, 'sample')}, {evaluations} evaluations each, "
            f"{used:.2f} {cluster.device} hours, {used / run.ranks:.2f} h here; "
            f"data.batch_size={data.batch_size} takes {model.solve_bytes(data) / GIB:.2f} GiB"
        )
    yield f"Loading: {run.loading / GB:.1f} GB of host memory per node: {cluster.gpus_per_node} processes in float32"
    if copied := run.snapshot(run.engine):
        yield (
            f"Checkpoints: {copied / GB:.1f} GB of host memory on rank 0, which has the most, for the copy that is "
            "written beside the training; none with checkpoints_in_background=false"
        )
    student, teacher = (hours(PICTURES * model.picture_flops(n, n > 8), cluster, run.bf16) for n in (4, 50))
    yield (
        f"Evaluation of {PICTURES} pictures: {student:.2f} {cluster.device} hours for a student of 4 steps, "
        f"{teacher:.2f} for the teacher's 50 guided ones; batch_size=8 takes {model.sampling_bytes(8) / GIB:.2f} GiB"
    )


def duration(run: PlannedRun, hours: float) -> str:
    return f"{hours:.2f} h, {hours * run.ranks:.1f} {run.cfg.cluster.device} hours"


def verdict(run: PlannedRun) -> Iterator[str]:
    """What does not fit, and what would."""
    said = list(problems(run))
    yield "What does not fit:" if said else f"engine={run.engine} fits."
    yield from (f"- {line}" for line in said)


def problems(run: PlannedRun) -> Iterator[str]:
    cfg, room = run.cfg, usable(run.cfg.cluster)
    solves = inference(cfg.model, run.bf16)
    if cfg.data.guidance is not None and (needed := solves.solve_bytes(cfg.data)) > room:
        yield (
            f"data.batch_size={cfg.data.batch_size} needs {needed / GIB:.1f} GiB for the teacher's solves, "
            f"{room / GIB:.1f} are usable: take a smaller one"
        )
    parts = run.ranks * cfg.gradient_accumulation_steps
    if run.global_batch != cfg.global_batch_size:
        lower = cfg.global_batch_size // parts * parts
        nearest = f"{lower} or {run.global_batch}" if lower else f"{run.global_batch}"
        yield (
            f"global_batch_size={cfg.global_batch_size} is no multiple of {devices(run)} x "
            f"{cfg.gradient_accumulation_steps} micro-batches: take {nearest} (planned with {run.global_batch})"
        )
    if (engine := engine_of(cfg)) != run.engine:
        yield f"engine={engine} is one process, there are {devices(run)}: take a launcher and {advice(run, room)}"
    elif run.memory(run.engine, cfg.gradient_checkpointing, run.samples) > room:
        needed = run.memory(run.engine, cfg.gradient_checkpointing, run.samples)
        batch = counted(run.samples, "sample")
        yield (
            f"engine={run.engine} needs {needed / GIB:.1f} GiB per {cfg.cluster.device} for {batch}, "
            f"{room / GIB:.1f} are usable: take {advice(run, room)}"
        )
    step = step_seconds(run, run.engine)
    read = max(run.sample.read_bytes(picked(run, phase)) for phase in run.phases)
    if (need := run.global_batch / step * read / cfg.cluster.nodes) > GB * cfg.cluster.read_gb_s:
        yield f"a node reads {cfg.cluster.read_gb_s:g} GB/s and needs {need / GB:.1f}: keep the store on local disks"
    if not cfg.measured_step_seconds and (sent := sent_seconds(run, run.engine)) > step / 2:
        yield f"{sent:.2f} s of a step of {step:.2f} s are communication: raise global_batch_size, or take fewer GPUs"
    yield from rarely_saved(run, step)


def rarely_saved(run: PlannedRun, step: float) -> Iterator[str]:
    """A line where another interval of checkpoints saves at least a fiftieth of the run and six minutes."""
    cfg, costs = run.cfg, saving(run)
    best = min(cfg.max_train_steps, max(1, round(costs.best_interval / step)))
    now, then = (costs.lost(min(n, cfg.max_train_steps) * step) for n in (cfg.checkpointing_steps, best))
    if now - then > 0.02 and (now - then) * cfg.max_train_steps * step > 360:
        yield (
            f"{100 * now:.0f} % of the time is lost to saving and failures, {100 * then:.0f} % with "
            f"checkpointing_steps={best}"
        )


def advice(run: PlannedRun, room: float) -> str:
    """The least change that fits: recomputing activations, cutting the states, smaller micro-batches."""
    checkpointed = run.cfg.gradient_checkpointing
    engines = [e for e in engines_of(run) if e != "single"] if run.ranks > 1 else ["single"]
    for samples in sorted({run.samples, *(n for n in divisors(run.samples))}, reverse=True):
        for again in sorted({checkpointed, True}):
            for engine in engines:
                if run.memory(engine, again, samples) <= room:
                    change = [f"engine={engine}"] if engine != engine_of(run.cfg) else []
                    change += ["gradient_checkpointing=true"] if again != checkpointed else []
                    if samples != run.samples:
                        change += [f"micro_batch_size={samples}"]
                    return " ".join(change)
    kind = "GPUs" if run.cfg.cluster.device == "GPU" else "machines"
    return f"{kind} with more memory, or more of them; neither ZeRO, checkpointing nor accumulation is enough"


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def devices(run: PlannedRun) -> str:
    return counted(run.ranks, run.cfg.cluster.device)


def machines(cluster: ClusterSettings) -> str:
    return f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table, the first column flush left, the others as wide as they need."""
    widths = [max(len(line[i]) for line in [heads, *rows]) for i in range(len(heads))]
    words = [all(not row[i][:1].isdigit() for row in rows) for i in range(len(heads))]
    for row in [heads, *rows]:
        cells = [x.ljust(w) if left else x.rjust(w) for x, w, left in zip(row, widths, words, strict=True)]
        yield "  ".join(cells).rstrip()
