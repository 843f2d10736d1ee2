"""The decode ops with their launcher, over the emulation: on tensors of the CPU."""

import os
import shutil

import pytest
import torch
from decode_driver import (
    DTYPE_IDS,
    DTYPES,
    add_inputs,
    compile_ops,
    decode,
    inputs_of,
    run_again,
    same_bits,
)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_in_a_process_of_their_own(tmp_path):
    run_again(
        __file__,
        "test_ops",
        passed=len(DTYPES) + 1,
        PEFT_KERNELS_SIMT_OPS=str(compile_ops(tmp_path / "ops.so")),
        PEFT_KERNELS_NATIVE="0",  # which may define them for the GPU
    )


@pytest.fixture
def ops():
    if "PEFT_KERNELS_SIMT_OPS" not in os.environ:
        pytest.skip("a part of test_in_a_process_of_their_own")
    torch.ops.load_library(os.environ["PEFT_KERNELS_SIMT_OPS"])
    return torch.ops.peft_kernels


@pytest.mark.parametrize("dtypes", DTYPES, ids=DTYPE_IDS)
def test_ops(ops, dtypes):
    for m, k, count in ((10, 96, 5), (10, 96, 10), (3, 0, 3), (0, 96, 4), (4, 67, 1)):
        inputs = inputs_of(max(m, 1), [40, 8], k, *dtypes, count=count)
        fields = [list(field) for field in zip(*inputs["banks"], strict=True)]
        x, weight, bias, ids = (inputs[name] for name in ("x", "weight", "bias", "ids"))
        x = x[:m]
        y, s = ops.multi_lora_linear_decode(x, weight, bias, *fields, ids)
        if m == 0:
            assert (y.shape, s.shape) == ((0, 48), (0, 2 * 72))
            continue
        expected, expected_s, _ = decode(**inputs)
        assert same_bits(y, expected)
        assert same_bits(s, expected_s)
        turned = [t.T.contiguous().T for t in (x, weight)]
        assert same_bits(ops.multi_lora_linear_decode(*turned, bias, *fields, ids)[0], expected)
        shifted = torch.zeros(m, k + 9, dtype=dtypes[0])[:, 1 : k + 1].copy_(x)
        out = torch.ones_like(y)
        assert same_bits(ops.multi_lora_linear_decode_add(out, shifted, *fields, ids), s)
        assert same_bits(out, decode(**add_inputs(inputs, torch.ones_like(y)))[0])


def test_ops_refuse(ops):
    inputs = inputs_of(4, [40, 8], 16)
    fields = [list(field) for field in zip(*inputs["banks"], strict=True)]
    x, weight, ids = inputs["x"], inputs["weight"], inputs["ids"]

    def refuses(message, *arguments):
        with pytest.raises(RuntimeError, match=message):
            ops.multi_lora_linear_decode(*arguments)

    refuses("equal parts", x, weight, None, *fields, ids[:3])
    refuses("1 to 4 banks; got 6", x, weight, None, *(field * 3 for field in fields), ids)
    refuses("add up to the outputs", x, weight[1:], None, *fields, ids)
    refuses("ids has the wrong dtype", x, weight, None, *fields, ids.long())
    refuses(
        "float32 or have x's dtype",
        x.half(),
        weight.half(),
        None,
        *([t.bfloat16() for t in f] for f in fields[:2]),
        *fields[2:],
        ids,
    )
