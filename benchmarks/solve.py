"""Time to solve CartPole, whole process from the shell's point of view: this repository, SB3 and CleanRL.

    pip install stable-baselines3
    python benchmarks/solve.py                                      # this repository and SB3, five seeds
    python benchmarks/solve.py --cleanrl ../cleanrl --cleanrl-python ../cleanrl/.venv/bin/python

Solved is a greedy mean return of 475 over 20 episodes, played side by side, every 1,280 steps (CleanRL: 1,536, its
three rollouts).  Two times are taken of each process: from its start until it prints that an evaluation has reached
475, and until it has ended.  In between ours plays 100 fresh episodes more, which must reach 475 as well, and the
others do nothing.  SB3 runs with the hyperparameters that its zoo has for CartPole; CleanRL, which does not evaluate,
with its defaults, and with an evaluation put in where it prints its speed.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SB3 = """
import sys
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
seed = int(sys.argv[1])
model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), n_steps=32, batch_size=256, n_epochs=20, gamma=0.98,
            gae_lambda=0.8, learning_rate=lambda left: 1e-3 * left, clip_range=lambda left: 0.2 * left, ent_coef=0.0,
            seed=seed, device="cpu")
stop = StopTrainingOnRewardThreshold(475, verbose=0)
evaluations = EvalCallback(make_vec_env("CartPole-v1", 20, seed=seed + 1000), callback_on_new_best=stop, eval_freq=160,
                           n_eval_episodes=20, deterministic=True, verbose=0)
model.learn(100_000, callback=evaluations)
if evaluations.best_mean_reward >= 475:
    print("greedy", evaluations.best_mean_reward, flush=True)
"""
CLEANRL_LINE = '        print("SPS:", int(global_step / (time.time() - start_time)))\n'
CLEANRL_EVALUATION = """
        if iteration % 3 == 0:
            trials = gym.vector.SyncVectorEnv([lambda: gym.make(args.env_id)] * 20)
            seen, _ = trials.reset(seed=args.seed + 1000 * iteration)
            scores, playing = np.zeros(20), np.ones(20, bool)
            while playing.any():
                with torch.no_grad():
                    moves = agent.actor(torch.Tensor(seen)).argmax(1)
                seen, points, ended, cut, _ = trials.step(moves.numpy())
                scores += points * playing
                playing &= ~(ended | cut)
            if scores.mean() >= 475:
                print("greedy", scores.mean(), flush=True)
                sys.exit()
"""


def seconds(command: list[str], folder: str) -> tuple[float, float]:
    """From the start of a process until it prints a greedy return of 475 (infinity: never), and until it has ended."""
    started = time.perf_counter()
    reached = math.inf
    with open(Path(folder) / "errors.txt", "w+") as errors:
        process = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        for line in process.stdout:
            if any(float(value) >= 475 for value in re.findall(r"greedy (\S*\d)", line)):
                reached = min(reached, time.perf_counter() - started)
        if process.wait():
            errors.seek(0)
            sys.exit(f"exit code {process.returncode}: {' '.join(command)}\n{errors.read()}")
    return reached, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--cleanrl", type=Path, help="a checkout of CleanRL")
    parser.add_argument("--cleanrl-python", default=sys.executable, help="the interpreter of its virtual environment")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "ours, checked": [sys.executable, str(ROOT / "ppo_cartpole.py"), "--seed"],
            "SB3 PPO, tuned": [sys.executable, "-c", SB3],
        }
        if args.cleanrl:
            source = (args.cleanrl / "cleanrl/ppo.py").read_text()
            if source.count(CLEANRL_LINE) != 1:
                sys.exit("CleanRL's ppo.py does not look as expected: put the evaluation in by hand")
            script = Path(folder) / "ppo.py"
            script.write_text("import sys\n" + source.replace(CLEANRL_LINE, CLEANRL_EVALUATION))
            commands["CleanRL ppo.py"] = [os.path.abspath(args.cleanrl_python), str(script), "--no-cuda", "--seed"]
        readings: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for seed in args.seeds:
            for name, command in commands.items():
                readings[name].append(seconds([*command, str(seed)], folder))
    print("| | reached | seconds until then, median | of each seed | ours takes | to the end, median | ours takes |")
    print("|---|---|---:|---|---:|---:|---:|")
    ours = [statistics.median(column) for column in zip(*readings["ours, checked"], strict=True)]
    for name, rows in readings.items():
        reached, ended = (statistics.median(column) for column in zip(*rows, strict=True))
        count = f"{sum(time < math.inf for time, _ in rows)} of {len(rows)}"
        each = ", ".join(f"{time:.1f}" for time, _ in rows)
        shares = f"{ours[0] / reached:.2f}", f"{ours[1] / ended:.2f}"
        print(f"| {name} | {count} | {reached:.1f} | {each} | {shares[0]} | {ended:.1f} | {shares[1]} |")


if __name__ == "__main__":
    main()
