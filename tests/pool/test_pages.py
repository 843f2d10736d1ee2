"""The page book of an adapter pool: nothing is given twice, and nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_kernels.pool.pages import FreePages, PageBook, PoolFullError


def free_of(book: PageBook) -> dict[str, list[int]]:
    return {layer: sorted(free) for layer, free in book.free.items()}


def test_scattered_pages_come_from_the_low_end_and_runs_from_the_high_end():
    free = FreePages(8)
    assert free.take(2) == (0, 1)
    assert free.take_run(3) == (5, 6, 7)
    assert len(free) == 3 and free.take(0) == free.take_run(0) == ()
    assert free.take(4) is None and free.take_run(4) is None and len(free) == 3


def test_a_run_has_no_gaps():
    free = FreePages(7)
    assert free.take(7) == tuple(range(7))
    free.give((5, 2, 1, 6, 3))
    assert free.take_run(4) is None
    assert free.take_run(3) == (1, 2, 3)
    assert free.take(2) == (5, 6)


def test_layers_are_counted_apart():
    book = PageBook(["x", "y"], pages=4, slots=3)
    first = book.place("a", {"x": 1, "y": 3})
    second = book.place("b", {"x": 2})
    assert (first.slot, second.slot) == (0, 1)
    assert free_of(book) == {"x": [3], "y": [3]}
    book.give(first)
    assert free_of(book) == {"x": [0, 3], "y": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("counts", "runs", "layer", "message"),
    [
        ({"x": 1, "y": 3}, False, "y", "'c' needs 3 pages of 8 rank rows in y, where 2 of 4"),
        ({"x": 2}, True, "x", "2 pages of 8 rank rows that follow one another in x, where 2 of 4"),
        ({"x": 3}, True, "x", "3 pages of 8 rank rows in x, where 2 of 4 are free"),
    ],
)
def test_a_full_book_says_where_and_takes_nothing(counts, runs, layer, message):
    book = PageBook(["x", "y"], pages=4, slots=4)
    placements = [book.place(name, {"x": 1, "y": 1}) for name in "abcd"]
    book.give(placements[0])
    book.give(placements[2])
    before = free_of(book), sorted(book.free_slots)
    with pytest.raises(PoolFullError, match=message) as caught:
        book.place("c", counts, runs=runs)
    assert caught.value.layer == layer
    assert (
        (free_of(book), sorted(book.free_slots)) == before == ({"x": [0, 2], "y": [0, 2]}, [0, 2])
    )


def test_slots_run_out_too():
    book = PageBook(["x"], pages=4, slots=1)
    book.place("a", {"x": 1})
    with pytest.raises(PoolFullError, match="all of its 1 adapters") as caught:
        book.place("b", {"x": 1})
    assert caught.value.layer is None and free_of(book) == {"x": [1, 2, 3]}


def test_a_copy_is_its_own():
    book = PageBook(["x"], pages=4, slots=2)
    twin = book.copy()
    twin.place("a", {"x": 3})
    assert len(book.free["x"]) == 4 and len(book.free_slots) == 2
    assert len(twin.free["x"]) == 1 and len(twin.free_slots) == 1
    assert (twin.page_count, twin.slot_count) == (4, 2)


steps = st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 5), st.booleans())


@given(st.lists(steps, max_size=60))
def test_any_sequence_of_steps(sequence):
    """Every page and slot is free or in one placement, whatever has been placed and given."""
    book, placed = PageBook(["x", "y"], pages=9, slots=5), []
    for gives, x, y, runs in sequence:
        if gives and placed:
            book.give(placed.pop(x % len(placed)))
        else:
            counts = {layer: count for layer, count in (("x", x), ("y", y)) if count}
            try:
                placed.append(book.place("a", counts, runs=runs))
            except PoolFullError as full:
                short = len(book.free_slots) if full.layer is None else len(book.free[full.layer])
                assert runs or short < counts.get(full.layer, 1)
                continue
            pages = placed[-1].pages
            assert {layer: len(own) for layer, own in pages.items()} == counts
            for own in pages.values():
                assert list(own) == sorted(own)
                assert not runs or own == tuple(range(own[0], own[0] + len(own)))
        for layer, free in book.free.items():
            used = [page for one in placed for page in one.pages.get(layer, ())]
            assert sorted([*free, *used]) == list(range(9))
        assert sorted([*book.free_slots, *(one.slot for one in placed)]) == list(range(5))
