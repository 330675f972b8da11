"""Run a training script with several seeds, one after the other, as a person would, and print what came of each.

    python benchmarks/seeds.py                                        # ppo_cartpole.py, seeds 1 to 10
    python benchmarks/seeds.py --seeds 1 2 3 -- --env-id Acrobot-v1 --updates 200
    python benchmarks/seeds.py --script ppo_pong_ram.py --seeds 1 2 3 --keep data/pong

Seconds are of the whole process, from the shell's point of view: starting Python and importing torch included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="ppo_cartpole.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 11))
    parser.add_argument("--keep", type=Path, help="folder for the logs, curves and checkpoints (default: none is kept)")
    parser.add_argument("flags", nargs="*", help="of the script, after --: seeds.py -- --updates 50")
    args = parser.parse_args()
    print("| seed | solved | greedy return over fresh episodes | environment steps | seconds |")
    print("|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            log = (args.keep or Path(folder)) / f"{seed}.json"
            files = ["--log", str(log), "--checkpoint", str(log.with_suffix(".pt"))]
            command = [sys.executable, str(ROOT / args.script), "--seed", str(seed), *files, *args.flags]
            started = time.perf_counter()
            if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                sys.exit(code)  # it has said why
            seconds = time.perf_counter() - started
            notes = dict(note.split("=", 1) for note in json.loads(log.read_text())["notes"])
            mean, std = float(notes["final_return_mean"]), float(notes["final_return_std"])
            rows.append((notes["solved"] == "True", mean, int(notes["environment_steps"]), seconds))
            solved = "yes" if rows[-1][0] else "no"
            print(f"| {seed} | {solved} | {mean:.1f} ± {std:.1f} | {rows[-1][2]:,} | {seconds:.1f} |", flush=True)
    solved, means, steps, times = zip(*rows, strict=True)
    print(
        f"| median | {sum(solved)} of {len(rows)} | {statistics.median(means):.1f} | "
        f"{statistics.median(steps):,.0f} | {statistics.median(times):.1f} |"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the script has said so, and what it has saved (without --keep, in vain)
        sys.exit(130)
