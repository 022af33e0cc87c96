"""Clean latents for the store: pictures and captions in, the autoencoder's latents at time 0 out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from distill.data.images import Listing, shown
from distill.data.index import StorePlan
from distill.data.pictures import BadPicture, CutPicture, cut_picture
from distill.data.sizes import ImageSize, nearest
from distill.data.writer import Partly
from distill.diffusion.random import generator, seed_of
from distill.diffusion.trajectory import Trajectory
from distill.models.families.teacher import Teacher
from distill.training.sizes import latent_shape
from distill.training.trajectories import stored


@dataclass(frozen=True)
class LatentEncoder:
    """Encodes pictures as a plan says: what is random in sample i, its crop and its latent, depends on (seed, i) alone.

    Args:
        teacher: with its autoencoder and text encoders, on `device`.
        plan: the store's.
        listing: its pictures; sample i is picture i.
    """

    teacher: Teacher
    plan: StorePlan
    listing: Listing
    device: torch.device | str

    @torch.no_grad()
    def __call__(self, indices: Sequence[int], captions: Sequence[str]) -> Partly:
        """The latents of samples `indices`, all of one size, one for each caption; pictures that cannot be decoded are
        skipped.
        """
        size = self.plan.image_sizes[self.size_of(indices[0])]
        parts, skipped = {}, {}
        for i, found in zip(indices, self.parts(indices, size), strict=True):
            if isinstance(found, BadPicture):
                skipped[i] = shown(f"{self.listing.pictures[i].name}: {found}")
            else:
                parts[i] = found
        texts = [text for i, text in zip(indices, captions, strict=True) if i in parts]
        return Partly(self._encode(parts, size, texts) if parts else None, skipped)

    def size_of(self, i: int) -> int:
        """Which of the plan's sizes picture i is cut to."""
        sizes = self.plan.image_sizes
        return nearest(self.listing.pictures[i].size_in_pixels, sizes) if len(sizes) > 1 else 0

    def _encode(self, parts: Mapping[int, CutPicture], size: ImageSize, captions: Sequence[str]) -> Trajectory:
        """One state, at time 0, for each of the parts of pictures by sample number."""
        plan, teacher, shape = self.plan, self.teacher, latent_shape(self.teacher, size)
        noise = [torch.randn(shape, generator=generator(plan.seed, "posterior", i)) for i in parts]
        pictures = torch.stack([part.pixels for part in parts.values()])  # [B, 3, H, W]
        latents = teacher.encode_pictures(pictures.to(self.device), torch.stack(noise))  # [B, C, h, w]

        originals = [part.original for part in parts.values()]
        corners = [part.corner for part in parts.values()]
        sizes = teacher.family.sizes(originals, corners, size)
        return Trajectory(
            states=latents[:, None],
            times=plan.times,
            conditioning=stored(teacher.encode(captions) | sizes, plan),
            guidance=torch.tensor([plan.guidance_of(i) for i in parts]),
            seeds=tuple(seed_of(plan.seed, "posterior", i) for i in parts),
        )

    def parts(self, indices: Sequence[int], size: ImageSize) -> list[CutPicture | BadPicture]:
        """What the autoencoder sees of these pictures; several are decoded at once."""
        with ThreadPoolExecutor(min(len(indices), os.cpu_count() or 1)) as pool:
            return list(pool.map(partial(self._part, size), indices, self.listing.read(indices)))

    def _part(self, size: ImageSize, i: int, data: bytes | BadPicture) -> CutPicture | BadPicture:
        if isinstance(data, BadPicture):
            return data
        random = generator(self.plan.seed, "crop", i) if self.plan.crop == "random" else None
        try:
            return cut_picture(data, size, random)
        except BadPicture as error:
            return error
