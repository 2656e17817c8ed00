"""Tokenizing: texts -> tokens, from pieces that are remembered; special tokens by their spelling."""

import contextlib
import functools
import itertools
import math
import re
import string
from collections.abc import Iterator
from typing import Any

from common import dist
from common.formats import LeftOut, first_line
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
        self.stretch = functools.lru_cache(64)(self.encode_stretch)  # a conversation and its beginnings
        self.marks, self.words = re.compile("(?!)"), None  # one piece
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

    def encode(self, text: str) -> list[int]:
        if self.core is None:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        starts = sorted({0, *(m.start() for m in self.marks.finditer(text)), len(text)})
        return sum((self.stretch(text[i:k]) for i, k in itertools.pairwise(starts)), [])

    def encode_stretch(self, text: str) -> list[int]:
        """Tokens from one special token to the next."""
        if not self.words:
            return self.core.encode(text, add_special_tokens=False).ids
        words = self.words.findall(text)
        if self.room < 0:
            self.known, self.room = {}, self.ROOM
        if new := [*{*words}.difference(self.known)]:
            found = self.core.encode_batch_fast(new, add_special_tokens=False)
            self.known |= zip(new, (encoding.ids for encoding in found), strict=True)
            self.room -= sum(map(len, new)) + 40 * len(new)
        return [*itertools.chain.from_iterable(map(self.known.__getitem__, words))]


pieces = functools.lru_cache(maxsize=4)(Pieces)


@functools.lru_cache(maxsize=16)  # chosen and rejected share a prompt
def tokenize(tokenizer: Any, text: str, plain: bool = False) -> tuple[int, ...]:
    """Tokens of a rendered conversation. Only plain text needs a BOS: a template writes its own."""
    with encoding():
        text.encode()  # half of a surrogate pair, which the tokenizer would not name
        tokens = tuple(sum(map(pieces(tokenizer).encode, text.split(BREAK)), []))
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


def num_rows(tokenizer: Any) -> float:
    """The tokens that the model of this tokenizer embeds."""
    return getattr(config_of(getattr(tokenizer, "name_or_path", "")), "vocab_size", math.inf)


@functools.lru_cache(maxsize=4)
def special_ids(tokenizer: Any) -> dict[str, int]:
    """Special tokens by their spelling."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: Any) -> re.Pattern:
    """Matches the spelling of any special token, the longest that there is."""
    names = sorted(special_ids(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")
