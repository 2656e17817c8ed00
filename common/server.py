"""A server with OpenAI's chat API: it may fail or stall, and nothing is asked of it twice.

Answers are kept in files, one for each rank. A rank asks for its share of the requests and reads the others'
answers from their files, so that a slow server holds up no collective.
"""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import data, dist

BACKOFF = 1.0  # seconds before a request is repeated; doubled each time after, up to a minute
REFUSED = (400, 401, 403, 404, 405, 422)  # the same request would be refused again


class Server:
    """url: up to and with /v1. folder: of the answers, one that all ranks see."""

    def __init__(self, url: str, folder: Path, timeout: float, retries: int, threads: int):
        self.url = url.rstrip("/") + "/chat/completions"
        self.folder, self.timeout, self.retries, self.threads = folder, timeout, retries, threads
        self.lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.mine = folder / f"rank_{dist.rank()}.jsonl"
        if self.mine.exists() and not self.mine.read_bytes().endswith(b"\n"):
            self.write({})  # ends a line that a kill has torn
        self.answers: dict[str, dict] = {}
        self.read_to: Counter[Path] = Counter()  # bytes of each file
        self.refresh()
        self.answers = {key: answer for key, answer in self.answers.items() if "error" not in answer}
        dist.barrier()

    def refresh(self) -> None:
        """Read what has been written since the last time, by any rank."""
        for path in sorted(self.folder.glob("rank_*.jsonl")):
            with path.open("rb") as file:
                file.seek(self.read_to[path])
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self.read_to[path] += len(whole)
            for line in whole.splitlines():
                try:
                    answer = json.loads(line)
                    self.answers[answer.pop("key")] = answer
                except (ValueError, KeyError):
                    continue  # torn by a kill

    def write(self, answer: dict) -> None:
        with self.lock, self.mine.open("a") as file:
            file.write((json.dumps(answer) if answer else "") + "\n")

    def ask(self, bodies: list[dict], read: Callable[[dict], dict]) -> list[dict]:
        """read(choice) of the first choice of each answer; every rank passes the same requests.

        Raises:
            RunError: the server has refused a request, or failed to answer it, on any rank.
        """
        keys = [hashlib.sha256(json.dumps([self.url, body]).encode()).hexdigest()[:32] for body in bodies]
        wanted = dict(zip(keys, bodies, strict=True))
        mine = [key for key in wanted if int(key, 16) % dist.world_size() == dist.rank()]

        def fetch(key: str) -> None:
            try:
                answer = self.post(wanted[key], read)
            except dist.RunError as error:
                answer = {"error": str(error)}
            self.write({"key": key, **answer})
            if "error" in answer:
                raise dist.RunError(answer["error"])

        with ThreadPoolExecutor(self.threads) as pool:
            try:
                list(pool.map(fetch, [key for key in mine if key not in self.answers]))
            finally:
                pool.shutdown(cancel_futures=True)
        while True:
            self.refresh()
            found = [self.answers.get(key) for key in keys]
            for answer in found:
                if answer and "error" in answer:
                    raise dist.RunError(answer["error"])
            if None not in found:
                return found
            time.sleep(0.1)

    def post(self, body: dict, read: Callable[[dict], dict]) -> dict:
        """One request, repeated where the server fails; the key is read from $OPENAI_API_KEY."""
        headers, wait = {"Content-Type": "application/json"}, 0.0
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        for attempt in range(self.retries + 1):
            time.sleep(min(60.0, wait))
            wait = BACKOFF * 2**attempt
            try:
                request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return read(json.load(response)["choices"][0])
            except urllib.error.HTTPError as error:
                problem = f"HTTP status {error.code}"
                if error.code in REFUSED:
                    raise dist.RunError(f"{self.url}: {problem}, {error.read()[:200]!r}") from error
                if (error.headers.get("Retry-After") or "").isdigit():
                    wait = max(wait, float(error.headers["Retry-After"]))
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {data.first_line(error)}"
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                problem = f"an answer of another form ({type(error).__name__})"
        raise dist.RunError(
            f"{self.url}: gave up after {self.retries + 1} tries, the last with {problem}; what was answered "
            "is kept, the same command goes on from there"
        )
