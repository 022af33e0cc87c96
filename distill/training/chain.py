"""Chains: runs that build on earlier ones. What each link's command is, what it needs, and how far it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.cluster.progress import checkpoints_of, finished, steps_done, steps_taken
from distill.config.loading import ConfigError, load
from distill.config.recorded import Differences, chief, differences, for_any, given_keys
from distill.config.settings import (
    READERS,
    ChainSettings,
    EvaluateSettings,
    LinkSettings,
    SampleSettings,
    TrainSettings,
)
from distill.data.index import INDEX, StoreIndex
from distill.data.reader import read_index
from distill.data.record import StoreError
from distill.data.storage import Folder, make_folder
from distill.models.formats import format_named
from distill.training.checkpoint import Checkpoints, best_of
from distill.training.export import FACTS, check_formats
from distill.training.fitting import unread
from distill.training.run import FREE, recorded_settings, write_atomically


@dataclass(frozen=True)
class Link:
    """A link in its place.

    Args:
        name, script: as in the chain's file.
        folder: of the run; trajectories are written where `settings.data.store` says.
        arguments: of the script.
        settings: what the arguments amount to; of a link that only looks at what another made, that one's settings.
        formats: of the export; None if any will do.
        needs: names of the earlier links that have to be done.
    """

    name: str
    script: str
    folder: Path
    arguments: tuple[str, ...]
    settings: TrainSettings
    formats: tuple[str, ...] | None
    needs: tuple[str, ...]

    @property
    def trains(self) -> bool:
        return self.script == "train"

    @property
    def writes(self) -> bool:
        """Whether it writes a store, which several jobs may do at once."""
        return self.script == "make_trajectories"

    @property
    def progress(self) -> tuple[str, str]:
        """How far it is: a kind of `distill.cluster.progress`, and where to look."""
        if self.writes:
            return "store", self.settings.data.store
        return ("run" if self.trains else "files"), str(self.folder)

    @property
    def reads(self) -> bool:
        """Whether it only looks at what earlier links made: it needs no launcher."""
        return self.script in READERS

    @property
    def export(self) -> Path:
        """The folder of its export."""
        return export_of(self.folder)

    def export_arguments(self) -> tuple[str, ...]:
        """The arguments of distill export: exactly what was trained, for the links that continue from it."""
        formats = () if self.formats is None else (f"formats=[{','.join(self.formats)}]",)
        return (f"run={self.folder}", f"output_dir={self.export}", "dtype=float32", "card_prompts=[]", *formats)

    def made(self) -> bool:
        """Whether its script has nothing left to do."""
        if self.trains:
            return finished(self.folder, self.settings.max_train_steps)
        if self.reads:
            return self._mark.is_file() and self._mark.read_text() == self._seen()
        index = self._index()
        return index is not None and index.complete and index.samples >= (self.settings.data.num_samples or 0)

    def mark(self) -> None:
        """Leaves `DONE` for a link that only looks: it is done until what it looks at, or how it looks, changes."""
        make_folder(self.folder)
        write_atomically(self._mark, self._seen())

    def done(self) -> bool:
        """Whether there is nothing left to do: it is made, and exported as it is."""
        return self.made() and (not self.trains or exported(self.export, self.folder, self.formats or ()))

    def steps(self) -> tuple[int, int]:
        """Steps of the newest checkpoint (shards that are written), and in all; 1 for a link that only looks."""
        if self.reads:
            return int(self.made()), 1
        if self.trains:
            last = self.settings.max_train_steps
            found = Checkpoints(checkpoints_of(self.folder)).found()
            return (last if self.made() else found[0][0] if found else 0), last
        index = self._index()
        return (0, 0) if index is None else (len(index.shards), index.planned_shards)

    def state(self) -> str:
        """`done`, `not started`, or how far it is."""
        at, last = self.steps()
        if self.done():
            return "done"
        if self.made():
            return "to be exported"
        index = None if self.trains or self.reads else self._index()
        if index is not None and index.complete:
            return f"at {index.samples} of {self.settings.data.num_samples} samples"
        return f"at {'step' if self.trains else 'shard'} {at} of {last}" if at else "not started"

    def conflict(self) -> str | None:
        """The setting that was another when this link was made, or begun, in a line; None if all fit.

        More steps, or more samples, are no conflict: they are taken, or written, in addition.
        """
        if self.reads:
            return None
        found = self._run_conflicts() if self.trains else self._store_conflicts()
        if not found:
            return None
        key = chief(found, given_keys(self.arguments))
        where = self.folder if self.trains else self.settings.data.store
        return (
            f"link {self.name}: {where} was made with {key}={found[key][0]!r}, this chain has {found[key][1]!r}: "
            f"choose another output_dir, or the same {key}"
        )

    def _run_conflicts(self) -> Differences:
        if not steps_taken(self.folder):
            return {}
        recorded, wanted = recorded_settings(self.folder), self.settings.model_dump(mode="json")
        found = differences(recorded, wanted, TrainSettings) if recorded else {}
        bound = {key: both for key, both in found.items() if key.partition(".")[0] not in FREE}
        bound.pop("student.prediction", None)  # left open, it is settled by what the student starts from
        if (taken := steps_taken(self.folder)) > self.settings.max_train_steps:
            bound["max_train_steps"] = taken, self.settings.max_train_steps
        return bound

    def _store_conflicts(self) -> Differences:
        index = self._index()
        if index is None:
            return {}
        data = self.settings.data
        found: Differences = {
            f"data.{key}": (getattr(index, key), getattr(data, key))
            for key in ("solver", "solver_steps", "guidance", "dtype", "batch_size", "samples_per_shard")
        }
        found["seed"] = index.seed, self.settings.seed
        if data.num_samples is not None and data.num_samples < index.samples:
            found["data.num_samples"] = index.samples, data.num_samples
        return {key: (before, now) for key, (before, now) in found.items() if before != now}

    @property
    def _mark(self) -> Path:
        return self.folder / "DONE"

    def _seen(self) -> str:
        """A hash of its arguments and of the file that says what it looks at: a store's index, or a run's export's."""
        if self.script == "verify_shards":
            folder, name = self.settings.data.store, INDEX
        else:
            folder, name = str(export_of(Path(self.settings.output_dir))), FACTS
        try:
            facts = Folder(folder).read(name)
        except OSError:
            facts = b""
        return hashlib.sha256("\0".join(self.arguments).encode() + facts).hexdigest() + "\n"

    def _index(self) -> StoreIndex | None:
        try:
            return read_index(Folder(self.settings.data.store))
        except StoreError:
            return None


def exported(export: Path, run: Path, formats: Sequence[str] = ()) -> bool:
    """Whether what a finished run has come to is exported to a folder, completely and in these formats at least: its
    last step, or the best of a run that chooses it."""
    try:
        facts = json.loads((export / FACTS).read_text())
        complete = all((export / path).stat().st_size == size for path, size in facts["files"].items())
        chooses = recorded_settings(run).get("best", {}).get("choose", False)
        step = best_of(checkpoints_of(run)) if chooses else None
        newest = facts["step"] == (steps_done(run) if step is None else step)
    except (OSError, ValueError, KeyError):
        return False
    return complete and newest and set(map(format_named, formats)) <= set(map(format_named, facts["formats"]))


def export_of(folder: Path) -> Path:
    """Where the export of the run in `folder` is put."""
    return folder / "export"


def links_of(chain: ChainSettings, output_dir: str | Path, overrides: Sequence[str] = ()) -> list[Link]:
    """The links of a chain, all their settings checked.

    A link that trains or verifies reads the store of the last link before it that writes one. `overrides` come after a
    link's own, and are for the links with the chain's experiment alone: for those of them that read the key.

    Raises:
        ConfigError: one line about the first link whose settings are wrong, or about an override that no link reads.
    """
    links: list[Link] = []
    for settings in chain.links:
        if settings.script in READERS:
            links.append(_reader(settings, Path(output_dir), links))
        else:
            links.append(_link(settings, chain.experiment, Path(output_dir), overrides, links))
    _check_read(links, overrides)
    return links


def one_of(links: Sequence[Link], name: str) -> Link:
    """The link of that name, if it can be run.

    Raises:
        ConfigError: there is none, or one that it builds on is not done, or was made with other settings.
    """
    by_name = {link.name: link for link in links}
    if name not in by_name:
        raise ConfigError(f"link={name}: no such link; allowed: {', '.join(by_name)}")
    for other in (*by_name[name].needs, name):
        if conflict := by_name[other].conflict():
            raise ConfigError(conflict)
    if missing := [other for other in by_name[name].needs if not by_name[other].done()]:
        raise ConfigError(f"link={name} builds on {missing[0]}, which is {by_name[missing[0]].state()}, not done")
    return by_name[name]


def seconds_left(links: Sequence[Link]) -> float | None:
    """An estimate of the training that is left, by the pace of the links that have trained; None before any has."""
    paces = [pace for link in links if link.trains and (pace := _step_seconds(link.folder))]
    steps = sum(last - at for at, last in (link.steps() for link in links if link.trains))
    return steps * sum(paces) / len(paces) if paces else None


def _link(link: LinkSettings, experiment: str, root: Path, overrides: Sequence[str], before: Sequence[Link]) -> Link:
    folder = root / link.name
    stores = [other for other in before if other.script == "make_trajectories"]
    store = folder if link.script == "make_trajectories" else stores[-1].folder if stores else None
    given = {"teacher": link.teacher, "start": link.start}
    arguments = (
        f"experiment={experiment}",
        *([] if store is None else [f"data.store={store}"]),
        *link.overrides,
        *map(for_any, overrides),
        f"output_dir={folder}",
        *(f"{key}={export_of(root / name)}" for key, name in given.items() if name is not None),
    )
    try:
        settings = load("train", TrainSettings, arguments)
        if link.script == "train":
            check_formats(settings, link.export)
    except ConfigError as error:
        raise ConfigError(f"link {link.name}: {error}") from None
    looked = [*stores, *(other for other in before if other.script == "verify_shards")]
    read = [other.name for other in looked if other.settings.data.store == settings.data.store]
    return Link(
        name=link.name,
        script=link.script,
        folder=folder,
        arguments=arguments,
        settings=settings,
        formats=None if link.export is None else tuple(link.export),
        needs=tuple(dict.fromkeys([*read, *(name for name in given.values() if name is not None)])),
    )


def _check_read(links: Sequence[Link], overrides: Sequence[str]) -> None:
    """Raises ConfigError for an override of all links that certainly none of them reads, whatever it trains."""
    reasons = [unread(link.settings, link.settings.networks) for link in links if link.trains]
    for key in given_keys(overrides, for_any=False):
        if reasons and all(key in found for found in reasons):
            raise ConfigError(f"overrides: {key} is set, and has no effect in any link: {reasons[0][key]}")


def _reader(link: LinkSettings, root: Path, before: Sequence[Link]) -> Link:
    """A link that looks at what an earlier one made."""
    folder = root / link.name
    if link.script == "verify_shards":
        at = [other for other in before if other.script == "make_trajectories"][-1]
        arguments: tuple[str, ...] = (at.settings.data.store,)
    else:
        at = next(other for other in before if other.name == link.run)
        what = "student" if link.script == "evaluate" else "run"
        arguments = (f"{what}={at.folder}", *link.overrides, f"output_dir={folder}")
        try:
            load(link.script, EvaluateSettings if link.script == "evaluate" else SampleSettings, arguments)
        except ConfigError as error:
            raise ConfigError(f"link {link.name}: {error}") from None
    return Link(link.name, link.script, folder, arguments, at.settings, formats=None, needs=(at.name,))


def _step_seconds(run: Path) -> float | None:
    """Seconds of the last step that a run has logged."""
    try:
        lines = reversed((run / "metrics.jsonl").read_text().splitlines())
        return float(next(json.loads(line)["step_seconds"] for line in lines if '"step_seconds"' in line))
    except (OSError, ValueError, StopIteration):
        return None
