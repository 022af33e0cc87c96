"""Timings and memory, as ratios of two things in one run."""
