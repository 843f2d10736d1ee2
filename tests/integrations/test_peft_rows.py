"""rows_linear(): PEFT's adapters of any ranks, one for each row, against one product a row."""

import pytest
import torch

rows = pytest.importorskip("peft_kernels.integrations.peft.rows")
state = pytest.importorskip("peft_kernels.integrations.peft.state")

N, K, F64 = 6, 9, torch.float64


def adapters(ranks, scales):
    return [
        state.Adapter(
            str(i),
            torch.randn(rank, K, dtype=F64, requires_grad=True),
            torch.randn(N, rank, dtype=F64, requires_grad=True),
            None,
            scale,
            0.0,
        )
        for i, (rank, scale) in enumerate(zip(ranks, scales, strict=True))
    ]


@pytest.mark.parametrize("ranks", [(3,), (8, 16), (20, 3, 8, 11), (1, 24)], ids=str)
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_ranks_of_any_number_of_pages(ranks, kind):
    scales = [kind(0.5 + i) for i in range(len(ranks))]
    banks, names = adapters(ranks, scales), [*map(str, range(len(ranks))), "none", "0"]
    x = torch.randn(len(names), 2, K, dtype=F64)
    weight, bias = torch.randn(N, K, dtype=F64), torch.randn(N, dtype=F64)
    expected = []
    for row, name in zip(x, names, strict=True):
        y = row @ weight.T + bias
        for own in banks:
            if own.name == name:
                y = y + own.scale * (row @ own.a.T @ own.b.T)
        expected.append(y)
    found = rows.rows_linear(x, weight, bias, banks, names)
    torch.testing.assert_close(found, torch.stack(expected))
    matrices = [matrix for own in banks for matrix in (own.a, own.b)]
    grads = [torch.autograd.grad(y.sin().sum(), matrices) for y in (found, torch.stack(expected))]
    torch.testing.assert_close(*grads)
