"""Pictures of what a model does.

pixels            patches and images as tensors
sheets            rows of pictures with words, usage of slots
figures           training curves and heat maps, as PNG, PDF and SVG
subject           a checkpoint and the images and texts that were given
reconstructions   what a model makes of hidden patches and words
attention         at which patches each word of a text looks
memory            which slots of its memory MPMA uses for which word
"""

from fastm3ae.visualize.pixels import (
    GREY,
    HEAT,
    MAX_HEAT_FRAC,
    draw_outline,
    grey_out,
    lay_over,
    patchify,
    reconstruct,
    to_unit_range,
    unpatchify,
)
from fastm3ae.visualize.sheets import (
    Reconstruction,
    TileRow,
    Usage,
    case_sheet,
    reconstruction_grid,
    tile_grid,
    usage_chart,
)

__all__ = [
    "GREY",
    "HEAT",
    "MAX_HEAT_FRAC",
    "Reconstruction",
    "TileRow",
    "Usage",
    "case_sheet",
    "draw_outline",
    "grey_out",
    "lay_over",
    "patchify",
    "reconstruct",
    "reconstruction_grid",
    "tile_grid",
    "to_unit_range",
    "unpatchify",
    "usage_chart",
]
