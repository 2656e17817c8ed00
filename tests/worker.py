"""One rank of the session in conftest.py: reads jobs as JSON lines, answers with JSON lines."""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    from common import dist

    dist.init(seed=1)
    for line in sys.stdin:
        job = json.loads(line)
        dist._stop.update(signal=0, time=0.0, agreed=False)  # an earlier test's
        module, _, name = job["target"].partition(":")
        try:
            answer = {"result": getattr(importlib.import_module(module), name)(**job["kwargs"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print("ANSWER " + json.dumps(answer), flush=True)
    dist.leave(0)


if __name__ == "__main__":
    main()
