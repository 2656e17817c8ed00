"""Files that outlive a kill: whole ones, lines that go on, a run's folder, fingerprints, caches.

A process may be killed between any two instructions, and the same command must then go on or begin anew
without taking half a file for a whole one. So a name that others look for is only ever given to what is
complete, and a file that grows does so by lines, of which a kill tears at most the last.
"""

import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import pickle
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from common import dist

UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)

# -------------------------------------------------------------------------------------------- whole or absent


def temporary(path: Path) -> Path:
    """The name under which `path` is written, in the same folder: a rename cannot cross file systems."""
    return path.with_name(f"{path.name}.tmp")


def remove(path: Path) -> None:
    """Delete a file, or a folder and all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():  # some network file systems refuse this for folders, and need none
            raise
    finally:
        os.close(number)


def finish(unfinished: Path, path: Path, keep: bool = False) -> None:
    """Give something complete its final name, in place of what has that name.

    The order matters. The contents reach the disk before the rename, or a crash of the machine could leave
    the name without them; the folder that holds the name reaches it after. A file is replaced in one step. A
    folder that is not empty cannot be: it is moved out of the way first, not deleted in place, so that a kill
    leaves the name with all of the old folder, with nothing, or with all of the new one.

    Args:
        keep: a folder that has the name stays, and what is unfinished stays too.
    """
    for part in (*unfinished.rglob("*"), unfinished):
        if part.is_file():
            with contextlib.suppress(OSError):  # of a file system without such rights
                part.chmod(0o666 & ~UMASK)  # safetensors makes files that their owner alone may read
        sync(part)
    old = path.with_name(f"{path.name}.old.tmp")
    if path.is_dir() and unfinished.is_dir() and not keep:
        remove(old)
        os.rename(path, old)
    try:
        os.replace(unfinished, path)
    except OSError:
        if not (keep and path.is_dir()):
            raise
    sync(path.parent)
    remove(old)


@contextlib.contextmanager
def whole(path: Path, shared: bool = False) -> Iterator[Path]:
    """A name to write a file or folder under; it takes the name `path` when the block ends without an error.

    What an earlier attempt left under that name is removed first.

    Args:
        shared: several runs may write `path` at once, each under a name of its own; of files the last one
            stays, of folders the first, which others may be reading.
    """
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp") if shared else temporary(path)
    remove(unfinished)
    try:
        yield unfinished
        finish(unfinished, path, keep=shared)
    finally:
        remove(unfinished)


@contextlib.contextmanager
def beside(folder: str) -> Iterator[str]:
    """A folder in `folder` that all ranks see, and that is gone after the block; a collective."""
    made = dist.from_main(lambda: tempfile.mkdtemp(prefix="tmp-", dir=folder))
    try:
        yield made
        dist.barrier()
    finally:
        if dist.is_main():
            remove(Path(made))


def write(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------- JSON lines


def as_lines(records: Iterable[dict]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def append(path: Path, *records: dict) -> None:
    """Add records to a file of JSON lines."""
    with path.open("a") as file:
        file.write(as_lines(records))


def read_json(path: Path) -> dict:
    """The object in a JSON file of a run.

    Raises:
        RunError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        error: object = f"found {type(found).__name__}, not an object"
    except (ValueError, RecursionError, OSError) as reason:
        error = reason
    raise damaged(path, error)


def damaged(path: Path, reason: object) -> dist.RunError:
    """The error of a file in a run's folder that a run did not leave so."""
    return dist.RunError(f"{path}: damaged, {reason}; put it back, or --overwrite starts anew")


def read_rows(path: Path, needed: str = "") -> list[dict]:
    """The complete rows of a .jsonl file, none if there is no file; a last line torn by a kill is skipped.

    Raises:
        RunError: another line is no object with the field `needed`.
    """
    try:
        rows, lines = [], path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise damaged(path, error.strerror) from error
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or needed and not isinstance(row[needed], int):
                raise ValueError(f"no row with {needed}")
            rows.append(row)
        except (ValueError, KeyError, RecursionError) as error:
            if n < len(lines):
                raise dist.RunError(
                    f"{path}:{n}: damaged, {error}; mend or delete the line, or --overwrite starts anew"
                ) from error
    return rows


def cut_torn_line(path: Path) -> int:
    """Shorten a file to the end of its last complete line, or make an empty one. -> the number of lines

    It is cut in place: what is written anew could be lost to a kill in the middle of it.
    """
    path.touch()
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)
    return content.count(b"\n")


def part_name(path: Path, items: list, key: Any) -> Path:
    """Where the lines of `path` stand until all are there, of these items and this key alone.

    What the lines are made of has the suffix .replies.
    """
    return path.with_name(f"{path.name}.{digest(pickle.dumps((key, items)))[:8]}.part")


def write_lines(
    path: Path, items: list, key: Any, work: Callable[[list], list[dict]], size: int | None = None
) -> None:
    """Write work(items) as JSON lines, part by part; not done, the next call goes on where it stopped.

    The lines stand in `part_name` until the last is there, so who finds `path` finds all of them.

    Args:
        key: what the lines depend on besides the items; other items or another key start anew.
        work: a collective; every rank gets the same items and returns as many records.
        size: items of a part, by default 256 for each rank. Work that generates takes all at once and has
            `generate` keep its replies: after each part the ranks would wait for the longest one.

    Raises:
        Stopped: a stop was asked for; what is done stays.
    """
    unfinished, size = part_name(path, items, key), size or 256 * dist.world_size()
    starts = range(dist.from_main(lambda: cut_torn_line(unfinished)), len(items), size)
    for start in dist.progress(starts, path.name, len(starts) * size, lambda _: size):
        records = work(items[start : start + size])
        if dist.is_main():
            append(unfinished, *records)
        if dist.poll_stop():
            raise dist.Stopped(
                f"{path}: stopped after {start + len(records)} records; the same command goes on from there"
            )
    if dist.is_main():
        finish(unfinished, path)
        remove(unfinished.with_suffix(".replies"))
    dist.barrier()


class Journal:
    """Records by key that outlive a kill, and that the ranks share without a collective.

    Each rank appends to a file of its own, and reads the files of all. A record is on file before it is used;
    one whose line a kill has torn is missing again.
    """

    def __init__(self, folder: Path):
        """folder: one that all ranks see. Errors in it are forgotten, so that what failed is tried again."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.mine, self.lock = folder, folder / f"rank_{dist.rank()}.jsonl", threading.Lock()
        dist.from_main(self._forget_errors)
        self.refresh()

    def _forget_errors(self) -> None:
        for path in self.folder.glob("rank_*.jsonl"):
            write(path, as_lines(row for row in read_rows(path) if "error" not in row))

    def add(self, key: str, record: dict) -> None:
        """Append a record; threads may call this."""
        with self.lock:
            append(self.mine, {"key": key, **record})

    def refresh(self) -> None:
        """Read what any rank has written."""
        rows = [row for path in sorted(self.folder.glob("rank_*.jsonl")) for row in read_rows(path)]
        self.records: dict[str, dict] = {row.pop("key"): row for row in rows}

    def collect(self, items: dict[str, Any], make: Callable[[Any], dict], threads: int) -> list[dict]:
        """The record of each item: the one on file, else make(item), which is then never asked for again.

        A rank makes its share, in threads, and waits for the others' records to appear in their files: a slow
        one holds up no collective. An error, or a stop that was asked for, is put on file too, so that it
        ends every rank with the same line, a RunError or Stopped.

        Args:
            items: by key, a hexadecimal number; every rank passes the same.
        """

        def attempt(key: str) -> None:
            try:
                if dist.is_told_to_stop():
                    raise dist.Stopped(f"{self.folder}: stopped; the same command goes on from what is there")
                self.add(key, make(items[key]))
            except dist.RunError as error:
                self.add(key, {"error": str(error), "stopped": isinstance(error, dist.Stopped)})
                raise

        share = [key for key in items if int(key, 16) % dist.world_size() == dist.rank()]
        missing = [key for key in share if key not in self.records]
        with ThreadPoolExecutor(threads) as pool:
            try:
                list(dist.progress(pool.map(attempt, missing), "answers of the server", len(missing)))
            finally:
                pool.shutdown(cancel_futures=True)
        while True:
            self.refresh()
            found = [self.records[key] for key in items if key in self.records]
            for record in found:
                if "error" in record:
                    raise (dist.Stopped if record["stopped"] else dist.RunError)(record["error"])
            if len(found) == len(items):
                return found
            time.sleep(0.5)


# ------------------------------------------------------------------------------ folders of runs and of models


LOCK = ".lock"  # the file in a run's folder that the process writing there holds
_locks: dict[Path, IO] = {}


def lock(folder: Path) -> None:
    """Claim a folder for this process until `unlock`; the system frees what a dead one held, however it died.

    Raises:
        RunError: another living process has it.
    """
    path = folder.resolve() / LOCK
    if path in _locks:  # a stage, or a second run in one process
        return
    pipeline = path.parent.parent / LOCK  # which writes into the folders of its stages, finished ones too
    if pipeline.exists() and pipeline not in _locks and (held := _claim(pipeline, folder)):
        held.close()
    file = _claim(path, folder)
    if file is None:
        return
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _locks[path] = file


def _claim(path: Path, folder: Path) -> IO | None:
    """The file of a lock, held; None on a file system without locks."""
    # a link of somebody else's run folder would have us write into a file that it points to
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise dist.RunError(
            f"output_dir {folder}: the run of process {file.read() or 'unknown'} is still writing there; "
            "wait for it to end, or give another --output_dir"
        ) from error
    except OSError:
        return file.close()
    return file


def unlock(folder: Path) -> None:
    """Let others have the folder while this process goes on."""
    file = _locks.pop(folder.resolve() / LOCK, None)
    if file is not None:
        file.close()


def model_folder(model: str, needs_weights: bool = True) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file name or None) for `model`: toy, run folder, folder, hub id, .gguf file."""
    if model in ("toy", "toy/attribute_model"):
        return str(toy_folder() / (model.partition("/")[2] or "model")), None
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise dist.RunError(f"model {model}: no such file")
        return str(path.parent), path.name
    if (path / "args.json").exists() and not (path / "model").exists():
        raise dist.RunError(f"model {model}: a run folder without model/; that run has not finished")
    if (path / "model").is_dir():
        path = path / "model"
    if not path.exists():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise dist.RunError(f"model {model}: no such folder")
        return model, None
    if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        raise dist.RunError(f"model {model}: no config.json in this folder; expected a Hugging Face model")
    if needs_weights and not any(f.suffix in (".safetensors", ".bin") for f in path.iterdir()):
        raise dist.RunError(f"model {model}: no weights (*.safetensors or *.bin) in this folder")
    return str(path), None


def pipeline_folder(model: str) -> Path:
    """The folder of a model of images: toy, a run folder or a folder; a hub id stays as it is."""
    path = toy_folder("images") / "model" if model == "toy" else Path(model).expanduser()
    return path / "model" if (path / "model").is_dir() else path


def toy_folder(world: str = "language") -> Path:
    """The files of a toy world, language or images."""
    try:
        return importlib.import_module(f"toy.{world}").ensure()
    except OSError as error:
        raise dist.RunError(f"cannot unpack the toy world: {error}") from error


# ---------------------------------------------------------------------------------------------- fingerprints


def digest(content: str | bytes) -> str:
    """16 hexadecimal digits that tell content from any other."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]


def fingerprint(model: str, of_images: bool = False) -> list[tuple[str, int, str]]:
    """Tells a model from others, and from the same folder trained again; a hub id is known by its name.

    Of each file its name, size and 64 pieces that are spread over it: other training changes all weights.
    The card of a model is for people, and names where the run was.
    """
    folder, file = (str(pipeline_folder(model)), None) if of_images else model_folder(model)
    path = Path(folder)
    if not path.is_dir():
        return [(folder, 0, "")]
    parts = sorted(
        p for p in path.rglob("*") if p.is_file() and file in (None, p.name) and p.name != "README.md"
    )
    return [(str(part.relative_to(path)), part.stat().st_size, pieces_digest(part)) for part in parts]


def pieces_digest(path: Path, size: int = 4096) -> str:
    """Digest of 64 pieces of a file, of this many bytes each, that are spread over it."""
    found, whole_size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as opened:
        for start in range(0, whole_size, max(size, whole_size // 64)):
            opened.seek(start)
            found.update(opened.read(size))
    return found.hexdigest()


def inputs(model: str, tokenizer: Any, *datasets: Iterable) -> dict[str, str]:
    """Fingerprints of what a run is made from besides its options, on rank 0; by names that a person reads.

    Args:
        tokenizer: None for a model of images.
        datasets: with a fingerprint of their own, or of anything that JSON takes.
    """
    if not dist.is_main():
        return {}

    def of_data(dataset: Iterable) -> str:
        own = getattr(dataset, "fingerprint", None)
        return own() if own else json.dumps(list(dataset), default=str)

    texts = {
        "starting model": repr(fingerprint(model, of_images=tokenizer is None)),
        "data": "".join(map(of_data, datasets)),
        "chat template": str(getattr(tokenizer, "chat_template", None)),
    }
    day = getattr(tokenizer, "day", None)  # that the template writes
    return {name: digest(x) for name, x in texts.items()} | ({"day of the chat template": day} if day else {})


def syntax(*paths: Path) -> str:
    """Fingerprint of what Python files do: comments and docstrings may change."""
    return digest("".join(_dumped(path, path.stat().st_mtime_ns) for path in paths))


@functools.cache
def _dumped(path: Path, changed: int) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""  # a docstring
    return ast.dump(tree)


def code(script: Path) -> dict[str, str]:
    """Fingerprints of a script and of common/."""
    return {"script": syntax(script), "common/": syntax(*sorted(Path(__file__).parent.glob("*.py")))}


def versions() -> dict[str, str]:
    """Of the libraries that decide numbers."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


# ---------------------------------------------------------------------------------------------------- caches


def cache_folder() -> Path:
    """Where things that outlive a run are kept: $CLEANALIGN_CACHE, or ~/.cache/cleanalign."""
    folder = Path(os.environ.get("CLEANALIGN_CACHE") or Path.home() / ".cache" / "cleanalign")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        reason = f"{error.strerror}; set CLEANALIGN_CACHE to another one"
        raise dist.RunError(f"cache folder {folder}: {reason}") from error


def remembered(path: Path, look: Callable[[], dict]) -> dict:
    """What `look` tells about a file, asked again when the file's size, its time or this code has changed."""
    at = path.stat()
    state = (at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino)  # what is put back keeps not all of them
    key = repr((str(path.resolve()), state, syntax(Path(inspect.getsourcefile(look)))))
    store = cache_folder() / "data" / "files" / f"{digest(key)}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(store.read_text())
    found = look()
    if time.time() - at.st_mtime > 2:  # a second change within a tick of the clock would not be seen
        store.parent.mkdir(parents=True, exist_ok=True)
        with whole(store, shared=True) as unfinished:
            unfinished.write_text(json.dumps(found))
    return found


def cached(compute: Callable[[], torch.Tensor], name: str, model: str, *key: Any) -> torch.Tensor:
    """compute(), a collective, or its result from an earlier run with the same model files and key."""
    store = cache_folder() / f"{name}-{digest(pickle.dumps((fingerprint(model), key)))}.pt"

    def read() -> torch.Tensor | None:
        with contextlib.suppress(Exception):  # it is not there, or damaged: made anew
            return torch.load(store)

    # rank 0's disk decides and is read, alike for all: another node may have its own cache folder
    found = dist.from_main(read)
    if found is None:
        found = compute()
        if dist.is_main():
            with whole(store, shared=True) as unfinished:
                torch.save(found.cpu(), unfinished)
    return found
