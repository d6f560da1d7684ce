"""Scans through a network that is a threshold, so that every voxel of the mask is known."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
import zarr
from real_files import NODATA, SERIAL, slim_network
from torch import nn

from pipeline.models.bundle import Bundle, ClassInfo, InputSpec, Scaling, save_bundle
from workflows.segmenting import segment

NIFTI_FIELDS = np.dtype(
    {
        "names": ["dim", "pixdim", "xyzt_units", "codes", "quaternion", "srow"],
        "formats": ["4i2", "4f4", "u1", "2i2", "6f4", "12f4"],
        "offsets": [40, 76, 123, 252, 256, 280],
        "itemsize": 348,
    }
)
"""Where NIfTI-1 keeps its geometry, after the standard's nifti1.h; nobody's library."""


def geometry(path: Path) -> bytes:
    """The geometry fields as bits, in one byte order."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        header = file.read(348)
    order = "<" if header[0] == 92 else ">"  # 348 is 0x15c
    fields = np.frombuffer(header, NIFTI_FIELDS.newbyteorder(order))[0]
    return b"".join(
        np.asarray(fields[n]).astype(NIFTI_FIELDS[n].base).tobytes() for n in fields.dtype.names
    )


def threshold_bundle(path: Path, *, low: float, span: float, level: float) -> Bundle:
    """Class 1 where ``(x - low) / span`` exceeds ``level``, sampled at every second voxel.

    All weights are zero but the centre taps of one path from image to logit; between the samples
    the network upsamples, as it always does.
    """
    network = slim_network(3, bands=1, classes=2, seed=0)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv3d):
                layer.weight.zero_()
            if isinstance(layer, nn.BatchNorm3d):
                layer.running_var.fill_(1 - layer.eps)
        aspp, last = network.classifier[0], network.classifier[-1]
        network.backbone[0].weight[0, 0, 1, 1, 1] = 1
        for layer in (aspp.convs[0][0], aspp.project[0]):
            layer.weight[0, 0] = 1
        last.weight[1, 0] = 1
        last.bias.copy_(torch.tensor([level, 0.0]))
    bundle = Bundle(
        name="threshold",
        version=1,
        architecture=network.architecture,
        classes=(
            ClassInfo(id=3, name="dark", color="#000000"),
            ClassInfo(id=7, name="bright", color="#ffcc00"),
        ),
        ignore_index=NODATA,
        input=InputSpec(
            bands=1, dtype="int16", scaling=Scaling(type="z-score", mean=(low,), std=(span,))
        ),
        crop=(64, 64, 64),
    )
    return save_bundle(path, bundle, network.state_dict())


def expected_logit(image_XYZ: np.ndarray) -> np.ndarray:
    """What the threshold sees: every second voxel from the canonical corner, linear between."""
    for axis, length in enumerate(image_XYZ.shape):
        coarse = np.moveaxis(image_XYZ, axis, 0)[::2]
        at = np.clip((np.arange(length) + 0.5) / 2 - 0.5, 0, len(coarse) - 1)
        below = np.minimum(at.astype(int), max(len(coarse) - 2, 0))
        share = (at - below).reshape(-1, 1, 1)
        above = np.minimum(below + 1, len(coarse) - 1)
        image_XYZ = np.moveaxis(coarse[below] * (1 - share) + coarse[above] * share, 0, axis)
    return image_XYZ


def canonical(path: Path) -> np.ndarray:
    """(X, Y, Z) float64 as nibabel turns it, right, front and head up."""
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj, np.float64)


SCANS = (
    "totalsegmentator/example_ct.nii.gz",
    "totalsegmentator/example_mr_sm.nii.gz",
    "nibabel/anatomical.nii",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A real scan and its mask, made by the threshold at the 80th percentile."""

    source: Path
    mask: Path
    expected_XYZ: np.ndarray
    """Bool, canonical order."""

    sure_XYZ: np.ndarray
    """False where the last bits of a float decide."""


@pytest.fixture(scope="module", params=SCANS, ids=lambda name: name.split("/")[1].split(".")[0])
def scan(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Scan:
    source, folder = data / "medical" / request.param, tmp_path_factory.mktemp("scan")
    image_XYZ = canonical(source)
    low, span = float(image_XYZ.min()), float(np.ptp(image_XYZ))
    seen_XYZ = (expected_logit(image_XYZ) - low) / span
    level = float(np.percentile(seen_XYZ, 80))
    bundle = threshold_bundle(folder / "model", low=low, span=span, level=level)
    mask = folder / f"mask{''.join(source.suffixes)}"
    asked = SERIAL.model_copy(update={"tile": 64})
    segment(source, mask, model=bundle.path, options=asked)
    off_XYZ = seen_XYZ - level
    return Scan(source=source, mask=mask, expected_XYZ=off_XYZ > 0, sure_XYZ=np.abs(off_XYZ) > 1e-6)


def test_a_mask_carries_the_geometry_of_its_scan_bit_for_bit(scan: Scan) -> None:
    """A re-derived quaternion or a swapped code moves a tumour, in some viewers only."""
    assert geometry(scan.mask) == geometry(scan.source)
    mask, source = nib.load(scan.mask), nib.load(scan.source)
    assert np.array_equal(mask.affine, source.affine)
    assert mask.get_data_dtype() == np.uint8


def test_a_second_reader_puts_the_mask_where_the_scan_is(scan: Scan) -> None:
    """SimpleITK derives its own geometry; tools that resample use it."""
    mask, source = (SimpleITK.ReadImage(str(path)) for path in (scan.mask, scan.source))
    assert mask.GetSize() == source.GetSize()
    assert mask.GetOrigin() == source.GetOrigin()
    assert mask.GetSpacing() == source.GetSpacing()
    assert mask.GetDirection() == source.GetDirection()


def test_the_mask_of_a_scan_is_the_threshold_of_its_voxels(scan: Scan) -> None:
    """Mirrored or transposed on the way in or out, half of the voxels would be wrong."""
    found_XYZ = canonical(scan.mask)
    assert set(np.unique(found_XYZ)) == {3, 7}
    wrong_XYZ = ((found_XYZ == 7) != scan.expected_XYZ) & scan.sure_XYZ
    assert not wrong_XYZ.any()
    assert scan.sure_XYZ.mean() > 0.999
    for axis in range(3):
        mirrored_XYZ = np.flip(found_XYZ == 7, axis)
        assert (mirrored_XYZ != scan.expected_XYZ).mean() > 0.02
    stored_ZYX = zarr.open_array(f"{scan.mask}.run/mask.zarr", mode="r")[:]
    assert np.array_equal(stored_ZYX.transpose(2, 1, 0), found_XYZ)


def test_bright_voxels_of_a_scan_are_bright_in_storage_order(scan: Scan) -> None:
    """The same without any reorienting: voxel (i, j, k) of both files, as they lie on disk."""
    bright = np.asarray(nib.load(scan.mask).dataobj) == 7
    values = np.asarray(nib.load(scan.source).dataobj, np.float64)
    right = (bright == (values > np.percentile(values, 80))).mean()
    assert right > 0.85
    for axis in range(3):
        mirrored = np.flip(bright, axis)
        assert (mirrored == (values > np.percentile(values, 80))).mean() < right - 0.03
