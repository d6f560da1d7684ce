"""One scene or scan: its name, its pixels, and the identity of its content."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.uri import open_source
from pipeline.domain import Region
from pipeline.errors import SourceError, SourceReadError
from pipeline.ports import Area, Source
from workflows.aoi import Aoi, open_aoi
from workflows.config import RunOptions

_SUFFIX = re.compile(r"(\.nii\.gz|\.[A-Za-z]+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a run is about."""

    name: str
    """Identifier; the ledger's first key."""

    path: Path
    """The file, or the folder of a DICOM series."""

    source: Source
    digest: str
    """Of the source's content, equal on every machine."""

    volume: int | None = None
    """Which volume of a 4-D scan was asked for."""

    series: str | None = None
    """Which series of a DICOM folder was asked for."""

    aoi: Aoi | None = None
    """The part that gets labels; None for all of it."""

    @property
    def area(self) -> Area | None:
        """That part; None for all of it."""
        return None if self.aoi is None else self.aoi.area

    def labelled(self, region: Region) -> bool:
        """Whether a pixel of ``region`` gets a label; of a place that cannot be read none does.

        A scan is taken to have voxels everywhere: before it is unpacked, looking is dear.
        """
        if self.area is not None and not self.area.touches(region):
            return False
        if self.source.info.ndim == 3:
            return True
        try:
            valid_S = self.source.read(region).valid_S
        except SourceReadError:
            return False
        inside_S = True if self.area is None else self.area.inside(region)
        return bool((valid_S & inside_S).any())

    def within(self, aoi: Path | None, *, scratch: Path | None) -> Case:
        """The same case, of which that part alone gets labels.

        Raises SourceError, where no pixel lies inside as well, and SourceReadError.
        """
        if aoi is None:
            return self
        return replace(self, aoi=open_aoi(aoi, self.source.info, scratch=scratch))

    def check_unchanged(self) -> None:
        """Raise SourceError where the content is another than when the run began."""
        if self.source.digest() != self.digest:
            raise SourceError(
                f"{self.path} has changed while it was read, so that a mask would be of two images:"
                " put back what it was and run the same command again, or start over with --fresh"
            )


def open_case(path: Path, options: RunOptions, *, scratch: Path | None = None) -> Case:
    """The case at ``path``, named after it. Raises SourceError or SourceReadError."""
    source = open_source(str(path), volume=options.volume, series=options.series, scratch=scratch)
    return case_of(source, path, options)


def case_of(source: Source, path: Path, options: RunOptions) -> Case:
    """The case of what was opened at ``path``, named after it. Raises SourceReadError."""
    return Case(
        name=stem(path.name),
        path=path,
        source=source,
        digest=source.digest(),
        volume=options.volume,
        series=options.series,
    )


def stem(name: str) -> str:
    """A file's name without the suffix of its format.

    >>> stem("ct.2024.nii.gz"), stem("S2A_33TWN.2024-05-01.tif")
    ('ct.2024', 'S2A_33TWN.2024-05-01')
    """
    return _SUFFIX.sub("", name)
