"""The earlier place of `distill.config.loading`, whose names programs of before know it by."""

from distill.config.loading import CONFIGS, ConfigError, Settings, build, check_component, checking, load, read_settings

__all__ = ["CONFIGS", "ConfigError", "Settings", "build", "check_component", "checking", "load", "read_settings"]
