"""Time to solve CartPole, whole process from the shell's point of view: this repository, SB3 and CleanRL.

    pip install stable-baselines3
    python benchmarks/solve.py                                      # this repository and SB3, five seeds
    python benchmarks/solve.py --cleanrl ../cleanrl --cleanrl-python ../cleanrl/.venv/bin/python

Solved is a greedy mean return of 475 over 20 episodes, played side by side, every 1,280 steps (CleanRL: 1,536, its
three rollouts).  Ours must reach 475 over 100 more episodes as well before it stops.  SB3 runs with the hyperparameters
that its zoo has for CartPole; CleanRL, which does not evaluate, with its defaults, and with an evaluation put in where
it prints its speed.
"""

import argparse
import os
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
print("solved after", model.num_timesteps if evaluations.best_mean_reward >= 475 else None)
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
                print("solved after", global_step)
                sys.exit()
"""


def seconds(command: list[str], folder: str, word: str) -> tuple[float, bool]:
    """Seconds of a whole process, and whether it solved the task."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    elapsed = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {' '.join(command)}\n{done.stderr}")
    return elapsed, word in done.stdout and "None" not in done.stdout


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
        readings: dict[str, list[tuple[float, bool]]] = {name: [] for name in commands}
        for seed in args.seeds:
            for name, command in commands.items():
                readings[name].append(seconds([*command, str(seed)], folder, "solved"))
    print("| | solved | seconds, median | of each seed | ours takes |\n|---|---|---:|---|---:|")
    ours = [elapsed for elapsed, _ in readings["ours, checked"]]
    for name, rows in readings.items():
        times = [elapsed for elapsed, _ in rows]
        ratio = statistics.median(ours) / statistics.median(times)
        count = sum(solved for _, solved in rows)
        each = ", ".join(f"{elapsed:.1f}" for elapsed in times)
        print(f"| {name} | {count} of {len(rows)} | {statistics.median(times):.1f} | {each} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
