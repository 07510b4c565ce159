"""Contestants that take turns, so that a noisy moment hits them alike."""

import os
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from common import Call, Row
from peers.process import timed
from tqdm import tqdm

TURN = 0.02  # seconds that a turn takes at least, unless it is MOST_CALLS calls
MOST_CALLS = 20
IDLE = 0.005  # seconds between turns: OpenMP's threads spin for a while after their work


class Contestant(Protocol):
    def turn(self, threads: int, calls: int) -> list[float]:
        """Seconds of each of `calls` calls, after one that is not counted."""

    def close(self) -> None: ...


class Local:
    """A contestant in this process; call(i) with i counting on from turn to turn."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._done = 0

    def turn(self, threads: int, calls: int) -> list[float]:
        torch.set_num_threads(threads)
        first = self._done
        self._done += calls + 1
        return timed(self._call, calls, first)

    def close(self) -> None: ...


def measure(
    contestants: dict[str, Contestant], threads: Sequence[int], rounds: int, least: bool
) -> dict[str, dict[int, Row]]:
    """Microseconds a call of each contestant with each number of threads: `us` is the median, or the least."""
    times: dict[tuple[str, int], list[float]] = {}
    calls: dict[tuple[str, int], int] = {}
    for turn in tqdm(range(rounds + 1), desc="measuring", leave=False):
        for count in threads:
            for name, contestant in contestants.items():
                key = (name, count)
                time.sleep(IDLE)
                seconds = contestant.turn(count, calls.get(key, 1))
                if turn:
                    times.setdefault(key, []).extend(seconds)
                else:
                    calls[key] = max(1, min(MOST_CALLS, round(TURN / seconds[0])))
    return {name: {count: summary(times[name, count], least) for count in threads} for name in contestants}


def summary(seconds: list[float], least: bool) -> Row:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    spread = {"us_quarter": low * 1e6, "us_three_quarters": high * 1e6, "us_min": min(seconds) * 1e6}
    return {"us": (min(seconds) if least else middle) * 1e6, "us_median": middle * 1e6, **spread}


@contextmanager
def busy_others() -> Iterator[list[float]]:
    """Appends how many cores other processes kept busy meanwhile, where Linux says so. Ended children are our own."""
    found: list[float] = []
    stat = Path("/proc/stat")

    def snapshot() -> tuple[float, float]:
        ticks = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return busy - sum(use.ru_utime + use.ru_stime for use in uses), time.perf_counter()

    if not stat.exists():
        yield found
        return
    (busy_before, before) = snapshot()
    yield found
    (busy_after, after) = snapshot()
    found.append(max(0.0, (busy_after - busy_before) / (after - before)))
