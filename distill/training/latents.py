"""Clean latents for the store: pictures and captions in, the autoencoder's latents at time 0 out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from distill.data.images import Listing, shown
from distill.data.index import StorePlan
from distill.data.pictures import BadPicture, Square, cut_square
from distill.data.writer import Partly
from distill.diffusion.random import generator, seed_of
from distill.diffusion.trajectory import Trajectory
from distill.models.families.teacher import Teacher
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
        """The latents of samples `indices`, one for each caption; pictures that cannot be decoded are skipped."""
        squares, skipped = {}, {}
        for i, found in zip(indices, self.squares(indices), strict=True):
            if isinstance(found, BadPicture):
                skipped[i] = shown(f"{self.listing.pictures[i].name}: {found}")
            else:
                squares[i] = found
        texts = [text for i, text in zip(indices, captions, strict=True) if i in squares]
        return Partly(self._encode(squares, texts) if squares else None, skipped)

    def _encode(self, squares: Mapping[int, Square], captions: Sequence[str]) -> Trajectory:
        """One state, at time 0, for each of the squares by sample number."""
        plan, teacher = self.plan, self.teacher
        noise = [torch.randn(teacher.latent_shape, generator=generator(plan.seed, "posterior", i)) for i in squares]
        pictures = torch.stack([square.pixels for square in squares.values()])  # [B, 3, H, W]
        latents = teacher.encode_pictures(pictures.to(self.device), torch.stack(noise))  # [B, C, h, w]

        originals = [square.original for square in squares.values()]
        corners = [square.corner for square in squares.values()]
        sizes = teacher.family.sizes(originals, corners, (plan.resolution, plan.resolution))
        return Trajectory(
            states=latents[:, None],
            times=plan.times,
            conditioning=stored(teacher.encode(captions) | sizes, plan.dtype),
            guidance=torch.tensor([plan.guidance_of(i) for i in squares]),
            seeds=tuple(seed_of(plan.seed, "posterior", i) for i in squares),
        )

    def squares(self, indices: Sequence[int]) -> list[Square | BadPicture]:
        """What the autoencoder sees of these pictures; several are decoded at once."""
        with ThreadPoolExecutor(min(len(indices), os.cpu_count() or 1)) as pool:
            return list(pool.map(self._square, indices, self.listing.read(indices)))

    def _square(self, i: int, data: bytes | BadPicture) -> Square | BadPicture:
        if isinstance(data, BadPicture):
            return data
        random = generator(self.plan.seed, "crop", i) if self.plan.crop == "random" else None
        try:
            return cut_square(data, self.plan.resolution, random)
        except BadPicture as error:
            return error
