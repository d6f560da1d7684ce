"""ZarrStore: whole chunks or nothing, the same in every process; and its twin in memory."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.memory import MemorySource, MemoryStore
from adapters.zarr_store import ZarrStore
from pipeline.domain import Grid, Region
from pipeline.errors import RegionError, SourceError, StoreError
from pipeline.ports import ArrayStore

SHAPE, CHUNKS = (37, 50), (16, 24)
GRID = Grid(shape=SHAPE, tile=CHUNKS, stride=8)


def create(path: Path, **change: Any) -> ZarrStore:
    options = {"shape": SHAPE, "chunks": CHUNKS, "dtype": "uint8", "fill": 255}
    return ZarrStore.create(path, **(options | change))


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    return create(tmp_path / "run" / "mask.zarr")


@pytest.fixture(params=["zarr", "memory"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ArrayStore:
    if request.param == "zarr":
        return create(tmp_path / "mask.zarr")
    return MemoryStore(SHAPE, dtype="uint8", fill=255)


def mask_of(region: Region) -> np.ndarray:
    return np.random.default_rng(region.start).integers(0, 9, region.shape, dtype=np.uint8)


def test_what_the_cores_wrote_is_what_any_region_reads(any_store: ArrayStore) -> None:
    """Broken: a core at another place, or an edge core (shorter than a chunk) that is lost."""
    mask_S = np.full(SHAPE, 255, np.uint8)
    for core in list(GRID.cores())[1:]:
        part = mask_of(core)
        assert any_store.write(core, part) == hashlib.sha256(part.tobytes()).hexdigest()
        mask_S[core.slices(within=Region.whole(SHAPE))] = part
    np.testing.assert_array_equal(any_store.read(Region.whole(SHAPE)), mask_S)
    np.testing.assert_array_equal(any_store.read(Region((7, 11), (36, 50))), mask_S[7:36, 11:50])


def test_the_digest_is_of_the_values_and_not_of_their_layout(any_store: ArrayStore) -> None:
    """Broken: a transposed view of the same mask with another digest in the ledger."""
    core = GRID.core(0)
    part = mask_of(core)
    assert any_store.write(core, np.asfortranarray(part)) == any_store.write(core, part)


@pytest.mark.parametrize(
    "region",
    [
        Region((0, 0), (16, 25)),
        Region((0, 1), (16, 24)),
        Region((8, 0), (16, 24)),
        Region((0, 0), (0, 24)),
        Region((32, 48), (36, 50)),
    ],
)
def test_a_part_of_a_chunk_is_refused(store: ZarrStore, region: Region) -> None:
    """Broken: read, change, write of one chunk by two workers, which loses one of them."""
    with pytest.raises(StoreError, match="whole chunks"):
        store.write(region, mask_of(region))
    assert (store.read(Region.whole(SHAPE)) == 255).all()


def test_a_region_outside_is_refused_and_not_clamped(any_store: ArrayStore) -> None:
    """Broken: zarr's slicing, which cuts at the end and returns another shape."""
    for start, stop in (((32, 48), (38, 50)), ((-16, 0), (0, 24))):
        region = Region(start, stop)
        with pytest.raises(StoreError, match="not inside"):
            any_store.read(region)
        with pytest.raises(StoreError, match="not inside"):
            any_store.write(region, mask_of(GRID.core(0)))


def test_another_shape_or_type_is_refused(any_store: ArrayStore) -> None:
    """Broken: a broadcast scalar row, or labels above 255 cut to bytes."""
    core = GRID.core(0)
    for wrong in (mask_of(core)[:1], mask_of(core).astype(np.uint16), mask_of(core)[None]):
        with pytest.raises(StoreError, match="takes"):
            any_store.write(core, wrong)


def test_chunks_of_nodata_alone_are_files_too(tmp_path: Path) -> None:
    """Broken: empty chunks skipped after a re-open, as zarr does unless told again."""
    create(tmp_path / "mask.zarr")
    again = pickle.loads(pickle.dumps(create(tmp_path / "mask.zarr")))
    again.write(GRID.core(0), np.full(CHUNKS, 255, np.uint8))
    assert (tmp_path / "mask.zarr/c/0/0").is_file()


def test_a_store_that_is_there_is_taken_or_refused(tmp_path: Path) -> None:
    """Broken: a resume that wipes what was done, or writes into the store of another plan."""
    core = GRID.core(3)
    create(tmp_path / "mask.zarr").write(core, mask_of(core))
    np.testing.assert_array_equal(create(tmp_path / "mask.zarr").read(core), mask_of(core))
    for change in ({"shape": (37, 51)}, {"chunks": (16, 16)}, {"dtype": "uint16"}, {"fill": 0}):
        with pytest.raises(StoreError, match="another array"):
            create(tmp_path / "mask.zarr", **change)


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_scores_have_a_whole_class_axis_before_the_scene(tmp_path: Path, dtype: str) -> None:
    """Broken: the region applied to the class axis, or a class lost."""
    scores = create(
        tmp_path / "s.zarr", shape=(5, *SHAPE), chunks=(5, *CHUNKS), dtype=dtype, fill=0
    )
    core = GRID.core(len(GRID) - 1)
    part_KS = np.random.default_rng(0).integers(0, 200, (5, *core.shape)).astype(dtype)
    assert scores.write(core, part_KS) == hashlib.sha256(part_KS.tobytes()).hexdigest()
    np.testing.assert_array_equal(scores.read(core), part_KS)
    with pytest.raises(StoreError, match="takes"):
        scores.write(core, part_KS[:4])
    with pytest.raises(StoreError, match="whole chunks"):
        scores.write(Region((0, 0), (8, 24)), part_KS)


def test_volumes_are_stored_like_rasters(tmp_path: Path) -> None:
    """Broken: code that counts on two axes."""
    grid = Grid(shape=(9, 20, 17), tile=(8, 8, 8), stride=8)
    volume = create(
        tmp_path / "v.zarr", shape=grid.shape, chunks=grid.tile, dtype="uint16", fill=65535
    )
    for core in grid.cores():
        volume.write(core, np.full(core.shape, core.start[2], np.uint16))
    np.testing.assert_array_equal(
        volume.read(Region((8, 3, 0), (9, 4, 17)))[0, 0], [0] * 8 + [8] * 8 + [16]
    )


def test_processes_write_one_store_through_pickles(store: ZarrStore) -> None:
    """Broken: an open handle in the pickle, or a relative path that a worker resolves elsewhere."""
    cores = list(GRID.cores())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        list(pool.map(store.write, cores, map(mask_of, cores), timeout=120))
    for core in cores:
        np.testing.assert_array_equal(store.read(core), mask_of(core))


def test_a_relative_path_holds_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken: a run that enters its run directory and then looks for the store inside it."""
    monkeypatch.chdir(tmp_path)
    store = create(Path("mask.zarr"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(pickle.dumps(store)).read(GRID.core(0)).shape == CHUNKS


@pytest.mark.parametrize("damage", ["cut", "emptied", "one bit"])
def test_a_damaged_chunk_is_an_error_and_not_a_label(
    store: ZarrStore, tmp_path: Path, damage: str
) -> None:
    """Broken: rotten bytes that decode to some other mask."""
    noise = np.random.default_rng(0).integers(0, 256, CHUNKS, dtype=np.uint8)  # is stored as it is
    store.write(GRID.core(0), noise)
    chunk = tmp_path / "run/mask.zarr/c/0/0"
    raw = bytearray(chunk.read_bytes())
    if damage == "one bit":
        raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw if damage == "one bit" else raw[:-3] if damage == "cut" else b"")
    with pytest.raises(StoreError, match="could not be read"):
        store.read(GRID.core(0))


def test_a_disk_that_refuses_is_a_store_error(store: ZarrStore, tmp_path: Path) -> None:
    """Broken: a foreign exception that the run takes for a bug and not for a full disk."""
    (tmp_path / "run/mask.zarr/c").write_bytes(b"")  # a file where the folder of chunks belongs
    with pytest.raises(StoreError, match="could not be written"):
        store.write(GRID.core(0), mask_of(GRID.core(0)))


def test_what_is_no_store_is_a_store_error(tmp_path: Path) -> None:
    """Broken: a traceback of zarr's for a deleted or mangled run directory."""
    with pytest.raises(StoreError, match="could not be opened"):
        ZarrStore(tmp_path / "gone").read(GRID.core(0))
    create(tmp_path / "mask.zarr")
    (tmp_path / "mask.zarr/zarr.json").write_text("{")
    with pytest.raises(StoreError, match="could not be opened"):
        create(tmp_path / "mask.zarr")


def test_sweep_removes_what_a_killed_writer_left(store: ZarrStore, tmp_path: Path) -> None:
    """Broken: partial files that pile up over a night of restarts, or a good chunk swept."""
    store.write(GRID.core(0), mask_of(GRID.core(0)))
    (tmp_path / "run/mask.zarr/c/0/1.0123.partial").write_bytes(b"half")
    assert (store.sweep(), store.sweep()) == (1, 0)
    assert os.listdir(tmp_path / "run/mask.zarr/c/0") == ["0"]
    np.testing.assert_array_equal(store.read(GRID.core(0)), mask_of(GRID.core(0)))


def test_an_image_in_memory_must_fit_its_description() -> None:
    """Broken: an array whose channels or type the plan takes from a wrong description."""
    image_CS = np.zeros((2, 4, 4), np.float32)
    info = MemorySource(image_CS).info
    with pytest.raises(SourceError, match="description"):
        MemorySource(image_CS[:1], info=info)
    with pytest.raises(SourceError, match="valid mask"):
        MemorySource(image_CS, valid_S=np.ones((4, 5), bool))
    with pytest.raises(RegionError, match="not inside"):
        MemorySource(image_CS).read(Region((0, 0), (5, 4)))
