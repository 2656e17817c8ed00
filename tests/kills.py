"""Kill a script at random moments and start it again: the finished run must equal one that nobody killed.

    python tests/kills.py dpo.py 8 1              # 8 kills of the one process, seed 1
    python tests/kills.py dpo.py 4 1 --ranks 2    # torchrun with two ranks, one of which is killed
    python tests/kills.py steerlm.py 6 1          # a pipeline: kills fall into all its stages
    python tests/kills.py dpo.py 8 1 --stop       # stop signals in place of kills

A kill is SIGKILL, at a random moment or just after a file has changed (a checkpoint or a model half written,
a row, a reply), so that short moments are met too. The same command is started again, at last left to end.
With --stop it gets one or two of TERM, INT, USR1 and HUP, at once or apart; of ranks torchrun, a rank, or
both get them; each start must then end with a documented exit code, without a traceback, all its steps saved.

A run that has finished is compared with the one without kills, and begun anew, until there are as many kills:
exit codes, the steps and every number of each metrics.jsonl but times, samples, the weights of model/, and
which files there are. One process is forked from this one, which has imported what it needs, so that a start
takes no time; ranks are started by torchrun, as a user would.

Prints a line for each kill and one of figures, with the seed; exit code 1 if anything differs.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--num_samples 4 --max_new_tokens 16 --eval_every 5 --save_every 3"
STAGE = "--{0}.max_steps 6 --{0}.batch_size 16 --{0}.eval_every 3 --{0}.save_every 2"
PIPELINE = f"--num_samples 4 --max_new_tokens 32 {STAGE.format('sft')} {STAGE.format('reward_model')}"
OPTIONS = {
    "sft.py": f"--max_steps 12 --batch_size 16 {SHORT}",
    "dpo.py": f"--max_steps 12 --batch_size 16 {SHORT}",
    "reward_model.py": "--max_steps 12 --batch_size 16 --eval_every 5 --save_every 3",
    "ppo.py": f"--max_steps 12 --batch_size 16 --rollout_size 32 {SHORT}",
    "spin.py": f"--num_prompts 48 --batch_size 16 --num_iterations 2 {SHORT}",
    "steerlm2.py": f"--num_prompts 32 --batch_size 8 --num_iterations 2 --num_responses 4 {SHORT}",
    "steerlm.py": f"{PIPELINE} --num_bootstrap_prompts 32",
    "cai.py": f"{PIPELINE} --num_red_team 48 {STAGE.format('ppo')} --ppo.rollout_size 16 "
    "--ppo.max_new_tokens 32",
    "draftp.py": "--max_steps 6 --batch_size 8 --eval_every 3 --save_every 2 --num_samples 4",
}
TIMES = ("time", "per_second", "mfu", "memory", "sampler_logp_gap")  # what no two runs have alike
MOMENTS = ("", "", "", "**/step_*", "**/step_*.tmp/*", "**/model*", "**/model.tmp/*", "**/metrics.jsonl")
MOMENTS += ("**/samples.jsonl", "**/*.part", "**/*.replies/*", "**/*.tmp", "**/args.json")


class Started:
    """A command in a process group of its own, its output in a file."""

    def __init__(self, words: list[str], ranks: int, log: Path):
        self.ranks, self.began, self.code = ranks, time.monotonic(), None
        if ranks > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            with log.open("ab") as file:
                self.process = subprocess.Popen(
                    [sys.executable, *launch, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    cwd=ROOT,
                    start_new_session=True,
                )
            self.pid = self.process.pid
            return
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            with log.open("ab", 0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os._exit(as_main(words))

    def alive(self) -> bool:
        if self.code is None and self.ranks > 1:
            self.code = self.process.poll()
        elif self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self, seconds: float) -> int | None:
        """The exit code, None if it does not end within so many seconds."""
        while self.alive() and seconds > 0:
            time.sleep(0.02)
            seconds -= 0.02
        return self.code

    def workers(self) -> list[int]:
        """torchrun's children that are ranks."""
        found = []
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            for child in children:
                if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes():
                    found.append(int(child))
        return found

    def kill(self) -> None:
        for pid in (self.pid, *self.workers()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.wait(30)


def as_main(words: list[str]) -> int:
    """Run a script as `python` would, in this process. -> its exit code"""
    os.chdir(ROOT)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def state(folder: Path, pattern: str) -> set[tuple[str, int]]:
    """Files that match, with their sizes."""
    found = set()
    with contextlib.suppress(OSError):  # a folder may go while it is read
        for path in folder.glob(pattern):
            found.add((str(path), path.stat().st_size))
    return found


def wait_for_moment(run: Started, rng: random.Random, folder: Path, usual: float) -> str:
    """Wait for the moment of the next kill. -> what it was; "" if it did not come, or the run ended."""
    pattern, limit, changes = rng.choice(MOMENTS), rng.uniform(0, 0.9 * usual), rng.randrange(1, 4)
    end = run.began + (limit if not pattern else rng.uniform(0, 0.7 * usual))
    while run.alive() and time.monotonic() < end:
        time.sleep(0.002)
    before, end = state(folder, pattern) if pattern else set(), run.began + 2 * usual + 10
    while pattern and run.alive() and changes and time.monotonic() < end:
        now = state(folder, pattern)
        changes -= bool(now - before)
        before = now
        time.sleep(0.0005)
    time.sleep(rng.choice([0, 0, 0.001, 0.005, 0.02, 0.1]) if pattern else 0)
    if not run.alive() or (pattern and changes):
        return ""
    return f"at {pattern[3:]}" if pattern else f"after {limit:.1f} s"


def differences(reference: Path, folder: Path) -> tuple[list[str], float]:
    """(what differs between two runs, the largest relative difference of a number)."""
    from safetensors.torch import load_file

    found, worst = [], 0.0

    def names(root: Path) -> set[str]:
        return {str(p.relative_to(root)) for p in root.rglob("*")}

    found += [f"left behind: {name}" for name in sorted(names(folder) - names(reference))]
    found += [f"missing: {name}" for name in sorted(names(reference) - names(folder))]
    for path in sorted(reference.rglob("metrics.jsonl")):
        name = path.relative_to(reference)
        ours, theirs = (
            [json.loads(x) for x in (root / name).read_text().splitlines()] for root in (folder, reference)
        )
        if [row["step"] for row in ours] != [row["step"] for row in theirs]:
            found.append(f"{name}: steps {[r['step'] for r in ours]}, not {[r['step'] for r in theirs]}")
            continue
        for a, b in zip(ours, theirs, strict=True):
            for key in sorted(k for k in a.keys() | b.keys() if not any(x in k for x in TIMES)):
                x, y = a.get(key, float("inf")), b.get(key, float("inf"))
                gap = 0.0 if str(x) == str(y) else abs(x - y) / max(1.0, abs(y))
                worst = max(worst, gap)
                if not gap <= 1e-5:
                    found.append(f"{name} step {a['step']}: {key} {x}, not {y}")
    for path in sorted(reference.rglob("samples.jsonl")):
        if (folder / path.relative_to(reference)).read_text() != path.read_text():
            found.append(f"{path.relative_to(reference)} differs")
    for path in sorted(reference.rglob("model/**/*.safetensors")):
        ours, theirs = load_file(folder / path.relative_to(reference)), load_file(path)
        gaps = [float((ours[k].float() - theirs[k].float()).abs().max()) for k in theirs]
        if ours.keys() != theirs.keys() or not max(gaps) <= 1e-6:
            found.append(f"{path.relative_to(reference)}: weights differ by {max(gaps)}")
    return found, worst


def kill_one_rank(run: Started, rng: random.Random) -> tuple[str, list[str], float]:
    """Kill a rank of torchrun's and wait for the end of the rest. -> what happened, what is wrong, seconds"""
    workers, began = run.workers(), time.monotonic()
    os.kill(rng.choice(workers), signal.SIGKILL)
    code = run.wait(120)
    seconds, left = round(time.monotonic() - began, 1), living(workers)
    wrong = [f"ended with {code}, left {left}"] if left or not code else []
    return f", one rank; the rest ended {seconds} s later with {code}", wrong, seconds


def living(pids: list[int]) -> list[int]:
    """Those that have not ended; a dead process that nobody has waited for has."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def catches(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, or has ended."""
    with contextlib.suppress(OSError):
        mask = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)
    return True


def ask_to_stop(run: Started, rng: random.Random, folder: Path) -> tuple[str, list[str]]:
    """Send one or two stop signals and wait for the end. -> (what happened, what is wrong)"""
    names, gap = rng.choices(("TERM", "INT", "USR1", "HUP"), k=rng.choice((1, 2))), rng.choice((0, 0.1, 1, 4))
    workers = run.workers()
    while run.alive() and not all(map(catches, workers or [run.pid])):
        time.sleep(0.01)  # before it has joined the group a signal just ends it
    where = rng.choice(("torchrun", "a rank", "both")) if workers else "it"
    pids = [rng.choice(workers)] if where == "a rank" else [run.pid, *workers * (where == "both")]
    began = time.monotonic()
    for i, name in enumerate(names):
        time.sleep(gap if i else 0)
        for pid in pids if run.alive() else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, f"SIG{name}"))
    code = run.wait(120)
    while living(workers) and time.monotonic() < began + 150:  # orphans, which save what is done
        time.sleep(0.1)
    told = f", {f' {gap} s '.join(names)} to {where}: ended with {code}"
    told += f" in {time.monotonic() - began:.1f} s"
    twice = names == ["INT", "INT"] and gap > 3  # ends at once, saved or not
    documented = {0, *([1 if run.ranks > 1 else 130] * twice)}
    if run.ranks > 1 and run.pid in pids:
        documented |= {1, *(-getattr(signal, f"SIG{name}") for name in names)}  # torchrun's own
    wrong = [f"ended with {code}"] if code not in documented else []
    wrong += [f"left {left}"] if (left := living(workers)) else []
    for path in folder.rglob("metrics.jsonl") if not twice else ():
        if (path.parent / "checkpoints").is_dir():  # a pipeline has none
            rows = [json.loads(line)["step"] for line in path.read_text().splitlines()]
            saved = [int(x.name[5:]) for x in path.parent.glob("checkpoints/step_*") if x.suffix != ".tmp"]
            wrong += [f"{path}: steps {rows}, saved {saved}"] * (max([0, *rows]) > max([0, *saved]))
    return told, wrong


def kills(
    script: str, number: int, seed: int, ranks: int, out: Path, options: str = "", stop: bool = False
) -> dict:
    """Kill a script so many times; figures, with what differed under `problems`."""
    rng, name = random.Random(f"{script} {seed} {ranks}"), f"{Path(script).stem}-{ranks}"
    words = [str(ROOT / script), *(options or OPTIONS[script]).split(), "--output_dir"]
    reference, folder, log = out / f"{name}-reference", out / f"{name}-seed{seed}", out / f"{name}-{seed}.log"
    figures = {"script": script, "ranks": ranks, "seed": seed, "kills": 0, "finished": 0, "worst_gap": 0.0}
    figures |= {"seconds_to_end": []} if ranks > 1 and not stop else {}
    whole = Started([*words, str(reference)], ranks, log)
    if whole.wait(3600):
        return figures | {"problems": [f"without kills it ended with {whole.code}, see {log}"]}
    usual = time.monotonic() - whole.began
    early = 0  # starts in a row that were not killed
    while figures["kills"] < number or folder.exists():
        run, moment = Started([*words, str(folder)], ranks, log), ""
        if figures["kills"] < number and early < 10:
            moment = wait_for_moment(run, rng, folder, usual)
        else:  # the last one, left to end
            run.wait(3600)
        if not run.alive():  # finished: compared, and begun anew
            problems = [f"started again it ended with {run.code}, see {log}"] if run.code else []
            if not problems:
                problems, worst = differences(reference, folder)
                figures |= {
                    "finished": figures["finished"] + 1,
                    "worst_gap": max(worst, figures["worst_gap"]),
                }
            if problems or early >= 10:
                return figures | {"problems": problems}
            shutil.rmtree(folder)
            early += 1
            continue
        wrong: list[str] = []
        if not moment or len(run.workers()) < ranks * (ranks > 1):
            early += 1  # the moment did not come
        else:
            if stop:
                how, wrong = ask_to_stop(run, rng, folder)
                moment += how
            elif ranks > 1:
                how, wrong, seconds = kill_one_rank(run, rng)
                moment += how
                figures["seconds_to_end"].append(seconds)
            early = 0
            figures["kills"] += 1
            print(
                f"{script} seed {seed} {'stop' if stop else 'kill'} {figures['kills']}: {moment}", flush=True
            )
        run.kill()
        text = log.read_text(errors="replace")
        wrong += [x for x in ("terminate called", "Traceback")[: 3 - ranks] if x in text]
        if wrong:
            return figures | {"problems": [f"{moment}: {x}, see {log}" for x in wrong]}
    return figures | {"problems": []}


def prepare(script: str) -> None:
    """Import what the script will, so that what is forked from here need not."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    importlib.import_module(Path(script).stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", choices=OPTIONS)
    parser.add_argument("kills", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stop", action="store_true", help="signals that ask for a stop in place of kills")
    parser.add_argument("--options", default="", help="of the script, in place of those above")
    parser.add_argument("--out", type=Path, help="a folder for the runs, kept; default: a temporary one")
    args = parser.parse_args()
    prepare(args.script)
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        figures = kills(args.script, args.kills, args.seed, args.ranks, out, args.options, args.stop)
        if figures["problems"]:
            print((out / f"{Path(args.script).stem}-{args.ranks}-{args.seed}.log").read_text()[-3000:])
    print(json.dumps(figures), flush=True)
    sys.exit(bool(figures["problems"]))


if __name__ == "__main__":
    main()
