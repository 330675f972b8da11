"""Proximal Policy Optimization (PPO) on Pong, from the 128 bytes of the Atari's memory: to be read from top to bottom.

    python ppo_pong_ram.py --seed 1     # learns to beat the computer, in some 12 minutes on two cores
    python ppo_pong_ram.py --watch      # plays what it has learned, in a window

Two paddles, one ball, and whoever has 21 points first wins.  A point won is a reward of 1, a point lost of -1, so a
game returns -21 .. 21.  Solved is a mean return of 19; pushing buttons at random returns about -20.  A step holds one
of six actions for four frames; in each frame, with probability 0.25, the console repeats the last frame's action
instead (sticky actions [6]), so that an action may begin late, and no sequence of moves can be learned by heart.  The
picture is not looked at: an observation is the console's memory, 128 bytes whose meaning is not told.  Watch the
sampled return climb from -20, with an approximate KL (how far the policy is from the one that acted, on average over an
update's minibatches) around 0.008 at first, and the entropy fall from 1.79 (= ln 6, undecided) to 0.7 .. 1.0 (ln 2 =
0.69 would be: sure of the move, undecided between the two actions for it).

PPO repeats three things; train(), below, is the loop.
  - Collect a rollout: the actor (the policy) plays T steps in each of N environments, and samples its actions.
  - Judge: for each state the critic predicts the discounted return, the sum of future rewards, each weighted by
    gamma^k if it is k steps ahead.  gae() turns rewards and predictions into advantages: how much better each action
    was than predicted.
  - Learn, in several passes over the rollout: ppo_loss() makes actions whose advantage is above average likelier, the
    others less likely; a sample stops pushing the actor once its action's probability has changed by a fifth that way.
    The critic learns to predict better.
(Here credit ends with a point, and at first a lost one counts less: train() says why.)
Returns in the log are not discounted: sums of an episode's rewards.  Now and then the greedy policy, which always takes
the most probable action, is evaluated on its own.

The environments run outside this process.  gym_bridge.py checks every transition against a contract before this file
sees it: a NaN, a wrong shape or a crashed simulator ends the run with a message, and is never learned from.

References
    [1] Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
    [2] Schulman et al. 2015, High-Dimensional Continuous Control Using Generalized Advantage Estimation,
        arXiv:1506.02438
    [3] Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization, ICLR Blog Track
    [4] Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning
        (REINFORCE), Machine Learning 8
    [5] Pardo et al. 2018, Time Limits in Reinforcement Learning, ICML
    [6] Machado et al. 2018, Revisiting the Arcade Learning Environment, JAIR 61
    [7] Karpathy 2016, Deep Reinforcement Learning: Pong from Pixels
    [8] Jordan et al. 2024, Muon: An Optimizer for Hidden Layers in Neural Networks
    [9] Wei & Luke 2016, Lenient Learning in Independent-Learner Stochastic Cooperative Games, JMLR 17
    [10] Tancik et al. 2020, Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains,
        NeurIPS

Legend, used in shape comments
    T  steps of a rollout (--num-steps)       *D  the shape of an observation, (F, K); here (2, 134)
    N  environments (--num-envs)              A   number of actions; here 6 (A_t, in equations, is an advantage)
    B  samples of a minibatch, T * N / --num-minibatches
    F  steps in an observation, each as K numbers: 128 bytes, and the action that led there, one-hot
    I  inputs made of each number; here 8     U   those of all I * K inputs that are used
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "gymnasium>=1.1,<2", "ale-py>=0.10", "tyro>=1.0.16"]
# ///

from __future__ import annotations

import contextlib
import gc
import html
import inspect
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

if __name__ == "__main__":  # until main(): Ctrl-C during the imports ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import tyro

from gym_bridge import CORES, CheckedSession, Contract, ContractViolation, GymnasiumSession, SessionFailure, Transition

# ------------------------------------- environment and command line (a first reader may go on to "actor and critic")

# What this environment promises, and what every observation and transition is held to.
ENV_ID = "ALE/Pong-v5"
CONTRACT = Contract(
    obs_shape=(128,),  # all the memory that an Atari 2600 has
    n_actions=6,  # nothing, fire, right (up), left (down), right and fire, left and fire
    obs_dtype="uint8",
    obs_range=(0, 255),
    reward_range=(-1.0, 1.0),
)
MAKE_KWARGS: dict[str, Any] = {"obs_type": "ram"}
# What is shown to the networks: the memory of the last two steps, whose difference shows motion plainly (some byte may
# hold a speed, but a byte has no sign: -1 is 255, far from 0 and 1), each followed by the action that led to it,
# one-hot, since a sticky action may still be going on.  (An episode begins with its first memory twice, and no action:
# zeros.)
FRAME_STACK = 2
SOLVED_RETURN = 19.0  # 21 points to 2, on average
MAX_INPUTS = 10_000  # numbers in an observation: these networks are not made for more
FINAL_EPISODES = 30  # fresh ones, which decide whether it is solved


@dataclass(frozen=True)
class Args:
    """PPO on Pong, or on any game of the Arcade Learning Environment, from the 128 bytes of its memory.

    [3]: Huang et al. 2022, The 37 Implementation Details of Proximal Policy Optimization.
    [9]: Wei & Luke 2016, Lenient Learning in Independent-Learner Stochastic Cooperative Games.
    """

    seed: int = 1
    """fixes all randomness: two runs on one machine (without --cuda, on as many cores) differ only in time"""
    cuda: bool = False
    """run the networks on a GPU"""
    updates: int = 500
    """maximum number of rollouts: training stops when the environment is solved"""
    log: Path = Path("data/rl/ppo_pong_ram_trainlog.json")
    """where the log goes; the picture of the learning curve goes beside it, as .svg"""
    eval_every: int = 20
    """updates between two evaluations of the greedy policy, and, for --anneal-lr, between two looks at the returns"""
    eval_episodes: int = 8
    """episodes of an evaluation, each in an environment of its own"""
    eval_max_steps: int = 10_000
    """steps after which an evaluation episode is cut short, and its return so far is counted"""
    env_id: str = ENV_ID
    """a game such as ALE/Breakout-v5 or my_module:MyGame-v0 (it gets obs_type="ram"); its spaces are the contract"""
    num_envs: int = 64
    """N, environments that are stepped together ([3], detail 1); more of them make a less noisy gradient"""
    num_workers: int = min(4, CORES)
    """processes that share the environments, one for each core (up to 4); changes the speed, not the numbers"""
    num_steps: int = 128
    """T, steps in each environment between two updates"""
    learning_rate: float = 1.4e-3
    """step size for the actor: Adam's; Muon's, for the matrices of its hidden layers, is twice that"""
    critic_learning_rate: float = 1e-2
    """step size for the critic, Adam's and Muon's: larger, since it has no ratio that must stay near 1"""
    anneal_lr: bool = True
    """let the learning rates fall linearly to zero over --updates ([3], detail 4), and sooner near --solved-return"""
    gamma: float = 0.98
    """discount: a reward k steps ahead counts gamma^k, here 0.36 after 50 steps, 0.01 after 228"""
    gae_lambda: float = 0.8
    """GAE: 0 trusts the critic (biased), 1 trusts the sampled rewards (noisy)"""
    cut_at_reward: bool | None = None
    """credit ends at rewards as at an episode's end; by default only in ALE/Pong-v5, where points end rallies"""
    leniency: float | None = None
    """share of negative rewards forgiven at first [9]; falls as the rates do; by default 0.6 in ALE/Pong-v5, else 0"""
    num_minibatches: int = 8
    """parts that a rollout is shuffled into, one gradient step each ([3], detail 6)"""
    update_epochs: int = 3
    """passes over a rollout"""
    clip_coef: float = 0.2
    """epsilon: a sample stops pushing once its ratio is this far from 1 in the direction its advantage favours"""
    ent_coef: float = 0.03
    """weight of the entropy bonus ([3], detail 10): pays for staying undecided; falls as the cube of the rates does"""
    vf_coef: float = 0.5
    """weight of the critic's squared error; hardly matters: --max-grad-norm and the optimiser all but undo it"""
    max_grad_norm: float = 0.5
    """each network's gradient is scaled down to this norm if its own is larger"""
    target_kl: float | None = None
    """end an update after the epoch whose last minibatch has an approximate KL divergence above this"""
    solved_return: float | None = None
    """stop when an evaluation, then fresh episodes, too, reach this mean; if None, 19 for ALE/Pong-v5, else no goal"""
    checkpoint: Path = Path("data/rl/ppo_pong_ram.pt")
    """where weights, optimiser state and counters are kept; a new run renames an older one, to .old"""
    resume: bool = False
    """continue from --checkpoint; flags not given keep its values (but for files, commands and modules)"""
    watch: bool = False
    """play greedy episodes of --checkpoint in a window"""
    server_command: str | None = None
    """what to run in place of this Python for the environments, such as "/other/venv/bin/python gym_bridge.py" """

    def __post_init__(self) -> None:
        """Raises ValueError, which says what to do, for values that cannot be."""
        hints = get_type_hints(Args)
        for field in fields(self):  # from Python: numpy's numbers, and paths as strings, are welcome
            value = getattr(self, field.name)
            value = value.item() if isinstance(value, np.generic) else value
            value = Path(value) if field.type == "Path" and isinstance(value, str) else value
            kinds = get_args(hints[field.name]) or (hints[field.name],)  # float | None has two
            kinds = (*kinds, int) if float in kinds else kinds  # 1 will do for 1.0
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"--{field.name.replace('_', '-')} must be of type {field.type}, not {value!r}")
            object.__setattr__(self, field.name, value)
        counts = "updates eval_every eval_episodes eval_max_steps num_envs num_workers num_steps num_minibatches"
        rules: list[tuple[str, Callable[[Any], bool], str]] = [
            (counts + " update_epochs", lambda value: value >= 1, "must be above 0"),
            ("learning_rate critic_learning_rate", lambda value: 0 < value < math.inf, "must be positive"),
            ("clip_coef max_grad_norm", lambda value: 0 < value < math.inf, "must be positive"),
            ("ent_coef vf_coef", lambda value: 0 <= value < math.inf, "must not be negative"),
            ("seed", lambda value: 0 <= value < 2**63, "must lie in 0 .. 2**63 - 1"),
            ("gamma gae_lambda", lambda value: 0 <= value <= 1, "must lie in 0 .. 1"),
            ("leniency", lambda value: value is None or 0 <= value <= 1, "must lie in 0 .. 1"),
            ("solved_return", lambda value: value is None or -1e9 < value < 1e9, "must lie in -1e9 .. 1e9"),
            ("target_kl", lambda value: value is None or value > 0, "must be positive"),
            ("log", lambda value: value.suffix == ".json", "must end in .json (its picture will end in .svg)"),
            ("checkpoint", lambda value: value.name != "", "must name a file"),
        ]
        for names, good, rule in rules:
            for name in names.split():
                if not good(getattr(self, name)):
                    raise ValueError(f"--{name.replace('_', '-')} {rule}, not {getattr(self, name)}")
        try:
            empty = self.server_command is not None and not shlex.split(self.server_command)
        except ValueError as error:
            raise ValueError(f"--server-command cannot be split into words: {error}") from None
        if empty:
            raise ValueError("--server-command is empty: leave it out for this Python")


def open_session(args: Args, num_envs: int, **make_kwargs: Any) -> GymnasiumSession:
    """Environments as ``args`` describe them.  The servers start in the background; the first reset waits for them."""
    command = shlex.split(args.server_command) if args.server_command else None
    contract = CONTRACT if args.env_id == ENV_ID else Contract.from_env(args.env_id, MAKE_KWARGS, command)
    if len(contract.obs_shape) != 1 or contract.obs_dtype != "uint8" or contract.obs_shape[0] > MAX_INPUTS:
        shown = f"{contract.obs_dtype} of shape {contract.obs_shape}"
        wanted = f"a vector of at most {MAX_INPUTS:,} bytes (uint8), such as a memory"
        raise BadInput(f"{args.env_id} shows {shown}: this script wants {wanted}")
    return GymnasiumSession(
        args.env_id,
        contract,
        num_envs,
        min(args.num_workers, num_envs),
        make_kwargs={**MAKE_KWARGS, **make_kwargs},
        server_command=command,
        wait=False,
        frame_stack=FRAME_STACK,
        append_action=True,
    )


STARTED = time.perf_counter()  # the seconds of a run are counted from here
if __name__ == "__main__":  # --help and bad flags are answered before torch, which takes most of a second, is imported
    gc.disable()  # until main(): Python would look for garbage among torch's objects again and again, for 0.3 s in all
    try:
        tyro.cli(Args)
    except OSError:  # --help | head, and nobody reads the rest
        os._exit(1)

# Between its tasks torch's second thread (see train) waits awake, on a core that others may need: for microseconds with
# this, not milliseconds (GNU's OpenMP, so Linux).  It is read once, when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch  # noqa: E402
from numpy.random import SeedSequence  # noqa: E402  (imported later, in main(), it could swallow a Ctrl-C)
from torch import nn  # noqa: E402

# ---------------------------------------------------------------------------------------------------- actor and critic


class Inputs(nn.Module):
    """What a network sees of each byte: its value, sines and cosines of it, and its change since the step before.

    A ball's motion is a tiny difference between two large numbers; given as an input of its own, scaled by how large
    such differences are, it is as easy to see as the ball's position.  And where a few pixels decide, sines and cosines
    tell places apart that lie close together (positional encoding [10]): with the position alone, a network is slow to
    learn what changes within a short distance.  Each input is scaled to mean 0 and standard deviation 1 over all
    rollouts so far, and clipped at 5 (for continuous actions [3] does so, too, details 6 and 7, and clips at 10).  No
    input is used in the first rollout: every action is equally likely, and only the output biases learn from it.

    An input depends on a single byte, so there is a table of what it is for each of the 256 values.  Counts, table and
    which inputs are used are buffers: saved with the weights, changed only by ``update``.

    Raises ValueError for observations of another shape, or not stacked, TypeError for any that are not bytes.
    """

    PERIODS = (128.0, 64.0, 32.0)  # of the sines and cosines

    def __init__(self, obs_shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(obs_shape) != 2 or obs_shape[0] < 2:
            raise ValueError(f"observations must be (F, K), F > 1 (give the session a frame_stack), not {obs_shape}")
        frames, numbers = obs_shape
        value = torch.arange(256, dtype=torch.uint8)
        angle = 2 * math.pi * value.double() / torch.tensor(self.PERIODS).unsqueeze(-1)  # (periods, 256)
        # A difference of bytes is modulo 256.  Read as -128 .. 127 it is right for a counter that wraps around, too,
        # while a jump of 128 or more changes its sign.
        change = value.view(torch.int8).double().expand(frames - 1, -1)  # (F - 1, 256)
        # The I inputs of a number, for each value of the byte that they come from: the newest (0) or a change (1, ..).
        raw = torch.cat([value.double().unsqueeze(0), change, angle.sin(), angle.cos()])
        source = torch.tensor([*range(frames)] + [0] * (2 * len(angle)))
        self.raw: torch.Tensor = nn.Buffer(raw, persistent=False)  # (I, 256)
        self.source: torch.Tensor = nn.Buffer(source, persistent=False)  # (I,)
        self.size = len(raw) * numbers
        self.counts: torch.Tensor = nn.Buffer(torch.zeros(frames, numbers, 256, dtype=torch.int64))  # of values so far
        self.table: torch.Tensor = nn.Buffer(torch.zeros(len(raw), numbers, 256))  # (I, K, 256) the inputs, scaled
        self.used: torch.Tensor = nn.Buffer(torch.zeros(len(raw), numbers, dtype=torch.bool))  # (I, K)

    def newest_and_changes(self, observations: torch.Tensor) -> torch.Tensor:
        """(..., F, K) bytes: the newest ones, then how much each has changed from step to step, modulo 256."""
        if observations.dtype != torch.uint8:
            raise TypeError(f"observations must be bytes (torch.uint8), not {observations.dtype}")
        if observations.shape[-2:] != self.counts.shape[:2]:  # other bytes would be looked up
            wanted = ", ".join(map(str, self.counts.shape[:2]))
            raise ValueError(f"observations must be (..., {wanted}), not {tuple(observations.shape)}")
        return torch.cat([observations[..., -1:, :], observations.diff(dim=-2)], -2)

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., F, K) -> (..., U), the inputs that are used, and (U,), their places among all I * K."""
        kind, number = self.used.nonzero(as_tuple=True)  # (U,) each
        numbers = self.used.shape[1]  # K
        places = (kind * numbers + number).int()
        values = self.newest_and_changes(observations).flatten(-2)  # (..., F * K)
        values = values.index_select(-1, self.source[kind] * numbers + number)  # (..., U)
        inputs = self.table.flatten().index_select(0, (256 * places + values).flatten())  # table[kind, number, values]
        return inputs.view(values.shape), places

    def update(self, observations: torch.Tensor) -> None:
        """Take more observations into means and deviations."""
        values = self.newest_and_changes(observations).flatten(0, -3)  # (T * N, F, K)
        # One bincount for all F * K numbers: each has 256 bins of its own.
        first = torch.arange(0, self.counts.numel(), 256, dtype=torch.int32, device=values.device)
        bins = first.view(values.shape[1:]) + values  # (T * N, F, K)
        self.counts += bins.flatten().bincount(minlength=self.counts.numel()).view_as(self.counts)
        share = self.counts[self.source] / self.counts[0, 0].sum().double()  # (I, K, 256)
        mean = (share * self.raw.unsqueeze(1)).sum(-1, keepdim=True)  # (I, K, 1)
        offset = self.raw.unsqueeze(1) - mean  # (I, K, 256)
        variance = (share * offset.square()).sum(-1, keepdim=True)  # (I, K, 1)
        # What has always been the same says nothing.  (Nor do sines of a number that has had two values only, as those
        # of an action: they would repeat it.)
        self.used.copy_(variance.squeeze(-1) > 1e-9)
        frames = len(self.counts)  # F; then come sines and cosines
        self.used[frames:, (self.counts[0] > 0).sum(-1) <= 2] = False
        self.table.copy_(torch.where(self.used.unsqueeze(-1), offset * variance.rsqrt(), 0).clamp(-5, 5))


class InputLinear(nn.Linear):
    """nn.Linear of the inputs that are used, which come with their places: in Pong, a fifth of all."""

    def forward(self, used: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        inputs, places = used  # (..., U), (U,)
        return nn.functional.linear(inputs, self.weight.index_select(1, places), self.bias)


def mlp(inputs: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Two hidden layers of 128 units, each with LayerNorm and ReLU.  Orthogonal weights, zero biases ([3], detail 2).

    LayerNorm (a sample's 128 numbers get mean 0 and standard deviation 1, then a scale and an offset that are learned)
    cancels the scale of a hidden layer's weights: their gain of sqrt(2), kept from CartPole, only makes each optimiser
    step smaller relative to them.  No norm follows the last layer: there the gain matters.
    """
    layers = [InputLinear(inputs, 128), nn.Linear(128, 128), nn.Linear(128, outputs)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    hidden = [nn.Sequential(layer, nn.LayerNorm(128), nn.ReLU()) for layer in layers[:2]]
    return nn.Sequential(*hidden, layers[2])


class Actor(nn.Module):
    """The policy pi(a|s), the probability of each action in a state: the softmax of one logit per action.

    Its last layer starts out 140 times smaller than the others: to a new actor all actions are nearly equal, and the
    first rollouts try them all.  (Gradients below it are as much smaller; the optimisers mostly make up for that.)  It
    shares no weights with the critic ([3], detail 13).
    """

    def __init__(self, obs_shape: tuple[int, ...], n_actions: int) -> None:
        super().__init__()
        self.inputs = Inputs(obs_shape)
        self.net = mlp(self.inputs.size, n_actions, last_gain=0.01)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(self.inputs(observations))  # (..., *D) -> (..., A)
        return logits


class Critic(nn.Module):
    """The value function V(s): how much discounted reward the policy will still collect from here, on average.

    Where credit ends at a reward, that is up to the next one: in Pong, whether the rally will be won, and how soon (a
    lost one counting less at first).
    """

    def __init__(self, obs_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inputs = Inputs(obs_shape)
        self.net = mlp(self.inputs.size, 1, last_gain=1.0)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.net(self.inputs(observations)).squeeze(-1)  # (..., *D) -> (...)
        return values


# -------------------------------------------------------------------------------------------------- the checked rollout


@dataclass(frozen=True)
class Rollout:
    """T steps of N environments: what was seen, done and earned, and what the networks made of it."""

    observations: torch.Tensor  # (T, N, *D)
    actions: torch.Tensor  # (T, N) int64
    log_probs: torch.Tensor  # (T, N) log pi(a|s) of the policy that acted
    rewards: torch.Tensor  # (T, N)
    next_observations: torch.Tensor  # (T, N, *D) where each action led, before any reset
    terminated: torch.Tensor  # (T, N) bool
    truncated: torch.Tensor  # (T, N) bool
    values: torch.Tensor  # (T, N) V(s)
    next_values: torch.Tensor  # (T, N) V(s')

    def __post_init__(self) -> None:
        """Raises ValueError if the fields have come out of step."""
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        whole = shapes["observations"]  # (T, N, *D)
        expected = {name: whole if name.endswith("observations") else whole[:2] for name in shapes}
        if len(whole) < 2 or shapes != expected:
            raise ValueError(f"the fields of a rollout must all be (T, N) or (T, N, *D), not {shapes}")

    @property
    def done(self) -> torch.Tensor:
        """(T, N) bool: the episode ended with this step, for whichever reason."""
        return self.terminated | self.truncated


@torch.no_grad()
def collect_rollout(session: CheckedSession, actor: nn.Module, critic: nn.Module, horizon: int) -> Rollout:
    """Let the actor play ``horizon`` steps in every environment of the session, going on where it stands.

    Actions are sampled, not the most probable ones taken: the policy gradient is a mean over samples, and that is how
    PPO explores.  Where an episode ends, the session begins the next one: a transition's ``next_observation`` is where
    the old one ended, ``session.observation`` where the new one begins.  Every transition has passed the session's
    contract.  Networks take (..., *D), with one leading dimension or two, and return (..., A) and (...).
    Raises ContractViolation, BridgeError or FloatingPointError (logits not finite); then there is no rollout.
    """
    device = next(actor.parameters()).device
    all_logits: list[torch.Tensor] = []
    transitions: list[Transition] = []
    for _ in range(horizon):
        logits = actor(torch.from_numpy(session.observation).to(device))  # (N, A)
        if not logits.isfinite().all():
            raise FloatingPointError("the actor's outputs are not finite: scale observations, or lower --learning-rate")
        sampled = torch.multinomial(logits.softmax(-1), num_samples=1).squeeze(-1)  # (N,)
        all_logits.append(logits)
        transitions.append(session.step(sampled.cpu().numpy()))
    observations, actions, rewards, next_observations, terminated, truncated = (
        torch.from_numpy(np.stack([getattr(transition, name) for transition in transitions])).to(device)
        for name in ("observation", "action", "reward", "next_observation", "terminated", "truncated")
    )  # each (T, N, ...)

    log_pi = torch.stack(all_logits).log_softmax(-1)  # (T, N, A) of the policy that acted: pi_old in ppo_loss
    # The critic sees the rollout only now: one pass is cheaper than T.
    # V(s') gets a pass of its own: at an episode's end, and in the last row, it is not values[t + 1].
    return Rollout(
        observations,
        actions,
        log_pi.gather(-1, actions.unsqueeze(-1)).squeeze(-1),
        rewards.float(),
        next_observations,
        terminated,
        truncated,
        values=critic(observations),
        next_values=critic(next_observations),
    )


# -------------------------------------------------------------------------------------------------------- advantages


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> torch.Tensor:
    """Generalized Advantage Estimation [2]: how much better each action turned out than the critic expected.

    Why not learn from the rewards that followed?  In a state where every action earns 100, each would look good.
    Subtracting V(s), which does not depend on the action, leaves the mean of the policy gradient as it is and takes
    away much of its noise.  And how many rewards are summed before the critic's prediction takes over?  After one,
    r + gamma * V(s'), there is little noise, but all of the critic's error; after all of them, none of its error, but
    all the noise.  GAE takes every number n: n rewards, discounted, plus gamma^n * V of the state they led to, minus
    V(s) ([2], eq. 14), and averages with weights (1 - lambda) * lambda^(n-1).  That average equals the sum of all
    one-step errors, delta (the case n = 1), the one k steps ahead with weight (gamma * lambda)^k ([2], eq. 16).  (Here
    n goes no further than the end of the episode or of the rollout, and the last n has all the weight that is left.)

    All tensors (T, N), ``terminated`` and ``truncated`` bool (or 0 and 1), ``next_values`` V(s') of the state that the
    action led to, before any reset.  Returns advantages (T, N).  Raises ValueError for other shapes.
    """
    shapes = {tuple(each.shape) for each in (rewards, values, next_values, terminated, truncated)}
    if len(shapes) > 1 or rewards.ndim != 2:
        raise ValueError(f"gae: rewards, values, next_values, terminated, truncated must all be (T, N), not {shapes}")
    # Two ways for an episode to end, and they differ [5].  Terminated: nothing comes after, V(s') counts as 0.
    # Truncated: the task would go on, we have only stopped watching, so V(s') stands for the rest (the bootstrap).
    # Either way the sum below ends here (later errors count for nothing): the next row belongs to another episode.
    # Differs from OpenAI's code (ppo2), where a time limit counts as terminated ([3], detail 5).
    not_terminated = ~terminated.bool()
    not_done = not_terminated & ~truncated.bool()
    # delta_t = r_t + gamma * (1 - terminated_t) * V(s'_t) - V(s_t)      [2], eq. 11
    deltas = rewards + gamma * next_values.where(not_terminated, 0) - values
    # A_t = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}            [2], eq. 16, as a recursion from the end
    # What lies beyond the rollout's last row is in that row's V(s') already, hence A_T = 0 to begin with.
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[0])  # (N,)
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + gamma * gae_lambda * advantage * not_done[t]  # A_{t+1} on the right, A_t on the left
        advantages[t] = advantage
    return advantages


# ---------------------------------------------------------------------------------------------------------- PPO loss


def ppo_loss(
    logits: torch.Tensor,
    values: torch.Tensor,
    actions: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    targets: torch.Tensor,
    clip_coef: float = 0.2,
    vf_coef: float = 0.5,
    ent_coef: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of PPO, to be minimised: clipped surrogate, the critic's squared error, entropy bonus ([1], eq. 9).

    The policy gradient, E[A_t * grad log pi(a|s)] ([1], eq. 1; [4]), says how the mean return changes with the actor's
    weights: each sample pushes its action's probability up or down, in proportion to its advantage.  But it holds only
    for the policy that collected the data: one gradient step, and the data is stale.  PPO takes the ratio
    r = pi(a|s) / pi_old(a|s) in the place of log pi(a|s).  Its gradient is r * grad log pi(a|s): while r is 1, that of
    log pi(a|s); later r makes up for actions that have become likelier or rarer (importance sampling).  It makes up for
    nothing else: states and advantages stay the old policy's, and a large ratio is noisy.  So the clipped surrogate,
    which PPO maximises in the place of the return, ignores a sample once its ratio has moved by more than ``clip_coef``
    in the direction that its advantage asks for.  Then a rollout can be used for several epochs (passes).

    logits (B, A), all finite (mask an action with -1e9, not -inf), and values (B,) of the current networks; actions
    (B,) int64, old_log_probs (B,) under the policy that acted; advantages (B,), B > 1, normalised here; targets (B,) of
    the critic.  Returns (loss, info), info holding detached scalars for the log.  Raises ValueError for other shapes,
    since (B, 1) beside (B,) would become (B, B), and for gradients where there should be none.
    """
    shapes = {tuple(each.shape) for each in (values, actions, old_log_probs, advantages, targets)}
    if shapes != {logits.shape[:1]} or logits.ndim != 2 or len(logits) < 2:
        got = f"not {tuple(logits.shape)} and {shapes}"
        raise ValueError(f"ppo_loss: logits must be (B, A), and all other tensors (B,), B > 1, {got}")
    if old_log_probs.requires_grad or advantages.requires_grad or targets.requires_grad:
        raise ValueError("ppo_loss: compute old_log_probs, advantages and targets under torch.no_grad()")
    # r_t(theta) = pi(a|s) / pi_old(a|s), theta being the actor's weights                  [1], section 3
    log_pi = torch.log_softmax(logits, dim=-1)  # (B, A)
    log_ratio = log_pi.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - old_log_probs  # (B,)
    ratio = log_ratio.exp()  # r_t(theta), not a reward

    # Differs from the paper: advantages are normalised in each minibatch ([3], detail 7).  Dividing makes the balance
    # with the entropy bonus, and the clipping of the actor's gradient, independent of the scale of the rewards;
    # subtracting makes "good" (A_t > 0, below) mean better than the minibatch's average.  Noise is scaled, too: where
    # no action is better than another, the policy drifts.
    normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-8)  # (B,) A_t, from here on

    # L_clip = E[min(r_t(theta) * A_t, clip(r_t(theta), 1 - eps, 1 + eps) * A_t)]          [1], eq. 7
    # The min picks the clipped, constant branch exactly where the policy has gone far enough: for a good action
    # (A_t > 0) above 1 + eps, for a bad one (A_t < 0) below 1 - eps (eps is clip_coef).  There this term's gradient is
    # zero; the ratio may still move, with other samples, the entropy bonus and the optimiser's momentum.  On the other
    # side nothing is clipped, so that a step in the wrong direction can be undone.
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    policy_loss = -torch.min(ratio * normalised, clipped_ratio * normalised).mean()

    # L_vf = E[(V(s_t) - V_target)^2]                                                      [1], below eq. 9
    # Not clipped, unlike in OpenAI's code (ppo2): there is no evidence that it helps ([3], detail 9).
    value_loss = (values - targets).square().mean()

    # S = E[-sum_a pi(a|s) * log pi(a|s)]                                                  [1], eq. 9
    entropy = -(log_pi.exp() * log_pi).sum(-1).mean()

    # L = -L_clip + c_1 * L_vf - c_2 * S, c_1 and c_2 being vf_coef and ent_coef           [1], eq. 9, negated
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy

    with torch.no_grad():
        info = {
            # (r - 1) - log r, an estimate of KL(pi_old || pi), never negative ([3], detail 12).
            "approx_kl": (log_ratio.expm1() - log_ratio).mean(),
            # Counts ratios that have moved the wrong way, too, though their gradient is not clipped.
            "clip_fraction": ((ratio - 1).abs() > clip_coef).to(ratio.dtype).mean(),
            "entropy": entropy.detach(),
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
        }
    return loss, info


# ---------------------------------------------------------------------------------------------------------- optimiser


class Muon(torch.optim.Optimizer):
    """Muon [8], for matrices: a step along the mean of recent gradients, but equally far in (almost) all directions.

    Write that mean as U S V^T: pairs of directions, and for each a singular value in S, how strong it is.  Adam mostly
    follows the few strong ones, which many samples have in common.  Muon makes all values about 1, but for tiny ones,
    so that what few samples ask for counts as much.

    torch.optim.Muon(weight_decay=0, adjust_lr_fn="match_rms_adamw") does the same, in bfloat16: on a processor without
    instructions for it, that takes twenty times as long.

    Raises ValueError for weights that are no matrices; those without a gradient stay as they are.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float = 1e-3) -> None:
        super().__init__(groups, {"lr": lr})
        if any(weights.ndim != 2 for group in self.param_groups for weights in group["params"]):
            raise ValueError("Muon is for matrices: give all other weights to Adam")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 0.05)  # the mean of about the last 20 gradients
                direction = orthogonalize(matrix.grad.lerp(momentum, 0.95))  # Nesterov's look ahead
                # With all singular values 1, the entries' root mean square would be 1 / sqrt(longer side); the factor
                # makes it 0.2 (times the rate), about Adam's.  Measured: 0.15 to 0.18, since singular values come out
                # below 1, on average.  But in the first layer all movement is in the columns of the inputs that are
                # used, a fifth, by 0.34 to 0.37.
                matrix -= group["lr"] * 0.2 * math.sqrt(max(matrix.shape)) * direction


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T for U S V^T (five Newton-Schulz iterations): singular values become 0.7 to 1.2, tiny ones less."""
    used = matrix.any(0)  # columns of zeros would stay zeros: left out, they cost no time
    x = matrix[:, used] / (matrix.norm() + 1e-7)  # no singular value is above 1
    wide = x.shape[0] < x.shape[1]
    x = x.T if wide else x  # so that the square below is the smaller of the two
    for _ in range(5):  # each singular value s becomes 3.4445 s - 4.775 s^3 + 2.0315 s^5: coefficients of [8]
        square = x.T @ x
        x = 3.4445 * x + x @ (-4.775 * square + 2.0315 * square @ square)
    result = torch.zeros_like(matrix)
    result[:, used] = x.T if wide else x
    return result


# --------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(session: CheckedSession, actor: nn.Module, seed: int, max_steps: int) -> np.ndarray:
    """Undiscounted returns (N,) of the greedy policy, which always takes the most probable action.

    One episode in each environment: taking the first N to finish, of many, would favour the short ones.
    Raises what collect_rollout raises.
    """
    device = next(actor.parameters()).device
    session.reset(seed)
    returns, playing = np.zeros(session.num_envs), np.ones(session.num_envs, bool)
    for _ in range(max_steps):
        logits = actor(torch.from_numpy(session.observation).to(device))  # (N, A)
        if not logits.isfinite().all():  # argmax would choose an action all the same
            raise FloatingPointError("the actor's outputs are not finite: scale observations, or lower --learning-rate")
        transition = session.step(logits.argmax(-1).cpu().numpy())
        returns[playing] += transition.reward[playing]
        playing &= ~transition.done
        if not playing.any():
            break
    return returns


# ----------------------------------------------------------------------------------------------------------- training


def goal_factor(sampled_returns: list[float], goal: float) -> float:
    """What learning rates are multiplied by: 1 far from the goal, 0.25 near it.

    The distance from the last sampled return to the goal, as a share of the first one's, decides: above 0.4 this is 1
    (in Pong up to a return of 3), from there down to 0.1 the share / 0.4, below it 0.25 (from 15 on).  Without a goal,
    or where the first has reached it: 1.
    """
    known = [value for value in sampled_returns if math.isfinite(value)]
    if goal == math.inf or not known or known[0] >= goal:
        return 1.0
    share = (goal - known[-1]) / (goal - known[0])
    return min(max(share / 0.4, 0.25), 1.0)


def train(args: Args, session: CheckedSession | None = None, eval_session: CheckedSession | None = None) -> Run:
    """Learn until the environment is solved or the updates are used up; returns the Run, which holds everything.

    session: where to train (default: what ``args`` describe).  If it is not Pong's, say so in ``args.env_id`` (any text
    will do): else Pong's goal ends the run, rewards end credit, and losses are forgiven at first.  eval_session: where
    the greedy policy is evaluated, in environments of its own (default: the session's ``twin``).  Both are closed at
    the end.
    ``args.resume`` continues from the checkpoint, with the flags of ``args`` (filling in the stored ones is main()'s
    work).
    Seeds torch, and sets its number of threads (import this file before torch, for the sake of GOMP_SPINCOUNT, above).
    Raises ContractViolation, BridgeError, BadInput (a checkpoint, a place or a session that will not do), OSError (a
    full disk), FloatingPointError (weights, or what the actor makes of an observation, that are not finite), ValueError
    or TypeError (a session that does not show stacks of bytes), and what ``twin`` raises for environments that cannot
    be copied.
    """
    torch.set_num_threads(1)  # while emulators step: a second one would take a core from them
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    with contextlib.ExitStack() as resources:  # both sessions are closed in the end, whatever happens
        for given in filter(None, (session, eval_session)):
            resources.enter_context(given)
        check_args(args)
        if args.cuda and not torch.cuda.is_available():
            raise BadInput("--cuda: torch sees no CUDA device here; use --no-cuda")
        session = resources.enter_context(session or open_session(args, args.num_envs))
        eval_session = resources.enter_context(eval_session or session.twin(args.eval_episodes))
        if session.num_envs != args.num_envs:
            raise BadInput(f"the session has {session.num_envs} environments: say so in Args(num_envs=...)")
        if session.shares_environments(eval_session):
            raise BadInput("an evaluation would end the episodes of training: it needs environments of its own")

        actor = Actor(session.obs_shape, session.contract.n_actions).to(device)
        critic = Critic(session.obs_shape).to(device)
        critic.inputs = actor.inputs  # one for both: they see the same
        actor_weights, critic_weights = list(actor.parameters()), list(critic.parameters())
        # Differs from [3]: actor and critic have a learning rate each, and Muon moves the matrices of their hidden
        # layers (the first ones too, which [8] would leave to Adam), Adam everything else.
        # With eps = 1e-5 ([3], detail 3; torch's is 1e-8), weights whose gradients stay far below that hardly move.
        # (The learning rates are set before every update, below.)
        networks = (actor.net, critic.net)  # [0] and [1] in each optimiser's param_groups, too
        hidden = [{"params": [w for w in net[:2].parameters() if w.ndim == 2]} for net in networks]
        others = [{"params": [w for w in net.parameters() if w.ndim == 1 or w is net[2].weight]} for net in networks]
        muon = Muon(hidden)
        adam = torch.optim.Adam(others, eps=1e-5, fused=True)
        run = Run(args, actor, critic, [muon, adam], session, eval_session)  # counters, log, evaluations: see below
        resources.enter_context(run.saved_on_failure())
        skipped = len(run.rows)  # the number of the first row after --resume: it holds games that are soon over

        # Both are made for Pong, where a reward ends a rally; any other game has to ask for them.
        cut_at_reward = (args.env_id == ENV_ID) if args.cut_at_reward is None else args.cut_at_reward
        leniency = (0.6 if args.env_id == ENV_ID else 0.0) if args.leniency is None else args.leniency

        session.reset(run.episode_seed("training"))
        run.evaluate_if_due()  # before training: how good is knowing nothing?
        run.start_clock()

        while run.update < args.updates and not run.solved:
            # Learning rates and leniency are multiplied by this, the entropy bonus by its cube.
            # Differs from [3], detail 4: it does not only fall linearly, but to a quarter of that as the sampled return
            # nears the goal (in the log, which gets a row with every evaluation).  Large steps learn fast, small ones
            # make a policy play well, and some runs come near the goal much sooner than others.
            sampled = [value for row, value in enumerate(run.history["sampled_return"]) if row != skipped]
            factor = goal_factor(sampled, run.solved_return)
            scale = (1 - run.update / args.updates) * factor if args.anneal_lr else 1.0

            # Collect.  Nothing is reset between rollouts: an episode longer than T goes on in the next one.
            rollout = collect_rollout(session, actor, critic, args.num_steps)

            # Estimate advantages, and from them what the critic should have said.
            # Differs from the paper: as in [7], credit ends with a point, as if the game did: V(s') counts as 0 there,
            # and no later error is added.  What a shot means for later points is ignored; in return, no advantage
            # carries the noise of the rallies after it.
            decided = rollout.terminated | ((rollout.rewards != 0) & cut_at_reward)  # (T, N)
            # Differs from the paper: at first, more than half of a lost point is forgiven (an idea of lenient learning
            # [9]).  As long as most points are lost, the discount pays for losing them later, and so for playing safe:
            # without leniency, some runs gave up the shot that wins quickest before they had mastered it.
            kept = 1 - leniency * scale  # of a lost point: 0.4 at first, up to 1 as the rates fall
            rewards = rollout.rewards.where(rollout.rewards >= 0, kept * rollout.rewards)  # (T, N)
            advantages = gae(
                rewards,
                rollout.values,
                rollout.next_values,
                decided,
                rollout.truncated,
                args.gamma,
                args.gae_lambda,
            )  # (T, N)
            # Fixed for all passes: the critic is to move towards them, not they (V(s') is in them) towards it.
            targets = advantages + rollout.values  # from advantages not yet normalised; TD(lambda) in [3], detail 5
            # 1 - Var[target - V] / Var[target]: 0 for a critic that says the same everywhere, below for a worse one,
            # near 1 for one that follows the targets (a constant error does not show).  High alone proves little:
            # targets contain V(s'), so that a wrong V which changes little from step to step agrees with them.
            explained_variance = 1 - advantages.var() / targets.var()  # target - V is the advantage

            # Optimise.  Each sample carries its advantage and its target by now, so that order no longer matters: the
            # passes shuffle.  One loss will do, since no weights are shared: its squared error moves the critic alone,
            # the rest the actor.
            # Differs from the paper: the entropy bonus falls, too, and sooner: explore, then settle.
            ent_coef = args.ent_coef * scale**3
            adam.param_groups[0]["lr"] = args.learning_rate * scale  # the actor's
            muon.param_groups[0]["lr"] = 2 * args.learning_rate * scale
            adam.param_groups[1]["lr"] = muon.param_groups[1]["lr"] = args.critic_learning_rate * scale
            torch.set_num_threads(min(2, CORES))  # the emulators rest meanwhile
            # Looked up once, for both networks and all passes: so it is their .net alone that is called below.
            inputs, places = actor.inputs(rollout.observations.flatten(0, 1))  # (T * N, U), (U,)
            actions = rollout.actions.flatten()  # (T * N,)
            old_log_probs, advantages, targets = rollout.log_probs.flatten(), advantages.flatten(), targets.flatten()
            infos = []
            for _ in range(args.update_epochs):
                order = torch.randperm(len(actions), device=device)
                for minibatch in order.chunk(args.num_minibatches):  # (B,) indices
                    picked = inputs[minibatch], places  # (B, U), (U,)
                    loss, info = ppo_loss(
                        actor.net(picked),
                        critic.net(picked).squeeze(-1),
                        actions[minibatch],
                        old_log_probs[minibatch],
                        advantages[minibatch],
                        targets[minibatch],
                        args.clip_coef,
                        args.vf_coef,
                        ent_coef,
                    )
                    muon.zero_grad()
                    adam.zero_grad()
                    loss.backward()
                    # Differs from [3], detail 11: each network's gradient is clipped by itself.  With a common norm,
                    # the critic's gradient would decide how much is left of the actor's: a factor that changes with
                    # every minibatch, and that no optimiser undoes.
                    for weights in (actor_weights, critic_weights):
                        nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
                    muon.step()
                    adam.step()
                    infos.append(info)
                if args.target_kl is not None and info["approx_kl"] > args.target_kl:  # in the last minibatch
                    break

            # From here on, inputs are scaled by what was seen in this rollout, too.  Not earlier: the policy
            # that acted, whose probabilities the ratio compares with, saw them as they were.
            actor.inputs.update(rollout.observations)
            torch.set_num_threads(1)

            # Evaluate and log.  Fresh episodes decide whether it is solved: played when an evaluation reaches the goal
            # (training goes on if they do not confirm it), and after the last update.
            run.complete_update(rollout, explained_variance, infos)
            run.evaluate_if_due()
        run.finish()
    return run


# ======================================================================================================================
# Housekeeping: log, picture, checkpoint, progress line, main.  Nothing below is about PPO, and a reader may stop here.
# ======================================================================================================================

SERIES = {  # of the log: name, colour
    "avg_return": "#d1495b",  # mean return of the greedy policy's evaluation
    "sampled_return": "#8d99ae",  # mean return of the training episodes that ended since the row before
    "approx_kl": "#00798c",  # from here to learning_rate: means over the updates since the row before
    "clip_fraction": "#edae49",
    "entropy": "#66a182",
    "policy_loss": "#2e4057",
    "value_loss": "#a23b72",
    "explained_variance": "#5f0f40",
    "learning_rate": "#bc6c25",
    "env_steps": "#444444",  # so far, in training
}
# What an optimiser remembers of each weight: numbers ("step"), else tensors of its shape.
MOMENTS = {"Adam": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


class Run:
    """The state of a training run outside the networks: counters, history, and the files that it leaves.

    Attributes: ``update`` (completed updates), ``env_steps``, ``history`` (a list for each of SERIES), ``rows`` (the
    update number of each), ``final_returns`` (FINAL_EPISODES,) or None, ``solved``, ``transitions_checked``.
    """

    def __init__(
        self, args: Args, actor: nn.Module, critic: nn.Module, optimizers: list[Any], *sessions: CheckedSession
    ) -> None:
        """A new run; with ``args.resume``, where the checkpoint was."""
        self.args, self.actor, self.critic, self.optimizers, self.sessions = args, actor, critic, optimizers, sessions
        files = [args.log, args.log.with_suffix(".svg"), args.checkpoint]
        self.files = ", ".join(map(str, files))
        self.places = [Path(os.path.abspath(path)) for path in files]  # an environment may change the directory
        self.title = f"PPO on {args.env_id}, seed {args.seed}"
        self.update = self.env_steps = self.violations = 0
        self.rows: list[int] = []
        self.history: dict[str, list[float]] = {name: [] for name in SERIES}
        self.final_returns: np.ndarray | None = None
        default = SOLVED_RETURN if args.env_id == ENV_ID else math.inf
        self.solved_return = default if args.solved_return is None else args.solved_return
        self.started = STARTED if __name__ == "__main__" else time.perf_counter()
        self.seconds_before = 0.0  # by runs that this one resumes
        self.checked_before = -sum(session.transitions_checked for session in sessions)  # not what others did in them
        # So far, of the training episodes under way.
        self.episode_returns = torch.zeros(args.num_envs, dtype=torch.float64)
        self.recent: dict[str, list[float]] = {name: [] for name in SERIES}  # of completed updates since the last row
        if args.resume:
            try:
                self.restore(load_checkpoint(args.checkpoint))
            except BadInput:
                raise
            except Exception as error:  # a damaged file can raise anything
                raise BadInput(f"{args.checkpoint} does not fit {Path(__file__).name}: {one_line(error)}") from None
        self.snapshot = self.state()
        self.start_clock()
        resumed = f", after update {self.update}" if args.resume else ""
        what = f"starting {args.num_envs} environments"
        wanted = ["a larger --updates"] * (self.update == args.updates) + ["a higher --solved-return"] * self.solved
        if self.final_returns is not None and wanted:
            what = f"nothing left to do (there would be with {' and '.join(wanted)})"
        elif self.solved_return == math.inf:
            what += f" (without --solved-return it ends after update {args.updates})"
        print(f"{self.title}{resumed}: {what}", flush=True)
        self.saved = args.resume  # has this run, or the one that it resumes, written its files?
        if not self.saved and args.checkpoint.exists():  # an older run's, which may have taken long to learn
            print(f"{args.checkpoint} is there already, and will become {args.checkpoint}.old", flush=True)

    @property
    def solved(self) -> bool:
        return self.final_returns is not None and bool(self.final_returns.mean() >= self.solved_return)

    @property
    def greedy_return(self) -> float:
        """That of the last evaluation; the row of an interruption has none."""
        return next((value for value in reversed(self.history["avg_return"]) if math.isfinite(value)), math.nan)

    @property
    def evaluated(self) -> bool:
        """Is the greedy return after this update known?"""
        return self.rows[-1:] == [self.update] and math.isfinite(self.history["avg_return"][-1])

    @property
    def awaits_verdict(self) -> bool:
        """Has the evaluation after this update reached the goal, or was it the last?  (Then fresh episodes are due.)"""
        reached = self.evaluated and self.greedy_return >= self.solved_return
        return self.update > 0 and self.final_returns is None and (reached or self.update == self.args.updates)

    @property
    def transitions_checked(self) -> int:
        return self.checked_before + sum(session.transitions_checked for session in self.sessions)

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def speed(self) -> float:
        """Environment steps per second since the first rollout (or the first after --resume), evaluations included."""
        steps = self.env_steps - self.began_steps
        return steps / (time.perf_counter() - self.began) if steps else math.nan

    def episode_seed(self, purpose: str) -> int:
        """For the environments: other runs, and training and evaluations within a run, play other episodes."""
        number = ("training", "evaluation", "final evaluation").index(purpose)
        seed = SeedSequence([self.args.seed, number, self.update]).generate_state(1)[0]
        return int(seed >> 1)  # so that seed + i fits into 32 bits, too: numpy's RandomState takes no more

    def start_clock(self) -> None:
        """Speed is counted from here."""
        self.began, self.began_steps = time.perf_counter(), self.env_steps

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of ``state`` and ``save``."""
        for name, asked in ("env_id", self.args.env_id), ("seed", self.args.seed):
            if (stored := state["args"][name]) != asked:
                raise BadInput(f"{self.args.checkpoint} has {name} {stored!r}, not {asked!r}")
        form: dict[str, Any] = {"update": 0, "env_steps": 0, "steps": [0]}
        form |= {"transitions_checked": 0, "violations": 0, "seconds": 0.0}
        form |= {"actor": dict(self.actor.state_dict()), "critic": dict(self.critic.state_dict())}
        form |= {"history": {name: [0.0] for name in SERIES} | {"env_steps": [0]}}
        for name, example in form.items():
            if not fits(state[name], example):
                raise ValueError(f"invalid {name}")
        if state["update"] == 0:  # nothing is saved before the first is complete
            raise ValueError("invalid update")
        if state["update"] > self.args.updates:
            done = f"{self.args.checkpoint} has completed {state['update']} updates"
            raise BadInput(f"{done}; --updates includes these: raise it")
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            weights = [each.detach() for group in optimizer.param_groups for each in group["params"]]
            names = MOMENTS[type(optimizer).__name__]
            example = [{name: torch.zeros(()) if name == "step" else w for name in names} for w in weights]
            if not fits(stored["state"], dict(enumerate(example))):
                raise ValueError("invalid optimizer")
            # The moments alone: whatever else an optimiser has comes from the code and the flags.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": stored["state"]})
        steps = state["steps"]
        if not steps or steps != sorted(set(steps)) or steps[-1] > state["update"]:
            raise ValueError("the rows of its history are not in order")
        if {len(values) for values in state["history"].values()} != {len(steps)}:
            raise ValueError("the history's series have different lengths")
        if state["final_returns"] is not None:
            if not fits(state["final_returns"], [0.0]):
                raise ValueError("invalid final_returns")
            self.final_returns = np.array(state["final_returns"]).reshape(FINAL_EPISODES)
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.args.cuda and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])
        self.update, self.env_steps = state["update"], state["env_steps"]
        self.rows, self.history = state["steps"], state["history"]
        self.checked_before += state["transitions_checked"]
        self.seconds_before, self.violations = state["seconds"], state["violations"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the last completed update; copies, so that it stays as it is."""
        return {
            "script": Path(__file__).name,
            "args": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self.args).items()},
            "update": self.update,
            "env_steps": self.env_steps,
            "actor": cloned(self.actor.state_dict()),
            "critic": cloned(self.critic.state_dict()),
            "optimizers": [cloned(optimizer.state_dict()) for optimizer in self.optimizers],
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if self.args.cuda else None},
        }

    def complete_update(
        self, rollout: Rollout, explained_variance: torch.Tensor, infos: list[dict[str, torch.Tensor]]
    ) -> None:
        """Record an update's results.  From here on no fault and no Ctrl-C loses them.

        Raises FloatingPointError if the update has ruined the weights; then the one before it is kept.
        """
        if not all(weights.isfinite().all() for weights in (*self.actor.parameters(), *self.critic.parameters())):
            raise FloatingPointError("weights are not finite: a lower --learning-rate, or smaller rewards, may help")
        with uninterrupted():
            self.update += 1
            self.env_steps += self.args.num_steps * self.args.num_envs
            self.final_returns = None  # those of an earlier policy
            for rewards, done in zip(rollout.rewards.cpu(), rollout.done.cpu(), strict=True):
                self.episode_returns += rewards
                self.recent["sampled_return"] += self.episode_returns[done].tolist()
                self.episode_returns[done] = 0
            for name in infos[0]:
                self.recent[name].append(float(torch.stack([info[name] for info in infos]).mean()))
            if explained_variance > -1e8:  # NaN or less where all targets are equal, or nearly so
                self.recent["explained_variance"].append(float(explained_variance))
            self.recent["learning_rate"].append(self.optimizers[-1].param_groups[0]["lr"])
            self.snapshot = self.state()
        if sys.stdout.isatty():
            self.print_line()

    def log_evaluation(self, returns: np.ndarray) -> None:
        with uninterrupted():
            if self.rows[-1:] != [self.update]:  # else an interruption has made the row, without it
                self.add_row()
            self.history["avg_return"][-1] = float(returns.mean())
        if self.update:  # else nothing has been learned that may replace an older run's files
            self.save()
        self.print_line()

    def evaluate_if_due(self) -> None:
        """Every ``eval_every`` updates, and at the end; after --resume, also what an interruption has left out."""
        due = self.update % self.args.eval_every == 0 or self.update == self.args.updates
        if due and not self.evaluated:
            self.log_evaluation(self.evaluate("evaluation", self.args.eval_episodes))
        if self.awaits_verdict:
            self.evaluate_finally()

    def evaluate_finally(self) -> None:
        self.show(f"playing {FINAL_EPISODES} fresh episodes")
        self.final_returns = self.evaluate("final evaluation", FINAL_EPISODES)
        if not self.solved and self.update < self.args.updates:
            mean, std = self.final_returns.mean(), self.final_returns.std()
            self.show(f"{mean:.1f} ± {std:.1f} over {FINAL_EPISODES} fresh episodes: training goes on")

    def evaluate(self, purpose: str, episodes: int) -> np.ndarray:
        """Returns (episodes,) of the greedy policy, each episode with a seed of its own; errors name the purpose."""
        session, seed = self.sessions[-1], self.episode_seed(purpose)
        rounds = range(0, episodes, session.num_envs)
        try:
            returns = [evaluate(session, self.actor, seed + first, self.args.eval_max_steps) for first in rounds]
        except SessionFailure as error:
            error.stage = f"{purpose}, {error.stage}" if error.stage else purpose
            raise
        return np.concatenate(returns)[:episodes]

    def add_row(self) -> None:
        """A row of the log: means of what happened since the row before; the greedy return is not known yet (NaN)."""
        row = {name: float(np.mean(values)) if values else math.nan for name, values in self.recent.items()}
        row["env_steps"] = self.env_steps
        for name, values in self.history.items():
            values.append(row[name])
        self.rows.append(self.update)
        self.recent = {name: [] for name in SERIES}

    @contextlib.contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Whatever ends the run, a fault or Ctrl-C: keep everything up to the last completed update."""
        try:
            yield
        except BaseException as error:
            self.violations += isinstance(error, ContractViolation)
            if not self.update:
                if isinstance(error, KeyboardInterrupt):
                    print("nothing is saved before the first update is complete", file=sys.stderr)
                raise
            with uninterrupted():
                if self.rows[-1] < self.update:
                    self.add_row()
                try:
                    self.save()
                    outcome = f"saved everything up to update {self.update}, for --resume: {self.files}"
                except OSError as failure:  # a full disk must not hide what has ended the run
                    outcome = f"could not save everything: {failure}"
                with contextlib.suppress(OSError):  # the reader may be gone
                    if sys.stdout.isatty():
                        print()
                    print(outcome, file=sys.stderr)
            raise

    def save(self) -> None:
        """Log, picture and checkpoint, each replaced atomically: there is always a whole one."""
        checkpoint = self.places[-1]
        if not self.saved and checkpoint.exists():
            checkpoint.replace(f"{checkpoint}.old")
        self.saved = True
        final_returns = None if self.final_returns is None else self.final_returns.tolist()
        buffer = io.BytesIO()
        seconds = self.seconds
        state = {**self.snapshot, "steps": self.rows, "history": self.history, "final_returns": final_returns}
        state |= {"transitions_checked": self.transitions_checked, "violations": self.violations, "seconds": seconds}
        torch.save(state, buffer)
        log = json.dumps(self.train_log(seconds), indent=1).encode()
        contents = [log, learning_curve(self).encode(errors="replace"), buffer.getvalue()]
        with contextlib.ExitStack() as attempts:  # all three are tried, whichever fails
            for path, content in zip(self.places, contents, strict=True):
                attempts.callback(replace_file, path, content)

    def train_log(self, seconds: float) -> dict[str, Any]:
        """TorchLean's TrainLog.  Two runs with the same flags differ in nothing but the last two notes."""
        notes = asdict(self.args)
        versions = {"torch": torch.__version__, **self.sessions[0].versions}
        notes |= {f"version_{name}": version for name, version in versions.items()}
        notes |= {"device": "cuda" if self.args.cuda else "cpu", "environment_steps": self.env_steps}
        notes |= {"transitions_checked": self.transitions_checked, "violations": self.violations}
        if self.final_returns is not None:
            notes |= {"solved": self.solved, "final_return_mean": self.final_returns.mean()}
            notes |= {"final_return_std": self.final_returns.std()}
        notes |= {"wall_seconds": f"{seconds:.2f}", "steps_per_second": f"{self.speed:.0f}"}
        return {
            "title": self.title,
            "steps": self.rows,
            "series": [
                {"name": name, "values": [json_number(value) for value in self.history[name]], "color": color}
                for name, color in SERIES.items()
            ],
            "notes": [f"{key}={value}" for key, value in notes.items()],
        }

    def print_line(self) -> None:
        """Where the run stands."""
        left = (self.args.updates - self.update) * self.args.num_steps * self.args.num_envs / self.speed
        latest = {name: (values or self.history[name])[-1] for name, values in self.recent.items()}
        sampled = np.mean(self.recent["sampled_return"] or self.history["sampled_return"][-1:])
        parts = [
            f"update {self.update}/{self.args.updates}",
            f"{self.env_steps:,} steps",
            f"{self.speed:,.0f}/s",
            f"{left // 60:.0f}:{left // 1 % 60:02.0f} left",
            f"sampled {sampled:.1f}",
            f"greedy {self.greedy_return:.1f}",
            sparkline(self.history["avg_return"]),
            f"KL {latest['approx_kl']:.3f}",
            f"entropy {latest['entropy']:.2f}",
        ]
        # A line that wraps cannot be rewritten in place: speed goes first, then steps, bars, entropy, KL, time left.
        for expendable in [parts[k] for k in (2, 1, 6, 8, 7, 3)]:
            if sys.stdout.isatty() and len("  ".join(parts)) >= shutil.get_terminal_size().columns:
                parts.remove(expendable)
        self.show("  ".join(parts).replace("nan", "-"))

    def show(self, line: str) -> None:
        """Replace the previous line on a terminal, else print a new one."""
        if sys.stdout.isatty():
            print("\r\033[K" + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        else:
            print(line, flush=True)

    def finish(self) -> None:
        """The last line: solved or not, over FINAL_EPISODES fresh episodes, at what cost, and where to find it."""
        assert self.final_returns is not None
        self.save()
        if sys.stdout.isatty():
            self.print_line()
            print()
        verdict = "solved" if self.solved else "not solved" if self.solved_return < math.inf else "finished"
        mean, std, episodes = self.final_returns.mean(), self.final_returns.std(), len(self.final_returns)
        print(
            f"{verdict}: {self.args.env_id}, greedy return {mean:.1f} ± {std:.1f} over {episodes} fresh episodes after "
            f"{self.env_steps:,} environment steps and {self.seconds:.1f} s, {self.transitions_checked:,} transitions "
            f"checked; see {self.files}",
            flush=True,
        )


class BadInput(Exception):
    """Something that the person asked for and that cannot be: said in one line, exit code 2."""


def check_args(args: Args) -> None:
    """Raises BadInput for sizes that do not go together, and for files that cannot, or should not, be written.

    Better said now than after an hour of training.  (Not said by Args: with --resume, some sizes are the checkpoint's.)
    """
    batch = args.num_envs * args.num_steps
    if batch % args.num_minibatches or batch < 2 * args.num_minibatches:
        wanted = f"divide --num-envs * --num-steps ({batch}) into parts of at least 2"
        raise BadInput(f"--num-minibatches must {wanted}, not {args.num_minibatches}")
    files = [args.log, args.log.with_suffix(".svg"), args.checkpoint, Path(f"{args.checkpoint}.old")]
    try:
        places = {os.path.join(os.path.realpath(path.parent), path.name) for path in files}
    except OSError as error:
        raise BadInput(f"cannot find the current directory: {error}") from None
    if len(places) < 4:
        raise BadInput("--log, its picture (same name with .svg), --checkpoint and its .old must be different files")
    for path in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part_of(path).touch()
            part_of(path).unlink()
            if path.exists() and not path.is_file():
                raise OSError("it is no file")
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot write {path}: {error}") from None
    if args.checkpoint.exists() and not zipfile.is_zipfile(args.checkpoint):
        raise BadInput(f"{args.checkpoint} is there already, and is no checkpoint: name another file")


def part_of(path: Path) -> Path:
    """Where this process writes a file before it is renamed into its place."""
    return Path(f"{path}.{os.getpid()}.part")


def fits(stored: Any, example: Any) -> bool:
    """Is ``stored`` built like ``example``: types, keys, shapes, whole numbers from 0 up; lists of any length?"""
    if isinstance(example, float):  # an integer will do, but not one of 400 digits
        return type(stored) in (int, float) and not 1e300 <= abs(stored) < math.inf
    if type(stored) is not type(example):
        return False
    if isinstance(example, torch.Tensor):  # Adam's kernel would trust any shape, and reads as if contiguous
        alike = (stored.dtype, stored.shape) == (example.dtype, example.shape)
        return alike and stored.is_contiguous() and bool(stored.isfinite().all())
    if isinstance(example, dict):
        return stored.keys() == example.keys() and all(fits(stored[key], example[key]) for key in example)
    if isinstance(example, list):
        return all(fits(value, example[0]) for value in stored)
    return bool(0 <= stored < 2**63)


def cloned(tree: Any) -> Any:
    """A state dict with tensors of its own (copy.deepcopy does the same, in ten times the time)."""
    if isinstance(tree, dict):
        return {key: cloned(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, torch.Tensor) else tree


def json_number(value: float) -> float | str:
    """Strict JSON has no word for the non-finite ones: NaN, Infinity, -Infinity travel as strings."""
    return value if math.isfinite(value) else json.dumps(value)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and the like wait until the block is through."""
    in_main = threading.current_thread() is threading.main_thread()  # elsewhere signals never arrive
    waiting: list[int] = []
    with contextlib.ExitStack() as restored:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main else ():
            restored.callback(signal.signal, number, signal.signal(number, lambda number, _: waiting.append(number)))
        yield
    for missed in waiting:
        signal.raise_signal(missed)


def replace_file(path: Path, content: bytes) -> None:
    """Write beside, then rename: whoever looks sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)  # someone may have tidied up meanwhile
    try:
        part_of(path).write_bytes(content)
        os.replace(part_of(path), path)
    finally:
        part_of(path).unlink(missing_ok=True)  # where the disk is full


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds.  ``weights_only``: a stranger's file is data, and runs no code.  Raises BadInput."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.external_attr or record.compress_type:  # torch writes neither; bytes can unpack to gigabytes
                    raise ValueError(f"{record.filename} is no plain file")
                archive.read(record)  # compares checksums; torch.load does not, and takes anything for numbers
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"there is no checkpoint {path}: train first, or name one with --checkpoint") from None
    except Exception as error:  # a damaged file can raise anything
        raise BadInput(f"{path} is not a readable checkpoint ({one_line(error)})") from None
    if not isinstance(state, dict) or state.get("script") != Path(__file__).name:
        raise BadInput(f"{path} is not a checkpoint of {Path(__file__).name}")
    return state


def stored_args(args: Args) -> Args:
    """With --resume and --watch, a flag that is not given is what it was when the checkpoint was written.

    Not so for files, commands and modules: a stranger's checkpoint must not decide what is overwritten or run here.
    """
    try:
        stored = dict(load_checkpoint(args.checkpoint)["args"])
        names = asdict(args).keys()
        if stored.keys() != names:
            raise ValueError(f"missing {sorted(names - stored.keys())}, unknown {sorted(stored.keys() - names)}")
        log = stored["log"]
        stored |= {name: getattr(args, name) for name in ("log", "checkpoint", "server_command", "resume", "watch")}
        restored = Args(**stored)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{args.checkpoint} does not hold this script's arguments: {error}") from None
    if ":" in restored.env_id and restored.env_id != args.env_id:
        raise BadInput(f"{args.checkpoint}: to run its environment's module, say --env-id {restored.env_id!r}")
    if args.resume and args.log == Args.log and log != str(Args.log):  # another run's log may lie there
        raise BadInput(f"{args.checkpoint}: to go on with its log, say --log {log!r}")
    return restored


def sparkline(values: list[float]) -> str:
    """The last 12 values as a row of little bars."""
    shown = [value for value in values if math.isfinite(value)][-12:]
    low, high = min(shown, default=0), max(shown, default=0)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * ((value - low) / (high - low))) if high > low else 3] for value in shown)


def learning_curve(run: Run) -> str:
    """The greedy and the sampled return over environment steps, as a picture that needs nothing else (SVG)."""
    steps = run.history["env_steps"]
    curves = {"avg_return": "greedy policy", "sampled_return": "sampled, in training"}
    shown = [value for name in curves for value in run.history[name] if math.isfinite(value)] + [0.0]
    if math.isfinite(run.solved_return):
        shown.append(run.solved_return)
    x_tick, y_tick = max(tick_distance(steps[-1]), 1), tick_distance(max(shown) - min(shown))
    y_ticks = [y_tick * k for k in range(math.floor(min(shown) / y_tick), math.ceil(max(shown) / y_tick) + 1)]
    low, high = y_ticks[0], y_ticks[-1]
    left, bottom, width, height = 70, 350, 620, 290
    x_scale, y_scale = width / max(steps[-1], 1), height / max(high - low, y_tick)
    parts = []
    for y in y_ticks:
        pixel = bottom - (y - low) * y_scale
        parts.append(f'<path d="M{left} {pixel:.1f}h{width}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 9}" y="{pixel + 4:.1f}" text-anchor="end">{y:,g}</text>')
    for x in np.arange(0, max(steps[-1], 1) + 1, x_tick):
        parts.append(f'<text x="{left + x * x_scale:.1f}" y="{bottom + 20}" text-anchor="middle">{x:,.0f}</text>')
    if math.isfinite(run.solved_return):
        pixel = bottom - (run.solved_return - low) * y_scale
        parts.append(f'<path d="M{left} {pixel:.1f}h{width}" stroke="#666" stroke-dasharray="6 4"/>')
        parts.append(f'<text x="{left + 8}" y="{pixel + 16:.1f}">solved: {run.solved_return:g}</text>')
    for row, (name, label) in enumerate(curves.items()):
        data = [(x, y) for x, y in zip(steps, run.history[name], strict=True) if math.isfinite(y)]
        points = " ".join(f"{left + x * x_scale:.1f},{bottom - (y - low) * y_scale:.1f}" for x, y in data)
        style = f'stroke="{SERIES[name]}" stroke-width="2.5" stroke-linejoin="round" fill="none"'
        parts.append(f'<polyline points="{points}" {style}/>')
        key = 28 + 18 * row  # beside the title, where no curve is
        parts.append(f'<path d="M{left + width - 176} {key - 4}h24" {style}/>')
        parts.append(f'<text x="{left + width - 144}" y="{key}">{label}</text>')
    font = 'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#333"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 410" {font}>',
            '<rect width="720" height="410" fill="#fff"/>',
            f'<text x="{left}" y="34" font-size="18" font-weight="bold">{html.escape(run.title)}</text>',
            *parts,
            f'<path d="M{left} {bottom - height}v{height}h{width}" fill="none" stroke="#333"/>',
            f'<text x="{left + width / 2}" y="{bottom + 44}" text-anchor="middle">environment steps</text>',
            f'<text transform="translate(20 {bottom - height / 2}) rotate(-90)" text-anchor="middle">return per episode'
            "</text>",
            "</svg>\n",
        ]
    )


def tick_distance(span: float) -> float:
    """1, 2 or 5 times a power of ten, such that an axis of this length has three to eight intervals."""
    power = 10.0 ** math.floor(math.log10(max(span, 1e-9) / 3))
    return next(factor * power for factor in (1, 2, 5) if span / (factor * power) <= 8)


def watch(args: Args) -> None:
    """Play greedy episodes of a checkpoint in a window."""
    state = load_checkpoint(args.checkpoint)
    # Without a display SDL, which draws, would play to nobody for minutes.
    display = any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")))
    if sys.platform == "linux" and not display and not args.server_command:
        raise BadInput("--watch needs a display, and there is none (benchmarks/games.py plays without a window)")
    with open_session(args, 1, render_mode="human") as session:
        actor = Actor(session.obs_shape, session.contract.n_actions)
        try:
            actor.load_state_dict(state["actor"])
        except Exception as error:  # a damaged file can raise anything
            raise BadInput(f"{args.checkpoint} does not fit {args.env_id}: {one_line(error)}") from None
        for episode in range(args.eval_episodes):
            (episode_return,) = evaluate(session, actor, (args.seed + episode) % 2**32, args.eval_max_steps)
            print(f"episode {episode + 1}: return {episode_return:g}", flush=True)


def stop(message: object, code: int) -> NoReturn:
    """End the program with one message to the person who started it."""
    with contextlib.suppress(OSError):  # the reader may be gone
        print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    sys.exit(code)


def undecorate_optimizers() -> None:
    """Make torch.optim start sooner: its methods' decorators import torch.compile, which takes a second."""
    methods = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    for owner, names in (torch.optim.Optimizer, methods), (torch.optim.Adam, ("step",)):
        for name in names:
            setattr(owner, name, torch.no_grad()(inspect.unwrap(getattr(owner, name))))


def main() -> None:
    gc.freeze()  # what was imported stays, and need not be looked through at the end either
    gc.enable()
    undecorate_optimizers()
    for number in signal.SIGTERM, signal.SIGHUP:  # a cluster's Ctrl-C, a terminal that is closed: save, then leave
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (it may have been closed)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no sparkline shows question marks
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        args = tyro.cli(Args)
        if args.resume or args.watch:
            args = tyro.cli(Args, default=stored_args(args))
        if args.watch:
            watch(args)
        else:
            train(args)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop("interrupted", 130)
    except BadInput as error:
        stop(error, 2)
    except (FloatingPointError, OSError) as error:  # OSError: a full disk, or nobody reads the output any more
        stop(error, 1)
    except SessionFailure as error:
        unfit = str(error.stage).endswith("start") or (args.watch and error.stage == "reset")  # it cannot draw
        stop(error, 2 if unfit else 1)
    finally:
        for descriptor, stream in (1, sys.stdout), (2, sys.stderr):
            try:
                print(end="", file=stream, flush=True)
            except OSError:  # nobody reads it: Python would try once more at the end, and leave with code 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


if __name__ == "__main__":
    main()
