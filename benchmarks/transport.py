"""Environment steps per second without a policy: this bridge, everything checked, beside its unchecked peers.

    pip install stable-baselines3
    python benchmarks/transport.py                # about four minutes; every peer in every round, medians of five
    python benchmarks/transport.py --rounds 3

The actions are drawn beforehand.  The second table is what the contract costs: every check of one batched step, on the
trainer's side and on the server's, timed by itself on a real batch, and its share of the batched step above.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gym_bridge import Contract, GymnasiumSession, NativeSession

TILT = math.radians(24)
SECONDS = 1.0  # per peer and round
CASES = {  # what stands in the table -> id, keyword arguments, contract, N
    f"CartPole, N={num_envs}": (
        "CartPole-v1",
        {},
        Contract(
            (4,), 2, obs_range=([-4.8, -np.inf, -TILT, -np.inf], [4.8, np.inf, TILT, np.inf]), reward_range=(0, 1)
        ),
        num_envs,
    )
    for num_envs in (1, 8, 32)
}
CASES["Pong RAM, N=8"] = (
    "ALE/Pong-v5",
    {"obs_type": "ram"},
    Contract((128,), 6, "uint8", obs_range=(0, 255), reward_range=(-1, 1)),
    8,
)


def make(env_id: str, kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """Runs in the subprocesses of AsyncVectorEnv and SubprocVecEnv too."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gymnasium.register_envs(ale_py)
    return gymnasium.make(env_id, disable_env_checker=True, **kwargs)


# Each peer: makes itself ready, and gives back what takes one (batched) step, how many steps that is, and what ends it.
Peer = tuple[Callable[[Any], object], int, Callable[[], object]]


def bare(env_id: str, kwargs: dict[str, Any], contract: Contract, num_envs: int) -> Peer:
    env = make(env_id, kwargs)
    env.reset(seed=1)

    def step(actions: Any) -> None:
        _, _, terminated, truncated, _ = env.step(actions[0])
        if terminated or truncated:
            env.reset()

    return step, 1, env.close


def vector(kind: str, env_id: str, kwargs: dict[str, Any], contract: Contract, num_envs: int) -> Peer:
    thunks = [functools.partial(make, env_id, kwargs)] * num_envs
    envs = getattr(gymnasium.vector, kind)(thunks)
    envs.reset(seed=1)
    return envs.step, num_envs, envs.close


def stable_baselines3(kind: str, env_id: str, kwargs: dict[str, Any], contract: Contract, num_envs: int) -> Peer:
    from stable_baselines3.common import vec_env

    envs = getattr(vec_env, kind)([functools.partial(make, env_id, kwargs)] * num_envs)
    envs.reset()
    return envs.step, num_envs, envs.close


def native(env_id: str, kwargs: dict[str, Any], contract: Contract, num_envs: int) -> Peer:
    session = NativeSession([make(env_id, kwargs) for _ in range(num_envs)], contract)
    session.reset(1)
    return session.step, num_envs, session.close


def bridge(workers: int, env_id: str, kwargs: dict[str, Any], contract: Contract, num_envs: int) -> Peer:
    session = GymnasiumSession(env_id, contract, num_envs, workers, kwargs)
    session.reset(1)
    return session.step, num_envs, session.close


PEERS: dict[str, Callable[..., Peer]] = {
    "bare loop, one environment": bare,
    "SyncVectorEnv": functools.partial(vector, "SyncVectorEnv"),
    "AsyncVectorEnv": functools.partial(vector, "AsyncVectorEnv"),
    "SB3 DummyVecEnv": functools.partial(stable_baselines3, "DummyVecEnv"),
    "SB3 SubprocVecEnv": functools.partial(stable_baselines3, "SubprocVecEnv"),
    "NativeSession": native,
    "GymnasiumSession, 1 worker": functools.partial(bridge, 1),
    "GymnasiumSession, 2 workers": functools.partial(bridge, 2),
}


def steps_per_second(peer: Callable[..., Peer], case: tuple[Any, ...]) -> float:
    step, width, close = peer(*case)
    actions = np.random.default_rng(1).integers(case[2].n_actions, size=(1000, case[3]))
    try:
        for batch in actions[:20]:
            step(batch)
        steps, started = 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            for batch in actions[steps // width % 1000 :][:20]:
                step(batch)
                steps += width
        return steps / (time.perf_counter() - started)
    finally:
        close()


def checks(contract: Contract, num_envs: int) -> float:
    """Seconds for all checks of one batched step: on exact types where they arrive, on values once, on actions."""
    rng = np.random.default_rng(1)
    if contract.obs_dtype == "uint8":
        observations = rng.integers(256, size=(num_envs, *contract.obs_shape)).astype(np.uint8)
    else:
        observations = rng.uniform(-0.05, 0.05, (num_envs, *contract.obs_shape)).astype(np.float32)
    rewards, actions, flags = [1.0] * num_envs, np.zeros(num_envs, np.int64), [False] * num_envs
    reward_array = np.array(rewards)

    def server() -> None:
        for env in range(num_envs):
            contract._observation(observations[env], env)
        exact()

    def exact() -> None:
        for env in range(num_envs):
            contract._outcome(rewards[env], flags[env], flags[env], env)

    def trainer() -> None:
        exact()
        contract._check_actions(actions, num_envs)
        contract._check_observations(observations)
        contract._check_rewards(reward_array)

    readings = []
    for _ in range(200):
        started = time.perf_counter()
        for _ in range(10):
            server()
            trainer()
        readings.append((time.perf_counter() - started) / 10)
    return statistics.median(readings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {case: {peer: [] for peer in PEERS} for case in CASES}
    shares: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    for number in range(args.rounds):
        for case, details in CASES.items():
            for name, peer in PEERS.items():
                fits = details[3] > 1 or "2 workers" not in name
                results[case][name].append(steps_per_second(peer, details) if fits else math.nan)
                print(f"\rround {number + 1}: {case}, {name}\033[K", end="", file=sys.stderr, flush=True)
            step = details[3] / results[case]["GymnasiumSession, 1 worker"][-1]
            shares[case].append((checks(details[2], details[3]), step))
    print("\r\033[K", end="", file=sys.stderr)
    print(f"| environment steps per second | {' | '.join(CASES)} |")
    print("|---|" + "---:|" * len(CASES))
    for name in PEERS:
        medians = [statistics.median(results[case][name]) for case in CASES]
        print(f"| {name} | {' | '.join('-' if math.isnan(median) else f'{median:,.0f}' for median in medians)} |")
    print(f"\n| the contract's cost | {' | '.join(CASES)} |")
    print("|---|" + "---:|" * len(CASES))
    for what, show in {
        "all checks of a batched step": lambda check, step: f"{check * 1e6:.0f} us",
        "the batched step": lambda check, step: f"{step * 1e6:.0f} us",
        "share": lambda check, step: f"{check / step:.1%}",
    }.items():
        cells = [show(*(statistics.median(column) for column in zip(*shares[case], strict=True))) for case in CASES]
        print(f"| {what} | {' | '.join(cells)} |")
    print(f"\n| of it, GymnasiumSession with 1 and 2 workers reaches | {' | '.join(CASES)} |")
    print("|---|" + "---:|" * len(CASES))
    for other in PEERS:
        cells = []
        for case in CASES:
            both = [results[case][f"GymnasiumSession, {workers}"] for workers in ("1 worker", "2 workers")]
            ratios = [[a / b for a, b in zip(ours, results[case][other], strict=True)] for ours in both]
            cells.append(" and ".join(f"{statistics.median(ratio):.2f}" for ratio in ratios).replace(" and nan", ""))
        print(f"| {other} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
