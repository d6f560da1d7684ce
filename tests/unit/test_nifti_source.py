"""NIfTI in: orientation, values, units, selection and bad files, with nibabel as the oracle."""

from __future__ import annotations

import gzip
import itertools
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from adapters.nifti import NiftiSource
from adapters.nifti_header import Orientation
from pipeline.domain import Region
from pipeline.errors import RegionError, SourceError, SourceReadError

MEDICAL = Path(os.environ.get("TERRAVOX_DATA", "../shared/data")) / "medical"
SHAPE = (4, 5, 6)
PHANTOM = np.arange(120, dtype=np.int16).reshape(SHAPE)
SIGNED_AXES = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def real(name: str) -> Path:
    path = MEDICAL / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set TERRAVOX_DATA")
    return path


def affine_for(order: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, axis] = sign * (1.0 + 0.5 * axis)
    affine[:, 3] = (7, -8, 9, 1)
    return affine


def oblique(affine: np.ndarray) -> np.ndarray:
    a, b = np.deg2rad((17.0, 11.0))
    about_z = [[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]
    about_x = [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    turned = affine.copy()
    turned[:3] = np.array(about_z) @ np.array(about_x) @ affine[:3]
    return turned


def saved(path: Path, data: np.ndarray = PHANTOM, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 3, 4, 1]) if affine is None else affine), path)
    return path


def whole(source: NiftiSource) -> np.ndarray:
    return source.read(Region.whole(source.info.shape)).image_CS[0]


def canonical(path: Path, volume: int | None = None) -> np.ndarray:
    image = nib.load(path)
    image = image if volume is None else image.slicer[..., volume]
    return np.asarray(nib.as_closest_canonical(image).dataobj).T


@pytest.mark.parametrize("turn", [np.asarray, oblique], ids=["straight", "oblique"])
@pytest.mark.parametrize(("order", "signs"), SIGNED_AXES)
def test_every_orientation_is_read_as_nibabel_canonicalises_it(tmp_path, turn, order, signs):
    """A wrong permutation or flip mirrors organs left to right."""
    path = saved(tmp_path / "v.nii", affine=turn(affine_for(order, signs)))
    source, expected = NiftiSource(path), canonical(path)
    assert source.info.shape == expected.shape
    np.testing.assert_array_equal(whole(source), expected)
    zooms = nib.as_closest_canonical(nib.load(path)).header.get_zooms()
    np.testing.assert_allclose(source.info.spacing, zooms[::-1], rtol=1e-6)
    region = Region((0, 1, 2), (2, 3, 4))
    np.testing.assert_array_equal(source.read(region).image_CS[0], expected[0:2, 1:3, 2:4])


@pytest.mark.parametrize(("order", "signs"), SIGNED_AXES)
def test_storage_and_canonical_order_undo_each_other(order, signs):
    """The writer goes back the way the reader came; a slip would shift or mirror the mask."""
    orientation = Orientation.from_affine(affine_for(order, signs))
    canonical_array = orientation.arrange(PHANTOM)
    np.testing.assert_array_equal(orientation.restore(canonical_array), PHANTOM)
    region = Region((0, 1, 1), (2, 2, 4))
    box = orientation.to_storage(region, shape_zyx=canonical_array.shape)
    assert orientation.to_canonical(box, shape_zyx=canonical_array.shape) == region
    part = PHANTOM[box.slices(within=Region.whole(SHAPE))]
    inside = canonical_array[region.slices(within=Region.whole(canonical_array.shape))]
    np.testing.assert_array_equal(orientation.arrange(part), inside)


@pytest.mark.parametrize(
    ("name", "volume", "dtype"),
    [
        ("nibabel/anatomical.nii", None, "int16"),
        ("nibabel/example_nifti2.nii.gz", 1, "int16"),
        ("nibabel/functional.nii", 7, "float32"),
        ("nibabel/someones_anatomy.nii.gz", None, "float32"),
        ("totalsegmentator/example_mr_sm.nii.gz", None, "int16"),
        ("totalsegmentator/example_ct_sm.nii.gz", None, "int16"),
    ],
)
@pytest.mark.parametrize("with_scratch", [True, False])
def test_real_files_hold_the_values_nibabel_reads(tmp_path, name, volume, dtype, with_scratch):
    """Big-endian, NIfTI-2, scaled, 4-D, LPS and compressed files are all just volumes."""
    path = real(name)
    source = NiftiSource(path, volume=volume, scratch=tmp_path if with_scratch else None)
    values, expected = whole(source), canonical(path, volume)
    assert source.info.dtype == values.dtype.name == dtype
    assert values.dtype.isnative
    np.testing.assert_array_equal(values, expected.astype(dtype))
    np.testing.assert_array_equal(np.reshape(source.info.affine, (4, 4)), nib.load(path).affine)


def test_nan_and_infinity_are_invalid(tmp_path):
    """A NaN that counts as valid poisons every output in its receptive field."""
    data = np.ones(SHAPE, np.float32)
    data[0, 0, 0], data[1, 2, 3] = np.nan, np.inf
    source = NiftiSource(saved(tmp_path / "v.nii", data))
    valid = source.read(Region.whole(source.info.shape)).valid_S
    assert np.argwhere(~valid).tolist() == [[0, 0, 0], [3, 2, 1]]


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1000), ("mm", 1), ("micron", 0.001)])
def test_spacing_is_in_millimetres_whatever_the_unit(tmp_path, unit, factor):
    """Volumes in ml and position_mm of the CRF would be off by 10^3 to 10^9."""
    image = nib.Nifti1Image(PHANTOM, np.diag([2.0, 3, 4, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "v.nii")
    info = NiftiSource(tmp_path / "v.nii").info
    assert info.spacing == pytest.approx((4 * factor, 3 * factor, 2 * factor))
    assert not any("unit" in note for note in info.notes)


def test_voxels_that_lean_have_the_volume_of_their_affine_and_are_told(tmp_path):
    """A CT with a tilted gantry, as converters write it, would get tumours too large."""
    tilt = np.radians(20)
    leaning = np.array(
        [[0.5, 0, 0, 0], [0, 0.5, 5 * np.sin(tilt), 0], [0, 0, 5 * np.cos(tilt), 0], [0, 0, 0, 1]]
    )
    for name, affine, told in (("tilted.nii", leaning, True), ("box.nii", np.eye(4), False)):
        info = NiftiSource(saved(tmp_path / name, PHANTOM, affine)).info
        assert info.voxel_size == pytest.approx(abs(np.linalg.det(affine)) / 1000)
        assert any("right angles" in note for note in info.notes) == told


def test_an_unknown_unit_and_differing_forms_are_said(tmp_path):
    """A user must learn that mm is a guess, and that other tools may place the scan elsewhere."""
    image = nib.Nifti1Image(PHANTOM, np.diag([2.0, 3, 4, 1]))
    image.set_sform(np.diag([2.0, 3, 4, 1]), code=1)
    image.set_qform(np.diag([-2.0, 3, 4, 1]), code=1)
    image.header.set_xyzt_units("unknown")
    nib.save(image, tmp_path / "v.nii")
    notes = NiftiSource(tmp_path / "v.nii").info.notes
    assert any("mm is assumed" in note for note in notes)
    assert any("sform and qform differ" in note for note in notes)
    image.set_qform(np.diag([2.0, 3, 4, 1]), code=1)
    nib.save(image, tmp_path / "same.nii")
    assert not any("differ" in note for note in NiftiSource(tmp_path / "same.nii").info.notes)


def test_a_qform_that_cannot_be_read_beside_a_good_sform_is_said(tmp_path):
    """Some writers leave numbers there that are no rotation; the scan has a place all the same."""
    image = nib.Nifti1Image(PHANTOM, np.diag([2.0, 3, 4, 1]))
    image.set_sform(np.diag([2.0, 3, 4, 1]), code=1)
    image.set_qform(np.diag([2.0, 3, 4, 1]), code=1)
    image.header["quatern_b"] = image.header["quatern_c"] = 0.9
    nib.save(image, tmp_path / "v.nii")
    source = NiftiSource(tmp_path / "v.nii")
    assert any("qform is damaged" in note for note in source.info.notes)
    np.testing.assert_array_equal(whole(source), PHANTOM.T)


def test_a_file_with_four_axes_needs_a_volume_chosen(tmp_path):
    """Taking the first volume silently would segment a b0 image or a scout phase."""
    path = saved(tmp_path / "v.nii", np.stack([PHANTOM, PHANTOM + 1], axis=-1))
    with pytest.raises(SourceError, match=r"4-D with 2 volumes.*--volume N"):
        _ = NiftiSource(path).info
    with pytest.raises(SourceError, match="--volume 2"):
        _ = NiftiSource(path, volume=2).info
    source = NiftiSource(path, volume=1)
    assert source.info.selection == "volume 1 of 2"
    np.testing.assert_array_equal(whole(source), (PHANTOM + 1).T)


def test_a_single_fourth_volume_is_taken_and_said(tmp_path):
    """There is nothing to choose, yet the record must name what was used."""
    info = NiftiSource(saved(tmp_path / "v.nii", PHANTOM[..., np.newaxis])).info
    assert info.selection == "volume 0 of 1"
    assert any("single volume" in note for note in info.notes)


def test_a_pickled_source_reads_in_another_process_and_decompresses_once(tmp_path):
    """Actors receive the source by pickle; four of them must not inflate a scan four times."""
    path, scratch = saved(tmp_path / "v.nii.gz"), tmp_path / "scratch"
    source = NiftiSource(path, scratch=scratch)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        results = list(pool.map(whole, [pickle.loads(pickle.dumps(source))] * 4))
    for values in results:
        np.testing.assert_array_equal(values, PHANTOM.T)
    (plain,) = scratch.glob("*.nii")
    assert not list(scratch.glob("*.partial"))
    before = plain.stat().st_ino
    whole(NiftiSource(path, scratch=scratch))
    assert plain.stat().st_ino == before


def test_a_changed_file_is_not_served_from_an_older_scratch(tmp_path):
    """A rerun in the same folder would segment yesterday's scan."""
    path = saved(tmp_path / "v.nii.gz")
    whole(NiftiSource(path, scratch=tmp_path / "s"))
    saved(path, PHANTOM + 1)
    np.testing.assert_array_equal(whole(NiftiSource(path, scratch=tmp_path / "s")), PHANTOM.T + 1)


def plant(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_truncated_plain_file_is_refused_before_anything_is_read(tmp_path):
    """Its size says so; found tile by tile it would cost a night."""
    path = plant(tmp_path / "a.nii", saved(tmp_path / "v.nii").read_bytes()[:-8])
    with pytest.raises(SourceError, match="cut short"):
        whole(NiftiSource(path))


@pytest.mark.parametrize("with_scratch", [True, False])
def test_a_truncated_file_is_a_read_error(tmp_path, with_scratch):
    """A copy cut short must fail that scan, not fill it with zeros or kill the worker."""
    scratch = tmp_path / "s" if with_scratch else None
    plain = saved(tmp_path / "v.nii").read_bytes()
    packed = gzip.compress(plain)
    broken = {
        "b.nii.gz": gzip.compress(plain[:-8]),
        "c.nii.gz": packed[:-30],
        "d.nii.gz": packed[:-8] + bytes(8),
    }
    if not with_scratch:
        del broken["d.nii.gz"]  # a checksum lies past the voxels, where a partial read stops
    for name, content in broken.items():
        source = NiftiSource(plant(tmp_path / name, content), scratch=scratch)
        with pytest.raises(SourceReadError, match=name):
            whole(source)
    assert not scratch or not list(scratch.glob("*.nii"))


def test_a_damaged_file_is_a_verdict_before_a_region_is_asked_for(tmp_path):
    """Found by a tile, it is unpacked again for each other tile, and for each night."""
    plain = saved(tmp_path / "v.nii").read_bytes()
    packed = gzip.compress(plain)
    for content in (gzip.compress(plain[:-8]), packed[:-30], packed[:-8] + bytes(8)):
        source = NiftiSource(plant(tmp_path / "b.nii.gz", content), scratch=tmp_path / "s")
        with pytest.raises(SourceError, match="damaged, fetch it again"):
            source.unpack()
    with pytest.raises(SourceReadError, match="cannot unpack"):  # no fault of the scan's
        NiftiSource(plant(tmp_path / "g.nii.gz", packed), scratch=tmp_path / "v.nii").unpack()


def test_a_stream_far_longer_than_its_header_says_is_refused(tmp_path):
    """A decompression bomb would fill the disk of every worker."""
    bomb = gzip.compress(saved(tmp_path / "v.nii").read_bytes() + bytes(4 << 20))
    source = NiftiSource(plant(tmp_path / "v.nii.gz", bomb), scratch=tmp_path / "s")
    with pytest.raises(SourceReadError, match="more than the"):
        whole(source)


def test_unusable_headers_are_source_errors(tmp_path):
    """Each would otherwise surface as a numpy traceback in a worker, or as a wrong volume."""
    good = saved(tmp_path / "v.nii").read_bytes()

    def patched(at: int, value: bytes) -> Path:
        return plant(tmp_path / f"bad{at}.nii", good[:at] + value + good[at + len(value) :])

    nan, zero = np.float32(np.nan).tobytes(), bytes(4)
    cases = {
        "affine": patched(280, nan),
        "sizes must be positive": patched(80, zero),
        "not a single-file": patched(344, b"xxxx"),
        "not behind its header": patched(108, np.float32(16).tobytes()),
        "whole numbers or floats": saved(tmp_path / "c.nii", PHANTOM.astype(np.complex64)),
        "three axes": saved(tmp_path / "flat.nii", PHANTOM[0]),
        "cannot read the header": tmp_path / "absent.nii",
        "not a single": plant(tmp_path / "text.nii", b"hello"),
    }
    rgb = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    cases["holds"] = saved(tmp_path / "rgb.nii", rgb)
    for message, path in cases.items():
        with pytest.raises(SourceError, match=message):
            _ = NiftiSource(path).info


def test_a_region_outside_the_volume_is_refused(tmp_path):
    """Clamping it would hand the network another place than the one asked for."""
    with pytest.raises(RegionError):
        NiftiSource(saved(tmp_path / "v.nii")).read(Region((0, 0, 0), (7, 5, 4)))


def test_the_digest_follows_the_content_and_not_the_name(tmp_path):
    """It names the input in the fingerprint: equal on every machine, other for other bytes."""
    first, second = saved(tmp_path / "a.nii"), saved(tmp_path / "b.nii")
    third = saved(tmp_path / "c.nii", PHANTOM + 1)
    assert NiftiSource(first).digest() == NiftiSource(second).digest()
    assert NiftiSource(first).digest() != NiftiSource(third).digest()
    with pytest.raises(SourceReadError):
        NiftiSource(tmp_path / "absent.nii").digest()
