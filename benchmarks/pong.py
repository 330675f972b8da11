"""The whole training of ppo_pong_ram.py against the limit: two processes that do nothing but step the emulator.

    python benchmarks/pong.py                       # three rounds of both, side by side; about five minutes
    python benchmarks/pong.py -- --num-envs 32      # with flags of the script

Bare: two processes, each with one environment and random actions, made by gymnasium.make and stepped in a loop.
Training: collecting through the checked bridge, with two workers, and learning from it, once the emulators have
started.  Evaluations are cut to one step, since how much they cost is a matter of --eval-every; complete runs note
theirs (steps_per_second).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from training import run

ROOT = Path(__file__).resolve().parent.parent
BARE = """
import sys, time, ale_py, gymnasium
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
gymnasium.register_envs(ale_py)
env = gymnasium.make("ALE/Pong-v5", obs_type="ram", disable_env_checker=True)
env.reset(seed=int(sys.argv[1]))
env.action_space.seed(int(sys.argv[1]))
print("ready", flush=True)
input()
steps, started = 0, time.perf_counter()
while time.perf_counter() - started < 15:
    for _ in range(100):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    steps += 100
print(steps / (time.perf_counter() - started))
"""


def bare() -> float:
    """Environment steps per second of two processes together."""
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen([sys.executable, "-c", BARE, str(seed)], stdin=pipe, stdout=pipe, text=True) for seed in (1, 2)
    ]
    for process in both:
        assert process.stdout is not None
        process.stdout.readline()  # ready
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in both)


def training(flags: list[str]) -> tuple[float, float]:
    """Environment steps per second of the script, collecting and learning, from update 15 to 45; its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        files = ["--log", f"{folder}/log.json", "--checkpoint", f"{folder}/checkpoint.pt"]
        short = ["--updates", "45", "--eval-every", "15", "--eval-max-steps", "1", "--num-workers", "2"]
        command = [sys.executable, str(ROOT / "ppo_pong_ram.py"), *short, *files, *flags]
        output, memory = run(command, folder, pause=2.0)  # a look takes 7 ms of a core, and none is free
    lines = [line for line in output.splitlines() if line.startswith(("update 15/", "update 45/"))]
    steps, seconds = [], []
    for line in lines:  # "update 15/45  122,880 steps  3,000/s  ..."
        _, done, speed, *_ = (part.replace(",", "") for part in line.split("  "))
        steps.append(int(done.removesuffix(" steps")))
        seconds.append(steps[-1] / int(speed.removesuffix("/s")))
    return (steps[1] - steps[0]) / (seconds[1] - seconds[0]), memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="after --: handed to the script")
    args = parser.parse_args()
    print("| round | two bare emulators, steps/s | training, steps/s | ratio | peak memory |")
    print("|---|---:|---:|---:|---:|")
    rounds = []
    for number in range(1, args.rounds + 1):
        limit = bare()
        reached, memory = training(args.flags)
        rounds.append((limit, reached, reached / limit, memory))
        print(f"| {number} | {limit:,.0f} | {reached:,.0f} | {reached / limit:.2f} | {memory:,.0f} MB |", flush=True)
    limit, reached, ratio, memory = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"| median | {limit:,.0f} | {reached:,.0f} | {ratio:.2f} | {memory:,.0f} MB |")


if __name__ == "__main__":
    main()
