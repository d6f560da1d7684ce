"""Real DICOM series and NRRD labels, against what ITK reads from the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from dicom_files import affine_of, canonical_of, read_by_itk

from adapters.dicom_folder import find_series
from adapters.dicom_series import DicomSeries
from adapters.itk_image import ItkImage
from adapters.nifti_writer import NiftiSpec, write_nifti
from pipeline.domain import Region

SPEC = NiftiSpec(dtype="uint16", nodata=65535, labels=(), intent_name="", description="")
SERIES = {
    "dcmqi_ct3slice/ct-3slice": ((3, 512, 512), (1.0, 0.810547, 0.810547)),
    "dcm_qa_ct_philips_phantom": ((8, 512, 512), (5.0, 0.451171875, 0.451171875)),
}


class Shifted:
    """The source's own values as labels of 0 and more."""

    def __init__(self, source: DicomSeries) -> None:
        self.source = source

    def write(self, region: Region, array: np.ndarray) -> str:
        raise NotImplementedError

    def read(self, region: Region) -> np.ndarray:
        return (self.source.read(region).image_CS[0] + 4096).astype(np.uint16)


@pytest.mark.parametrize("name", SERIES)
def test_a_real_series_is_what_itk_reads(data: Path, tmp_path: Path, name: str) -> None:
    """A GE and a Philips scanner: implicit and explicit, no suffix, twelve bits of sixteen."""
    folder = data / "medical" / name
    source, image = DicomSeries(folder, scratch=tmp_path), read_by_itk(folder)
    shape, spacing = SERIES[name]
    assert source.info.shape == shape
    assert source.info.spacing == pytest.approx(spacing)
    affine = np.reshape(source.info.affine, (4, 4))
    np.testing.assert_allclose(affine, affine_of(image), rtol=0, atol=1e-6)
    found = source.read(Region.whole(shape))
    np.testing.assert_array_equal(found.image_CS[0], canonical_of(image))
    (series,) = find_series(folder)
    assert (series.modality, len(series.files)) == ("CT", shape[0])


def test_the_padding_of_a_real_scanner_is_not_data(data: Path) -> None:
    """Outside the round field of view lies a fifth of the voxels, at -3024."""
    source = DicomSeries(data / "medical" / "dcmqi_ct3slice/ct-3slice")
    block = source.read(Region.whole(source.info.shape))
    np.testing.assert_array_equal(block.valid_S, block.image_CS[0] != -3024)
    assert 0.78 < block.valid_S.mean() < 0.79


@pytest.mark.parametrize("name", SERIES)
def test_a_mask_of_a_real_series_has_the_series_own_affine(
    data: Path, tmp_path: Path, name: str
) -> None:
    """The mask must lie over the series in any viewer, to less than a hundredth of a voxel."""
    folder, target = data / "medical" / name, tmp_path / "mask.nii"
    source, series = DicomSeries(folder), read_by_itk(folder)
    write_nifti(target, store=Shifted(source), grid=source.grid, spec=SPEC)
    mask = SimpleITK.ReadImage(str(target))
    assert mask.GetSize() == series.GetSize()
    np.testing.assert_allclose(affine_of(mask), affine_of(series), rtol=0, atol=1e-4)
    values = SimpleITK.GetArrayFromImage(mask).astype(np.int32) - 4096
    np.testing.assert_array_equal(values, SimpleITK.GetArrayFromImage(series))


def test_a_real_label_in_nrrd_lies_on_its_series(data: Path) -> None:
    """The liver of the CT, drawn by another program: the same voxels in the same place."""
    folder = data / "medical" / "dcmqi_ct3slice"
    label, scan = ItkImage(folder / "liver_seg.nrrd"), DicomSeries(folder / "ct-3slice")
    assert label.info.shape == scan.info.shape
    np.testing.assert_allclose(label.info.affine, scan.info.affine, rtol=0, atol=1e-3)
    whole = Region.whole(scan.info.shape)
    liver = label.read(whole).image_CS[0] > 0
    assert 0 < np.median(scan.read(whole).image_CS[0][liver]) < 150  # Hounsfield units of a liver
