"""Sizes of images as a teacher can have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distill.config.loading import ConfigError
from distill.config.settings import DataSettings
from distill.data.sizes import ImageSize, read_sizes, square
from distill.models.families.teacher import Teacher


def latent_shape(teacher: Teacher, size: ImageSize | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images of a size; without one, of the teacher's own."""
    C, side, _ = teacher.latent_shape
    return teacher.latent_shape if size is None else size.shape(C, teacher.resolution // side)


def require_sizes(teacher: Teacher, sizes: Iterable[ImageSize]) -> None:
    """Refuses sizes that a teacher cannot have, or not in one run.

    Raises:
        ValueError: a side that its networks cannot halve as often as they do; or its noise schedule depends on the
            size, and a run has one.
    """
    for size in sizes:
        for side in size:
            try:
                found = teacher.at_resolution(side)
            except ValueError as error:
                raise ValueError(f"{size} is no size for {teacher.teacher_id}: {error}") from None
            if found.schedule.fingerprint != teacher.schedule.fingerprint:
                raise ValueError(
                    f"the noise schedule of {teacher.teacher_id} depends on the size of its images, and a run has one "
                    f"schedule: fix its shift (model.shift), or leave out {size} and set model.resolution alone"
                )


def chosen_sizes(data: DataSettings, teacher: Teacher) -> tuple[ImageSize, ...]:
    """The sizes that the settings list; none where that is the teacher's square alone, or prompts have their own.

    Raises:
        ConfigError: `data.size_weights` without sizes that they could be of.
        ValueError: see `require_sizes`.
    """
    listed, weights = isinstance(data.sizes, list), data.size_weights
    if weights is not None and (not listed or len(weights) != len(data.sizes or ())):
        raise ConfigError(f"data.size_weights has {len(weights)} numbers: set one for each size that data.sizes lists")
    if not listed:
        return ()
    return settled(read_sizes(data.sizes or ()), teacher)


def settled(sizes: Sequence[ImageSize], teacher: Teacher) -> tuple[ImageSize, ...]:
    """Sizes that the teacher can have; none where they are its own square alone, as stores of before have it."""
    require_sizes(teacher, sizes)
    return () if list(sizes) == [square(teacher.resolution)] else tuple(sizes)
