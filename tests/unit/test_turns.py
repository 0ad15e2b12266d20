"""Waiting deliveries are taken in turn by queue, and in order within one."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from resilience.turns import Turns


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=30))
def test_no_queue_waits_for_two_of_another(items: list[tuple[str, int]]) -> None:
    turns: Turns[tuple[str, int]] = Turns(lambda item: item[0])
    for item in items:
        turns.put_nowait(item)
    assert turns.qsize() == len(items)
    taken = [turns.get_nowait() for _ in items]
    assert turns.empty()
    for name in "abc":
        assert [item for item in taken if item[0] == name] == [item for item in items if item[0] == name]
        places = [place for place, item in enumerate(taken) if item[0] == name]
        for before, after in pairwise(places):
            still = {item[0] for item in taken[after:]} - {name}
            assert still <= {item[0] for item in taken[before + 1 : after]}, "each that holds something had its turn"


async def test_whoever_waits_for_an_item_is_given_the_next() -> None:
    turns: Turns[str] = Turns(lambda item: item)
    taker = asyncio.ensure_future(turns.get())
    await asyncio.sleep(0)
    turns.put_nowait("a")
    assert await asyncio.wait_for(taker, 1) == "a"
