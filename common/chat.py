"""Who answers a conversation: a model in this process, or one behind a server with OpenAI's chat API.

Both give replies, and both say which of the options (A), (B), ... is the best one, as probabilities. The
first can be talked with:

    python -m common.chat --model runs/sft "What does the cat say?"
"""

import asyncio
import contextlib
import gc
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote

import httpx
import numpy as np
import torch
import tyro

from common import data, dist, files, formats, labels, models, packed
from common.args import Inference
from common.generate import Sample, generate, rollout

THINK = "\nThink step by step about what each reply leads to, and finish with (A) or (B)."
CONCLUSION = "\nThe better reply is "
LEAST_SHARED = 128  # tokens that questions have in common, from which on it pays to read them once
FIRST_TRIES = 3  # of a server that has never answered and refuses the connection: it is not there
BACKOFF = 1.0  # seconds before a request is repeated; doubled each time after, up to a minute
REFUSED = (400, 401, 403, 404, 405, 413, 422)  # the same request would be refused again
ARTICLE = r"(?= (?!(?:is|was|has|does|seems|would|or|and|but|because|too|instead)\b)[a-z])"  # follows one
NO_OPTION = re.compile(  # the article at the start of a sentence, and the pronoun
    rf"(?<![a-z] )\bA{ARTICLE}|(?<!eply )(?<!ption )\bI(?=['\u2019]|,? [a-z])"
)
OPTION = r"(?i:reply|response|option|choice|answer)"
SMALL = re.compile(rf"(?:\b{OPTION}\W+(?:is\W+)?|\()[a-z]\b(?!\.[a-z]|{ARTICLE})")  # (b), reply b
# what a server says of a prompt that it will not have, in distinction to a request that it does not know
UNWANTED = re.compile(
    r"content.{0,20}(filter|polic|manag)|moderation|safety|inappropriate|inspection|context.length|too long"
    r"|maximum.context",
    re.I | re.S,
)


@dataclass
class Decoding:
    """How first replies, critiques, revisions and replies to compare are drawn, besides their temperature."""

    top_k: int = 0
    """replies, critiques and revisions are drawn from the top_k likeliest tokens; 0: from all"""
    top_p: float = 1.0
    """replies, critiques and revisions are drawn from the fewest tokens that hold this share of the mass"""
    repetition_penalty: float = 1.0
    """logits of tokens that prompt or reply already have are divided by this; NeMo-Aligner's is 1.2"""
    stop: tuple[str, ...] = ()
    """strings that end a reply, critique or revision, which is cut before them"""


@dataclass
class Server:
    """Models behind a server that criticise or judge in place of ones in this process."""

    fixed: ClassVar[tuple[str, ...]] = ("judge_url", "critic_url", "judge_body")

    judge_url: str = ""
    """server that has judge_model, as https://host/v1, OpenAI's chat API; the key is in $OPENAI_API_KEY"""
    critic_url: str = ""
    """server that has critic_model, likewise"""
    judge_body: str = "{}"
    """JSON that each request has besides; null leaves a field out: {"temperature": null, "logprobs": null}"""
    judge_timeout: float = 60.0
    """seconds that the server has for an answer, from the request to its last byte"""
    judge_retries: int = 8
    """times to ask the server again, after waits that grow to a minute, before the run stops"""
    judge_threads: int = 16
    """requests to the server under way at once from each rank"""
    judge_price: tuple[float, float] = (0.0, 0.0)
    """of a million tokens that the server reads, and of a million that it writes; for the cost of a stage"""
    forget_answers: bool = False
    """ask everything again, once: a restart before the run's end keeps what was asked since; else the
    server's answers in output_dir are used, with --overwrite too"""


class Reply(NamedTuple):
    text: str = ""
    ended: bool = False  # else cut off at max_new_tokens, or refused
    refused: str = ""  # what a server said that would not have the prompt


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def with_reasoning(question: formats.Messages) -> formats.Messages:
    """A question that asks to reason before the answer."""
    return [*question[:-1], user(question[-1]["content"] + THINK)]


# ------------------------------------------------------------------------------------ a model in this process


@dataclass(eq=False)
class Model:
    """A model in this process, spread over the ranks; its methods are collectives."""

    path: str
    tokenizer: Any
    device: torch.device
    system: Inference
    max_new_tokens: int
    seed: int
    decoding: Decoding
    reasons: bool = False  # before it says which option is best
    keep: Path | None = None  # a folder for replies, see `generate`

    def __post_init__(self) -> None:
        gc.collect()  # FSDP's modules refer to themselves: what spoke before is freed here, not by counting
        self.tokens, self.seconds = 0, 0.0
        self.policy = models.load(self.path, self.device, self.system, trainable=False)
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
        start = time.monotonic()
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
            **asdict(self.decoding),
        )
        self.tokens += sum(len(s.tokens) for s in samples)
        self.seconds += time.monotonic() - start
        return [Reply(s.text.strip(), s.ended) if fits[s.prompt_index] else Reply() for s in samples]

    def verdicts(self, questions: list[formats.Messages], letters: str = "AB") -> list[list[float] | None]:
        """P(letter) of each question; None where the reasoning was cut off, or all is too long."""
        leads = [Reply("", True)] * len(questions)
        if self.reasons:
            questions = [with_reasoning(question) for question in questions]
            thoughts = self.replies(questions, stream=0, first=0, temperature=0.0)  # greedy: nothing is drawn
            leads = [Reply(thought.text + CONCLUSION, thought.ended) for thought in thoughts]
        examples = dist.parallel_map(
            lambda item: encode_options(self.tokenizer, item[0], item[1].text, letters),
            list(zip(questions, leads, strict=True)),
        )
        usable = [i for i, e in enumerate(examples) if leads[i].ended and e.num_tokens < self.limit]
        chosen = [examples[i] for i in usable]
        found = letter_probs(self.policy, chosen, self.system.micro_batch_tokens, self.device, len(letters))
        probs = dict(zip(usable, found, strict=True))
        return [probs.get(i) for i in range(len(questions))]

    def report(self) -> str:
        """What has been generated, in words."""
        return f"{self.tokens:,} tokens generated in {self.seconds:.0f} s"


def encode_options(tokenizer: Any, question: formats.Messages, lead: str, letters: str) -> packed.Example:
    """The answer (A) up to the first token in which it differs from the others; only that one is scored.

    Its fields have the token that each letter has there: one forward of the question serves all of them.
    """
    sides = [data.encode_response(tokenizer, question, [assistant(f"{lead}({x})")])[0] for x in letters]
    at = min(formats.common_prefix(sides[0], side) for side in sides[1:])
    tokens = packed.Tokens(sides[0][: at + 1], np.arange(at + 1) == at)
    return packed.Example([tokens], "", {"letters": np.array([side[at] for side in sides], np.float32)})


def letter_probs(
    policy: Any, examples: list[packed.Example], micro_batch_tokens: int, device: torch.device, count: int
) -> list[list[float]]:
    """P(letter) among `count` letters, of each example; what some in a row begin with is read once."""

    def logits(row: packed.MicroBatch) -> torch.Tensor:
        letters = row.fields["letters"]
        return policy.logits(row).gather(1, letters[~letters.isnan()].long().view(-1, count))

    groups = beginning_alike(examples)
    found = packed.table(logits, groups, micro_batch_tokens, device, (count,), "verdicts")
    return found.softmax(-1).tolist()


def beginning_alike(examples: list[packed.Example]) -> list[packed.Example]:
    """Questions in a row with a long beginning in common as one example each, which packing reads once.

    A group grows as long as that spares more tokens.
    """
    groups: list[tuple[int, list[packed.Example]]] = []  # tokens in common, questions
    for i, example in enumerate(examples):
        ids = example.sequences[0].ids
        shared, members = groups[-1] if groups else (0, [])
        common = min(shared, formats.common_prefix(examples[i - 1].sequences[0].ids, ids))
        if common >= LEAST_SHARED and common * len(members) > shared * (len(members) - 1):
            groups[-1] = (common, [*members, example])
        else:
            groups.append((len(ids), [example]))
    fields = [{"letters": np.concatenate([e.fields["letters"] for e in group])} for _, group in groups]
    sequences = [[e.sequences[0] for e in group] for _, group in groups]
    return [packed.Example(x, "", own) for x, own in zip(sequences, fields, strict=True)]


# ----------------------------------------------------------------------------------- a model behind a server


@dataclass(eq=False)
class Endpoint:
    """A model behind a server with OpenAI's chat API, which may fail or stall; nothing is asked twice.

    A prompt that the server will not have costs that prompt: no critique, or no verdict.
    """

    url: str
    model: str
    server: Server
    folder: Path  # of the answers, which all ranks see
    max_new_tokens: int
    reasons: bool = False  # before it says which option is best

    def __post_init__(self) -> None:
        check_server("the server's address", self.url, self.model)
        self.url, self.used = self.url.rstrip("/") + "/chat/completions", []
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self.key.isascii() and self.key.isprintable()):  # httpx's own words would quote the key
            raise dist.RunError("OPENAI_API_KEY holds characters that no key has")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.client = httpx.AsyncClient(timeout=None, headers=headers)  # follows no redirect
        self.loop, self.is_there, self.has_told = asyncio.new_event_loop(), False, threading.Lock()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.extra, self.answers = read_body(self.server.judge_body), files.Journal(self.folder)

    def ask(self, conversations: list[formats.Messages], letters: str = "", **how: Any) -> list[dict]:
        """What `read_answer` makes of each answer; every rank passes the same conversations."""
        how = {name: x for name, x in {**how, **self.extra}.items() if x is not None}
        bodies = [{"model": self.model, "messages": turns, **how} for turns in conversations]
        keys = [hashlib.sha256(json.dumps([self.url, body]).encode()).hexdigest()[:32] for body in bodies]
        wanted = dict(zip(keys, bodies, strict=True))  # equal ones are asked once
        found = self.answers.collect(wanted, lambda body: self.post(body, letters), self.server.judge_threads)
        refused = [answer["refused"] for answer in found if answer.get("refused")]
        if refused and len(refused) == len(found) > 1:
            raise dist.RunError(
                f"{self.url}: refused all of {len(found)} prompts, the first with {refused[0]}; "
                "--judge_body changes the request, --forget_answers asks the same again"
            )
        self.used += found
        answers = dict(zip(wanted, found, strict=True))
        return [answers[key] for key in keys]

    def post(self, body: dict, letters: str) -> dict:
        """One request, repeated after a pause where the server fails; what comes back is without the key.

        Raises:
            RunError: the server refuses the request, or fails each time.
        """
        waits = [min(60.0, BACKOFF * 2 ** min(i, 6)) for i in range(self.server.judge_retries)]
        for attempt, wait in enumerate([*waits, 0.0], 1):
            try:
                # httpx's own limit is one of each read: a server that drips bytes never comes to it
                limited = asyncio.wait_for(self.client.post(self.url, json=body), self.server.judge_timeout)
                response = asyncio.run_coroutine_threadsafe(limited, self.loop).result()
                self.is_there = True
                if response.status_code == 200:
                    return read_answer(response.json(), letters, self.reasons)
                problem = f"HTTP status {response.status_code}"
                after = response.headers.get("Retry-After", "")
            except Exception as error:  # no connection, no answer in time, or an answer of another form
                problem = self.without_key(f"{type(error).__name__}: {formats.first_line(error)}")
                response, after = None, ""
            if response is not None and (refused := self.read_refusal(response, problem)):
                return {"refused": refused}
            is_absent = problem.startswith("ConnectError") and not self.is_there
            left = waits[attempt - 1 : FIRST_TRIES - 1 if is_absent else None]
            if not left:
                break
            if self.has_told.acquire(blocking=False):  # the first of all requests that failed
                until = time.strftime("%H:%M:%S", time.localtime(time.time() + sum(left)))
                print(f"{self.url}: {problem}; asked again until {until}", file=sys.stderr, flush=True)
            time.sleep(min(60.0, max(wait, float(after))) if re.fullmatch("[0-9]+", after) else wait)
        raise dist.RunError(
            f"{self.url}: gave up after {attempt} tries, the last with {problem}; what "
            "was answered is kept, the same command goes on from there"
        )

    def read_refusal(self, response: httpx.Response, problem: str) -> str:
        """What a server said of a prompt that it will not have; nothing where it may answer later.

        Raises:
            RunError: it refuses any such request.
        """
        code, text = response.status_code, self.without_key(response.content.decode("utf-8", "replace"))
        said = f"{problem}: {' '.join(text.split())[:200]}"
        if code == 422 or (code in (400, 413) and UNWANTED.search(text)):
            return said
        if response.is_redirect:  # followed, it could take the key to another host
            where = self.without_key(response.headers.get("Location", ""))
            raise formats.wrong(self.url, f"a redirect to {where}", "the address itself as judge_url")
        if code in REFUSED:
            raise dist.RunError(f"{self.url}: {said}")
        return ""

    def without_key(self, text: str) -> str:
        """A text from the server or about it, which may repeat the key; so may its address of elsewhere."""
        for key in {self.key, quote(self.key), quote(self.key, safe="")} - {""}:
            text = text.replace(key, "(the key)")
        return text

    def replies(
        self, conversations: list[formats.Messages], stream: int, first: int, temperature: float
    ) -> list[Reply]:
        answers = self.ask(conversations, max_tokens=self.max_new_tokens, temperature=temperature)
        return [Reply(**{name: x[name] for name in Reply._fields if name in x}) for x in answers]

    def verdicts(self, questions: list[formats.Messages], letters: str = "AB") -> list[list[float] | None]:
        """P(letter) of each question; None for an answer that names none, is cut off, or was refused."""
        asked = [with_reasoning(question) for question in questions] if self.reasons else questions
        how = {"max_tokens": self.max_new_tokens if self.reasons else 8, "temperature": 0.0}
        return [x.get("probs") for x in self.ask(asked, letters, logprobs=True, top_logprobs=20, **how)]

    def report(self) -> str:
        """What has been asked, refused and paid, in words."""
        refused = [x["refused"] for x in self.used if x.get("refused")]
        read, written = (sum(count_of(x.get("tokens", (0, 0))[i]) for x in self.used) for i in (0, 1))
        bare = sum(1.0 in (x.get("probs") or []) for x in self.used)
        cost = (read * self.server.judge_price[0] + written * self.server.judge_price[1]) / 1e6
        text = f"{len(self.used):,} answers of the server, {read:,} tokens read and {written:,} written"
        text += f", {cost:.2f} paid" if cost else ""
        text += f"; {bare:,} verdicts of 0 or 1, without usable log-probabilities" if bare else ""
        return text + (f"; {len(refused)} prompts refused, the first with {refused[0]}" if refused else "")


def check_server(name: str, url: str, model: str) -> None:
    """End the run if an address is none, or holds more, such as a password: options are written down.

    Args:
        name: what is said to have it.
        model: a name that the server knows.
    """
    if set("@?#") & {*url}:
        expected = "the address alone; the key is read from $OPENAI_API_KEY"
        raise formats.wrong(name, "a name, a password or a query in it", expected)
    if not re.match(r"https?://[^/\s]+(/\S*)?$", url):
        raise formats.wrong(name, repr(url), "http:// or https://, a host and a path, as https://host/v1")
    if not model:
        raise formats.wrong(name, "no model", "the name of a model there, as judge_model or critic_model")


def count_of(tokens: Any) -> int:
    """A number of tokens as a server gives it; 0 for what is none."""
    return int(tokens) if isinstance(tokens, int | float) and 0 <= tokens < formats.LARGEST else 0


def read_body(text: str) -> dict[str, Any]:
    """The fields of --judge_body; max_completion_tokens takes the place of max_tokens."""
    body = formats.from_json(text, "judge_body", "the option", dict)
    return ({"max_tokens": None} if "max_completion_tokens" in body else {}) | body


def read_answer(answer: dict, letters: str, reasons: bool) -> dict:
    """The tokens paid for an answer, and its text; or its verdict on `letters`, where there are any."""
    choice, usage = answer["choices"][0], answer.get("usage")
    counts = [
        usage.get(f"{name}_tokens") if isinstance(usage, dict) else 0 for name in ("prompt", "completion")
    ]
    found = {"tokens": [*map(count_of, counts)]}
    reason, text = choice.get("finish_reason"), choice["message"].get("content") or ""
    if reason == "content_filter":
        return found | {"refused": f"finish_reason {reason}"}
    if not letters:
        return found | {"text": text.strip(), "ended": reason != "length"}
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return found | {"probs": None if reason == "length" else read_verdict(text, tokens, reasons, letters)}


def read_verdict(text: str, tokens: list[dict], reasons: bool, letters: str = "AB") -> list[float] | None:
    """P(letter) from the letter an answer gives, and from the log-probabilities at its token if it has any.

    The letter stands where an answer does: at the start, alone or before a mark, and no other option is
    named after it; at the end where reasoning comes first. A capital is a name of an option, and so is a
    small letter in brackets or after reply, response, option, choice or answer.

    Args:
        tokens: OpenAI's logprobs.content. Without it, or with what is none, a probability is 0 or 1.
    """
    text = SMALL.sub(lambda named: named[0][:-1] + named[0][-1].upper(), text)
    lead = rf"(?i:(?:the )?(?:final |better |best )?{OPTION}\W*(?:is\W*)?)"
    if reasons:
        found = re.search(rf"(?:{lead}|\()([{letters}])\W*$", text)
    else:
        found = re.match(rf"(?!\W*I,)\W*{lead}?([{letters}])(?:\W*$|\W*\n|\)?\W*[.,:;])", text)
    if not found:
        return None
    letter, probs = found[1], dict.fromkeys(letters, 0.0)
    after = NO_OPTION.sub("", text[found.end(1) :])
    if any(x in probs and x != letter for x in re.findall(r"[^\W_]+", after)):
        return None
    named = [t for t in tokens if re.sub(r"\W", "", t["token"]) == letter]
    tops = (named[-reasons].get("top_logprobs") or []) if named else []
    logps = [(name, top["logprob"]) for top in tops if (name := re.sub(r"\W", "", top["token"])) in probs]
    if all(logp <= 0.001 for _, logp in logps):  # NaN is not; float32 rounds some up
        for name, logp in logps:
            probs[name] += math.exp(logp)
    # without a number for the letter itself, or with one of -9999, OpenAI's for none, they say nothing
    total = sum(probs.values()) if probs[letter] > 0 else 0.0
    return [p / total if total > 0 else float(x == letter) for x, p in probs.items()]


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
    dist.run(main, tyro.cli(Args, prog="python -m common.chat", use_underscores=True))
