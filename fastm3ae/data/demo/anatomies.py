"""The bodies: each view of each anatomy as ellipsoids and tubes.

Coordinates are half picture widths from the centre, x to the right and y down. Mirrored views are drawn as their left
version.
"""

from dataclasses import dataclass

__all__ = ["BODIES", "Ellipsoid", "Point", "Shape", "Tube"]

Point = tuple[float, float]

BONE = 0.95
SHELL = 0.72


@dataclass(frozen=True)
class Ellipsoid:
    """A body whose chord length falls from 1 at the centre to 0 at the outline; ``power`` above 2 makes it a box.

    ``density`` times chord length is added to the absorption, so gas has a negative one. ``hollow`` is the radius of
    the marrow cavity relative to the outline: the cortex then shows as a bright edge.
    """

    x: float
    y: float
    rx: float
    ry: float
    density: float = BONE
    angle_rad: float = 0.0
    hollow: float = 0.0
    power: int = 2


@dataclass(frozen=True)
class Tube:
    """A round tube along a line of points whose radius runs from ``radius`` to ``end_radius``."""

    points: tuple[Point, ...]
    radius: float
    end_radius: float | None = None
    density: float = BONE
    hollow: float = SHELL


Shape = Ellipsoid | Tube


def steps(start: float, step: float, count: int) -> list[float]:
    return [start + step * i for i in range(count)]


def bone(*points: Point, r: float, end: float | None = None) -> Tube:
    """Returns a long bone along points whose corners are cut."""
    corners = zip(points, points[1:], strict=False)
    cut = [(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for (x0, y0), (x1, y1) in corners for t in (0.25, 0.75)]
    return Tube((points[0], *cut[1:-1], points[-1]), r, end)


def block(x: float, y: float, rx: float, ry: float, angle_rad: float = 0.0) -> Ellipsoid:
    """Returns a box-like bone, such as a vertebral body."""
    return Ellipsoid(x, y, rx, ry, BONE, angle_rad, hollow=0.8, power=4)


def pebble(x: float, y: float, rx: float, ry: float, angle_rad: float = 0.0) -> Ellipsoid:
    """Returns a round bone, such as a carpal bone or the patella."""
    return Ellipsoid(x, y, rx, ry, BONE, angle_rad, hollow=0.8)


def soft(x: float, y: float, rx: float, ry: float, density: float = 0.5, angle_rad: float = 0.0) -> Ellipsoid:
    return Ellipsoid(x, y, rx, ry, density, angle_rad)


def gas(x: float, y: float, rx: float, ry: float, density: float = 0.35, angle_rad: float = 0.0) -> Ellipsoid:
    return Ellipsoid(x, y, rx, ry, -density, angle_rad)


def flesh(*points: Point, r: float, end: float | None = None) -> Tube:
    return Tube(points, r, end, density=0.35, hollow=0.0)


def both(*shapes: Shape) -> list[Shape]:
    """Returns the shapes and their mirror images."""
    return [*shapes, *(mirror(s) for s in shapes)]


def mirror(shape: Shape) -> Shape:
    if isinstance(shape, Tube):
        return Tube(
            tuple((-x, y) for x, y in shape.points), shape.radius, shape.end_radius, shape.density, shape.hollow
        )
    return Ellipsoid(-shape.x, shape.y, shape.rx, shape.ry, shape.density, -shape.angle_rad, shape.hollow, shape.power)


def chest_frontal() -> list[Shape]:
    ribs = [bone((0.1, y), (0.42, y - 0.1), (0.72, y + 0.06), (0.8, y + 0.26), r=0.035) for y in steps(-0.6, 0.2, 6)]
    return [
        soft(0, 0.25, 0.98, 1.4, 0.7),
        *both(
            gas(0.44, -0.02, 0.36, 0.76, 0.75, -0.08), *ribs, bone((0.08, -0.7), (0.45, -0.8), (0.85, -0.72), r=0.05)
        ),
        soft(0.14, 0.38, 0.36, 0.34, 0.55, 0.5),
        *both(soft(0.45, 0.92, 0.45, 0.3, 0.5)),
        *(block(0, y, 0.1, 0.08) for y in steps(-0.9, 0.2, 10)),
    ]


def chest_lateral() -> list[Shape]:
    ribs = [bone((0.52, y), (0.2, y - 0.02), (-0.3, y + 0.3), r=0.035) for y in steps(-0.65, 0.2, 6)]
    return [
        soft(0, 0.2, 0.8, 1.4, 0.7),
        gas(0.02, -0.02, 0.52, 0.8, 0.7, 0.05),
        *ribs,
        soft(-0.22, 0.4, 0.3, 0.34, 0.5, -0.3),
        soft(0, 0.98, 0.7, 0.35, 0.5),
        bone((-0.5, -0.55), (-0.66, 0.2), r=0.05),
        *(block(0.55 + 0.05 * (y * y), y, 0.11, 0.08, 0.1 * y) for y in steps(-0.9, 0.2, 10)),
    ]


def abdomen_frontal() -> list[Shape]:
    return [
        soft(0, 0, 0.95, 1.5, 0.75),
        *both(
            bone((0.1, -0.85), (0.5, -0.8), (0.8, -0.5), r=0.04),
            bone((0.1, -0.62), (0.5, -0.5), (0.72, -0.25), r=0.04),
            Tube(((0.1, -0.5), (0.35, 0.6)), 0.12, 0.16, density=0.3, hollow=0.0),
            Ellipsoid(0.62, 0.85, 0.4, 0.36, BONE, 0.5, hollow=0.88),
        ),
        gas(-0.66, -0.05, 0.13, 0.3),
        gas(0.66, 0.0, 0.12, 0.34),
        gas(0.3, -0.42, 0.26, 0.11, 0.35, 0.3),
        gas(-0.3, -0.3, 0.24, 0.1, 0.35, -0.2),
        *(block(0, y, 0.15, 0.1) for y in steps(-0.86, 0.27, 6)),
        block(0, 0.85, 0.22, 0.2),
    ]


def abdomen_lateral() -> list[Shape]:
    return [
        soft(-0.05, 0, 0.8, 1.5, 0.75),
        gas(-0.45, -0.2, 0.2, 0.3),
        gas(-0.5, 0.4, 0.16, 0.24),
        gas(-0.1, -0.62, 0.3, 0.14, 0.35, 0.4),
        bone((0.4, -0.9), (0.0, -0.75), (-0.4, -0.45), r=0.04),
        bone((0.45, -0.65), (0.1, -0.45), (-0.2, -0.15), r=0.04),
        *(block(0.45 - 0.1 * (1 - y * y), y, 0.16, 0.1, 0.25 * y) for y in steps(-0.86, 0.27, 6)),
        *(bone((0.55, y), (0.78, y + 0.08), r=0.06) for y in steps(-0.8, 0.27, 6)),
        Ellipsoid(0.2, 0.85, 0.4, 0.3, BONE, 0.4, hollow=0.88),
    ]


def skull_frontal() -> list[Shape]:
    return [
        soft(0, 0, 0.78, 1.0, 0.3),
        Tube(((0, 0.6), (0, 1.2)), 0.4, density=0.3, hollow=0.0),
        Ellipsoid(0, -0.2, 0.68, 0.72, 1.1, hollow=0.92),
        *both(
            gas(0.28, 0.04, 0.18, 0.15, 0.4),
            Ellipsoid(0.28, 0.04, 0.22, 0.19, 0.9, hollow=0.85),
            bone((0.55, 0.1), (0.5, 0.6), (0.2, 0.86), (0, 0.88), r=0.08),
            *(Tube(((x, 0.52), (x, 0.68)), 0.035, density=0.6, hollow=0.0) for x in (0.05, 0.14, 0.23)),
        ),
        Ellipsoid(0, 0.3, 0.11, 0.2, -0.4),
        Tube(((0, 0.12), (0, 0.46)), 0.02, hollow=0.0),
    ]


def skull_lateral() -> list[Shape]:
    return [
        soft(0.05, -0.05, 0.85, 0.9, 0.3),
        Tube(((0.25, 0.4), (0.3, 1.2)), 0.35, density=0.3, hollow=0.0),
        Ellipsoid(0.12, -0.22, 0.76, 0.62, 1.1, hollow=0.92),
        Ellipsoid(-0.5, 0.1, 0.18, 0.2, 0.9, hollow=0.85),
        gas(-0.5, 0.1, 0.14, 0.16, 0.3),
        bone((-0.6, 0.0), (-0.72, 0.3), (-0.6, 0.45), (-0.2, 0.4), r=0.06),
        bone((0.02, 0.22), (-0.05, 0.66), (-0.55, 0.84), r=0.09),
        *(Tube(((x, 0.5), (x, 0.66)), 0.035, density=0.6, hollow=0.0) for x in (-0.6, -0.5, -0.4, -0.3)),
        bone((-0.3, 0.1), (0.05, 0.12), (0.3, 0.3), (0.55, 0.25), r=0.05),
        *(block(0.28 + 0.05 * y, y, 0.12, 0.08) for y in steps(0.5, 0.2, 4)),
    ]


def ray(*points: Point, r: float) -> list[Shape]:
    """Returns a finger or toe: flesh around one bone per pair of neighbouring points, with joint gaps between."""
    bones = []
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        inset = 0.11
        dx, dy = (x1 - x0) * inset, (y1 - y0) * inset
        waist = ((x0 + dx, y0 + dy), (x1 - dx, y1 - dy))
        bones += [bone(*waist, r=r, end=0.85 * r)]
        r *= 0.88
    return [flesh(*points, r=2.1 * r), *bones]


def hand_frontal() -> list[Shape]:
    return [
        flesh((0, 0.3), (0, 1.2), r=0.36, end=0.3),
        *ray((-0.14, 0.38), (-0.36, 0.02), (-0.5, -0.3), (-0.58, -0.5), (-0.62, -0.64), r=0.065),
        *ray((-0.05, 0.38), (-0.15, -0.06), (-0.22, -0.46), (-0.26, -0.7), (-0.28, -0.86), r=0.07),
        *ray((0.05, 0.38), (0.05, -0.1), (0.05, -0.52), (0.05, -0.78), (0.05, -0.95), r=0.075),
        *ray((0.14, 0.38), (0.25, -0.06), (0.32, -0.44), (0.36, -0.68), (0.38, -0.84), r=0.075),
        *ray((0.2, 0.48), (0.5, 0.22), (0.7, 0.02), (0.84, -0.16), r=0.08),
        *(pebble(x, 0.46, 0.075, 0.07) for x in (-0.15, -0.02, 0.11)),
        *(pebble(x, 0.6, 0.09, 0.075) for x in (-0.13, 0.03, 0.18)),
        bone((0.12, 0.74), (0.1, 1.2), r=0.14, end=0.11),
        bone((-0.17, 0.78), (-0.17, 1.2), r=0.09),
    ]


def hand_oblique() -> list[Shape]:
    return [
        flesh((0, 0.3), (0.05, 1.2), r=0.32, end=0.28),
        *ray((-0.1, 0.38), (-0.4, 0.1), (-0.66, -0.1), (-0.8, -0.2), r=0.07),
        *ray((-0.06, 0.38), (-0.28, -0.02), (-0.5, -0.34), (-0.62, -0.52), (-0.7, -0.62), r=0.07),
        *ray((0.0, 0.38), (-0.12, -0.08), (-0.26, -0.48), (-0.34, -0.7), (-0.38, -0.84), r=0.075),
        *ray((0.06, 0.38), (0.06, -0.1), (0.04, -0.5), (0.02, -0.74), (0.0, -0.9), r=0.075),
        *ray((0.12, 0.46), (0.3, 0.14), (0.42, -0.12), (0.5, -0.32), r=0.085),
        *(pebble(x, 0.48, 0.085, 0.09) for x in (-0.08, 0.04)),
        *(pebble(x, 0.62, 0.09, 0.08) for x in (-0.06, 0.08, 0.18)),
        bone((0.12, 0.76), (0.14, 1.2), r=0.13, end=0.11),
        bone((-0.06, 0.8), (-0.04, 1.2), r=0.09),
    ]


def knee_frontal() -> list[Shape]:
    return [
        flesh((0, -1.3), (0, 0), (0, 1.3), r=0.62, end=0.5),
        bone((0, -1.2), (0, -0.3), r=0.2, end=0.24),
        *both(pebble(0.2, -0.16, 0.24, 0.22)),
        pebble(0.02, -0.32, 0.17, 0.19),
        block(0, 0.24, 0.44, 0.14),
        bone((0, 0.32), (0, 1.2), r=0.26, end=0.18),
        pebble(0.42, 0.44, 0.1, 0.12),
        bone((0.42, 0.5), (0.4, 1.2), r=0.075),
    ]


def knee_lateral() -> list[Shape]:
    return [
        flesh((0.35, -1.3), (0.0, 0), (0.3, 1.3), r=0.58, end=0.46),
        bone((0.32, -1.2), (0.06, -0.3), r=0.19, end=0.22),
        pebble(0.04, -0.12, 0.32, 0.26),
        pebble(-0.42, -0.28, 0.1, 0.2, 0.2),
        block(0.05, 0.27, 0.32, 0.13, 0.1),
        bone((0.06, 0.34), (0.24, 1.2), r=0.22, end=0.16),
        bone((0.3, 0.42), (0.44, 1.2), r=0.075),
    ]


BODIES: dict[tuple[str, str], tuple[Shape, ...]] = {
    ("chest", "frontal"): tuple(chest_frontal()),
    ("chest", "lateral"): tuple(chest_lateral()),
    ("abdomen", "frontal"): tuple(abdomen_frontal()),
    ("abdomen", "lateral"): tuple(abdomen_lateral()),
    ("skull", "frontal"): tuple(skull_frontal()),
    ("skull", "lateral"): tuple(skull_lateral()),
    ("hand", "frontal"): tuple(hand_frontal()),
    ("hand", "oblique"): tuple(hand_oblique()),
    ("knee", "frontal"): tuple(knee_frontal()),
    ("knee", "lateral"): tuple(knee_lateral()),
}
