"""AdapterPool: what fits, what is evicted, replaced or kept while it is in use."""

import pytest
import torch
from small_adapters import (
    LAYERS,
    MIXED,
    NEW,
    OLD,
    assert_all_free,
    assert_unchanged,
    load,
    make_adapter,
    make_base,
    make_pool,
    poison,
    replace,
    routed,
    rows_of,
    state_of,
)

from peft_kernels import AdapterPool
from peft_kernels.nn import MultiLoRALinear
from peft_kernels.pool.adapter_pool import PoolFullError

# ---- room ------------------------------------------------------------------------------------


def test_memory():
    _, pool = make_pool(capacity=30)
    page = {"up": 8 * (8 + 12) * 4, "down": 8 * (12 + 8) * 4}
    empty = pool.memory()
    assert empty.reserved == 4 * 2 * (page["up"] + page["down"]) and empty.used == 0
    load(pool, "a", MIXED["a"])
    load(pool, "b", MIXED["b"])
    memory = pool.memory()
    assert memory.adapters == {
        "a": 2 * (page["up"] + page["down"]),
        "b": 2 * page["up"] + 5 * page["down"],
    }
    assert memory.used == sum(memory.adapters.values()) and memory.reserved == empty.reserved
    assert memory.free_pages == {"0.up": 2, "0.down": 0, "1.up": 2, "1.down": 1}
    pool.unload("b")
    pool.unload("a")
    assert_all_free(pool)


def test_a_full_pool_changes_nothing():
    model, pool = make_pool(capacity=24)
    load(pool, "a", make_adapter(4))
    load(pool, "b", make_adapter({"1.down": 16}, 2))
    before = state_of(pool)
    message = "'x' needs 1 pages of 8 rank rows in 1.down, where 0 of 3 are free"
    with pytest.raises(PoolFullError, match=message):
        load(pool, "x", make_adapter(4, 3))
    with pytest.raises(PoolFullError, match=message):
        pool.create("x", 4, alpha=4)
    with pytest.raises(PoolFullError, match=r"'a' needs 2 pages of 8 rank rows in 1\.down"):
        made = make_adapter({"1.up": 1, "1.down": 9}, 4)
        pool.replace("a", made.tensors, config=made.config)
    assert_unchanged(pool, before)
    x = torch.randn(2, 8)
    expected = rows_of(make_base(), x, [make_adapter(4), make_adapter({"1.down": 16}, 2)])
    torch.testing.assert_close(
        routed(pool, model, ["a", "b"], x).double(), expected, rtol=1e-5, atol=1e-5
    )
    load(pool, "x", make_adapter({"0.up": 16}, 3))


def test_slots_are_limited_too():
    _, pool = make_pool(max_adapters=2)
    load(pool, "a", make_adapter(1))
    load(pool, "b", make_adapter(1))
    with pytest.raises(PoolFullError, match=r"all of its 2 adapters \(max_adapters\).*'c'.*unload"):
        load(pool, "c", make_adapter(1))


def test_pages_need_not_follow_one_another_but_a_trainable_s_do():
    model, pool = make_pool(capacity=32)
    for i, name in enumerate("abcd"):
        load(pool, name, make_adapter(8, i))
    pool.unload("a")
    pool.unload("c")
    poison(pool)
    big = make_adapter(16, 9)
    with pytest.raises(PoolFullError, match="2 pages of 8 rank rows that follow one another"):
        load(pool, "x", big, trainable=True)
    load(pool, "x", big)
    x = torch.randn(3, 8)
    expected = rows_of(make_base(), x, [big, make_adapter(8, 1), make_adapter(8, 3)])
    torch.testing.assert_close(
        routed(pool, model, ["x", "b", "d"], x).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_eviction_takes_what_was_routed_longest_ago():
    model, pool = make_pool(capacity=32, evict="lru")
    for i, name in enumerate("abcd"):
        load(pool, name, make_adapter(8, i))
    x = torch.randn(2, 8)
    routed(pool, model, ["a", None], x)
    pool.pin("b")
    load(pool, "e", make_adapter(8, 4))
    assert pool.names() == ["a", "b", "d", "e"]
    load(pool, "f", make_adapter(16, 5))
    assert pool.names() == ["b", "e", "f"]
    pool.unpin("b")
    with pool.route(["e"]):
        load(pool, "g", make_adapter(8, 6))
        assert pool.names() == ["e", "f", "g"]
        before = state_of(pool)
        message = "where 0 of 4 are free; what could be evicted"
        pool.pin("f")
        with pytest.raises(PoolFullError, match=message):
            load(pool, "h", make_adapter(16, 7))
        pool.unpin("f")
        assert_unchanged(pool, before)
    expected = rows_of(make_base(), x, [make_adapter(8, 4), make_adapter(16, 5)])
    torch.testing.assert_close(
        routed(pool, model, ["e", "f"], x).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_eviction_spares_what_would_not_help_and_what_is_trained():
    _, pool = make_pool(capacity=16, evict="lru", max_adapters=5)
    load(pool, "old", make_adapter({"0.up": 8}))
    load(pool, "pinned", make_adapter({"1.up": 8}), pinned=True)
    pool.create("trained", 8, alpha=8, target_modules=["1.down"])
    load(pool, "new", make_adapter({"1.up": 8, "1.down": 8}))
    load(pool, "x", make_adapter({"1.up": 8}))
    assert pool.names() == ["old", "pinned", "trained", "x"]
    with pytest.raises(PoolFullError, match=r"1\.down"):
        load(pool, "y", make_adapter({"1.down": 16}))
    for parameter in pool.parameters("trained"):
        parameter.requires_grad_(False)
    load(pool, "y", make_adapter({"1.down": 16}))
    assert pool.names() == ["old", "pinned", "x", "y"]
    load(pool, "z", make_adapter({"0.down": 1}))
    load(pool, "w", make_adapter({"0.down": 1}))
    assert pool.names() == ["pinned", "x", "y", "z", "w"]


# ---- replacing, and what is in use -----------------------------------------------------------


@pytest.mark.parametrize("ranks", [8, 3, 16, {"0.up": 1, "1.down": 16}])
def test_what_nothing_uses_is_replaced_in_place(ranks):
    model, pool = make_pool(capacity=16)
    load(pool, "a", OLD, pinned=True)
    slot = pool._store.find("a").slot
    addresses = [t.data_ptr() for layer in pool._store.layers.values() for t in layer.bank]
    made = make_adapter(ranks, 5)
    replace(pool, "a", made)
    poison(pool)
    assert pool._store.find("a").slot == slot and pool._store.find("a").pinned
    assert pool.ranks("a") == dict.fromkeys(LAYERS, ranks) if isinstance(ranks, int) else ranks
    assert addresses == [t.data_ptr() for layer in pool._store.layers.values() for t in layer.bank]
    x = torch.randn(2, 8)
    expected = rows_of(make_base(), x, [made, None])
    torch.testing.assert_close(
        routed(pool, model, ["a", None], x).double(), expected, rtol=1e-5, atol=1e-5
    )
    pool.unload("a")
    assert_all_free(pool)


@pytest.mark.parametrize("change", ["replace", "unload"])
def test_a_route_goes_on_with_what_it_found(change):
    model, pool = make_pool(capacity=16)
    load(pool, "a", OLD)
    x = torch.randn(2, 8)
    before = routed(pool, model, ["a"], x)
    with torch.no_grad(), pool.route(["a"]):
        if change == "replace":
            replace(pool, "a", NEW)
            replace(pool, "a", OLD)  # the second version is in no use, so this is in its place
            replace(pool, "a", NEW)
        else:
            pool.unload("a")
            assert "a" not in pool
            load(pool, "b", NEW)
        assert torch.equal(model(x), before)
        poison_free_alone(pool)
        assert torch.equal(model(x), before)
        if change == "replace":
            with pool.route(["a"]):
                assert not torch.allclose(model(x), before)
            assert torch.equal(model(x), before)
        with pytest.raises(PoolFullError):
            load(pool, "c", NEW)
    assert set(pool.memory().free_pages.values()) == {1}
    name = "a" if change == "replace" else "b"
    expected = rows_of(make_base(), x, [NEW, NEW])
    torch.testing.assert_close(
        routed(pool, model, [name], x).double(), expected, rtol=1e-5, atol=1e-5
    )
    pool.unload(name)
    assert_all_free(pool)


def poison_free_alone(pool: AdapterPool) -> None:
    """NaN in the pages that the book has as free; those in use after an unload aren't."""
    for name, layer in pool._store.layers.items():
        pages = list(pool._store.book.free[name])
        rows = layer._rows(pages, 8 * len(pages))
        layer.pages_a.data[rows] = layer.pages_b.data[rows] = torch.nan


def test_a_graph_holds_its_adapters_beyond_the_route():
    model, pool = make_pool(capacity=16)
    load(pool, "a", OLD)
    x = torch.randn(2, 8)

    def gradient_of_x(between):
        leaf = x.clone().requires_grad_()
        with pool.route(["a"]):
            y = model(leaf).square().sum()
        between()
        y.backward()
        return leaf.grad

    def drop():
        pool.unload("a")
        poison_free_alone(pool)
        assert set(pool.memory().free_pages.values()) == {1}
        load(pool, "b", NEW)
        assert set(pool.memory().free_pages.values()) == {0}

    expected = gradient_of_x(lambda: None)
    assert torch.equal(gradient_of_x(drop), expected)
    assert set(pool.memory().free_pages.values()) == {1}
    pool.unload("b")
    assert_all_free(pool)


def test_a_failed_forward_lets_go():
    model, pool = make_pool()
    load(pool, "a", OLD)
    with pytest.raises(ValueError, match="x must be"), pool.route(["a"]):
        model(torch.randn(2, 9))
    pool.unload("a")
    assert_all_free(pool)
    with pytest.raises(KeyError), torch.no_grad(), pool.route([None]):
        raise KeyError
    assert pool._store._routes == 0


def test_a_failed_write_gives_the_room_back(monkeypatch):
    _, pool = make_pool(capacity=16)
    load(pool, "a", OLD)
    before = state_of(pool)

    def fail(self, *args):
        raise MemoryError("out of memory")

    monkeypatch.setattr(MultiLoRALinear, "write", fail)
    with pytest.raises(MemoryError):
        load(pool, "b", NEW)
    with pool.route(["a"]), pytest.raises(MemoryError):
        replace(pool, "a", NEW)
    assert_unchanged(pool, before)
