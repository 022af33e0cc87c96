"""Code from elsewhere: a package of somebody's own gives a method, which trains, exports and samples."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distill.commands import evaluate
from distill.config import components
from distill.config.components import OTHERS, check_component
from distill.config.loading import ConfigError, load
from distill.config.settings import EvaluateSettings, SampleSettings, TrainSettings
from distill.diffusion.noise import Noise
from distill.diffusion.registry import import_plugins
from distill.diffusion.samplers import SAMPLERS
from distill.diffusion.schedule import NoiseSchedule
from distill.evaluation.compare import Setting
from distill.evaluation.metrics import METRICS, plotted
from distill.evaluation.protocol import Captions, Protocol, build_scorer
from distill.evaluation.report import format_table
from distill.methods.lcm import LCM
from distill.methods.sampling import sample
from distill.models.families.teacher import Teacher
from distill.models.schedulers import scheduler_settings
from distill.training.helpers import check_helpers, helpers_of
from tests.analytic import three_peaks
from tests.forked import python

ROOT = Path(__file__).parents[1]
SCHEDULE = NoiseSchedule.scaled_linear()
METHOD = '''
from __future__ import annotations

from collections.abc import Iterable

from distill import Batch, Losses, Method, NoiseSchedule, Turn
from distill.diffusion.losses import l2
from distill.diffusion.trajectory import Pair, Reads


class Mine(Method):
    """x_T to x_0 in one jump."""

    title = "Mine"

    def __init__(self, schedule: NoiseSchedule, weight: float = 1.0) -> None:
        self.schedule, self.weight = schedule, weight

    def reads(self, step: int = 0) -> Reads:
        return Pair(skip=self.schedule.T)

    def turns(self, step: int) -> Iterable[Turn]:
        return (Turn("student", self.loss),)

    def loss(self, networks, batch: Batch, context) -> Losses:
        step = batch.transition()
        loss = self.weight * l2(networks["student"](step.x_t, step.t, batch.conditioning).x0, step.x_s).mean()
        return Losses(loss, {"loss": loss.detach()})
'''
METADATA = "Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """As pip installs it: a module, and metadata with an entry point."""
    site = tmp_path / "site"
    (site / "elsewhere").mkdir(parents=True)
    (site / "elsewhere/__init__.py").write_text(METHOD)
    info = site / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text("[distill.plugins]\nelsewhere = elsewhere\n")
    return site


def ran(site: Path, folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{site}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    command = [python(), "-m", "distill", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_a_method_of_another_package_trains_exports_and_samples(package: Path, tmp_path: Path) -> None:
    toy = ["experiment=quickstart", "engine=single", f"data.store={tmp_path}/store", "data.num_samples=8"]
    toy += ["data.samples_per_shard=8", "data.solver_steps=10", "global_batch_size=4", "max_train_steps=2"]
    toy += ["lr_warmup_steps=0", "dataloader_num_workers=0", "validation_prompts=null"]
    (tmp_path / "configs/method").mkdir(parents=True)
    (tmp_path / "configs/method/mine.yaml").write_text("_target_: elsewhere.Mine\nweight: 0.5\n")
    for arguments in (
        ["trajectories", *toy],
        ["train", *toy, "method=mine", f"output_dir={tmp_path}/run"],
        ["export", f"run={tmp_path}/run", f"output_dir={tmp_path}/lora", "card_prompts=[]"],
        ["sample", f"run={tmp_path}/run", "prompts=[a]", "steps=[1]", f"output_dir={tmp_path}/pictures"],
    ):
        done = ran(package, tmp_path, *arguments)
        assert done.returncode == 0, (arguments[0], done.stderr[-2000:])
    assert "Method: Mine" in (tmp_path / "lora/README.md").read_text()
    assert (tmp_path / "pictures/grid.png").is_file()


def test_recorded_settings_name_no_package_that_nobody_has_allowed(package: Path, tmp_path: Path) -> None:
    """The package is installed, and says nothing of itself: on a command line it is named, from a run's folder not."""
    (package / "elsewhere-1.0.dist-info/entry_points.txt").unlink()
    given = ["train", "experiment=quickstart", "method._target_=elsewhere.Mine", "~method.skip", "--cfg"]
    given += ["~method.source", "~method.target", "~method.loss", "~method.huber_c"]
    done = ran(package, tmp_path, *given)
    assert done.returncode == 0 and "_target_: elsewhere.Mine" in done.stdout, done.stderr
    (tmp_path / "settings.yaml").write_text(done.stdout)
    recorded = ["train", f"settings={tmp_path}/settings.yaml", "--cfg"]
    done = ran(package, tmp_path, *recorded)
    assert done.returncode == 2 and "DISTILL_TARGETS=PACKAGE allows" in done.stderr and done.stderr.count("\n") == 1
    assert ran(package, tmp_path, *recorded, DISTILL_TARGETS="elsewhere").returncode == 0


def test_an_optimizer_of_another_package_is_checked_against_its_signature(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv(OTHERS, "")
    given = ["data.store=s", "optimizer._target_=transformers.optimization.Adafactor"]
    with pytest.raises(ConfigError, match="Adafactor|unknown key|fused"):
        components.check_component(dict(load("train", TrainSettings, [*given, "optimizer.fuse=true"]).optimizer))


SAMPLER = """
from distill.diffusion.samplers import SAMPLERS, Sampler


def halfway(denoiser, schedule, x, times, conditioning, generators):
    for t, s in zip(times, times[1:]):
        x = x / 2
        yield s, x


SAMPLERS.register(Sampler("halfway", "for a test", "elsewhere.halfway", {"trailing": None}, solves=True))
"""


@pytest.fixture
def plugged(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package is installed and says nothing yet; what it registers is forgotten afterwards."""
    monkeypatch.syspath_prepend(package)
    import_plugins.cache_clear()
    yield package / "elsewhere/__init__.py"
    import_plugins.cache_clear()
    SAMPLERS._records.pop("halfway", None)
    METRICS._records.pop("redness", None)
    sys.modules.pop("elsewhere", None)


def test_a_sampler_of_another_package_is_known_by_its_name(plugged: Path) -> None:
    plugged.write_text(SAMPLER)
    given = ["model=toy", "prompts=[a]", "output_dir=pictures"]
    assert load("sample", SampleSettings, [*given, "sampler=halfway", "spacing=trailing"]).sampler == "halfway"
    assert load("train", TrainSettings, ["data.store=s", "data.solver=halfway"]).data.solver == "halfway"
    noise = torch.full((1, 2, 2, 2), 8.0)
    pictures = sample(three_peaks(SCHEDULE), SCHEDULE, noise, [1000, 500, 0], {}, "halfway")
    assert torch.equal(pictures, noise / 4)
    assert Setting("student", "halfway", 3).nfe == 3
    with pytest.raises(ValueError, match="^sampler 'halfway' has no scheduler in diffusers at spacing 'trailing'$"):
        scheduler_settings(Noise(), "halfway", "trailing")
    with pytest.raises(ConfigError, match="sampler 'half' is not known; allowed: lcm, .*, dpmpp_2m, halfway$"):
        load("sample", SampleSettings, [*given, "sampler=half"])


METRIC = """
import torch

from distill.evaluation.metrics import METRICS, Metric


class Redness:
    name = "redness 1"

    def measure(self, images, prompts):
        return {"redness": images[:, 0].flatten(1).mean(1).double()}

    def summarise(self, measured):
        return {"redness": float(measured["redness"].mean())}


def load(sources):
    assert sources.path("redness") == "file"
    return Redness()


METRICS.register(Metric("redness", "redness", 1, "higher", load="elsewhere.load", weights=("redness",)))
"""


def test_a_metric_of_another_package_is_measured_and_has_its_column(plugged: Path, tmp_path: Path) -> None:
    plugged.write_text(METRIC)
    given = ["protocol=coco2014-10k", "protocol.prompts=p", "protocol.metrics=[redness]", "weights.redness=file"]
    cfg = load("evaluate", EvaluateSettings, [*given, "output_dir=o"])
    evaluate.check_metrics(cfg.protocol, cfg.weights)
    with pytest.raises(ConfigError, match="^weights.rednes is of no metric.*'redness'.*; allowed: features, inc"):
        evaluate.check_metrics(cfg.protocol, {"rednes": "file"})
    protocol = Protocol("mine", "nobody", 2, 8, None, False, None, None, None, "", ("redness",))
    scorer = build_scorer(protocol, Captions(["a", "b"]), cfg.weights, tmp_path, "cpu")
    measured = scorer.measure(torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8), ["a", "b"])
    row = {"model": "student"} | scorer.summarise(measured, "report")
    assert row["redness"] == pytest.approx(0.75, abs=0.01)
    assert format_table([row]).splitlines()[0] == "| model   | redness ↑ |" and "redness" in plotted()


def test_a_plug_in_that_cannot_be_imported_is_one_line(plugged: Path) -> None:
    plugged.write_text("import no_such_package")
    with pytest.raises(ValueError, match=r"^the plug-in elsewhere \(elsewhere\) cannot be imported: ModuleNotFound"):
        SAMPLERS.find("halfway")


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "torch.load", "distill.commands.train.main", "x"])
def test_what_acts_on_its_arguments_stays_out(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OTHERS, "")
    with pytest.raises(ConfigError, match="is not one of distill.methods"):
        load("train", TrainSettings, ["data.store=s", f"method._target_={path}"])
    with pytest.raises(ValueError, match="is not one of"):
        check_component({"_target_": path})


class Likeness(torch.nn.Module):
    """A helper as somebody else may bring one: it wants the teacher, for its autoencoder."""

    def __init__(self, teacher: Teacher, scale: float = 1.0) -> None:
        super().__init__()
        self.vae, self.scale = teacher.vae, scale


class Asking(LCM):
    """A method that asks for it."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__(schedule)
        self.requires += ("likeness",)


def test_a_helper_of_another_package_is_built_for_a_method_that_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OTHERS, "tests")
    given = ["experiment=quickstart", "data.store=s", f"helpers.likeness._target_={__name__}.Likeness"]
    cfg, method = load("train", TrainSettings, [*given, "helpers.likeness.scale=2.5"]), Asking(SCHEDULE)
    check_helpers(cfg, method)
    (likeness,) = helpers_of(cfg, method).values()
    assert isinstance(likeness, Likeness) and likeness.scale == 2.5 and hasattr(likeness.vae, "decode")
    with pytest.raises(ConfigError, match="^helpers.likeness is set, and the method uses none"):
        check_helpers(cfg, LCM(SCHEDULE))
    with pytest.raises(
        ConfigError, match="requires a likeness, and there is no likeness: set helpers.likeness._target_="
    ):
        check_helpers(load("train", TrainSettings, given[:2]), method)
    with pytest.raises(ConfigError, match="unknown key 'helpers.likeness.size'.*allowed: .*likeness.scale$"):
        load("train", TrainSettings, [*given, "+helpers.likeness.size=1"])
