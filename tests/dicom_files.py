"""A DICOM series to write, whole or damaged, and how ITK reads one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SHAPE_KJI = (12, 20, 16)
SERIES_UID = "1.2.826.0.1.3680043.8.498.1"
PATIENT = "Doe^Jane"


def oblique() -> tuple[float, ...]:
    """Rows and columns turned by 20 degrees about z and 10 about x, to all digits of a DS."""
    a, b = np.deg2rad((20.0, 10.0))
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    turn = about_z @ about_x
    return (*turn[:, 0], *turn[:, 1])


def voxels(shape_KJI: tuple[int, ...] = SHAPE_KJI, dtype: str = "int16") -> np.ndarray:
    """(K, J, I) that differ everywhere, so that no flip or swap goes unseen."""
    return (
        np.random.default_rng(8)
        .permutation(int(np.prod(shape_KJI)))
        .reshape(shape_KJI)
        .astype(dtype)
    )


def write_series(
    folder: Path,
    stored_KJI: np.ndarray,
    *,
    orientation: tuple[float, ...] = AXIAL,
    gap_mm: float = 2.5,
    change: Callable[[int, Dataset], None] = lambda k, dataset: None,
) -> list[Path]:
    """CT slices, rescaled by -1024, under shuffled names; the paths in their order in space.

    ``change`` may alter the data set of slice k before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"IM{n:04d}" for n in range(len(stored_KJI))]
    random.Random(4).shuffle(names)
    normal = np.cross(orientation[:3], orientation[3:])
    for k, (name, stored_JI) in enumerate(zip(names, stored_KJI, strict=True)):
        dataset = _slice(k, stored_JI)
        dataset.ImageOrientationPatient = [f"{c:.13f}"[:16] for c in orientation]
        dataset.ImagePositionPatient = [
            f"{p:.10f}" for p in np.array((-30.5, 40.25, 100.0)) + k * gap_mm * normal
        ]
        change(k, dataset)
        dataset.save_as(folder / name, enforce_file_format=True)
    return [folder / name for name in names]


def _slice(k: int, stored_JI: np.ndarray) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, f"{SERIES_UID}.{k + 1}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{SERIES_UID}.0", SERIES_UID
    dataset.FrameOfReferenceUID = f"{SERIES_UID}.99"
    dataset.PatientName = dataset.PatientID = PATIENT
    dataset.SeriesDescription = f"of {PATIENT}"
    dataset.Modality, dataset.InstanceNumber = "CT", k + 1
    dataset.Rows, dataset.Columns = stored_JI.shape
    dataset.PixelSpacing, dataset.SliceThickness = [0.75, 1.25], 3
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored_JI.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored_JI.dtype.kind == "i")
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = stored_JI.tobytes()
    return dataset


def read_by_itk(folder: Path) -> Any:
    """The series as GDCM sorts and ITK reads it."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def affine_of(image: Any) -> np.ndarray:
    """(4, 4) float64, ijk to right-anterior-superior, of an ITK image."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def canonical_of(image: Any) -> np.ndarray:
    """(Z, Y, X) of an ITK image, turned by ITK: to the right, to the front, up."""
    return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(image, "RAS")))
