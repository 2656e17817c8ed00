"""End two ranks with collectives in flight, again and again: no process may abort.

    python tests/ends.py 150             # 150 runs of two ranks, 300 processes
    python tests/ends.py 30 --python     # as Python ends a process, to see that this aborts some

Python's own end stops the threads of gloo where they stand, in C++ that does not expect it ("terminate
called without an active exception"). Each run has one of three ends: both ranks leave while sums are under
way, one leaves early with an error, or one is told to stop. Ranks are forked from this process, which has
imported torch.

Prints a line of figures; exit code 1 if a process ended otherwise than it should.
"""

import argparse
import atexit
import collections
import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as torch_dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import dist  # noqa: E402

ENDS = ("both leave", "one fails", "one is stopped")


def rank(number: int, port: int, end: str, plain: bool) -> None:
    """A rank of two, which ends the process."""
    group = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})

    def main(args: None) -> None:
        dist.init(1)
        dist.barrier()
        if end == "one fails" and number:
            raise dist.RunError("this rank leaves early")
        if end == "one is stopped":
            os.kill(os.getpid(), signal.SIGTERM) if number else None
            dist.poll_stop()
        for _ in range(8):
            torch_dist.all_reduce(torch.ones(1 << 18), async_op=True)
        if end == "one fails":
            dist.barrier()

    if plain:
        code = dist.outcome(main, None)
        atexit.unregister(dist._leave)
        sys.exit(code)
    dist.run(main, None)


def start(number: int, port: int, end: str, plain: bool, log: Path) -> int:
    """-> the process id of a rank"""
    pid = os.fork()
    if pid:
        return pid
    with log.open("ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    rank(number, port, end, plain)
    raise AssertionError("unreachable")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=int)
    parser.add_argument("--python", action="store_true", help="end as Python does, with nothing of dist")
    args = parser.parse_args()
    torch.set_num_threads(1)
    codes, log = collections.Counter(), Path(tempfile.mkstemp()[1])
    for i in range(args.runs):
        end, port = ENDS[i % len(ENDS)], free_port()
        pids = [start(number, port, end, args.python, log) for number in range(2)]
        for pid in pids:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            codes[f"{end}: {code}"] += 1
    said = log.read_text(errors="replace")
    aborted = sum(count for name, count in codes.items() if name.endswith(f": {-signal.SIGABRT}"))
    wrong = {name for name in codes if not name.endswith((": 0", "one fails: 1"))}
    figures = {
        "processes": 2 * args.runs,
        "aborted": aborted,
        "said": said.count("terminate called"),
        **codes,
    }
    print(json.dumps(figures), flush=True)
    if wrong or figures["said"]:
        sys.exit(said[-2000:])
    log.unlink()


if __name__ == "__main__":
    main()
