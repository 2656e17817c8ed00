"""Load damaged data files: each gives a good data set, or one line that names the file and the line.

    python tests/fuzz.py 10000 1      # 10,000 files, seed 1

Records of docs/data.md, one or two of which are changed, or the bytes of the whole file, go through the
loader of their kind, in this process. A good data set has ids of the vocabulary, masks as long as they are,
finite numbers, no text made of what was none, and every record that was not changed, encoded as before.
Prints what did not hold, with the file kept in --out, and a line of figures with the seed; exit code 1 if
anything did not.
"""

import argparse
import collections
import contextlib
import copy
import gzip
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from common import data, dist  # noqa: E402

KINDS = {
    "sft": data.load_sft,
    "pairs": data.load_pairs,
    "ranked": data.load_ranked,
    "prompts": data.load_prompts,
    "ratings": data.load_ratings,
}
VALUES = [
    None, 0, -1, 1.5, True, "", " ", "\n", [], {}, [[]], [None], [{}], ["a"], {"a": 1}, 10**400, 1e300,
    float("nan"), float("inf"), -100, 5, "4", "\ud800", "a\udfffb", "\x00\x07\x1b[2J", "a\u2028b\u2029c\x85d",
    "\ufdd0", "\ufeffa", "<s></s><|im_end|><pad><unk>", "\n\nHuman:", "\n\nHuman: a\n\nAssistant:",
    "<extra_id_1>", "<extra_id_2>", "<extra_id_1>Martian\nhi\n<extra_id_1>", "see <extra_id_1> there",
    "<extra_id_0>System\n\n<extra_id_1>User\n", "\n\nAssistant: x", "quality:4,", "quality", "quality:x",
    "helpfulness:nan", "helpfulness:9", "a:b:c", {"role": "user"}, {"role": "assistant", "content": ""},
    {"role": None, "content": "x"}, {"role": "user", "content": ["x"]}, {"role": ["user"], "content": "x"},
    [{"role": "user", "content": "x"}], [1, 2], [[5, 8], [2, 3]], {"helpfulness": None},
    {"helpfulness": "4"}, {"": 1}, {"helpfulness": 4, "helpfulness ": 3},
]  # fmt: skip
NAMES = ["system", "mask", "train_roles", "margin", "instances", "tie", "type", "labels", "ranks"]
NO_TEXT = re.compile(
    r"\bnan\b|\bNone\b|\binf\b|1e\+300|\{'|\['|\[\[|\{\}"
)  # what str() makes of what is none


def documented() -> dict[str, list[list[dict]]]:
    """The blocks of records in docs/data.md by their kind."""
    found = collections.defaultdict(list)
    for kind, block in re.findall(r"```jsonl (\w+)\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.S):
        if kind in KINDS:
            found[kind].append([json.loads(line) for line in block.splitlines()])
    return found


def places(value: Any) -> list[tuple]:
    """Where every value in a tree of JSON stands, level by level: it may be a thousand deep."""
    found, level = [], [((), value)]
    while level:
        found += [place for place, _ in level]
        level = [
            ((*place, key), inner)
            for place, x in level
            for key, inner in (
                x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
            )
        ]
    return found


def put(tree: Any, place: tuple, value: Any) -> Any:
    if not place:
        return value
    tree[place[0]] = put(tree[place[0]], place[1:], value)
    return tree


def at(tree: Any, place: tuple) -> Any:
    return at(tree[place[0]], place[1:]) if place else tree


def mutate(record: dict, rng: random.Random, names: list[str]) -> tuple[str, str]:
    """(the record, changed, as a line; what was done)."""
    record, kind = copy.deepcopy(record), rng.randrange(11)
    place, name = rng.choice([p for p in places(record) if p]), rng.choice(list(record))
    if kind == 0:
        del record[name]
        return json.dumps(record), f"{name} left out"
    if kind == 1:
        new = rng.choice([rng.choice(names), name.upper(), name[:-1], name + "s"])
        return json.dumps({new if k == name else k: v for k, v in record.items()}), f"{name} is now {new}"
    if kind == 2:
        new, value = rng.choice(names), rng.choice(VALUES)
        return json.dumps({**record, new: value}), f"{new} = {value!r:.60} added"
    if kind == 3:
        depth, line = rng.choice([50, 800, 1100, 5000, 100_000]), json.dumps(put(record, place, "DEEP"))
        return line.replace('"DEEP"', "[" * depth + "]" * depth), f"{place} {depth} lists deep"
    if kind == 4 and rng.random() < 0.1:
        size = rng.choice([70_000, 2_000_000])
        return json.dumps(put(record, place, "long " * (size // 5))), f"{place} of {size} letters"
    if kind == 5:
        line = json.dumps(record)
        return line[:-1] + "," + line[1:], "every key twice"
    if kind == 6:
        other = rng.choice([p for p in places(record) if p])
        return json.dumps(put(record, place, copy.deepcopy(at(record, other)))), f"{place} as {other}"
    if kind == 7:
        line = bytearray(json.dumps(record).encode())
        where = rng.randrange(len(line))
        line[where] = rng.choice(b'"{}[],:\\ntf0- ')
        return line.decode(), f"byte {where} is {chr(line[where])!r}"
    value = rng.choice(VALUES)
    return json.dumps(put(record, place, value)), f"{place} = {value!r:.60}"


def parquet(lines: list[bytes]) -> bytes:
    """A table of texts."""
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [line.decode() for line in lines]}), file)
    return file.getvalue()


def damage(text: bytes, rng: random.Random) -> tuple[bytes, str, str, str]:
    """(bytes, suffix, what was done; "same", "refused" or "any") of a file written otherwise, or damaged."""
    lines = text.splitlines()
    whole = b"[" + b",".join(lines) + b"]"
    middle, zipped = rng.randrange(1, len(text)), gzip.compress(text)
    plain = b"\n".join(json.dumps(json.loads(x), ensure_ascii=False).encode() for x in lines)
    kinds: list[tuple[bytes | None, str, str, str]] = [
        (b"\xef\xbb\xbf" + text, ".jsonl", "a byte order mark", "same"),
        (text.replace(b"\n", b"\r\n"), ".jsonl", "CRLF", "same"),
        (text.replace(b"\n", b"\n\n \n"), ".jsonl", "blank lines", "same"),
        (text[:-1], ".jsonl", "no line feed at the end", "same"),
        (plain, ".json", "lines in .json", "same"),
        (whole, rng.choice([".json", ".jsonl"]), "a list", "same"),
        (json.dumps(json.loads(whole), indent=2).encode(), ".json", "an indented list", "same"),
        (zipped, ".jsonl.gz", "gz", "same"),
        (gzip.compress(text[:middle]) + gzip.compress(text[middle:]), ".jsonl.gz", "gz of two parts", "same"),
        (gzip.compress(whole), ".json.gz", "a list in gz", "same"),
        (text.replace(b"\n", b"\r"), ".jsonl", "CR", "refused"),
        (text.decode().encode("utf-16"), ".jsonl", "UTF-16", "refused"),
        (text[:middle], ".jsonl", "cut", "any"),
        (text[:middle] + b"\xff\xfe" + text[middle:], ".jsonl", "invalid UTF-8", "refused"),
        (text[:middle] + b"\x00" + text[middle:], ".jsonl", "a NUL byte", "refused"),
        (rng.choice([b"", b"\n \n"]), ".jsonl", "empty", "refused"),
        (rng.choice([b"[]", b"null", b"5", b'"a"', b"true"]), ".json", "no records", "refused"),
        (b"{}", ".jsonl", "an empty object", "refused"),
        (whole[:-1], ".json", "a list without its end", "refused"),
        (whole[:-1] + b",3]", ".json", "a number in a list", "refused"),
        (b" ".join(lines), ".jsonl", "all on one line", "refused"),
        (json.dumps(json.loads(lines[0]), indent=2).encode(), ".json", "an indented object", "refused"),
        (b'{"data": ' + whole + b"}", ".json", "a list in an object", "refused"),
        (zipped[: rng.randrange(5, 60)], ".jsonl.gz", "cut gz", "refused"),
        (zipped[:-6], ".jsonl.gz", "gz without its end", "refused"),
        (text, ".jsonl.gz", "no gz", "refused"),
        (zipped + b"rest", ".jsonl.gz", "gz and more", "refused"),
        (text, ".parquet", "no parquet", "refused"),
        (text, ".txt", "another suffix", "refused"),
        (b"// comment\n" + text, ".jsonl", "a comment", "refused"),
        (lines[0] + b",\n" + lines[1], ".jsonl", "a comma after a line", "refused"),
        (None, ".parquet", "cut parquet", "refused"),
        (os.urandom(0) + bytes(rng.randrange(256) for _ in range(200)), ".parquet", "noise", "refused"),
    ]
    content, suffix, what, due = rng.choice(kinds)
    return parquet(lines)[:-20] if content is None else content, suffix, what, due


def faults_of(datasets: tuple, tokenizer: Any) -> list[str]:
    """What is wrong with loaded data."""
    faults = []
    for tokens, mask in (s for examples in datasets for e in examples for s in e.sequences):
        if tokens.ndim != 1 or tokens.dtype != np.int32 or mask.dtype != bool or mask.shape != tokens.shape:
            faults.append(f"tokens {tokens.shape} {tokens.dtype}, mask {mask.shape} {mask.dtype}")
        elif len(tokens) == 0 or tokens.min() < 0 or tokens.max() >= len(tokenizer):
            faults.append(f"tokens {tokens.tolist()[:9]}")
    for name, value in ((n, v) for examples in datasets for e in examples for n, v in e.fields.items()):
        if np.isinf(np.asarray(value, np.float32)).any():
            faults.append(f"field {name} = {value!r}")
    return faults


def encoded(datasets: tuple) -> dict[str, list]:
    """Encodings by the record they come from."""
    return {
        json.dumps(e.record, sort_keys=True): [(t.tolist(), m.tolist()) for t, m in e.sequences]
        for examples in datasets
        for e in examples
    }


def attempt(load: Callable, path: Path, tokenizer: Any) -> tuple[str, Any, str]:
    """("good", datasets), ("refused", message) or ("traceback", text); and what was printed."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return "good", load(tokenizer, str(path), "", 1024), printed.getvalue()
    except dist.RunError as error:
        return "refused", str(error), printed.getvalue()
    except Exception:
        return "traceback", traceback.format_exc(limit=-3), ""


def faults_of_message(message: str, path: Path, changed: set[int]) -> list[str]:
    """What is wrong with the line that refuses a file, of which these lines were changed."""
    faults = []
    with contextlib.suppress(UnicodeEncodeError):
        message.encode()
        if str(path) not in message:
            faults.append("no file in the message")
        lines = message.split("\n")  # of bad lines up to ten are named, each in a line of its own
        if len(lines) > 11 or any(str(path) not in line and line != "and more" for line in lines):
            faults.append("a line that does not name the file, or too many")
        if any(re.search(r"[\x00-\x1f\x7f]", line) for line in lines):
            faults.append("more than text")
        if changed and not re.search(r":\d+: |item \d+|row \d+|nothing to train on|a single prompt", message):
            faults.append("no line in the message")
        named = re.search(r":(\d+): ", message)
        if changed and named and not {int(named[1]) - 1, int(named[1])} & changed:
            faults.append("another line is blamed")
        return [f"{fault}: {message!r:.500}" for fault in faults]
    return [f"a message that cannot be printed: {message!r:.500}"]


def examine(
    good: list[dict], lines: list[str], changed: set[int], due: str, path: Path, kind: str, tokenizer: Any
) -> tuple[str, list[str]]:
    """(outcome, faults) of a file; `changed` lines of the `good` records, or all of it, which is then due."""
    outcome, result, printed = attempt(KINDS[kind], path, tokenizer)
    if outcome == "traceback":
        return outcome, [result]
    if outcome == "refused":
        faults = [f"refused: {result}"] if due == "same" else []
        return outcome, faults + faults_of_message(result, path, changed)
    faults = faults_of(result, tokenizer) + (["loaded"] if due == "refused" else [])
    kept = encoded(result)
    before = {json.dumps(record, sort_keys=True) for record in good}
    for key, sequences in kept.items():  # what was changed
        text = tokenizer.decode([t for tokens, _ in sequences for t in tokens])
        strings = " ".join(x for p in places(json.loads(key)) if isinstance(x := at(json.loads(key), p), str))
        if key not in before and (made := NO_TEXT.search(text)) and made[0] not in strings:
            faults.append(f"text made of what is none: {made[0]}")
    if changed or due == "same":
        control = path.with_name("control.jsonl")
        control.write_text("".join(json.dumps(r) + "\n" for n, r in enumerate(good) if n not in changed))
        ok, reference, _ = attempt(KINDS[kind], control, tokenizer)
        for key, sequences in encoded(reference).items() if ok == "good" else ():
            if key not in kept and "dropped" not in printed:
                faults.append(f"not loaded, and nothing said: {key:.80}")
            elif kept.get(key, sequences) != sequences:
                faults.append(f"encoded otherwise: {key:.80}")
    return outcome, faults


def fuzz(number: int, seed: int, out: Path, tell: Callable = print) -> dict:
    """Load so many damaged files; figures, with `not_held` of them."""
    dist.init(seed=1)
    rng, tokenizer, blocks = random.Random(seed), data.load_tokenizer("toy"), documented()
    names = sorted({key for group in blocks.values() for b in group for r in b for key in r} | {*NAMES})
    counts, not_held, slowest, began = collections.Counter(), 0, 0.0, time.monotonic()
    for i in range(number):
        kind = rng.choice(list(KINDS))
        block = rng.choice(blocks[kind])
        good = copy.deepcopy(block)
        for n in range(3):  # more prompts, so that some can be held out
            text = json.dumps(block).replace("2+2", f"2+{n + 3}").replace("3+4", f"3+{n + 5}")
            good += json.loads(text.replace("Chile", ("Peru", "Kenya", "Japan")[n]))
        lines, done, changed, due, suffix = [json.dumps(r) for r in good], [], set(), "any", ".jsonl"
        if rng.random() < 0.8:
            for _ in range(rng.choice([1, 1, 1, 2])):
                n = rng.randrange(len(lines))
                lines[n], what = mutate(good[n], rng, names)
                changed.add(n)
                done.append(f"line {n + 1}: {what}")
        content = "".join(line + "\n" for line in lines).encode()
        if not changed:
            content, suffix, what, due = damage(content, rng)
            done.append(f"the file: {what}")
        path = out / f"{seed}_{i}_{kind}{suffix}"
        path.write_bytes(content)
        start = time.monotonic()
        outcome, faults = examine(good, lines, changed, due, path, kind, tokenizer)
        slowest = max(slowest, time.monotonic() - start)
        counts[outcome] += 1
        if faults:
            not_held += 1
            tell(f"seed {seed}, {path.name}, {done}: " + "\n    ".join(f"{f:.900}" for f in faults[:3]))
        else:
            path.unlink()
    seconds = round(time.monotonic() - began, 1)
    figures = {"files": number, "seed": seed, **counts, "not_held": not_held, "seconds": seconds}
    return figures | {"slowest": round(slowest, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument(
        "--out", type=Path, help="keeps the files that did not hold; default: a temporary folder"
    )
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    figures = fuzz(args.files, args.seed, out)
    print(json.dumps(figures), flush=True)
    if not args.out and not figures["not_held"]:
        shutil.rmtree(out)
    sys.exit(bool(figures["not_held"]))


if __name__ == "__main__":
    main()
