"""What one forward is: examples, and the micro-batches they are packed into.

Sequences stand end to end in one row of tokens, without pads; a mask is True on the tokens that are scored.
`micro_batches` deals the examples of a step out to the ranks and packs each share.
"""

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import dist
from common.formats import Messages


class Tokens(NamedTuple):
    """A sequence: what the model reads, and which of it is scored."""

    ids: np.ndarray  # (n,) int32
    mask: np.ndarray  # (n,) bool


@dataclass
class Example:
    """One item of a batch: the sequences scored together, for a pair chosen and rejected."""

    sequences: list[Tokens]
    prompt: Messages | str
    """what a generation for this example starts from; a string is plain text"""
    fields: dict[str, float | np.ndarray] = field(default_factory=dict)
    """what travels with the example into MicroBatch.fields: a number or a vector by each name"""
    record: dict = field(default_factory=dict)
    """the record as it was read, for judges and reward functions"""
    label: str = ""
    """the line of attributes asked for, which a generation for this example starts after"""

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.sequences)

    @property
    def num_targets(self) -> int:
        return sum(int(mask.sum()) for _, mask in self.sequences)


@dataclass
class MicroBatch:
    """Sequences end to end: what one forward sees. One without examples only keeps collectives matched."""

    tokens: Tensor  # (N,)
    position_ids: Tensor  # (N,) restart at 0 with each sequence
    segment_ids: Tensor  # (N,) which of the num_segments sequences
    cu_seqlens: Tensor  # (S + 1,) int32
    max_seqlen: int
    targets: Tensor  # (N_targets,) positions of scored tokens; never the first of a sequence
    num_segments: int  # B x sequences per example
    example_ids: Tensor  # (B,) indices into the list given to `micro_batches`
    fields: dict[str, Tensor]  # (B,) float32 each; of vectors (B, L), padded with NaN to the longest here

    @property
    def target_segments(self) -> Tensor:
        """(N_targets,) the sequence each scored token belongs to."""
        return self.segment_ids[self.targets]


def micro_batches(
    examples: list[Example], micro_batch_tokens: int, device: torch.device
) -> Iterator[MicroBatch]:
    """This rank's share of the examples in micro-batches of at most micro_batch_tokens; as many on each rank.

    Examples go to ranks by tokens, longest first. One longer than micro_batch_tokens gets a micro-batch of
    its own; a rank with fewer ends with dummies.
    """
    lengths = [example.num_tokens for example in examples]
    limit = token_limit(micro_batch_tokens, device)
    plans = [pack(share, lengths, limit) for share in dist.shares(lengths, dist.world_size())]
    mine = plans[dist.rank()]
    for i in range(max(map(len, plans))):
        yield make_micro_batch(examples, mine[i] if i < len(mine) else [], device)


def token_limit(micro_batch_tokens: int, device: torch.device) -> int:
    """Most tokens of a micro-batch; 0 stands for what suits the device."""
    return micro_batch_tokens or (8192 if device.type == "cuda" else 2048)


def pack(indices: Iterable[int], lengths: list[int], limit: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest bin it fits."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        slot = bisect.bisect_left(free, (lengths[index], -1))
        if slot == len(free):
            bins.append([])
            left, target = limit, len(bins) - 1
        else:
            left, target = free.pop(slot)
        bins[target].append(index)
        bisect.insort(free, (left - lengths[index], target))
    return bins


def make_micro_batch(examples: list[Example], chosen: list[int], device: torch.device) -> MicroBatch:
    """Pack examples[i] for i in chosen; nothing chosen makes a dummy of one token."""

    def put(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    sequences = [sequence for i in chosen for sequence in examples[i].sequences]
    ids, masks = zip(*sequences or [(np.zeros(1, np.int32), np.zeros(1, bool))], strict=True)
    lengths = np.array([len(x) for x in ids])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    segment_ids = np.repeat(np.arange(len(lengths)), lengths)
    names = examples[0].fields if examples else {}
    return MicroBatch(
        tokens=put(np.concatenate(ids).astype(np.int64)),
        position_ids=put(np.arange(starts[-1]) - starts[segment_ids]),
        segment_ids=put(segment_ids),
        cu_seqlens=put(starts.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        targets=put(np.flatnonzero(np.concatenate(masks))),
        num_segments=len(sequences),
        example_ids=put(np.array(chosen, np.int64)),
        fields={name: put(stack([examples[i].fields[name] for i in chosen], names[name])) for name in names},
    )


def stack(values: list[float | np.ndarray], like: float | np.ndarray) -> np.ndarray:
    """Values of a field in float32: (B,) of numbers, (B, L) of vectors, padded with NaN to the longest.

    Args:
        like: one of the field's values; a dummy micro-batch has none of its own to tell which they are.
    """
    if np.ndim(like) == 0:
        return np.array(values, np.float32)
    table = np.full((len(values), max(map(len, values), default=0)), np.nan, np.float32)
    for row, value in zip(table, values, strict=True):
        row[: len(value)] = value
    return table
