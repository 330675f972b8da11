"""Where the time of one update goes, for both scripts with their default arguments, and what a run costs before it.

    python benchmarks/update.py              # about two minutes; medians over the updates of a real run

The script's own train() runs, with clocks around its parts.  Environments: the same number of steps in a bare loop,
shared between the workers.  Checks: those of transport.py.  Transport: what session.step() takes beyond these two, with
the waiting of workers for each other, or for a core.
"""

import argparse
import contextlib
import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transport import bare, checks, steps_per_second

import ppo_pong_ram  # noqa: F401  (before the other imports torch: it sets how threads wait)
from gym_bridge import CheckedSession


def profile(name: str, updates: int) -> tuple[dict[str, float], str, float]:
    """Milliseconds of each part of an update, and environment steps per second."""
    script = importlib.import_module(name)
    clock: dict[str, float] = defaultdict(float)
    rows: list[dict[str, float]] = []

    def timed(owner: Any, method: str) -> Any:
        inside = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = inside(*args, **kwargs)
            clock[method] += time.perf_counter() - started
            clock["end of " + method] = time.perf_counter()
            return result

        setattr(owner, method, call)
        return inside

    step = timed(CheckedSession, "step")
    for method in "collect_rollout", "gae":
        timed(script, method)
    complete = script.Run.complete_update

    def complete_update(run: Any, *args: Any) -> None:
        now = time.perf_counter()
        rows.append({**clock, "optimise": now - clock["end of gae"]})
        clock.clear()
        complete(run, *args)

    script.Run.complete_update = complete_update
    with tempfile.TemporaryDirectory() as folder:
        files = {"log": Path(folder) / "log.json", "checkpoint": Path(folder) / "checkpoint.pt"}
        args = script.Args(updates=updates, eval_every=updates, eval_max_steps=1, solved_return=1e8, **files)
        with contextlib.redirect_stdout(sys.stderr):  # lines of a training that is not evaluated
            script.train(args)
    CheckedSession.step = step  # type: ignore[method-assign]
    median = {key: statistics.median(row[key] for row in rows[2:]) for key in rows[-1]}
    case = (script.ENV_ID, script.MAKE_KWARGS, script.CONTRACT, 1)
    batch = args.num_envs * args.num_steps
    workers = args.num_workers
    environments = batch / statistics.median(steps_per_second(bare, case) for _ in range(5)) / workers
    checked = checks(script.CONTRACT, args.num_envs) * args.num_steps
    parts = {
        "environments": environments,
        "transport": median["step"] - environments - checked,
        "checks": checked,
        "policy": median["collect_rollout"] - median["step"],
        "advantages": median["gae"],
        "optimise": median["optimise"],
    }
    title = f"{script.ENV_ID}, {args.num_envs} x {args.num_steps} steps, {workers} worker{'s' * (workers > 1)}"
    return {part: 1000 * seconds for part, seconds in parts.items()}, title, batch / sum(parts.values())


def seconds(code: str) -> float:
    """What a fresh Python takes to run ``code``, median of five."""
    readings = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        readings.append(time.perf_counter() - started)
    return statistics.median(readings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for script, updates in ("cartpole", 100), ("pong", 12):
        text = f"how many, at least 3: the first two are not counted (default: {updates})"
        parser.add_argument(f"--{script}-updates", type=int, default=updates, help=text)
    args = parser.parse_args()
    if min(args.cartpole_updates, args.pong_updates) < 3:
        parser.error("--cartpole-updates and --pong-updates must be at least 3: the first two are not counted")
    for name, updates in ("ppo_cartpole", args.cartpole_updates), ("ppo_pong_ram", args.pong_updates):
        parts, title, speed = profile(name, updates)
        total = sum(parts.values())
        print(f"\n| {title} | ms of an update | share |\n|---|---:|---:|")
        for part, milliseconds in parts.items():
            print(f"| {part} | {milliseconds:,.1f} | {milliseconds / total:.0%} |")
        print(f"| together: {speed:,.0f} steps/s | {total:,.1f} | |", flush=True)
    python = seconds("pass")
    print("\n| before the first step | seconds |\n|---|---:|")
    print(f"| Python itself | {python:.2f} |")
    for what in "torch", "gymnasium", "tyro":
        print(f"| import {what} | {seconds(f'import {what}') - python:.2f} |")


if __name__ == "__main__":
    main()
