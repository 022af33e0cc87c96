"""What is typed is what is set: texts and paths with any characters, and lists, numbers and groups beside them."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import yaml

from distill.config.loading import ConfigError, load, read_settings
from distill.config.settings import EvaluateSettings, SampleSettings, TrainSettings
from distill.evaluation.metrics import known_weights

GIVEN = ["output_dir=runs/a", "data.store=store"]
ODD = [
    "été",
    "実験",
    "lr=1e-4",
    "lr=1e-4(1)",
    "run(1)",
    "a#b",
    "it's",
    'the "new" one',
    "61e4567",
    "007",
    "1e5",
    "1_000",
    "2024",
    "true",
    "nan",
    ".5",
    "2024-01-01",
    "a b  c",
    "a, b",
    "a,b",
    "a:b",
    "a: b",
    "-",
    "- a",
    "@a",
    "%",
    "!tag",
    "&x",
    "*",
    "?",
    "|",
    ">",
    "a\\b",
    "a\\(b\\)",
    "{a}",
    "{a: b",
    "[a",
    "a]",
    "choice(1,2)",
    "range(1,3)",
    "glob(*)",
    "$HOME",
    "$",
    "a$b{c}",
    "a=b=c",
    "=",
    "x;y",
    "`id`",
    "a\tb",
    "🙂",
    "'a",
    "a'",
    "'a' and 'b'",
    '"',
    "''a''b",
]
TEXTS = {
    "output_dir": lambda s: s.output_dir,
    "data.store": lambda s: s.data.store,
    "model.revision": lambda s: s.model.revision,
    "validation_prompts": lambda s: s.validation_prompts,
    "resume_from_checkpoint": lambda s: s.resume_from_checkpoint,
}
FOREIGN = re.compile(
    r"lexer|antlr|mismatched|token|pydantic|omegaconf|hydra|override|sweep|interpolation|struct|input should|exception",
    re.IGNORECASE,
)


@pytest.mark.parametrize("text", ODD)
def test_a_text_is_taken_as_it_was_written(text: str) -> None:
    keys = ["output_dir", "data.store", "model.revision"]
    entry = "'" + text.replace("'", "\\'") + "'"
    settings = load("train", TrainSettings, [*(f"{key}={text}" for key in keys), f"validation_prompts=[{entry}, b]"])
    assert [TEXTS[key](settings) for key in keys] == [text] * len(keys)
    assert settings.validation_prompts == [text, "b"]


@pytest.mark.parametrize(
    "written, text",
    [
        ("'a b'", "a b"),
        ('"a b"', "a b"),
        ("'it\\'s'", "it's"),
        ("'null'", "null"),
        ("'12'", "12"),
        (" a ", "a"),
        ("' a '", " a "),
        ("runs/${seed}", "runs/0"),
        ("runs/${data.segments}/x", "runs/8/x"),
    ],
)
def test_quotes_around_the_whole_are_left_out_and_keys_are_filled_in(written: str, text: str) -> None:
    assert load("train", TrainSettings, [*GIVEN, f"output_dir={written}"]).output_dir == text


def test_no_words_of_another_program_are_said_of_any_value() -> None:
    rng, taken = random.Random(0), 0
    alphabet = "ab1,.:;=()[]{}'\"\\#$%&@!?*|<>~` \té実🙂-+e"
    others = ["max_train_steps", "learning_rate", "data.keep", "preemption_signals", "method.skip", "method"]
    for _ in range(80):
        texts = {key: "".join(rng.choices(alphabet, k=rng.randint(1, 12))) for key in [*TEXTS, rng.choice(others)]}
        for given in ({key: texts[key] for key in TEXTS}, {key: texts[key] for key in texts if key in others}):
            try:
                settings = load("train", TrainSettings, [*GIVEN, *(f"{key}={text}" for key, text in given.items())])
            except ConfigError as error:
                line = str(error)
                assert any(key.rpartition(".")[2] in line for key in given) and "\n" not in line, (given, line)
                for text in given.values():
                    line = line.replace(text, "")
                assert not FOREIGN.search(line), (given, line)
                continue
            for key in given.keys() & TEXTS.keys():
                whole, found = given[key].strip(), TEXTS[key](settings)
                if whole and whole[0] not in "[~'\"":
                    taken += 1
                    assert found == (int(whole) if isinstance(found, int) else whole)
    assert taken > 50  # most values of texts are taken


def test_entries_of_lists_of_texts_are_texts() -> None:
    written = "validation_prompts=[it's a cat, a (really, big) dog, 1984, 'one, two', \"x\", null-ish]"
    expected = ["it's a cat", "a (really, big) dog", "1984", "one, two", "x", "null-ish"]
    assert load("train", TrainSettings, [*GIVEN, written]).validation_prompts == expected


def test_what_a_constructor_takes_may_be_set_though_no_file_lists_it() -> None:
    settings = load("train", TrainSettings, [*GIVEN, "method.w_min=3", "optimizer.foreach=false"])
    assert settings.method["w_min"] == 3 and settings.optimizer["foreach"] is False


def test_values_read_by_their_types_stay_what_they_are() -> None:
    more = ["steps=[2,4]", "guidance=1.5", "prompts=[a, b]", "output_dir=o", "negative_prompt=null", "lora=e"]
    sample = load("sample", SampleSettings, more)
    assert (sample.steps, sample.guidance, sample.prompts, sample.negative_prompt) == ([2, 4], 1.5, ["a", "b"], None)
    more = ["resume_from_checkpoint=12", "engine.stages={discriminator: 2}", "validation_reward=toy", "ema_decay=null"]
    settings = load("train", TrainSettings, [*GIVEN, *more])
    assert settings.resume_from_checkpoint == 12 and settings.engine["stages"] == {"discriminator": 2}
    assert settings.validation_reward is not None and settings.ema_decay is None


# ---- paths ----------------------------------------------------------------------------------------------------------

PATHS = ["output_dir", "data.store", "data.prompts", "teacher", "start", "model.pretrained_model_name_or_path"]
PATHS += ["validation_prompts", "resume_from_checkpoint"]


def test_the_home_folder_is_filled_in_for_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/some one")
    arguments = [f"{key}=~/x y" for key in PATHS]
    found = load("train", TrainSettings, [*arguments, "reward=hps", "reward.path=~/x y"]).model_dump()
    values = [
        found["data"][key[5:]] if key.startswith("data.") else found.get(key) for key in PATHS if "model" not in key
    ]
    values += [found["model"]["pretrained_model_name_or_path"], found["reward"]["path"]]
    assert values == ["/home/some one/x y"] * (len(PATHS) + 1)
    given = [f"weights.{name}=~/w" for name in known_weights()]
    assert set(load("evaluate", EvaluateSettings, [*given, "output_dir=o"]).weights.values()) == {"/home/some one/w"}


@pytest.mark.parametrize("path", ["s3://bucket/~x/store", "runs/a", "./~x", "organisation/name", "/a/../b", "~"])
def test_other_paths_stay_as_they_were_written(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "~")
    assert (
        load("train", TrainSettings, ["output_dir=o", f"data.store={path}"]).data.store == path if path != "~" else True
    )


def test_an_unknown_home_and_an_empty_path_are_one_line_each() -> None:
    for value, said in (("~nobody_here/x", "./~nobody_here/x"), ("", "is no path")):
        with pytest.raises(ConfigError, match="output_dir: ") as error:
            load("train", TrainSettings, ["data.store=s", f"output_dir={value}"])
        assert said in str(error.value)


def test_a_path_object_is_a_path() -> None:
    settings = load("train", TrainSettings, GIVEN).model_dump() | {"output_dir": Path("runs/b")}
    assert TrainSettings.model_validate(settings).output_dir == "runs/b"


def test_odd_paths_are_read_back_from_a_file_of_settings(tmp_path: Path) -> None:
    loaded = load("train", TrainSettings, GIVEN)
    for text in ODD:
        settings = loaded.model_copy(update={"output_dir": text, "validation_prompts": [text]})
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        assert read_settings(tmp_path / "config.yaml", TrainSettings) == settings


# ---- experiments and other methods ----------------------------------------------------------------------------------


def test_an_experiments_values_for_its_method_are_left_out_with_another_and_that_is_said() -> None:
    notes: list[str] = []
    settings = load("train", TrainSettings, [*GIVEN, "experiment=quickstart", "method=mlcm"], note=notes.append)
    assert "skip" not in settings.method and settings.lora_rank == 32
    assert notes == ["experiment=quickstart sets method.skip for method=lcm: left out with method=mlcm"]
    own = load("train", TrainSettings, [*GIVEN, "experiment=quickstart", "method=lcm"], note=notes.append)
    assert own.method["skip"] == 200 and len(notes) == 1
    given = [*GIVEN, "experiment=quickstart", "method=lcm_noised", "method.skip=50"]
    assert load("train", TrainSettings, given).method["skip"] == 50


@pytest.mark.parametrize(("experiment", "lowest"), [("lcm_sd15", 6.0), ("lcm_lora_sdxl", 4.0), ("lcm_ssd1b", 4.0)])
def test_the_noised_recipe_has_the_guidance_of_its_teachers_family(experiment: str, lowest: float) -> None:
    given = [f"experiment={experiment}", "data.store=s", "method=lcm_noised"]
    settings = load("train", TrainSettings, given)
    assert (settings.method["w_min"], settings.method["w_max"]) == (lowest, 16.0)
    assert load("train", TrainSettings, [*given, "method.w_min=2"]).method["w_min"] == 2
