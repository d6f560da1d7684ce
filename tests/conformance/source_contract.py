"""What every Source promises. An adapter's test subclasses SourceContract and says what it made."""

from __future__ import annotations

import multiprocessing
import pickle
from abc import ABC, abstractmethod
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.domain import Region
from pipeline.errors import PipelineError
from pipeline.ports import Block, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A source and the truth it was made from, at least 5 px along each axis but one."""

    source: Source
    image_CS: NDArray[Any]
    valid_S: NDArray[np.bool_]


def assert_same(block: Block, other: Block) -> None:
    np.testing.assert_array_equal(block.image_CS, other.image_CS)
    np.testing.assert_array_equal(block.valid_S, other.valid_S)


class SourceContract(ABC):
    """Subclass it as ``TestSomething`` and implement ``make``."""

    @abstractmethod
    def make(self, folder: Path) -> Sample:
        """A sample with some pixels invalid, whose files lie in ``folder``."""

    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        return self.make(tmp_path)

    def test_the_whole_image_is_what_was_written(self, sample: Sample) -> None:
        """Broken: a swapped axis, a lost channel, a cast, nodata taken for data."""
        block = sample.source.read(Region.whole(sample.source.info.shape))
        assert_same(block, Block(image_CS=sample.image_CS, valid_S=sample.valid_S))
        assert not sample.valid_S.all(), "a sample without invalid pixels tests nothing"

    def test_unpacking_changes_nothing(self, sample: Sample) -> None:
        """Broken: a scan that is unpacked ahead is another one than one that a tile unpacks."""
        source = sample.source
        source.unpack()
        source.unpack()
        block = source.read(Region.whole(source.info.shape))
        assert_same(block, Block(image_CS=sample.image_CS, valid_S=sample.valid_S))

    def test_info_describes_what_read_returns(self, sample: Sample) -> None:
        """Broken: a plan made from info, for blocks of another shape, type or byte order."""
        info = sample.source.info
        block = sample.source.read(Region.whole(info.shape))
        assert block.image_CS.shape == (len(info.channels), *info.shape)
        assert block.valid_S.shape == info.shape
        assert str(block.image_CS.dtype) == info.dtype
        assert block.image_CS.dtype.isnative
        assert block.valid_S.dtype == np.bool_

    def test_any_region_is_that_part_of_the_whole(self, sample: Sample) -> None:
        """Broken: an off-by-one at the far side, or a flipped axis that the whole image hides."""
        whole = Region.whole(sample.source.info.shape)
        step = tuple(max(1, length // 3) for length in whole.shape)
        for region in whole.blocks(step):
            index = region.slices(within=whole)
            block = sample.source.read(region)
            np.testing.assert_array_equal(block.image_CS, sample.image_CS[(slice(None), *index)])
            np.testing.assert_array_equal(block.valid_S, sample.valid_S[index])

    def test_a_region_outside_is_refused(self, sample: Sample) -> None:
        """Broken: bounds that are clamped in silence, so that a block has another shape."""
        shape = sample.source.info.shape
        outside = Region((0,) * len(shape), (*shape[:-1], shape[-1] + 1))
        with pytest.raises(PipelineError):
            sample.source.read(outside)

    def test_a_caller_may_change_what_it_was_given(self, sample: Sample) -> None:
        """Broken: a block that aliases a cache, so that normalising in place changes the source."""
        whole = Region.whole(sample.source.info.shape)
        block = sample.source.read(whole)
        block.image_CS[...] = 0
        block.valid_S[...] = False
        assert_same(sample.source.read(whole), Block(sample.image_CS, sample.valid_S))

    def test_a_pickle_reads_the_same_in_another_process(self, sample: Sample) -> None:
        """Broken: a handle in the pickle, or a path that holds only in the driver's directory."""
        whole = Region.whole(sample.source.info.shape)
        here = sample.source.read(whole)  # the file is open before the pickle is made
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            assert_same(pool.submit(sample.source.read, whole).result(timeout=120), here)

    def test_threads_may_read_at_once(self, sample: Sample) -> None:
        """Broken: one file handle, and its position, shared by two threads."""
        whole = Region.whole(sample.source.info.shape)
        with ThreadPoolExecutor(4) as pool:
            for block in pool.map(sample.source.read, [whole] * 16):
                assert_same(block, Block(sample.image_CS, sample.valid_S))

    def test_the_digest_is_of_the_content(self, sample: Sample) -> None:
        """Broken: a digest that changes with the process, so that no run could be resumed."""
        digest = sample.source.digest()
        assert len(digest.removeprefix("sampled:")) == 64
        assert pickle.loads(pickle.dumps(sample.source)).digest() == digest
