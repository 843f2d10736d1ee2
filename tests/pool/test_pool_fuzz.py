"""Ten thousand random operations on a pool, against a plain model of what it must hold."""

import contextlib
import random

import pytest
import torch
from small_adapters import Made, make_adapter
from torch import nn

from peft_kernels import AdapterPool
from peft_kernels.pool.adapter_pool import PoolFullError

SHAPES = {"x": (5, 4), "y": (3, 5)}  # (n, k)
PAGES, SLOTS, NAMES = 6, 4, "abcdef"
OPERATIONS = 10_000


class Version:
    """What one version of an adapter must be."""

    def __init__(self, made: Made, base: nn.Module, clock: int) -> None:
        self.counts = {layer: -(-made.matrices(layer)[0].shape[0] // 8) for layer in made.scales}
        self.deltas = {
            layer: scale * made.matrices(layer)[1].double() @ made.matrices(layer)[0].double()
            for layer, scale in made.scales.items()
        }
        self.last, self.holds, self.pinned, self.trainable = clock, 0, False, False


class Model:
    """The pool, as dicts and counts."""

    def __init__(self, base: nn.Module, lru: bool) -> None:
        self.base, self.lru, self.clock = base, lru, 0
        self.adapters: dict[str, Version] = {}
        self.retired: list[Version] = []  # in use still

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def free(self, without=()) -> tuple[int, dict[str, int]]:
        """Free slots, and free pages by layer, if ``without`` weren't there."""
        present = [v for v in (*self.adapters.values(), *self.retired) if v not in without]
        pages = {
            layer: PAGES - sum(version.counts.get(layer, 0) for version in present)
            for layer in SHAPES
        }
        return SLOTS - len(present), pages

    def evicted_for(self, version: Version, old: Version | None) -> list[Version] | None:
        """What has to go for a version to fit, beside what it replaces; None if it can't."""
        gone = [old] if old and not old.holds else []
        start = len(gone)
        while True:
            slots, pages = self.free(gone)
            short = [layer for layer, count in version.counts.items() if count > pages[layer]]
            if slots and not short:
                return gone[start:]
            candidates = [
                v
                for v in self.adapters.values()
                if self.lru and v not in gone and v is not old and not v.pinned and not v.holds
                if not v.trainable and (not slots or short[0] in v.counts)
            ]
            if not candidates:
                return None
            gone.append(min(candidates, key=lambda v: v.last))

    def remove(self, version: Version) -> None:
        self.adapters = {n: v for n, v in self.adapters.items() if v is not version}
        if version.holds:
            self.retired.append(version)

    def put(self, name: str, version: Version, evicted: list[Version]) -> None:
        for victim in evicted:
            self.remove(victim)
        old = self.adapters.get(name)
        if old is not None:
            version.pinned, version.trainable = old.pinned, old.trainable
            if old.holds:
                self.retired.append(old)
        version.last = self.tick()
        self.adapters[name] = version

    def release(self, versions: list[Version]) -> None:
        for version in versions:
            version.holds -= 1
        self.retired = [version for version in self.retired if version.holds]

    def row(self, x: torch.Tensor, version: Version | None) -> torch.Tensor:
        for layer in SHAPES:
            linear = self.base[layer]
            weight = linear.weight.double()
            if version is not None and layer in version.deltas:
                weight = weight + version.deltas[layer]
            x = x @ weight.T + linear.bias.double()
        return x


def poison(pool: AdapterPool, model: Model) -> None:
    """NaN wherever no adapter has a rank row; and no page is in two places."""
    for name, layer in pool._store.layers.items():
        free = list(pool._store.book.free[name])
        rows = layer._rows(free, 8 * len(free))
        layer.pages_a.data[rows] = layer.pages_b.data[rows] = torch.nan
        for version in pool._store.adapters.values():
            if name in version.layers:
                r = version.layers[name][0]
                rest = layer._rows(version.placement.pages[name], 8 * -(-r // 8))[r:]
                layer.pages_a.data[rest] = layer.pages_b.data[rest] = torch.nan
        if not model.retired:
            used = [
                page
                for version in pool._store.adapters.values()
                for page in version.placement.pages.get(name, ())
            ]
            assert sorted(free + used) == list(range(PAGES))


@torch.no_grad()
@pytest.mark.parametrize("evict", [None, "lru"])
def test_fuzz(evict):
    rng = random.Random(1)
    torch.manual_seed(0)
    net = nn.ModuleDict({layer: nn.Linear(k, n) for layer, (n, k) in SHAPES.items()})
    pool = AdapterPool.attach(
        net, list(SHAPES), capacity=PAGES * 8, max_adapters=SLOTS, max_rank=24, evict=evict
    )
    model = Model(net, evict == "lru")
    catalogue = []
    for seed in range(40):
        ranks = {layer: rng.choice([0, 1, 4, 8, 9, 16, 20]) for layer in SHAPES}
        ranks = {layer: r for layer, r in ranks.items() if r} or {"x": 3}
        catalogue.append(make_adapter(ranks, seed, shapes=SHAPES))
    routes: list[tuple[contextlib.ExitStack, list, list]] = []
    counts = dict.fromkeys(("loaded", "replaced", "full", "forward", "evicted", "deferred"), 0)

    def load(name: str) -> None:
        made, old = rng.choice(catalogue), model.adapters.get(name)
        version = Version(made, net, model.clock)
        change = pool.load if old is None else pool.replace
        options = {}
        if old is None and evict is None and rng.random() < 0.3:
            version.trainable = options["trainable"] = True
        evicted = model.evicted_for(version, old)
        in_runs = version.trainable or (old is not None and old.trainable)
        try:
            change(name, made.tensors, config=made.config, **options)
        except PoolFullError as full:
            # A trainable adapter needs pages that follow one another, which the model doesn't know.
            assert evicted is None or (in_runs and "follow one another" in str(full))
            counts["full"] += 1
            return
        assert evicted is not None
        counts["loaded" if old is None else "replaced"] += 1
        counts["evicted"] += len(evicted)
        counts["deferred"] += bool(old and old.holds)
        model.put(name, version, evicted)

    def unload(name: str) -> None:
        if name not in model.adapters:
            with pytest.raises(ValueError, match="no adapter"):
                pool.unload(name)
            return
        pool.unload(name)
        counts["deferred"] += bool(model.adapters[name].holds)
        model.remove(model.adapters[name])

    def pin(name: str) -> None:
        if name in model.adapters:
            pinned = rng.random() < 0.4
            (pool.pin if pinned else pool.unpin)(name)
            model.adapters[name].pinned = pinned

    def train(name: str) -> None:
        version = model.adapters.get(name)
        if version is not None and version.trainable:
            factor = rng.choice([0.5, -1.0, 1.5])
            for key, parameter in pool.named_parameters(name):
                if key.endswith("lora_B"):
                    parameter.mul_(factor)
            version.deltas = {layer: factor * delta for layer, delta in version.deltas.items()}

    def enter(_: str) -> None:
        names = [rng.choice([*model.adapters, None]) for _ in range(rng.randint(1, 4))]
        stack = contextlib.ExitStack()
        stack.enter_context(pool.route(names))
        held = [model.adapters[name] for name in dict.fromkeys(names) if name is not None]
        now = model.tick()
        for version in held:
            version.holds, version.last = version.holds + 1, now
        rows = [None if name is None else model.adapters[name] for name in names]
        routes.append((stack, held, rows))

    def leave(_: str) -> None:
        if routes:
            stack, held, _ = routes.pop()
            stack.close()
            model.release(held)

    def forward(_: str) -> None:
        rows = routes[-1][2] if routes else [None, None]
        x = torch.randn(len(rows), 4)
        y = net["y"](net["x"](x))
        exact = torch.stack(
            [model.row(one.double(), version) for one, version in zip(x, rows, strict=True)]
        )
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
        counts["forward"] += 1

    operations = [load, unload, pin, train, enter, leave, forward]
    weights = [5, 2, 1, 1, 3, 4, 4]
    for _ in range(OPERATIONS):
        operation = rng.choices(operations, weights)[0]
        if operation is enter and len(routes) == 2:
            operation = leave
        operation(rng.choice(NAMES))
        poison(pool, model)
        assert pool.names() == list(model.adapters)
        assert len(pool._store.book.free_slots) == model.free()[0]
        assert {name: len(free) for name, free in pool._store.book.free.items()} == model.free()[1]
    assert counts["evicted" if evict else "full"] > 100 and counts["deferred"] > 100, counts
    assert min(counts["loaded"], counts["replaced"], counts["forward"]) > 400, counts

    while routes:
        leave("")
    for name in pool.names():
        pool.unload(name)
    memory = pool.memory()
    assert memory.used == 0 and set(memory.free_pages.values()) == {PAGES}
    assert len(pool._store.book.free_slots) == SLOTS
