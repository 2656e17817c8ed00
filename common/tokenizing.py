"""Tokenizing: texts -> tokens, from pieces that are remembered; special tokens by their spelling."""

import contextlib
import functools
import itertools
import math
import re
import string
from collections.abc import Iterator
from typing import Any

import numpy as np

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


class Pieces(dict):
    """Tokens of a text, which a tokenizer makes of pieces that do not see each other: most recur.

    It cuts before a special token, and a byte-level one between words too. What begins with a space and a
    letter is a word of its own whatever is before it, which is tried with all kinds of characters. Short
    pieces are kept, as bytes of int32: words without their space, and the first of a stretch after BREAK.
    """

    MOST = 1 << 17  # that are kept
    BETWEEN = re.compile(" (?=[A-Za-z])")
    BEFORE = (*string.printable, *"\u00e9\u4e2d\u0301\u2026\u00a0", "'s", "12", "123", "\n\n", "\r\n")

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.marks = tokenizer, re.compile("(?!)")
        self.between = self.marks  # one piece
        self.stretch = functools.lru_cache(64)(self.encode_stretch)  # a conversation and its beginnings
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
                self.between = self.BETWEEN

    def encode(self, text: str) -> np.ndarray:
        """(N,) int32"""
        starts = sorted({0, *(m.start() for m in self.marks.finditer(text)), len(text)})
        found = (self.stretch(text[i:k]) for i, k in itertools.pairwise(starts))
        return np.frombuffer(b"".join(found), np.int32)

    def encode_stretch(self, text: str) -> bytes:
        """Tokens from one special token to the next."""
        first, *others = self.between.split(text)
        return b"".join(map(self.__getitem__, [BREAK + first, *others]))

    def __missing__(self, piece: str) -> bytes:
        text = piece[1:] if piece[0] == BREAK else " " + piece
        if self.core:
            ids = self.core.encode(text, add_special_tokens=False).ids
        else:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found = np.array(ids, np.int32).tobytes()
        if len(self) > self.MOST:
            self.clear()
        if len(piece) < 100:
            self[piece] = found
        return found


pieces = functools.lru_cache(maxsize=4)(Pieces)


@functools.lru_cache(maxsize=16)  # chosen and rejected share a prompt
def tokenize(tokenizer: Any, text: str, plain: bool = False) -> np.ndarray:
    """(N,) int32 of a rendered conversation. Only plain text needs a BOS: a template writes its own."""
    with encoding():
        text.encode()  # half of a surrogate pair, which the tokenizer would not name
        tokens = np.concatenate([*map(pieces(tokenizer).encode, text.split(BREAK))])
    rows, most = num_rows(tokenizer), int(tokens.max(initial=0))
    if most >= rows:
        token = tokenizer.convert_ids_to_tokens(most)
        raise dist.RunError(
            f"the tokenizer makes {token!r} token {most}, but the model embeds {rows} tokens; "
            "enlarge it with resize_token_embeddings and save it, or leave the token out of the data"
        )
    is_plain, bos = plain or tokenizer.chat_template is None, tokenizer.bos_token_id
    if is_plain and tokens[:1].tolist() != [bos] and adds_bos(tokenizer):
        tokens = np.array([bos, *tokens], np.int32)
    tokens.flags.writeable = False  # it is remembered
    return tokens


def common_start(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size


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
