"""Greedy games of a checkpoint that decide nothing: how good is its policy, beyond the luck of the final evaluation?

    python benchmarks/games.py data/rl/ppo_pong_ram.pt               # 100 games; a few minutes for Pong
    python benchmarks/games.py data/rl/ppo_cartpole.pt --games 500
    python benchmarks/games.py mine.pt --env-id my_envs:MyEnv-v0     # an environment from a module has to be named

Their seeds are others than those of any evaluation in training.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_cartpole
import ppo_pong_ram

SCRIPTS = {"ppo_cartpole.py": ppo_cartpole, "ppo_pong_ram.py": ppo_pong_ram}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="of these scripts")
    parser.add_argument("--games", type=int, default=100, help="how many of each (default: 100)")
    parser.add_argument("--seed", type=int, default=20261121, help="of the first game (default: 20261121)")
    parser.add_argument("--env-id", help="default: the checkpoint's")
    parser.add_argument("--server-command", help="as for the scripts (default: this Python)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header = "| checkpoint | environment steps | greedy return | standard error |\n|---|---:|---:|---:|\n"
    for path in args.checkpoints:
        try:
            state = torch.load(path, weights_only=True)
            script = SCRIPTS[state["script"]]
        except Exception as failure:  # a damaged file can raise anything
            parser.error(f"{path} is not a readable checkpoint of these scripts ({type(failure).__name__}: {failure})")
        given = {"env_id": args.env_id} if args.env_id else {}
        try:
            flags = script.stored_args(script.Args(checkpoint=path, server_command=args.server_command, **given))
            with script.open_session(flags, args.games) as session:
                actor = script.Actor(session.obs_shape, session.contract.n_actions)
                actor.load_state_dict(state["actor"])
                returns = script.evaluate(session, actor, args.seed, flags.eval_max_steps)
        except script.BadInput as failure:  # which names the checkpoint
            parser.error(str(failure))
        except (ValueError, RuntimeError) as failure:  # flags; RuntimeError: a session's, or weights that do not fit
            parser.error(f"{path}: {failure}")
        error = returns.std(ddof=1) / len(returns) ** 0.5
        print(
            f"{header}| {path} | {state['env_steps']:,} | {returns.mean():.2f} ± {returns.std():.2f} | {error:.2f} |",
            flush=True,
        )
        header = ""


if __name__ == "__main__":
    main()
