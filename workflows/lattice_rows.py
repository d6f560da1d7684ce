"""What tiles under one lattice have told one another: trusted on resume, forgotten when heard."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from adapters.row_files import RowFiles
from pipeline.crf.whole_scene import SceneCrf
from pipeline.domain import Pass, TileKey
from pipeline.ports import Record

log = logging.getLogger(__name__)


class LatticeRows:
    """The rows of one image's rounds, in their store.

    For a tile that failed in the first round its neighbours are told that nothing is there.
    """

    def __init__(self, path: Path, rounds: Sequence[Pass], crf: SceneCrf) -> None:
        """``rounds``: passes in their order, the last of which tells nothing."""
        self.store = RowFiles(path)
        self._turns = {sweep.name: turn for turn, sweep in enumerate(rounds)}
        self._tiles, self._crf = len(rounds[0]), crf
        self._done: Counter[int] = Counter()
        self._silent: set[int] = set()

    def lost(self, done: Iterable[Record]) -> list[TileKey]:
        """Tiles to be done again: those of all rounds, if one is gone that others must hear.

        The mask's tiles are right whatever became of the rows, unless one was told to be nodata
        that may now be read.
        """
        known = {r.key: self._turns[r.key.stage] for r in done if r.key.stage in self._turns}
        self._done = Counter(known.values())
        told = {key: turn for key, turn in known.items() if turn < len(self._turns) - 1}
        if self._done[len(self._turns) - 1] == self._tiles:
            return []
        now = max(known.values(), default=0)
        first = {key.number for key, turn in known.items() if turn == 0}
        if now and len(first) < self._tiles:
            log.warning("a tile that could not be read is tried again: all rounds are done again")
            self._done = Counter()
            return list(known)
        if all(
            self.store.has(turn, key.number)
            for key, turn in told.items()
            if turn == 0 or turn >= now - 1
        ):
            return []
        log.warning("what tiles told one another is gone in part: all rounds are done again")
        self._done = Counter()
        return list(told)

    def note(self, record: Record) -> None:
        """Forget what nobody will hear any more, once a round has ended.

        Raises StoreError.
        """
        turn = self._turns.get(record.key.stage)
        if turn is None:
            return
        if record.status == "done":
            self._done[turn] += 1
        elif turn == 0:
            self._silent.add(record.key.number)
            self._hush(record.key.number)
        if self._done[turn] == self._tiles - len(self._silent) and turn > 1:
            self.store.forget(turn - 1)

    def _hush(self, number: int) -> None:
        """Tell the tile's neighbours in each round that none of its pixels takes part."""
        for turn in range(len(self._turns) - 1):
            told = self._crf.tell(self._crf.nothing(number), None)
            self.store.write(turn, number, told.rows)
