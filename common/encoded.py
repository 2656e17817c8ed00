"""Encoded data: examples on disk, made once by all ranks side by side, then mapped into memory by all.

A folder holds the examples of one data set as arrays end to end, one file each, and `contents.json`. Its name
is a digest of all that decides tokens, so that resumed runs, sweeps and other scripts find it. It is there
whole or not at all. A process reads of it what it asks for, and the ranks of a node share these pages.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import mmap
import os
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import dist, files
from common.formats import LeftOut, Stream
from common.packed import Example, Tokens
from common.templates import end_token
from common.tokenizing import num_rows

# of bounds there is one more than of what they bound, the first is 0; while a rank writes, they are lengths
COLUMNS: dict[str, Any] = {
    "ids": np.int32,
    "mask": np.bool_,
    "token_bounds": np.int64,  # of sequences in `ids` and `mask`
    "sequence_bounds": np.int64,  # of examples in `token_bounds`
    "texts": np.uint8,  # of each example its prompt and its record as JSON, and its label
    "text_bounds": np.int64,
    "numbers": np.float64,  # the fields of each example
    "number_bounds": np.int64,
    "shapes": np.int32,  # which of the lists of (name, length) its fields have; a length of None: a number
    "keys": np.uint64,  # examples with one question have one key
}
DECIDING = ("data", "encoded", "formats", "streams", "templates", "tokenizing")  # modules, what tokens are
MOST_TOUCHED = 16  # examples read before their pages are let go: each may bring 2 MiB of its neighbours
MOST_ERRORS = 10  # lines that one error names
CHECKED = 1 << 20  # bytes of each of the 64 pieces by which a damaged file is told; a small one is read whole


class Made(NamedTuple):
    """An example, and what is kept with it."""

    example: Example
    record: bytes  # JSON
    key: int
    is_cut: bool


class Stored(Example):
    """An example of a folder; its prompt and its record are parsed when they are asked for."""

    @functools.cached_property
    def prompt(self) -> Any:
        return json.loads(self.texts[0].tobytes())

    @functools.cached_property
    def record(self) -> dict:
        return json.loads(self.texts[1].tobytes())


class Encoded(Sequence):
    """The examples of a folder, or some of its rows."""

    def __init__(self, folder: Path):
        self.rows: np.ndarray | None = None
        self.contents = read_contents(folder)
        self.areas = {name: _mapped(folder / name) for name in COLUMNS}
        self.columns = {name: np.frombuffer(area, COLUMNS[name]) for name, area in self.areas.items()}
        self.num_read = 0
        self.shapes: list[list] = self.contents["shapes"]

    def __len__(self) -> int:
        return len(self.columns["shapes"] if self.rows is None else self.rows)

    def __getitem__(self, i: int) -> Stored:
        self.num_read += 1
        if (
            self.num_read % MOST_TOUCHED == 0
        ):  # the system keeps the pages; this process need not map them all
            for area in self.areas.values():
                if area:
                    area.madvise(mmap.MADV_DONTNEED)
        i = range(len(self))[i]
        row = i if self.rows is None else int(self.rows[i])
        of = self.columns
        first, last = of["sequence_bounds"][row : row + 2]
        at = itertools.pairwise(of["token_bounds"][first : last + 1].tolist())
        texts = itertools.pairwise(of["text_bounds"][3 * row : 3 * row + 4].tolist())
        example = Stored.__new__(Stored)  # whose prompt and record are not there yet
        # copies: views of a batch would hold the pages around each of its examples
        example.sequences = [Tokens(of["ids"][a:b].copy(), of["mask"][a:b].copy()) for a, b in at]
        example.texts = [of["texts"][a:b] for a, b in texts]
        example.label = example.texts[2].tobytes().decode()
        example.fields, start = {}, int(of["number_bounds"][row])
        for name, length in self.shapes[of["shapes"][row]]:
            values = of["numbers"][start : start + (length or 1)]
            example.fields[name] = float(values[0]) if length is None else values.astype(np.float32)
            start += length or 1
        return example

    def take(self, chosen: np.ndarray) -> "Encoded":
        """Those for which `chosen` (len(self),) is True."""
        found, rows = copy.copy(self), np.flatnonzero(chosen)
        found.rows = rows if self.rows is None else self.rows[rows]
        return found

    def _of(self, name: str) -> np.ndarray:
        """A column that has one value an example."""
        return self.columns[name] if self.rows is None else self.columns[name][self.rows]

    @property
    def keys(self) -> np.ndarray:
        return self._of("keys")

    @property
    def num_sequences(self) -> np.ndarray:
        """(len(self),)"""
        found = np.diff(self.columns["sequence_bounds"])
        return found if self.rows is None else found[self.rows]

    def names(self) -> Iterator[str]:
        """The fields that any example has, in the order in which they appear."""
        found, firsts = np.unique(self._of("shapes"), return_index=True)
        return (name for shape in found[np.argsort(firsts)] for name, _ in self.shapes[shape])

    def column(self, name: str) -> np.ndarray:
        """A field that is a number, of every example, NaN where it has none. (len(self),) float64"""
        places = np.full(len(self.shapes), -1)
        for i, shape in enumerate(self.shapes):
            starts = itertools.accumulate((length or 1 for _, length in shape), initial=0)
            places[i] = next((at for (own, _), at in zip(shape, starts, strict=False) if own == name), -1)
        place, values = places[self._of("shapes")], np.full(len(self), np.nan)
        starts = self.columns["number_bounds"][:-1]
        starts = starts if self.rows is None else starts[self.rows]
        values[place >= 0] = self.columns["numbers"][(starts + place)[place >= 0]]
        return values

    def fingerprint(self) -> str:
        rows = b"" if self.rows is None else self.rows.tobytes()
        return hashlib.sha256(self.contents["digest"].encode() + rows).hexdigest()


def _mapped(path: Path) -> Any:
    """A read-only file as memory that all who map it share; one of no bytes cannot be mapped."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if path.stat().st_size else b""


def read_contents(folder: Path) -> dict[str, Any]:
    """What contents.json says of a folder.

    Raises:
        OSError, ValueError: there is no such folder, or the file is damaged.
    """
    digest, _, text = (folder / "contents.json").read_text().partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError("damaged")
    return json.loads(text)


def is_whole(folder: Path) -> bool:
    """Whether the folder is there; one with a file that is cut or changed is removed, with a line."""
    if not folder.exists():
        return False
    with contextlib.suppress(OSError, ValueError):
        sums = read_contents(folder)["sums"]
        if sums == {name: files.pieces_digest(folder / name, CHECKED) for name in COLUMNS}:
            return True
    print(f"{folder}: damaged; it is made again", flush=True)
    with contextlib.suppress(OSError):  # another run does the same
        gone = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
        os.rename(folder, gone)
        files.remove(gone)
    return False


# ------------------------------------------------------------------------------------------- making a folder


@dataclass
class Report:
    """What one rank has to say of its share."""

    num_cut: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # why records are left out
    errors: list[str] = field(default_factory=list)
    stopped: bool = False


class Writer:
    """The columns of a rank's share, which grow as it goes; `shapes.json` says what its shapes are."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self.folder, self.shapes = folder, {}
        self.files = {name: (folder / name).open("wb") for name in COLUMNS}
        self.waiting: dict[str, list] = {name: [] for name in COLUMNS}

    def add(self, made: Made) -> None:
        example, put = made.example, self.waiting
        texts = (json.dumps(example.prompt).encode(), made.record, example.label.encode())
        put["ids"] += [ids for ids, _ in example.sequences]
        put["mask"] += [mask for _, mask in example.sequences]
        put["token_bounds"] += [len(ids) for ids, _ in example.sequences]
        put["sequence_bounds"].append(len(example.sequences))
        put["texts"] += texts
        put["text_bounds"] += map(len, texts)
        lengths = tuple((n, len(x) if np.ndim(x) else None) for n, x in example.fields.items())
        put["numbers"] += (x for value in example.fields.values() for x in np.ravel(value))
        put["number_bounds"].append(sum(length or 1 for _, length in lengths))
        put["shapes"].append(self.shapes.setdefault(lengths, len(self.shapes)))
        put["keys"].append(made.key)
        if len(put["keys"]) == 512:
            self.flush()

    def flush(self) -> None:
        for name, values in self.waiting.items():
            if name == "texts":
                self.files[name].write(b"".join(values))
            elif values:
                whole = np.concatenate(values) if name in ("ids", "mask") else values
                self.files[name].write(np.asarray(whole, COLUMNS[name]).tobytes())
            values.clear()

    def close(self) -> None:
        self.flush()
        for file in self.files.values():
            file.close()
        (self.folder / "shapes.json").write_text(json.dumps(list(self.shapes)))


def join(parts: list[Path], folder: Path, report: Report) -> None:
    """Put the shares of the ranks end to end, and write down what they are."""
    digest, shapes = hashlib.sha256(), {}
    for name in COLUMNS:
        with (folder / name).open("wb") as file:
            for text in joined(name, parts, shapes):
                digest.update(text)
                file.write(text)
    contents = {"shapes": list(shapes), "num_cut": report.num_cut, "reasons": report.reasons}
    contents["digest"] = hashlib.sha256((digest.hexdigest() + repr(list(shapes))).encode()).hexdigest()
    contents["sums"] = {name: files.pieces_digest(folder / name, CHECKED) for name in COLUMNS}
    text = json.dumps(contents)
    (folder / "contents.json").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n" + text)


def joined(name: str, parts: list[Path], shapes: dict[tuple, int]) -> Iterator[bytes]:
    """A column of all shares, piece by piece.

    Args:
        shapes: those met so far, by number; each share has counted its own.
    """
    end = np.zeros(1, np.int64)
    if name.endswith("_bounds"):
        yield end.tobytes()
    for part in parts:
        if name.endswith("_bounds"):
            bounds = np.concatenate([end, np.fromfile(part / name, np.int64)]).cumsum()
            end = bounds[-1:]
            yield bounds[1:].tobytes()
        elif name == "shapes":
            own = [tuple(map(tuple, shape)) for shape in json.loads((part / "shapes.json").read_text())]
            numbers = np.array([shapes.setdefault(shape, len(shapes)) for shape in own], np.int32)
            yield numbers[np.fromfile(part / name, np.int32)].tobytes()
        else:
            with (part / name).open("rb") as file:
                yield from iter(functools.partial(file.read, 1 << 24), b"")


def key_of(tokenizer: Any, encode: Callable, *options: Any) -> str:
    """A digest of all that decides tokens besides the records: tokenizer, template, options and code."""
    around = dict(inspect.getclosurevars(encode).nonlocals)
    around = {name: value for name, value in around.items() if value is not tokenizer}
    if other := [name for name, x in around.items() if not isinstance(x, str | int | float | list | None)]:
        raise TypeError(f"encode reads {other[0]}: give it text, numbers or a list, which name what it makes")
    own = Path(inspect.getsourcefile(encode))
    modules = [Path(__file__).with_name(f"{name}.py") for name in DECIDING]
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    facts = [
        options,
        encode.__qualname__,
        around,
        files.syntax(own, *modules),
        versions,
        getattr(tokenizer, "day", None),
    ]
    facts += [end_token(tokenizer), num_rows(tokenizer)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*.*")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def encode_rows(
    stream: Stream, size: int, split: Callable, attempt: Callable, start: int, stop: int
) -> Iterator[Made | str | dist.RunError]:
    """What `make` asks for: of rows start to stop, `size` of which make the records that `split` tells."""
    rows = stream.rows(start, stop)
    while group := list(itertools.islice(rows, size)):
        try:
            found = [record for row in group if (record := stream.record(*row))]
            records = list(split(found)) if found else []
        except dist.RunError as error:
            yield error
            continue
        for record in records:
            is_line = record.value is found[0].value and isinstance(group[0][0], bytes)
            text = group[0][0].strip() if is_line else json.dumps(record.value, default=str).encode()
            try:
                yield attempt(record, text)
            except LeftOut as reason:
                yield str(reason)
            except dist.RunError as error:
                yield error


def make(name: str, count: int, encode: Callable[[int, int], Iterable], what: str) -> Encoded:
    """The folder of this name in the cache, made if it is not there: a collective.

    Ranks that see one disk make one folder; where each node has its own, the ranks of each node make theirs.

    Args:
        name: a digest of all that decides its contents.
        count: of rows that are encoded.
        encode: of rows start to stop, in order: a `Made`; why a record is left out, a string; or an error.
        what: for the lines about progress.

    Raises:
        RunError: rows that are wrong, by name; or no record is left.
        Stopped: a stop was asked for.
    """
    root = files.cache_folder() / "data"
    folder, here = root / name, int(os.environ.get("LOCAL_RANK", dist.rank()))
    root.mkdir(parents=True, exist_ok=True)
    if not all(dist.gather([here > 0 or is_whole(folder)])):
        stamp = dist.from_main(lambda: uuid.uuid4().hex)
        # what rank 0 writes is there for all ranks that share its disk
        dist.from_main((root / f"{stamp}.seen").touch)
        shares = all(dist.gather([(root / f"{stamp}.seen").exists()]))
        dist.from_main((root / f"{stamp}.seen").unlink)
        index, size = dist.rank(), dist.world_size()
        if not shares:
            index, size = here, int(os.environ.get("LOCAL_WORLD_SIZE", size))
        group = range(dist.rank() - index, dist.rank() - index + size)
        unfinished = folder.with_name(f"{name}.{stamp}.{group[0]}.tmp")
        if index == 0:
            remove_left(root)
        # even places: two lines may make one record
        places = [min(count, 2 * ((count + 1) // 2 * i // size)) for i in (index, index + 1)]
        rows = dist.progress(encode(*places), what, places[1] - places[0])
        reports = dist.gather([write(unfinished / str(dist.rank()), rows)])
        refuse(reports, unfinished if index == 0 else None)
        if index == 0:
            own = [reports[r] for r in group]
            total = Report(sum(r.num_cut for r in own), sum((r.reasons for r in own), Counter()))
            with files.whole(folder, shared=True) as target:
                target.mkdir()
                join([unfinished / str(r) for r in group], target, total)
            files.remove(unfinished)
        dist.barrier()
        for _ in range(120):  # another node's view of a shared disk may be a minute old
            if (folder / "contents.json").exists():
                break
            time.sleep(0.5)
    return Encoded(folder)


def write(part: Path, rows: Iterable) -> Report:
    """Write a rank's share, and say how it went."""
    report = Report()
    try:
        writer = Writer(part)
        for found in rows:
            if isinstance(found, Made):
                writer.add(found)
                report.num_cut += found.is_cut
            elif isinstance(found, str):
                report.reasons[found] += 1
            else:
                report.errors.append(str(found))
            report.stopped = dist.is_told_to_stop()
            if report.stopped or len(report.errors) > MOST_ERRORS:
                break
        writer.close()
    except OSError as error:
        report.errors.append(f"cache folder {part.parent.parent}: {error.strerror}; set CLEANALIGN_CACHE")
    except dist.RunError as error:  # a file that cannot be read
        report.errors.append(str(error))
    return report


def refuse(reports: list[Report], unfinished: Path | None) -> None:
    """End the run on every rank if any has met an error, or a stop."""
    errors = [error for report in reports for error in report.errors]
    stopped = any(report.stopped for report in reports)
    if (errors or stopped) and unfinished:
        files.remove(unfinished)
    if stopped:
        raise dist.Stopped("stopped while data were encoded; the same command begins them again")
    if len(errors) > MOST_ERRORS:
        errors[MOST_ERRORS:] = ["and more"]
    if errors:
        raise dist.RunError("\n".join(errors))


def remove_left(root: Path) -> None:
    """Remove what killed runs have left unfinished, untouched for a day."""
    for path in root.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - max(p.stat().st_mtime for p in (path, *path.rglob("*"))) > 86400:
                shutil.rmtree(path)
