"""Draws a study: chord lengths of the body add up to an absorption, findings and devices are painted over it.

Everything is a smooth function of the pixel's place and of the pose, without grain, so that a hidden patch can be
foretold from its neighbours. Findings and devices have a dark outline, so that they show on bone as on lung.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastm3ae.data.demo.anatomies import BODIES, Ellipsoid, Point, Shape
from fastm3ae.data.demo.studies import Pose, Study, is_mirrored

__all__ = ["draw_radiograph"]

Plane = NDArray[np.float32]
Window = tuple[slice, slice]

# Devices lie in the middle, findings in the left or right column and in one of three rows, whatever the anatomy.
DEVICE_RADIUS = 0.55
COLUMN = 0.46
ROWS = {"upper": -0.5, "middle": 0.0, "lower": 0.5}
RADIUS = {"small": 0.12, "large": 0.24}
PLACES: dict[int, tuple[Point, ...]] = {
    1: ((0, 0),),
    2: ((-1.1, 0), (1.1, 0)),
    3: ((-1.1, 0.65), (1.1, 0.65), (0, -1.1)),
}


def draw_radiograph(study: Study, image_size_px: int) -> NDArray[np.uint8]:
    """Draws a study as a radiograph: bone white, air black.

    Args:
        study: What to draw.
        image_size_px: Height and width of the picture.

    Returns:
        Grey levels, (image_size_px, image_size_px).
    """
    mirrored = is_mirrored(study.anatomy, study.view)
    film = Film(image_size_px, study.pose, is_mirrored=mirrored and study.side == "right")
    for shape in BODIES[study.anatomy, study.view]:
        film.expose(shape)
    film.develop()
    if study.device:
        film.paint(DEVICES[study.device], (0, 0), DEVICE_RADIUS)
    if study.finding:
        x, y = study.pose.finding_shift
        x += -COLUMN if study.side == "right" and not mirrored else COLUMN
        y += ROWS[study.zone]
        radius = RADIUS[study.size]
        for dx, dy in PLACES[study.number]:
            film.paint(FINDINGS[study.finding], (x + dx * radius, y + dy * radius), radius * study.pose.finding_scale)
    return np.round(255 * np.clip(film.grey, 0, 1)).astype(np.uint8)


class Film:
    """A square picture in the making; shapes come in body coordinates, and the pose says where those lie on the film.

    Args:
        size_px: Height and width.
        pose: Shift, turn and stretch of the body.
        is_mirrored: Whether left and right are swapped, pose included.
    """

    def __init__(self, size_px: int, pose: Pose, *, is_mirrored: bool) -> None:
        centres = (np.arange(size_px, dtype=np.float32) + 0.5) * (2 / size_px) - 1
        self.size_px, self.pose, self.sign = size_px, pose, -1 if is_mirrored else 1
        x, y = self.sign * centres[None, :] - pose.shift[0], centres[:, None] - pose.shift[1]
        cos, sin = math.cos(pose.angle_rad), math.sin(pose.angle_rad)
        self.x: Plane = (cos * x + sin * y) / pose.scale[0]
        self.y: Plane = (cos * y - sin * x) / pose.scale[1]
        # The heel effect: one side of the anode is brighter. Without it the empty background would be constant.
        self.grey: Plane = 0.06 + 0.05 * centres[:, None] + 0.02 * centres[None, :] ** 2
        self.absorption: Plane = np.zeros((size_px, size_px), np.float32)

    def window(self, points: tuple[Point, ...], margin: float) -> Window:
        """Returns the rows and columns within ``margin`` of the points' bounding box, with room for the pose."""
        cos, sin = math.cos(self.pose.angle_rad), math.sin(self.pose.angle_rad)
        xs = [
            self.sign * (cos * x * self.pose.scale[0] - sin * y * self.pose.scale[1] + self.pose.shift[0])
            for x, y in points
        ]
        ys = [sin * x * self.pose.scale[0] + cos * y * self.pose.scale[1] + self.pose.shift[1] for x, y in points]
        margin *= 1.1

        def span(values: list[float]) -> slice:
            low, high = (min(values) - margin + 1) * self.size_px / 2, (max(values) + margin + 1) * self.size_px / 2
            return slice(max(0, math.floor(low)), max(0, math.ceil(high)))

        return span(ys), span(xs)

    def expose(self, shape: Shape) -> None:
        """Adds density times chord length of a shape to the absorption."""
        if isinstance(shape, Ellipsoid):
            window = self.window(((shape.x, shape.y),), math.hypot(shape.rx, shape.ry))
            x, y = self.x[window] - shape.x, self.y[window] - shape.y
            cos, sin = math.cos(shape.angle_rad), math.sin(shape.angle_rad)
            u, v = (cos * x + sin * y) / shape.rx, (cos * y - sin * x) / shape.ry
            q = u**shape.power + v**shape.power
        else:
            end_radius = shape.radius if shape.end_radius is None else shape.end_radius
            window = self.window(shape.points, max(shape.radius, end_radius))
            q = tube_distance(self.x[window], self.y[window], shape.points, shape.radius, end_radius) ** 2
        chord = np.sqrt(np.maximum(1 - q, 0))
        if shape.hollow:
            chord -= 0.8 * np.sqrt(np.maximum(shape.hollow**2 - q, 0))
        self.absorption[window] += shape.density * chord

    def develop(self) -> None:
        """Turns absorption into grey: 0 stays the background, 1 is a light grey that leaves room for metal."""
        self.grey = self.grey + 0.78 * (1 - np.exp(-1.3 * np.maximum(self.absorption, 0)))

    def paint(self, paint: "Paint", centre: Point, radius: float) -> None:
        """Blends a finding or device into the grey levels; ``radius`` is the unit of the paint's coordinates."""
        window = self.window((centre,), 1.8 * radius)
        grey, opacity = paint((self.x[window] - centre[0]) / radius, (self.y[window] - centre[1]) / radius)
        self.grey[window] += opacity * (grey - self.grey[window])


def tube_distance(x: Plane, y: Plane, points: tuple[Point, ...], radius: float, end_radius: float) -> Plane:
    """Returns the distance from a line of points, in units of the tube's radius at the nearest point of the line."""
    distance = np.full_like(x, np.inf)
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(points, points[1:], strict=False)):
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        local_radius = radius + (end_radius - radius) * (i + t) / (len(points) - 1)
        distance = np.minimum(distance, np.hypot(x - x0 - t * dx, y - y0 - t * dy) / local_radius)
    return distance


# A paint maps coordinates in units of its own radius to (grey, opacity).
Paint = Callable[[Plane, Plane], tuple[Plane, Plane]]


def inside(depth: Plane, softness: float = 0.12) -> Plane:
    """Returns 1 where ``depth`` is well above 0, 0 well below, with a soft edge."""
    return np.clip(0.5 + depth / (2 * softness), 0, 1)


def outlined(body: Plane, softness: float = 0.12, rim: float = 0.3) -> tuple[Plane, Plane]:
    """Returns the paint of a white body with a dark outline ``rim`` wide; ``body`` is the depth below its surface."""
    return 0.05 + 0.95 * inside(body, softness), inside(body + rim, softness)


def nodule(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    return outlined(1 - np.hypot(u, v))


def cyst(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    radius = np.hypot(u, v)
    return 0.03 + 0.95 * inside(0.2 - np.abs(radius - 0.85)), inside(1.1 - radius)


def fracture(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    zigzag = 0.25 * np.abs(np.mod(2 * u, 2) - 1) - 0.12
    across = np.abs(v + 0.5 * u - zigzag)
    return 0.95 * inside(across - 0.2), inside(0.42 - across) * inside(1.25 - np.abs(u))


def foreign_body(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    return outlined(np.minimum(0.6 - v, 0.5 * v - np.abs(u) * 0.87 + 0.5), rim=0.2)


def screw(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    shaft = np.minimum(0.13 + 0.07 * np.cos(18 * v) - np.abs(u), 1.1 - np.abs(v))
    head = np.minimum(0.36 - np.abs(u), 0.12 - np.abs(v + 1.05))
    return outlined(np.maximum(shaft, head), 0.05, 0.1)


def plate(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    bar = np.minimum(0.22 - np.abs(u), 1.2 - np.abs(v))
    holes = np.hypot(u, np.mod(v, 0.6) - 0.3) - 0.12
    return outlined(np.minimum(bar, holes), 0.05, 0.1)


def catheter(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    line = np.where(v < 0.55, np.abs(u - 0.22 * np.sin(3.4 * (v + 1.3))), 9)
    loop = np.abs(np.hypot(u, v - 0.85) - 0.28)
    return outlined(np.minimum(0.09 - np.minimum(line, loop), 1.3 - np.abs(v)), 0.05, 0.1)


def pacemaker(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    box = 0.45 - (((u / 0.42) ** 4 + ((v + 0.75) / 0.45) ** 4) ** 0.25) * 0.45
    lead = np.where((v > -0.5) & (v < 1.2), 0.06 - np.abs(u - 0.35 * np.sin(2.4 * (v + 0.5))), -9)
    return outlined(np.maximum(box, lead), 0.05, 0.1)


def clips(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    chevron = v - 0.35 * np.abs(u)
    bar = np.minimum(0.07 - np.abs(np.mod(chevron + 0.25, 0.5) - 0.25), 0.35 - np.abs(u))
    return outlined(np.minimum(bar, 1.1 - np.abs(chevron)), 0.05, 0.1)


FINDINGS: dict[str, Paint] = {
    "nodule": nodule,
    "cyst": cyst,
    "fracture": fracture,
    "foreign body": foreign_body,
}
DEVICES: dict[str, Paint] = {
    "screw": screw,
    "plate": plate,
    "catheter": catheter,
    "pacemaker": pacemaker,
    "clips": clips,
}
