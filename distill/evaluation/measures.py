"""What is measured of pictures: how each is called, written and drawn, and which way is better. Tables, curves and the
choice of a best checkpoint take it from here."""

from __future__ import annotations

from typing import Literal, NamedTuple

ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
LEGEND = "↑ higher is better, ↓ lower is better."


class Measure(NamedTuple):
    """A row's number.

    `heading` of its column and `title` of its curves, `pattern` its format; `better` is None where neither way is.
    """

    heading: str
    pattern: str
    better: Literal["higher", "lower"] | None
    title: str = ""
    logarithmic: bool = False

    @property
    def column(self) -> tuple[str, str]:
        """Heading and format, as tables take them."""
        return self.heading + ARROWS[self.better], self.pattern

    @property
    def curve(self) -> str:
        """The title of its curves."""
        return (self.title or self.heading) + ARROWS[self.better]


MEASURES = {  # by row key
    "caption_accuracy": Measure("captions right", "{:.3f}", "higher"),
    "frechet": Measure("Fréchet", "{:.3f}", "lower", "Fréchet distance", logarithmic=True),
    "sharpness": Measure("sharpness", "{:.2f}", None),
    "diversity": Measure("diversity", "{:.2f}", None),
    "fid": Measure("FID", "{:.2f}", "lower", logarithmic=True),
    "fid_patch": Measure("FID-patch", "{:.2f}", "lower", logarithmic=True),
    "clip_score": Measure("CLIP score", "{:.2f}", "higher"),
    "aesthetic": Measure("aesthetic", "{:.2f}", "higher", "aesthetic score"),
    "image_reward": Measure("ImageReward", "{:.3f}", "higher"),
    "hps": Measure("HPS", "{:.2f}", "higher"),
    "pickscore": Measure("PickScore", "{:.2f}", "higher"),
    "reward": Measure("reward", "{:.2f}", "higher"),
    "teacher_consistency": Measure("from teacher", "{:.4f}", "lower", "distance from the teacher", logarithmic=True),
    "stored_consistency": Measure("from stored ends", "{:.4f}", "lower", "distance from stored ends", logarithmic=True),
    "stored_cosine": Measure("cosine with them", "{:.4f}", "higher", "cosine with stored ends"),
    "difference": Measure("RMSE from reference", "{:.4f}", "lower"),
    "style": Measure("style", "{:.3f}", "higher"),
    "follows": Measure("follows", "{:.3f}", "higher"),
}
DRAWN = [key for key, measure in MEASURES.items() if measure.better is not None]
"""Those that curves are drawn of, and that a best one can be chosen by."""
