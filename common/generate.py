"""Sampling: every rollout and every logged generation comes from `generate`.

The sharded policy is gathered once per call into a plain replica, so that each rank decodes its share of the
prompts without collectives. A batch has one row per reply, and each row its own position in a static K/V
cache: a finished row goes to the next prompt, and when none waits the rows in use are compacted. Prompts are
prefilled packed, by the attention that training uses. To talk with a model: chat.py.

Shapes: n rows in use, V vocabulary, D width, H heads, H_kv key heads, K head width, S cache slots of a row.
"""

import bisect
import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import data, dist, models, packed

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
    """log p of each of `tokens` under softmax(logits / temperature), before top_k and top_p; greedy: at 1"""
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
    stop: tuple[str, ...]
    seed: int
    step: int
    first_index: int
    ends: list[int]  # token ids
    max_positions: float


def generate(
    policy: models.Policy,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples_per_prompt: int = 1,
    stop: Sequence[str] = (),
    seed: int = 1,
    step: int = 0,
    first_index: int = 0,
    max_batch: int = 0,
    stream: Callable[[Sample], None] | None = None,
) -> list[Sample]:
    """Replies of a policy made by `models.load`: all of them on every rank, ordered by prompt and sample.

    A collective: every rank passes the same prompts. A sample is a function of the weights, its prompt and
    (seed, step, prompt index, sample index); ranks, max_batch and the other prompts only change rounding.
    The model's generation_config adds its end tokens and nothing else.

    Args:
        prompts: token lists; a reply also ends where the model's positions do.
        temperature: 0 takes the most likely token.
        top_k, top_p: draw from the top_k likeliest tokens; of these, the fewest that hold top_p of the mass.
        stop: strings that end a reply, which is cut after the token completing one.
        first_index: the first prompt's place in a longer list, of which these are a part; in the seeds only.
        max_batch: most rows decoded together on a rank, 0: 64 on CPU, 256 on GPU; speed and memory only.
        stream: called with each reply of this rank as it grows.

    Raises:
        RunError: a setting out of range, an empty prompt, one too long for the model, or too little memory.
    """
    ends = getattr(policy.generation_config, "eos_token_id", None)
    ends = {data.end_token(tokenizer), *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
    limit = packed.position_limit(policy.config)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    settings = Settings(
        max_new_tokens, temperature, top_k, top_p, stop, seed, step, first_index, sorted(ends), limit
    )
    check(settings, samples_per_prompt, prompts)
    costs = [len(prompt) + max_new_tokens for prompt in prompts]
    mine = dist.shares(costs, dist.world_size())[dist.rank()]  # longest prompts first
    samples = [
        Sample(i, k, [*map(int, prompts[i])], [], [], False, "")
        for i in mine
        for k in range(samples_per_prompt)
    ]
    with rollout(policy) as replica, torch.no_grad():
        if samples:
            decode(replica, tokenizer, samples, settings, max_batch, stream)
    return sorted(dist.gather(samples), key=lambda s: (s.prompt_index, s.sample_index))


def check(settings: Settings, samples_per_prompt: int, prompts: Sequence[Sequence[int]]) -> None:
    for name, value, good, expected in (
        ("temperature", settings.temperature, settings.temperature >= 0, "0 (greedy) or more"),
        ("max_new_tokens", settings.max_new_tokens, settings.max_new_tokens >= 1, "1 or more"),
        ("samples_per_prompt", samples_per_prompt, samples_per_prompt >= 1, "1 or more"),
        ("top_k", settings.top_k, settings.top_k >= 0, "0 (off) or more"),
        ("top_p", settings.top_p, 0 < settings.top_p <= 1, "more than 0 and at most 1 (off)"),
        ("stop", settings.stop, all(settings.stop), "strings that are not empty"),
    ):
        if not good:
            raise dist.RunError(f"{name} is {value}; expected {expected}")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < settings.max_positions:
            most = settings.max_positions - 1
            raise dist.RunError(f"prompt {i} has {len(prompt)} tokens; this model takes 1 to {most}")


def to_example(sample: Sample) -> packed.Example:
    """Prompt and response as one sequence for `packed.micro_batches`, the mask on the response."""
    tokens = np.array(sample.prompt_tokens + sample.tokens, np.int32)
    return packed.Example([(tokens, np.arange(len(tokens)) >= len(sample.prompt_tokens))], prompt="")


def sampled_logps(samples: Sequence[Sample], batch: packed.MicroBatch) -> Tensor:
    """The sampler's log-probabilities of a micro-batch packed from these samples. -> (N_targets,)"""
    logps = [logp for i in batch.example_ids.tolist() for logp in samples[i].logps]
    return torch.tensor(logps, dtype=torch.float32, device=batch.tokens.device)


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


# ---------------------------------------------------------------------------------------------------- replica


class Replica:
    """The policy's weights, whole, in a plain module of the compute dtype; no storage between rollouts.

    LoRA adapters stay beside the base, as in training: folded into bfloat16 weights a small change would
    round away. The frozen base is the policy's own memory wherever a rank holds all of it.
    """

    def __init__(self, policy: models.Policy):
        from peft import inject_adapter_in_model
        from transformers import AttentionInterface, AutoModelForCausalLM

        config = copy.deepcopy(policy.config)  # from_config keeps the object it is given
        self.config, self.device = config, next(policy.parameters()).device
        AttentionInterface.register("rollout", rollout_attention)
        how = {"attn_implementation": "rollout", "dtype": policy.compute_dtype}
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, **how)
            if policy.lora_config is not None:
                inject_adapter_in_model(policy.lora_config, self.model)
        self.model.to(policy.compute_dtype)  # peft makes float32 adapters
        self.model.to_empty(device=self.device).requires_grad_(False).eval()
        self.model.tie_weights()  # to_empty made two of each shared parameter
        if self.device.type == "cuda" and policy.compute_dtype != torch.float32:
            packed.fuse_norms(self.model)
        self.trunk = getattr(self.model, self.model.base_model_prefix)
        self.logit_scale, self.cap = policy.logit_scale, policy.head.cap
        buffers = dict(policy.model.named_buffers())
        for name, buffer in self.model.named_buffers():  # rotary frequencies are in no state dict
            buffer.copy_(buffers[name])
        # frozen weights have the compute dtype already: those that are whole here are shared, not copied
        parameters = policy.model.named_parameters(remove_duplicate=False)  # tied weights have two names
        self.shared = {name for name, p in parameters if not p.requires_grad}
        self.sizes: dict[nn.Parameter, int] = {}
        self.awake = False

    @torch.no_grad()
    def fill(self, policy: models.Policy) -> None:
        """Copy the policy's weights in, or point to them. A collective."""
        for parameter, size in self.sizes.items():
            parameter.untyped_storage().resize_(size)
        weights = self.model.state_dict()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        state = policy.model.state_dict()  # also reshards what a forward has left gathered
        assert state.keys() == weights.keys(), f"left empty: {sorted(weights.keys() - state.keys())}"
        for name, tensor in state.items():
            whole = models.whole_tensor(tensor)
            if name in self.shared and whole.dtype == weights[name].dtype:
                parameters[name].data = whole
            else:
                weights[name].copy_(whole)
        own = (p for name, p in parameters.items() if name not in self.shared)
        self.sizes = {p: p.untyped_storage().nbytes() for p in own}
        self.awake = True

    def sleep(self) -> None:
        for parameter in self.sizes:
            parameter.untyped_storage().resize_(0)
        for name, parameter in self.model.named_parameters():
            if name in self.shared:
                parameter.data = parameter.data.new_empty(0)
        self.awake = False

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) float32 of hidden states (n, D)."""
        head = self.model.get_output_embeddings()
        return packed.float32_logits(hidden, head.weight, head.bias, cap=self.cap) * self.logit_scale


@contextlib.contextmanager
def rollout(policy: models.Policy) -> Iterator[Replica]:
    """Within the block the replica stays filled: for several `generate` calls, no optimizer step between."""
    outermost = policy.replica is None or not policy.replica.awake
    if outermost:
        try:
            policy.replica = policy.replica or Replica(policy)
            policy.replica.fill(policy)
        except torch.OutOfMemoryError as error:
            billions = sum(p.numel() for p in policy.parameters()) / 1e9
            raise dist.RunError(
                f"no memory for generation, which puts all {billions:.1f}B weights beside the training state"
            ) from error
    try:
        yield policy.replica
    finally:
        if outermost:
            policy.replica.sleep()


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

    def __init__(self, replica: Replica, settings: Settings, num_rows: int, num_slots: int):
        self.replica, self.settings, self.device = replica, settings, replica.device
        zeros = functools.partial(torch.zeros, dtype=torch.long, device=self.device)
        columns = settings.max_new_tokens + 1  # finished rows go on writing after their last token
        self.last = zeros(num_rows)  # each row's newest token, not in the cache yet
        self.starts, self.counts = zeros(num_rows), zeros(num_rows)  # tokens of the prompt, of the response
        self.budgets = zeros(num_rows)  # most tokens of the response
        self.alive = zeros(num_rows, dtype=torch.bool)
        self.uniforms = zeros(num_rows, columns, LEVELS, dtype=torch.float64)
        self.tokens = zeros(num_rows, columns)
        self.logps = zeros(num_rows, columns, dtype=torch.float32)
        self.state = [x for x in vars(self).values() if isinstance(x, Tensor)]
        self.ends = torch.tensor(settings.ends, device=self.device)
        self.owners: list[Sample | None] = [None] * num_rows
        self.cache = Cache(num_rows, num_slots)
        self.graphs: dict[tuple[int, int], Any] = {}
        rope = getattr(replica.config, "rope_parameters", None) or {}
        self.use_graphs = (
            self.device.type == "cuda"
            and getattr(replica.model, "_can_compile_fullgraph", False)
            and rope.get("rope_type") not in ("dynamic", "longrope")  # they look at positions from the host
        )
        self.side = torch.cuda.Stream(self.device) if self.use_graphs else None

    def ids(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.long).to(self.device)

    def admit(self, samples: list[Sample], rows: list[int]) -> None:
        """Give free rows to samples: prefill their prompts, each distinct one once, draw the first tokens."""
        settings, takers = self.settings, {}
        lengths = [len(sample.prompt_tokens) for sample in samples]
        budgets = [int(min(settings.max_new_tokens, settings.max_positions - n)) for n in lengths]
        streams = np.zeros((len(rows), *self.uniforms.shape[1:]))
        for sample, row, budget, stream in zip(samples, rows, budgets, streams, strict=True):
            index = settings.first_index + sample.prompt_index
            address = (settings.seed, settings.step, index, sample.sample_index)
            stream[:budget] = np.random.default_rng(address).random((budget, LEVELS))
            takers.setdefault(sample.prompt_index, []).append(row)
            self.owners[row] = sample
        index = self.ids(rows)
        self.starts[index], self.budgets[index] = self.ids(lengths), self.ids(budgets)
        self.counts[index], self.alive[index] = 0, True
        self.uniforms[index] = torch.from_numpy(streams).to(self.device)
        takers = list(takers.values())
        prompts = [np.array(self.owners[rows[0]].prompt_tokens) for rows in takers]
        examples = [packed.Example([(tokens, np.zeros(len(tokens), bool))], "") for tokens in prompts]
        limit = 16384 if self.device.type == "cuda" else 2048  # tokens of one forward
        for chosen in packed.pack(range(len(examples)), [len(tokens) for tokens in prompts], limit):
            self.prefill(packed.make_micro_batch(examples, chosen, self.device), [takers[i] for i in chosen])

    def prefill(self, prompts: packed.MicroBatch, takers: list[list[int]]) -> None:
        """Run packed prompts, each for the rows that take it."""
        bounds = prompts.cu_seqlens.tolist()
        spans = [(row, a, b) for rows, a, b in zip(takers, bounds, bounds[1:], strict=False) for row in rows]
        rows = self.ids(np.concatenate([np.full(b - a, row) for row, a, b in spans]))
        source = self.ids(np.concatenate([np.arange(a, b) for _, a, b in spans]))
        hidden = self.replica.trunk(
            input_ids=prompts.tokens[None],
            position_ids=prompts.position_ids[None],
            past_key_values=self.cache.at(rows, prompts.position_ids[source], source),
            use_cache=True,
            cu_seq_lens_q=prompts.cu_seqlens,
            cu_seq_lens_k=prompts.cu_seqlens,
            max_length_q=prompts.max_seqlen,
            max_length_k=prompts.max_seqlen,
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
            past_key_values=self.cache.at(rows, slots, width=width),
            use_cache=True,
        )[0][:, 0]  # (n, D)
        self.emit(rows, hidden)

    def emit(self, rows: Tensor, hidden: Tensor) -> None:
        """Draw the next token of `rows`; a row that has finished stands still."""
        s, counts, alive = self.settings, self.counts[rows], self.alive[rows]
        logits, uniforms = self.replica.logits(hidden), self.uniforms[rows, counts]
        tokens, logps = draw(logits, uniforms, s.temperature, s.top_k, s.top_p)
        self.tokens[rows, counts], self.logps[rows, counts], self.last[rows] = tokens, logps, tokens
        counts = counts + alive
        ended = (tokens[:, None] == self.ends).any(-1) | (counts >= self.budgets[rows])
        self.counts[rows], self.alive[rows] = counts, alive & ~ended

    def step(self, width: int) -> None:
        """`forward` for slots below `width`; on CUDA run once, then captured, then replayed."""
        if not self.use_graphs:
            return self.forward(width)
        key = (len(self.owners), width)
        if key not in self.graphs:
            self.graphs[key] = None
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.forward(width)
            return torch.cuda.current_stream().wait_stream(self.side)
        if self.graphs[key] is None:
            pool = next((graph.pool() for graph in self.graphs.values() if graph), None)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self.side):
                self.forward(width)  # recorded, not run
            self.graphs[key] = graph
        return self.graphs[key].replay()

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


def decode(
    replica: Replica,
    tokenizer: Any,
    samples: list[Sample],
    settings: Settings,
    max_batch: int,
    stream: Callable[[Sample], None] | None,
) -> None:
    """Fill in the samples, which come longest prompt first; no collectives."""
    kind = replica.device.type
    stride, bucket = STRIDE[kind], BUCKET[kind]
    num_slots = int(min(len(samples[0].prompt_tokens) + settings.max_new_tokens, settings.max_positions))
    num_rows = min(len(samples), max_batch or (256 if kind == "cuda" else 64))
    if kind == "cuda":
        num_rows = min(num_rows, rows_in_memory(replica, num_slots))
    batch, waiting = Batch(replica, settings, num_rows, num_slots), samples[::-1]
    while True:
        n = len(batch.owners)
        alive, counts = torch.stack([batch.alive[:n].long(), batch.counts[:n]]).tolist()
        used = [row for row in range(n) if batch.owners[row]]
        look = used if settings.stop or stream else [row for row in used if not alive[row]]
        if look:
            index = batch.ids(look)
            found = zip(look, batch.tokens[index].tolist(), batch.logps[index].tolist(), strict=True)
            for row, tokens, logps in found:
                sample = batch.owners[row]
                sample.tokens, sample.logps = tokens[: counts[row]], logps[: counts[row]]
                finish(sample, tokenizer, settings)
                if stream:
                    stream(sample)
                if sample.ended or not alive[row]:
                    batch.owners[row] = None
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
            batch.step(min(num_slots, -(-top // bucket) * bucket))


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


def rows_in_memory(replica: Replica, num_slots: int) -> int:
    """How many rows fit into the free GPU memory, a fifth of it left to activations."""
    config = replica.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * width * replica.model.dtype.itemsize * num_slots
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(replica.device)
    if 0.8 * free < row:
        raise dist.RunError(
            f"{num_slots} tokens of cache need {row / 2**30:.1f} GiB, {free / 2**30:.1f} are free; lower "
            "max_new_tokens or max_prompt_length"
        )
    return int(0.8 * free // row)
