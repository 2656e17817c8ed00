"""Writes that a kill leaves whole or absent, lines and records that go on after one, caches, fingerprints."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from common import dist, files


class Killed(BaseException):
    """Ends the process, as far as the code under test can tell."""


def put(path: Path, text: str, folder: bool) -> None:
    if folder:
        path.mkdir()
        (path / "one").write_text(text)
        (path / "two").write_text(text)
    else:
        path.write_text(text)


def seen(path: Path) -> Any:
    return {p.name: p.read_text() for p in path.iterdir()} if path.is_dir() else path.read_text()


# whole or absent


@pytest.mark.parametrize("folder", [False, True])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "model"
    for text in ("first", "second"):
        with pytest.raises(Killed), files.whole(path) as unfinished:
            put(unfinished, "half", folder)
            raise Killed
        with files.whole(path) as unfinished:
            put(unfinished, text, folder)
        assert seen(path) == ({"one": text, "two": text} if folder else text)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_kill_at_any_moment_never_gives_the_name_to_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    path = tmp_path / "model"
    whole = [{"one": text, "two": text} if folder else text for text in ("old", "new")]
    for moment in range(20):
        files.remove(path)
        put(path, "old", folder)
        left = moment

        def counted(honest: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return honest(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:  # dies before the moment-th step that changes the disk
            for name in ("replace", "rename", "fsync", "unlink", "rmdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                unfinished = files.temporary(path)
                put(unfinished, "new", folder)
                files.finish(unfinished, path)
            except Killed:
                pass
            else:
                break
        assert not path.exists() or seen(path) in whole
        with files.whole(path) as unfinished:  # the same command again
            put(unfinished, "new", folder)
        assert seen(path) == whole[1] and [p.name for p in tmp_path.iterdir()] == ["model"]
    assert moment >= (8 if folder else 3)


def test_contents_are_on_disk_before_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *paths: order.append("rename") or replace(*paths))
    monkeypatch.setattr(
        os, "fsync", lambda n: order.append(Path(os.readlink(f"/proc/self/fd/{n}")).name) or fsync(n)
    )
    with files.whole(tmp_path / "model") as unfinished:
        put(unfinished, "new", folder=True)
    assert set(order[:2]) == {"one", "two"}
    assert order[2:] == ["model.tmp", "rename", tmp_path.name]


def test_what_a_kill_left_under_the_temporary_name_is_not_taken_over(tmp_path: Path) -> None:
    put(files.temporary(tmp_path / "model"), "half", folder=True)
    with files.whole(tmp_path / "model") as unfinished:
        unfinished.mkdir()
    assert seen(tmp_path / "model") == {}


def test_runs_that_write_a_shared_file_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "cache.pt"
    with files.whole(path, shared=True) as one, files.whole(path, shared=True) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["cache.pt"]


# JSON lines


def test_a_folder_in_use_is_refused_until_its_process_is_dead(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom common import files\n"
        f"files.lock(Path({str(tmp_path)!r}))\nprint('locked', flush=True)\ntime.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(dist.RunError, match=f"the run of process {other.pid} is still writing there"):
        files.lock(tmp_path)
    other.kill()
    other.wait()
    files.lock(tmp_path)
    files.lock(tmp_path)  # ours already


def test_rows_of_a_torn_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert files.read_rows(path) == []
    assert files.cut_torn_line(path) == 0 and path.read_text() == ""
    path.write_text(files.as_lines([{"step": 1}, {"step": 2}]) + '{"st')
    assert files.read_rows(path) == [{"step": 1}, {"step": 2}]
    assert files.cut_torn_line(path) == 2 and path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"step": "a"}', "[1]", '{"st', "[" * 100_000, "\udcff"])
def test_a_damaged_row_that_is_not_the_last_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'.encode(errors="surrogateescape"))
    with pytest.raises(dist.RunError, match=r"metrics.jsonl:2: damaged, .*--overwrite starts anew"):
        files.read_rows(path, "step")


def test_lines_go_on_after_a_kill_and_begin_anew_for_other_items_or_another_key(
    tmp_path: Path, device: torch.device
) -> None:
    path, asked = tmp_path / "lines.jsonl", []

    def work(items: list[int], limit: int = 10**9) -> list[dict]:
        if items[0] >= limit:
            raise Killed
        asked.extend(items)
        return [{"square": item**2} for item in items]

    items = list(range(600))
    with pytest.raises(Killed):
        files.write_lines(path, items, "key", lambda chunk: work(chunk, 512))
    (part,) = tmp_path.iterdir()
    assert not path.exists() and len(part.read_text().splitlines()) == 512
    part.write_text("".join(part.read_text().splitlines(True)[:300]) + '{"squ')  # the kill tore a line
    kept = part.read_bytes()
    asked.clear()
    files.write_lines(path, items, "key", work)
    assert asked == items[300:]
    assert [row["square"] for row in files.read_rows(path)] == [i**2 for i in items]
    for key, others in (("other key", items), ("key", items[1:])):
        part.write_bytes(kept)
        asked.clear()
        files.write_lines(path, others, key, work)
        assert asked == others and len(files.read_rows(path)) == len(others)


def test_no_items_make_an_empty_file(tmp_path: Path, device: torch.device) -> None:
    files.write_lines(tmp_path / "lines.jsonl", [], "key", lambda items: [])
    assert (tmp_path / "lines.jsonl").read_text() == ""


def parts(folder: str, **size: int) -> list[int]:
    """How many lines are made at a time; called on each rank."""
    sizes: list[int] = []
    path = Path(folder) / f"lines{len(size)}.jsonl"
    files.write_lines(path, [*range(700)], "", lambda x: sizes.append(len(x)) or [{}] * len(x), **size)
    return sizes


def test_parts_grow_with_the_ranks_or_are_of_the_size_asked_for(tmp_path: Path, two_ranks: Any) -> None:
    assert two_ranks("test_files:parts", folder=str(tmp_path)) == [[512, 188]] * 2
    assert two_ranks("test_files:parts", folder=str(tmp_path), size=700) == [[700]] * 2


def test_a_stop_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(dist, "stop_requested", lambda: True)
    with pytest.raises(dist.Stopped, match="stopped after 256 records"):
        files.write_lines(tmp_path / "x.jsonl", list(range(300)), "", lambda items: [{} for _ in items])
    (part,) = tmp_path.iterdir()
    assert part.suffix == ".part" and len(part.read_text().splitlines()) == 256


def test_a_journal_keeps_its_records_and_survives_a_torn_line(tmp_path: Path) -> None:
    journal = files.Journal(tmp_path / "answers")
    journal.add("a", {"text": "to a"})
    journal.add("b", {"text": "to b"})
    assert journal.records == {}
    journal.refresh()
    assert journal.records == {"a": {"text": "to a"}, "b": {"text": "to b"}}
    with journal.mine.open("a") as file:
        file.write('{"key": "c", "te')
    (tmp_path / "answers" / "rank_1.jsonl").write_text('{"key": "d", "text": "to d"}\n{"key": "e"')
    again = files.Journal(tmp_path / "answers")
    again.add("c", {"text": "to c"})
    again.refresh()
    assert {key: record["text"] for key, record in again.records.items()} == {k: f"to {k}" for k in "abcd"}
    assert [json.loads(line)["key"] for line in journal.mine.read_text().splitlines()] == ["a", "b", "c"]


def test_a_journal_makes_what_is_missing_and_tries_again_what_failed(
    tmp_path: Path, device: torch.device
) -> None:
    made, broken = [], {"b"}

    def make(item: str) -> dict:
        made.append(item)
        if item in broken:
            raise dist.RunError(f"{item} has failed")
        return {"text": item.upper()}

    items = {f"{i:x}": item for i, item in enumerate("abcd")}
    with pytest.raises(dist.RunError, match="b has failed"):
        files.Journal(tmp_path).collect(items, make, threads=1)
    assert made[:2] == ["a", "b"]
    broken.clear()
    journal = files.Journal(tmp_path)
    assert [record["text"] for record in journal.collect(items, make, threads=3)] == ["A", "B", "C", "D"]
    assert sorted(made) == ["a", "b", "b", "c", "d"]
    assert journal.collect(dict([*items.items()][::-1]), make, threads=1)[0] == {"text": "D"}
    assert len(made) == 5


def stopped_while_asked(folder: str, rank: int) -> tuple:
    """Both ranks ask, one of them is told to stop; runs in tests/worker.py."""
    dist.init(1)
    journal = files.Journal(Path(folder))

    def make(item: int) -> dict:
        if dist.rank() == rank:
            dist._stop["signal"] = 15
        return {"item": item}

    try:
        journal.collect({f"{i:x}": i for i in range(20)}, make, threads=1)
    except dist.Stopped as stop:
        dist._stop.update(signal=0)
        dist.barrier()  # until both have ended
        return str(stop), len(files.Journal(Path(folder)).records)
    return ("not stopped",)


def test_a_stop_while_asking_ends_all_ranks_and_keeps_the_answers(tmp_path: Path, two_ranks: Any) -> None:
    one, other = two_ranks("test_files:stopped_while_asked", folder=str(tmp_path), rank=1)
    assert one == other and "the same command goes on" in one[0] and 1 <= one[1] < 20


# caches


def test_the_cache_folder_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path / "a" / "b"))
    assert files.cache_folder() == tmp_path / "a" / "b" and (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(dist.RunError, match="CLEANALIGN_CACHE"):
        files.cache_folder()


def cached_here(model: str, folder: str) -> list[float]:
    """Run on each rank, as on nodes with caches of their own: only that of rank 0 holds the result."""
    os.environ["CLEANALIGN_CACHE"] = f"{folder}/{dist.rank()}"
    dist.init(seed=1)
    try:
        return files.cached(
            lambda: torch.arange(3.0) + dist.sum_over_ranks(torch.ones(1)), "x", model
        ).tolist()
    finally:
        del os.environ["CLEANALIGN_CACHE"]


def test_a_cache_that_one_node_has_serves_all(tmp_path: Path, tiny_model: str, two_ranks: Any) -> None:
    for _ in range(2):
        assert two_ranks("test_files:cached_here", model=tiny_model, folder=str(tmp_path)) == [[2, 3, 4]] * 2
    assert not list((tmp_path / "1").glob("*.pt"))


def test_a_result_is_computed_once_for_each_key_and_each_state_of_the_model(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path / "cache"))
    model, calls = tmp_path / "model", []
    shutil.copytree(tiny_model, model)

    def compute() -> torch.Tensor:
        calls.append(1)
        return torch.arange(3.0)

    for _ in range(2):
        assert files.cached(compute, "logps", str(model), "key").tolist() == [0.0, 1.0, 2.0]
    assert len(calls) == 1
    files.cached(compute, "logps", str(model), "other key")
    assert len(calls) == 2
    for store in (tmp_path / "cache").iterdir():  # cut, as by a full disk
        os.truncate(store, 100)
    for _ in range(2):
        assert files.cached(compute, "logps", str(model), "key").tolist() == [0.0, 1.0, 2.0]
    assert calls.pop() and len(calls) == 2
    os.utime(model / "model.safetensors", (1, 1))  # copied to another disk
    files.cached(compute, "logps", str(model), "key")
    assert len(calls) == 2
    content = bytearray((model / "model.safetensors").read_bytes())
    content[4096:] = bytes(x ^ 1 for x in content[4096:])  # trained again, of the same size
    (model / "model.safetensors").write_bytes(content)
    files.cached(compute, "logps", str(model), "key")
    assert len(calls) == 3 and all(p.suffix == ".pt" for p in (tmp_path / "cache").iterdir())


def test_a_file_that_was_replaced_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the size and the time that it had, as tar and rsync leave them."""
    monkeypatch.setenv("CLEANALIGN_CACHE", str(tmp_path / "cache"))
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    for file, text in ((path, "one"), (other, "two")):
        file.write_text(text)
        os.utime(file, (1e9, 1e9))

    def look() -> dict:
        return {"text": path.read_text()}

    assert files.remembered(path, look) == files.remembered(path, lambda: {}) == {"text": "one"}
    other.replace(path)
    assert files.remembered(path, look) == {"text": "two"}


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    """It would be deleted, whosever it is."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work").touch()
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path / "mine", "text")
    assert (tmp_path / "mine" / "work").exists()
