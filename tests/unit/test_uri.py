"""From a path to its adapter, and one line for what has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from adapters.dicom_series import DicomSeries
from adapters.geotiff import GeoTiffSource
from adapters.itk_image import ItkImage
from adapters.nifti import NiftiSource
from adapters.uri import is_known, open_source, output_kind
from pipeline.errors import SourceError


@pytest.mark.parametrize("name", ["a.tif", "A.TIFF", "a.b.vrt"])
def test_rasters_open_by_suffix_in_any_case(tmp_path: Path, name: str) -> None:
    """Broken: a suffix in capitals, as cameras and archives write them, refused."""
    (tmp_path / name).touch()
    assert isinstance(open_source(str(tmp_path / name)), GeoTiffSource)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("a.nii", NiftiSource), ("a.NII.gz", NiftiSource), ("a.nrrd", ItkImage), ("a.mha", ItkImage),
     ("A.MHD", ItkImage)],
)  # fmt: skip
def test_volumes_open_by_suffix_and_a_walker_knows_them(tmp_path: Path, name, adapter) -> None:
    """Broken: a folder walked past files that a single command would have read."""
    (tmp_path / name).touch()
    assert isinstance(open_source(str(tmp_path / name)), adapter)
    assert is_known(name)
    assert not is_known(f"{name}.txt")


def test_a_folder_is_a_dicom_series_that_nobody_has_read_yet(tmp_path: Path) -> None:
    """Broken: the scratch folder or the chosen series dropped on the way, or a folder refused."""
    source = open_source(str(tmp_path), series="1.2.3", scratch=tmp_path / "s")
    assert source == DicomSeries(tmp_path, "1.2.3", scratch=tmp_path / "s")
    with pytest.raises(SourceError, match="holds no DICOM image; found no DICOM file"):
        _ = source.info


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gone.tif", "does not exist"),
        ("a.dcm", "give the folder"),
        ("a.png", "unknown suffix"),
        ("s3://bucket/a.tif", "local files"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path: Path, name: str, why: str) -> None:
    """Broken: a traceback of some library's for a typing error."""
    (tmp_path / "a.png").touch()
    (tmp_path / "a.dcm").touch()
    uri = name if "://" in name else str(tmp_path / name)
    with pytest.raises(SourceError, match=why):
        open_source(uri)


@pytest.mark.parametrize(
    ("name", "asked"),
    [("a.tif", {"volume": 1}), ("a.nrrd", {"volume": 1}), (".", {"volume": 1}),
     ("a.tif", {"series": "1.2"}), ("a.nii", {"series": "1.2"})],
)  # fmt: skip
def test_a_choice_that_a_source_does_not_have_is_refused(tmp_path: Path, name, asked) -> None:
    """Broken: an option that is dropped in silence."""
    (tmp_path / name).touch()
    with pytest.raises(SourceError, match=f"{next(iter(asked))} .* asked of"):
        open_source(str(tmp_path / name), **asked)


def test_outputs_are_told_apart_by_suffix() -> None:
    """Broken: a NIfTI written under a raster's name, or a typing error found after a night."""
    assert [output_kind(name) for name in ("m.tif", "M.TIFF")] == ["cog", "cog"]
    assert [output_kind(name) for name in ("m.nii", "m.nii.gz")] == ["nifti", "nifti"]
    for name in ("m.vrt", "m.png", "m", "m.gz"):
        with pytest.raises(SourceError, match="unknown suffix"):
            output_kind(name)


def test_choosing_an_adapter_loads_no_other() -> None:
    """Broken: every format's library on the path of every command."""
    heavy = "rasterio", "nibabel", "pydicom", "SimpleITK"
    code = f"import sys, adapters.uri; print({set(heavy)} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
