"""A 4-D NIfTI whole: its volumes are channels. Probabilities, or several contrasts of a scan.

Axes in array names: C channel, Z Y X space.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from adapters.nifti import NiftiSource
from adapters.nifti_header import VolumeGrid, grid_shape, read_header
from pipeline.domain import ImageInfo, Region
from pipeline.ports import Block


@dataclass(frozen=True)
class NiftiVolumes:
    """Every volume of a ``.nii`` or ``.nii.gz`` file, in the file's order; picklable."""

    path: Path
    scratch: Path | None = None
    """Folder shared by all readers of this run, for the decompressed file."""

    @cached_property
    def info(self) -> ImageInfo:
        """As of one volume; channels are called 1, 2, .. in order. Raises SourceError."""
        first, count = self._sources[0].info, len(self._sources)
        names = tuple(str(number + 1) for number in range(count))
        return replace(first, channels=names, nodata=(None,) * count, selection=None)

    def unpack(self) -> None:
        """Unpack a compressed file into scratch. Raises SourceError or SourceReadError."""
        self._sources[0].unpack()

    def read(self, region: Region) -> Block:
        """``region``: (C, Z, Y, X), and (Z, Y, X) bool; new. Raises SourceReadError."""
        blocks = [source.read(region) for source in self._sources]
        return Block(
            np.concatenate([block.image_CS for block in blocks]),
            np.logical_and.reduce([block.valid_S for block in blocks]),
        )

    def digest(self) -> str:
        """SHA-256 of the file's bytes. Raises SourceReadError."""
        return self._sources[0].digest()

    @property
    def grid(self) -> VolumeGrid:
        """What a mask on these voxels copies: the file's own header. Raises SourceError."""
        return self._sources[0].grid

    @cached_property
    def _sources(self) -> tuple[NiftiSource, ...]:
        header = read_header(self.path)
        grid_shape(header, path=self.path)
        shape = header.get_data_shape()
        count = int(shape[3]) if len(shape) > 3 else 1
        return tuple(
            NiftiSource(self.path, volume=number, scratch=self.scratch) for number in range(count)
        )
