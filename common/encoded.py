"""Encoded data: examples on disk, made once by all ranks side by side, then mapped into memory by all.

A folder holds the examples of one data set as Arrow files, one of each rank that made it, and contents.json.
Its name is a digest of all that decides tokens, so that resumed runs, sweeps and other scripts find it. It is
there whole or not at all. A process reads of it what it asks for, and the ranks of a node share these pages.
"""

import bisect
import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import mmap
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from common import dist, files
from common.formats import LeftOut, Stream
from common.packed import Example, Tokens
from common.templates import end_token
from common.tokenizing import num_rows

SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.list_(pa.int32())),  # of each sequence
        "mask": pa.list_(pa.list_(pa.bool_())),
        "prompt": pa.string(),  # as JSON, as are fields and record
        "fields": pa.string(),
        "record": pa.binary(),
        "label": pa.string(),
        "key": pa.uint64(),  # examples with one question have one key
    }
)
GROUP = 256  # rows of a source that make a batch of a file, however many ranks there are; even, as in `make`
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
        return json.loads(self.row["prompt"][0].as_py())

    @functools.cached_property
    def record(self) -> dict:
        return json.loads(self.row["record"][0].as_py())


class Encoded(Sequence):
    """The examples of a folder, or some of its rows."""

    def __init__(self, folder: Path, rows: np.ndarray | None = None):
        self.folder, self.contents, self.areas = folder, read_contents(folder), []
        for name in self.contents["sums"]:
            with (folder / name).open("rb") as file:
                self.areas.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        readers = [pa.ipc.open_file(pa.py_buffer(area)) for area in self.areas]
        self.batches = [reader.get_batch(i) for reader in readers for i in range(reader.num_record_batches)]
        self.starts = [*itertools.accumulate(map(len, self.batches), initial=0)]
        self.rows = np.arange(self.starts[-1]) if rows is None else rows
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Stored:
        self.num_read += 1
        if self.num_read % MOST_TOUCHED == 0:
            for area in self.areas:  # the system keeps the pages; this process need not map them all
                area.madvise(mmap.MADV_DONTNEED)
        row = int(self.rows[i])
        part = bisect.bisect_right(self.starts, row) - 1
        example = Stored.__new__(Stored)  # whose prompt and record are not there yet
        example.row = self.batches[part].slice(row - self.starts[part], 1)
        sides = [
            [x.values.to_numpy(zero_copy_only=False) for x in example.row[n][0]] for n in ("ids", "mask")
        ]
        # copies: views of a batch would hold the pages around each of its examples
        example.sequences = [Tokens(ids.copy(), mask.copy()) for ids, mask in zip(*sides, strict=True)]
        example.label = example.row["label"][0].as_py()
        fields = json.loads(example.row["fields"][0].as_py())
        example.fields = {
            name: np.array(x, np.float32) if isinstance(x, list) else float(x) for name, x in fields.items()
        }
        return example

    def take(self, chosen: np.ndarray) -> "Encoded":
        """Those for which `chosen` (len(self),) is True."""
        return Encoded(self.folder, self.rows[chosen])

    @property
    def keys(self) -> np.ndarray:
        return np.concatenate([batch["key"].to_numpy() for batch in self.batches])[self.rows]

    @property
    def num_sequences(self) -> np.ndarray:
        """(len(self),)"""
        return np.concatenate([batch["ids"].value_lengths().to_numpy() for batch in self.batches])[self.rows]

    @functools.cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The fields, in the order in which they appear: numbers (len(self),), NaN where there is none."""
        found: dict[str, np.ndarray] = {}
        texts = [text for batch in self.batches for text in batch["fields"].to_pylist()]
        for i, row in enumerate(self.rows.tolist()):
            for name, x in json.loads(texts[row]).items():
                column = found.setdefault(name, np.full(len(self), np.nan))
                column[i] = np.nan if isinstance(x, list) else x
        return found

    def fingerprint(self) -> str:
        return hashlib.sha256(self.contents["digest"].encode() + self.rows.tobytes()).hexdigest()


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
        if sums == {name: files.pieces_digest(folder / name, CHECKED) for name in sums}:
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
    digests: list[str] = field(default_factory=list)  # of each batch


def as_batch(made: list[Made]) -> tuple[pa.RecordBatch, str]:
    """Examples as rows of SCHEMA, and a digest of them."""
    examples, digest = [m.example for m in made], hashlib.sha256()
    sequences = [s for example in examples for s in example.sequences]
    ends = [
        np.cumsum([0, *map(len, x)], dtype=np.int32)
        for x in ([e.sequences for e in examples], [s.ids for s in sequences])
    ]

    def nested(values: list[np.ndarray]) -> pa.Array:
        digest.update(flat := np.concatenate(values))
        return pa.ListArray.from_arrays(ends[0], pa.ListArray.from_arrays(ends[1], pa.array(flat)))

    columns = {
        "ids": nested([ids for ids, _ in sequences]),
        "mask": nested([mask for _, mask in sequences]),
        "prompt": [json.dumps(e.prompt) for e in examples],
        "fields": [json.dumps({n: np.asarray(x).tolist() for n, x in e.fields.items()}) for e in examples],
        "record": [m.record for m in made],
        "label": [e.label for e in examples],
        "key": [m.key for m in made],
    }
    digest.update(repr([x.tolist() for x in ends] + [*columns.values()][2:]).encode())
    return pa.record_batch(columns, SCHEMA), digest.hexdigest()


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
) -> Iterator[list[Made | str | dist.RunError]]:
    """What `make` asks for: of rows start to stop, `size` of which make the records that `split` tells."""
    rows = stream.rows(start, stop)
    while chunk := list(itertools.islice(rows, GROUP)):
        results: list[Any] = []
        for lines in (chunk[i : i + size] for i in range(0, len(chunk), size)):
            try:
                found = [record for row in lines if (record := stream.record(*row))]
                records = list(split(found)) if found else []
            except dist.RunError as error:
                records = []
                results.append(error)
            for record in records:
                is_line = record.value is found[0].value and isinstance(lines[0][0], bytes)
                text = lines[0][0].strip() if is_line else json.dumps(record.value, default=str).encode()
                try:
                    results.append(attempt(record, text))
                except LeftOut as reason:
                    results.append(str(reason))
                except dist.RunError as error:
                    results.append(error)
        yield results


def make(name: str, count: int, encode: Callable[[int, int], Iterable], what: str) -> Encoded:
    """The folder of this name in the cache, made if it is not there: a collective.

    Ranks that see one disk make one folder; where each node has its own, the ranks of each node make theirs.

    Args:
        name: a digest of all that decides its contents.
        count: of rows that are encoded.
        encode: of rows start to stop, of each GROUP: a `Made`, why a record is left out, or an error.
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
        # whole groups, alike for any number of ranks, and two lines that make one record are in one
        start, stop = (min(count, -(-count // GROUP) * i // size * GROUP) for i in (index, index + 1))
        found = dist.progress(encode(start, stop), what, stop - start, len)
        reports = dist.gather([write(unfinished / f"{dist.rank()}.arrow", found)])
        refuse(reports, unfinished if index == 0 else None)
        if index == 0:
            finish(unfinished, folder, {f"{r}.arrow": reports[r] for r in group})
        dist.barrier()
        for _ in range(120):  # another node's view of a shared disk may be a minute old
            if (folder / "contents.json").exists():
                break
            time.sleep(0.5)
    return Encoded(folder)


def write(part: Path, groups: Iterable[list]) -> Report:
    """Write a rank's share, and say how it went."""
    report = Report()
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for found in groups:
                made = [x for x in found if isinstance(x, Made)]
                report.num_cut += sum(x.is_cut for x in made)
                report.reasons.update(x for x in found if isinstance(x, str))
                report.errors += [str(x) for x in found if isinstance(x, dist.RunError)]
                if made:
                    batch, digest = as_batch(made)
                    writer.write_batch(batch)
                    report.digests.append(digest)
                report.stopped = dist.is_told_to_stop()
                if report.stopped or len(report.errors) > MOST_ERRORS:
                    break
    except OSError as error:
        report.errors.append(f"cache folder {part.parent.parent}: {error.strerror}; set CLEANALIGN_CACHE")
    except dist.RunError as error:  # a file that cannot be read
        report.errors.append(str(error))
    return report


def finish(unfinished: Path, folder: Path, reports: dict[str, Report]) -> None:
    """Write down what the shares of the ranks are, by name, and give them their place."""
    digests = [digest for report in reports.values() for digest in report.digests]
    contents = {
        "num_cut": sum(report.num_cut for report in reports.values()),
        "reasons": sum((report.reasons for report in reports.values()), Counter()),
        "digest": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "sums": {name: files.pieces_digest(unfinished / name, CHECKED) for name in reports},
    }
    text = json.dumps(contents)
    (unfinished / "contents.json").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n" + text)
    with files.whole(folder, shared=True) as target:
        os.rename(unfinished, target)


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
    """Remove what killed runs have left unfinished in the cache, untouched for a day."""
    left = (root.parent.glob("*.tmp"), root.glob("*.tmp"), root.glob("files/*.tmp"), root.glob("*.seen"))
    for path in itertools.chain(*left):
        with contextlib.suppress(OSError):
            if time.time() - max(p.stat().st_mtime for p in (path, *path.rglob("*"))) > 86400:
                files.remove(path)
