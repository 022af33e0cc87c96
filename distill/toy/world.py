"""A procedural world of captioned pictures: few captions, many pictures for each of them.

A caption names a colour and a pattern ("red stripes"). Everything else is left to chance: light or dark background,
angle, phase, period, centres, positions, number. One caption thus stands for a wide, sharp, multi-modal distribution
of pictures, which is what few-step sampling by averaging gets visibly wrong.

Pictures are float32 [B, 3, 32, 32] in [-1, 1]. They are a pure function of the labels and of the generator's state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 32
COLOURS: dict[str, tuple[float, float, float]] = {  # RGB in [0, 1], all of middling brightness
    "red": (0.88, 0.12, 0.14),
    "orange": (0.95, 0.58, 0.10),
    "green": (0.14, 0.66, 0.24),
    "blue": (0.16, 0.36, 0.94),
    "purple": (0.66, 0.22, 0.80),
}
PATTERNS: tuple[str, ...] = ("stripes", "rings", "dots", "checks")
CAPTIONS: tuple[str, ...] = tuple(f"{colour} {pattern}" for colour in COLOURS for pattern in PATTERNS)

_LABELS = {caption: label for label, caption in enumerate(CAPTIONS)}
_MAX_DOTS = 5
_DOT_TRIES = 16


@dataclass(frozen=True)
class Scene:
    """What chance decided, one entry a picture. Lengths are in pixels, angles in radians."""

    labels: Tensor  # [B] long
    dark: Tensor  # [B] bool, dark background
    foreground: Tensor  # [B, 3] in [0, 1]
    background: Tensor  # [B, 3] in [0, 1]
    angle: Tensor  # [B] in [0, pi)
    period: Tensor  # [B] full period of stripes, rings and checks; the discs' radius is a share of it
    centre: Tensor  # [B, 2] x, y: the rings' centre, the checks' and stripes' origin
    dots: Tensor  # [B, 5, 2] x, y of the discs
    dot_count: Tensor  # [B] how many of those are painted


def label_of(caption: str) -> int:
    """The label of a caption. Raises ValueError for a caption the world does not know."""
    if caption not in _LABELS:
        raise ValueError(f"unknown toy caption {caption!r}; allowed: one of {', '.join(COLOURS)} then {PATTERNS}")
    return _LABELS[caption]


def labels_of(captions: Sequence[str]) -> Tensor:
    """Labels [B] of captions. Raises ValueError for an unknown one."""
    return torch.tensor([label_of(caption) for caption in captions], dtype=torch.long)


def balanced_labels(n: int) -> Tensor:
    """Labels [n] that name every caption equally often (up to one), in turn."""
    return torch.arange(n) % len(CAPTIONS)


def sample(n: int, seed: int) -> tuple[Tensor, list[str], Tensor]:
    """n pictures [n, 3, 32, 32] of random captions, their captions and their labels [n], from a seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CAPTIONS), (n,), generator=generator)
    return render(labels, generator), [CAPTIONS[label] for label in labels], labels


def render(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, 32, 32] in [-1, 1] of labels [B]. Raises ValueError for labels out of range."""
    return paint(draw_scene(labels, generator))


def draw_scene(labels: Tensor, generator: torch.Generator) -> Scene:
    """Samples what the captions leave open. The random numbers are the same whatever the labels are."""
    if labels.ndim != 1 or (labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(CAPTIONS)):
        raise ValueError(
            f"toy labels must be [B] with values in 0..{len(CAPTIONS) - 1}, got shape {tuple(labels.shape)}"
        )
    count = labels.numel()

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    dark = uniform() < 0.5
    palette = torch.tensor(list(COLOURS.values()))
    period = uniform(low=8.0, high=12.0)
    dots, dot_count = _place_dots(uniform(_MAX_DOTS, _DOT_TRIES, 2), _dot_radius(period), 2 + (uniform() * 4).long())
    return Scene(
        labels=labels,
        dark=dark,
        foreground=palette[labels // len(PATTERNS)] + uniform(3, low=-0.03, high=0.03),
        background=torch.where(dark, 0.08, 0.94)[:, None] + uniform(1, low=-0.04, high=0.04),
        angle=uniform(high=math.pi),
        period=period,
        centre=uniform(2, low=4.0, high=SIZE - 4.0),
        dots=dots,
        dot_count=dot_count,
    )


def paint(scene: Scene) -> Tensor:
    """The pictures [B, 3, 32, 32] in [-1, 1] of a scene, with edges one pixel wide."""
    picture = torch.lerp(scene.background[:, :, None, None], scene.foreground[:, :, None, None], coverage(scene))
    return (picture * 2 - 1).clamp(-1, 1)


def coverage(scene: Scene) -> Tensor:
    """The pattern alone, [B, 1, 32, 32]: the share of each pixel that is foreground."""
    pattern = scene.labels % len(PATTERNS)
    inside = torch.empty(len(pattern), SIZE, SIZE)  # signed distance to the nearest edge, positive inside, in pixels
    for index, field in enumerate((_stripes, _rings, _dots, _checks)):
        chosen = pattern == index
        if chosen.any():
            inside[chosen] = field(scene, chosen)
    return (inside + 0.5).clamp(0, 1)[:, None]


def _stripes(scene: Scene, chosen: Tensor) -> Tensor:
    u, _ = _turned(scene, chosen)
    return _wave(u, scene.period[chosen])


def _rings(scene: Scene, chosen: Tensor) -> Tensor:
    x, y = _offsets(scene, chosen)
    return _wave(torch.hypot(x, y) + scene.angle[chosen, None, None] / math.pi * 12.0, scene.period[chosen])


def _checks(scene: Scene, chosen: Tensor) -> Tensor:
    u, v = _turned(scene, chosen)
    first, second = (_wave(axis, 1.5 * scene.period[chosen]) for axis in (u, v))
    return torch.minimum(first.abs(), second.abs()) * first.sign() * second.sign()


def _dots(scene: Scene, chosen: Tensor) -> Tensor:
    x, y = _grid()
    centres = scene.dots[chosen]
    distance = torch.hypot(x - centres[..., 0, None, None], y - centres[..., 1, None, None])  # [b, 5, 32, 32]
    painted = torch.arange(_MAX_DOTS) < scene.dot_count[chosen, None]
    distance = torch.where(painted[..., None, None], distance, torch.inf)
    return _dot_radius(scene.period[chosen])[:, None, None] - distance.amin(dim=1)


def _dot_radius(period: Tensor) -> Tensor:
    return 0.42 * period


def _place_dots(tries: Tensor, radius: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Disc by disc, the first of its tries [B, 5, 16, 2] with a gap to the earlier discs; stops where there is none."""
    gap = (2 * radius + 1.5)[:, None]
    positions = radius[:, None, None, None] + tries * (SIZE - 1 - 2 * radius[:, None, None, None])
    placed = positions[:, :1, 0]  # [B, 1, 2]
    count = torch.ones_like(wanted)
    rows = torch.arange(len(wanted))
    for disc in range(1, _MAX_DOTS):
        distances = (positions[:, disc, :, None] - placed[:, None]).norm(dim=-1)  # [B, 16, disc]
        free = distances.amin(dim=-1) > gap
        choice = free.int().argmax(dim=1)  # the first free try
        placed = torch.cat([placed, positions[rows, disc, choice][:, None]], dim=1)
        count = torch.where(free.any(dim=1) & (count == disc) & (wanted > disc), disc + 1, count)
    return placed, count


def _wave(coordinate: Tensor, period: Tensor) -> Tensor:
    """Signed distance [b, 32, 32] to the edges of bands half a period wide."""
    half = period[:, None, None] / 2
    return half / 2 - (coordinate.remainder(2 * half) - half).abs()


def _turned(scene: Scene, chosen: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _offsets(scene, chosen)
    cos, sin = scene.angle[chosen, None, None].cos(), scene.angle[chosen, None, None].sin()
    return x * cos + y * sin, y * cos - x * sin


def _offsets(scene: Scene, chosen: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _grid()
    centre = scene.centre[chosen]
    return x - centre[:, 0, None, None], y - centre[:, 1, None, None]


def _grid() -> tuple[Tensor, Tensor]:
    axis = torch.arange(SIZE, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y
