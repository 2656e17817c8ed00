"""Streams: files and hub data sets -> the rows of a split, read from any one on without holding the others.

What cannot be read ends the run with one line that names the file, the line in it, what was found and what
was expected.
"""

import codecs
import contextlib
import gzip
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import dist
from common.files import remembered, toy_folder


class Record(NamedTuple):
    """One line of a data set and where it stands, for error messages."""

    value: dict
    where: str


def wrong(where: str, found: Any, expected: str) -> dist.RunError:
    if isinstance(found, dict):
        found = "the fields " + ", ".join(k if v is not None else f"{k} (null)" for k, v in found.items())
    else:
        found = str(found)[:80]
    found = "".join(c if c.isprintable() else repr(c)[1:-1] for c in found)  # one line, whatever it holds
    return dist.RunError(f"{where}: found {found}; expected {expected}")


@contextlib.contextmanager
def told_as(option: str) -> Iterator[None]:
    """Within the block what is wrong with a data set or a model is said of the option that named it."""
    try:
        yield
    except dist.RunError as error:
        message = re.sub("^(dataset|(cannot load the )?model) ", f"{option} ", str(error))
        raise type(error)(message) from error


class LeftOut(Exception):
    """A record that is counted, by this reason, and not used."""


def first_line(error: BaseException) -> str:
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    if first.startswith(refused := "Weights only load failed"):
        return refused  # torch goes on with how to run what it refuses to unpickle
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def read_sources(names: str, what: str = "dataset") -> list[tuple[str, float]]:
    """(source, weight) of each part of a,b*2; a * in the name of an existing file is part of the name."""
    if not names:
        raise dist.RunError(f"{what} is not set; with a model of your own say which, or --{what} toy")
    sources = []
    whole = Path(names).expanduser().exists()  # a comma in the name of a file separates nothing
    for name in [names] if whole else map(str.strip, names.split(",")):
        source, star, weight = name.rpartition("*")
        if not star or Path(name).expanduser().exists():
            source, weight = name, "1"
        if not source or not re.fullmatch(r"\d*\.?\d+", weight) or float(weight) == 0:
            raise wrong(what, names, "names joined by commas, each with an optional *weight above 0")
        sources.append((source, float(weight)))
    return sources


SPLITS = {"train": ("train",), "test": ("test", "validation", "val", "eval", "dev")}


Row = tuple[bytes | dict, str]  # a line that is not parsed yet, or a row of a table; and where it stands


@dataclass(frozen=True)
class Stream:
    """The rows of a data set's split, which are read from any one on without holding the others."""

    parts: list[
        tuple[Callable[[int, int | None], Iterator[Row]], int]
    ]  # of each file: rows i to k, and how many
    digest: str  # of all that is in them
    split: str | None = None  # the one whose rows are meant; None: all

    def __len__(self) -> int:
        return sum(count for _, count in self.parts)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for read, count in self.parts:
            if start < count and stop > 0:
                yield from read(max(start, 0), min(stop, count))
            start, stop = start - count, stop - count

    def record(self, raw: bytes | dict, where: str) -> Record | None:
        """The record of a row; None if it is of another split."""
        value = as_object(raw, where)
        return None if self.split and split_of(value, where) != self.split else Record(value, where)

    def records(self) -> Iterator[Record]:
        found = (self.record(*row) for row in self.rows(0, len(self)))
        return (record for record in found if record is not None)


def read_records(source: str, split: str, kind: str) -> list[Record] | None:
    """All records that `open_records` finds."""
    stream = open_records(source, split, kind)
    return None if stream is None else list(stream.records())


def open_records(source: str, split: str, kind: str) -> Stream | None:
    """The records of one data set's split ("train" or "test"); None if it has no such split.

    Where a data set is a single file, a field `split` tells the records of one split from those of others.
    """
    path = toy_folder() / kind if source == "toy" else Path(source).expanduser()
    if path.is_dir():
        return open_folder(path, source, SPLITS[split])
    if path.is_file():
        splits = survey(path)["splits"]
        if split not in (splits or ["train"]):
            return None
        return open_files([path], split if splits else None)
    if path.suffix in (".jsonl", ".json", ".parquet", ".gz") or not re.match(r"[\w.-]+/[\w.-]+(:|$)", source):
        raise wrong(f"dataset {source}", "no such file", "a file, a folder, or hub/name[:config[:split]]")
    return open_hub(source, SPLITS[split])


def split_of(value: dict, where: str) -> str:
    """The split that a record of a single file names."""
    own = str(value.get("split")).lower()
    for split, names in SPLITS.items():
        if own.startswith(names):  # train_sft, test_prefs
            return split
    raise wrong(
        where, f"split {value.get('split')!r}", "train, test or validation; else another name for the field"
    )


def open_folder(path: Path, source: str, names: tuple[str, ...]) -> Stream | None:
    """The first of the splits `names` in a folder: of files, cloned from the hub, or by save_to_disk."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        table = load_table(source, "load_from_disk", str(path))
        tables = table if isinstance(table, dict) else {"train": table}
        return next((open_table(tables[name], f"{source} {name}") for name in names if name in tables), None)
    places = [*path.iterdir(), *(path / "data").glob("*")]
    for name in names:
        if found := sorted(f for f in places if re.match(rf"{name}[.-]", f.name)):
            refuse_twice(found, path)
            return open_files(found)
    if "train" in names:
        raise wrong(f"dataset {source}", "no train.* file", "train.jsonl, .json or .parquet in it or data/")
    return None


def refuse_twice(found: list[Path], folder: Path) -> None:
    """End the run if the files of a split are the same one twice, or lack a shard of name-00000-of-00003."""
    stems = [f.name.removesuffix(".gz").rpartition(".")[0] for f in found]
    shards = [m for stem in stems if (m := re.search(r"-(\d+)-of-(\d+)$", stem))]
    shown = ", ".join(str(f.relative_to(folder)) for f in found[:4])
    is_mixed = len({f.parent for f in found}) > 1 or 0 < len(shards) < len(found)
    if is_mixed or len({*stems}) < len(stems) or len({m[2] for m in shards}) > 1:
        raise wrong(f"dataset {folder}", shown, "one of them: the records would be read twice")
    missing = {*range(int(shards[0][2]))} - {int(m[1]) for m in shards} if shards else ()
    if missing:
        raise wrong(f"dataset {folder}", shown, f"number {min(missing)} of {shards[0][2]} too")


def open_hub(source: str, names: tuple[str, ...]) -> Stream | None:
    """The rows of the split that source names, else of the first of `names` that the data set has.

    Some keep their parts in folders: hub/name:data_dir=folder, as Anthropic/hh-rlhf:data_dir=harmless-base.
    """
    name, config, chosen = (*source.split(":", 2), "", "")[:3]
    inside = {"data_dir": config[len("data_dir=") :]} if config.startswith("data_dir=") else {}
    if chosen and "train" not in names:
        return None
    own = None if inside else config or None
    table = load_table(source, "load_dataset", name, own, split=chosen or None, **inside)
    if not chosen:
        split = next((n for n in names if n in table), None)
        if split is None and "train" in names:
            example = ":".join((name, config, *table)[:3])
            raise wrong(f"dataset {source}", f"the splits {', '.join(table)}", example)
        table = table[split] if split else None
    return None if table is None else open_table(table, source)


def load_table(source: str, how: str, *given: Any, **options: Any) -> Any:
    import datasets

    try:
        found = getattr(datasets, how)(*given, **options)
        for table in found.values() if isinstance(found, dict) else [found]:
            refuse_twins(getattr(table, "column_names", []))
        return found
    except Exception as error:  # the library raises many kinds
        is_hollow = isinstance(error, datasets.exceptions.DatasetGenerationError)  # the cause says more
        reason = first_line((is_hollow and error.__cause__) or error)
        raise dist.RunError(f"dataset {source}: cannot be loaded: {reason}") from error


CALLS = ("tools", "functions", "tool_calls", "function_call", "chat_template_kwargs")


def of_table(value: Any, is_call: bool = False) -> Any:
    """A row of a table, whose calls and schemas are without the nulls that it fills into what others have."""
    if isinstance(value, dict):
        return {
            k: of_table(x, is_call or k in CALLS) for k, x in value.items() if not is_call or x is not None
        }
    return [of_table(x, is_call) for x in value] if isinstance(value, list) else value


def open_table(table: Any, where: str) -> Stream:
    """The rows of a table of the datasets library, whose fingerprint follows what it was made of."""

    def read(start: int, stop: int | None) -> Iterator[Row]:
        return ((of_table(table[i]), f"{where} row {i}") for i in range(len(table))[start:stop])

    digest = getattr(table, "_fingerprint", None)
    return Stream([(read, len(table))], digest or hashlib.sha256(json.dumps([*table]).encode()).hexdigest())


def open_files(paths: list[Path], split: str | None = None) -> Stream:
    found = [survey(path) for path in paths]
    parts = [(partial(read_rows, path), x["count"]) for path, x in zip(paths, found, strict=True)]
    return Stream(parts, " ".join(x["digest"] for x in found), split)


def survey(path: Path) -> dict[str, Any]:
    """What one look at a file tells: `count` of its rows, `digest`, and `splits` where rows name theirs."""

    def look() -> dict[str, Any]:
        digest, count, splits = hashlib.sha256(), 0, set()
        for raw, where in read_rows(path):
            count += 1
            text = raw if isinstance(raw, bytes) else json.dumps(raw, default=str).encode()
            digest.update(text)
            if b'"split"' in text:
                with contextlib.suppress(dist.RunError):  # told where it is read
                    value = {}
                    value = as_object(raw, where)
                splits |= {split_of(value, where)} if value.get("split") not in (None, "") else set()
        return {"count": count, "digest": digest.hexdigest(), "splits": sorted(splits)}

    return remembered(path, look)


def read_file(path: Path) -> list[Record]:
    """Records of a .jsonl, .json or .parquet file, the first two also gzipped."""
    return [Record(as_object(*row), row[1]) for row in read_rows(path)]


def read_rows(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Rows start to stop of such a file, lines as they stand."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in (".jsonl", ".json", ".parquet"):
        raise wrong(f"dataset {path}", f"a {suffix or 'nameless'} file", ".jsonl, .json or .parquet")
    try:
        if suffix == ".parquet":
            yield from read_parquet(path, start, stop)
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(1 << 16)
            file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
            head = head.removeprefix(codecs.BOM_UTF8)
            if re.match(rb"\s*\[\s*\{" if suffix == ".jsonl" else rb"\s*\[", head):  # as red-team data of HH
                items = enumerate(parse(file.read(), str(path)))
                yield from itertools.islice(((item, f"{path} item {i}") for i, item in items), start, stop)
                return
            # cut at line feeds only: JSON strings may hold other line separators
            lines = ((line, n) for n, line in enumerate(file, 1) if not line.isspace())
            for line, n in itertools.islice(lines, start, stop):
                yield line, f"{path}:{n}"
    except dist.RunError:
        raise
    except Exception as error:  # torn archives raise many kinds
        raise dist.RunError(f"dataset {path}: cannot be read: {first_line(error)}") from error


def read_parquet(path: Path, start: int, stop: int | None) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        refuse_twins(file.schema_arrow.names)
        at = 0
        for batch in file.iter_batches(1024):
            wanted = range(at, at + len(batch))[max(0, start - at) : stop and max(0, stop - at)]
            rows = map(of_table, batch.slice(wanted.start - at, len(wanted)).to_pylist())
            yield from ((row, f"{path} row {i}") for i, row in zip(wanted, rows, strict=True))
            at += len(batch)


def as_object(raw: Any, where: str) -> dict:
    """The JSON object that a row is, or holds."""
    value = parse(raw, where) if isinstance(raw, bytes) else raw
    if not isinstance(value, dict):
        raise wrong(where, type(value).__name__, "a JSON object")
    return value


def refuse_twins(names: list[str]) -> None:
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"the field {twice[0]} is there twice")


def as_fields(pairs: list[tuple[str, Any]]) -> dict:
    """An object of JSON; of two fields of one name the parser itself would keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        refuse_twins([name for name, _ in pairs])
    return value


def parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=as_fields)
    except (ValueError, RecursionError) as error:
        raise wrong(where, f"no valid JSON ({first_line(error)})", "one object a line") from error
