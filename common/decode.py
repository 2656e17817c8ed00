"""The rows being decoded: a token for each of them a step, from their places in a static K/V cache.

A finished row goes to the next prompt, and when none waits the rows in use are compacted. Prompts are
prefilled packed, by the attention that training uses. On CUDA a step is a graph, captured once for as long as
the replica stays in memory; CLEANALIGN_CUDA_GRAPHS=0 runs it kernel by kernel.

Shapes: n rows in use, V vocabulary, D width, H heads, H_kv key heads, K head width, S cache slots of a row.
"""

import bisect
import functools
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import lt
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import dist, packed
from common.plan import cache_bytes, rows_that_fit

LEVELS = 3  # of the search through the vocabulary, see `invert`
STRIDE = {"cpu": 1, "cuda": 8}  # steps from one look of the host to the next; a look waits for the device
BUCKET = {"cpu": 32, "cuda": 256}  # the slots attended to are a multiple of this


@dataclass
class Sample:
    """One reply."""

    prompt_index: int
    sample_index: int
    prompt_tokens: list[int]
    tokens: list[int]
    """of the response, with its end token if it has one"""
    logps: list[float]
    """log p of each of `tokens` under softmax(logits / temperature), before top_k and top_p; greedy: at 1.
    A repetition penalty has changed these logits."""
    ended: bool
    """by an end token or a stop string; False: cut off at max_new_tokens"""
    text: str
    """the response decoded, without special tokens and without the stop string"""


class Settings(NamedTuple):
    """What all replies of a call have in common."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    stop: tuple[str, ...]
    seed: int
    step: int
    first_index: int
    ends: list[int]  # token ids
    max_positions: float


# -------------------------------------------------------------------------------------------------- one token


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """A token per row and its log-probability under softmax(logits / temperature). -> (n,), (n,)

    Args:
        logits: (n, V) float32.
        uniforms: (n, LEVELS) float64 in [0, 1).
    """
    logps = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        weights = logps.exp()
        tokens = invert(keep_top(weights, top_k, top_p) if top_k or top_p < 1 else weights, uniforms)
    return tokens, logps.gather(1, tokens[:, None])[:, 0]


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (n, V) after a repetition penalty on the tokens `seen`, (n, V), as transformers applies it."""
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lower, logits)


def keep_top(weights: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities (n, V) set to 0 outside the top_k, then outside the nucleus holding top_p of the rest."""
    ranked, order = torch.sort(weights, stable=True, dim=-1, descending=True)
    if top_k:
        ranked[:, top_k:] = 0
    if top_p < 1:
        mass = ranked.cumsum(-1)
        above = F.pad(mass[:, :-1], (1, 0))  # mass of the more likely tokens
        ranked = ranked.masked_fill(above >= top_p * mass[:, -1:], 0)
    return torch.zeros_like(weights).scatter(1, order, ranked)


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: find a block of blocks, a block in it, then a token. -> (n,)

    One search would depend on the rounding of V sums: with V = 50,000 in float32, one token in a thousand
    would change with the batch around it. Three searches meet 3 V^(1/3) sums: a change is ten times rarer.
    """
    n, size = weights.shape
    width = math.ceil(size ** (1 / LEVELS))
    weights = F.pad(weights, (0, width**LEVELS - size))
    rows, tokens = torch.arange(n, device=weights.device), 0
    for level in range(LEVELS):
        weights = weights.view(n, width, -1)
        cdf = weights.sum(-1, dtype=torch.float64).cumsum(-1)  # (n, width)
        block = torch.searchsorted(cdf, uniforms[:, level, None] * cdf[:, -1:], right=True)[:, 0]
        block = block.clamp(max=width - 1)
        weights, tokens = weights[rows, block], tokens * width + block
    return tokens.clamp(max=size - 1)  # nan weights find no token


# ------------------------------------------------------------------------------------------- attention, cache


def rollout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Packed attention over prompts (no mask); for one token per row, attention to the slots the mask allows.

    Args:
        query: (n, H, 1, K); key, value: (n, H_kv, S, K), H_kv divides H.
        attention_mask: (n, 1, 1, S) in query's dtype, 0 up to the token's own slot, then -inf.

    Returns:
        (n, 1, H, K), and None for the attention weights.
    """
    if attention_mask is None:
        return packed.packed_attention(
            module, query, key, value, None, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    if sliding_window is not None:
        slots = torch.arange(key.shape[2], device=key.device)
        length = (attention_mask == 0).sum(-1, keepdim=True)
        attention_mask = attention_mask.masked_fill(slots < length - sliding_window, -math.inf)
    if extra := packed.extras(kwargs):
        out = packed.plain_attention(query, key, value, attention_mask == 0, scaling, **extra)
        return out.transpose(1, 2), None
    n, heads, _, width = query.shape
    query = query.view(n, key.shape[1], -1, width)  # heads that share a key head become its query positions
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(n, 1, heads, -1), None


class Cache:
    """Keys and values of every layer, what transformers' layers call `past_key_values`."""

    def __init__(self, num_rows: int, num_slots: int):
        self.shape, self.layers = (num_rows, num_slots), {}

    def at(self, rows: Tensor, slots: Tensor, source: Tensor | None = None, width: int = 0) -> "Cache":
        """Where the next forward writes: packed prompts the tokens `source`, attending among themselves;
        otherwise one token for each of the first rows, attending to `width` slots.
        """
        self.rows, self.slots, self.source, self.width = rows, slots, source, width
        return self

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:  # zeros, since a masked value is multiplied by 0 and must be finite
            rows, slots = self.shape
            self.layers[layer] = [x.new_zeros(rows, x.shape[1], slots, x.shape[3]) for x in (key, value)]
        for kept, new in zip(self.layers[layer], (key, value), strict=True):
            new = new.transpose(1, 2).flatten(0, 1)  # (tokens, H_kv, K)
            kept[self.rows, :, self.slots] = new if self.source is None else new[self.source]
        if self.source is not None:
            return key, value
        keys, values = (kept[: len(self.rows), :, : self.width] for kept in self.layers[layer])
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return 0  # asked for by models that could count positions themselves, but are told them

    def move(self, source: Tensor, target: Tensor) -> None:
        for kept in (x for layer in self.layers.values() for x in layer):
            kept[target] = kept[source]


# ----------------------------------------------------------------------------------------------------- decode


class Batch:
    """The rows being decoded; their state stays in place, so that a step can be a CUDA graph."""

    def __init__(self, replica: Any, settings: Settings, num_rows: int, num_slots: int):
        self.replica, self.device = replica, replica.device
        zeros = functools.partial(torch.zeros, dtype=torch.long, device=self.device)
        columns = settings.max_new_tokens + 1  # finished rows go on writing after their last token
        self.last = zeros(num_rows)  # each row's newest token, not in the cache yet
        self.starts, self.counts = zeros(num_rows), zeros(num_rows)  # tokens of the prompt, of the response
        self.budgets = zeros(num_rows)  # most tokens of the response
        self.alive = zeros(num_rows, dtype=torch.bool)
        self.uniforms = zeros(num_rows, columns, LEVELS, dtype=torch.float64)
        self.tokens = zeros(num_rows, columns)
        self.logps = zeros(num_rows, columns, dtype=torch.float32)
        self.seen = None  # the tokens of each row, prompt included, where they are penalized
        if settings.repetition_penalty != 1:
            self.seen = zeros(num_rows, len(replica.model.get_output_embeddings().weight), dtype=torch.bool)
        self.state = [x for x in vars(self).values() if isinstance(x, Tensor)]
        self.ends = torch.tensor(settings.ends, device=self.device)
        self.cache = Cache(num_rows, num_slots)
        self.graphs: dict[tuple[int, int], Any] = {}
        self.use_graphs = can_capture(replica)
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.drawn = drawing_of(settings)

    def ids(self, values: Any, dtype: torch.dtype = torch.long) -> Tensor:
        """To the device, in its queue: the host does not wait for what stands before."""
        tensor = torch.as_tensor(values, dtype=dtype)
        on_gpu = self.device.type == "cuda"
        return tensor.pin_memory().to(self.device, non_blocking=True) if on_gpu else tensor

    def admit(self, samples: list[Sample], rows: list[int]) -> None:
        """Give free rows to samples: prefill their prompts, each distinct one once, draw the first tokens."""
        settings, takers = self.settings, {}
        lengths = [len(sample.prompt_tokens) for sample in samples]
        budgets = [int(min(settings.max_new_tokens, settings.max_positions - n)) for n in lengths]
        streams = np.zeros((len(rows), settings.max_new_tokens, LEVELS))
        for sample, row, budget, stream in zip(samples, rows, budgets, streams, strict=True):
            index = settings.first_index + sample.prompt_index
            address = (settings.seed, settings.step, index, sample.sample_index)
            stream[:budget] = np.random.default_rng(address).random((budget, LEVELS))
            takers.setdefault(sample.prompt_index, []).append(row)
            self.owners[row] = sample
        index = self.ids(rows)
        self.starts[index], self.budgets[index] = self.ids(lengths), self.ids(budgets)
        self.counts[index], self.alive[index] = 0, True
        if self.seen is not None:
            self.seen[index] = False
            for sample, row in zip(samples, rows, strict=True):
                self.seen[row, self.ids(sample.prompt_tokens)] = True
                self.seen[row, self.ends] = False  # a template ends each turn with one: replies would go on
        self.uniforms[index, : streams.shape[1]] = self.ids(streams, torch.float64)
        takers = list(takers.values())
        prompts = [np.array(self.owners[rows[0]].prompt_tokens) for rows in takers]
        examples = [packed.Example([(tokens, np.zeros(len(tokens), bool))], "") for tokens in prompts]
        limit = 16384 if self.device.type == "cuda" else 2048  # tokens of one forward
        for chosen in packed.pack(range(len(examples)), [len(tokens) for tokens in prompts], limit):
            self.prefill(packed.make_micro_batch(examples, chosen, self.device), [takers[i] for i in chosen])

    @functools.cached_property
    def cache_name(self) -> str:
        """What a trunk's forward calls the cache; transformers has had two names for it."""
        is_new = "cache" in inspect.signature(self.replica.trunk.forward).parameters
        return "cache" if is_new else "past_key_values"

    def prefill(self, prompts: packed.MicroBatch, takers: list[list[int]]) -> None:
        """Run packed prompts, each for the rows that take it."""
        lengths = (len(self.owners[rows[0]].prompt_tokens) for rows in takers)
        bounds = [*itertools.accumulate(lengths, initial=0)]
        spans = [(row, a, b) for rows, a, b in zip(takers, bounds, bounds[1:], strict=False) for row in rows]
        rows = self.ids(np.concatenate([np.full(b - a, row) for row, a, b in spans]))
        source = self.ids(np.concatenate([np.arange(a, b) for _, a, b in spans]))
        hidden = self.replica.trunk(
            input_ids=prompts.tokens[None],
            position_ids=prompts.position_ids[None],
            **{self.cache_name: self.cache.at(rows, prompts.position_ids[source], source)},
            use_cache=True,
            **prompts.attention,
        )[0][0]  # (N, D)
        self.emit(self.ids([row for row, _, _ in spans]), hidden[self.ids([b - 1 for _, _, b in spans])])

    def forward(self, width: int) -> None:
        """One token for every row."""
        n = len(self.owners)
        slots = self.starts[:n] + self.counts[:n] - 1  # of the newest tokens
        rows, columns = (torch.arange(size, device=self.device) for size in (n, width))
        # added to scores: a mask of booleans would be turned into this one in every layer
        mask = torch.zeros(n, width, dtype=self.replica.model.dtype, device=self.device)
        mask = mask.masked_fill_(columns > slots[:, None], -math.inf)
        hidden = self.replica.trunk(
            input_ids=self.last[:n, None],
            position_ids=slots[:, None],
            attention_mask=mask[:, None, None],
            **{self.cache_name: self.cache.at(rows, slots, width=width)},
            use_cache=True,
        )[0][:, 0]  # (n, D)
        self.emit(rows, hidden)

    def emit(self, rows: Tensor, hidden: Tensor) -> None:
        """Draw the next token of `rows`; a row that has finished stands still."""
        s, counts, alive = self.settings, self.counts[rows], self.alive[rows]
        logits, uniforms = self.replica.logits(hidden), self.uniforms[rows, counts]
        if self.seen is not None:
            logits = penalize(logits, self.seen[rows], s.repetition_penalty)
        tokens, logps = draw(logits, uniforms, s.temperature, s.top_k, s.top_p)
        if self.seen is not None:
            self.seen[rows, tokens] = True
        self.tokens[rows, counts], self.logps[rows, counts], self.last[rows] = tokens, logps, tokens
        counts = counts + alive
        ended = (tokens[:, None] == self.ends).any(-1) | (counts >= self.budgets[rows])
        self.counts[rows], self.alive[rows] = counts, alive & ~ended

    def step(self, width: int) -> None:
        """`forward` for slots below `width`; on CUDA recorded the first time, and then replayed."""
        key = (len(self.owners), width)
        if not self.use_graphs:
            self.forward(width)
        elif key in self.graphs:
            self.graphs[key].replay()
        else:
            self.graphs[key] = self.capture(width)

    def capture(self, width: int) -> Any:
        """Run `forward` once, which readies its kernels, then record it. -> the graph"""
        pool = next((graph.pool() for graph in self.graphs.values()), None)
        graph, side = torch.cuda.CUDAGraph(), self.side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.forward(width)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=pool, stream=side):
            self.forward(width)
        return graph

    def compact(self, n: int) -> None:
        """Move the rows in use to the front n."""
        source = [row for row in range(n, len(self.owners)) if self.owners[row]]
        target = [row for row in range(n) if not self.owners[row]][: len(source)]
        for a, b in zip(source, target, strict=True):
            self.owners[b] = self.owners[a]
        del self.owners[n:]
        a, b = self.ids(source), self.ids(target)
        for tensor in self.state:
            tensor[b] = tensor[a]
        self.cache.move(a, b)


def drawing_of(settings: Settings) -> tuple:
    """How tokens are drawn, which is part of the graphs of a batch."""
    return settings.temperature, settings.top_k, settings.top_p, settings.repetition_penalty, settings.ends


def can_capture(replica: Any) -> bool:
    """Whether a step of this model can be a CUDA graph."""
    rope = getattr(replica.config, "rope_parameters", None) or {}
    return (
        replica.device.type == "cuda"
        and os.environ.get("CLEANALIGN_CUDA_GRAPHS") != "0"
        and getattr(replica.model, "_can_compile_fullgraph", False)
        and rope.get("rope_type") not in ("dynamic", "longrope")  # they look at positions from the host
    )


def make_batch(replica: Any, settings: Settings, num_rows: int, num_slots: int) -> Batch:
    """Empty rows for a call, on CUDA fewer than num_rows if memory is short.

    They are those of the call before, with its graphs, if they are enough and it drew alike.
    """
    old, sizes = replica.batch, (num_rows, num_slots, settings.max_new_tokens)
    if old is None or old.drawn != drawing_of(settings) or any(map(lt, old.sizes, sizes)):
        old = replica.batch = None  # its memory is free for the next
        most = rows_in_memory(replica, num_slots) if replica.device.type == "cuda" else num_rows
        old = Batch(replica, settings, min(num_rows, most), num_slots)
        old.sizes = sizes
        replica.batch = old if old.use_graphs else None
    old.settings, old.owners = settings, [None] * len(old.last)
    old.alive.zero_(), old.counts.zero_()
    return old


def decode(
    replica: Any,
    tokenizer: Any,
    samples: list[Sample],
    settings: Settings,
    max_batch: int,
    stream: Callable[[Sample], None] | None,
) -> Iterator[list[Sample]]:
    """Fill in the samples, which come longest prompt first, and yield those that ended, look by look.

    No collectives.
    """
    kind = replica.device.type
    stride, bucket = STRIDE[kind], BUCKET[kind]
    num_slots = int(min(len(samples[0].prompt_tokens) + settings.max_new_tokens, settings.max_positions))
    num_rows = min(len(samples), max_batch or (256 if kind == "cuda" else 64))
    batch, waiting = make_batch(replica, settings, num_rows, num_slots), samples[::-1]
    while True:
        n = len(batch.owners)
        alive, counts = torch.stack([batch.alive[:n].long(), batch.counts[:n]]).tolist()
        used = [row for row in range(n) if batch.owners[row]]
        look = used if settings.stop or stream else [row for row in used if not alive[row]]
        done: list[Sample] = []
        if look:
            index = batch.ids(look)
            # one copy, in numbers that hold both
            tokens, logps = torch.stack([batch.tokens[index].double(), batch.logps[index].double()]).cpu()
            for row, a, b in zip(look, tokens.long().tolist(), logps.tolist(), strict=True):
                sample = batch.owners[row]
                sample.tokens, sample.logps = a[: counts[row]], b[: counts[row]]
                finish(sample, tokenizer, settings)
                if stream:
                    stream(sample)
                if sample.ended or not alive[row]:
                    batch.owners[row] = None
                    done.append(sample)
        yield done
        used = [row for row in range(n) if batch.owners[row]]
        free = [row for row in range(n) if not batch.owners[row]]
        if waiting and len(free) >= min(len(waiting), max(1, n // 16)):  # a prefill costs about a step
            taken = free[: len(waiting)]
            batch.admit([waiting.pop() for _ in taken], taken)
            continue  # a first token may already end its reply
        if not used:
            return
        top = max(len(batch.owners[row].prompt_tokens) + counts[row] for row in used) + stride - 1
        if not waiting and 2 * len(used) <= n:
            batch.compact(n - n // 2)
        for _ in range(stride):
            batch.step(min(batch.cache.shape[1], -(-top // bucket) * bucket))


def finish(sample: Sample, tokenizer: Any, settings: Settings) -> None:
    """Cut a sample after the token that completes a stop string; set its text and whether it ended."""

    def has_stop(count: int) -> bool:
        text = tokenizer.decode(sample.tokens[:count])  # with special tokens: one may be the stop string
        return any(string in text for string in settings.stop)

    count = len(sample.tokens)
    stopped = bool(settings.stop) and has_stop(count)
    if stopped:
        count = bisect.bisect_left(range(count), True, key=has_stop)
        sample.tokens, sample.logps = sample.tokens[:count], sample.logps[:count]
    sample.text = tokenizer.decode(sample.tokens, skip_special_tokens=True)
    for string in settings.stop if stopped else ():
        sample.text = sample.text.partition(string)[0]
    sample.ended = stopped or sample.tokens[-1] in settings.ends


def rows_in_memory(replica: Any, num_slots: int) -> int:
    """How many rows fit into the free GPU memory, a fifth of it left to activations."""
    row = cache_bytes(replica.config, num_slots, replica.model.dtype.itemsize)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(replica.device)
    if not (num_rows := rows_that_fit(free, row)):
        raise dist.RunError(
            f"{num_slots} tokens of cache need {row / 2**30:.1f} GiB, {free / 2**30:.1f} are free; lower "
            "max_new_tokens or max_prompt_length"
        )
    return num_rows
