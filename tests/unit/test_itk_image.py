"""NRRD and MetaImage in: values, geometry and files that lie, with ITK's own reading as oracle."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from dicom_files import affine_of, canonical_of, oblique

from adapters.itk_image import ItkImage
from pipeline.domain import Region
from pipeline.errors import RegionError, SourceError, SourceReadError

FORMATS = ("v.nrrd", "v.mha", "v.mhd")
DIRECTIONS = {
    "LPS": np.eye(3),
    "RAS": np.diag([-1.0, -1.0, 1.0]),
    "left-handed": np.diag([1.0, 1.0, -1.0]),
    "sagittal": np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "oblique": np.column_stack(
        [oblique()[:3], oblique()[3:], np.cross(oblique()[:3], oblique()[3:])]
    ),
}


def image(direction: np.ndarray = DIRECTIONS["LPS"], dtype: str = "int16") -> SimpleITK.Image:
    values = np.random.default_rng(2).permutation(7 * 9 * 11).reshape(7, 9, 11).astype(dtype)
    made = SimpleITK.GetImageFromArray(values)
    made.SetSpacing((0.75, 1.25, 2.5))
    made.SetOrigin((-30.5, 40.25, 100.0))
    made.SetDirection(direction.ravel().tolist())
    return made


def saved(path: Path, made: SimpleITK.Image, *, compress: bool = False) -> Path:
    SimpleITK.WriteImage(made, str(path), useCompression=compress)
    return path


def whole(source: ItkImage) -> np.ndarray:
    return source.read(Region.whole(source.info.shape)).image_CS[0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_volume_is_what_itk_reads_whatever_its_axes(tmp_path, name, direction):
    """NRRD keeps its own space, MetaImage another: a slip mirrors organs left to right."""
    made = image(DIRECTIONS[direction])
    source = ItkImage(saved(tmp_path / name, made))
    np.testing.assert_array_equal(whole(source), canonical_of(made))
    affine = np.reshape(source.info.affine, (4, 4))
    np.testing.assert_allclose(affine, affine_of(made), rtol=0, atol=1e-6)
    assert sorted(source.info.spacing) == pytest.approx([0.75, 1.25, 2.5])
    header = source.grid.header
    for form in (header.get_sform(), header.get_qform()):
        np.testing.assert_allclose(form, affine_of(made), rtol=0, atol=1e-4)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("with_scratch", [True, False])
def test_any_region_is_that_part_of_the_whole(tmp_path, name, compress, with_scratch):
    """A tile must not depend on how the file is packed."""
    made = image(DIRECTIONS["sagittal"])
    scratch = tmp_path / "s" if with_scratch else None
    source = ItkImage(saved(tmp_path / name, made, compress=compress), scratch=scratch)
    source = pickle.loads(pickle.dumps(source))
    region = Region((1, 2, 3), (4, 6, 5))
    expected = canonical_of(made)[1:4, 2:6, 3:5]
    np.testing.assert_array_equal(source.read(region).image_CS[0], expected)
    np.testing.assert_array_equal(source.read(region).image_CS[0], expected)
    random_access = not compress and name != "v.nrrd"
    assert any("not random access" in note for note in source.info.notes) != random_access
    assert len(list((tmp_path / "s").glob("*.raw"))) == (with_scratch and not random_access)
    with pytest.raises(RegionError):
        source.read(Region((0, 0, 0), (1, 1, 99)))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_values_keep_their_type(tmp_path, dtype):
    """Floats cast to whole numbers would lose a normalised scan."""
    made = image(dtype=dtype)
    source = ItkImage(saved(tmp_path / "v.nrrd", made))
    assert source.info.dtype == whole(source).dtype.name == dtype
    np.testing.assert_array_equal(whole(source), canonical_of(made))


def test_an_unknown_space_is_said(tmp_path):
    """Without a space nobody knows left from right: a user must learn that it was assumed."""
    path = saved(tmp_path / "v.nrrd", image())
    assert not any("space" in note for note in ItkImage(path).info.notes)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"space: left-posterior-superior", b"space: scanner-xyz"))
    assert any("'scanner-xyz'" in note for note in ItkImage(path).info.notes)


def planted(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


def test_a_header_cannot_point_at_another_folders_file(tmp_path):
    """An archive from a stranger would be segmented out of our own files."""
    (tmp_path / "private.raw").write_bytes(bytes(10000))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.raw").symlink_to(tmp_path / "private.raw")
    for name in ("../private.raw", str(tmp_path / "private.raw"), "link.raw", "LIST", "gone.raw"):
        header = saved(folder / "v.mhd", image())
        planted(header, b"ElementDataFile = v.raw", f"ElementDataFile = {name}".encode())
        with pytest.raises(SourceError, match="lies beside it"):
            _ = ItkImage(header).info
    header = saved(folder / "v.mhd", image())
    planted(header, b"ElementDataFile = v.raw", b"ElementDataFile : ../private.raw")
    with pytest.raises(SourceError, match="lies beside it"):
        _ = ItkImage(header).info
    mha = planted(saved(folder / "v.mha", image()), b"= LOCAL\n", b"= v.raw\n")
    with pytest.raises(SourceError, match=r"only an \.mhd"):
        _ = ItkImage(mha).info
    detached = planted(saved(folder / "v.nrrd", image()), b"\n\n", b"\nData File: v.raw\n\n")
    with pytest.raises(SourceError, match=r"only an \.mhd"):
        _ = ItkImage(detached).info


def skewed() -> bytes:
    return b"space directions: (0.75,0,0) (0.3,1.25,0) (0,0,2.5)"


def test_what_is_no_volume_is_one_line(tmp_path):
    """Each would otherwise be a C++ trace in a worker, or a mask in another place."""
    flat = SimpleITK.GetImageFromArray(np.zeros((9, 11), np.int16))
    colour = SimpleITK.GetImageFromArray(np.zeros((7, 9, 11, 3), np.uint8), isVector=True)
    moving = SimpleITK.GetImageFromArray(np.zeros((2, 7, 9, 11), np.int16))
    straight = b"space directions: (0.75,0,0) (0,1.25,0) (0,0,2.5)"
    text = tmp_path / "text.nrrd"
    text.write_text("hello\n\n")
    endless = tmp_path / "endless.mha"
    endless.write_bytes(b"NDims = 3\n" * 200_000)
    cases = [
        ("needs three axes", saved(tmp_path / "flat.nrrd", flat)),
        ("3 values per voxel", saved(tmp_path / "colour.mha", colour)),
        ("needs three axes", saved(tmp_path / "moving.nrrd", moving)),
        ("right angles", planted(saved(tmp_path / "s.nrrd", image()), straight, skewed())),
        ("cannot read the header", text),
        ("does not end", endless),
        ("cannot read the header", tmp_path / "absent.mha"),
    ]
    for why, path in cases:
        with pytest.raises(SourceError, match=why) as caught:
            _ = ItkImage(path).info
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)


@pytest.mark.parametrize("number", [b"nan", b"inf", b"0", b"1e400"])
def test_a_voxel_without_a_size_is_refused(tmp_path, number):
    """A spacing that is no number makes every volume in ml one that is none."""
    nrrd = planted(saved(tmp_path / "v.nrrd", image()), b"(0.75,0,0)", b"(" + number + b",0,0)")
    with pytest.raises(SourceError):
        _ = ItkImage(nrrd).info
    meta = planted(
        saved(tmp_path / "v.mha", image()), b"ElementSpacing = 0.75", b"ElementSpacing = " + number
    )
    with pytest.raises(SourceError):
        _ = ItkImage(meta).info


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("with_scratch", [True, False])
def test_a_truncated_file_is_an_error(tmp_path, name, compress, with_scratch):
    """A copy cut short must fail that scan, not fill it with zeros."""
    path = saved(tmp_path / name, image(), compress=compress)
    data = next(tmp_path.glob("v.*raw"), path)
    data.write_bytes(data.read_bytes()[:-200])
    source = ItkImage(path, scratch=tmp_path / "s" if with_scratch else None)
    with pytest.raises((SourceReadError, SourceError), match=name) as caught:
        whole(source)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("s/*.raw"))
    if with_scratch and not source._header.layout.random_access:
        with pytest.raises(SourceError, match=name):
            source.unpack()


def test_the_digest_follows_the_voxels_wherever_they_lie(tmp_path):
    """An .mhd whose data file changed is another scan."""
    path = saved(tmp_path / "v.mhd", image())
    first = ItkImage(path).digest()
    data = tmp_path / "v.raw"
    data.write_bytes(data.read_bytes()[::-1])
    assert ItkImage(path).digest() != first
