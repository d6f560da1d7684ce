"""DICOM in: order in space, values, geometry and padding, with ITK as the oracle."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from dicom_files import (
    AXIAL,
    PATIENT,
    SERIES_UID,
    affine_of,
    canonical_of,
    oblique,
    read_by_itk,
    voxels,
    write_series,
)
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian, RLELossless, SegmentationStorage

from adapters.dicom_folder import find_series, is_dicom_folder
from adapters.dicom_series import DicomSeries
from adapters.nifti_writer import NiftiSpec, write_nifti
from pipeline.domain import Region
from pipeline.errors import RegionError, SourceError, SourceReadError
from pipeline.ports import Block

SPEC = NiftiSpec(dtype="uint16", nodata=65535, labels=(), intent_name="", description="")
ORIENTATIONS = {
    "axial": AXIAL,
    "feet first": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "prone": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    "transposed": (0.0, 1.0, 0.0, 1.0, 0.0, 0.0),
    "oblique": oblique(),
}


class Labels:
    """A store that holds a source's own values, as labels."""

    def __init__(self, source: DicomSeries) -> None:
        self.source = source

    def write(self, region: Region, array: np.ndarray) -> str:
        raise NotImplementedError

    def read(self, region: Region) -> np.ndarray:
        return (self.source.read(region).image_CS[0] + 1024).astype(np.uint16)


def whole(source: DicomSeries) -> Block:
    return source.read(Region.whole(source.info.shape))


def verdict(folder: Path) -> str:
    """The one line that a damaged series gets."""
    with pytest.raises(SourceError) as caught:
        _ = DicomSeries(folder).info
    message = str(caught.value)
    assert "\n" not in message
    assert "Doe" not in message
    return message


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_series_is_what_itk_reads_whatever_its_orientation(tmp_path: Path, name: str) -> None:
    """Slices in order of name, or a flipped axis, give an organ that is shuffled or mirrored."""
    write_series(tmp_path, voxels(), orientation=ORIENTATIONS[name])
    source, image = DicomSeries(tmp_path), read_by_itk(tmp_path)
    found = whole(source)
    np.testing.assert_array_equal(found.image_CS[0], canonical_of(image))
    assert found.image_CS.dtype == np.float32
    assert found.valid_S.all()
    affine = np.reshape(source.info.affine, (4, 4))
    np.testing.assert_allclose(affine, affine_of(image), rtol=0, atol=1e-6)
    assert sorted(source.info.spacing) == pytest.approx([0.75, 1.25, 2.5])


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_a_mask_of_a_series_lies_in_the_series_own_space(tmp_path: Path, name: str) -> None:
    """Viewers lay the mask over the series by its header alone."""
    write_series(tmp_path / "in", voxels(), orientation=ORIENTATIONS[name])
    source, series = DicomSeries(tmp_path / "in"), read_by_itk(tmp_path / "in")
    target = tmp_path / "mask.nii.gz"
    write_nifti(target, store=Labels(source), grid=source.grid, spec=SPEC)
    mask = SimpleITK.ReadImage(str(target))
    assert mask.GetSize() == series.GetSize()
    np.testing.assert_allclose(affine_of(mask), affine_of(series), rtol=0, atol=1e-4)
    stored = SimpleITK.GetArrayFromImage(series) + 1024
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(mask), stored)
    header = source.grid.header
    assert [int(header[code]) for code in ("sform_code", "qform_code")] == [1, 1]
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("with_scratch", [True, False])
def test_any_region_is_that_part_of_the_whole(tmp_path: Path, with_scratch: bool) -> None:
    """A tile across the slices must not come from its neighbours."""
    write_series(tmp_path / "in", voxels(), orientation=ORIENTATIONS["sagittal"])
    scratch = tmp_path / "s" if with_scratch else None
    source, expected = DicomSeries(tmp_path / "in", scratch=scratch), read_by_itk(tmp_path / "in")
    region = Region((3, 4, 2), (9, 11, 7))
    np.testing.assert_array_equal(
        source.read(region).image_CS[0], canonical_of(expected)[3:9, 4:11, 2:7]
    )
    with pytest.raises(RegionError):
        source.read(Region((0, 0, 0), (1, 1, 99)))


def test_a_series_is_decoded_once_for_all_readers(tmp_path: Path) -> None:
    """Each of a thousand tiles would decode every slice again."""
    paths = write_series(tmp_path / "in", voxels())
    source = DicomSeries(tmp_path / "in", scratch=tmp_path / "s")
    before = whole(source).image_CS
    (plain,) = (tmp_path / "s").glob("*.raw")
    made = plain.stat().st_ino
    whole(pickle.loads(pickle.dumps(source)))
    assert plain.stat().st_ino == made
    write_series(tmp_path / "in", voxels() + 1)
    after = whole(DicomSeries(tmp_path / "in", scratch=tmp_path / "s")).image_CS
    np.testing.assert_array_equal(after, before + 1)
    assert len(paths) == 12


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    """PET scales every slice on its own: with the first one's, uptake is wrong by any factor."""

    def scale(k: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{0.5 + k / 8}", k

    stored = voxels(dtype="uint16")
    write_series(tmp_path, stored, change=scale)
    factors = np.arange(12).reshape(-1, 1, 1)
    expected = stored * (0.5 + factors / 8) + factors
    found = whole(DicomSeries(tmp_path)).image_CS[0]
    np.testing.assert_array_equal(found[:, ::-1, ::-1], expected.astype(np.float32))


def test_values_without_rescale_keep_their_type(tmp_path: Path) -> None:
    """MR has none: float32 would double what every tile weighs."""

    def plain(k: int, dataset: Dataset) -> None:
        del dataset.RescaleSlope, dataset.RescaleIntercept

    write_series(tmp_path, voxels(dtype="uint16"), change=plain)
    source = DicomSeries(tmp_path)
    found = whole(source).image_CS[0]
    assert source.info.dtype == found.dtype.name == "uint16"
    np.testing.assert_array_equal(found, canonical_of(read_by_itk(tmp_path)))


@pytest.mark.parametrize(("stated", "limit"), [(-2000, None), (63536, None), (-2000, -1990)])
def test_padding_is_not_data(tmp_path: Path, stated: int, limit: int | None) -> None:
    """Outside the tube there is no air at -3024: it would be a class of its own."""
    stored = voxels()
    stored[:, :4, :3], stored[:, 4, :3] = -2000, -1995

    def pad(k: int, dataset: Dataset) -> None:
        dataset.add_new("PixelPaddingValue", "SS" if stated < 0 else "US", stated)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", "SS", limit)

    write_series(tmp_path, stored, change=pad)
    source = DicomSeries(tmp_path)
    expected = (stored < -1990) if limit else (stored == -2000)
    np.testing.assert_array_equal(whole(source).valid_S[:, ::-1, ::-1], ~expected)
    assert any("pixel padding (stored value -2000" in note for note in source.info.notes)


def test_monochrome1_is_read_as_stored_and_said(tmp_path: Path) -> None:
    """Inverted in silence, bone is air for a network that saw the stored values."""

    def invert(k: int, dataset: Dataset) -> None:
        dataset.PhotometricInterpretation = "MONOCHROME1"

    write_series(tmp_path, voxels(), change=invert)
    source = DicomSeries(tmp_path)
    np.testing.assert_array_equal(whole(source).image_CS[0][:, ::-1, ::-1], voxels() - 1024.0)
    assert any("MONOCHROME1" in note for note in source.info.notes)


def test_bits_that_are_not_stored_do_not_count(tmp_path: Path) -> None:
    """Old scanners keep overlays in the top four of sixteen bits."""
    stored = voxels((3, 20, 16), "uint16")

    def twelve(k: int, dataset: Dataset) -> None:
        dataset.BitsStored, dataset.HighBit = 12, 11
        dataset.PixelData = (stored[k] | 0x8000).tobytes()

    write_series(tmp_path, stored, change=twelve)
    found = whole(DicomSeries(tmp_path)).image_CS[0]
    np.testing.assert_array_equal(found[:, ::-1, ::-1], stored - 1024.0)


def test_other_encodings_are_the_same_values(tmp_path: Path) -> None:
    """Archives compress; some files have neither preamble nor meta group."""

    def compress(k: int, dataset: Dataset) -> None:
        dataset.compress(RLELossless)

    def implicit(k: int, dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian

    write_series(tmp_path / "plain", voxels())
    write_series(tmp_path / "rle", voxels(), change=compress)
    expected = whole(DicomSeries(tmp_path / "plain")).image_CS
    np.testing.assert_array_equal(whole(DicomSeries(tmp_path / "rle")).image_CS, expected)
    for n, path in enumerate(write_series(tmp_path / "bare", voxels(), change=implicit)):
        content = path.read_bytes()
        path.unlink()
        start = content.index(b"\x08\x00\x16\x00")  # SOPClassUID: the first tag of the data set
        (tmp_path / "bare" / f"{n}.dcm").write_bytes(content[start:])
    np.testing.assert_array_equal(whole(DicomSeries(tmp_path / "bare")).image_CS, expected)


def test_a_lone_slice_takes_its_thickness_and_says_so(tmp_path: Path) -> None:
    """Its height is a guess, which volumes in ml depend on."""
    write_series(tmp_path, voxels((1, 20, 16)))
    info = DicomSeries(tmp_path).info
    assert info.spacing == (3.0, 0.75, 1.25)
    assert any("thickness" in note for note in info.notes)


def test_the_digest_is_of_the_slices_in_space_and_not_of_their_names(tmp_path: Path) -> None:
    """It names the input in the fingerprint: equal on every machine, other for other bytes."""
    write_series(tmp_path / "a", voxels())
    for k, path in enumerate(write_series(tmp_path / "b", voxels())):
        path.rename(path.with_name(f"slice-{k}.dcm"))
    changed = voxels()
    changed[5, 3, 2] += 1
    write_series(tmp_path / "c", changed)
    digests = [DicomSeries(tmp_path / name).digest() for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_a_slice_cut_short_at_any_byte_is_refused_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    """Found tile by tile it would cost a night; taken for zeros, a patient."""
    paths = write_series(tmp_path, voxels((3, 20, 16)))
    content = paths[1].read_bytes()
    for length in range(132, len(content)):
        paths[1].write_bytes(content[:length])
        assert re.search("is cut short|is a damaged DICOM file", verdict(tmp_path)), length


@pytest.mark.filterwarnings("ignore:End of file reached:UserWarning")
@pytest.mark.parametrize("with_scratch", [True, False])
def test_a_slice_that_breaks_later_is_a_read_error(tmp_path: Path, with_scratch: bool) -> None:
    """The worker must live, and no half-decoded series be left for the others."""

    def compress(k: int, dataset: Dataset) -> None:
        dataset.compress(RLELossless)

    paths = write_series(tmp_path / "in", voxels(), change=compress)
    paths[6].write_bytes(paths[6].read_bytes()[:-300])
    scratch = tmp_path / "s" if with_scratch else None
    with pytest.raises(SourceReadError, match=re.escape(paths[6].name)):
        whole(DicomSeries(tmp_path / "in", scratch=scratch))
    assert not scratch or not list(scratch.glob("*.raw"))
    if with_scratch:
        with pytest.raises(SourceError, match=re.escape(paths[6].name)):
            DicomSeries(tmp_path / "in", scratch=scratch).unpack()


def test_of_several_series_one_is_chosen_by_its_uid(tmp_path: Path) -> None:
    """Two phases in one folder, mixed, are one organ in two places."""
    other = f"{SERIES_UID}.7"

    def second(k: int, dataset: Dataset) -> None:
        dataset.SeriesInstanceUID, dataset.Modality = other, "PT"

    write_series(tmp_path, voxels())
    for path in write_series(tmp_path / "second", voxels((5, 20, 16)) + 1, change=second):
        path.rename(tmp_path / f"second-{path.name}")
    message = verdict(tmp_path)
    for part in ("2 series", "--series", f"{SERIES_UID} (CT, 12 slices)", f"{other} (PT, 5 slices"):
        assert part in message
    source = DicomSeries(tmp_path, other)
    assert source.info.shape == (5, 20, 16)
    assert source.info.selection == f"series {other} of 2"
    found = find_series(tmp_path)
    assert [(f.uid, f.modality, len(f.files)) for f in found] == [
        (SERIES_UID, "CT", 12), (other, "PT", 5),
    ]  # fmt: skip
    with pytest.raises(SourceError, match=r"--series 1\.2 asked"):
        _ = DicomSeries(tmp_path, "1.2").info


def test_what_is_no_slice_is_passed_over(tmp_path: Path) -> None:
    """Folders from a disc hold an index, a report, a viewer and the last segmentation."""

    def segmentation(k: int, dataset: Dataset) -> None:
        dataset.SOPClassUID, dataset.Modality = SegmentationStorage, "SEG"

    (tmp_path / "seg").mkdir()
    assert not is_dicom_folder(tmp_path / "seg")
    (seg,) = write_series(tmp_path / "seg", voxels((1, 20, 16)), change=segmentation)
    assert is_dicom_folder(tmp_path / "seg")
    assert find_series(tmp_path / "seg") == ()
    assert "found 1 x Segmentation Storage" in verdict(tmp_path / "seg")
    write_series(tmp_path / "ct", voxels())
    seg.rename(tmp_path / "ct" / "seg.dcm")
    (tmp_path / "ct" / "DICOMDIR").write_bytes(bytes(128) + b"DICM and nonsense")
    (tmp_path / "ct" / "readme.txt").write_text("hello")
    assert len(find_series(tmp_path / "ct")[0].files) == 12
    assert DicomSeries(tmp_path / "ct").info.shape == (12, 20, 16)


def test_nothing_that_is_said_names_the_patient(tmp_path: Path) -> None:
    """Notes go to MLflow, reports and file headers."""
    write_series(tmp_path, voxels())
    source = DicomSeries(tmp_path)
    assert PATIENT not in repr((source.info, source, source.grid.header))
    assert PATIENT.encode() not in pickle.dumps(source)
