"""Who answers a conversation: a model in this process, or one behind a server with OpenAI's chat API.

Both give replies, and both say which of two options, (A) or (B), is the better one, as a probability. The
first can be talked with:

    python -m common.chat --model runs/sft "What does the cat say?"
"""

import contextlib
import gc
import hashlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import tyro
from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from common import data, dist, files, formats, labels, models, packed
from common.args import Inference
from common.generate import Sample, generate, rollout

THINK = "\nThink step by step about what each reply leads to, and finish with (A) or (B)."
CONCLUSION = "\nThe better reply is "
BACKOFF = 1.0  # seconds before a request is repeated; doubled each time after, up to a minute
REFUSED = (400, 401, 403, 404, 405, 422)  # the same request would be refused again


@dataclass
class Server:
    """A model behind a server that criticises and judges in place of one in this process."""

    fixed: ClassVar[tuple[str, ...]] = ("judge_url",)

    judge_url: str = ""
    """server that has judge_model, as https://host/v1, OpenAI's chat API; the key is in $OPENAI_API_KEY"""
    judge_timeout: float = 60.0
    """seconds that the server of judge_url has for an answer"""
    judge_retries: int = 8
    """times to ask the server again, after waits that grow to a minute, before the run stops"""
    judge_threads: int = 16
    """requests to the server under way at once from each rank"""


class Reply(NamedTuple):
    text: str
    ended: bool  # False: cut off at max_new_tokens


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def with_reasoning(question: formats.Messages) -> formats.Messages:
    """A question that asks to reason before the answer."""
    return [*question[:-1], user(question[-1]["content"] + THINK)]


# ------------------------------------------------------------------------------------ a model in this process


class Model:
    """A model in this process, spread over the ranks; its methods are collectives."""

    def __init__(
        self,
        path: str,
        tokenizer: Any,
        device: torch.device,
        system: Inference,
        max_new_tokens: int,
        seed: int,
        reasons: bool = False,
        keep: Path | None = None,
    ):
        """reasons: before it says which option is better; keep: a folder for replies, see `generate`."""
        gc.collect()  # FSDP's modules refer to themselves: what spoke before is freed here, not by counting
        self.path, self.tokenizer, self.device, self.system = path, tokenizer, device, system
        self.max_new_tokens, self.seed, self.reasons, self.keep = max_new_tokens, seed, reasons, keep
        self.policy = models.load(path, device, system, trainable=False)
        self.limit = getattr(self.policy.config, "max_position_embeddings", None) or math.inf

    def replies(
        self,
        conversations: list[formats.Messages],
        stream: int,
        first: int,
        temperature: float,
        samples_per_prompt: int = 1,
    ) -> list[Reply]:
        """samples_per_prompt replies to each, a function of (seed, stream, first + place in the list).

        A conversation too long for the model gets an empty one that has not ended.
        """
        prompts = dist.parallel_map(lambda turns: data.encode_prompt(self.tokenizer, turns), conversations)
        fits = [len(tokens) < self.limit for tokens in prompts]
        samples = generate(
            self.policy,
            self.tokenizer,
            [tokens if ok else tokens[-1:] for tokens, ok in zip(prompts, fits, strict=True)],
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            samples_per_prompt=samples_per_prompt,
            seed=self.seed,
            step=stream,
            first_index=first,
            keep=self.keep,
        )
        return [Reply(s.text.strip(), s.ended) if fits[s.prompt_index] else Reply("", False) for s in samples]

    def verdicts(self, questions: list[formats.Messages]) -> list[float | None]:
        """P(A) of each question; None where the reasoning was cut off, or all is too long for the model."""
        leads = [Reply("", True)] * len(questions)
        if self.reasons:
            questions = [with_reasoning(question) for question in questions]
            thoughts = self.replies(questions, stream=0, first=0, temperature=0.0)  # greedy: nothing is drawn
            leads = [Reply(thought.text + CONCLUSION, thought.ended) for thought in thoughts]

        def encode(item: tuple[formats.Messages, Reply]) -> packed.Example:
            return packed.Example(encode_options(self.tokenizer, item[0], item[1].text), "")

        examples = dist.parallel_map(encode, list(zip(questions, leads, strict=True)))
        short = [example.num_tokens < 2 * self.limit for example in examples]
        usable = [i for i, lead in enumerate(leads) if lead.ended and short[i]]
        probs: list[float | None] = [None] * len(questions)
        limit = self.system.micro_batch_tokens
        found = letter_probs(self.policy, [examples[i] for i in usable], limit, self.device)
        for i, p in zip(usable, found, strict=True):
            probs[i] = p
        return probs


def option_prob(logps: Tensor) -> Tensor:
    """P(the option listed first), from log-probabilities of the letters A and B, nats; (..., 2) -> (...)"""
    return torch.sigmoid(logps[..., 0] - logps[..., 1])


def encode_options(tokenizer: Any, question: formats.Messages, lead: str) -> list[packed.Tokens]:
    """The answers (A) and (B), up to the first token in which they differ; only that one is scored."""
    sides = [data.encode_response(tokenizer, question, [assistant(f"{lead}({x})")])[0] for x in "AB"]
    at = formats.common_prefix(*sides)
    return [(tokens[: at + 1], torch.arange(at + 1).eq(at).numpy()) for tokens in sides]


@torch.no_grad()
def letter_probs(
    policy: Any, examples: list[packed.Example], micro_batch_tokens: int, device: torch.device
) -> list[float]:
    """P(A) of each example, from one packed forward for both of its options."""
    table = torch.zeros(len(examples), 2, device=device)
    for row in packed.micro_batches(examples, micro_batch_tokens, device, "verdicts") if examples else ():
        logps = packed.segment_sum(models.token_logps(policy, row), row.target_segments, row.num_segments)
        table[row.example_ids] = logps.view(-1, 2)
    return option_prob(dist.sum_over_ranks(table)).tolist()  # each example was scored by one rank


# ----------------------------------------------------------------------------------- a model behind a server


class Endpoint:
    """A model behind a server with OpenAI's chat API, which may fail or stall; nothing is asked twice."""

    def __init__(self, model: str, server: Server, folder: Path, max_new_tokens: int, reasons: bool = False):
        """folder: of the answers, which all ranks see; reasons: before it says which option is better."""
        self.model, self.server, self.url = model, server, server.judge_url.rstrip("/") + "/chat/completions"
        self.max_new_tokens, self.reasons = max_new_tokens, reasons
        key = os.environ.get("OPENAI_API_KEY") or "none"  # left out, the user's hub token would be sent
        self.client = InferenceClient(base_url=self.url, api_key=key, timeout=server.judge_timeout)
        self.answers = files.Journal(folder)

    def ask(self, conversations: list[formats.Messages], read: Callable, **how: Any) -> list[dict]:
        """read(choice) of the first choice of each answer; every rank passes the same conversations."""
        bodies = [{"model": self.model, "messages": turns, **how} for turns in conversations]
        keys = [hashlib.sha256(json.dumps([self.url, body]).encode()).hexdigest()[:32] for body in bodies]
        wanted = dict(zip(keys, bodies, strict=True))  # equal ones are asked once
        with not_the_hub():
            found = self.answers.collect(
                wanted, lambda body: self.post(body, read), self.server.judge_threads
            )
        answers = dict(zip(wanted, found, strict=True))
        return [answers[key] for key in keys]

    def post(self, body: dict, read: Callable) -> dict:
        """One request, repeated after a pause where the server fails.

        Raises:
            RunError: the server refuses the request, or fails each time.
        """
        wait = 0.0
        for attempt in range(self.server.judge_retries + 1):
            time.sleep(min(60.0, wait))
            wait = BACKOFF * 2**attempt
            try:
                return read(self.client.chat_completion(**body).choices[0])
            except HfHubHTTPError as error:
                code, after = error.response.status_code, error.response.headers.get("Retry-After", "")
                problem = f"HTTP status {code}"
                if code in REFUSED:
                    said = formats.first_line(error)[:200]
                    raise dist.RunError(f"{self.url}: {problem}: {said}") from error
                wait = max(wait, float(after)) if after.isdigit() else wait
            except Exception as error:  # no connection, no answer in time, or an answer of another form
                problem = f"{type(error).__name__}: {formats.first_line(error)}"
        raise dist.RunError(
            f"{self.url}: gave up after {self.server.judge_retries + 1} tries, the last with {problem}; what "
            "was answered is kept, the same command goes on from there"
        )

    def replies(
        self, conversations: list[formats.Messages], stream: int, first: int, temperature: float
    ) -> list[Reply]:
        def read(choice: dict) -> dict:
            text = (choice["message"]["content"] or "").strip()
            return {"text": text, "ended": choice.get("finish_reason") == "stop"}

        how = {"max_tokens": self.max_new_tokens, "temperature": temperature}
        return [Reply(**answer) for answer in self.ask(conversations, read, **how)]

    def verdicts(self, questions: list[formats.Messages]) -> list[float | None]:
        """P(A) of each question; None for an answer that names no letter."""

        def read(choice: dict) -> dict:
            tokens = (choice.get("logprobs") or {}).get("content") or []
            return {"p": read_verdict(choice["message"]["content"] or "", tokens, self.reasons)}

        asked = [with_reasoning(question) for question in questions] if self.reasons else questions
        how = {"max_tokens": self.max_new_tokens if self.reasons else 8, "temperature": 0.0}
        return [x["p"] for x in self.ask(asked, read, logprobs=True, top_logprobs=20, **how)]


@contextlib.contextmanager
def not_the_hub() -> Iterator[None]:
    """Requests go out though HF_HUB_OFFLINE is set: its client refuses them all by a hook on the session."""
    session = get_session()
    hooks, session.event_hooks = session.event_hooks, {}
    try:
        yield
    finally:
        session.event_hooks = hooks


def read_verdict(text: str, tokens: list[dict], reasons: bool) -> float | None:
    """P(A) from the letter an answer gives, and from the log-probabilities at its token if there are any.

    Args:
        tokens: OpenAI's logprobs.content. Without it the probability is 0 or 1.
    """
    letters = re.findall(r"\(([AB])\)", text) or re.findall(r"^\W*([AB])\b", text)
    if not letters or (not reasons and len(set(letters)) > 1):
        return None
    probs = {"A": 0.0, "B": 0.0}
    named = [t for t in tokens if re.sub(r"\W", "", t["token"]) == letters[-1]]
    for top in (named[-1].get("top_logprobs") or []) if named else []:
        letter = re.sub(r"\W", "", top["token"])
        if letter in probs:
            probs[letter] += math.exp(top["logprob"])
    total = sum(probs.values())
    return probs["A"] / total if total > 0 else float(letters[-1] == "A")


# ------------------------------------------------------------------------------------------- in the terminal


@dataclass
class Args:
    """Ask a model one question, or without one hold a conversation in the terminal; Ctrl-D ends it."""

    question: tyro.conf.Positional[str] = ""
    """answered at once"""
    model: str = "toy"
    """toy, a run folder, a Hugging Face folder, a hub id or a .gguf file"""
    system: str = ""
    """system message"""
    chat_template_kwargs: str = ""
    """variables of the chat template, as JSON: {"enable_thinking": false}"""
    attributes: str = ""
    """wanted attributes of a conditioned model, as helpfulness:4,toxicity:0"""
    temperature: float = 1.0
    """0 takes the most likely token"""
    max_new_tokens: int = 512
    """most tokens of a reply"""
    seed: int = 1
    """another seed, another reply"""


def main(args: Args) -> None:
    device = dist.init(args.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tokenizer = data.load_tokenizer(args.model, "", args.chat_template_kwargs)
    policy = models.load(args.model, device, Inference(), trainable=False)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    label = labels.read_line(args.attributes, "attributes")
    shown = ""

    def show(sample: Sample) -> None:
        nonlocal shown
        text = sample.text.rstrip("\ufffd")  # half a character: the rest comes with the next token
        print(text[len(shown) :], end="", flush=True)
        shown = text

    with rollout(policy), contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            text, shown = args.question or input("\n> "), ""
            messages.append({"role": "user", "content": text})
            prompt = data.encode_prompt(tokenizer, messages if tokenizer.chat_template else text, label)
            (reply,) = generate(
                policy,
                tokenizer,
                [prompt],
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                seed=args.seed,
                step=len(messages),
                stream=show,
            )
            messages.append({"role": "assistant", "content": reply.text})
            print()
            if args.question:
                return
    print()


if __name__ == "__main__":
    dist.run(main, tyro.cli(Args, use_underscores=True))
