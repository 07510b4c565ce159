"""A contestant in a process of its own, which waits for its turns. Not all need torch."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent


def timed(call: Callable[[int], object], calls: int, first: int) -> list[float]:
    """Seconds of each of `calls` calls, with numbers that follow `first`: that call wakes up threads, uncounted."""
    seconds = []
    for i in range(first, first + calls + 1):
        begin = time.perf_counter()
        call(i)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


class Process:
    """Runs `python -m peers.<module> <settings>`, which must end in `serve`."""

    def __init__(self, module: str, settings: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", f"peers.{module}", json.dumps(settings)],
            cwd=BENCHMARKS,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()  # it is ready

    def turn(self, threads: int, calls: int) -> list[float]:
        """Seconds of each of `calls` calls."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{json.dumps([threads, calls])}\n")
        self._child.stdin.flush()
        return json.loads(self._answer())

    def close(self) -> None:
        self._child.communicate()

    def _answer(self) -> str:
        assert self._child.stdout is not None
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._child.args!r} ended with status {self._child.wait()}")
        return answer


def serve(call: Callable[[int], object], set_threads: Callable[[int], object]) -> None:
    """Take turns until the input ends: the other side of Process."""
    count = 0
    print("ready", flush=True)
    for line in sys.stdin:
        threads, calls = json.loads(line)
        set_threads(threads)
        print(timed(call, calls, count), flush=True)
        count += calls + 1
