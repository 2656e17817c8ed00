"""Processes: the group, the device, sums over ranks, and who does which share of a batch.

No script asks for its rank. A value that decides anything comes from `all_sum` or from data every rank holds.
"""

import atexit
import contextlib
import ctypes
import datetime
import errno
import hashlib
import heapq
import io
import json
import math
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from common import is_unread

# what asks for a stop: schedulers send TERM, INT or USR1, a closed terminal HUP
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
TWICE_SECONDS = 3.0  # torchrun passes on a signal that may have reached its ranks already: one request
LESS_MEMORY = "lower micro_batch_tokens or max_new_tokens, or set activation_checkpointing on or lora_rank"
PR_SET_PDEATHSIG = 1  # of Linux
POLL_SECONDS = 10.0  # between questions whether to stop, where no step ends
_stop = {"signal": 0, "time": 0.0, "agreed": False, "deadline": math.inf}
# what is the machine's doing and no bug: the disk is full or the quota used up, nothing may be written, ...
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG}
FULL = ("No space left", "os error 28", "unexpected pos")  # texts of Python, of safetensors and of torch.save
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
LOST += ("Application timeout caused pair closure", "Socket Timeout", "failed to recv, got 0 bytes")
FIRST_SECONDS, TELL_SECONDS = 10.0, 30.0  # a log file hears of slow work after the first, then every so often


class RunError(ValueError):
    """An end of the run that one line explains: what, where, and what was expected."""


class Stopped(RunError):
    """A stop that was asked for came while there was no step to end; what is done stays."""


def init(seed: int) -> torch.device:
    """Join the process group torchrun describes, or form one of a single process. Safe to call again.

    Raises:
        RunError: a seed, or something in the environment, that cannot be.
    """
    if not 0 <= seed < 2**63:
        raise RunError(f"seed is {seed}; expected 0 to 2**63 - 1")
    minutes, marker = timeout_minutes(), os.environ.get("CLEANALIGN_STOPPED")
    if marker and os.environ.get("RANK", "0") == "0" and not os.access(Path(marker).parent, os.W_OK):
        raise RunError(f"CLEANALIGN_STOPPED is {marker}; expected a file in a folder that can be written to")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if not torch_dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False  # convolutions of float32 are float32, as products are
        alone = "RANK" not in os.environ  # python script.py: a store in memory, no port is opened
        if not alone and sys.platform == "linux":
            # SIGTERM when torchrun dies, as by SIGKILL: its ranks would go on training for nobody
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        store = {"store": torch_dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        torch_dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=datetime.timedelta(minutes=minutes),
            device_id=device if cuda else None,
            **store,
        )
        atexit.register(_leave)
    for number in STOP_SIGNALS:  # again, if somebody else has taken them since
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # under nohup
            signal.signal(number, _on_signal)
    if _stop["agreed"]:  # what an earlier run of this process ended for; a signal nobody has seen yet stays
        _stop.update(signal=0, time=0.0, agreed=False)
    random.seed(seed)
    torch.manual_seed(seed)  # the same on every rank: new weights (LoRA, heads) must agree
    return device


def timeout_minutes() -> float:
    """The longest that a rank waits for another, of the environment."""
    text = os.environ.get("CLEANALIGN_TIMEOUT_MINUTES") or "30"
    with contextlib.suppress(ValueError):
        if 0.01 <= float(text) <= 1e6:  # NaN is not
            return float(text)
    raise RunError(f"CLEANALIGN_TIMEOUT_MINUTES is {text}; expected minutes, 0.01 to 1,000,000")


class _Heard(io.FileIO):
    """Where a run prints to; what cannot be written there is dropped."""

    def write(self, text: Any) -> int | None:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)


def outlive_readers() -> None:
    """Let no print end a run from here on: its terminal may be closed, its pipe unread, a disk full."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream and stream is getattr(sys, f"__{name}__"):  # and no capture, nor ours already
            raw = io.BufferedWriter(_Heard(stream.fileno(), "w", closefd=False))
            with contextlib.suppress(OSError):
                stream.flush()
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def _leave() -> None:
    for number in STOP_SIGNALS:  # all is done: Python would give them back to the system, to end by
        signal.signal(number, signal.SIG_IGN)
    torch_dist.destroy_process_group()
    time.sleep(0.05)  # a gloo thread that still holds its last tensor after this aborts the process


def _on_signal(number: int, frame: Any) -> None:
    now = time.monotonic()
    if number == signal.SIGINT and _stop["signal"] and now - _stop["time"] > TWICE_SECONDS:
        raise KeyboardInterrupt  # asked twice: do not wait for the step to end
    if not _stop["signal"]:
        _stop.update(signal=number, time=now)
        if is_main():  # by the system's own call: what print was doing when this came may not be begun again
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):  # the terminal is closed, which this tells of
                os.write(2, f"{name}: the run will stop after this step; what is done is saved\n".encode())


def stop_after(minutes: float) -> None:
    """Ask for a stop so many minutes from now; 0 is never."""
    _stop["deadline"] = time.monotonic() + 60 * minutes if minutes else math.inf


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def rank() -> int:
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        torch_dist.barrier()


def all_sum(sums: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Add each value over ranks and bring the results to the host: one collective, one synchronisation.

    Every rank passes the same keys in one order, as the metrics of a dummy row are. The pending stop signal
    of any rank travels along, so all ranks see `stop_requested` at the same step.
    """
    values = (float(is_told_to_stop()), *sums.values())
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    device = values[places[0]].device if places else "cpu"
    # numbers of the host go to the device in one copy, not each in its own
    flat = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in values], dtype=torch.float64).to(device)
    if places:
        flat[places] = torch.stack([values[i].detach().to(device, torch.float64) for i in places])
    if world_size() > 1:
        torch_dist.all_reduce(flat)
    stop, *numbers = flat.tolist()
    _stop["agreed"] = stop > 0
    return dict(zip(sums, numbers, strict=True))


class Totals:
    """Metrics of a step or an evaluation: of each the sum and the count that divides it, over rows and ranks.

    What all ranks agree on, as a gradient norm, is a metric like others, (norm, 1). A sum that is divided
    already has the count 0 and stays a sum.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, Tensor | float] = {}

    def update(self, metrics: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Add the metrics of a row, scalars all; no gradient is kept."""
        for name, (total, count) in metrics.items():
            total = total.detach() if isinstance(total, Tensor) else total
            self.sums[name] = self.sums.get(name, 0) + total
            self.counts[name] = self.counts.get(name, 0) + count

    def reduce(self, prefix: str = "") -> dict[str, float]:
        """The metrics over all rows and ranks, after one synchronisation, with prefix before their names."""
        found = all_sum(self.sums | {f"{name} count": count for name, count in self.counts.items()})
        return {f"{prefix}{name}": found[name] / (found[f"{name} count"] or 1) for name in self.sums}


def stop_requested() -> bool:
    """True on every rank once any rank is told to stop; decided by the latest `all_sum`."""
    return _stop["agreed"]


def is_told_to_stop() -> bool:
    """Whether this rank has had a stop signal, or its time is up; all agree on `stop_requested`."""
    return _stop["signal"] > 0 or time.monotonic() > _stop["deadline"]


def poll_stop() -> bool:
    """`stop_requested`, asked where no sum is due: a collective."""
    all_sum({})
    return stop_requested()


def in_step(parts: Iterator) -> Iterator:
    """Pass on the parts of what a rank generates by itself; every few seconds all agree on whether to stop.

    That waits for a part of the others' work, not for its end: who is done goes on asking until all are.

    Raises:
        Stopped: a stop was asked for.
    """
    due, working = time.monotonic() + POLL_SECONDS, 1.0
    while working:
        part = next(parts, None)
        if part is not None:
            yield part
        if part is None or time.monotonic() >= due:
            working = all_sum({"working": float(part is not None)})["working"]
            due = time.monotonic() + POLL_SECONDS
            if stop_requested():
                raise Stopped("stopped while generating; the same command goes on from there")


def sum_over_ranks(tensor: Tensor) -> Tensor:
    if world_size() > 1:
        torch_dist.all_reduce(tensor)
    return tensor


def gather(items: Sequence) -> list:
    """The picklable items of all ranks, those of rank 0 first, on every rank."""
    if world_size() == 1:
        return list(items)
    parts: list = [None] * world_size()
    torch_dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def from_main(make: Callable[[], Any]) -> Any:
    """The picklable result of `make()`, which only rank 0 runs; a RunError there is raised on every rank."""
    box = [_attempt(make) if is_main() else None]
    if world_size() > 1:
        torch_dist.broadcast_object_list(box, src=0)
    return _results(box)[0]


def parallel_map(function: Callable, items: Sequence) -> list:
    """[function(item) for item in items], each rank a share of it; a RunError of one is raised on all."""
    size = world_size()
    mine = [_attempt(function, item) for item in items[rank() :: size]]
    done: list = [None] * len(items)
    for r, part in enumerate(gather([mine])):
        done[r::size] = part
    return _results(done)


def _attempt(function: Callable, *args: Any) -> Any:
    """What the function returns, or the RunError that it raises."""
    try:
        return function(*args)
    except RunError as error:
        return error


def _results(found: list) -> list:
    """What was found, unless there is an error in it, which is raised."""
    for result in found:
        if isinstance(result, RunError):
            raise result
    return found


def shares(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Split the indices of `costs` into shares of nearly equal cost: largest first, to the least loaded."""
    result: list[list[int]] = [[] for _ in range(num_shares)]
    heap = [(0, share) for share in range(num_shares)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, share = heapq.heappop(heap)
        result[share].append(index)
        heapq.heappush(heap, (load + costs[index], share))
    return result


def progress(items: Iterable, what: str, total: int, size: Callable[[Any], int] = lambda _: 1) -> Iterator:
    """The items, while rank 0 shows how far they are and how long the rest will take, if it takes seconds.

    On a terminal that is a bar, which goes when all is done; elsewhere a line every half minute.

    Args:
        total: what the sizes of all items add up to.
    """
    from tqdm import tqdm

    start, due, done, has_bar = time.monotonic(), FIRST_SECONDS, 0, is_main() and sys.stderr.isatty()
    with tqdm(total=total, desc=what, delay=3, leave=False, disable=not has_bar) as bar:
        for item in items:
            yield item
            done += size(item)
            bar.update(size(item))
            seconds = time.monotonic() - start
            if is_main() and not has_bar and seconds >= due and 0 < done < total:
                due = seconds + TELL_SECONDS
                left = tqdm.format_interval(seconds / done * (total - done))
                print(f"{what}: {done:,} of {total:,}, {left} left", flush=True)


def run(main: Any, args: Any) -> None:
    """Call main(args); a mistake, a full disk or a lost rank ends it with one line instead of a traceback."""
    code = outcome(main, args)
    if not code and stop_requested() and is_main() and os.environ.get("CLEANALIGN_STOPPED"):
        try:
            Path(os.environ["CLEANALIGN_STOPPED"]).touch()  # for who starts it again, as recipes/slurm.sh
        except OSError as error:  # all the same it has stopped, and saved
            say_last(f"CLEANALIGN_STOPPED: {error.strerror}: {error.filename}", 0)
    sys.exit(code) if "RANK" not in os.environ else leave(code)


def leave(code: int) -> None:
    """End a rank's process at once, when what it has registered for its end is done.

    Closing down, Python ends threads of gloo that wait for its lock where they stand, in C++ that does not
    expect it, and that aborts the process ("terminate called without an active exception").
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # nobody hears it, or there is none
            stream.flush()
    os._exit(code)


def outcome(main: Any, args: Any) -> int:
    """The exit code of main(args), whose mistake has been printed in one line by then."""
    try:
        main(args)
        return 0
    except BaseException as error:  # that of torch's checkpoints is no Exception
        message = None if isinstance(error, BrokenPipeError) and is_unread() else explain(error)
        if message is None:
            raise
        stopped = isinstance(error, Stopped)
        if _speaks_first(message):
            where = "" if rank() == 0 else f" (rank {rank()})"
            say_last(message, 0) if stopped else say_last(f"error{where}: {message}", 1)
        return 0 if stopped else 130 if isinstance(error, KeyboardInterrupt) else 1


def say_last(message: str, code: int) -> None:
    """Print why this process will end with this exit code.

    torchrun writes forty lines about the failure of a rank. The message is the last of them if it stands in
    the file that torchrun names, as its own `record` writes it.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if code and file and "RANK" in os.environ:
        told = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": told}))
    else:
        print(message, file=sys.stderr, flush=True)


def explain(error: BaseException) -> str | None:
    """What one line says of an error, or None of one that only a traceback explains, a bug."""
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before the step had ended; the same command goes on from the last checkpoint"
    if isinstance(error, SystemExit):
        at = traceback.extract_tb(error.__traceback__)[-1]
        if Path(at.filename).parent != Path(__file__).parent:  # as --plan and --check end
            return f"SystemExit: {error} ({at.filename}:{at.lineno}); expected no exit in a run"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{str(error).splitlines()[0].partition('. GPU')[0]}; {LESS_MEMORY}"
    found, end = list(causes(error)), "; what was saved before is whole, the same command goes on"
    for cause in found:
        if getattr(cause, "errno", None) in OF_THE_MACHINE:
            return os.strerror(cause.errno) + (f": {cause.filename}" if cause.filename else "") + end
    if any(text in str(cause) for cause in found for text in FULL):
        return "No space left on device" + end
    lost = next((text for text in LOST for cause in found if text in str(cause)), None)
    if lost and world_size() > 1:
        minutes = os.environ.get("CLEANALIGN_TIMEOUT_MINUTES", 30)
        return f"another rank has ended, or has not answered for {minutes} minutes ({lost})"
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and what a checkpoint's error holds of each rank."""
    seen: list[BaseException] = [error]
    for found in seen:
        yield found
        parts = [found.__cause__, None if found.__suppress_context__ else found.__context__]
        with contextlib.suppress(AttributeError):
            parts += [failure[0] for failure in found.failures.values()]
        seen += [part for part in parts if part is not None and part not in seen]


def _speaks_first(message: str) -> bool:
    """Whether no other rank has said this: most errors are found by all ranks, some by one alone."""
    if world_size() == 1:
        return int(os.environ.get("RANK", 0)) == 0  # before the group was formed all ranks find the same
    if rank() > 0:
        time.sleep(0.5)  # what rank 0 finds too is its to say
    name = "said/" + hashlib.sha256(message.encode()).hexdigest()
    try:
        return torch_dist.distributed_c10d._get_default_store().add(name, 1) == 1
    except RuntimeError:  # the store has gone with the rank that held it
        return True
