"""The sources that keep the contract: rasters, volumes and memory."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import rasterio
import SimpleITK
from conformance.source_contract import Sample, SourceContract
from dicom_files import voxels, write_series

from adapters.dicom_series import DicomSeries
from adapters.geotiff import GeoTiffSource
from adapters.itk_image import ItkImage
from adapters.memory import MemorySource
from adapters.nifti import NiftiSource

SHAPE = (37, 53)


def write_tiff(path: Path, image_CS: np.ndarray, **profile: object) -> None:
    """A small tiled GeoTIFF in UTM zone 33."""
    count, height, width = image_CS.shape
    shape = {"count": count, "height": height, "width": width, "dtype": image_CS.dtype}
    layout = {"tiled": True, "blockxsize": 16, "blockysize": 16, "crs": "EPSG:32633"}
    grid = {"transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
    with rasterio.open(path, "w", driver="GTiff", **shape, **layout, **grid, **profile) as file:
        file.write(image_CS)


class TestGeoTiff(SourceContract):
    def make(self, folder: Path) -> Sample:
        image_CS = np.random.default_rng(1).integers(1, 4000, (3, *SHAPE), dtype=np.uint16)
        image_CS[1, 5:9, 40:] = 0
        write_tiff(folder / "a.tif", image_CS, nodata=0)
        source = GeoTiffSource(folder / "a.tif")
        return Sample(source=source, image_CS=image_CS, valid_S=(image_CS != 0).all(axis=0))


class TestFloatGeoTiff(SourceContract):
    def make(self, folder: Path) -> Sample:
        image_CS = np.random.default_rng(2).normal(size=(2, *SHAPE)).astype(np.float32)
        image_CS[0, :4, :4], image_CS[1, 30:, 50:], image_CS[0, 20, 20] = np.nan, np.inf, -9999
        write_tiff(folder / "a.tif", image_CS, nodata=-9999)
        valid_S = np.isfinite(image_CS).all(axis=0) & (image_CS != -9999).all(axis=0)
        return Sample(source=GeoTiffSource(folder / "a.tif"), image_CS=image_CS, valid_S=valid_S)


class TestVrt(SourceContract):
    def make(self, folder: Path) -> Sample:
        image_CS = np.random.default_rng(3).integers(0, 255, (2, *SHAPE), dtype=np.uint8)
        bands = ""
        for number, band_S in enumerate(image_CS, start=1):
            write_tiff(folder / f"{number}.tif", band_S[None])
            bands += (
                f'<VRTRasterBand dataType="Byte" band="{number}"><NoDataValue>{number}'
                '</NoDataValue><SimpleSource><SourceFilename relativeToVRT="1">'
                f"{number}.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
                "</VRTRasterBand>"
            )
        size = f'rasterXSize="{SHAPE[1]}" rasterYSize="{SHAPE[0]}"'
        (folder / "a.vrt").write_text(f"<VRTDataset {size}>{bands}</VRTDataset>")
        valid_S = (image_CS[0] != 1) & (image_CS[1] != 2)
        return Sample(source=GeoTiffSource(folder / "a.vrt"), image_CS=image_CS, valid_S=valid_S)


def volume() -> np.ndarray:
    """(Z, Y, X) float32, with voxels that are no numbers."""
    image_ZYX = np.random.default_rng(5).normal(size=(7, 9, 11)).astype(np.float32)
    image_ZYX[0, :2, :3], image_ZYX[6, 8, 10] = np.nan, np.inf
    return image_ZYX


class TestNifti(SourceContract):
    def make(self, folder: Path) -> Sample:
        image_ZYX = volume()
        stored_XYZ = np.flip(image_ZYX.T, axis=0)
        nib.save(nib.Nifti1Image(stored_XYZ, np.diag([-1.0, 2, 3, 1])), folder / "v.nii.gz")
        source = NiftiSource(folder / "v.nii.gz", scratch=folder / "scratch")
        return Sample(source=source, image_CS=image_ZYX[None], valid_S=np.isfinite(image_ZYX))


class TestDicomSeries(SourceContract):
    scratch: str | None = "scratch"

    def make(self, folder: Path) -> Sample:
        stored_KJI = voxels((7, 9, 11))
        stored_KJI[:, :3, 5:] = -2000
        write_series(
            folder / "series",
            stored_KJI,
            orientation=(-1.0, 0.0, 0.0, 0.0, -1.0, 0.0),  # columns count up to the right
            change=lambda k, dataset: dataset.add_new("PixelPaddingValue", "SS", -2000),
        )
        scratch = folder / self.scratch if self.scratch else None
        image_ZYX = stored_KJI.astype(np.float32) - 1024
        return Sample(
            source=DicomSeries(folder / "series", scratch=scratch),
            image_CS=image_ZYX[None],
            valid_S=stored_KJI != -2000,
        )


class TestDicomSeriesWithoutScratch(TestDicomSeries):
    scratch = None


class TestItkImage(SourceContract):
    name = "v.nrrd"

    def make(self, folder: Path) -> Sample:
        image_ZYX = volume()
        image = SimpleITK.GetImageFromArray(image_ZYX[:, ::-1, ::-1])  # to the left, to the back
        SimpleITK.WriteImage(image, str(folder / self.name))
        source = ItkImage(folder / self.name, scratch=folder / "scratch")
        return Sample(source=source, image_CS=image_ZYX[None], valid_S=np.isfinite(image_ZYX))


class TestMetaImage(TestItkImage):
    name = "v.mha"


class TestMemory(SourceContract):
    def make(self, folder: Path) -> Sample:
        image_CS = np.random.default_rng(4).normal(size=(2, 7, 9, 11)).astype(np.float32)
        image_CS[1, 3] = np.nan
        valid_S = np.isfinite(image_CS).all(axis=0)
        return Sample(source=MemorySource(image_CS), image_CS=image_CS, valid_S=valid_S)
