"""Sampling: every rollout and every logged generation comes from `generate`.

The sharded policy is gathered once per call into a plain replica, so that each rank decodes its share of the
prompts without collectives, as decode.py does it. To talk with a model: chat.py.
"""

import contextlib
import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import data, dist, files, loading, lora, models, packed
from common.decode import Batch, Sample, Settings, decode, rollout_attention
from common.lm_head import float32_logits


def generate(
    policy: models.Policy,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int = 1,
    max_batch: int = 0,
    stream: Callable[[Sample], None] | None = None,
    keep: Path | None = None,
    **settings: Any,
) -> list[Sample]:
    """Replies of a policy made by `models.load`: all of them on every rank, ordered by prompt and sample.

    A collective: every rank passes the same prompts. A sample is a function of the weights, its prompt and
    (seed, step, prompt index, sample index); ranks, max_batch and the other prompts only change rounding.
    The model's generation_config adds its end tokens and nothing else.

    Args:
        prompts: token lists; a reply also ends where the model's positions do.
        max_batch: most rows decoded together on a rank, 0: 64 on CPU, 256 on GPU; speed and memory only.
        stream: called with each reply of this rank as it grows.
        keep: a folder, of these weights only, for replies: stopped or killed, the same call goes on from
            them, on any number of ranks, and one with more max_new_tokens from those that have ended. They
            come without logps.
        settings: fields of `decode.Settings`: max_new_tokens, temperature, ...

    Raises:
        RunError: a setting out of range, an empty prompt, one too long for the model, or too little memory.
        Stopped: with keep, a stop was asked for.
    """
    ends = getattr(policy.generation_config, "eos_token_id", None)
    ends = {data.end_token(tokenizer), *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
    limit = packed.position_limit(policy.config)
    settings = Settings(**settings, ends=sorted(ends), max_positions=limit)
    if isinstance(settings.stop, str):
        settings = settings._replace(stop=[settings.stop])
    check(settings, samples_per_prompt, prompts)
    samples = [
        Sample(i, k, [*map(int, tokens)], [], [], False, "")
        for i, tokens in enumerate(prompts)
        for k in range(samples_per_prompt)
    ]
    if keep:
        call = repr(settings._replace(max_new_tokens=0))  # with more of them, what has ended stays the same
        journal = files.Journal(keep / hashlib.sha256(call.encode()).hexdigest()[:16])
        for sample in samples:
            found = journal.records.get(key_of(sample), {"tokens": [], "ended": False})
            room = min(settings.max_new_tokens, limit - len(sample.prompt_tokens)) - len(found["tokens"])
            vars(sample).update(found if room == 0 or (found["ended"] and room > 0) else {})
    known, wanted = ([s for s in samples if bool(s.tokens) == is_known] for is_known in (True, False))
    groups = [[*group] for _, group in itertools.groupby(wanted, key=lambda s: s.prompt_index)]
    costs = [len(group[0].prompt_tokens) + settings.max_new_tokens for group in groups]
    shares = dist.shares(costs, dist.world_size())  # longest prompts first
    mine = [sample for place in shares[dist.rank()] for sample in groups[place]]
    with rollout(policy) as replica, torch.no_grad():
        looks = decode(replica, tokenizer, mine, settings, max_batch, stream) if mine else iter(())
        looks = dist.progress(looks, "replies", len(mine), len)
        for ended in dist.in_step(looks) if keep else looks:
            for s in ended if keep else ():
                s.logps = []
                reply = {"tokens": s.tokens, "ended": s.ended, "text": s.text}
                journal.add(key_of(s), reply)
    return sorted(known + dist.gather(mine), key=lambda s: (s.prompt_index, s.sample_index))


def key_of(sample: Sample) -> str:
    """What a kept reply is known by."""
    digest = hashlib.sha256(repr(sample.prompt_tokens).encode()).hexdigest()[:16]
    return f"{sample.prompt_index} {sample.sample_index} {digest}"


def check(settings: Settings, samples_per_prompt: int, prompts: Sequence[Sequence[int]]) -> None:
    for name, value, good, expected in (
        ("temperature", settings.temperature, settings.temperature >= 0, "0 (greedy) or more"),
        ("max_new_tokens", settings.max_new_tokens, settings.max_new_tokens >= 1, "1 or more"),
        ("samples_per_prompt", samples_per_prompt, samples_per_prompt >= 1, "1 or more"),
        ("top_k", settings.top_k, settings.top_k >= 0, "0 (off) or more"),
        ("top_p", settings.top_p, 0 < settings.top_p <= 1, "more than 0 and at most 1 (off)"),
        ("repetition_penalty", settings.repetition_penalty, settings.repetition_penalty > 0, "more than 0"),
        ("stop", settings.stop, all(settings.stop), "strings that are not empty"),
    ):
        if not good:
            raise dist.RunError(f"{name} is {value}; expected {expected}")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < settings.max_positions:
            most = settings.max_positions - 1
            raise dist.RunError(f"prompt {i} has {len(prompt)} tokens; this model takes 1 to {most}")


def to_example(sample: Sample) -> packed.Example:
    """Prompt and response as one sequence, the mask on the response; its log-probs and end as fields."""
    tokens = np.array(sample.prompt_tokens + sample.tokens, np.int32)
    sequence = (tokens, np.arange(len(tokens)) >= len(sample.prompt_tokens))
    fields = {"sampler_logps": np.array(sample.logps, np.float32), "ended": float(sample.ended)}
    return packed.Example([sequence], prompt="", fields=fields)


def sampled_logps(samples: Sequence[Sample], batch: packed.MicroBatch) -> Tensor:
    """The sampler's log-probabilities of a micro-batch packed from these samples. -> (N_targets,)"""
    logps = [logp for i in batch.example_ids.tolist() for logp in samples[i].logps]
    return torch.tensor(logps, dtype=torch.float32, device=batch.tokens.device)


# ---------------------------------------------------------------------------------------------------- replica


class Replica:
    """The policy's weights, whole, in a plain module of the compute dtype; no storage between rollouts.

    LoRA adapters stay beside the base, as in training: folded into bfloat16 weights a small change would
    round away. Those of experts peft itself folds into weights of the compute dtype, in each forward; here
    that is done once, with the same numbers, where the memory has room. The rest of the frozen base is the
    policy's own memory wherever a rank holds all of it.
    """

    def __init__(self, policy: models.Policy):
        from peft import inject_adapter_in_model
        from transformers import AttentionInterface, AutoModelForCausalLM

        config = copy.deepcopy(policy.config)  # from_config keeps the object it is given
        self.config, self.device = config, next(policy.parameters()).device
        AttentionInterface.register("rollout", rollout_attention)
        how = {"attn_implementation": "rollout", "dtype": policy.compute_dtype}
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **how)
            if policy.lora_config is not None:
                inject_adapter_in_model(policy.lora_config, self.model)
        self.model.to(policy.compute_dtype)  # peft makes float32 adapters
        self.model.to_empty(device=self.device).requires_grad_(False).eval()
        self.model.tie_weights()  # to_empty made two of each shared parameter
        if self.device.type == "cuda" and policy.compute_dtype != torch.float32:
            loading.fuse_norms(self.model)
        self.trunk = getattr(self.model, self.model.base_model_prefix)
        self.logit_scale, self.cap = policy.logit_scale, policy.head.cap
        buffers = dict(policy.model.named_buffers())
        for name, buffer in self.model.named_buffers():  # rotary frequencies are in no state dict
            buffer.copy_(buffers[name])
        # frozen weights have the compute dtype already: those that are whole here are shared, not copied
        parameters = policy.model.named_parameters(remove_duplicate=False)  # tied weights have two names
        self.shared = {name for name, p in parameters if not p.requires_grad}
        self.experts = [m for _, m in lora.layers(self.model) if hasattr(m, "parameter_name")]
        if policy.compute_dtype.itemsize * lora.num_folded(self.model) > policy.room:
            self.experts = []
        own = {id(layer.get_param()) for layer in self.experts}
        self.shared -= {name for name, p in self.model.named_parameters() if id(p) in own}
        self.sizes: dict[nn.Parameter, int] = {}
        self.awake = self.in_use = False
        self.batch: Batch | None = None  # the last one, whose graphs read these weights where they are

    @torch.no_grad()
    def fill(self, policy: models.Policy) -> None:
        """Copy the policy's weights in, or point to them. A collective."""
        for parameter, size in self.sizes.items() if not self.awake else ():
            parameter.untyped_storage().resize_(size)
        weights = self.model.state_dict()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        state = policy.model.state_dict()  # also reshards what a forward has left gathered
        assert state.keys() == weights.keys(), f"left empty: {sorted(weights.keys() - state.keys())}"
        for name, tensor in state.items():
            if self.awake and name in self.shared:
                continue  # frozen, and there
            whole = models.whole_tensor(tensor)
            if name in self.shared and whole.dtype == weights[name].dtype:
                parameters[name].data = whole
            else:
                weights[name].copy_(whole)
        for layer in self.experts:
            lora.fold(layer)
        own = (p for name, p in parameters.items() if name not in self.shared)
        self.sizes = {p: p.untyped_storage().nbytes() for p in own}
        self.awake = True

    def rest(self, room: float) -> None:
        """Stay in memory, with the graphs of the last batch, if all takes at most `room` bytes."""
        caches = self.batch.cache.layers.values() if self.batch else ()
        held = sum(x.nbytes for x in itertools.chain(self.model.parameters(), *caches))
        if held > room or self.batch is None:
            self.sleep()

    def sleep(self) -> None:
        self.batch = None
        for parameter in self.sizes:
            parameter.untyped_storage().resize_(0)
        for name, parameter in self.model.named_parameters():
            if name in self.shared:
                parameter.data = parameter.data.new_empty(0)
        self.awake = False

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) float32 of hidden states (n, D)."""
        head = self.model.get_output_embeddings()
        return float32_logits(hidden, head.weight, head.bias, cap=self.cap) * self.logit_scale


@contextlib.contextmanager
def rollout(policy: models.Policy) -> Iterator[Replica]:
    """Within the block the replica stays filled: for several `generate` calls, no optimizer step between."""
    outermost = policy.replica is None or not policy.replica.in_use
    if outermost:
        try:
            policy.replica = policy.replica or Replica(policy)
            policy.replica.fill(policy)
            policy.replica.in_use = True
        except torch.OutOfMemoryError as error:
            billions = sum(p.numel() for p in policy.parameters()) / 1e9
            raise dist.RunError(
                f"no memory for generation, which puts {billions:.1f}B weights beside the training state; "
                "lora_rank makes that smaller, num_samples 0 does without samples to look at"
            ) from error
    try:
        yield policy.replica
    finally:
        if outermost:
            policy.replica.in_use = False
            policy.replica.rest(policy.room)
