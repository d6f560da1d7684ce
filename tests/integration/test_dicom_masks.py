"""From a DICOM series to a NIfTI mask in the series' own space, by the whole command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import yaml
from dicom_files import PATIENT, affine_of, oblique, read_by_itk, write_series
from pydicom.dataset import Dataset
from scenes import texture

from pipeline.errors import SourceError
from workflows.batching import batch
from workflows.config import SegmentOptions
from workflows.segmenting import segment

OPTIONS = SegmentOptions(backend="serial", tracking_uri="none", precision="fp32", tile=64)
SCAN_KJI = texture((12, 20, 16), seed=3).astype(np.int16)


def assert_same_space(mask: Path, series: Path) -> None:
    """By a reader that wrote neither. NIfTI holds single precision: 1e-7 of some hundred mm."""
    found, wanted = SimpleITK.ReadImage(str(mask)), read_by_itk(series)
    off = np.abs(affine_of(found) - affine_of(wanted)).max()
    print(f"{series.name}: affine differs from the series' by {off:.1e} mm at most")
    assert off < 1e-4
    assert found.GetSize() == wanted.GetSize()


@pytest.mark.parametrize("folder", ["dcmqi_ct3slice/ct-3slice", "dcm_qa_ct_philips_phantom"])
def test_the_mask_of_a_real_series_lies_where_itk_puts_the_series(
    folder: str, data: Path, tmp_path: Path, slim3d: Path
) -> None:
    """A mask that is flipped or shifted looks right by itself, and is wrong over the scan."""
    series, out = data / "medical" / folder, tmp_path / "mask.nii.gz"
    manifest = segment(series, out, model=slim3d, options=OPTIONS)
    assert_same_space(out, series)
    assert sum(row["pixels"] for row in manifest["classes"]) > 0


def test_voxels_of_the_mask_lie_on_the_voxels_of_the_series(tmp_path: Path, slim3d: Path) -> None:
    """The same scan as NIfTI, written by ITK, must get the same label at every voxel."""
    series = tmp_path / "series"
    write_series(series, SCAN_KJI, orientation=oblique())
    SimpleITK.WriteImage(read_by_itk(series), str(tmp_path / "scan.nii.gz"))
    masks = []
    for source in (series, tmp_path / "scan.nii.gz"):
        out = tmp_path / f"{source.name}-mask.nii.gz"
        segment(source, out, model=slim3d, options=OPTIONS)
        masks.append(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(out))))
    assert_same_space(tmp_path / "series-mask.nii.gz", series)
    assert len(np.unique(masks[0])) > 1
    np.testing.assert_array_equal(masks[0], masks[1])


def test_an_archive_of_series_is_done_and_bad_series_are_verdicts(
    tmp_path: Path, slim3d: Path
) -> None:
    """A slice that is missing shifts everything behind it: no mask is better than that one."""

    def second(_: int, dataset: Dataset) -> None:
        dataset.SeriesInstanceUID = "1.2.3.4"

    archive, out = tmp_path / "in", tmp_path / "out"
    write_series(archive / "p1/ct", SCAN_KJI)
    write_series(archive / "p2/ct", SCAN_KJI, orientation=oblique())[5].unlink()
    for path in write_series(archive / "p3/other", SCAN_KJI, change=second):
        path.rename(path.with_name(f"b{path.name}"))
    write_series(archive / "p3/other", SCAN_KJI + 1)
    result = batch([archive], out, models=[slim3d], options=OPTIONS)
    rows = {row["id"]: row for row in result["cases"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "p1__ct": "done",
        "p2__ct": "quarantined",
        "p3__other__1.2.3.4": "done",
        "p3__other__1.2.826.0.1.3680043.8.498.1": "done",
    }
    assert "misses 1 slice" in rows["p2__ct"]["reason"]
    assert_same_space(out / "p1__ct.nii.gz", archive / "p1/ct")
    assert not any(row["computed"] for row in again(archive, out, slim3d)["cases"])


def again(archive: Path, out: Path, model: Path) -> dict[str, Any]:
    return batch([archive], out, models=[model], options=OPTIONS)


def test_nothing_that_is_written_names_the_patient(tmp_path: Path, slim3d: Path) -> None:
    """Masks, reports and tables leave the hospital; names must not."""
    write_series(tmp_path / "in/series", SCAN_KJI)
    batch([tmp_path / "in"], tmp_path / "out", models=[slim3d], options=OPTIONS)
    written = [p for top in ("out", "out.run") for p in (tmp_path / top).rglob("*") if p.is_file()]
    assert len(written) > 5
    family, given = PATIENT.split("^")
    for path in written:
        assert family.encode() not in path.read_bytes(), path
        assert given.encode() not in path.read_bytes(), path


def test_one_of_several_series_is_chosen_by_name(tmp_path: Path, slim3d: Path) -> None:
    """Guessing one would segment the scout."""
    write_series(tmp_path / "in", SCAN_KJI)
    wrong = OPTIONS.model_copy(update={"series": "9.9"})
    with pytest.raises(SourceError, match=r"9\.9"):
        segment(tmp_path / "in", tmp_path / "m.nii.gz", model=slim3d, options=wrong)


def test_another_kind_of_scan_than_the_network_s_is_refused(tmp_path: Path, slim3d: Path) -> None:
    """A CT network gives an MR a mask too, of nonsense."""

    def as_mr(_: int, dataset: Dataset) -> None:
        dataset.Modality = "MR"

    write_series(tmp_path / "mr", SCAN_KJI, change=as_mr)
    write_series(tmp_path / "ct", SCAN_KJI)
    bundle = tmp_path / "bundle"
    shutil.copytree(slim3d, bundle)
    document = yaml.safe_load((bundle / "model.yaml").read_text())
    document["input"]["modality"] = "CT"
    (bundle / "model.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(SourceError, match=r"MR.*trained on CT"):
        segment(tmp_path / "mr", tmp_path / "m.nii.gz", model=bundle, options=OPTIONS)
    segment(tmp_path / "ct", tmp_path / "c.nii.gz", model=bundle, options=OPTIONS)
