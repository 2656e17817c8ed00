"""What one forward is: micro-batches hold their sequences end to end, and what travels with the examples."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from common import dist
from common.packed import Example, Tokens, make_micro_batch, pack, packed_attention

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
    assert packed.cu_seqlens.tolist() == [0, 3, 6, 8] and (
        packed.max_seqlen,
        packed.num_segments,
    ) == (3, 3)
    assert packed.targets.tolist() == [2, 5, 7] and packed.target_segments.tolist() == [0, 1, 2]
    assert packed.example_ids.tolist() == [1, 0] and packed.fields["margin"].tolist() == [4.0, 3.0]
    dummy = make_micro_batch(examples, [], CPU)
    assert (dummy.tokens.numel(), dummy.num_segments, dummy.targets.numel()) == (1, 0, 0)
    assert dummy.example_ids.numel() == 0 and dummy.fields["margin"].shape == (0,)


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


@pytest.mark.parametrize("more", [{}, {"sliding_window": 5}, {"softcap": 2.0}], ids=str)
def test_a_sequence_may_go_on_from_another_one(more: dict) -> None:
    """After a beginning of 6 tokens, ends of 3 and 4 whose keys are gathered attend as whole sequences."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 13, 8, generator=generator) for heads in (4, 2, 2))
    seen = [[*range(6)], [*range(9)], [*range(6), *range(9, 13)]]

    def attend(places: list[int], cu: list[int], **given: Any) -> torch.Tensor:
        parts = (x[:, :, places] for x in (q, k, v))
        bounds = torch.tensor(cu, dtype=torch.int32)
        return packed_attention(torch.nn.Module(), *parts, None, cu_seq_lens_q=bounds, **given, **more)[0][0]

    index = {"key_index": torch.tensor(sum(seen, [])), "cu_seq_lens_k": torch.tensor([0, 6, 15, 25])}
    found = attend([*range(13)], [0, 6, 9, 13], **index)
    wholes = [attend(places, [0, len(places)]) for places in seen]
    expected = torch.cat([wholes[0], wholes[1][6:], wholes[2][6:]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
