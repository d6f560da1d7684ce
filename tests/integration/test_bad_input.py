"""What cannot be done is refused in one line, with the right exit code, and nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from batches import write_volume
from command import Command, tree
from scenes import fresh, texture, write_raster

from adapters import nifti
from workflows import planning

Make = Callable[[Path], Path | str]
IMAGE_CYX = np.stack([texture((96, 128), seed=seed) for seed in (1, 2, 3)])


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slim: Path
) -> Command:
    return Command(monkeypatch, capsys, slim)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 x 128 px, three bands, blocks of 32 px."""
    path = tmp_path_factory.mktemp("small") / "small.tif"
    return write_raster(path, IMAGE_CYX, blockxsize=32, blockysize=32)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for what the command writes."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def _file(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return make


def _cut_in_its_header(folder: Path) -> Path:
    path = write_raster(folder / "cut.tif", IMAGE_CYX)
    path.write_bytes(path.read_bytes()[:100])
    return path


def _cut_short(folder: Path) -> Path:
    path = write_volume(folder / "short.nii.gz", (40, 41, 42), seed=2)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


SOURCES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "an address": (lambda _: "s3://bucket/a.tif", ("s3://bucket/a.tif", "local files", "copy it")),
    "missing": (lambda folder: folder / "none.tif", ("none.tif", "does not exist")),
    "a directory": (lambda folder: folder, ("holds no DICOM image", "terravox batch")),
    "a text": (_file("text.tif", b"hello\n"), ("text.tif", "neither a TIFF nor", "convert")),
    "empty": (_file("empty.tif", b""), ("empty.tif", "neither a TIFF nor")),
    "cut in its header": (_cut_in_its_header, ("cut.tif", "is the file complete?")),
    "of unknown suffix": (_file("scene.xyz", b"1 2 3"), ("scene.xyz", "known are", ".tif")),
    "no NIfTI": (_file("scan.nii", b"x" * 999), ("scan.nii", "not a single-file NIfTI")),
    "no gzip": (_file("scan.nii.gz", b"x" * 999), ("scan.nii.gz", "cannot read the header")),
    "of two bands": (
        lambda folder: write_raster(folder / "two.tif", IMAGE_CYX[:2]),
        ("takes 3 bands", "has 2 (1, 2)", "give an image with these bands"),
    ),
    "a VRT of a lost file": (
        _file("v.vrt", b'<VRTDataset rasterXSize="1" rasterYSize="1"><SourceFilename>/no.tif'
              b"</SourceFilename></VRTDataset>"),
        ("/no.tif", "not a local file"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_that_cannot_be_used_is_refused_and_leaves_nothing(
    command: Command, tmp_path: Path, out: Path, kind: str
) -> None:
    """A run directory left behind would turn the corrected command away."""
    make, words = SOURCES[kind]
    source = make(tmp_path)
    command.segment(source, out / "o.tif").refuses(*words)
    assert not tree(out)
    command("plan", source, "--model", command.model).refuses(*words)


OPTIONS: dict[str, tuple[str, ...]] = {
    "--tile 10": ("--tile 10", "multiple", "4 px"),
    "--tile 0": ("--tile", "1", "got 0"),
    "--tile abc": ("--tile", "--help"),
    "--halo -1": ("--halo", "'exact', a number of pixels", "'-1'"),
    "--halo abc": ("--halo", "'exact', a number of pixels", "'abc'"),
    "--workers 0": ("--workers", "1", "got 0"),
    "--precision fp16": ("--precision", "'fp32' or 'bf16'", "'fp16'"),
    "--windows square": ("--windows", "'rows' or 'canonical'", "'square'"),
    "--windows canonical --tile 300": ("--tile 300", "canonical window, 256 px"),
    "--windows canonical --halo 64": ("--windows canonical", "--halo 64", "leave out one"),
    "--context all": ("--context", "'window', 'scene' or 'tile'", "'all'"),
    "--scores float64": ("--scores", "'uint8' or 'float16'", "'float64'"),
    "--backend dask": ("--backend", "'ray' or 'serial'", "'dask'"),
    "--allow-failed -1": ("--allow-failed", "0", "got -1"),
    "--volume -1": ("--volume", "0", "got -1"),
    "--volume 1": ("volume 1", "is no NIfTI", "leave it out"),
    "--crf none.yaml": ("--crf none.yaml", "No such file", "with a crf part"),
    "--crf .": ("--crf .", "Is a directory", "with a crf part"),
    "--bogus": ("--bogus", "terravox segment --help"),
}


@pytest.mark.parametrize("words", OPTIONS)
def test_an_option_that_cannot_be_is_refused_and_leaves_nothing(
    command: Command, small: Path, out: Path, words: str
) -> None:
    """A value clamped in silence would be another run than the one asked for."""
    command.segment(small, out / "o.tif", *words.split()).refuses(*OPTIONS[words])
    assert not tree(out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_asked_where_there_is_none_is_refused(
    command: Command, small: Path, out: Path
) -> None:
    """A run that goes to the processor in silence takes a week instead of an hour."""
    command.segment(small, out / "o.tif", "--device", "cuda").refuses("--device cuda", "cpu")
    assert not tree(out)


CRFS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "bytes": (bytes(range(128, 256)), ("cannot read", "with a crf part")),
    "broken YAML": (b"crf: [", ("not valid YAML, line 1", "with a crf part")),
    "a list": (b"[1, 2]", ("mapping",)),
    "an unknown band": (
        b"""
crf:
  iterations: 1
  smoothness: {weight: 1, position: 1}
  appearance: {weight: 1, position: 3, value: 3, bands: [nir], range: [0, 1]}
""",
        ("nir", "1, 2, 3"),
    ),
}


@pytest.mark.parametrize("kind", CRFS)
def test_a_crf_file_that_cannot_be_used_is_refused(
    command: Command, small: Path, out: Path, tmp_path: Path, kind: str
) -> None:
    """A CRF left out, or guided by another band, would pass for the one asked for."""
    content, words = CRFS[kind]
    (tmp_path / "crf.yaml").write_bytes(content)
    command.segment(small, out / "o.tif", "--crf", tmp_path / "crf.yaml").refuses(*words)
    assert not tree(out)


def _flip_a_byte(bundle: Path) -> None:
    data = bytearray((bundle / "weights.safetensors").read_bytes())
    data[-3] ^= 1
    (bundle / "weights.safetensors").write_bytes(data)


def _change(**values: object) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        path = bundle / "model.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))

    return change


BUNDLES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a flipped byte": (_flip_a_byte, ("SHA-256", "fetch the bundle again")),
    "no model.yaml": (lambda b: (b / "model.yaml").unlink(), ("no file model.yaml",)),
    "no weights": (lambda b: (b / "weights.safetensors").unlink(), ("no file weights",)),
    "an unknown key": (_change(colour="red"), ("unknown key colour", "takes: name")),
    "bad YAML": (lambda b: (b / "model.yaml").write_text("a: ["), ("not valid YAML", "line")),
    "a crop of one axis": (_change(crop=[64]), ("crop [64]", "2 positive numbers")),
    "a missing folder": (shutil.rmtree, ("no file model.yaml",)),
}


@pytest.mark.parametrize("kind", BUNDLES)
def test_a_bundle_that_is_damaged_is_refused(
    command: Command, small: Path, slim: Path, out: Path, tmp_path: Path, kind: str
) -> None:
    """Weights changed on their way would label a whole region wrongly, night after night."""
    damage, words = BUNDLES[kind]
    bundle = tmp_path / "bundle"
    shutil.copytree(slim, bundle)
    damage(bundle)
    command.segment(small, out / "o.tif", model=bundle).refuses(*words)
    assert not tree(out)
    command("model", "show", bundle).refuses(*words)


def test_a_network_for_volumes_is_refused_for_a_raster(
    command: Command, small: Path, slim3d: Path, out: Path
) -> None:
    """The shapes alone would fail deep inside torch."""
    command.segment(small, out / "o.tif", model=slim3d).refuses("2 axes", "takes 3", "bundle")
    assert not tree(out)


def test_an_image_with_some_of_the_bands_by_name_is_not_taken_by_position(
    command: Command, out: Path, tmp_path: Path
) -> None:
    """Three bands fit three bands, but near infrared would be read as blue."""
    import rasterio

    bundle = fresh(tmp_path / "rgb", bands=("red", "green", "blue")).path
    source = write_raster(tmp_path / "nrg.tif", IMAGE_CYX)
    with rasterio.open(source, "r+") as file:
        file.descriptions = ("nir", "red", "green")
    answer = command.segment(source, out / "o.tif", model=bundle)
    answer.refuses("red, green, blue", "nir, red, green", "no blue")
    assert not tree(out)


USAGE: dict[str, tuple[str, ...]] = {
    "segment": ("Missing argument", "terravox segment --help"),
    "segment a.tif -o b.tif": ("Missing option '--model'", "terravox segment --help"),
    "sgment": ("No such command 'sgment'", "terravox --help"),
    "status": ("Missing argument", "terravox status --help"),
    "status .": ("holds no run", "plan.json"),
    "status nowhere": ("holds no run", "plan.json"),
    "model show .": ("no file model.yaml",),
    "model new -o m --dims 5": ("no 5-D backbone", "slim (3-D)"),
    "model new -o m --bands 0": ("at least one band",),
    "model new -o m --classes 1": ("at least two",),
    "model new -o m --output-stride 3": ("output stride 3", "4 and 8"),
    "doctor --fast": ("--fast", "terravox doctor --help"),
}


@pytest.mark.parametrize("words", USAGE)
def test_a_command_that_cannot_be_is_one_line_and_exit_2(
    command: Command, out: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """Scripts tell a typing mistake (2) from a failed run (1) by the code."""
    monkeypatch.chdir(out)
    command(*words.split()).refuses(*USAGE[words])
    assert not tree(out)


def test_a_scan_that_is_cut_short_is_one_line_and_unpacked_once(
    command: Command, out: Path, tmp_path: Path, slim3d: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its tiles would unpack it anew, and say the same."""
    unpackings, copy = [], nifti.copy_stream

    def counted(*args: Any, **named: Any) -> None:
        unpackings.append(args)
        copy(*args, **named)

    monkeypatch.setattr(nifti, "copy_stream", counted)
    answer = command.segment(_cut_short(tmp_path), out / "o.nii.gz", "--tile", "16", model=slim3d)
    answer.refuses("short.nii.gz is damaged", "fetch it again")
    assert len(unpackings) == 1
    assert not tree(out)
    whole = write_volume(tmp_path / "whole.nii.gz", (40, 41, 42), seed=2)
    line = (whole, out / "o.nii.gz", "--tile", "64", "--crf", "off")
    for more in ((), ("--fresh",)):
        unpackings.clear()
        assert command.segment(*line, *more, model=slim3d).code == 0
        assert len(unpackings) == 1


def test_a_refused_command_leaves_what_another_has_unpacked(
    command: Command, out: Path, tmp_path: Path, slim3d: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one plans there is no plan.json yet, but its scan is unpacked."""
    scan = write_volume(tmp_path / "scan.nii.gz", (20, 20, 20), seed=2)
    line, plan = (scan, out / "o.nii.gz", "--any-resolution"), planning.make_plan
    found = []

    def planned(*args: Any, **named: Any) -> Any:
        made = plan(*args, **named)
        monkeypatch.setattr(planning, "make_plan", plan)
        command.segment(*line, "--tile", "7", model=slim3d).refuses("working here", code=75)
        found.extend((out / "o.nii.gz.run/scratch").glob("*.nii"))
        return made

    monkeypatch.setattr(planning, "make_plan", planned)
    assert command.segment(*line, model=slim3d).code == 0
    assert len(found) == 1
