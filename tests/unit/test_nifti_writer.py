"""NIfTI out: geometry bit for bit, voxels as stored, read by a second library, proved on finish."""

from __future__ import annotations

import hashlib
import itertools
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from adapters.nifti import NiftiSource
from adapters.nifti_header import VolumeGrid, read_header
from adapters.nifti_writer import GEOMETRY_FIELDS, Label, NiftiSpec, verify_nifti, write_nifti
from pipeline.domain import Region
from pipeline.errors import FinishError

MEDICAL = Path(os.environ.get("TERRAVOX_DATA", "../shared/data")) / "medical"
SPEC = NiftiSpec(
    dtype="uint8",
    nodata=255,
    labels=(Label(0, "background", "#000000"), Label(3, "grey & <white>", "#3366ff")),
    intent_name="a name longer than fifteen",
    description="terravox 0123456789abcdef",
    slab_voxels=4,
)
FILES = [
    "totalsegmentator/example_ct.nii.gz",
    "totalsegmentator/example_mr_sm.nii.gz",
    "nibabel/anatomical.nii",
    "nibabel/example_nifti2.nii.gz",
    "nibabel/someones_anatomy.nii.gz",
]


class ArrayInMemory:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def write(self, region: Region, array: np.ndarray) -> str:
        raise NotImplementedError

    def read(self, region: Region) -> np.ndarray:
        return self.array[region.slices(within=Region.whole(self.array.shape))]


def real(name: str) -> Path:
    path = MEDICAL / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set TERRAVOX_DATA")
    return path


def phantom(path: Path, shape: tuple[int, ...] = (5, 6, 9)) -> Path:
    affine = np.array([[0, -2.0, 0, 5], [0, 0, 3, -6], [4, 0, 0, 7], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=2)
    nib.save(image, path)
    return path


def grid_of(source: Path) -> VolumeGrid:
    return NiftiSource(source, volume=0).grid


def labels_of(source: Path) -> ArrayInMemory:
    shape = NiftiSource(source, volume=0).info.shape
    return ArrayInMemory(np.random.default_rng(5).integers(0, 5, shape).astype(np.uint8))


def written(tmp_path: Path, source: Path, spec: NiftiSpec = SPEC) -> tuple[Path, ArrayInMemory]:
    target, store = tmp_path / "mask.nii.gz", labels_of(source)
    write_nifti(target, store=store, grid=grid_of(source), spec=spec)
    return target, store


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_mask_of_a_real_scan_lies_where_the_scan_lies(tmp_path, name, suffix):
    """A re-derived affine moves the mask by a rounding error, or to another convention."""
    source, target = real(name), tmp_path / f"mask{suffix}"
    write_nifti(target, store=labels_of(source), grid=grid_of(source), spec=SPEC)
    mask, scan = read_header(target), read_header(source)
    for field in GEOMETRY_FIELDS:
        assert np.array_equal(mask[field], scan[field]), field
    assert mask["pixdim"][:4].tolist() == scan["pixdim"][:4].tolist()
    assert type(mask) is type(scan)
    np.testing.assert_array_equal(nib.load(target).affine, nib.load(source).affine)
    assert os.listdir(tmp_path) == [target.name]


@pytest.mark.parametrize("name", [name for name in FILES if "nifti2" not in name])  # ITK has none
def test_simpleitk_reads_the_mask_on_the_scans_grid(tmp_path, name):
    """Viewers built on ITK must lay the mask over the scan without a resampling question."""
    source = real(name)
    target, store = written(tmp_path, source)
    scan, mask = SimpleITK.ReadImage(str(source)), SimpleITK.ReadImage(str(target))
    assert mask.GetPixelID() == SimpleITK.sitkUInt8
    assert mask.GetSize() == scan.GetSize()
    assert mask.GetSpacing() == scan.GetSpacing()
    assert mask.GetOrigin() == scan.GetOrigin()
    assert mask.GetDirection() == scan.GetDirection()
    reread = NiftiSource(target)
    values = reread.read(Region.whole(reread.info.shape)).image_CS[0]
    np.testing.assert_array_equal(values, store.array)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_labels_return_to_the_voxel_they_came_from_in_every_orientation(tmp_path, order, signs):
    """Read, label, write: the label of a voxel must lie on that voxel of the original file."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) * signs)[:, order]
    data = np.random.default_rng(3).integers(0, 200, (5, 6, 9)).astype(np.uint8)
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "v.nii")
    source = NiftiSource(tmp_path / "v.nii")
    store = ArrayInMemory(source.read(Region.whole(source.info.shape)).image_CS[0])
    target = tmp_path / "mask.nii"
    write_nifti(target, store=store, grid=source.grid, spec=SPEC)
    np.testing.assert_array_equal(np.asarray(nib.load(target).dataobj), data)


def test_what_the_mask_says_of_itself(tmp_path):
    """Viewers need the label intent and table; nobody needs the patient's name in descrip."""
    source = phantom(tmp_path / "v.nii")
    image = nib.load(source)
    image.header["descrip"], image.header["db_name"] = b"Jane Doe", b"ward 7"
    image.header["cal_max"] = 80
    image.header.set_slope_inter(2, 1)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"Jane Doe"))
    nib.save(image, source)
    target, _ = written(tmp_path, source)
    header = nib.load(target).header
    assert header.get_intent()[0] == "label"
    assert header["intent_name"].item() == b"a name longer t"
    assert header["descrip"].item() == SPEC.description.encode()
    assert header["db_name"].item() == b""
    assert (header["cal_max"], read_header(target)["scl_slope"]) == (0, 1)
    (extension,) = header.extensions
    assert extension.get_code() == 30
    table = ElementTree.fromstring(extension.content.strip(b"\0"))
    found = {label.get("Key"): (label.text, label.get("Blue")) for label in table.iter("Label")}
    assert found["3"] == ("grey & <white>", "1.000000")
    assert found["255"] == ("nodata", "0.000000")


def test_more_than_255_labels_are_stored_in_two_bytes(tmp_path):
    """Wrapped around to uint8, label 300 would be label 44."""
    source = phantom(tmp_path / "v.nii")
    store = ArrayInMemory(labels_of(source).array.astype(np.uint16) + 300)
    target, spec = tmp_path / "mask.nii", replace(SPEC, dtype="uint16", nodata=65535)
    write_nifti(target, store=store, grid=grid_of(source), spec=spec)
    image = nib.load(target)
    assert image.get_data_dtype() == np.uint16
    assert int(np.max(image.dataobj)) == 304
    with pytest.raises(FinishError, match="store holds uint16"):
        write_nifti(target, store=store, grid=grid_of(source), spec=SPEC)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_two_writes_are_the_same_bytes(tmp_path, suffix):
    """A clock or a file name in the gzip header would make every rerun another product."""
    source = phantom(tmp_path / "v.nii")
    targets = [tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"]
    for target in targets:
        write_nifti(target, store=labels_of(source), grid=grid_of(source), spec=SPEC)
    digests = {hashlib.sha256(target.read_bytes()).hexdigest() for target in targets}
    assert len(digests) == 1
    thick = replace(SPEC, slab_voxels=100)
    write_nifti(targets[1], store=labels_of(source), grid=grid_of(source), spec=thick)
    assert targets[0].read_bytes()[:348] == targets[1].read_bytes()[:348] or suffix == ".nii.gz"
    assert np.array_equal(nib.load(targets[0]).dataobj, nib.load(targets[1]).dataobj)


def test_a_mask_shifted_by_one_voxel_does_not_pass(tmp_path):
    """The finisher is the last one to see a stitching slip."""
    source = phantom(tmp_path / "v.nii")
    target, store = written(tmp_path, source)
    shifted = ArrayInMemory(np.roll(store.array, 1, axis=2))
    with pytest.raises(FinishError, match=r"at voxel \(i, j, k\)"):
        verify_nifti(target, store=shifted, grid=grid_of(source), spec=SPEC)


def plant(path: Path, *, at: int, value: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:at] + value + content[at + len(value) :])


@pytest.mark.parametrize(
    ("field", "at", "size"),
    [("qform_code", 252, 2), ("sform_code", 254, 2), ("quatern_b", 256, 4), ("qoffset_x", 268, 4),
     ("srow_x", 280, 4), ("pixdim", 76, 4), ("xyzt_units", 123, 1)],
)  # fmt: skip
def test_every_planted_difference_of_geometry_is_named(tmp_path, field, at, size):
    """A swapped qform shows only in the programs that prefer it, years later."""
    source, target = phantom(tmp_path / "v.nii"), tmp_path / "mask.nii"
    store = labels_of(source)
    write_nifti(target, store=store, grid=grid_of(source), spec=SPEC)
    old = target.read_bytes()[at : at + size]
    plant(target, at=at, value=bytes([old[0] ^ 1]) + old[1:])
    with pytest.raises(FinishError, match=field):
        verify_nifti(target, store=store, grid=grid_of(source), spec=SPEC)


def test_a_truncated_mask_does_not_pass(tmp_path):
    """A full disk that went unnoticed must not yield a product."""
    source, target = phantom(tmp_path / "v.nii"), tmp_path / "mask.nii.gz"
    store = labels_of(source)
    write_nifti(target, store=store, grid=grid_of(source), spec=SPEC)
    target.write_bytes(target.read_bytes()[:-40])
    with pytest.raises(FinishError, match="cannot be read back"):
        verify_nifti(target, store=store, grid=grid_of(source), spec=SPEC)


def test_a_failed_write_leaves_no_file_behind(tmp_path):
    """A half-written output never carries its final name, nor litters the folder."""
    source, folder = phantom(tmp_path / "v.nii"), tmp_path / "out"
    folder.mkdir()
    wrong = ArrayInMemory(labels_of(source).array.astype(np.int32))
    with pytest.raises(FinishError):
        write_nifti(folder / "mask.nii", store=wrong, grid=grid_of(source), spec=SPEC)
    assert not list(folder.iterdir())
    with pytest.raises(FinishError, match="cannot write"):
        write_nifti(tmp_path / "no" / "m.nii", store=wrong, grid=grid_of(source), spec=SPEC)
