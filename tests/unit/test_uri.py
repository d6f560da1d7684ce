"""From a path to its adapter, and one line for what has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from adapters.geotiff import GeoTiffSource
from adapters.uri import open_source, output_kind
from pipeline.errors import SourceError


@pytest.mark.parametrize("name", ["a.tif", "A.TIFF", "a.b.vrt"])
def test_rasters_open_by_suffix_in_any_case(tmp_path: Path, name: str) -> None:
    """Broken: a suffix in capitals, as cameras and archives write them, refused."""
    (tmp_path / name).touch()
    assert isinstance(open_source(str(tmp_path / name)), GeoTiffSource)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gone.tif", "does not exist"),
        (".", "directory"),
        ("a.png", "unknown suffix"),
        ("s3://bucket/a.tif", "local files"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path: Path, name: str, why: str) -> None:
    """Broken: a traceback of some library's for a typing error."""
    (tmp_path / "a.png").touch()
    uri = name if "://" in name else str(tmp_path / name)
    with pytest.raises(SourceError, match=why):
        open_source(uri)


def test_a_volume_number_for_a_raster_is_refused(tmp_path: Path) -> None:
    """Broken: an option that is dropped in silence."""
    (tmp_path / "a.tif").touch()
    with pytest.raises(SourceError, match="volume 1"):
        open_source(str(tmp_path / "a.tif"), volume=1)


def test_outputs_are_told_apart_by_suffix() -> None:
    """Broken: a NIfTI written under a raster's name, or a typing error found after a night."""
    assert [output_kind(name) for name in ("m.tif", "M.TIFF")] == ["cog", "cog"]
    assert [output_kind(name) for name in ("m.nii", "m.nii.gz")] == ["nifti", "nifti"]
    for name in ("m.vrt", "m.png", "m", "m.gz"):
        with pytest.raises(SourceError, match="unknown suffix"):
            output_kind(name)


def test_choosing_an_adapter_loads_no_other() -> None:
    """Broken: nibabel and rasterio both on the path of every command."""
    code = "import sys, adapters.uri; print({'rasterio', 'nibabel', 'zarr'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
