"""The earlier place of `distill.config.settings`, whose names programs of before know it by."""

from distill.config.settings import (
    DataSettings,
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    PlanSettings,
    SampleSettings,
    SubmitSettings,
    TrainSettings,
)

__all__ = [
    "DataSettings",
    "EvaluateSettings",
    "ExportSettings",
    "ModelSettings",
    "PlanSettings",
    "SampleSettings",
    "SubmitSettings",
    "TrainSettings",
]
