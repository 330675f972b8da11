"""Whole training, steps per second, with CleanRL's batch, epochs, rates and coefficients for CartPole, and its memory.

    pip install stable-baselines3
    python benchmarks/training.py                                      # this repository and SB3, medians of five rounds
    python benchmarks/training.py --cleanrl ../cleanrl --cleanrl-python ../cleanrl/.venv/bin/python

4 environments x 128 steps, 4 epochs x 4 minibatches, two layers of 64 tanh units, 100,000 steps, no evaluations.  Ours
steps the environments in another process and checks every transition; the others step them in the trainer's process,
unchecked.  Starting Python, importing torch and making the environments is left out, since all do it.  Memory is the
highest sum of the resident memory of all processes of a run, looked at five times a second.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = [sys.executable, str(ROOT / "ppo_cartpole.py"), "--num-envs", "4", "--num-steps", "128", "--update-epochs", "4"]
OURS += ["--num-minibatches", "4", "--learning-rate", "2.5e-4", "--anneal-lr", "--updates", "196"]
OURS += ["--vf-coef", "0.25"]  # of the squared error; theirs is of its half
OURS += ["--eval-every", "196", "--eval-episodes", "1", "--eval-max-steps", "1", "--solved-return", "9999"]
SB3 = """
import sys, time
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 4), n_steps=128, batch_size=128, n_epochs=4, ent_coef=0.01,
            learning_rate=lambda left: 2.5e-4 * left, seed=int(sys.argv[1]), device="cpu")
started = time.perf_counter()
model.learn(100_000)
print("SPS:", 100_352 / (time.perf_counter() - started))
"""


def memory_of(root: int) -> float:
    """Megabytes of a process and of all that it started."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in listing.splitlines()]
    family = {root}
    for pid, parent, _ in sorted(rows):
        if parent in family:
            family.add(pid)
    return sum(rss for pid, _, rss in rows if pid in family) / 1024


def run(command: list[str], folder: str, pause: float = 0.2) -> tuple[str, float]:
    """What it prints, and the peak of its memory in megabytes, looked at every ``pause`` seconds."""
    with open(Path(folder) / "out.txt", "w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, cwd=folder)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(pause)
        if process.returncode:
            sys.exit(f"exit code {process.returncode}: {' '.join(command)}")
        out.seek(0)
        return out.read(), peak


def ours(seed: int, folder: str) -> tuple[float, float]:
    _, peak = run([*OURS, "--seed", str(seed)], folder)
    log = json.loads((Path(folder) / "data/rl/ppo_cartpole_trainlog.json").read_text())
    notes = dict(note.split("=", 1) for note in log["notes"])
    return float(notes["steps_per_second"]), peak


def printed(command: list[str], folder: str) -> tuple[float, float]:
    text, peak = run(command, folder)
    return float(re.findall(r"SPS: ([\d.]+)", text)[-1]), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cleanrl", type=Path, help="a checkout of CleanRL")
    parser.add_argument("--cleanrl-python", default=sys.executable, help="the interpreter of its virtual environment")
    args = parser.parse_args()
    readings: dict[str, list[tuple[float, float]]] = {"ours, checked": [], "SB3 PPO": []}
    if args.cleanrl:
        script = str((args.cleanrl / "cleanrl/ppo.py").absolute())
        cleanrl = [os.path.abspath(args.cleanrl_python), script, "--no-cuda", "--total-timesteps", "100000"]
        readings["CleanRL ppo.py"] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, args.rounds + 1):
            readings["ours, checked"].append(ours(seed, folder))
            readings["SB3 PPO"].append(printed([sys.executable, "-c", SB3, str(seed)], folder))
            if args.cleanrl:
                readings["CleanRL ppo.py"].append(printed([*cleanrl, "--seed", str(seed)], folder))
    print("| | steps per second | ours, as a multiple | peak memory |\n|---|---:|---:|---:|")
    for name, rows in readings.items():
        ratio = statistics.median(a[0] / b[0] for a, b in zip(readings["ours, checked"], rows, strict=True))
        speed, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {speed:,.0f} | {ratio:.2f} | {peak:,.0f} MB |")


if __name__ == "__main__":
    main()
