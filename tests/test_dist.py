"""common/dist.py: every rank ends up with the same numbers, the same errors and the same decision to stop."""

import contextlib
import errno
import io
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port
from torch.distributed.checkpoint.api import CheckpointException

from common import dist, evaluate, packed, rewards

# -------------------------------------------------------------------------------------------------- alone


def test_slow_work_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Looks after 20, 25, 60 and 65 seconds: a line after 10 and after 30 more, none when all is done."""
    clock = iter([0.0, 20.0, 25.0, 60.0, 65.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(dist.progress(["ab", "cde", "f", "ghij"], "replies", 10, len)) == ["ab", "cde", "f", "ghij"]
    # 2 of 10 in 20 s leave 80 s, 6 in 60 s leave 40
    assert capsys.readouterr().out == "replies: 2 of 10, 01:20 left\nreplies: 6 of 10, 00:40 left\n"


def loads(costs: list[int], num_shares: int) -> list[int]:
    return [sum(costs[i] for i in share) for share in dist.shares(costs, num_shares)]


def test_shares_hold_every_index_once_and_depend_on_the_costs_only():
    costs = [5, 3, 3, 8, 1, 5]
    shares = dist.shares(costs, 2)
    assert sorted(i for share in shares for i in share) == list(range(6))
    # by hand: 8 | 5 | 5 | 3 | 3 | 1 to loads (8, 0), (8, 5), (8, 10), (11, 10), (11, 13), (12, 13)
    assert shares == [[3, 1, 4], [0, 5, 2]]
    assert dist.shares([7, 7], 3) == [[0], [1], []]
    assert dist.shares([], 2) == [[], []]


@pytest.mark.parametrize(("per_rank", "most"), [(4, 1.15), (16, 1.01), (64, 1.001)])
def test_shares_are_balanced(per_rank: int, most: float):
    """Lengths as of chat data; dealing in arrival order is 1.2 to 1.7 times the mean on the longest rank."""
    rng, ratios, dealt = np.random.default_rng(0), [], []
    for _ in range(20):
        costs = np.clip(rng.lognormal(4.8, 0.7, 8 * per_rank), 5, 2000).astype(int).tolist()
        mean = sum(costs) / 8
        ratios.append(max(loads(costs, 8)) / mean)
        dealt.append(max(sum(costs[r::8]) for r in range(8)) / mean)
    assert np.mean(ratios) < most < np.mean(dealt)


def test_one_process_adds_and_gathers_its_own():
    dist.init(seed=1)
    assert dist.all_sum({"a": torch.tensor(2.0), "b": 3}) == {"a": 2.0, "b": 3.0}
    assert dist.all_sum({}) == {}
    assert dist.gather([1, "x"]) == [1, "x"]
    assert dist.parallel_map(lambda x: x * x, [1, 2, 3]) == [1, 4, 9]
    assert dist.parallel_map(len, []) == []


def test_totals_divide_sums_by_their_own_counts():
    totals = dist.Totals()
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    totals.update({"x": (x.sum(), 3), "pairs": (x[0], 1), "none": (0.0, 0), "divided": (0.25, 0)})
    totals.update({"x": (x[:1].sum(), 1), "pairs": (x[1], 1), "none": (0.0, 0), "divided": (0.5, 0)})
    assert not totals.sums["x"].requires_grad
    assert totals.reduce() == {"x": 1.75, "pairs": 1.5, "none": 0.0, "divided": 0.75}


def test_all_sum_keeps_what_float32_would_round_away():
    assert dist.all_sum({"tokens": 2**24 + 1})["tokens"] == 2**24 + 1


@pytest.mark.parametrize("message", ["what went wrong", ""])
def test_an_error_is_raised_whatever_it_says(message: str):
    def fail(*_: Any) -> None:
        raise dist.RunError(message)

    for call in (lambda: dist.from_main(fail), lambda: dist.parallel_map(fail, [0])):
        with pytest.raises(dist.RunError) as caught:
            call()
        assert str(caught.value) == message


def test_init_again_repeats_the_random_numbers_and_forgets_a_stop():
    def draws() -> tuple[float, float]:
        return random.random(), torch.rand(()).item()

    dist.init(seed=3)
    first = draws()
    os.kill(os.getpid(), signal.SIGTERM)
    assert dist.poll_stop() and dist.stop_requested()
    dist.init(seed=3)
    assert draws() == first and not dist.stop_requested()
    dist.all_sum({})
    assert not dist.stop_requested()
    dist.init(seed=4)
    assert draws() != first


def test_a_signal_between_two_stages_is_not_lost():
    dist.init(seed=1)
    os.kill(os.getpid(), signal.SIGTERM)
    dist.init(seed=1)  # of the stage that begins
    assert dist.poll_stop()
    dist.init(seed=1)
    assert not dist.poll_stop()


def test_a_second_interrupt_does_not_wait_for_the_step(monkeypatch: pytest.MonkeyPatch):
    """The same one that comes twice, from the terminal and passed on by torchrun, is no second one."""
    dist.init(seed=1)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    dist.all_sum({})
    assert dist.stop_requested()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    dist.init(seed=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_what_schedulers_send_asks_for_a_stop(number: int):
    dist.init(seed=1)
    os.kill(os.getpid(), number)
    dist.all_sum({})
    assert dist.stop_requested()
    dist.init(seed=1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_rank_whose_torchrun_was_killed_stops():
    """A parent starts a rank and is killed; the rank, which would go on for a minute, is asked to stop."""
    rank = (
        "import time\n"
        "from common import dist\n"
        "dist.init(1)\n"
        "print('ready', flush=True)\n"
        "for _ in range(600):\n"
        "    dist.all_sum({})\n"
        "    if dist.stop_requested():\n"
        "        print('stopped', flush=True)\n"
        "        break\n"
        "    time.sleep(0.1)\n"
    )
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {rank!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=ROOT, env=os.environ | group, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.stdout.readline() == "stopped\n"


def test_a_mistake_ends_the_run_with_one_line_and_exit_code_1():
    code = (
        "from common import dist\n"
        "def main(args):\n"
        "    dist.init(1)\n"
        "    raise dist.RunError('data.jsonl line 3: found x; expected y')\n"
        "dist.run(main, None)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}

    def run(**ranks: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment | ranks, capture_output=True, text=True
        )

    done = run()
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: data.jsonl line 3: found x; expected y\n"


def said(ranks: list[int], message: str) -> str:
    """Run on each rank: what this one prints when these find the same mistake."""
    dist.init(seed=1)
    printed = io.StringIO()

    def main(args: Any) -> None:
        if dist.rank() in ranks:
            raise dist.RunError(message)

    with contextlib.redirect_stderr(printed):
        code = dist.outcome(main, None)
    assert code == (1 if dist.rank() in ranks else 0)
    dist.barrier()
    return printed.getvalue()


def test_a_mistake_is_printed_once_by_whichever_rank_found_it(two_ranks: Any):
    found = two_ranks("test_dist:said", ranks=[0, 1], message="no such file")
    # rank 0's to say, unless it comes half a second later than the other
    assert found in (["error: no such file\n", ""], ["", "error (rank 1): no such file\n"])
    found = two_ranks("test_dist:said", ranks=[1], message="no such disk")
    assert found == ["", "error (rank 1): no such disk\n"]


def test_too_little_memory_is_a_line_that_names_options(capsys: pytest.CaptureFixture[str]):
    def main(args: Any) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ..."
        )

    with pytest.raises(SystemExit):
        dist.run(main, None)
    said = "error: CUDA out of memory. Tried to allocate 2.00 GiB; lower micro_batch_tokens or max_new_tokens"
    assert capsys.readouterr().err.startswith(said)


def outcome_of(error: BaseException) -> int:
    def main(args: Any) -> None:
        raise error

    return dist.outcome(main, None)


def test_a_full_disk_is_one_line_whoever_met_it(capsys: pytest.CaptureFixture[str]):
    """Libraries wrap the error, or keep only its text; torch's checkpoints hold those of each rank."""
    full = OSError(errno.ENOSPC, "No space left on device", "runs/dpo/metrics.jsonl")
    wrapped = RuntimeError("write failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    of_torch = CheckpointException("save", {1: (full, None)})
    text = RuntimeError("I/O error: No space left on device (os error 28)")
    short = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    for error in (full, wrapped, of_torch, text, CheckpointException("save", {0: (short, None)})):
        assert outcome_of(error) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: No space left on device") and len(said.splitlines()) == 1
        assert ("runs/dpo/metrics.jsonl" in said) == (error in (full, of_torch))
    with pytest.raises(FileNotFoundError):  # of a name that is not there, a bug
        outcome_of(FileNotFoundError(errno.ENOENT, "No such file or directory", "x"))


def test_an_interrupt_that_does_not_wait_is_one_line_and_exit_code_130(capsys: pytest.CaptureFixture[str]):
    assert outcome_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.startswith("error: interrupted before the step had ended")


def test_a_signal_is_answered_at_once_and_only_once(capfd: pytest.CaptureFixture[str]):
    dist.init(seed=1)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    assert capfd.readouterr().err == "SIGTERM: the run will stop after this step; what is done is saved\n"


def test_a_time_that_is_up_asks_for_a_stop():
    dist.init(seed=1)
    dist.stop_after(1e-9)
    assert dist.is_told_to_stop() and dist.poll_stop()
    dist.init(seed=1)  # of the next stage, which must stop too
    assert dist.poll_stop()
    dist.stop_after(60)
    assert not dist.poll_stop()


def as_rank(code: str, number: int, world: int, port: int, **more: str) -> subprocess.Popen:
    """A process of a group, that runs this code."""
    group = {
        "RANK": str(number),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | group | more, **pipes)


def test_a_rank_ends_before_python_closes_down_and_marks_that_it_was_stopped(tmp_path: Path):
    """Python's own end stops the threads of gloo where they stand, and some abort."""
    code = (
        "import atexit, os, signal\n"
        "from common import dist\n"
        "class Late:\n"
        "    def __del__(self): print('closed down', flush=True)\n"
        "late = Late()\n"
        "atexit.register(print, 'registered')\n"
        "def main(args):\n"
        "    dist.init(1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert dist.poll_stop()\n"
        "dist.run(main, None)\n"
    )
    process = as_rank(code, 0, 1, free_port(), CLEANALIGN_STOPPED=str(tmp_path / "stopped"))
    assert process.communicate()[0] == "registered\n" and process.returncode == 0
    assert (tmp_path / "stopped").exists()


def test_a_run_that_fails_is_not_marked_as_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It would be queued again and again."""
    monkeypatch.setenv("CLEANALIGN_STOPPED", str(tmp_path / "stopped"))
    dist.init(seed=1)

    def main(args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert dist.poll_stop()
        if args:
            raise dist.RunError("the disk has gone")

    for fails in (True, False):
        with pytest.raises(SystemExit):
            dist.run(main, fails)
        assert (tmp_path / "stopped").exists() != fails


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_within_the_time_that_was_set():
    code = (
        "import time\n"
        "from common import dist\n"
        "def main(args):\n"
        "    dist.init(1)\n"
        "    dist.barrier()\n"
        "    time.sleep(600 * dist.rank())\n"
        "    dist.barrier()\n"
        "dist.run(main, None)\n"
    )
    port = free_port()
    ranks = [as_rank(code, number, 2, port, CLEANALIGN_TIMEOUT_MINUTES="0.05") for number in range(2)]
    said = ranks[0].communicate()[1]
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 1
    assert said.splitlines()[-1].startswith(
        "error: another rank has ended, or has not answered for 0.05 minutes"
    )
    assert "Traceback" not in said


def test_a_bug_keeps_its_traceback():
    def main(args: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        dist.run(main, None)


# ---------------------------------------------------------------------------------------------- two ranks


def sums_and_order() -> dict[str, Any]:
    """Run on each rank."""
    me = dist.rank()
    box = torch.tensor([1.0, 10.0]) * (me + 1)
    totals = dist.Totals()
    totals.update({"x": (torch.tensor(2.0, requires_grad=True), 1 + 2 * me)})
    totals.update({"norm": (torch.tensor(0.5), 1), "done": (1.0, 0)})
    return {
        "means": totals.reduce("train/"),
        "sums": dist.all_sum({"x": torch.tensor(me + 1.0), "n": 10 * (me + 1)}),
        "gathered": dist.gather([f"{me}a", f"{me}b"] if me == 0 else ["1a"]),
        "mapped": dist.parallel_map(lambda x: (x, dist.rank()), list(range(5))),
        "from_main": dist.from_main(lambda: f"of rank {dist.rank()}"),
        "tensor": dist.sum_over_ranks(box).tolist(),
        "world": [dist.world_size(), dist.is_main()],
    }


def test_two_ranks_agree_on_sums_and_order(two_ranks: Any):
    first, second = two_ranks("test_dist:sums_and_order")
    assert first.pop("world") == [2, True] and second.pop("world") == [2, False]
    assert first == second
    assert first["sums"] == {"x": 3.0, "n": 30.0}
    # 2 + 2 over 1 + 3 tokens, which a mean of the ranks' means would make 1.33; the norm is one on both
    assert first["means"] == {"train/x": 1.0, "train/norm": 0.5, "train/done": 2.0}
    assert first["gathered"] == ["0a", "0b", "1a"]
    assert first["mapped"] == [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]
    assert first["from_main"] == "of rank 0"
    assert first["tensor"] == [3.0, 30.0]


def errors() -> list[str]:
    """Run on each rank: what each of the calls raises here."""

    def fail_on_main() -> None:
        raise dist.RunError("only rank 0 tried")

    def fail_at_3_and_4(x: int) -> int:  # item 3 is rank 1's, item 4 rank 0's
        if x >= 3:
            raise dist.RunError(f"item {x} is wrong")
        return x

    said = []
    for call in (lambda: dist.from_main(fail_on_main), lambda: dist.parallel_map(fail_at_3_and_4, range(5))):
        try:
            call()
            said.append("nothing")
        except dist.RunError as error:
            said.append(str(error))
    return said


def test_an_error_of_one_rank_is_raised_on_both(two_ranks: Any):
    expected = ["only rank 0 tried", "item 3 is wrong"]  # the first in the order of the items
    assert two_ranks("test_dist:errors") == [expected, expected]


def stop_flags() -> list[bool]:
    """Run on each rank: `stop_requested` before a signal to rank 1, after it, and after the next all_sum."""
    dist.init(seed=1)
    dist.all_sum({"x": 1.0})
    flags = [dist.stop_requested()]
    if dist.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    flags.append(dist.stop_requested())  # not yet: rank 0 cannot know
    dist.all_sum({"x": 1.0})
    flags.append(dist.stop_requested())
    dist.all_sum({"x": 1.0})
    flags.append(dist.stop_requested())
    dist.init(seed=1)
    return flags


def test_a_signal_to_one_rank_stops_both_at_the_same_step(two_ranks: Any):
    assert two_ranks("test_dist:stop_flags") == [[False, False, True, True]] * 2


def draws_alike() -> list[float]:
    dist.init(seed=5)
    return [torch.rand(()).item(), random.random()]


def test_ranks_draw_the_same_random_numbers(two_ranks: Any):
    first, second = two_ranks("test_dist:draws_alike")
    assert first == second


def test_output_that_nobody_reads_is_no_lost_rank(monkeypatch: Any, capsys: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    pipe = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", pipe)
    with pytest.raises(BrokenPipeError):
        dist.outcome(lambda text: print(text, flush=True), "a")
    assert capsys.readouterr().err == ""
    os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # for what the pipe still holds
    pipe.close()


TALKING = """
import sys
from pathlib import Path
from common import dist

def main(folder):
    dist.init(1)
    dist.outlive_readers()
    print("begun", flush=True)
    while not (dist.poll_stop() or (folder / "enough").exists()):
        print("a line", flush=True)
        print("a line", file=sys.stderr)
    (folder / "saved").touch()
    print("the end")

dist.run(main, Path(sys.argv[1]))
"""


def test_a_closed_terminal_stops_a_run_and_ends_no_print(tmp_path: Path):
    """The kernel sends SIGHUP, and whatever is written from then on fails, the line about the signal too."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", TALKING, str(tmp_path)])
    said = b""
    while b"begun" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and (tmp_path / "saved").exists()


def test_a_reader_that_dies_costs_no_run(tmp_path: Path):
    run = [sys.executable, "-c", TALKING, str(tmp_path)]
    process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    (tmp_path / "enough").touch()
    assert process.wait() == 0 and (tmp_path / "saved").exists()


def test_a_signal_after_the_end_changes_nothing(tmp_path: Path):
    """Nor does that of a closed terminal for a run under nohup."""
    code = (
        "import atexit, signal\n"
        "from common import dist\n"
        "atexit.register(lambda: print([signal.getsignal(x).name for x in dist.STOP_SIGNALS]))\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "dist.init(1)\n"
        "print(signal.getsignal(signal.SIGHUP).name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["SIG_IGN", str(["SIG_IGN"] * len(dist.STOP_SIGNALS))]


@pytest.mark.parametrize(
    ("name", "value"),
    [("CLEANALIGN_TIMEOUT_MINUTES", x) for x in ("abc", "nan", "-3", "1e300", "0")]
    + [("CLEANALIGN_STOPPED", "/nowhere/at/all")],
)
def test_an_environment_that_cannot_be_is_one_line(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(dist.RunError, match=f"{name} is {value}; expected"):
        dist.init(seed=1)


@pytest.mark.parametrize("seed", [10**20, 2**63, -1])
def test_a_seed_out_of_range_is_one_line(seed: int):
    with pytest.raises(dist.RunError, match=f"seed is {seed}; expected 0 to"):
        dist.init(seed)
    dist.init(2**63 - 1)


def test_a_marker_that_cannot_be_made_at_the_stop_is_said(monkeypatch: Any, tmp_path: Path, capsys: Any):
    dist.init(seed=1)
    monkeypatch.setenv("CLEANALIGN_STOPPED", str(tmp_path / "gone" / "stopped"))
    monkeypatch.setattr(dist, "stop_requested", lambda: True)
    with pytest.raises(SystemExit) as ended:
        dist.run(lambda _: None, None)
    assert ended.value.code == 0 and "CLEANALIGN_STOPPED: No such file" in capsys.readouterr().err


def leave_at_once(*_: Any) -> None:
    sys.exit(0)


def test_an_exit_of_a_users_function_is_an_error_that_says_where(capsys: pytest.CaptureFixture[str]):
    """exit(0) would look like a run that has finished."""
    assert dist.outcome(leave_at_once, None) == 1
    assert re.search(r"error: SystemExit: 0 \(.*test_dist.py:\d+\)", capsys.readouterr().err)
    judge = evaluate.load_judge("test_dist:leave_at_once", "")
    reward = rewards.Reward(1.0, "mine", leave_at_once, None)
    example = packed.Example([], "a")
    for call in (
        lambda: judge("a", "b"),
        lambda: rewards.score_replies([reward], [example], ["b"], 0, "cpu"),
    ):
        with pytest.raises(dist.RunError, match=r"raised SystemExit: 0 \(.*test_dist.py:\d+\)"):
            call()
