"""Each way in which a series is no volume, and the one line that says which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_files import PATIENT, oblique, voxels, write_series
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    JPEGLosslessSV1,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from adapters.dicom_series import DicomSeries
from pipeline.errors import SourceError

Change = Callable[[int, Dataset], None]


def move(k: int, dataset: Dataset, *, z: float = 0.0, y: float = 0.0) -> None:
    x, old_y, old_z = (float(p) for p in dataset.ImagePositionPatient)
    dataset.ImagePositionPatient = [x, old_y + y, old_z + z]


def after(first: int, **shift: float) -> Change:
    """Slices from ``first`` on are shifted."""

    def change(k: int, dataset: Dataset) -> None:
        if k >= first:
            move(k, dataset, **shift)

    return change


def creeping(k: int, dataset: Dataset) -> None:
    """Gaps of 2.5 mm, each within 1 %, that add up to more than half a gap."""
    move(k, dataset, z=0.012 * min(k, 200) - 0.012 * max(k - 200, 0))


def tilted(degrees: float) -> Change:
    return lambda k, dataset: move(k, dataset, y=2.5 * k * float(np.tan(np.deg2rad(degrees))))


def at(slice_number: int, **values: object) -> Change:
    """One slice has other values."""

    def change(k: int, dataset: Dataset) -> None:
        if k == slice_number:
            for name, value in values.items():
                setattr(dataset, name, value)

    return change


def everywhere(**values: object) -> Change:
    def change(k: int, dataset: Dataset) -> None:
        for name, value in values.items():
            setattr(dataset, name, value)

    return change


def unplaced(k: int, dataset: Dataset) -> None:
    if k == 3:
        del dataset.ImagePositionPatient


def smaller(k: int, dataset: Dataset) -> None:
    if k == 3:
        dataset.Rows, dataset.PixelData = 10, dataset.PixelData[: 10 * 16 * 2]


def coloured(k: int, dataset: Dataset) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
    dataset.PlanarConfiguration, dataset.PixelData = 0, dataset.PixelData * 3


def compressed(k: int, dataset: Dataset) -> None:
    dataset.compress(RLELossless)
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1


def deflated(k: int, dataset: Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian


def with_lookup(k: int, dataset: Dataset) -> None:
    item = Dataset()
    item.LUTExplanation = PATIENT
    dataset.ModalityLUTSequence = [item]


def unnumbered(k: int, dataset: Dataset) -> None:
    del dataset.PixelSpacing


VERDICTS: dict[str, tuple[Change, str]] = {
    "uneven": (after(6, z=0.4), r"2\.5 to 2\.9 mm apart, .* at 112\.50 mm .* tolerance 1% of 2\.5"),
    "tilt": (tilted(8.0), r"tilt .* lean 8\.00 degrees .* tolerance 0\.375 mm"),
    "slight tilt": (tilted(1.5), r"tilt .* lean 1\.50 degrees"),
    "shifted": (after(6, y=5.0), r"tilt or shifted slices"),
    "one shifted": (lambda k, dataset: move(k, dataset, y=0.3 * (k == 1)), r"shifted slices"),
    "turned": (
        at(4, ImageOrientationPatient=[f"{c:.12f}" for c in oblique()]),
        r"mixes orientation .* tolerance 0\.0001",
    ),
    "zoomed": (at(4, PixelSpacing=[0.8, 1.25]), r"mixes spacing .*\(0\.8, 1\.25\).* tolerance"),
    "cropped": (smaller, r"2 sizes .*\(10, 16\), \(20, 16\)"),
    "moved frame": (at(4, FrameOfReferenceUID="1.2.3"), r"2 frames of reference"),
    "unplaced": (unplaced, r"no position in the patient: a scout"),
    "nowhere": (at(4, ImagePositionPatient=None), r"no position in the patient"),
    "not finite": (at(4, ImagePositionPatient=["0", "0", "1e308"]), r"beyond 1e\+06 mm"),
    "two numbers": (at(4, ImagePositionPatient=[1, 2]), r"finite numbers are needed, 3 of them"),
    "skewed": (
        everywhere(ImageOrientationPatient=[1, 0, 0, 0.1, 1, 0]),
        r"no orthogonal unit vectors: off by 0\.1",
    ),
    "no pixel size": (unnumbered, r"PixelSpacing"),
    "flat pixels": (everywhere(PixelSpacing=[0, 1]), r"pixels of 0\.0 x 1\.0 mm"),
    "slope zero": (at(4, RescaleSlope=0), r"rescale slope of 0"),
    "slope huge": (at(4, RescaleSlope="1e37"), r"rescale slope of 1e\+37 .* leave float32"),
    "deflated": (deflated, r"is deflated DICOM, which is not read"),
    "multi-frame": (everywhere(NumberOfFrames=2), r"multi-frame object of 2 frames"),
    "enhanced": (everywhere(SOPClassUID=EnhancedMRImageStorage), r"multi-frame object"),
    "colour": (coloured, r"colour image \(3 samples per pixel, RGB\)"),
    "compressed": (compressed, r"JPEG Lossless.*; install .*pylibjpeg"),
    "lookup": (with_lookup, r"modality lookup table"),
    "one bit": (everywhere(BitsAllocated=1, BitsStored=1, HighBit=0), r"stores 1 bits"),
    "no rows": (everywhere(Rows=0), r"0 rows and 16 columns"),
    "giant": (everywhere(Rows=65535, Columns=65535), r"65535 rows .* can be read"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_series_that_is_no_volume_is_told_why_in_one_line(tmp_path: Path, name: str) -> None:
    """Segmented anyway, its mask lies elsewhere than the organ, and nobody is told."""
    change, why = VERDICTS[name]
    write_series(tmp_path, voxels(), change=change)
    with pytest.raises(SourceError, match=why) as caught:
        _ = DicomSeries(tmp_path).info
    assert "\n" not in str(caught.value)
    assert "Doe" not in str(caught.value)


def test_missing_slices_are_counted_and_placed(tmp_path: Path) -> None:
    """The two halves would be pushed together, and volumes come out too small."""
    paths = write_series(tmp_path, voxels())
    for k in (4, 5, 9):
        paths[k].unlink()
    why = r"misses 3 slices, 2 of them between 107\.50 and 115\.00 mm .* 2\.5 mm apart"
    with pytest.raises(SourceError, match=why):
        _ = DicomSeries(tmp_path).info


def test_slices_in_one_place_are_counted_and_placed(tmp_path: Path) -> None:
    """Echoes or time points, interleaved, give a volume of twice the height."""
    write_series(tmp_path, voxels())
    for path in write_series(tmp_path / "again", voxels())[:2]:
        path.rename(tmp_path / f"again-{path.name}")
    with pytest.raises(SourceError, match=r"more than one slice in 2 places, first at 100\.00 mm"):
        _ = DicomSeries(tmp_path).info


def test_small_differences_that_add_up_are_refused(tmp_path: Path) -> None:
    """Each gap passes, and the middle of the scan lies a slice off."""
    write_series(tmp_path, voxels((400, 2, 2)), change=creeping)
    with pytest.raises(SourceError, match=r"2\.488 to 2\.512 mm apart"):
        _ = DicomSeries(tmp_path).info


def test_rounded_positions_and_directions_are_a_volume(tmp_path: Path) -> None:
    """Scanners write two or three decimals: refusing those would refuse the archive."""

    def rounded(k: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [f"{float(p):.2f}" for p in dataset.ImagePositionPatient]
        digits = 5 + k % 2
        dataset.ImageOrientationPatient = [
            f"{float(c):.{digits}f}" for c in dataset.ImageOrientationPatient
        ]

    write_series(tmp_path, voxels(), orientation=oblique(), change=rounded)
    assert DicomSeries(tmp_path).info.spacing == pytest.approx((2.5, 0.75, 1.25), abs=1e-3)


def test_a_screenshot_without_a_position_is_a_verdict(tmp_path: Path) -> None:
    """A secondary capture is an image, but of a screen."""

    def capture(k: int, dataset: Dataset) -> None:
        dataset.SOPClassUID = SecondaryCaptureImageStorage
        del dataset.ImagePositionPatient, dataset.ImageOrientationPatient

    write_series(tmp_path, voxels((1, 20, 16)), change=capture)
    with pytest.raises(SourceError, match="a screenshot, not a slice"):
        _ = DicomSeries(tmp_path).info


def test_a_lone_slice_without_a_thickness_is_refused(tmp_path: Path) -> None:
    """There is no third spacing to be had."""

    def thin(k: int, dataset: Dataset) -> None:
        dataset.SliceThickness = None

    write_series(tmp_path, voxels((1, 20, 16)), change=thin)
    with pytest.raises(SourceError, match="no slice thickness"):
        _ = DicomSeries(tmp_path).info
