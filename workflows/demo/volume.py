"""The demo volume: the MNI152 T1 template, with its grey and white matter as truth.

The files come with the PyPI package nilearn (the extra ``demo``); they are read where they lie.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from pipeline.domain import Region
from pipeline.errors import SourceError

CLASSES = ("background", "cerebrospinal fluid", "grey matter", "white matter")
COLORS = ("#1a202c", "#4299e1", "#a0aec0", "#f7fafc")
"""Names of the class ids 0..3; id 1 is all of the brain that is neither grey nor white."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BrainVolume:
    """The template in (z, y, x): from inferior, posterior and left to superior, anterior, right.

    Its left half is the exact mirror image of its right half, so holding back a hemisphere would
    hold back nothing: the anterior half is held back, the posterior one is trained on.
    """

    t1_S: NDArray[np.uint8]
    """(z, y, x) uint8: T1 intensity, 0 outside the brain."""

    label_S: NDArray[np.uint8]
    """(z, y, x) uint8: class ids 0..3."""

    spacing_mm: tuple[float, ...]
    """Axes (z, y, x)."""

    trained: Region
    """The posterior half, in voxels."""

    scored: Region
    """The anterior half, in voxels; training never saw it."""

    def part(self, region: Region) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The T1 as an image (1, z, y, x) and the labels (z, y, x) of a region; views."""
        box = region.slices(within=Region.whole(self.t1_S.shape))
        return self.t1_S[box][None], self.label_S[box]


def data_directory() -> Path:
    """Where nilearn keeps its template. Raises SourceError where nilearn is not installed."""
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            "the demo volume was asked for, but the package nilearn that carries it is not"
            " installed: install terravox with the extra 'demo'"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data"


def template_path(kind: str) -> Path:
    """The file of ``t1``, ``gm`` or ``wm``. Raises SourceError where it is missing."""
    path = data_directory() / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    if not path.is_file():
        raise SourceError(
            f"the demo volume's {kind} map was expected at {path}, which does not exist: install"
            " another nilearn (>= 0.11)"
        )
    return path


def load_template() -> BrainVolume:
    """Read the template and label it. Raises SourceError where nilearn or a file is missing."""
    t1_S, gm_S, wm_S = (_canonical(template_path(kind)) for kind in ("t1", "gm", "wm"))
    label_S = (t1_S > 0).astype(np.uint8)
    label_S[(gm_S >= 128) & (gm_S >= wm_S)] = 2
    label_S[(wm_S >= 128) & (wm_S > gm_S)] = 3
    inside = np.flatnonzero((t1_S > 0).any(axis=(0, 2)))
    middle = int(inside[0] + inside[-1]) // 2
    depth, length, width = t1_S.shape
    return BrainVolume(
        t1_S=t1_S,
        label_S=label_S,
        spacing_mm=(1.0, 1.0, 1.0),
        trained=Region((0, 0, 0), (depth, middle, width)),
        scored=Region((0, middle, 0), (depth, length, width)),
    )


def _canonical(path: Path) -> NDArray[np.uint8]:
    """The file as (z, y, x) uint8 in closest-canonical order."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    array_XYZ = np.asarray(image.dataobj)
    if array_XYZ.dtype != np.uint8 or array_XYZ.ndim != 3:
        raise SourceError(
            f"{path} was expected to be a 3-D uint8 volume at 1 mm, found {array_XYZ.dtype} of"
            f" {array_XYZ.shape}: install another nilearn (>= 0.11)"
        )
    return np.ascontiguousarray(array_XYZ.transpose(2, 1, 0))
