"""Rewards of replies: reward models and functions, several of them added up.

A function is any importable package.module:function, (prompts, replies, records) -> one number a reply, or
one that takes what TRL's take. A reward model reads the decoded text under its own template and tokenizer.
"""

import contextlib
import gc
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import data, dist, formats, models, templates
from common.args import Inference, System, load_function, what_happened
from common.packed import Example, Tokens


class Rater(NamedTuple):
    """A reward model or one of attributes, its own tokenizer, and the names of its outputs."""

    model: nn.Module
    tokenizer: Any
    names: list[str]

    def __call__(self, replies: list[Tokens], micro_batch_tokens: int, device: torch.device) -> Tensor:
        """Attribute values of encoded replies, on the scale of the labels; a collective. -> (replies, A)"""
        examples = [Example([reply], "") for reply in replies]
        return models.score(self.model, examples, micro_batch_tokens, device, centred=False)

    def judge(
        self, exchanges: list[tuple[formats.Messages, str]], micro_batch_tokens: int, device: torch.device
    ) -> list[dict[str, float]]:
        """Attribute values of replies by name, each after its prompt without the label lines in it."""
        replies = []
        for prompt, text in exchanges:
            turns = [{name: x for name, x in turn.items() if name != "label"} for turn in prompt]
            reply = [{"role": "assistant", "content": text}]
            replies.append(data.encode_response(self.tokenizer, turns, reply))
        outputs = self(replies, micro_batch_tokens, device)
        return [dict(zip(self.names, output, strict=True)) for output in outputs.tolist()]


def load_rater(path: str, device: torch.device, system: System | Inference) -> Rater:
    """A model with a linear head, read where it was trained."""
    gc.collect()  # FSDP's modules refer to themselves: what came before is freed here, not by counting
    model = models.load_scorer(path, device, system, trainable=False)
    tokenizer = data.load_tokenizer(path)
    read_where_trained(model, tokenizer)
    return Rater(model, tokenizer, models.output_names(model))


class Reward(NamedTuple):
    """A function, or a reward model, which is a rater of one output."""

    weight: float
    name: str
    function: Callable | None
    rater: Rater | None


def load(spec: str, device: torch.device, system: System, option: str = "reward") -> list[Reward]:
    """The rewards that an option, as a,b*0.5, asks for, of reward models and functions.

    Raises:
        RunError: none is named, there is no such model or function, or a model has several outputs.
    """
    if not spec:
        raise dist.RunError("reward is not set: a reward model's folder, or package.module:function")
    rewards = []
    for source, weight in formats.read_sources(spec, option):
        function, rater = (load_function(source) if ":" in source else None), None
        if inspect.iscoroutinefunction(function):
            raise formats.wrong(f"reward {source}", f"an async function{place_of(function)}", "a plain one")
        if function is None:
            with formats.told_as(option):
                rater = load_rater(source, device, system)
            if len(rater.names) > 1:
                raise formats.wrong(f"{option} {source}", f"outputs {', '.join(rater.names)}", "one output")
        rewards.append(Reward(weight, source, function, rater))
    return rewards


def read_where_trained(scorer: models.Scorer, tokenizer: Any) -> None:
    """Let `models.score` read a scorer at the token it was trained on.

    Ours are at the end token of the reply. Others, as TRL's, are where transformers reads what the template
    renders: at the last token that is not padding, in ChatML the newline after the end token. score_at in the
    model's config.json, "end" or "last", says which; without it ours are known by their reward_mean.
    """
    config, end = scorer.config, templates.end_token(tokenizer)
    is_ours = getattr(config, "reward_mean", None) is not None
    at = getattr(config, "score_at", None) or ("end" if is_ours else "last")
    if at not in ("end", "last"):
        raise formats.wrong("score_at of the reward model", at, "end or last")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = (*templates.tokenize(tokenizer, templates.render(tokenizer, turns, False)).tolist(),)
    ending = ids[len(ids) - 1 - ids[::-1].index(end) :] if end in ids else (end,)
    while ending and ending[-1] == config.pad_token_id:
        ending = ending[:-1]
    scorer.ending = None if at == "end" or ending == (end,) else ending
    if dist.is_main() and scorer.ending is not None:
        where = (
            "reward model: read as by transformers and TRL, at the template's last token that is not padding"
        )
        print(f'{where}; with "score_at": "end" in its config.json, at the end token', flush=True)


def check(rewards: list[Reward], *datasets: Iterable[Example]) -> None:
    """End the run now if the template of a reward model does not take one of the prompts."""
    for reward in rewards:
        if reward.rater:
            prompts = [as_messages(example.prompt) for dataset in datasets for example in dataset]
            templates.check_prompts(reward.rater.tokenizer, prompts, f"reward {reward.name}")


def as_messages(prompt: formats.Messages | str) -> formats.Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def score_replies(
    rewards: list[Reward],
    examples: list[Example],
    replies: list[str],
    micro_batch_tokens: int,
    device: torch.device,
) -> list[float]:
    """The weighted sum of all rewards of each reply, on every rank.

    Args:
        replies: as many to each example, those to the first example first.

    Raises:
        RunError: a function raises, or does not return one finite number a reply.
    """
    num_each = len(replies) // len(examples)
    asked = [examples[i // num_each] for i in range(len(replies))]
    total = torch.zeros(len(replies), device=device)
    for reward in rewards:
        if reward.function:
            numbers = _call(reward, asked, replies, num_each)
        else:
            numbers = _read(reward, asked, replies, micro_batch_tokens, device)
        for number, reply, example in zip(numbers, replies, asked, strict=True):
            # so large a one that float32 cannot hold its square is as bad as NaN
            if not abs(number * max(1.0, reward.weight)) < formats.LARGEST:
                found = f"reward {reward.name} gave {number} for {reply!r} to {example.prompt!r}"
                raise dist.RunError(found + place_of(reward.function))
        total += reward.weight * torch.tensor(numbers, device=device)
    return total.tolist()


def place_of(function: Callable | None) -> str:
    """(file:line) of a user's function; "" of what has none."""
    function = inspect.unwrap(function) if function else None
    function = getattr(function, "func", function)  # of a partial
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code else ""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Torch's grad mode and default dtype are after a user's function what they were before it."""
    dtype = torch.get_default_dtype()
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def as_real(value: Any) -> float | None:
    """A real number of Python, numpy or torch as a float; None for anything else."""
    if isinstance(value, np.generic | np.ndarray | Tensor) and math.prod(value.shape) == 1:
        value = value.item()
    try:
        return float(value) if isinstance(value, Real) else None
    except OverflowError:
        return math.inf


def as_rewards(found: Any, count: int) -> list[float]:
    """What a function has returned, as a float for each of `count` replies; a RunError of anything else."""
    if not isinstance(found, list | tuple | np.ndarray | Tensor) or getattr(found, "ndim", 1) == 0:
        raise dist.RunError(f"gave {type(found).__name__}, {found!r:.80}, and no list of numbers")
    values = [as_real(value) for value in found]
    if None in values:
        bad = found[values.index(None)]
        more = ", for a reply to be left out as in TRL" * (bad is None)
        raise dist.RunError(f"gave {bad!r:.80} for response {values.index(None) + 1}{more}, and no number")
    if len(values) != count:
        raise dist.RunError(f"gave {len(values)} numbers for {count} responses")
    return values


def _read(
    reward: Reward, asked: list[Example], replies: list[str], micro_batch_tokens: int, device: torch.device
) -> list[float]:
    """A reward model's numbers."""

    def encode(i: int) -> Example:
        reply = [{"role": "assistant", "content": replies[i]}]
        return Example(
            [data.encode_response(reward.rater.tokenizer, as_messages(asked[i].prompt), reply)], ""
        )

    conversations = dist.parallel_map(encode, range(len(replies)))
    return models.score(reward.rater.model, conversations, micro_batch_tokens, device)[:, 0].tolist()


def _call(reward: Reward, asked: list[Example], replies: list[str], num_each: int) -> list[float]:
    """A function's numbers; the ranks share the prompts, all replies to one stay together."""
    places, size = range(len(replies)), dist.world_size()
    shares = [[i for i in places if i // num_each % size == part] for part in range(size)]

    def numbers_of(share: list[int]) -> list[float]:
        """One call; an error names the function and the prompt."""
        prompts, records = [asked[i].prompt for i in share], [asked[i].record for i in share]
        place = place_of(reward.function)
        try:
            with undisturbed():
                found = call_function(reward.function, prompts, [replies[i] for i in share], records)
            return as_rewards(found, len(share))
        except dist.RunError as error:
            said = " ".join(str(error).split()) + place
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            said = f"raised {what_happened(error)}"
            said += place * (place[1:].split(":")[0] not in said)  # its own line says more
        raise dist.RunError(f"reward {reward.name} {said}; the first prompt was {prompts[0]!r}")

    found = dist.parallel_map(lambda share: numbers_of(share) if share else [], shares)
    numbers = {
        i: x for share, own in zip(shares, found, strict=True) for i, x in zip(share, own, strict=True)
    }
    return [numbers[i] for i in places]


def call_function(function: Callable, prompts: list, replies: list[str], records: list[dict]) -> Any:
    """What a function makes of replies; one with a parameter `completions` gets all by name, as in TRL.

    There a reply to messages is a list of one message, and each field of the records a list.
    """
    known = inspect.signature(function).parameters
    if "completions" not in known:
        try:
            inspect.signature(function).bind(prompts, replies, records)
        except TypeError as error:
            expected = "it is called with prompts, responses and records, or with completions as in TRL"
            raise dist.RunError(f"cannot be called: {error}; {expected}") from error
        return function(prompts, replies, records)
    as_asked = [
        reply if isinstance(prompt, str) else [{"role": "assistant", "content": reply}]
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    fields = {name for record in records for name in record}
    named = {name: [record.get(name) for record in records] for name in fields}
    named |= {"prompts": prompts, "completions": as_asked}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    given = {name: value for name, value in named.items() if takes_all or name in known}
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:  # as of completion_ids or trainer_state
        raise dist.RunError(f"cannot be called: {error}; there are {', '.join(sorted(named))}") from error
    return function(**given)


def normalize(scores: Tensor, running: dict[str, float]) -> Tensor:
    """Scores by the mean and standard deviation of all so far, these included; updates `running`."""
    count, mean, square = (running.get(k, 0.0) for k in ("count", "mean", "square"))
    total = count + len(scores)
    mean = (count * mean + scores.sum().item()) / total
    square = (count * square + scores.square().sum().item()) / total
    running.update(count=total, mean=mean, square=square)
    return (scores - mean) / max(1e-6, math.sqrt(max(0.0, square - mean**2)))
