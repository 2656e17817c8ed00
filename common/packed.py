"""What one forward reads: packed examples, and attention within each sequence.

Sequences stand end to end in one row of tokens, without pads; a mask is True on the tokens that are scored.
What the sequences of an example begin with alike, the prompt of a pair, stands in the row once, and all of
them look at it (https://arxiv.org/abs/2410.20305): no number changes, and no prompt is run twice.
`micro_batches` deals the examples of a step out to the ranks and packs each share, and `packed_attention` is
told where sequences begin.

Shapes: N tokens of a row, N_targets scored ones, D width, H heads, K head width.
"""

import bisect
import functools
import heapq
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    prompt: Messages | str  # what a generation for this example starts from; a string is plain text
    # what travels with the example into MicroBatch.fields: a number or a vector by each name
    fields: dict[str, float | np.ndarray] = field(default_factory=dict)
    record: dict = field(default_factory=dict)  # as it was read, for judges and reward functions
    label: str = ""  # the line of attributes asked for, which a generation for this example starts after

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.sequences)

    @property
    def num_targets(self) -> int:
        return sum(int(mask.sum()) for _, mask in self.sequences)

    @functools.cached_property
    def num_shared(self) -> int:
        """Tokens that all sequences begin with and that the first scored one of each stands behind.

        The last of them that could be shared is left to each sequence: it scores the token after it.
        """
        if len(self.sequences) < 2:
            return 0
        scored = [int(mask.argmax()) if mask.any() else len(mask) for _, mask in self.sequences]
        most = max(0, min(scored) - 1)
        table = np.stack([ids[:most] for ids, _ in self.sequences])
        differ = (table != table[0]).any(0)
        return int(differ.argmax()) if differ.any() else most

    @property
    def row_tokens(self) -> int:
        """Tokens that the sequences take in a row."""
        return self.num_tokens - self.num_shared * (len(self.sequences) - 1)

    def end_with(self, ending: tuple[int, ...]) -> "Example":
        """The sequences with these tokens in place of the last one; none is scored."""
        ids = [np.append(ids[:-1], np.array(ending, np.int32)) for ids, _ in self.sequences]
        return Example([Tokens(x, np.zeros(len(x), bool)) for x in ids], self.prompt, self.fields)


@dataclass
class MicroBatch:
    """Sequences end to end: what one forward sees. One without examples only keeps collectives matched.

    Of an example whose sequences share a prefix the row has P parts: the prefix, then the rest of each.
    """

    tokens: Tensor  # (N,)
    position_ids: Tensor  # (N,) the place in the sequence
    segment_ids: Tensor  # (N,) which of the num_segments sequences; a shared prefix belongs to the first
    attention: dict[str, Any]  # what `packed_attention` is told: parts and what each looks at
    targets: Tensor  # (N_targets,) positions of scored tokens; never the first of a part
    ends: Tensor  # (num_segments,) position of the last token of each sequence
    num_segments: int  # B x sequences per example
    example_ids: Tensor  # (B,) indices into the list given to `micro_batches`
    fields: dict[str, Tensor]  # (B,) float32 each; of vectors (B, L), padded with NaN to the longest here
    is_last: bool = True  # of the optimizer step on this rank: models.once_a_step says what waits for it

    @property
    def inputs(self) -> dict[str, Any]:
        """What the trunk of a transformers model takes of it."""
        return {"input_ids": self.tokens[None], "position_ids": self.position_ids[None], **self.attention}

    @property
    def target_segments(self) -> Tensor:
        """(N_targets,) the sequence each scored token belongs to."""
        return self.segment_ids[self.targets]


def micro_batches(
    examples: Sequence[Example], micro_batch_tokens: int, device: torch.device, what: str = ""
) -> Iterator[MicroBatch]:
    """This rank's share of the examples in micro-batches of at most micro_batch_tokens; as many on each rank.

    Examples go to ranks by tokens, longest first. One longer than micro_batch_tokens gets a micro-batch of
    its own; a rank with fewer ends with dummies. Slow work is given a name, `what`, to say how far it is.
    """
    lengths = [example.row_tokens for example in examples]
    limit = token_limit(micro_batch_tokens, device)
    plans = [pack(share, lengths, limit) for share in dist.shares(lengths, dist.world_size())]
    mine = plans[dist.rank()]
    count = max(map(len, plans))
    for i in dist.progress(range(count), f"{what}, micro-batches", count) if what else range(count):
        batch = make_micro_batch(examples, mine[i] if i < len(mine) else [], device)
        batch.is_last = i == count - 1
        yield batch


@torch.no_grad()
def table(
    compute: Callable[[MicroBatch], Tensor],
    examples: Sequence[Example],
    micro_batch_tokens: int,
    device: torch.device,
    shape: tuple[int, ...] = (),
    what: str = "",
) -> Tensor:
    """What `compute` gives for each sequence of a micro-batch, of all examples in turn, on every rank.

    -> (sequences, *shape), without gradient
    """
    counts = torch.tensor([len(example.sequences) for example in examples], dtype=torch.long, device=device)
    found, ends = torch.zeros(int(counts.sum()), *shape, device=device), counts.cumsum(0)
    for batch in micro_batches(examples, micro_batch_tokens, device, what):
        own = counts[batch.example_ids]
        # where an example's sequences end among all, less where they end in the micro-batch
        shift = ends[batch.example_ids] - own.cumsum(0)
        shift = shift.repeat_interleave(own, output_size=batch.num_segments)  # no wait for the device
        found[shift + torch.arange(len(shift), device=device)] = compute(batch)
    return dist.sum_over_ranks(found)  # each example was computed by one rank


def token_limit(micro_batch_tokens: int, device: torch.device) -> int:
    """Most tokens of a micro-batch; 0 stands for what suits the device."""
    return micro_batch_tokens or (8192 if device.type == "cuda" else 2048)


def pack(indices: Iterable[int], lengths: list[int], limit: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest bin it fits."""
    bins: list[list[int]] = []
    rooms: list[int] = []  # the numbers of tokens that some bin has left, sorted
    having: dict[int, list[int]] = {}  # tokens left -> heap of the bins; a list of all bins would be too long
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        slot = bisect.bisect_left(rooms, lengths[index])
        if slot == len(rooms):
            bins.append([])
            left, target = limit, len(bins) - 1
        else:
            left = rooms[slot]
            target = heapq.heappop(having[left])
            if not having[left]:
                del having[left], rooms[slot]
        bins[target].append(index)
        left -= lengths[index]
        if left not in having:
            bisect.insort(rooms, left)
            having[left] = []
        heapq.heappush(having[left], target)
    return bins


def make_micro_batch(examples: Sequence[Example], chosen: list[int], device: torch.device) -> MicroBatch:
    """Pack examples[i] for i in chosen; nothing chosen makes a dummy of one token."""
    taken = [examples[i] for i in chosen]
    ids, masks, places, owners, ends = [], [], [], [], []
    looks = []  # the places in the row that each part looks at
    length = 0
    for example in taken:
        shared, first = example.num_shared, len(ends)
        prefix = np.arange(length, length + shared)
        spans = [(i, shared, len(tokens)) for i, (tokens, _) in enumerate(example.sequences)]
        for i, start, end in [(0, 0, shared), *spans] if shared else spans:
            own = np.arange(length, length + end - start)
            looks.append(np.concatenate([prefix, own]) if start else own)
            tokens, mask = example.sequences[i]
            ids.append(tokens[start:end])
            masks.append(mask[start:end])
            places.append(np.arange(start, end))
            owners.append(np.full(end - start, first + i))
            length += end - start
            if end == len(tokens):
                ends.append(length - 1)
    if not ids:
        for parts, dtype in ((ids, np.int32), (masks, bool), (places, int), (owners, int), (looks, int)):
            parts.append(np.zeros(1, dtype))
    put = functools.partial(to_device, device=device)
    queries, keys = (put(bounds(map(len, parts)).astype(np.int32)) for parts in (ids, looks))
    attention = {"cu_seq_lens_q": queries, "cu_seq_lens_k": keys}
    attention |= {"max_length_q": max(map(len, ids)), "max_length_k": max(map(len, looks))}
    if any(len(example.sequences) > 1 for example in examples):  # and not as it falls: graphs are compiled
        attention["kv_indices"] = put(np.concatenate(looks))
    names = examples[0].fields if examples else {}
    return MicroBatch(
        tokens=put(np.concatenate(ids).astype(np.int64)),
        position_ids=put(np.concatenate(places)),
        segment_ids=put(np.concatenate(owners)),
        attention=attention,
        targets=put(np.flatnonzero(np.concatenate(masks))),
        ends=put(np.array(ends, np.int64)),
        num_segments=sum(len(example.sequences) for example in taken),
        example_ids=put(np.array(chosen, np.int64)),
        fields={name: put(stack([e.fields[name] for e in taken], like)) for name, like in names.items()},
    )


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host in the device's queue: the host does not wait for what stands before them."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def bounds(lengths: Iterable[int]) -> np.ndarray:
    """Where parts of these lengths begin, and the last one ends."""
    return np.cumsum([0, *lengths])


def stack(values: list[float | np.ndarray], like: float | np.ndarray) -> np.ndarray:
    """Values of a field in float32: (B,) of numbers, (B, L) of vectors, padded with NaN to the longest.

    Args:
        like: one of the field's values; a dummy micro-batch has none of its own to tell what they are.
    """
    if np.ndim(like) == 0:
        return np.array(values, np.float32)
    table = np.full((len(values), max(map(len, values), default=len(like))), np.nan, np.float32)
    for row, value in zip(table, values, strict=True):
        row[: len(value)] = value
    return table


def position_limit(config: Any) -> float:
    """Most tokens of a sequence that a model of this config takes, and that packing leaves alone.

    Dynamic and longrope frequencies change for all that is in a forward when its longest sequence passes the
    length they were trained for, of dynamic ones max_position_embeddings; up to there packing is no matter.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one, or one a kind of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
    return min((x for x in limits if x), default=math.inf)


def segment_sum(values: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Sum values (M,) by the segment each belongs to. -> (num_segments,)"""
    return values.new_zeros(num_segments).index_add(0, segment_ids, values)


# ------------------------------------------------------------------------------------------- packed attention


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    kv_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row, for transformers' AttentionInterface.

    Args:
        query: (1, H, N, K); key, value: (1, H_kv, N, K), H_kv divides H.
        cu_seq_lens_q, cu_seq_lens_k: (P + 1,) int32, where parts begin and the last one ends: as queries,
            and as the keys each looks at, its own the last of them.
        kv_indices: (N_kv,) the keys all parts look at, one part after the other; None: each only at itself.

    Returns:
        (1, N, H, K), and None for the attention weights.

    Raises:
        RunError: the model asks for something else than causal attention over a packed row.
    """
    if attention_mask is not None or cu_seq_lens_q is None:
        why = "does its own masking" if cu_seq_lens_q is not None else "is not told where sequences begin"
        raise dist.RunError(f"{type(module).__name__} {why}, so the model cannot take packed rows")
    extra = extras(kwargs)
    if kv_indices is not None:
        key, value = key.index_select(2, kv_indices), value.index_select(2, kv_indices)
    if _flash_kernel is not None and query.dtype != torch.float32 and not extra:
        # the kernels want (N, H, K) and one width for all, a multiple of 8
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
        window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens to the left and right
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        parts = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        out = _flash_kernel(q, k, v, *parts, scale, window)
        return out[None, ..., : value.shape[-1]], None
    parts = (cu_seq_lens_q, cu_seq_lens_k, scaling, sliding_window, extra)
    return attend_by_part(query, key, value, *parts), None


def attend_by_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    extra: dict[str, Any],
) -> Tensor:
    """`packed_attention` where no kernel serves: a part at a time, of lengths that the host knows."""
    lengths, key_lengths = (cu.diff().tolist() for cu in (cu_seq_lens_q, cu_seq_lens_k))
    parts = (query.split(lengths, 2), *(x.split(key_lengths, 2) for x in (key, value)))  # one cat in backward

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        how = {"scale": scaling, "enable_gqa": True}
        if not extra and n == m <= (sliding_window or m):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **how)
        t = torch.arange(m, device=q.device)
        back = t[m - n :, None] - t  # the queries are the last of the keys
        seen = (back >= 0) & (back < (sliding_window or m))
        if extra:
            return plain_attention(q, k, v, seen, scaling, **extra)
        return F.scaled_dot_product_attention(q, k, v, seen, **how)

    out = torch.cat([attend(*part) for part in zip(*parts, strict=True)], 2)
    return out.transpose(1, 2).contiguous()


def extras(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What attention is asked for and the kernels lack: a cap on scores (Gemma 2), sinks (gpt-oss)."""
    cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    return {"cap": cap, "sinks": sinks} if cap or sinks is not None else {}


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, cap: float | None, sinks: Any
) -> Tensor:
    """Attention as formulas, which holds n x S scores a head. (B, H, n, K), (B, H_kv, S, K) -> (B, H, n, K)

    Args:
        seen: True where a query may look, broadcast to (B, H, n, S).
        sinks: (H,) the score of a place that takes attention and gives nothing; or None.
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT).to(wide(q)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = soft_cap(scores, cap).masked_fill(~seen, -math.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    return scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Between -cap and cap, as Gemma 2 keeps its scores and logits; without a cap x itself."""
    return cap * torch.tanh(x / cap) if cap else x


def wide(x: Tensor) -> torch.dtype:
    """In which sums over x are kept: float32, or x's own type if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


# FlashAttention over packed sequences, found once when a model is loaded onto a GPU: an import inside the
# forward would break the graph of every compiled block
_flash_kernel: Callable | None = None


def find_kernel(device: torch.device) -> None:
    """Let `packed_attention` use FlashAttention on a GPU; a CPU goes on with SDPA."""
    global _flash_kernel
    if device.type == "cuda" and _flash_kernel is None:
        _flash_kernel = _find_flash_kernel()


def _find_flash_kernel() -> Callable:
    """The flash-attn package's kernel if it is installed, else torch's own."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        # before 2.13 key heads are shared without being told
        gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

        def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
            return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, **gqa)

        return kernel

    return lambda *given: flash_attn_varlen_func(
        *given[:-2], softmax_scale=given[-2], causal=True, window_size=given[-1]
    )
