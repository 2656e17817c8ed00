"""What one forward is: micro-batches hold their sequences end to end, and what travels with the examples."""

import math

import numpy as np
import pytest
import torch

from common import dist
from common.packed import Example, Tokens, make_micro_batch, micro_batches, pack

CPU = torch.device("cpu")


def test_packing_keeps_to_the_limit_and_fills_the_micro_batches() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 400, 300).tolist() + [900]
    bins = pack(range(301), lengths, 512)
    loads = [sum(lengths[i] for i in chosen) for chosen in bins]
    assert sorted(i for chosen in bins for i in chosen) == list(range(301))
    assert [300] in bins and all(
        load <= 512 for load, chosen in zip(loads, bins, strict=True) if chosen != [300]
    )
    assert len(bins) <= math.ceil(sum(lengths[:300]) / 512) + 2  # nearly as few as there can be


def test_shares_are_balanced_by_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 256).tolist()
    for size in (2, 8):
        loads = [sum(lengths[i] for i in share) for share in dist.shares(lengths, size)]
        assert max(loads) / (sum(loads) / size) < 1.01


def test_a_micro_batch_holds_its_sequences_end_to_end() -> None:
    pair = [
        Tokens(np.array([5, 6, 7], np.int32), np.array([0, 0, 1], bool)),
        Tokens(np.array([8, 9], np.int32), np.array([0, 1], bool)),
    ]
    examples = [Example(pair, "", {"margin": 3.0}), Example(pair[:1], "", {"margin": 4.0})]
    packed = make_micro_batch(examples, [1, 0], CPU)
    assert packed.tokens.tolist() == [5, 6, 7, 5, 6, 7, 8, 9]
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert packed.segment_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert packed.attention["cu_seq_lens_q"].tolist() == [0, 3, 6, 8]
    assert packed.attention["max_length_q"] == packed.attention["max_length_k"] == 3
    assert packed.num_segments == 3 and packed.ends.tolist() == [2, 5, 7]
    assert packed.targets.tolist() == [2, 5, 7] and packed.target_segments.tolist() == [0, 1, 2]
    assert packed.example_ids.tolist() == [1, 0] and packed.fields["margin"].tolist() == [4.0, 3.0]
    dummy = make_micro_batch(examples, [], CPU)
    assert (dummy.tokens.numel(), dummy.num_segments, dummy.targets.numel()) == (1, 0, 0)
    assert dummy.ends.numel() == 0 and dummy.attention.keys() == packed.attention.keys()
    assert dummy.example_ids.numel() == 0 and dummy.fields["margin"].shape == (0,)


def sequence(text: str, first_scored: int | None = None) -> Tokens:
    """A token for each character, scored from first_scored on."""
    ids = np.array([ord(c) for c in text], np.int32)
    return Tokens(ids, np.arange(len(ids)) >= (len(ids) if first_scored is None else first_scored))


@pytest.mark.parametrize(
    ("sequences", "shared"),
    [
        ([sequence("abcdeX", 5), sequence("abcdeYY", 5)], 4),  # e scores X and Y, so each has its own e
        ([sequence("abcdeX", 3), sequence("abcdeYY", 5)], 2),  # d is scored in one of them
        ([sequence("abcde", 3), sequence("abcde", 3)], 2),
        ([sequence("abX"), sequence("abYY")], 2),  # a reward model reads the last token
        ([sequence("ab"), sequence("ab")], 1),
        ([sequence("Xb", 1), sequence("Yb", 1)], 0),
        ([sequence("abcX", 3), sequence("abdX", 3), sequence("abcY", 3)], 2),
        ([sequence("abcdeX", 5)], 0),
    ],
)
def test_what_sequences_share_ends_before_what_tells_them_apart(sequences: list[Tokens], shared: int) -> None:
    example = Example(sequences, "")
    assert example.num_shared == shared
    assert example.row_tokens == sum(len(s.ids) for s in sequences) - shared * (len(sequences) - 1)
    row = make_micro_batch([example], [0], CPU)
    assert len(row.tokens) == example.row_tokens
    assert row.tokens[row.ends].tolist() == [s.ids[-1] for s in sequences]
    assert row.tokens[row.targets].tolist() == [t for s in sequences for t in s.ids[s.mask]]
    assert row.target_segments.tolist() == [i for i, s in enumerate(sequences) for _ in s.ids[s.mask]]
    if len(sequences) > 1:  # the keys each part looks at are its sequence up to there
        keys = row.tokens[row.attention["kv_indices"]].split(row.attention["cu_seq_lens_k"].diff().tolist())
        assert [k.tolist() for k in keys[-len(sequences) :]] == [s.ids.tolist() for s in sequences]


def test_a_shared_prompt_stands_in_a_row_once() -> None:
    pair = Example([sequence("abcdeX", 5), sequence("abcdeYY", 5)], "")
    row = make_micro_batch([pair], [0], CPU)
    assert "".join(map(chr, row.tokens)) == "abcdeXeYY"
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert row.segment_ids.tolist() == [0] * 6 + [1] * 3
    lengths = np.full(200, pair.row_tokens)
    count = len(list(micro_batches([pair] * 200, 10 * pair.row_tokens, CPU)))
    assert count == lengths.sum() // (10 * pair.row_tokens)  # rows are as full as they may be


def test_a_field_is_a_number_or_a_vector_of_each_example() -> None:
    sequence = Tokens(np.array([5, 6], np.int32), np.array([0, 1], bool))
    ranks = [np.array([1.0, 2.0]), np.array([2.0, 1.0, 3.0]), np.array([1.0])]
    examples = [Example([sequence], "", {"margin": 0.5, "ranks": vector}) for vector in ranks]
    fields = make_micro_batch(examples, [1, 0], CPU).fields
    assert fields["margin"].tolist() == [0.5, 0.5] and fields["margin"].dtype == torch.float32
    expected = torch.tensor([[2.0, 1.0, 3.0], [1.0, 2.0, math.nan]])
    torch.testing.assert_close(fields["ranks"], expected, rtol=0, atol=0, equal_nan=True)
    assert make_micro_batch(examples, [2], CPU).fields["ranks"].tolist() == [[1.0]]
    assert make_micro_batch(examples, [], CPU).fields["ranks"].shape == (0, 2)
    assert make_micro_batch(examples, [], CPU).fields["margin"].shape == (0,)
