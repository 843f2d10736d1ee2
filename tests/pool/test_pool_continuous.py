"""AdapterPool under transformers' continuous batching: a request's tokens are those of it alone."""

import threading

import pytest
import torch
from test_pool_rows import ATTENTION, in_pool, make_llama
from tiny_models import transformers
from torch import nn

IS_THERE = hasattr(transformers, "ContinuousBatchingConfig")
of_5 = pytest.mark.skipif(not IS_THERE, reason="continuous batching of transformers 5")


def greedy(new=6, **options):
    return transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0, **options
    )


def small(**options):
    """Few tokens a step, so that prompts are taken in parts, and pages that end within them."""
    sizes = {"num_blocks": 64, "page_size": 4, "max_batch_tokens": 12}
    return transformers.ContinuousBatchingConfig(**{**sizes, **options})


def alone(model, pool, adapter, prompt, new=6):
    with pool.route([adapter]):
        rows = model.generate(torch.tensor([prompt]), generation_config=greedy(new))
    return rows[0, len(prompt) :].tolist()


def results(engine, count):
    found = {}
    while len(found) < count:
        output = engine.get_result(timeout=60)
        assert output is not None and output.error is None
        if output.is_finished():
            found[output.request_id] = output.generated_tokens
    return found


PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14], [5], list(range(3, 20)), [3, 4, 5]]


@of_5
@pytest.mark.parametrize(
    ("targets", "attention"),
    [(ATTENTION, "sdpa"), ([*ATTENTION, "down_proj", "lm_head"], "sdpa"), (ATTENTION, "eager")],
)
def test_tokens_are_those_of_each_request_alone(targets, attention):
    model, pool = in_pool(make_llama, targets)
    model.set_attn_implementation(attention)
    adapters = ["a", None, "b", "a", "b"]
    with pool.continuous_batching(greedy(), small()) as engine:
        ids = engine.add_requests(PROMPTS, adapters)
        found = results(engine, len(ids))
    assert model.config._attn_implementation == attention
    expected = [alone(model, pool, *one) for one in zip(adapters, PROMPTS, strict=True)]
    assert [found[name] for name in ids] == expected
    assert expected[0] != expected[-1]  # adapters that make a difference


@of_5
def test_requests_that_begin_alike_share_no_keys():
    model, pool = in_pool(make_llama, ATTENTION)
    prompt = list(range(3, 24))
    with pool.continuous_batching(greedy(), small()) as engine:
        found = []
        for adapter in ("a", None, "b"):  # one after the other: pages of the former are complete
            name = engine.add_request(prompt, adapter)
            found.append(results(engine, 1)[name])
    assert found == [alone(model, pool, adapter, prompt) for adapter in ("a", None, "b")]


@of_5
def test_a_request_s_further_sequences_have_its_adapter():
    model, pool = in_pool(make_llama, ATTENTION)
    config = greedy()
    config.num_return_sequences = 3  # greedy ones are equal, which only generate refuses
    with pool.continuous_batching(config, small()) as engine:
        name = engine.add_request(PROMPTS[1], "b")
        found = results(engine, 3)
        assert not engine._requests
    assert name in found and set(map(tuple, found.values())) == {
        tuple(alone(model, pool, "b", PROMPTS[1]))
    }


@of_5
def test_a_request_keeps_the_version_that_it_came_with():
    model, pool = in_pool(make_llama, ATTENTION)
    old, base = alone(model, pool, "a", [3, 4, 5], 40), alone(model, pool, None, [3, 4, 5], 40)
    matrices = {
        f"base_model.model.{name}.weight": torch.randn(p.T.shape if "lora_B" in name else p.shape)
        for name, p in pool.named_parameters("a")
    }
    pool.unload("b")  # there is room for two versions of a
    config = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}
    with pool.continuous_batching(greedy(40), small()) as engine:
        first = engine.add_request([3, 4, 5], "a", streaming=True)
        assert engine.get_result(first, timeout=60).generated_tokens == old[:1]
        pool.replace("a", matrices, config=config)
        second, third = engine.add_requests([[3, 4, 5]] * 2, ["a", None])
        pool.unload("a")
        full = pool.memory().used
        found = results(engine, 3)
        assert pool.memory().used < full  # of versions that are over, nothing is kept
        with pytest.raises(ValueError, match="no adapter 'a'"):
            engine.add_request([3], "a")
        pool.load("a", matrices, config=config)
    assert found[first] == old and found[third] == base
    assert found[second] == alone(model, pool, "a", [3, 4, 5], 40) != old


@of_5
def test_a_cancelled_request_lets_its_adapter_go():
    _, pool = in_pool(make_llama, ATTENTION)
    with pool.continuous_batching(greedy(10_000), small()) as engine:
        name = engine.add_request([3, 4, 5], "a", streaming=True)
        engine.get_result(timeout=60)
        engine.cancel_request(name)
        other = engine.add_request([3, 4], "b", max_new_tokens=5)
        while engine.get_result(timeout=60).request_id != other:
            pass
        assert not engine._requests
        pool.memory()
        assert pool._store.adapters["a"].holds == 0


@of_5
def test_a_request_is_cancelled_with_its_further_sequences():
    _, pool = in_pool(make_llama, ATTENTION)
    config = greedy(10_000)
    config.num_return_sequences = 2
    with pool.continuous_batching(config, small()) as engine:
        name, seen = engine.add_request([3, 4, 5], "a", streaming=True), set()
        while len(seen) < 2:
            seen.add(engine.get_result(timeout=60).request_id)
        engine.cancel_request(name)
        other = engine.add_request([3, 4], "b", max_new_tokens=5)
        while engine.get_result(timeout=60).request_id != other:
            pass
        taken = engine._manager.batch_processor.scheduler.active_requests
        assert not [one for one in (*engine._requests, *taken) if one.startswith(name)]


@of_5
def test_an_id_that_was_cancelled_after_its_end_is_another_request_s():
    model, pool = in_pool(make_llama, ATTENTION)
    expected = alone(model, pool, "a", [3, 4, 5])
    with pool.continuous_batching(greedy(), small()) as engine:
        for _ in range(3):
            engine.add_request([3, 4, 5], "a", request_id="x")
            assert results(engine, 1) == {"x": expected}
            engine.cancel_request("x")
            engine.cancel_request("never there")
            assert not engine._cancelled


@of_5
def test_what_would_end_the_engine_is_refused_before_it_is_added():
    model, pool = in_pool(make_llama, ATTENTION)
    room = model.get_input_embeddings().num_embeddings
    with pool.continuous_batching(greedy(), small()) as engine:
        for ids, error, match in [
            ([], ValueError, "at least one token; got none"),
            ([3, room], ValueError, rf"in \[0, {room}\); got 3 to {room}"),
            ([-1], ValueError, r"got -1 to -1"),
            ([0.5], TypeError, r"integers of one prompt; got \[0.5\]"),
            ([[3, 4]], TypeError, r"integers of one prompt; got \[\[3, 4\]\]"),
            (torch.tensor([[3, 4]]), TypeError, "integers of one prompt; got tensor"),
            ("abc", TypeError, "integers of one prompt; got 'abc'"),
        ]:
            with pytest.raises(error, match=match):
                engine.add_request(ids, "a")
        with pytest.raises(TypeError, match="request_id must be a string or None; got 5"):
            engine.add_request([3], "a", request_id=5)
        with pytest.raises(TypeError, match=r"adapter must be a string or None; got \['a'\]"):
            engine.add_request([3], ["a"])
        with pytest.raises(TypeError, match="max_new_tokens must be an int; got '5'"):
            engine.add_request([3], "a", max_new_tokens="5")
        with pytest.raises(ValueError, match="max_new_tokens must be at least 1; got 0"):
            engine.add_request([3], "a", max_new_tokens=0)
        with pytest.raises(ValueError, match="request_id must not have '__child#'"):
            engine.add_request([3], "a", request_id="x__child#0")
        name = engine.add_request(torch.tensor([3, 4, 5]), "a")
        assert results(engine, 1)[name] == alone(model, pool, "a", [3, 4, 5])
        assert not engine._requests


@of_5
def test_an_engine_runs_once_at_a_time_and_takes_requests_while_it_does():
    model, pool = in_pool(make_llama, ATTENTION)
    batching = pool.continuous_batching(greedy(), small())
    with pytest.raises(RuntimeError, match="a with block, which hasn't been entered"):
        batching.add_request([3], "a")
    for _ in range(2):
        with batching as engine:
            with pytest.raises(RuntimeError, match="the engine runs already"):
                batching.__enter__()
            name = engine.add_request([3, 4, 5], "a")
            assert results(engine, 1)[name] == alone(model, pool, "a", [3, 4, 5])
    pool.detach()


@of_5
def test_a_sequence_of_no_request_is_not_the_base_model_s():
    _, pool = in_pool(make_llama, ATTENTION)
    with pool.continuous_batching(greedy(), small()) as engine:
        engine._manager.add_request([3, 4, 5], request_id="unknown")
        assert "'unknown' that was not added here" in engine.get_result(timeout=60).error


@of_5
def test_other_threads_have_routes_of_their_own_meanwhile():
    model, pool = in_pool(make_llama, ATTENTION, unrouted="error")
    expected = {name: alone(model, pool, name, [3, 4, 5]) for name in ("a", "b")}
    found = []

    def ask(engine, name):
        for _ in range(8):
            one = engine.add_request([3, 4, 5], name)
            while (output := engine.get_result(one, timeout=60)) is None:
                pass
            found.append(output.generated_tokens == expected[name])

    with pool.continuous_batching(greedy(), small()) as engine:
        threads = [threading.Thread(target=ask, args=(engine, name)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        with pool.route(["b"]), torch.no_grad():
            for _ in range(5):
                model.model(torch.tensor([[3, 4, 5]]))
        for thread in threads:
            thread.join()
    assert found == [True] * 16


@of_5
def test_an_error_in_the_block_stops_the_engine_and_leaves_the_model_as_it_was():
    model, pool = in_pool(make_llama, ATTENTION)
    with (
        pytest.raises(ZeroDivisionError),
        pool.continuous_batching(greedy(10_000), small()) as engine,
    ):
        engine.add_request([3, 4, 5], "a")
        with pytest.raises(RuntimeError, match="detach must be outside"):
            pool.detach()
        raise ZeroDivisionError
    assert not engine.is_running()
    with pytest.raises(RuntimeError, match="the engine has stopped and takes no request"):
        engine.add_request([3], "a")
    pool.detach()
    assert "_call_impl" not in model.__dict__


@of_5
def test_a_step_that_fails_is_in_its_requests_results():
    model, pool = in_pool(make_llama, ATTENTION)

    def refuse(module, args):
        raise ZeroDivisionError("of a layer")

    handle = model.model.layers[0].register_forward_pre_hook(refuse)
    with pool.continuous_batching(greedy(), small()) as engine:
        engine.add_request([3, 4, 5], "a")
        output = engine.get_result(timeout=60)
        assert output.error == "of a layer" and not engine._requests
        engine._manager._generation_thread.join()
        with pytest.raises(RuntimeError, match="takes no request: of a layer"):
            engine.add_request([3], "a")
    handle.remove()


@of_5
def test_what_is_wrong_is_named():
    model, pool = in_pool(make_llama, ATTENTION)
    for options, match in [
        ({"use_cuda_graph": True}, "use_cuda_graph must be left"),
        ({"use_async_batching": True}, "use_async_batching must be left"),
        ({"default_compile_level": 1}, "default_compile_level must be left"),
    ]:
        with (
            pytest.raises(ValueError, match=match),
            pool.continuous_batching(None, small(**options)),
        ):
            pass
    with pytest.raises(TypeError, match="must be a ContinuousBatchingConfig; got dict"):
        pool.continuous_batching(None, {}).__enter__()
    with (
        pytest.raises(ValueError, match=r"continuous_batching\(\), outside of any route"),
        pool.route(["a"]),
        pool.continuous_batching(greedy(), small()),
    ):
        pass
    with pool.continuous_batching(greedy(), small()) as engine:
        with pytest.raises(ValueError, match="no adapter 'c'; it has 'a', 'b'"):
            engine.add_request([3], "c")
        with pytest.raises(ValueError, match="a name or None for each of 2 inputs; got 'ab'"):
            engine.add_requests([[3], [4]], "ab")
        engine.add_request([3], "a", request_id="x", max_new_tokens=200)
        with pytest.raises(ValueError, match="a request 'x' isn't over"):
            engine.add_request([3], "a", request_id="x")
    model.generate_batch(
        [[3]], greedy(), continuous_batching_config=small(), persistent_manager=True
    )
    with pytest.raises(RuntimeError, match="destroy_cached_continuous_batching_manager"):
        pool.continuous_batching(greedy(), small()).__enter__()
    pool.detach()


def test_a_model_that_cannot_generate_is_refused():
    _, pool = in_pool(lambda: nn.Sequential(nn.Linear(4, 4)), ["0"])
    match = "one of transformers' that generate" if IS_THERE else "must have transformers 5"
    with pytest.raises((TypeError, RuntimeError), match=match):
        pool.continuous_batching().__enter__()
    pool.detach()


@pytest.mark.skipif(IS_THERE, reason="transformers before 5")
def test_older_transformers_are_refused():
    _, pool = in_pool(make_llama, ATTENTION)
    with (
        pytest.raises(RuntimeError, match=f"got {transformers.__version__}. Use generate"),
        pool.continuous_batching(),
    ):
        pass
