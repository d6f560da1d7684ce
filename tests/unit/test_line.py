"""The line of stages: items overlap, at most one a stage, and every idle moment has a reason."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing

import pytest

from pipeline.execution.line import Line, Turn, waits


@pytest.fixture
def line() -> Iterator[Line]:
    with closing(Line("first", "second", "third")) as line:
        yield line


def kept(value: object) -> object:
    return value


def test_an_item_passes_every_stage_in_order_each_in_its_thread(line: Line) -> None:
    """Work would be done by another stage's thread, or twice."""
    note = [lambda seen: [*(seen or ()), threading.current_thread().name]] * 3
    value, turns = line.put(*note).result()
    assert value == ["first", "second", "third"]
    assert len(turns) == 3
    assert all(turn.began <= turn.ended <= turn.left for turn in turns)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_stage_raises_where_the_item_came_from_and_goes_on(line: Line, bad: int) -> None:
    """An error that stayed in a thread would leave the caller, and the line, waiting for ever."""
    calls = [kept] * 3
    calls[bad] = lambda _: 1 / 0
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            line.put(*calls).result()
    assert line.put(lambda _: 5, kept, kept).result()[0] == 5


def test_a_stage_keeps_its_item_until_the_next_one_takes_it(line: Line) -> None:
    """Logits of tile after tile would pile up before a slow CRF until memory is gone."""
    open_, entered, most = threading.Event(), [], []

    def slow(_: object) -> None:
        open_.wait(10.0)

    def enter(number: object) -> object:
        entered.append(number)
        return number

    answers = [line.put(enter, kept, slow) for _ in range(6)]
    time.sleep(0.2)
    most = len(entered)
    open_.set()
    assert all(answer.exception() is None for answer in answers)
    assert most == 3
    assert len(entered) == 6


def test_only_what_no_stage_has_begun_is_recalled(line: Line) -> None:
    """A tile would be done twice, or wait in one worker while another has nothing to do."""
    open_, begun = threading.Event(), threading.Event()

    def slow(_: object) -> str:
        begun.set()
        open_.wait(10.0)
        return "done"

    first = line.put(slow, kept, kept)
    assert begun.wait(10.0)
    second = line.put(kept, kept, kept)
    line.recall()
    open_.set()
    with pytest.raises(CancelledError):
        second.result()
    assert first.result()[0] == "done"
    assert line.put(lambda _: 5, kept, kept).result()[0] == 5


def test_what_left_the_line_is_held_by_no_stage(line: Line) -> None:
    """Each stage would keep the last tile's arrays until the next tile comes."""

    class Array:
        pass

    refs = []

    def made(_: object) -> Array:
        array = Array()
        refs.append(weakref.ref(array))
        return array

    line.put(made, kept, lambda _: None).result()
    time.sleep(0.05)
    gc.collect()
    assert refs[0]() is None


def test_a_closed_line_ends_its_threads() -> None:
    """A batch of a thousand scenes must not leave four thousand threads."""
    line = Line("short-lived")
    threads = [thread for thread in threading.enumerate() if thread.name == "short-lived"]
    assert threads
    line.close()
    for thread in threads:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in threads)


def test_what_is_on_a_line_that_is_closed_leaves_it() -> None:
    """Its caller would wait for ever: a stage would have ended before the item came to it."""
    line, begun, open_ = Line("first", "second"), threading.Event(), threading.Event()

    def slow(_: object) -> int:
        begun.set()
        open_.wait(10.0)
        return 5

    answer = line.put(slow, kept)
    begun.wait(10.0)
    line.close()
    time.sleep(0.05)  # for the second stage to hear of it
    open_.set()
    assert answer.result(timeout=5)[0] == 5


NAMES = ("read", "compute", "write")


def test_a_wait_is_split_by_where_the_item_was() -> None:
    """A device that starves for want of tiles would be put down to a slow disk."""
    turns = [Turn(0.0, 4.0, 7.0, 7.0), Turn(1.0, 7.0, 9.0, 9.0), Turn(2.0, 9.0, 10.0, 10.0)]
    assert waits(NAMES, turns, came=4.0) == {
        "read": {"tile": 4.0},
        "compute": {"tile": 3.0, "read": 3.0},
        "write": {"tile": 2.0, "read": 3.0, "compute": 2.0},
    }


def test_a_stage_that_cannot_hand_over_waits_for_the_next_one() -> None:
    """A slow writer would look like an idle device without a reason."""
    turns = [Turn(None, 0.0, 1.0, 5.0), Turn(5.0, 5.0, 6.0, 8.5), Turn(8.5, 8.5, 9.0, 9.0)]
    assert waits(NAMES, turns, came=0.0) == {"read": {"compute": 4.0}, "compute": {"write": 2.5}}


def test_the_first_item_of_a_stage_was_not_waited_for() -> None:
    """The start of a worker would count as idle time of each of its stages."""
    turns = [Turn(None, 9.0, 9.5, 9.5), Turn(None, 9.5, 9.8, 9.8), Turn(None, 9.8, 9.9, 9.9)]
    assert waits(NAMES, turns, came=1.0) == {}


def test_waits_and_work_of_a_stage_fill_its_time(line: Line) -> None:
    """A busy share over anything but the whole time would be a made-up figure."""
    pauses = (0.01, 0.02, 0.005)

    def passed(number: int) -> tuple[dict[str, dict[str, float]], list[Turn]]:
        came = time.perf_counter()
        _, turns = line.put(*([lambda _, s=s: time.sleep(s) for s in pauses])).result()
        return waits(line.names, turns, came=came), turns

    with ThreadPoolExecutor(4) as askers:
        found = list(askers.map(passed, range(8)))
    for number, name in enumerate(line.names):
        turns = [turns[number] for _, turns in found]
        span = max(turn.left for turn in turns) - min(turn.began for turn in turns)
        idle = sum(sum(waited.get(name, {}).values()) for waited, _ in found)
        assert sum(turn.busy for turn in turns) + idle == pytest.approx(span, abs=0.01)
