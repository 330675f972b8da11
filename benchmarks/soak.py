"""Does anything grow?  Checked CartPole steps, then sessions opened and closed, every second one by a crash.

    python benchmarks/soak.py                              # 200,000 steps, 20 sessions: half a minute
    python benchmarks/soak.py --steps 20000 --sessions 4

Prints the resident memory of trainer and server, the trainer's file descriptors and threads, and the processes that
it has started.  Exit code 1 if any of these is higher at the end than after the first tenth (memory: by over 4 MB).
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gym_bridge import BridgeError, Contract, GymnasiumSession

CONTRACT = Contract(obs_shape=(4,), n_actions=2, reward_range=(0.0, 1.0))
NUM_ENVS = 8


def megabytes(pid: int) -> float:
    text = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    return int(text) / 1024


def children() -> int:
    """Processes that this one has started and that have not ended (without the ps that counts them)."""
    listing = subprocess.run(["ps", "-A", "-o", "ppid="], capture_output=True, text=True, check=True).stdout
    return listing.split().count(str(os.getpid())) - 1


def reading(server: int | None) -> dict[str, float]:
    return {
        "trainer MB": megabytes(os.getpid()),
        "server MB": megabytes(server) if server else 0.0,
        "descriptors": len(os.listdir("/dev/fd")),
        "threads": threading.active_count(),
        "processes": children(),
    }


def show(what: str, now: dict[str, float]) -> None:
    print(f"{what:>16}" + "".join(f"{value:14.1f}" if "MB" in name else f"{value:14}" for name, value in now.items()))


def grown(before: dict[str, float], after: dict[str, float]) -> list[str]:
    return [name for name in before if after[name] > before[name] + (4 if "MB" in name else 0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200_000, help="environment steps in one session")
    parser.add_argument("--sessions", type=int, default=20, help="sessions opened and closed after that")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    print(" " * 16 + "".join(f"{name:>14}" for name in reading(None)))

    with GymnasiumSession("CartPole-v1", CONTRACT, NUM_ENVS) as session:
        session.reset(seed=1)
        server = session._servers[0].process.pid
        rows = []
        for tenth in range(1, 11):
            for _ in range(args.steps // NUM_ENVS // 10):
                session.step(rng.integers(2, size=NUM_ENVS))
            rows.append(reading(server))
            show(f"{tenth * args.steps // 10:,} steps", rows[-1])
    bad = grown(rows[0], rows[-1])

    rows = []
    for number in range(1, args.sessions + 1):
        with GymnasiumSession("CartPole-v1", CONTRACT, NUM_ENVS, num_workers=2) as session:
            session.reset(seed=number)
            session.step([0] * NUM_ENVS)
            if number % 2:
                os.kill(session._servers[1].process.pid, signal.SIGKILL)
                try:
                    session.step([0] * NUM_ENVS)
                    sys.exit("a killed server went unnoticed")
                except BridgeError:
                    pass
        rows.append(reading(None))
        show(f"{number} sessions", rows[-1])
    bad += grown(rows[min(1, len(rows) - 1)], rows[-1])
    print(f"grown: {', '.join(bad)}" if bad else "nothing has grown")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
