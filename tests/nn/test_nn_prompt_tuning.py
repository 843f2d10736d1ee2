"""nn.PromptTuning: tasks in one batch, placements, ensembles, multitask prompts, inits."""

import copy

import pytest
import torch
from torch import nn

from peft_kernels.nn import PromptTuning, label_prompt, text_prompt, vocabulary_prompt

DIM, LENGTH = 6, 3
POSITIONS = ("front", "after_bos", "after_padding")


def a_prompt(dtype=torch.float64, **options):
    prompt = PromptTuning(LENGTH, DIM, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return prompt


class Model(nn.Module):
    """A frozen model small enough to train on, where every token sees what stands before it."""

    def __init__(self, classes=3, vocabulary=20):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, DIM)
        self.head = nn.Linear(DIM, classes)
        self.double().requires_grad_(False)

    def forward(self, inputs):
        weights = inputs.attention_mask.double().unsqueeze(-1)
        places = torch.sin(inputs.position_ids.double()).unsqueeze(-1)
        hidden = torch.tanh(inputs.embeddings + places) * weights
        return self.head(hidden.cumsum(1)[:, -1])


def left_padded(rows, size):
    """Embeddings, padded on the left with numbers that may not be seen, and their mask."""
    embeddings = torch.full((len(rows), size, DIM), 99.0, dtype=torch.float64)
    mask = torch.zeros(len(rows), size, dtype=torch.int64)
    for b, row in enumerate(rows):
        embeddings[b, size - len(row) :] = row
        mask[b, size - len(row) :] = 1
    return embeddings, mask


# -- the batch


def test_is_the_prompt_and_then_the_text():
    prompt, x = a_prompt(), torch.randn(2, 4, DIM, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 4))
    out = prompt(x, labels=labels)
    assert torch.equal(out.embeddings[:, LENGTH:], x)
    assert torch.equal(out.embeddings[:, :LENGTH], prompt.prompt.expand(2, -1, -1))
    assert out.attention_mask.all()
    assert out.position_ids.tolist() == [list(range(7))] * 2
    assert torch.equal(out.labels[:, LENGTH:], labels)
    assert (out.labels[:, :LENGTH] == -100).all()


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("position", POSITIONS)
def test_mixed_tasks_are_each_task_alone(position, rank):
    prompt = a_prompt(tasks=3, rank=rank, position=position)
    rows = [torch.randn(n, DIM, dtype=torch.float64) for n in (4, 2, 5, 1)]
    embeddings, mask = left_padded(rows, 5)
    tasks = torch.tensor([2, -1, 0, 2])
    mixed = prompt(embeddings, tasks, attention_mask=mask)
    for b, task in enumerate(tasks.tolist()):
        alone = a_prompt(position=position)
        with torch.no_grad():
            alone.prompt.copy_(prompt.prompts()[max(task, 0)])
        expected = alone(embeddings[b : b + 1], attention_mask=mask[b : b + 1])
        real = mixed.attention_mask[b] == 1
        if task < 0:
            assert real.sum() == len(rows[b])
            assert torch.equal(mixed.embeddings[b][real], rows[b])
            continue
        assert torch.equal(mixed.embeddings[b], expected.embeddings[0])
        assert torch.equal(mixed.attention_mask[b], expected.attention_mask[0])
        assert torch.equal(mixed.position_ids[b], expected.position_ids[0])


@pytest.mark.parametrize("position", POSITIONS)
def test_padded_rows_are_unpadded_rows(position):
    prompt, row = a_prompt(position=position), torch.randn(4, DIM, dtype=torch.float64)
    embeddings, mask = left_padded([row], 7)
    padded = prompt(embeddings, attention_mask=mask)
    bare = prompt(row.unsqueeze(0))
    real = padded.attention_mask[0] == 1
    assert torch.equal(padded.embeddings[0, real], bare.embeddings[0])
    assert torch.equal(padded.position_ids[0, real], bare.position_ids[0])
    first = {"front": 0, "after_bos": 1, "after_padding": 0}[position]
    assert torch.equal(bare.embeddings[0, first : first + LENGTH], prompt.prompt[0])
    # "front" alone stands in front of the padding.
    contiguous = padded.attention_mask[0].diff().abs().sum() == 1
    assert contiguous == (position != "front")


def test_nothing_frozen_gets_a_gradient_and_everything_trained_gets_one():
    model = Model()
    for options in ({}, {"tasks": 2}, {"tasks": 2, "rank": 2}, {"ensemble": 2}):
        prompt = PromptTuning(LENGTH, DIM, dtype=torch.float64, **options)
        (ids,) = prompt.expand(torch.randint(0, 20, (4, 5)))
        (tasks,) = prompt.expand(torch.tensor([0, 1, 0, 1]) if prompt.tasks > 1 else torch.zeros(4))
        logits = model(prompt(model.embedding(ids), tasks.long()))
        logits.square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        for name, parameter in prompt.named_parameters():
            by_prompt = parameter.grad.flatten(1).abs().sum(1)
            assert (by_prompt > 0).all(), (options, name)


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"ensemble": 2}])
def test_gradients(options):
    prompt = a_prompt(tasks=2, **options)
    x = torch.randn(2 * prompt.ensemble, 2, DIM, dtype=torch.float64, requires_grad=True)
    (tasks,) = prompt.expand(torch.tensor([1, 0]))
    names = [name for name, _ in prompt.named_parameters()]

    def run(x, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(prompt, given, (x, tasks)).embeddings

    assert torch.autograd.gradcheck(run, (x, *prompt.parameters()))


def test_a_float32_prompt_over_bfloat16():
    prompt, x = a_prompt(torch.float32), torch.randn(2, 4, DIM, dtype=torch.bfloat16)
    out = prompt(x).embeddings
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[:, :LENGTH], prompt.prompt.to(torch.bfloat16).expand(2, -1, -1))
    out.float().sum().backward()
    assert torch.equal(prompt.prompt.grad, torch.full((1, LENGTH, DIM), 2.0))


def test_compiles():
    prompt, x = a_prompt(tasks=2, ensemble=2), torch.randn(4, 3, DIM, dtype=torch.float64)
    tasks = torch.tensor([1, 1, 0, 0])
    compiled = torch.compile(prompt, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, tasks).embeddings, prompt(x, tasks).embeddings)


# -- multitask prompts


def test_multitask_prompts():
    prompt = a_prompt(tasks=3, rank=2)
    assert prompt.prompts().shape == (3, LENGTH, DIM)
    for t, found in enumerate(prompt.prompts()):
        expected = torch.einsum(
            "ld,lr,rd->ld", prompt.prompt[0], prompt.task_cols[t], prompt.task_rows[t]
        )
        torch.testing.assert_close(found, expected)


def count(**options):
    prompt = PromptTuning(device="meta", **options)
    return sum(p.numel() for p in prompt.parameters() if p.requires_grad)


def test_parameters_are_as_many_as_the_papers():
    # Lester et al. 2021: T5 XXL with 5 tokens, section 1; with 100 by size, appendix.
    assert count(length=5, dim=4096) == 20_480
    sizes = {512: 51_200, 768: 76_800, 1024: 102_400, 2048: 204_800, 4096: 409_600}
    for dim, expected in sizes.items():
        assert count(length=100, dim=dim) == expected
    # Wang et al. 2023, table 1: 77.6 K for a task, 10.5 K for each of GLUE's 8 together.
    assert count(length=100, dim=768, rank=1) == 77_668
    assert round(count(length=100, dim=768, rank=1, tasks=8) / 8, -2) == 10_500
    assert count(length=4, dim=10, tasks=3, ensemble=2) == 240


# -- ensembles


def test_an_ensemble_of_one_is_no_ensemble():
    prompt = a_prompt()
    x, logits = torch.randn(2, 4, DIM, dtype=torch.float64), torch.randn(5, 3)
    assert torch.equal(prompt.expand(x)[0], x)
    for how in ("vote", "mean_probability", "mean_log_probability"):
        assert torch.equal(prompt.combine(logits, how).prediction, logits.argmax(-1))
    torch.testing.assert_close(
        prompt.combine(logits, "mean_probability").scores, logits.softmax(-1)
    )
    torch.testing.assert_close(
        prompt.combine(logits, "mean_log_probability").scores, logits.log_softmax(-1)
    )
    votes = nn.functional.one_hot(logits.argmax(-1), 3).float()
    assert torch.equal(prompt.combine(logits).scores, votes)


@pytest.mark.parametrize("tasks", [1, 2])
def test_an_ensemble_is_each_of_its_prompts_alone(tasks):
    members, batch = 3, 2
    prompt = a_prompt(tasks=tasks, ensemble=members)
    rows = [torch.randn(n, DIM, dtype=torch.float64) for n in (4, 2)]
    x, mask = left_padded(rows, 4)
    ids = torch.tensor([1, -1]) if tasks == 2 else torch.tensor([0, 0])
    model = Model()
    copies, copied_mask, copied_ids = prompt.expand(x, mask, ids)
    together = prompt(copies, copied_ids, attention_mask=copied_mask)
    logits = model(together)
    for e in range(members):
        alone = PromptTuning(LENGTH, DIM, tasks=tasks, dtype=torch.float64)
        with torch.no_grad():
            alone.prompt.copy_(prompt.prompt[e::members])
        expected = model(alone(x, ids, attention_mask=mask))
        # The model's own products round by the number of rows, even in float64.
        torch.testing.assert_close(
            logits.view(batch, members, -1)[:, e], expected, rtol=1e-12, atol=1e-12
        )
    if tasks == 1:
        assert torch.equal(model(prompt(copies, attention_mask=copied_mask)), logits)


def test_members_of_an_ensemble_train_as_if_alone():
    model, members = Model(), 2
    prompt = PromptTuning(LENGTH, DIM, ensemble=members, dtype=torch.float64)
    singles = [
        PromptTuning(LENGTH, DIM, init=prompt.prompt[e], dtype=torch.float64)
        for e in range(members)
    ]
    x, y = model.embedding(torch.randint(0, 20, (6, 4))), torch.randint(0, 3, (6,))
    for trained in (prompt, *singles):
        optimizer = torch.optim.Adam(trained.parameters(), lr=0.05)
        for _ in range(4):
            copies, classes = trained.expand(x, y)
            loss = nn.functional.cross_entropy(model(trained(copies)), classes, reduction="sum")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    together = torch.cat([single.prompt for single in singles])
    torch.testing.assert_close(prompt.prompt, together, rtol=1e-12, atol=1e-12)
    assert not torch.equal(prompt.prompt[0], prompt.prompt[1])


def log(*probabilities):
    return torch.tensor(probabilities).log()


def test_votes_and_their_ties():
    prompt = PromptTuning(1, 1, ensemble=4)
    logits = torch.cat(
        [
            log([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0]),
            # Two votes each for 0 and 1; 1 is likelier in the mean, and 2 has no vote.
            log([0.5, 0.1, 0.4], [0.5, 0.1, 0.4], [0.0, 0.6, 0.4], [0.0, 0.6, 0.4]),
            # As many votes and the same means: the first.
            log([0.2, 0.6, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6], [0.2, 0.2, 0.6]),
            # The votes outweigh what is likeliest in the mean.
            log([0.4, 0.3, 0.3], [0.4, 0.3, 0.3], [0.4, 0.3, 0.3], [0.0, 1.0, 0.0]),
        ]
    )
    prediction, scores = prompt.combine(logits, "vote")
    assert prediction.tolist() == [0, 1, 1, 0]
    expected = [[3, 0, 1], [2, 2, 0], [0, 2, 2], [3, 1, 0]]
    assert (4 * scores).tolist() == expected
    assert prompt.combine(logits, "mean_probability").prediction.tolist()[3] == 1
    # One prompt that rules a class out rules it out for the mean logarithm.
    assert prompt.combine(logits[12:], "mean_log_probability").scores[0, 0] == -torch.inf
    means = logits.view(4, 4, 3).exp().mean(1)
    torch.testing.assert_close(prompt.combine(logits, "mean_probability").scores, means)


def test_half_precision_votes_are_counted_in_float32():
    logits = torch.randn(6, 4)
    prompt = PromptTuning(1, 1, ensemble=3)
    found = prompt.combine(logits.bfloat16(), "mean_probability").scores
    assert found.dtype == torch.float32
    assert torch.equal(found, prompt.combine(logits.bfloat16().float(), "mean_probability").scores)


# -- how it starts


def test_uniform_and_normal():
    prompt = PromptTuning(50, 40)
    assert prompt.prompt.abs().max() <= 0.5
    torch.testing.assert_close(prompt.prompt.std().item(), 12**-0.5, rtol=0.05, atol=0)
    normal = PromptTuning(50, 40, init="normal", std=0.1)
    torch.testing.assert_close(normal.prompt.std().item(), 0.1, rtol=0.05, atol=0)


def tokens_of(table, prompt):
    """Which row of the table each soft token is."""
    return [(table == token).all(-1).nonzero().item() for token in prompt]


@pytest.mark.parametrize("as_module", [False, True])
def test_vocabulary(as_module):
    table = torch.randn(6000, 4)
    embedding = nn.Embedding.from_pretrained(table) if as_module else table
    found = tokens_of(table, vocabulary_prompt(embedding, 400))
    assert len(set(found)) == 400
    assert max(found) < 5000 and max(found) > 4000
    few = vocabulary_prompt(embedding, 4, most_common=3, exclude=[0, 2])
    assert set(tokens_of(table, few)) <= {1, 3, 4}
    ordered = vocabulary_prompt(embedding, 2, tokens=[77, 5, 9], most_common=2)
    assert set(tokens_of(table, ordered)) == {77, 5}
    counts = torch.zeros(6000)
    counts[[10, 5999, 30]] = torch.tensor([3.0, 2.0, 1.0])
    counted = vocabulary_prompt(embedding, 2, counts=counts, most_common=2)
    assert set(tokens_of(table, counted)) == {10, 5999}
    several = vocabulary_prompt(embedding, 5, prompts=3)
    assert several.shape == (3, 5, 4)
    assert not torch.equal(several[0], several[1])
    first, second = (
        vocabulary_prompt(embedding, 5, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_text():
    table = torch.randn(9, 4)
    assert tokens_of(table, text_prompt(table, [4, 2], 5)) == [4, 2, 4, 2, 4]
    assert tokens_of(table, text_prompt(table, [4, 2, 7], 2)) == [4, 2]


def test_class_labels():
    table = torch.randn(9, 4)
    prompt = label_prompt(table, [[1], [2, 5, 6]], 5, tokens=[7, 8])
    assert torch.equal(prompt[0], table[1])
    torch.testing.assert_close(prompt[1], table[[2, 5, 6]].mean(0))
    assert set(tokens_of(table, prompt[2:])) <= {7, 8}
    assert tokens_of(table, label_prompt(table, [[1], [2], [3]], 2)) == [1, 2]


def test_embeddings_that_are_scaled_are_called():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    embedding = Scaled(9, 4, dtype=torch.bfloat16)
    found = text_prompt(embedding, [3], 1)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(found[0], (3 * embedding.weight[3]).float())


def test_starts_as_a_tensor():
    one, two = torch.randn(LENGTH, DIM), torch.randn(2, LENGTH, DIM)
    assert torch.equal(PromptTuning(LENGTH, DIM, tasks=2, init=one).prompt[1], one)
    assert torch.equal(PromptTuning(LENGTH, DIM, rank=1, tasks=2, init=one).prompt[0], one)
    prompt = PromptTuning(LENGTH, DIM, ensemble=2, init=two)
    assert torch.equal(prompt.prompt, two)
    with torch.no_grad():
        prompt.prompt.zero_()
    prompt.reset_parameters()
    assert torch.equal(prompt.prompt, two)


# -- files


@pytest.mark.parametrize("options", [{"ensemble": 2}, {"rank": 1}])
def test_saved_and_resumed_is_never_stopped(options, tmp_path):
    model = Model()
    x, y = model.embedding(torch.randint(0, 20, (6, 4))), torch.randint(0, 3, (6,))
    tasks = torch.tensor([0, 1, 1, 0, 1, 0])

    def started():
        prompt = PromptTuning(LENGTH, DIM, tasks=2, dtype=torch.float64, **options)
        return prompt, torch.optim.AdamW(prompt.parameters(), lr=0.05)

    def train(prompt, optimizer, steps):
        for _ in range(steps):
            copies, classes, ids = prompt.expand(x, y, tasks)
            loss = nn.functional.cross_entropy(model(prompt(copies, ids)), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    prompt, optimizer = started()
    train(prompt, optimizer, 3)
    torch.save([prompt.state_dict(), optimizer.state_dict()], tmp_path / "state")
    halfway = copy.deepcopy(prompt.state_dict())
    train(prompt, optimizer, 3)
    resumed, its_optimizer = started()
    states = torch.load(tmp_path / "state")
    resumed.load_state_dict(states[0])
    its_optimizer.load_state_dict(states[1])
    train(resumed, its_optimizer, 3)
    for name, value in prompt.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
        assert not torch.equal(value, halfway[name])


# -- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be at least 1; got 0"),
        ({"tasks": 0}, "tasks must be at least 1; got 0"),
        ({"rank": 0}, "rank must be at least 1; got 0"),
        ({"init": "zeros"}, "init must be one of uniform, normal; got 'zeros'"),
        ({"position": "end"}, "position must be one of front, .*; got 'end'"),
        ({"bound": 0.0}, "bound must be above 0; got 0.0"),
        (
            {"init": torch.zeros(2, 2)},
            r"init must have shape \(1, 3, 6\) or \(3, 6\); got \(2, 2\)",
        ),
        (
            {"init": torch.zeros(3, 6), "ensemble": 2},
            r"init must have shape \(2, 3, 6\); got \(3, 6\)",
        ),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PromptTuning(**{"length": LENGTH, "dim": DIM} | options)
    with pytest.raises(TypeError, match=r"dim must be an int; got 1\.5"):
        PromptTuning(2, 1.5)


def test_bad_rows():
    x = torch.randn(3, 4, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="task_ids must be given to choose among 2 prompts"):
        a_prompt(tasks=2)(x)
    with pytest.raises(ValueError, match="task_ids must be given to choose among 2 tasks"):
        a_prompt(tasks=2, ensemble=3)(x)
    with pytest.raises(ValueError, match=r"task_ids must be in \[-1, 2\); got 2"):
        a_prompt(tasks=2)(x, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"task_ids must be in \[-1, 2\); got 5"):
        a_prompt(tasks=2, ensemble=3)(x, torch.tensor([0, 1, 5]))
    with pytest.raises(ValueError, match=r"task_ids must have shape \(3,\); got \(1,\)"):
        a_prompt(tasks=2, ensemble=3)(x, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"embeddings must have 2 rows for each.*got 3 rows"):
        a_prompt(ensemble=2)(x)
    with pytest.raises(ValueError, match=r"logits must be \[B \* 2, C\]; got shape \(3, 5\)"):
        a_prompt(ensemble=2).combine(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"how must be one of vote, .*; got 'max'"):
        a_prompt().combine(torch.zeros(3, 5), "max")


def test_bad_starts():
    table = torch.randn(9, 4)
    cases = [
        (lambda: vocabulary_prompt(table, 0), "length must be at least 1; got 0"),
        (lambda: vocabulary_prompt(table, 2, tokens=[9]), r"tokens must be in \[0, 9\); got 9"),
        (lambda: vocabulary_prompt(table, 2, tokens=[]), "must leave at least one token"),
        (lambda: vocabulary_prompt(table, 2, counts=[1, 2]), r"counts must have shape \(9,\)"),
        (lambda: vocabulary_prompt(table, 2, counts=[1], tokens=[1]), "can't both be given"),
        (lambda: vocabulary_prompt(table[0], 2), r"embedding must be \[V, d\]; got shape \(4,\)"),
        (lambda: text_prompt(table, [], 2), "token_ids must have at least one token; got none"),
        (lambda: text_prompt(table, [-1], 2), r"token_ids must be in \[0, 9\); got -1"),
        (lambda: label_prompt(table, [], 2), "labels must have at least one label; got none"),
        (lambda: label_prompt(table, [[1], []], 2), "must have at least one token; got none"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
