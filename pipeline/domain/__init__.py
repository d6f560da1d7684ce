"""The vocabulary. One noun, one file; standard library only.

==============  ================================================================================
Region          half-open box ``[start, stop)`` in pixels, axes (y, x) or (z, y, x)
Halo            pixels of context a core needs, per axis and side
Reach           what an output region needs of the input: halo, and context window where it pools
Grid            how an image is cut: disjoint cores covering it, anchored at the scene's (0, 0)
Tile            one core (what it alone writes), what the network predicts, and what is read
Pass            one sweep over the tiles of one case
Sample          a small place, astride tile borders or within a tile, that is computed twice
SamplePass      the pass that computes the samples again, each on its own
Walk            the order in which the tiles of a pass are run: bands of neighbours
TileCost        what one tile takes in one worker: work and bytes
TilePlan        all passes, with bytes and the fingerprint that names the run
TileKey         (case, pass, tile number): the key of the ledger
CaseRecord      what became of one scene or scan of a batch: a line of the batch's ledger
Graticule       how large the pixels of a raster in degrees are, row by row
ImageInfo       shape, channels, dtype, nodata, CRS or affine, spacing
==============  ================================================================================
"""

from pipeline.domain.case import CaseRecord, CaseState, check_case_id
from pipeline.domain.graticule import Graticule
from pipeline.domain.grid import Grid
from pipeline.domain.image_info import ImageInfo
from pipeline.domain.plan import Pass, Sweep, Tile, TileKey, TilePlan
from pipeline.domain.reach import ContextWindow, Reach
from pipeline.domain.region import Halo, Region, Shape
from pipeline.domain.sample import Sample, SamplePass
from pipeline.domain.tile_cost import TileCost
from pipeline.domain.walk import Walk

__all__ = [
    "CaseRecord",
    "CaseState",
    "ContextWindow",
    "Graticule",
    "Grid",
    "Halo",
    "ImageInfo",
    "Pass",
    "Reach",
    "Region",
    "Sample",
    "SamplePass",
    "Shape",
    "Sweep",
    "Tile",
    "TileCost",
    "TileKey",
    "TilePlan",
    "Walk",
    "check_case_id",
]
