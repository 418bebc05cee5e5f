"""What one synthetic study shows: its attributes, and how they are drawn at random.

Side follows one convention, which the picture alone decides. Where both sides of the body are in view (chest, abdomen
and skull from the front), "left" is the patient's left, on the right of the picture as radiologists hang
it, and it is the finding's side. Everywhere else side is the whole picture's, which is mirrored for the right: a "left"
lateral or oblique view faces the left edge, a "left" hand has its thumb on the right. Findings called left lie in the
right half of every picture, in an upper, middle or lower row.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["DEVICES", "FINDINGS", "LIMBS", "SPLITS", "VIEWS", "Pose", "Side", "Study", "draw_study", "is_mirrored"]

Side = Literal["left", "right"]

SPLITS = ("train", "val", "test")
SIDES: tuple[Side, ...] = ("left", "right")
ZONES = ("upper", "middle", "lower")
SIZES = ("small", "large")

VIEWS = {
    "chest": ("frontal", "lateral"),
    "abdomen": ("frontal", "lateral"),
    "skull": ("frontal", "lateral"),
    "hand": ("frontal", "oblique"),
    "knee": ("frontal", "lateral"),
}
LIMBS = ("hand", "knee")

FINDINGS = ("nodule", "cyst", "fracture", "foreign body")
DEVICES = {
    "chest": ("pacemaker", "catheter", "clips"),
    "abdomen": ("catheter", "clips", "screw"),
    "skull": ("catheter", "clips", "screw"),
    "hand": ("plate", "clips", "screw"),
    "knee": ("plate", "clips", "screw"),
}
NORMAL_FRAC = 0.1
DEVICE_FRAC = 0.8


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How the patient lies on the film, and how exactly the finding fills its zone. Lengths in half picture widths."""

    shift: tuple[float, float]
    angle_rad: float
    scale: tuple[float, float]
    finding_shift: tuple[float, float]
    finding_scale: float


@dataclass(frozen=True, kw_only=True)
class Study:
    """The attributes of one picture. A normal study has no finding; ``side`` is None where nothing shows a side."""

    anatomy: str
    view: str
    side: Side | None
    finding: str | None
    number: int
    size: str
    zone: str
    device: str | None
    pose: Pose


def is_mirrored(anatomy: str, view: str) -> bool:
    """Returns whether the side of this view is that of the whole picture, not of the finding."""
    return anatomy in LIMBS or view != "frontal"


def draw_study(rng: np.random.Generator) -> Study:
    """Draws every attribute uniformly and independently of the others, as far as the anatomy allows."""

    def pick(values: tuple) -> str:
        return values[rng.integers(len(values))]

    anatomy = pick(tuple(VIEWS))
    view = pick(VIEWS[anatomy])
    finding = pick(FINDINGS) if rng.random() >= NORMAL_FRAC else None
    side = pick(SIDES)
    return Study(
        anatomy=anatomy,
        view=view,
        side=side if finding or is_mirrored(anatomy, view) else None,
        finding=finding,
        number=int(rng.integers(1, 4)),
        size=pick(SIZES),
        zone=pick(ZONES),
        device=pick(DEVICES[anatomy]) if rng.random() < DEVICE_FRAC else None,
        pose=Pose(
            shift=tuple(rng.uniform(-0.025, 0.025, 2).tolist()),
            angle_rad=rng.uniform(-0.03, 0.03),
            scale=tuple(rng.uniform(0.97, 1.03, 2).tolist()),
            finding_shift=tuple(rng.uniform(-0.04, 0.04, 2).tolist()),
            finding_scale=rng.uniform(0.93, 1.07),
        ),
    )
