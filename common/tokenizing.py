"""Tokenizing: texts -> tokens, of many texts in one call; how many tokens a text and its beginning share."""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from common import dist
from common.formats import LeftOut, common_prefix, first_line
from common.loading import config_of

BREAK = "\ufdd0"  # Unicode keeps this out of texts: where `tokenize` cuts


@contextlib.contextmanager
def encoding(where: str = "") -> Iterator[None]:
    """What a template or tokenizer raises about a conversation becomes one line, after `where`."""
    try:
        yield
    except LeftOut:
        raise
    except dist.RunError as error:
        if not where or str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:  # a template may raise anything
        place = f"{where}: " if where else ""
        raise dist.RunError(f"{place}cannot be encoded: {first_line(error)}") from error


def adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


@functools.lru_cache(maxsize=16)  # chosen and rejected share a prompt
def tokenize(tokenizer: Any, text: str, plain: bool = False) -> tuple[int, ...]:
    """Tokens of a rendered conversation. Only plain text needs a BOS: a template writes its own."""
    with encoding():
        text.encode()  # half of a surrogate pair, which the tokenizer would not name
        pieces = [
            tokenizer(s, add_special_tokens=False, verbose=False)["input_ids"] for s in text.split(BREAK)
        ]
    tokens = tuple(token for piece in pieces for token in piece)
    rows = num_rows(tokenizer)
    if max(tokens, default=0) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(tokens))
        raise dist.RunError(
            f"the tokenizer makes {token!r} token {max(tokens)}, but the model embeds {rows} tokens; "
            "enlarge it with resize_token_embeddings and save it, or leave the token out of the data"
        )
    bos = tokenizer.bos_token_id
    if (plain or tokenizer.chat_template is None) and tokens[:1] != (bos,) and adds_bos(tokenizer):
        tokens = (bos, *tokens)
    return tokens


tokenize_tail = functools.lru_cache(maxsize=512)(tokenize.__wrapped__)  # headers, a few that always recur


def num_rows(tokenizer: Any) -> float:
    """The tokens that the model of this tokenizer embeds."""
    return getattr(config_of(getattr(tokenizer, "name_or_path", "")), "vocab_size", math.inf)


class Marked(NamedTuple):
    """Tokens of a text, and of its special ones where each begins and ends, and which of the tokens it is."""

    tokens: Sequence[int]
    marks: Sequence[tuple[int, int, int]] = ()  # in characters, and its place among the tokens


Steps = Generator[str, Marked, Any]  # yields rendered texts, is sent their tokens, and returns what it makes


def together(tokenizer: Any, jobs: list[Steps], exactly: bool = False) -> list[Any]:
    """What each job returns, or the error it ends with; the texts of all are tokenised in one call.

    Args:
        exactly: each text by itself, and each beginning of it too, where its special tokens would tell.
    """
    results: list = [None] * len(jobs)
    replies: dict[int, Any] = dict.fromkeys(range(len(jobs)))
    while replies:
        texts = {}
        for k, reply in replies.items():
            try:
                texts[k] = (jobs[k].throw if isinstance(reply, Exception) else jobs[k].send)(reply)
            except StopIteration as done:
                results[k] = done.value
            except (LeftOut, dist.RunError) as error:
                results[k] = error
        replies = dict(zip(texts, mark(tokenizer, [*texts.values()], exactly), strict=True))
    return results


def in_turn(jobs: Iterable[Steps]) -> Steps:
    """The results of jobs, one after the other."""
    found = []
    for job in jobs:
        found.append((yield from job))
    return found


def at_once(steps: Callable[..., Steps]) -> Callable:
    """A function that returns what a job does, exactly, or raises its error."""

    @functools.wraps(steps)
    def run(tokenizer: Any, *given: Any, **more: Any) -> Any:
        (found,) = together(tokenizer, [steps(tokenizer, *given, **more)], exactly=True)
        if isinstance(found, Exception):
            raise found
        return found

    return run


def mark(tokenizer: Any, texts: list[str], exactly: bool) -> list[Marked | dist.RunError]:
    """Each text as tokens, or the error by which it has none."""
    batch = {}
    if not exactly and getattr(tokenizer, "is_fast", False) and tokenizer.chat_template is not None:
        plain = [text for text in texts if BREAK not in text]
        with contextlib.suppress(Exception):  # of one text, which is told below
            found = tokenizer.backend_tokenizer.encode_batch_fast(plain, add_special_tokens=False)
            batch = dict(zip(plain, (encoding.ids for encoding in found), strict=True))
    most, results = num_rows(tokenizer), []
    for text in texts:
        tokens = batch.get(text)
        try:
            if tokens is None or max(tokens, default=0) >= most:
                results.append(Marked(tokenize(tokenizer, text)))
            else:
                results.append(Marked(tokens, find_marks(tokenizer, text, tokens)))
        except dist.RunError as error:
            results.append(error)
    return results


@functools.lru_cache(maxsize=4)
def special_ids(tokenizer: Any) -> dict[str, int]:
    """Special tokens by their spelling."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: Any) -> re.Pattern:
    """Matches the spelling of any special token, the longest that there is."""
    names = sorted(special_ids(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def find_marks(tokenizer: Any, text: str, tokens: list[int]) -> list[tuple[int, int, int]]:
    """The marks of a text; none where its special tokens are not those that it spells."""
    ids = special_ids(tokenizer)
    spelled = [(m.start(), m.end(), ids[m[0]]) for m in special_tokens(tokenizer).finditer(text)]
    known = {*ids.values()}
    places = [k for k, token in enumerate(tokens) if token in known]
    if [tokens[k] for k in places] != [token for _, _, token in spelled]:
        return []
    return [(start, stop, k) for (start, stop, _), k in zip(spelled, places, strict=True)]


def shared(tokenizer: Any, text: str, found: Marked, before: str) -> tuple[int, bool]:
    """How many tokens of a text `before`, its beginning, has too; and whether these are all that it has.

    A tokenizer works between special tokens, each stretch by itself. So what stands before the last one in
    `before` has the same tokens in both, and only from that one on they have to be compared.
    """
    last = next((mark for mark in reversed(found.marks) if mark[1] <= len(before)), None)
    if last and text.startswith(before):
        tail = tokenize_tail(tokenizer, before[last[0] :])
        stop = last[2] + len(tail)
        if tuple(found.tokens[last[2] : stop]) == tail:
            return stop, True
    own = tokenize(tokenizer, before)
    count = common_prefix(own, found.tokens)
    return count, count == len(own)
