"""Tokenizing: texts -> tokens, of many texts in one call; how many tokens a text and its beginning share."""

import contextlib
import functools
import itertools
import math
import re
import string
from collections.abc import Generator, Iterable, Iterator, Sequence
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


class Pieces:
    """Tokens of a text, which a tokenizer makes of pieces that do not see each other: most recur.

    It cuts before a special token, and a byte-level one between words too. What begins with a space and a
    letter is a word of its own whatever is before it, which is tried with all kinds of characters.
    """

    ROOM = 1 << 22  # characters that are remembered, and 40 more for each piece
    WORDS = re.compile(r" ?[^ ]*(?: (?![A-Za-z])[^ ]*)*")
    BEFORE = (*string.printable, *"\u00e9\u4e2d\u0301\u2026\u00a0", "'s", "12", "123", "\n\n", "\r\n")

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.known, self.room = tokenizer, {}, self.ROOM
        self.marks = self.words = None  # one piece
        tokenizer("a", verbose=False)  # nothing is padded or cut from here on
        self.core = core = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        added = core.get_added_tokens_decoder().values() if core else ()
        if not core or any(t.lstrip or t.single_word for t in added):
            return
        marks = sorted((t.content for t in added if not t.normalized), key=len, reverse=True)
        self.marks = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        before, is_plain = core.pre_tokenizer, not any(t.rstrip or " " in t.content for t in added)
        if is_plain and "ByteLevel(" in repr(before) and repr(core.normalizer) in ("None", "NFC()"):
            cut = lambda text: [piece for piece, _ in before.pre_tokenize_str(text)]  # noqa: E731
            if all(cut(f"a{x} bc") == cut(f"a{x}") + cut(" bc") for x in self.BEFORE):
                self.words = self.WORDS

    def encode(self, text: str) -> Iterable[int]:
        if self.core is None:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [text]
        if self.marks:
            starts = [0, *(m.start() for m in self.marks.finditer(text)), len(text)]
            pieces = [text[i:k] for i, k in itertools.pairwise(starts)]
        if self.words:
            pieces = [word for piece in pieces for word in self.words.findall(piece)]
        if self.room < 0:
            self.known, self.room = {}, self.ROOM
        if new := [piece for piece in dict.fromkeys(pieces) if piece not in self.known]:
            found = self.core.encode_batch_fast(new, add_special_tokens=False)
            self.known |= zip(new, (encoding.ids for encoding in found), strict=True)
            self.room -= sum(map(len, new)) + 40 * len(new)
        return itertools.chain.from_iterable(map(self.known.__getitem__, pieces))


pieces = functools.lru_cache(maxsize=4)(Pieces)


@functools.lru_cache(maxsize=16)  # chosen and rejected share a prompt
def tokenize(tokenizer: Any, text: str, plain: bool = False) -> tuple[int, ...]:
    """Tokens of a rendered conversation. Only plain text needs a BOS: a template writes its own."""
    with encoding():
        text.encode()  # half of a surrogate pair, which the tokenizer would not name
        tokens = (*itertools.chain.from_iterable(map(pieces(tokenizer).encode, text.split(BREAK))),)
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


def alone(tokenizer: Any, job: Steps) -> Any:
    """What a job returns, exactly."""
    (found,) = together(tokenizer, [job], exactly=True)
    if isinstance(found, Exception):
        raise found
    return found


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
def special_ids(tokenizer: Any) -> tuple[dict[str, int], re.Pattern]:
    """Special tokens by their spelling, and what matches the longest of them."""
    ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids, re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or "(?!)")


def find_marks(tokenizer: Any, text: str, tokens: list[int]) -> list[tuple[int, int, int]]:
    """The marks of a text; none where its special tokens are not those that it spells."""
    ids, pattern = special_ids(tokenizer)
    spelled = [(m.start(), m.end(), ids[m[0]]) for m in pattern.finditer(text)]
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


def is_special(tokenizer: Any, token: int) -> bool:
    found = tokenizer.added_tokens_decoder.get(token)
    return found is not None and found.special


def closing(mark: str) -> str:
    """</think> of <think>, [/THINK] of [THINK], <|end_of_thought|> of <|begin_of_thought|>."""
    ends = re.sub(r"(begin|start)(?=_)", "end", mark)
    return ends if ends != mark else mark[0] + "/" + mark[1:]
