"""The trajectory store: written once by a teacher, read by every method (see `writer`, `reader` and `loader`)."""
