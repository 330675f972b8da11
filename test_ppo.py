"""The specification, from the ground up.

    python -m pytest

Contract, sessions and faults first (gym_bridge.py), then advantages, loss and rollout (ppo_cartpole.py), what Pong
changes (ppo_pong_ram.py), training as a person sees it at the command line, and what the README says.  Everything is
real: environments, subprocesses, signals.  Where a formula is tested, the oracle is written a second time, another way,
in plain Python.
"""

import base64
import contextlib
import dataclasses
import fcntl
import functools
import gc
import importlib
import inspect
import io
import json
import math
import os
import pickle
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
import torch
import tyro
from gymnasium.envs.classic_control import CartPoleEnv
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gym_bridge
import ppo_cartpole as ppo
import ppo_pong_ram as pong
from gym_bridge import RULES, BridgeError, Contract, ContractViolation, GymnasiumSession, NativeSession, Transition

HERE = Path(__file__).parent
CARTPOLE = Contract(obs_shape=(4,), n_actions=2)

# Environments that the tests train and trip over, in a module that both this process and a server can import.
ENVIRONMENTS = '''
import os
import numpy as np
import gymnasium
from gymnasium.spaces import Box, Dict, Discrete


class Counting(gymnasium.Env):
    """Observation [episode, step].  Odd episodes terminate at step 3, even ones are truncated at step 2."""

    observation_space, action_space = Box(0, 99, (2,), np.float32), Discrete(3)

    def __init__(self):
        self.episode = 0
        self.shared = np.zeros(2, np.float32)  # one array for every observation, overwritten each time

    def reset(self, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self.look(), {}

    def step(self, action):
        self.t += 1
        odd = self.episode % 2 == 1
        return self.look(), 10.0 * self.episode + action, odd and self.t == 3, not odd and self.t == 2, {}

    def look(self):
        self.shared[:] = self.episode, self.t
        return self.shared


class Odd(gymnasium.Env):
    """Well behaved, but environment 1 (told by its seed) does at reset, or at its second step, what ``case`` says."""

    observation_space, action_space = Box(-1, 1, (2,), np.float32), Discrete(2)

    def __init__(self, case="", at="step"):
        self.case, self.at, self.t = case, at, 0

    def reset(self, seed=None, options=None):
        self.odd = seed == 1 if seed is not None else self.odd
        good = {"obs": np.zeros_like(self.observation_space.low), "info": {}}
        if self.odd and self.at == "reset":
            exec(self.case, {"np": np, "os": os, "self": self}, good)
        return tuple(good.values())

    def step(self, action):
        self.t += 1
        obs = np.zeros_like(self.observation_space.low)
        good = {"obs": obs, "reward": 0.5, "terminated": False, "truncated": False, "info": {}}
        if self.odd and self.at == "step" and self.t == 2:
            exec(self.case, {"np": np, "os": os, "self": self}, good)
        return tuple(good.values())


class Shaped(Odd):
    def __init__(self, low=0, high=100, shape=(2, 3), dtype="uint8", **odd):
        super().__init__(**odd)
        low, high = -np.inf if low is None else low, np.inf if high is None else high
        self.observation_space = Box(low, high, tuple(shape), np.dtype(dtype).type)


class DictObservation(Odd):
    observation_space = Dict(a=Discrete(2))


class LateActions(Odd):
    action_space = Discrete(2, start=1)


class Unlike(Odd):
    made = 0

    def __init__(self, what="action_space"):
        super().__init__()
        Unlike.made += 1
        if Unlike.made == 2:
            setattr(self, what, Discrete(5) if what == "action_space" else Box(-2, 2, (2,), np.float32))


class Unfinished(Odd):
    def __init__(self, fault):
        exec(fault)


class Greedy(Odd):
    def __init__(self, config):
        super().__init__(config.pop("case"))


class Honest(gymnasium.Env):
    """Each episode is one step long, and pays its seed."""

    metadata = {"render_modes": ["human"], "render_fps": 50}
    observation_space, action_space = Box(0, 1, (1,), np.float32), Discrete(2)

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        self.seed = 0 if seed is None else seed
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), self.seed, True, False, {}


names = "Counting Odd Shaped DictObservation LateActions Unlike Unfinished Greedy Honest"
for name in names.split():
    if f"{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"{name}-v0", f"odd_envs:{name}")
'''


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test works in a folder of its own, with the module of environments in it."""
    (tmp_path / "odd_envs.py").write_text(ENVIRONMENTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("odd_envs", None)
    return tmp_path


def native(name, num_envs, contract, **make_kwargs):
    module = importlib.import_module("odd_envs")
    return NativeSession([getattr(module, name)(**make_kwargs) for _ in range(num_envs)], contract)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_gone(group, seconds=2):
    """Of a server's process group nothing is alive (what is dead and not yet reaped by process 1 is no matter)."""
    until(lambda: not process_table().get(group), seconds)


def process_table():
    """Process group -> the pids in it that are no zombies."""
    listing = run(["ps", "-A", "-o", "pid=,pgid=,stat="], check=True).stdout
    groups = {}
    for pid, group, state in (line.split()[:3] for line in listing.splitlines()):
        if not state.startswith("Z"):
            groups.setdefault(int(group), []).append(int(pid))
    return groups


def cartpole_session(num_envs=4):
    import gymnasium

    return NativeSession([gymnasium.make("CartPole-v1") for _ in range(num_envs)], ppo.CONTRACT)


def run(command, **more):
    """A program's end, with its output; never waited for without limit."""
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": 60, **more})


def run_script(*flags, script="ppo_cartpole.py", timeout=100, **environment):
    command = [sys.executable, str(HERE / script), *flags]
    return run(command, timeout=timeout, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)


def read_log(path="data/rl/ppo_cartpole_trainlog.json"):
    def refuse(token):
        raise ValueError(token)

    return json.loads(Path(path).read_text(), parse_constant=refuse)  # strict JSON


def notes(log):
    return dict(note.split("=", 1) for note in log["notes"])


def same(one, other):
    """Equal to the last bit, NaN equal to itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or one != one != other


# ------------------------------------------------------------------------------------------------- contract: the rules

ODD = Contract((2,), 2, obs_range=(-1, 1), reward_range=(0, 1), require_exclusive_done_flags=True)

# name, what environment 1 of 3 does at its second step (Python that may change obs, reward, terminated, truncated and
# info, which are returned then), the rule that this breaks, or what arrives: observation, reward, terminated
STEP_ROWS = [
    ("accept_plain", "pass", ([0, 0], 0.5, False)),
    ("accept_bounds_included", "obs[:] = -1, 1; reward = 1", ([-1, 1], 1, False)),
    ("accept_float64_observation", "obs = np.array([0.5, 0.25])", ([0.5, 0.25], 0.5, False)),
    ("accept_integers", "obs = np.array([1, -1])", ([1, -1], 0.5, False)),
    ("accept_list_observation", "obs = [0.5, -1]", ([0.5, -1], 0.5, False)),
    ("accept_tuple_observation", "obs = (0.5, 1)", ([0.5, 1], 0.5, False)),
    ("accept_memmap", "obs = np.memmap('rows', 'f4', 'w+', shape=(2,)); obs[1] = 1", ([0, 1], 0.5, False)),
    ("accept_numpy_scalars", "reward, terminated = np.float32(0.25), np.bool_(True)", ([0, 0], 0.25, True)),
    ("accept_numpy_scalars_in_a_list", "obs = [np.float32(0.5), np.int64(-1)]", ([0.5, -1], 0.5, False)),
    ("accept_integer_reward", "reward = 1", ([0, 0], 1, False)),
    ("reject_nan_observation", "obs[1] = np.nan", "obs_finite"),
    ("reject_infinite_observation", "obs[0] = -np.inf", "obs_finite"),
    ("reject_observation_above_range", "obs[0] = np.nextafter(np.float32(1), np.float32(2))", "obs_range"),
    ("reject_observation_below_range", "obs[1] = -1.5", "obs_range"),
    ("reject_overflowing_observation", "obs = np.array([0, 1e39])", "obs_dtype"),
    ("reject_short_observation", "obs = obs[:1]", "obs_shape"),
    ("reject_nested_observation", "obs = obs[None]", "obs_shape"),
    ("reject_ragged_observation", "obs = [0.5, [0.5]]", "obs_type"),
    ("reject_boolean_observation", "obs = np.array([True, False])", "obs_dtype"),
    ("reject_string_observation", "obs = np.array(['0.5', '0.5'])", "obs_dtype"),
    ("reject_number_as_string", "obs = [0.5, '0.5']", "obs_type"),
    ("reject_boolean_among_numbers", "obs = [0.5, True]", "obs_type"),
    ("reject_numpy_boolean_among_numbers", "obs = [0.5, np.True_]", "obs_type"),
    ("reject_complex_among_numbers", "obs = [0.5, np.complex64(0.5)]", "obs_type"),
    ("reject_none_observation", "obs = None", "obs_type"),
    ("reject_nan_reward", "reward = float('nan')", "reward_finite"),
    ("reject_infinite_reward", "reward = float('inf')", "reward_finite"),
    ("reject_endless_integer_reward", "reward = 10**400", "reward_finite"),
    ("reject_reward_above_range", "reward = 1.0000001", "reward_range"),
    ("reject_reward_below_range", "reward = -1e-300", "reward_range"),
    ("reject_boolean_reward", "reward = True", "reward_type"),
    ("reject_none_reward", "reward = None", "reward_type"),
    ("reject_string_reward", "reward = '0.5'", "reward_type"),
    ("reject_nested_reward", "reward = np.zeros((99, 99)).tolist()", "reward_type"),
    ("reject_array_reward", "reward = np.array([0.5])", "reward_type"),
    ("reject_number_for_terminated", "terminated = 1", "done_type"),
    ("reject_none_for_truncated", "truncated = None", "done_type"),
    ("reject_masked_array", "obs = np.ma.array([0.5, 0.25], mask=[0, 1], dtype='f4')", "obs_type"),
    ("reject_array_subclass", "obs = obs.view(type('Mine', (np.ndarray,), {}))", "obs_type"),
    ("reject_duration_as_reward", "reward = np.timedelta64(1)", "reward_type"),
    ("reject_nan_in_a_list", "obs = [0.5, float('nan')]", "obs_finite"),
    ("reject_unprintable_reward", "reward = type('R', (), {'__repr__': lambda self: 1 / 0})()", "reward_type"),
    ("reject_both_done_flags", "terminated = truncated = True", "done_exclusive"),
    ("reject_old_gym_step", "del truncated", "step_result"),
]
RESET_ROWS = [
    ("accept_plain_reset", "pass", None),
    ("reject_nan_at_reset", "obs[0] = np.nan", "obs_finite"),
    ("reject_range_at_reset", "obs[1] = 2", "obs_range"),
    ("reject_shape_at_reset", "obs = np.zeros(3, np.float32)", "obs_shape"),
    ("reject_old_gym_reset", "del info", "reset_result"),
]


@pytest.mark.parametrize("kind", ["native", "2 workers"])
@pytest.mark.parametrize(("case", "verdict"), [row[1:] for row in STEP_ROWS], ids=[row[0] for row in STEP_ROWS])
def test_a_step_that_breaks_a_rule_ends_the_session(case, verdict, kind):
    with odd_session(kind, case, at="step") as session:
        session.reset(seed=0)
        session.step([0, 1, 0])
        if isinstance(verdict, str):
            assert_violation(session, lambda: session.step([0, 1, 0]), verdict, "step 2, environment 1: ")
        else:
            transition = session.step([0, 1, 0])
            arrived = transition.next_observation, transition.reward, transition.terminated
            assert tuple(column[1].tolist() for column in arrived) == verdict
            assert [column.dtype for column in arrived] == [np.float32, np.float64, np.bool_]


@pytest.mark.parametrize("kind", ["native", "2 workers"])
@pytest.mark.parametrize(("case", "rule"), [row[1:] for row in RESET_ROWS], ids=[row[0] for row in RESET_ROWS])
def test_a_reset_that_breaks_a_rule_ends_the_session(case, rule, kind):
    with odd_session(kind, case, at="reset") as session:
        if rule is None:
            assert session.reset(seed=0).shape == (3, 2)
        else:
            assert_violation(session, lambda: session.reset(seed=0), rule, "reset, environment 1: ")


def odd_session(kind, case, at):
    if kind == "native":
        return native("Odd", 3, ODD, case=case, at=at)
    return GymnasiumSession("odd_envs:Odd-v0", ODD, 3, int(kind[0]), {"case": case, "at": at}, timeout=20)


def fails_at_step_2(session, error, match=None):
    """The error of the session's second step, at which environment 1 does what its ``case`` says."""
    actions = [0] * session.num_envs
    session.reset(seed=0)
    session.step(actions)
    with pytest.raises(error, match=match) as caught:
        session.step(actions)
    return caught.value


def assert_violation(session, call, rule, where):
    with pytest.raises(ContractViolation) as caught:
        call()
    assert (caught.value.rule, caught.value.env) == (rule, 1)
    assert len(str(caught.value)) < 400
    assert str(caught.value).startswith(f"{where}contract rule {rule} broken: expected ")
    assert ("server pid" in str(caught.value)) == isinstance(session, GymnasiumSession)
    for again in (lambda: session.step([0, 1, 0]), lambda: session.reset(0)):
        with pytest.raises(BridgeError, match="dead"):
            again()
    with pytest.raises(BridgeError):
        session.observation  # noqa: B018


@pytest.mark.parametrize("number", [3e38, -3e38, 3.5e38, -1e300])
def test_finite_is_what_float32_can_hold(number):
    """A learner computes in float32: what is larger would be an infinity to it."""

    class Large:
        def reset(self, seed=None):
            return np.zeros(2), {}

        def step(self, action):
            values = np.array([0.0, number if action == 1 else 0.0])
            return values, number if action == 2 else 0.0, False, False, {}

    for action, rule in (1, "obs_finite"), (2, "reward_finite"):
        session = NativeSession([Large()], Contract((2,), 3, "float64"))
        session.reset(0)
        if abs(number) < 3.4e38:
            session.step([action])
        else:
            with pytest.raises(ContractViolation, match=r"expected a finite .*\(in float32\)") as caught:
                session.step([action])
            assert caught.value.rule == rule
        unchecked = Contract((2,), 3, "float64", check_obs_finite=False, check_reward_finite=False)
        session = NativeSession([Large()], unchecked)
        session.reset(0)
        session.step([action])


@pytest.mark.parametrize(
    ("dtype", "most", "more"),
    [("float16", 65519.9, 65520.0), ("float32", 3.4028235e38, 3.4028236e38), ("float64", sys.float_info.max, 10**309)],
)
def test_a_list_may_hold_what_an_array_may(dtype, most, more):
    """The customary ways to write the largest numbers are a little above them."""
    contract = Contract((1,), 1, dtype)
    for sign in 1, -1:
        for form in list, np.array:
            assert contract._observation(form([sign * most]), 0) == sign * np.finfo(dtype).max
            with pytest.raises(ContractViolation, match="contract rule obs_dtype"):
                contract._observation(form([sign * more]), 0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_no_infinity_in_any_dtype(dtype):
    case = f"obs = np.array([0, np.inf], np.{dtype})"
    with native("Odd", 3, Contract((2,), 2, dtype), case=case) as session:
        fails_at_step_2(session, ContractViolation, match=r"environment 1: contract rule obs_finite broken")


@pytest.mark.parametrize("kind", ["native", "2 workers"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_passes_where_nothing_is_demanded(value, kind):
    """But not in a list, where an infinity may be a number that was too large."""
    nothing = Contract((2,), 2, check_obs_finite=False)
    for form in "np.array", "list":
        case = f"obs = {form}([0, np.float32('{value}')])"
        if kind == "native":
            session = native("Odd", 3, nothing, case=case)
        else:
            session = GymnasiumSession("odd_envs:Odd-v0", nothing, 3, 2, {"case": case})
        with session:
            session.reset(0)
            session.step([0, 1, 0])
            if form == "list" and math.isinf(value):
                with pytest.raises(ContractViolation, match="environment 1: contract rule obs_dtype broken"):
                    session.step([0, 1, 0])
            else:
                np.testing.assert_array_equal(session.step([0, 1, 0]).next_observation[1], [0, value])


@pytest.mark.parametrize("case", ["obs[1] = 2", "obs[0] = np.inf", "obs[0] = np.nan", "reward = 2", "reward = -np.inf"])
def test_a_range_holds_without_the_check_for_finite_values(case):
    contract = dataclasses.replace(ODD, check_obs_finite=False, check_reward_finite=False)
    with native("Odd", 3, contract, case=case) as session:
        fails_at_step_2(session, ContractViolation, match=r"environment 1: contract rule (obs|reward)_range broken")


def test_a_contract_does_not_change_with_what_it_was_made_of():
    limits = [0, 1]
    contract = Contract((2,), 2, obs_range=limits, reward_range=limits)
    limits[1] = 1000
    assert contract == Contract((2,), 2, obs_range=(0, 1), reward_range=np.array([0, 1]))
    assert hash(contract) == hash(Contract((2,), 2, obs_range=(0.0, 1.0), reward_range=(0.0, 1.0)))
    assert contract.reward_range == (0, 1)


def test_numpy_integers_are_integers():
    """Such as ``env.action_space.n``."""
    contract = Contract((np.int64(4),), np.int64(2))
    assert contract == CARTPOLE
    with GymnasiumSession("CartPole-v1", contract, np.uint8(2), np.uint8(2)) as session:
        session.reset(np.int64(1))
        session.step([0, 1])
        assert json.dumps([contract.obs_shape, contract.n_actions, session.transitions_checked]) == "[[4], 2, 2]"


def test_an_environment_twice_is_refused():
    """Each would step and reset the other."""
    module = importlib.import_module("odd_envs")
    with pytest.raises(ValueError, match="each an object of its own"):
        NativeSession([module.Counting()] * 2, Contract((2,), 3))
    from gymnasium import make, wrappers

    pole = make("CartPole-v1")
    with pytest.raises(ValueError, match="each an object of its own"):
        NativeSession([wrappers.TransformReward(pole, float) for _ in range(2)], CARTPOLE)


def test_errors_can_leave_the_process_of_a_pool():
    session = odd_session("native", "obs[1] = np.nan", at="step")
    error = fails_at_step_2(session, ContractViolation)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.__dict__) == (ContractViolation, str(error), error.__dict__)


def test_a_forked_process_cannot_use_the_session():
    """It would share the pipes, and take the other's reply for its own; closing it is the opener's affair, too."""
    with GymnasiumSession("odd_envs:Counting-v0", Contract((2,), 3), 2) as session:
        session.reset(0)
        if (child := os.fork()) == 0:
            try:
                session.close()
                session.step([0, 0])
            except BridgeError as error:
                os._exit(7 if "belongs to the process that opened it" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert session.step([1, 2]).reward.tolist() == [11, 12]


def test_a_twin_is_of_what_the_session_was_made_of():
    kwargs = {"case": "reward = 1.0", "at": "step"}
    with GymnasiumSession("odd_envs:Odd-v0", ODD, 3, 1, kwargs) as session:
        kwargs["case"] = "reward = 0.0"
        with session.twin(3) as twin:
            twin.reset(0)
            twin.step([0, 0, 0])
            assert twin.step([0, 0, 0]).reward.tolist() == [0.5, 1.0, 0.5]


def test_a_native_twin_is_of_every_environment():
    module = importlib.import_module("odd_envs")
    envs = [module.Odd(case="reward = 1.0"), module.Odd(case="reward = 0.0")]
    with NativeSession(envs, ODD) as session, session.twin(2) as twin:
        twin.reset(0)
        twin.step([0, 0])
        assert twin.step([0, 0]).reward.tolist() == [0.5, 0.0]


def test_a_native_twin_is_not_of_environments_that_are_their_own_copies():
    """Not inside a wrapper either, which has a copy of its own."""
    from gymnasium import wrappers

    odd = importlib.import_module("odd_envs").Odd()
    odd.__deepcopy__ = lambda memo: odd
    for env in odd, wrappers.TransformReward(odd, abs):
        with NativeSession([env], ODD) as session, pytest.raises(ValueError, match="an environment's copy is itself"):
            session.twin(1)


def test_environments_are_told_apart_also_where_unwrapped_is_a_new_object_each_time():
    class Viewed(importlib.import_module("odd_envs").Odd):
        unwrapped = property(lambda self: SimpleNamespace(env=self))

    with NativeSession([Viewed() for _ in range(8)], ODD) as session, session.twin(8) as twin:
        assert not session.shares_environments(twin)


ACTION_ROWS = [
    ("accept_list", [0, 1], None),
    ("accept_int32", np.array([1, 0], np.int32), None),
    ("reject_too_large", [0, 2], "action_range"),
    ("reject_negative", [-1, 0], "action_range"),
    ("reject_float", [0.0, 1.0], "action_type"),
    ("reject_float_array", np.array([0.0, 1.0]), "action_type"),
    ("reject_boolean", [True, 0], "action_type"),
    ("reject_boolean_array", np.array([True, False]), "action_type"),
    ("reject_too_few", [0], "action_count"),
    ("reject_too_many", [0, 1, 0], "action_count"),
    ("reject_none", None, "action_count"),
]


@pytest.mark.parametrize(("name", "actions", "rule"), ACTION_ROWS, ids=[row[0] for row in ACTION_ROWS])
def test_actions_are_checked_before_anything_is_sent(name, actions, rule):
    stepped = []

    class Witness:
        def reset(self, seed=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            stepped.append(action)
            return np.zeros(2, np.float32), 0.0, False, False, {}

    session = NativeSession([Witness(), Witness()], Contract((2,), 2))
    session.reset(0)
    if rule is None:
        assert session.step(actions).action.tolist() == list(actions)
    else:
        with pytest.raises(ContractViolation) as caught:
            session.step(actions)
        assert caught.value.rule == rule
        assert stepped == []


def test_actions_that_change_while_they_are_checked_are_sent_as_they_were(monkeypatch):
    """Another thread may use the same buffer again."""
    actions, look = np.array([1, 2]), gym_bridge._first_outside

    def first_outside(*args):
        actions[:] = 99
        return look(*args)

    with native("Counting", 2, Contract((2,), 3)) as session:
        session.reset(0)
        monkeypatch.setattr(gym_bridge, "_first_outside", first_outside)
        assert session.step(actions).reward.tolist() == [11, 12]


@pytest.mark.parametrize(
    "wrong",
    [
        {"obs_shape": ()},
        {"obs_shape": 4},
        {"obs_shape": (0,)},
        {"obs_shape": (-3,)},
        {"obs_shape": (10**9,)},
        {"obs_shape": ((1 << 20) + 1,)},
        {"obs_shape": np.array([1 << 16, 1 << 16], np.int32)},  # whose product is 0 in int32
        {"obs_shape": (2.0,)},
        {"obs_shape": (1,) * 33},
        {"n_actions": 10**9},
        {"n_actions": 0},
        {"n_actions": True},
        {"obs_dtype": "complex64"},
        {"obs_dtype": "no such dtype"},
        {"obs_dtype": np.dtype("float32")},
        {"obs_range": (1, -1)},
        {"obs_range": (math.nan, 1)},
        {"obs_range": ([0, 0, 0], 1)},
        {"obs_range": (300, 400), "obs_dtype": "uint8"},
        {"obs_range": (-10, -5), "obs_dtype": "uint8"},
        {"obs_range": (0.2, 0.8), "obs_dtype": "int64"},
        {"obs_range": (0, 10**400)},
        {"obs_range": (0, 1e39), "check_obs_finite": False},
        {"obs_range": (70000, 80000), "obs_dtype": "float16"},
        {"obs_range": 5},
        {"obs_range": (["0", "0"], ["1", "1"])},
        {"obs_range": (math.inf, math.inf)},
        {"obs_range": (math.inf, math.inf), "obs_dtype": "uint8"},
        {"reward_range": (-math.inf, -math.inf)},
        {"reward_range": (1, 0)},
        {"reward_range": (0, 1, 2)},
        {"reward_range": ("0", "1")},
        {"reward_range": ([0, 0], 1)},
    ],
    ids=str,
)
def test_a_contract_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} |an observation of shape .* is larger"):
        Contract(**{"obs_shape": (2,), "n_actions": 2, **wrong})


def test_a_contract_at_its_limits():
    Contract((1 << 20,), 1 << 16)
    Contract((2,), 2, obs_range=([0, -1], [0, 1]), reward_range=(1, 1))  # a sensor that always says the same
    Contract((2,), 2, "uint8", obs_range=(7, 7))


@pytest.mark.parametrize("dtype", gym_bridge.DTYPES)
def test_all_of_a_dtype_can_be_a_range(dtype):
    limits = np.finfo(dtype) if dtype.startswith("f") else np.iinfo(dtype)
    contract = Contract((2,), 2, dtype, (limits.min, limits.max), check_obs_finite=False)
    ends = np.array([limits.min, limits.max], dtype)
    for form in ends, ends.tolist():
        observation = contract._observation(form, 0)
        assert (observation.dtype, observation.tolist()) == (dtype, ends.tolist())
        contract._check_observations(observation[None])


@pytest.mark.parametrize("kind", ["native", "2 workers"])
def test_a_violation_says_what_was_expected(kind):
    for case, message in (
        ("reward = 2", r"expected a reward in \[0\.0, 1\.0\], got 2\.0"),
        ("obs = obs[:1]", r"expected \(2,\), got \(1,\)"),
        ("obs[:] = 0, 2", r"expected observation\[1\] in \[-1\.0, 1\.0\], got 2"),
    ):
        session = odd_session(kind, case, at="step")
        fails_at_step_2(session, ContractViolation, match=message)


def test_a_violation_is_the_first_that_is_at_fault():
    session = NativeSession([importlib.import_module("odd_envs").Odd(case="obs[:] = 2, 3") for _ in range(3)], ODD)
    session.reset(0)
    for env in session._envs[1:]:
        env.odd = True
    session.step([0, 1, 0])
    with pytest.raises(ContractViolation, match=r"step 2, environment 1: .*observation\[0\] in .*, got 2"):
        session.step([0, 1, 0])
    session.close()
    with native("Counting", 3, Contract((2,), 3)) as session:
        session.reset(0)
        with pytest.raises(ContractViolation, match=r"step 1, environment 1: .*expected 0 \.\. 2, got 5"):
            session.step([0, 5, 7])


INTEGER_ROWS = [
    ("obs = np.full((2, 3), 255)", [[255, 255, 255], [255, 255, 255]]),  # int64, but every value fits
    ("obs = [[0, 1, 2], [3, 4, 255]]", [[0, 1, 2], [3, 4, 255]]),
    ("obs = np.full((2, 3), 256)", "obs_dtype"),
    ("obs = np.full((2, 3), -1)", "obs_dtype"),
    ("obs = np.full((2, 3), 2.0)", "obs_dtype"),
    ("obs = [[0, 1, 2], [3, 4, 2.0]]", "obs_dtype"),
    ("obs = [[0, 1, 2], [3, 4, 256]]", "obs_dtype"),
    ("obs = [[0, 1, 2], [3, 4]]", "obs_shape"),
]


@pytest.mark.parametrize(("case", "verdict"), INTEGER_ROWS)
def test_integer_observations_take_no_float_and_no_overflow(case, verdict):
    with native("Shaped", 2, Contract((2, 3), 2, "uint8", (0, 255)), case=case) as session:
        if isinstance(verdict, str):
            fails_at_step_2(session, ContractViolation, rf"environment 1: contract rule {verdict}")
        else:
            session.reset(0)
            session.step([0, 0])
            observation = session.step([0, 0]).next_observation
            assert (observation.dtype, observation[1].tolist()) == (np.uint8, verdict)


@pytest.mark.parametrize("dtype", gym_bridge.DTYPES)
def test_every_number_arrives_in_its_place(dtype):
    limits = np.finfo(dtype) if dtype.startswith("f") else np.iinfo(dtype)
    sent = np.array([[limits.min, 1, 2], [3, 4, limits.max]], dtype)
    case = (
        "of = (np.finfo if obs.dtype.kind == 'f' else np.iinfo)(obs.dtype); obs[:] = [[of.min, 1, 2], [3, 4, of.max]]"
    )
    for at in "reset", "step":
        kwargs = {"dtype": dtype, "case": f"{case}; del of", "at": at}
        contract = Contract((2, 3), 2, dtype, check_obs_finite=False)
        with GymnasiumSession("odd_envs:Shaped-v0", contract, 2, 2, kwargs) as session:
            shown = [session.reset(0), *[session.step([0, 0]).next_observation for _ in range(2)]]
        assert shown[0 if at == "reset" else 2][1].tobytes() == sent.tobytes()
        assert not any(each[0].any() for each in shown)


@pytest.mark.parametrize(("obs_range", "bad"), [((0, 100), 101), ((100, 255), 99)])
def test_a_range_that_shares_one_end_with_its_dtype_is_checked_at_the_other(obs_range, bad):
    class Bytes:
        def reset(self, seed=None):
            return np.array(obs_range, np.uint8), {}

        def step(self, action):
            return np.array([100, bad], np.uint8), 0.0, False, False, {}

    session = NativeSession([Bytes()], Contract((2,), 2, "uint8", obs_range))
    session.reset(0)
    with pytest.raises(ContractViolation, match=r"obs_range broken: expected observation\[1\]"):
        session.step([0])


def test_from_env_is_the_contract_that_the_spaces_declare():
    contract = Contract.from_env("CartPole-v1")
    assert (contract.obs_shape, contract.n_actions, contract.obs_dtype) == ((4,), 2, "float32")
    assert contract.obs_range[1] == (pytest.approx(4.8), math.inf, pytest.approx(math.radians(24)), math.inf)
    by_hand = dataclasses.replace(ppo.CONTRACT, reward_range=None)
    assert contract == by_hand
    assert hash(contract) == hash(by_hand)


@pytest.mark.parametrize(("low", "high"), [(-1, None), (None, 1), (None, None)])
def test_from_env_of_bounds_on_one_side(low, high):
    contract = Contract.from_env("odd_envs:Shaped-v0", {"low": low, "high": high, "shape": [2], "dtype": "float32"})
    bounds = ((low or -math.inf,) * 2, (high or math.inf,) * 2)
    assert contract.obs_range == (bounds if low or high else None)


# ------------------------------------------------------------------------------------------------------------- sessions


def test_no_transition_crosses_an_episode_boundary():
    """Two episodes of the counting environment, as literal rows."""
    rows = []
    for session in (
        native("Counting", 2, Contract((2,), 3)),
        GymnasiumSession("odd_envs:Counting-v0", Contract((2,), 3), 2, 1),
        GymnasiumSession("odd_envs:Counting-v0", Contract((2,), 3), 2, 2),
    ):
        with session:
            session.reset(0)
            transitions = [session.step([1, 2]) for _ in range(6)]
            assert session.transitions_checked == 12
        rows.append([[transition_row(transition, env) for transition in transitions] for env in (0, 1)])
    # observation -> next observation, reward (10 * episode + action), terminated, truncated
    assert rows[0][0] == [
        ([1, 0], [1, 1], 11.0, False, False),
        ([1, 1], [1, 2], 11.0, False, False),
        ([1, 2], [1, 3], 11.0, True, False),
        ([2, 0], [2, 1], 21.0, False, False),
        ([2, 1], [2, 2], 21.0, False, True),
        ([3, 0], [3, 1], 31.0, False, False),
    ]
    assert rows[0][1] == [(obs, next_obs, reward + 1, *done) for obs, next_obs, reward, *done in rows[0][0]]
    assert rows[1] == rows[0]
    assert rows[2] == rows[0]


@pytest.mark.parametrize("kind", ["native", "1 worker", "2 workers"])
def test_terminated_and_truncated_at_once(kind):
    """As in CartPole, if the pole falls at step 500: Gymnasium allows it."""
    contract = dataclasses.replace(ODD, require_exclusive_done_flags=False)
    kwargs = {"case": "obs[:] = 0.5; terminated = truncated = True"}
    if kind == "native":
        session = native("Odd", 3, contract, **kwargs)
    else:
        session = GymnasiumSession("odd_envs:Odd-v0", contract, 3, int(kind[0]), kwargs)
    with session:
        session.reset(0)
        session.step([0, 0, 0])
        transition = session.step([0, 0, 0])
        assert session.observation[1].tolist() == [0, 0]  # of a new episode
    assert transition.next_observation[1].tolist() == [0.5, 0.5]
    assert (transition.terminated & transition.truncated).tolist() == transition.done.tolist() == [False, True, False]


def transition_row(transition, env):
    columns = (getattr(transition, field.name) for field in dataclasses.fields(Transition))
    observation, _, reward, next_observation, terminated, truncated = (column[env].tolist() for column in columns)
    return observation, next_observation, reward, terminated, truncated


def test_native_and_gymnasium_sessions_give_the_same_transitions():
    import gymnasium

    rng = np.random.default_rng(7)
    actions = rng.integers(0, 2, (300, 3))
    sessions = [NativeSession([gymnasium.make("CartPole-v1") for _ in range(3)], CARTPOLE)]
    sessions += [GymnasiumSession("CartPole-v1", CARTPOLE, 3, workers) for workers in (1, 2, 3)]
    histories = []
    for session in sessions:
        with session:
            history = [session.reset(5)]
            for action in actions:
                transition = session.step(action)
                history += [*dataclasses.astuple(transition), session.observation]
        histories.append(history)
    for history in histories[1:]:
        assert len(history) == len(histories[0])
        for ours, theirs in zip(histories[0], history, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_arrays_are_overwritten_neither_by_the_session_nor_by_its_user():
    with native("Counting", 1, Contract((2,), 3)) as session:
        first = session.reset(0)
        first *= 7
        seen = session.observation
        seen *= 7
        actions = np.array([0])
        transition = session.step(actions)
        actions[:] = 2
        assert transition.action.tolist() == [0]
        transition.next_observation[:] = 7
        assert transition.observation.tolist() == [[1, 0]]
        assert session.step([0]).observation.tolist() == [[1, 1]]
        assert transition.next_observation.tolist() == [[7, 7]]


def test_environments_may_share_an_array():
    class Sharing:
        array = np.zeros(1, np.float32)

        def reset(self, seed=None):
            self.seed = self.seed if seed is None else seed
            self.array[:] = self.seed
            return self.array, {}

        def step(self, action):
            self.array[:] = 9
            return self.array, 0.0, True, False, {}

    session = NativeSession([Sharing(), Sharing()], Contract((1,), 2))
    assert session.reset(1).tolist() == [[1], [2]]
    session.step([0, 0])
    assert session.observation.tolist() == [[1], [2]]  # of the next episodes


@pytest.mark.parametrize("frames", [2, 3])
@pytest.mark.parametrize("kind", ["native", "2 workers"])
def test_frames_and_actions_that_are_shown_belong_to_one_episode(kind, frames):
    """Counting's observation is [episode, step], so every stack tells which frames it is made of."""
    contract = Contract((2,), 3)
    shown = {"frame_stack": frames, "append_action": True}
    if kind == "native":
        counting = importlib.import_module("odd_envs").Counting
        session = NativeSession([counting(), counting()], contract, **shown)
    else:
        session = GymnasiumSession("odd_envs:Counting-v0", contract, 2, 2, **shown)
    with session:
        assert session.obs_shape == (frames, 5)
        first = [1, 0, 0, 0, 0]  # episode, step, and no action that led here
        assert session.reset(1).tolist() == [[first] * frames] * 2
        ends = []
        for step in range(8):
            actions = [step % 3, 1]
            transition = session.step(actions)
            assert np.array_equal(transition.next_observation[:, :-1], transition.observation[:, 1:])
            assert transition.next_observation[:, -1, 2:].tolist() == np.eye(3)[actions].tolist()
            done = transition.done
            assert np.array_equal(session.observation[~done], transition.next_observation[~done])
            for stack in session.observation[done]:
                assert (stack == stack[0]).all()
                assert stack[0, 1:].tolist() == [0, 0, 0, 0]
            ends += transition.next_observation[done, :, :2].tolist()
        last = [[[1, 1], [1, 2], [1, 3]], [[2, 0], [2, 1], [2, 2]], [[3, 1], [3, 2], [3, 3]]]
        assert ends[::2] == [stack[-frames:] for stack in last]
        with session.twin(1) as twin:
            assert twin.reset(1).shape == (1, frames, 5)
    with pytest.raises(ValueError, match="vectors"):
        NativeSession([object()], Contract((2, 3), 2), append_action=True)
    with pytest.raises(ValueError, match="frame_stack must be a positive integer"):
        NativeSession([object()], contract, frame_stack=0)


@pytest.mark.parametrize(
    ("shown", "first", "then"),
    [
        ({"append_action": True}, [1, 0, 0, 0, 0], [1, 1, 0, 0, 1]),
        ({"frame_stack": 2}, [[1, 0], [1, 0]], [[1, 0], [1, 1]]),
    ],
)
def test_actions_without_frames_and_frames_without_actions(shown, first, then):
    session = NativeSession([importlib.import_module("odd_envs").Counting()], Contract((2,), 3), **shown)
    assert session.obs_shape == np.shape(first)
    assert session.reset(0).tolist() == [first]
    assert session.step([2]).next_observation.tolist() == [then]
    assert session.observation.tolist() == [then]


def test_a_twin_is_a_session_of_its_own():
    for session in (
        native("Counting", 1, Contract((2,), 3)),
        GymnasiumSession("odd_envs:Counting-v0", Contract((2,), 3)),
    ):
        with session, session.twin(2) as twin:
            session.reset(0)
            assert twin.reset(0).tolist() == [[1, 0], [1, 0]]
            twin.step([0, 0])
            assert session.observation.tolist() == [[1, 0]]


def test_a_twin_has_as_many_workers_as_the_session_or_one_for_each_environment():
    with GymnasiumSession("odd_envs:Counting-v0", Contract((2,), 3), 4, 2) as session:
        for num_envs, hosted in (8, [4, 4]), (3, [1, 2]), (1, [1]):
            with session.twin(num_envs) as twin:
                assert [len(server.envs) for server in twin._servers] == hosted


def test_a_server_command_is_also_the_twins_and_is_asked_for_the_spaces(workplace):
    """The module is where that Python alone finds it."""
    (workplace / "lib").mkdir()
    (workplace / "lib/far.py").write_text("from odd_envs import *")
    command = f"env PYTHONPATH=lib {sys.executable} {HERE / 'gym_bridge.py'}"
    args = ppo.Args(env_id="far:Counting-v0", server_command=command)
    with ppo.open_session(args, 2) as session, session.twin(1) as twin:
        assert session.reset(0).tolist() == [[1, 0], [1, 0]]
        assert twin.reset(0).tolist() == [[1, 0]]


@pytest.mark.parametrize("what", ["action_space", "observation_space"])
def test_environments_that_declare_unlike_spaces_are_refused(what):
    with (
        pytest.raises(BridgeError, match="environment 1 declares other spaces than environment 0"),
        GymnasiumSession("odd_envs:Unlike-v0", Contract((2,), 2), 2, make_kwargs={"what": what}) as session,
    ):
        session.reset(0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": 0},
        {"timeout": math.nan},
        {"timeout": math.inf},
        {"num_workers": 3},
        {"num_workers": 0},
        {"num_envs": 2.0},
    ],
    ids=str,
)
def test_a_session_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GymnasiumSession("CartPole-v1", CARTPOLE, **{"num_envs": 2, **wrong})
    with pytest.raises(TypeError, match="JSON"):
        GymnasiumSession("CartPole-v1", CARTPOLE, make_kwargs={"what": object()})


def test_a_session_without_environments_is_refused():
    with pytest.raises(ValueError, match="at least one environment"):
        NativeSession([], CARTPOLE)


@pytest.mark.parametrize("seed", [-1, 1.0, True, "1"])
def test_a_seed_is_a_non_negative_integer(seed):
    with pytest.raises(BridgeError, match="reset: a seed is a non-negative integer or None"):
        native("Counting", 1, Contract((2,), 3)).reset(seed)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process can be held to a core on Linux only")
def test_servers_are_held_to_a_core_each_where_there_is_one_for_every_core():
    """Not where there are more of them, nor where somebody else's command starts them."""
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-u", str(HERE / "gym_bridge.py")]
    for workers, server_command in (len(cores), None), (len(cores) + 1, None), (len(cores), command):
        with GymnasiumSession("CartPole-v1", CARTPOLE, workers, workers, server_command=server_command) as session:
            held = [sorted(os.sched_getaffinity(server.process.pid)) for server in session._servers]
        alone = workers == len(cores) and server_command is None
        assert held == ([[core] for core in cores] if alone else [cores] * workers)
        assert sorted(os.sched_getaffinity(0)) == cores  # the trainer may go where it likes
        assert gym_bridge._current_core() in cores


def test_the_server_on_the_trainers_core_is_asked_last(monkeypatch):
    """It would interrupt the trainer before the other has been asked; the numbers are the same."""
    asked, send = [], gym_bridge._Server.send

    def noted(server, *args):
        asked.append(server.envs.start)
        send(server, *args)

    with GymnasiumSession("CartPole-v1", CARTPOLE, 4, 2) as session, cartpole_session(4) as native_session:
        monkeypatch.setattr(gym_bridge._Server, "send", noted)
        first, second = session._servers
        for first.core, second.core, core in (5, 6, 5), (5, 6, 6), (5, 6, 9), (5, 6, -1), (None, 6, -1), (None, 6, 6):
            monkeypatch.setattr(gym_bridge, "_current_core", lambda core=core: core)
            assert np.array_equal(session.reset(0), native_session.reset(0))
            ours, theirs = (each.step([0, 1, 1, 0]).next_observation for each in (session, native_session))
            assert np.array_equal(ours, theirs)
        monkeypatch.undo()
    reset = [0, 2]
    assert asked == [*reset, 2, 0, *reset, 0, 2, *reset, 0, 2, *reset, 0, 2, *reset, 0, 2, *reset, 0, 2]


def test_actions_arrive_as_gymnasium_gives_them(workplace):
    """As numpy's int64: a plain int would wrap around, added to a uint8."""
    import gymnasium

    (workplace / "adding.py").write_text("""
import numpy as np, gymnasium
class Adding(gymnasium.Env):
    observation_space, action_space = gymnasium.spaces.Box(0, 255, (1,), np.uint8), gymnasium.spaces.Discrete(9)
    def reset(self, seed=None, options=None): return np.array([250], np.uint8), {}
    def step(self, action): return np.array([250], np.uint8), float(np.uint8(250) + action), False, False, {}
gymnasium.register("Adding-v0", Adding)
""")
    contract = Contract((1,), 9, "uint8")
    make = importlib.import_module("adding").Adding
    vector = gymnasium.vector.SyncVectorEnv([make, make])
    vector.reset()
    sessions = [NativeSession([make(), make()], contract), GymnasiumSession("adding:Adding-v0", contract, 2)]
    for session in sessions:
        with session:
            session.reset(0)
            rewards = session.step([7, 8]).reward
        assert rewards.tolist() == vector.step(np.array([7, 8]))[1].tolist() == [257.0, 258.0]


def test_only_the_first_episode_is_seeded():
    """Those that follow are what they are in Gymnasium's own vector environment."""
    import gymnasium

    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    vector = gymnasium.vector.SyncVectorEnv([CartPoleEnv, CartPoleEnv], autoreset_mode=mode)
    with NativeSession([CartPoleEnv(), CartPoleEnv()], CARTPOLE) as session:
        assert np.array_equal(session.reset(5), vector.reset(seed=5)[0])
        for _ in range(60):  # several episodes
            transition = session.step([1, 1])
            observation, reward, terminated, *_ = vector.step(np.array([1, 1]))
            assert np.array_equal(session.observation, observation)
            assert np.array_equal(transition.reward, reward)
            assert np.array_equal(transition.terminated, terminated)


@pytest.mark.parametrize("kind", ["native", "2 workers"])
def test_reset_seeds_environment_i_with_seed_plus_i_or_not_at_all(kind):
    """Honest pays its seed, and 0 without one."""
    contract = Contract((1,), 2)
    if kind == "native":
        session = native("Honest", 3, contract)
    else:
        session = GymnasiumSession("odd_envs:Honest-v0", contract, 3, 2)
    with session:
        for seed, paid in (5, [5, 6, 7]), (None, [0, 0, 0]):
            session.reset(seed)
            assert session.step([0, 0, 0]).reward.tolist() == paid


def test_step_before_reset_and_after_close():
    for session in native("Counting", 1, Contract((2,), 3)), GymnasiumSession("CartPole-v1", CARTPOLE):
        with pytest.raises(BridgeError, match=r"before reset"):
            session.observation  # noqa: B018
        with pytest.raises(BridgeError, match=r"before reset"):
            session.step([0])
        session.close()
        session.close()
        with pytest.raises(BridgeError, match="dead"):
            session.step([0])


# --------------------------------------------------------------------------------------------------------------- faults

# A server of a few lines, for as many environments as it is told to host.  At request FAULTY, the one that hosts HOSTS
# of them does FAULT instead of the right thing.  It answers in lists, where the real one is asked for base64.
FAKE_SERVER = """
import base64, json, os, signal, struct, subprocess, sys, time
def say(text): os.write(1, text.encode() if isinstance(text, str) else text)
n = int(sys.argv[sys.argv.index("--num-envs") + 1])
for line in sys.stdin:
    request = json.loads(line)
    reply = {"id": request["id"], "ok": True}
    if request["cmd"] == "describe":
        reply.update(protocol=1, env_id="Fake-v0", num_envs=n, n_actions=2, obs_shape=[2], obs_dtype="float32",
                     obs_low=[-1, None], obs_high=[1, None], versions={})
    if request["cmd"] == "reset":
        reply.update(obs=[[0.0, 0.25] for _ in range(n)])
    if request["cmd"] == "step":
        reply.update(next_obs=[[0.5, 0.75] for _ in range(n)], reward=[1.0] * n, terminated=[False] * n,
                     truncated=[False] * n, reset_obs={})
    if request["cmd"] == "FAULTY" and n == HOSTS:
        FAULT
    say(json.dumps(reply) + "\\n")
"""
FAKE = Contract((2,), 2, obs_range=(-1, 1), reward_range=(0, 1), require_exclusive_done_flags=True)


def fake_server(workplace, faulty, fault, hosts="n"):
    """A command; with the fault are all servers, or those that host so many environments."""
    server = workplace / "fake_server.py"
    server.write_text(FAKE_SERVER.replace("FAULTY", faulty).replace("HOSTS", hosts).replace("FAULT", fault))
    return [sys.executable, str(server)]


def fake_session(workplace, faulty, fault, env=2, timeout=20.0):
    """Environments 0, 1, 2; worker 0 hosts the first, worker 1 the others.  Environment ``env`` has the fault."""
    hosts, own = (1, 0) if env == 0 else (2, env - 1)  # the environments of the worker; the index of this one there
    command = fake_server(workplace, faulty, fault.replace("ENV", str(own)), str(hosts))
    return GymnasiumSession("Fake-v0", FAKE, 3, 2, timeout=timeout, server_command=command, wait=False)


def assert_fault(session, faulty, error, message, env=None, worker=None):
    """One error, in bounded time, that says where; then nothing lives and nothing more comes out."""
    if faulty != "describe":
        timeout, session._timeout = session._timeout, 20.0
        session._handshake(session.contract)  # servers need a while to start on a loaded machine
        session._timeout = timeout
    moment = time.monotonic()
    with pytest.raises((BridgeError, ContractViolation)) as caught:  # noqa: PT012
        session.reset(0)
        moment = time.monotonic()
        session.step([0, 1, 0])
        session.step([0, 1, 0])
    took = time.monotonic() - moment
    text = str(caught.value)
    assert type(caught.value) is error
    assert re.search(message, text, re.DOTALL), text
    stages = ["start", "reset", "step 1", "step 2"]
    first = stages.index({"describe": "start", "reset": "reset", "step": "step 1"}[faulty])
    late = re.search("more than one reply|without being asked|has id", text)  # may be seen with the next request only
    assert text.startswith(tuple(stages[first : first + 2] if late else stages[first : first + 1]))
    assert session.transitions_checked == (3 if text.startswith("step 2") else 0)  # never the batch that was bad
    assert env is None or (caught.value.env == env and f"environment {env}: " in text)
    pids = [server.process.pid for server in session._servers]
    assert worker is None or f"server pid {pids[worker]}" in text
    assert took < session._timeout + 0.5 + 1.0  # and a second for a loaded machine
    for pid in pids:
        assert_gone(pid)
    for again in (lambda: session.step([0, 1, 0]), lambda: session.reset(0), lambda: session.observation):
        with pytest.raises(BridgeError):
            again()
    session.close()


# What a process or a conversation can do, at any request: name with the verdict, the fault, what the message says.
PROCESS_ROWS = [
    ("reject_import_error", "import no_such_module", "exit code 1.*No module named 'no_such_module'"),
    ("reject_exit_without_a_word", "sys.exit(3)", "hung up.*exit code 3"),
    ("reject_half_a_line_then_exit", "say('{\"id\"'); sys.exit(3)", "middle of a reply.*exit code 3"),
    ("reject_killed", "os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ("reject_crash", "os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    ("reject_real_time_signal", "os.kill(os.getpid(), 40)", "signal 40"),
    ("reject_banner", "say('Welcome!\\n')", "JSON.*Welcome"),
    ("reject_empty_line", "say('\\n')", "JSON"),
    ("reject_bad_utf8", "say(b'\\xff\\n')", "JSON"),
    ("reject_utf16", "say((json.dumps(reply)).encode('utf-16-le') + b'\\n')", "JSON"),
    ("reject_byte_order_mark", "say(b'\\xef\\xbb\\xbf')", "JSON"),
    ("reject_deep_nesting", "say('[' * 100000 + '\\n')", "JSON"),
    ("reject_nan_token", "reply['id'] = float('nan')", "NaN is no JSON"),
    ("reject_infinity_token", "reply['more'] = -float('inf')", "-Infinity is no JSON"),
    ("reject_key_twice", 'say(\'{"id":3,"id":3}\\n\')', "twice"),
    ("reject_a_list", "reply = [reply]", "object with an integer id"),
    ("reject_no_id", "del reply['id']", "object with an integer id"),
    ("reject_no_ok", "del reply['ok']", "boolean ok"),
    ("reject_number_for_ok", "reply['ok'] = 1", "boolean ok"),
    ("reject_stale_id", "reply['id'] -= 1", r"the reply has id \d, the request had \d"),
    ("reject_string_for_id", "reply['id'] = str(reply['id'])", "integer id"),
    ("reject_fraction_for_id", "reply['id'] += 0.0", "integer id"),
    ("reject_two_replies", "say(json.dumps(reply) + '\\n')", "more than one reply|without being asked|has id"),
    ("reject_unknown_key", "reply['bonus'] = 1", r"unknown \['bonus'\]"),
    ("reject_missing_key", "reply = {'id': reply['id'], 'ok': True}", "lacks"),
    ("reject_failed_request", "reply = {'id': reply['id'], 'ok': False, 'error': 'boom', 'traceback': 't'}", "boom"),
    ("reject_malformed_error", "reply = {'id': reply['id'], 'ok': False}", r"lacks \['error'\]"),
    ("reject_line_without_end", "while True: say(' ' * 65536)", "longer than"),
    ("reject_hang_with_child", "subprocess.Popen(['sleep', '60']); time.sleep(60)", "no whole reply within 3 s"),
    ("reject_hang_that_ignores_sigterm", "signal.signal(15, signal.SIG_IGN); time.sleep(60)", "within 3 s"),
    ("reject_hang_stopped", "os.kill(os.getpid(), signal.SIGSTOP)", "within 3 s"),
    ("reject_half_a_line_then_silence", "say('{\"id\":'); time.sleep(60)", "within 3 s; so far.*id"),
    ("reject_slow_drip", "[(say(' '), time.sleep(0.1)) for _ in range(600)]", "within 3 s"),
]


@pytest.mark.parametrize("faulty", ["describe", "reset", "step"])
@pytest.mark.parametrize(("row", "name", "fault", "message"), [(i, *row) for i, row in enumerate(PROCESS_ROWS)],
                         ids=[row[0] for row in PROCESS_ROWS])  # fmt: skip
def test_a_server_that_fails_or_talks_nonsense_is_one_error(workplace, row, name, fault, message, faulty):
    worker = (row + len(faulty)) % 2  # each row meets both workers
    timeout = 3.0 if "3 s" in message else 20.0  # the server has to start within it, on a loaded machine too
    session = fake_session(workplace, faulty, fault, env=worker, timeout=timeout)
    assert_fault(session, faulty, BridgeError, message, worker=None if timeout == 3.0 else worker)


# What can be wrong in the handshake alone.
DESCRIBE_ROWS = [
    ("reject_wrong_protocol", "reply['protocol'] = 2", BridgeError, "protocol must be 1, not 2"),
    ("reject_protocol_true", "reply['protocol'] = True", BridgeError, "protocol must be 1, not True"),
    ("reject_wrong_num_envs", "reply['num_envs'] = 3", BridgeError, "num_envs must be 2, not 3"),
    ("reject_other_environment", "reply['env_id'] = 'Other-v0'", BridgeError, "env_id must be 'Fake-v0', not 'Other"),
    ("reject_missing_field", "del reply['obs_low']", BridgeError, r"lacks \['obs_low'\]"),
    ("reject_versions", "reply['versions'] = {'numpy': 2}", BridgeError, "versions must map names to strings"),
    ("reject_no_actions", "reply['n_actions'] = 0", ContractViolation, "declared_space.*n_actions"),
    ("reject_true_actions", "reply['n_actions'] = True", ContractViolation, "declared_space.*n_actions"),
    ("reject_negative_shape", "reply['obs_shape'] = [-2]", ContractViolation, "declared_space.*obs_shape"),
    ("reject_huge_shape", "reply['obs_shape'] = [10**9]", ContractViolation, "declared_space.*larger than 4 MiB"),
    ("reject_strange_dtype", "reply['obs_dtype'] = ',5q'", ContractViolation, "declared_space.*obs_dtype"),
    ("reject_crossed_bounds", "reply['obs_low'] = [2, 0]", ContractViolation, "declared_space.*low <= high"),
    ("reject_crossed_infinite_bounds",
     "reply.update(obs_low=[7, 7], obs_high=[-7, -7]); say(json.dumps(reply).replace('7', '1e999') + '\\n'); continue",
     ContractViolation, "declared_space.*low <= high"),
    ("reject_string_bound", "reply['obs_low'] = ['-1', None]", ContractViolation, "declared_space.*must be a number"),
    ("reject_short_bounds", "reply['obs_low'] = [0]", ContractViolation, "declared_space.*nested lists"),
    ("reject_deep_bounds", "say(json.dumps(reply).replace('[-1, null]', '[' * 400 + ']' * 400) + '\\n'); continue",
     ContractViolation, "declared_space"),
    ("reject_infinite_bound", "say(json.dumps(reply).replace('-1', '1e999') + '\\n'); continue",
     ContractViolation, "declared_space.*open side"),
    ("reject_endless_bound", "reply['obs_low'] = [10**400, None]", ContractViolation, "declared_space"),
    ("reject_other_space", "reply['n_actions'] = 3", ContractViolation, r"Discrete\(2\), got .*Discrete\(3\)"),
    ("reject_other_dtype", "reply['obs_dtype'] = 'int32'; reply['obs_low'] = reply['obs_high'] = [None, None]",
     ContractViolation, r"expected Box\(\(2,\), float32.*got Box\(\(2,\), int32"),
    ("reject_other_shape", "reply.update(obs_shape=[2, 1], obs_low=[[-1], [None]], obs_high=[[1], [None]])",
     ContractViolation, r"expected Box\(\(2,\), float32.*got Box\(\(2, 1\), float32"),
    ("reject_narrower_space", "reply['obs_high'] = [0.5, 0.5]", ContractViolation,
     r"expected observation\[0\] in \[-1\.0, 1\.0\] or a wider range, got \[-1\.0, 0\.5\]"),
    ("reject_narrower_space_below", "reply['obs_low'] = [-0.5, None]", ContractViolation,
     r"expected observation\[0\] in \[-1\.0, 1\.0\] or a wider range, got \[-0\.5, 1\.0\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault", "error", "message"), DESCRIBE_ROWS, ids=[row[0] for row in DESCRIBE_ROWS])
def test_a_wrong_describe_reply_is_refused(workplace, name, fault, error, message):
    assert_fault(fake_session(workplace, "describe", fault), "describe", error, message, worker=1)


# What can be wrong with one number of an observation, wherever an observation comes: the number, the rule.
NUMBER_ROWS = [
    ("reject_string", "'0.5'", "obs_type"),
    ("reject_null", "None", "obs_type"),
    ("reject_boolean", "True", "obs_type"),
    ("reject_list", "[0.5]", "obs_type"),
    ("reject_object", "{}", "obs_type"),
    ("reject_above_range", "1.0000002", "obs_range"),
    ("reject_below_range", "-2", "obs_range"),
    ("reject_overflow_of_float32", "1e39", "obs_dtype"),
    ("reject_overflow_of_float64", "Literal('1e999')", "obs_dtype"),
    ("reject_endless_integer", "10**400", "obs_dtype"),
]
PLACES = {
    "reset": "row = reply['obs'][ENV]",
    "next_obs": "row = reply['next_obs'][ENV]",
    "reset_obs": "row = [0.0, 0.25]; reply['reset_obs']['ENV'] = row; reply['truncated'][ENV] = True",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("row", "name", "number", "rule"), [(i, *row) for i, row in enumerate(NUMBER_ROWS)],
                         ids=[row[0] for row in NUMBER_ROWS])  # fmt: skip
def test_a_bad_number_is_found_wherever_an_observation_comes_from(workplace, row, name, number, rule, place):
    env = (row + len(place)) % 3  # each row and each place meets all three
    fault = f"{PLACES[place]}; row[{row % 2}] = {number}"
    if "Literal" in number:  # what json.dumps would not write
        fault = (
            fault.replace("Literal(", "(") + "; say(json.dumps(reply).replace('\"1e999\"', '1e999') + '\\n'); continue"
        )
    faulty = "reset" if place == "reset" else "step"
    session = fake_session(workplace, faulty, fault, env)
    assert_fault(session, faulty, ContractViolation, f"contract rule {rule} broken", env, worker=min(env, 1))


@pytest.mark.parametrize("number", ["0.0", "-1", "256", "2**64", "True", "None", "'1'", "[1]"])
def test_a_number_of_an_integer_observation(workplace, number):
    command = fake_server(workplace, "step", f"reply['next_obs'][1][0] = {number}")
    code = Path(command[1]).read_text().replace("float32", "uint8")
    code = code.replace("[-1, None]", "[0, 0]").replace("[1, None]", "[255, 255]")
    code = code.replace("0.25", "1").replace("0.75", "255").replace("0.5", "2").replace("[0.0,", "[0,")
    Path(command[1]).write_text(code)
    with GymnasiumSession("Fake-v0", Contract((2,), 2, "uint8"), 2, server_command=command, timeout=20) as session:
        assert session.reset(0).tolist() == [[0, 1], [0, 1]]
        with pytest.raises(ContractViolation, match=r"step 1, environment 1: contract rule obs_(dtype|type) broken"):
            session.step([0, 1])


# What else can be wrong with a reply to "step" or "reset": the fault, the rule.
BATCH_ROWS = [
    ("reject_short_observation", "step", "reply['next_obs'][ENV] = [0.5]", "obs_shape"),
    ("reject_long_observation", "step", "reply['next_obs'][ENV] += [0.5]", "obs_shape"),
    ("reject_number_for_observation", "step", "reply['next_obs'][ENV] = 0.5", "obs_type"),
    ("reject_short_first_observation", "reset", "reply['obs'][ENV] = [0.5]", "obs_shape"),
    ("reject_string_for_reward", "step", "reply['reward'][ENV] = '1'", "reward_type"),
    ("reject_null_for_reward", "step", "reply['reward'][ENV] = None", "reward_type"),
    ("reject_boolean_for_reward", "step", "reply['reward'][ENV] = True", "reward_type"),
    ("reject_list_for_reward", "step", "reply['reward'][ENV] = [1]", "reward_type"),
    ("reject_reward_above_range", "step", "reply['reward'][ENV] = 1.0000000000000002", "reward_range"),
    ("reject_reward_below_range", "step", "reply['reward'][ENV] = -5e-324", "reward_range"),
    ("reject_endless_reward", "step", "reply['reward'][ENV] = 10**400", "reward_finite"),
    ("reject_number_for_terminated", "step", "reply['terminated'][ENV] = 0", "done_type"),
    ("reject_string_for_truncated", "step", "reply['truncated'][ENV] = 'false'", "done_type"),
    ("reject_null_for_truncated", "step", "reply['truncated'][ENV] = None", "done_type"),
    ("reject_both_flags", "step", "reply['terminated'][ENV] = reply['truncated'][ENV] = True; "
     "reply['reset_obs']['ENV'] = [0, 0]", "done_exclusive"),
    ("reject_no_reset_obs", "step", "reply['truncated'][ENV] = True",
     "reset_obs broken: expected one for this environment, got none"),
    ("reject_reset_obs_unasked", "step", "reply['reset_obs']['ENV'] = [0, 0]",
     r"reset_obs broken: expected none \(it did not finish\) for this environment, got one"),
    ("reject_base64_with_nan", "step", "b = struct.pack('<ff', 0.5, float('nan')); a = struct.pack('<ff', 0, 0); "
     "reply['next_obs'] = base64.b64encode(b''.join(b if i == ENV else a for i in range(n))).decode()", "obs_finite"),
    ("reject_short_base64_of_a_first_observation", "step",
     "reply['truncated'][ENV] = True; reply['reset_obs']['ENV'] = 'AAAA'", "obs_shape"),
    ("reject_no_base64_of_a_first_observation", "step",
     "reply['truncated'][ENV] = True; reply['reset_obs']['ENV'] = '?' * 12", "obs_type"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "faulty", "fault", "rule"), [(i, *row) for i, row in enumerate(BATCH_ROWS)],
                         ids=[row[0] for row in BATCH_ROWS])  # fmt: skip
def test_the_error_names_the_environment_with_the_bad_value(workplace, row, name, faulty, fault, rule):
    env = row % 3
    session = fake_session(workplace, faulty, fault, env)
    assert_fault(session, faulty, ContractViolation, f"contract rule {rule}", env, worker=min(env, 1))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ({"env": -1}, "malformed error reply"),
        ({"env": 2}, "malformed error reply"),
        ({"env": True}, "malformed error reply"),
        ({"rule": "no_such", "expected": "a", "got": "b"}, "boom"),
    ],
    ids=str,
)
def test_an_error_reply_that_names_what_there_is_not(workplace, error, message):
    fault = f"reply = {{'id': reply['id'], 'ok': False, 'error': 'boom', **{error!r}}}"
    with pytest.raises(BridgeError, match=message + r"[^[]*\n\[server pid \d+, was running"):
        fake_session(workplace, "reset", fault).reset(0)


@pytest.mark.parametrize("faulty", ["describe", "reset", "step"])
def test_all_workers_together_have_the_time_of_one_reply(workplace, faulty):
    """The first answers late, the second never."""
    command = fake_server(workplace, faulty, "time.sleep(2 if n == 1 else 60)")
    session = GymnasiumSession("Fake-v0", FAKE, 3, 2, timeout=3, server_command=command, wait=False)
    assert_fault(session, faulty, BridgeError, "within 3 s")


def test_a_timeout_of_years_and_the_default_of_the_readme():
    with GymnasiumSession("CartPole-v1", CARTPOLE, timeout=1e9) as session:
        session.reset(0)
    timeout = inspect.signature(GymnasiumSession).parameters["timeout"].default
    assert f"`timeout` ({timeout:g} s unless told" in re.sub(r"\s+", " ", (HERE / "README.md").read_text())


# What can be wrong with a batch as a whole.
SHAPE_ROWS = [
    ("reject_short_batch_of_observations", "step", "reply['next_obs'].pop()", "batch_size"),
    ("reject_long_batch_of_observations", "reset", "reply['obs'] += [[0, 0]]", "batch_size"),
    ("reject_short_batch_of_rewards", "step", "reply['reward'].pop()", "batch_size"),
    ("reject_long_batch_of_flags", "step", "reply['terminated'] += [False]", "batch_size"),
    ("reject_null_for_flags", "step", "reply['truncated'] = None", "batch_size"),
    ("reject_list_for_reset_obs", "step", "reply['reset_obs'] = []", "reset_obs"),
    ("reject_reset_obs_of_nobody", "step", "reply['reset_obs']['2'] = [0, 0]", "reset_obs"),
    ("reject_reset_obs_of_a_strange_name", "step", "reply['reset_obs']['01'] = [0, 0]", "reset_obs"),
    ("reject_base64_too_short", "reset", "reply['obs'] = 'AAAA'", "obs_shape"),
    ("reject_base64_too_long", "step", "reply['next_obs'] = 'AAAA' * 8", "obs_shape"),
    ("reject_base64_alphabet", "reset", "reply['obs'] = '?' * 24", "obs_type"),
    ("reject_base64_with_a_line_break", "reset", "reply['obs'] = 'A' * 12 + '\\n' + 'A' * 10 + '=='", "obs_type"),
    ("reject_base64_for_one_row", "step", "reply['next_obs'][0] = 'AAAAAAAAAAA='", "obs_type"),
]


@pytest.mark.parametrize(("name", "faulty", "fault", "rule"), SHAPE_ROWS, ids=[row[0] for row in SHAPE_ROWS])
def test_a_malformed_batch_is_refused(workplace, name, faulty, fault, rule):
    session = fake_session(workplace, faulty, fault)
    assert_fault(session, faulty, ContractViolation, f"contract rule {rule} broken", worker=1)


# What can happen when it is over: close() never raises and never takes more than three seconds.
CLOSE_ROWS = [
    ("survive_no_reply", "continue"),
    ("survive_exit", "sys.exit(3)"),
    ("survive_crash", "os.kill(os.getpid(), signal.SIGSEGV)"),
    ("survive_noise", "say(b'\\xff' * 9999)"),
    ("survive_hang_with_child", "subprocess.Popen(['sleep', '60']); time.sleep(60)"),
    ("survive_hang_that_ignores_sigterm", "signal.signal(15, signal.SIG_IGN); time.sleep(60)"),
    ("survive_stopped", "os.kill(os.getpid(), signal.SIGSTOP)"),
    ("survive_line_without_end", "while True: say(' ' * 65536)"),
]


@pytest.mark.parametrize("env", [0, 2], ids=["worker 0", "worker 1"])
@pytest.mark.parametrize(("name", "fault"), CLOSE_ROWS, ids=[row[0] for row in CLOSE_ROWS])
def test_close_never_raises_and_ends_everything(workplace, name, fault, env):
    session = fake_session(workplace, "close", fault, env)
    session.reset(0)
    session.step([0, 1, 0])
    moment = time.monotonic()
    session.close()
    session.close()
    assert time.monotonic() - moment < 3
    for server in session._servers:
        assert_gone(server.process.pid)


def test_a_timeout_is_also_the_twins_and_holds_when_spaces_are_asked_for(workplace):
    (workplace / "hang.py").write_text("import time; time.sleep(30)")
    command = [sys.executable, str(workplace / "hang.py")]
    with GymnasiumSession("Fake-v0", FAKE, 3, 2, timeout=1, server_command=command, wait=False) as session:
        for ask in lambda: session.twin(1).reset(0), lambda: Contract.from_env("Fake-v0", None, command, 1):
            with pytest.raises(BridgeError, match="no whole reply within 1 s"):
                ask()


def test_a_server_that_hangs_is_told_before_it_is_killed(workplace, monkeypatch):
    """A docker run, say, which then stops its container."""
    monkeypatch.setattr(gym_bridge, "TERMINATE_GRACE", 10)  # it needs a moment, on a loaded machine more
    fault = "signal.signal(15, lambda *_: (open('told', 'w').close(), os._exit(0))); time.sleep(60)"
    with fake_session(workplace, "close", fault) as session:
        session.reset(0)
    assert Path("told").exists()


def test_close_while_a_server_hangs_before_it_was_ever_asked(workplace):
    (workplace / "hang.py").write_text("import time; time.sleep(60)")
    command = [sys.executable, str(workplace / "hang.py")]
    session = GymnasiumSession("Fake-v0", FAKE, 3, 3, server_command=command, wait=False)
    moment = time.monotonic()
    session.close()
    assert time.monotonic() - moment < 3
    for server in session._servers:
        assert_gone(server.process.pid)


def test_a_server_that_stops_reading(workplace):
    """Its pipe is full before the request is written: that wait is bounded too."""
    command = fake_server(workplace, "reset", "say(json.dumps(reply) + '\\n'); time.sleep(60)")
    session = GymnasiumSession("Fake-v0", FAKE, 50_000, timeout=3, server_command=command, wait=False)
    session._timeout = 20  # until it has started
    session.reset(0)
    session._timeout = 3
    moment = time.monotonic()
    with pytest.raises(BridgeError, match="has not read its request within 3 s"):
        session.step([0] * 50_000)
    assert time.monotonic() - moment < 3 + 0.5 + 1
    assert_gone(session._servers[0].process.pid)


def test_a_fake_server_without_fault_is_understood(workplace):
    """What the rows above deviate from: lists instead of base64, and here an environment that finishes."""
    fault = "reply['truncated'][ENV] = True; reply['reset_obs']['ENV'] = [-1, 1]"
    with fake_session(workplace, "step", fault) as session:
        assert session.reset(0).tolist() == [[0.0, 0.25]] * 3
        transition = session.step([0, 1, 0])
        assert transition.next_observation.tolist() == [[0.5, 0.75]] * 3
        assert (transition.reward.tolist(), transition.terminated.tolist()) == ([1.0] * 3, [False] * 3)
        assert transition.truncated.tolist() == [False, False, True]
        assert session.observation.tolist() == [[0.5, 0.75], [0.5, 0.75], [-1.0, 1.0]]


@pytest.mark.parametrize("command", ["no_such_command", "/", "odd_envs.py"])
def test_a_command_that_cannot_be_run(command):
    path = Path(command)
    with pytest.raises(BridgeError, match=rf"start: cannot start .*{command}"):
        GymnasiumSession("CartPole-v1", CARTPOLE, server_command=[path.absolute() if path.suffix else command])


def test_a_command_is_a_list_of_words():
    with pytest.raises(ValueError, match="server_command is empty"):
        GymnasiumSession("CartPole-v1", CARTPOLE, server_command=[])
    with pytest.raises(ValueError, match="server_command must be a list"):
        GymnasiumSession("CartPole-v1", CARTPOLE, server_command="python gym_bridge.py")


def test_a_server_that_cannot_be_listened_to_is_ended(monkeypatch):
    """Where a process may have no more threads."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(popen(*args, **more)) or started[-1])
    monkeypatch.setattr(threading.Thread, "start", lambda thread: exec("raise RuntimeError('no more threads')"))
    with pytest.raises(BridgeError, match="start: RuntimeError: no more threads") as caught:
        GymnasiumSession("odd_envs:Odd-v0", ODD, server_command=["sh", "-c", "sleep 60"])
    assert_gone(started[0].pid)  # though the error, which knows of it, is kept
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_contract_that_is_none():
    for contract in None, {"obs_shape": (2,)}:
        with pytest.raises(TypeError, match="contract must be a Contract, not"):
            GymnasiumSession("odd_envs:Odd-v0", contract)


def test_on_windows_the_message_names_wsl(monkeypatch):
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(BridgeError, match="WSL"):
        GymnasiumSession("CartPole-v1", CARTPOLE)


def test_on_windows_a_server_started_by_hand_names_wsl():
    pretend = "import os, shutil, sys, gym_bridge; os.name = 'nt'; sys.argv = ['', '--env-id=A-v0']; gym_bridge._main()"
    done = run([sys.executable, "-c", pretend], cwd=HERE)
    assert (done.returncode, done.stdout) == (2, "")
    assert "WSL" in done.stderr.splitlines()[-1]


def test_an_id_may_come_from_an_array():
    assert Contract.from_env(np.array(["CartPole-v1"])[0]).obs_shape == (4,)


def test_all_servers_are_asked_before_one_is_waited_for():
    """Else they would step one after the other."""
    step = {"next_obs": [[0, 0]], "reward": [0], "terminated": [False], "truncated": [False], "reset_obs": {}}
    replies = {"describe": {**DESCRIBED, "num_envs": 1}, "reset": {"id": 2, "ok": True, "obs": [[0, 0]]}}
    replies |= {"step": {"id": 3, "ok": True, **step}}
    for name, reply in replies.items():
        Path(name).write_text(json.dumps(reply) + "\n")
    wait = "touch asked.$1.$$; until [ $(ls asked.$1.* | wc -l) = 2 ]; do sleep 0.02; done"
    script = "set -- describe reset step; while read -r request; do " + wait + '; cat "$1"; shift; done'
    command = ["sh", "-c", script, "sh"]
    with GymnasiumSession("Fake-v0", Contract((2,), 2), 2, 2, timeout=20, server_command=command) as session:
        session.reset(0)
        session.step([0, 0])


def test_a_trainer_without_stderr(workplace):
    """With descriptor 2 closed, a pipe to a server would take its number, and the server's prints would enter it."""
    (workplace / "trainer.py").write_text(f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from gym_bridge import *
with GymnasiumSession("odd_envs:Odd-v0", Contract((2,), 2), 2, 2, dict(case="print('X' * 9999)")) as session:
    session.reset(0)
    for _ in range(9): session.step([0, 0])
print("through")
""")
    done = run(["sh", "-c", f"exec {sys.executable} trainer.py 2>&-"])
    assert done.stdout == "through\n"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("raise ValueError('x' * 3_000_000)", "ValueError: xxx"),  # more than a reply may hold
        # An exception that is False.
        ("raise type('Empty', (Exception,), {'__len__': lambda self: 0, '__module__': ''})", "Empty"),
    ],
)
def test_an_environment_that_raises_shows_its_own_traceback(fault, message):
    session = GymnasiumSession("odd_envs:Odd-v0", ODD, 3, 2, {"case": fault})
    error = fails_at_step_2(session, BridgeError, match=rf"(?s)step 2, environment 1: .*{message}.*odd_envs\.py")
    for server in session._servers:
        assert_gone(server.process.pid)
    assert "server pid" in str(error)


@pytest.mark.parametrize(
    "fault",
    ["import no_such_dependency", "Box(-1, 1, shapes=(2,))", "raise RuntimeError('twice') from KeyError(1)", "exit(0)"],
)
def test_a_fault_in_an_environments_constructor_shows_its_traceback(fault):
    """What is no fault of the id or of make_kwargs is not said to be theirs."""
    with pytest.raises(BridgeError, match=r"(?s)start: .*odd_envs\.py.*exec\(fault\)"):
        GymnasiumSession("odd_envs:Unfinished-v0", ODD, make_kwargs={"fault": fault})


def test_what_environments_are_made_with_is_not_shared():
    with GymnasiumSession("odd_envs:Greedy-v0", ODD, 2, make_kwargs={"config": {"case": ""}}) as session:
        session.reset(0)


def test_too_many_actions_are_refused_by_name():
    with pytest.raises(BridgeError, match=r"has the spaces Box.* and Discrete\(100000\): n_actions must be an integer"):
        Contract.from_env("odd_envs:Unfinished-v0", {"fault": "self.action_space = Discrete(100_000)"})


def test_what_an_environment_prints_and_reads_is_no_fault(capfd):
    case = (
        "print('from print'); os.system('echo from echo'); os.write(1, b'from write\\n'); obs[0] = len(os.read(0, 9)); "
        "import ctypes; libc = ctypes.CDLL(None); libc.printf(b'from printf\\n'); libc.fflush(None); del ctypes, libc"
    )
    with GymnasiumSession("odd_envs:Odd-v0", ODD, 3, make_kwargs={"case": case}) as session:
        session.reset(0)
        session.step([0, 0, 0])
        assert session.step([0, 0, 0]).next_observation[1, 0] == 0  # end of file
    captured = capfd.readouterr()
    assert captured.out == ""
    assert [f"from {what}" in captured.err for what in ("print", "echo", "write", "printf")] == [True] * 4


# Ways to start a server that is not this process's plain child: what is between keeps or drops descriptors.
DROPS = [sys.executable, "-c", "import os, sys; os.closerange(3, 999); os.execvp(sys.argv[1], sys.argv[1:])"]
WRAPPERS = [
    DROPS,  # as at the far end of an ssh
    ["sh", "-c", '"$0" "$@"; true'],  # as a launcher that stays
    ["sh", "-c", 'exec sh -c "exec $*"', "ssh"],  # as ssh does it: one text, for another shell to split into words
]


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=["that drops descriptors", "that stays", "that splits words"])
def test_a_server_behind_a_wrapper(wrapper):
    command = [*wrapper, sys.executable, str(HERE / "gym_bridge.py")]
    more = {"server_command": command, "make_kwargs": {"max_episode_steps": 1, "render_mode": None}, "timeout": 20}
    with GymnasiumSession("CartPole-v1", CARTPOLE, 2, **more) as session:
        session.reset(0)
        transition = session.step([0, 1])
        assert transition.reward.tolist() == [1.0, 1.0]
        assert transition.truncated.all()
        group = session._servers[0].process.pid
    assert_gone(group)


@pytest.mark.parametrize("kind", ["native", "1 worker", "2 workers"])
@pytest.mark.parametrize("fault", ["reward = None", "raise ValueError"])
def test_environments_are_closed_after_an_error_too(fault, kind, monkeypatch):
    """They may have a log or a video to finish, of the very episode that went wrong."""
    monkeypatch.setattr(gym_bridge, "ERROR_GRACE", 10)  # they need a moment, on a loaded machine more
    case = f"self.close = lambda: open('closed', 'w').close()\n{fault}"
    session = odd_session(kind, case, "step")
    fails_at_step_2(session, (ContractViolation, BridgeError))
    assert Path("closed").exists()


@pytest.mark.parametrize("kind", ["1 worker", "2 workers"])
def test_environments_have_time_to_finish_their_files(kind, monkeypatch):
    """More than after an error, and at least a second; here ten, for a loaded machine."""
    assert gym_bridge.CLOSE_GRACE >= 1
    monkeypatch.setattr(gym_bridge, "CLOSE_GRACE", 10)
    case = "self.close = lambda: (__import__('time').sleep(0.4), open('closed', 'w').close())"
    with odd_session(kind, case, "step") as session:
        session.reset(0)
        session.step([0, 0, 0])
        session.step([0, 0, 0])
    assert Path("closed").exists()


@pytest.mark.parametrize("fault", ["pass", "os._exit(7)"], ids=["closed", "crashed"])
def test_what_a_server_has_started_dies_with_it(fault):
    session = odd_session("1 worker", f"__import__('subprocess').Popen(['sleep', '61']); {fault}", "step")
    with contextlib.suppress(BridgeError), session:
        session.reset(0)
        session.step([0, 0, 0])
        session.step([0, 0, 0])
    assert_gone(session._servers[0].process.pid)


def converse(requests, **make_kwargs):
    """The replies of a server of two Odds."""
    command = [sys.executable, str(HERE / "gym_bridge.py"), "--env-id", "odd_envs:Odd-v0", "--num-envs", "2"]
    command += ["--make-kwargs", quote(json.dumps(make_kwargs))]
    text = "".join(json.dumps({"id": number, **request}) + "\n" for number, request in enumerate(requests))
    done = run(command, input=text)
    return [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines()]  # strict JSON


@pytest.mark.parametrize("encoding", [{}, {"encoding": "base64"}], ids=["lists", "base64"])
def test_a_first_observation_is_written_as_all_others_are(encoding):
    reset, step = {"cmd": "reset", "seed": 0, **encoding}, {"cmd": "step", "actions": [0, 0], **encoding}
    *_, reply = converse([reset, step, step], case="obs[:] = 0.5; terminated = True")
    shown = packed if encoding else lambda rows: rows
    assert (reply["next_obs"], reply["reset_obs"]) == (shown([[0, 0], [0.5, 0.5]]), {"1": shown([0, 0])})


def test_a_server_refuses_a_step_after_one_that_failed_half_way():
    reset, step = {"cmd": "reset", "seed": 0}, {"cmd": "step", "actions": [0, 0]}
    replies = converse([reset, step, step, step, reset, step, {"cmd": "close"}], case="self.t += 9; raise ValueError")
    assert [reply["ok"] for reply in replies] == [True, True, False, False, True, True, True]
    assert replies[2]["env"] == 1
    assert "half-way: reset first" in replies[3]["error"]


def test_what_a_server_refuses():
    reset, step = {"cmd": "reset", "seed": 0}, {"cmd": "step", "actions": [0, 0]}
    replies = converse([{**reset, "encoding": "base46"}, reset, step, step], case="obs[0] = np.nan")
    assert [reply["ok"] for reply in replies] == [False, True, True, False]
    assert replies[0]["error"] == 'encoding is "base64" or "json", not \'base46\''
    replies = converse([{**reset, "seed": 5}, step, reset, step], case="raise ValueError", at="reset")
    assert [reply["ok"] for reply in replies] == [True, True, False, False]
    assert "half-way: reset first" in replies[3]["error"]


def test_a_file_beside_an_environment_hides_no_module_of_python(workplace):
    (workplace / "fractions.py").write_text("raise ImportError('mine')")
    (workplace / "late.py").write_text(
        "import fractions, gymnasium, odd_envs; gymnasium.register('Late-v0', odd_envs.Odd)"
    )
    with GymnasiumSession("late:Late-v0", ODD) as session:
        session.reset(0)
        assert session.versions.keys() == {"python", "numpy", "gymnasium"}


@pytest.mark.parametrize(
    ("kind", "what", "error"),
    [
        ("native", "SystemExit", "SystemExit(0)"),
        ("1 worker", "SystemExit", "SystemExit(0)"),
        ("native", "Panic", "type('Panic', (BaseException,), {})()"),
        ("1 worker", "Panic", "type('Panic', (BaseException,), {})()"),
        ("1 worker", "KeyboardInterrupt", "KeyboardInterrupt"),
        ("1 worker", "ValueError", "ValueError(chr(0x1F600) * 120_000)"),  # longer than a reply may be
    ],
)
def test_whatever_an_environment_raises_is_its_failure(kind, what, error):
    """sys.exit() does not end the trainer; nor does what no ``Exception`` is."""
    match = f"step 2, environment 1: the environment raised .*{what}"
    fails_at_step_2(odd_session(kind, f"raise {error}", "step"), BridgeError, match)


def test_a_reward_that_leaves_the_program_when_it_is_looked_at():
    case = "reward = type('R', (np.float64,), {'__float__': lambda self: exit(0)})(1.0)"
    session = odd_session("native", case, "step")
    fails_at_step_2(session, BridgeError, match="step 2: SystemExit: 0")


def test_of_much_that_a_server_prints_the_last_lines_are_kept():
    case = "[os.write(2, b'line %d\\n' % k) for k in range(9999)]; os._exit(7)"
    session = odd_session("1 worker", case, "step")
    error = fails_at_step_2(session, BridgeError, match="exit code 7")
    shown = [line.strip(" ]") for line in str(error).splitlines() if "line " in line]
    assert shown == [f"line {k}" for k in range(9979, 9999)]
    assert len(session._servers[0].stderr_tail) < 10_000


def test_what_was_printed_last_is_shown():
    session = odd_session("1 worker", "print('last words'); os._exit(7)", "step")
    fails_at_step_2(session, BridgeError, match=r"(?s)exit code 7.*last words")


@pytest.mark.parametrize(("at", "more"), [("reset", ""), ("step", "; terminated = True")])
def test_observations_of_many_megabytes(at, more):
    kwargs = {"shape": [500, 500, 3], "case": f"obs.flat = np.arange(750_000) % 251{more}", "at": at}
    with GymnasiumSession("odd_envs:Shaped-v0", Contract((500, 500, 3), 2, "uint8"), 2, 1, kwargs) as session:
        shown = [session.reset(0), *[session.step([0, 0]).next_observation for _ in range(2)]]
        assert not (more and session.observation.any())  # the next episode's first
    picture = (np.arange(750_000) % 251).reshape(500, 500, 3)
    assert np.array_equal(shown[0 if at == "reset" else 2][1], picture)


@pytest.mark.parametrize("meddle", ["step([0, 0])", "reset(0)", "observation", "close()"])
@pytest.mark.parametrize("quietly", [False, True])
def test_an_environment_that_uses_the_session_which_steps_it(meddle, quietly):
    """Another step within a step would be taken for this one."""

    class Meddling:
        closed = 0

        def reset(self, seed=None):
            return np.zeros(2), {}

        def step(self, action):
            with contextlib.suppress(BridgeError if quietly else ()):
                eval(f"session.{meddle}", {"session": session})
            return np.ones(2), 1.0, False, False, {}

        def close(self):
            self.closed += 1

    meddling = Meddling()
    session = NativeSession([native("Counting", 1, Contract((2,), 3))._envs[0], meddling], Contract((2,), 3))
    session.reset(0)
    if quietly and meddle != "close()":  # it was refused, and that is all
        transition = session.step([0, 0])
        assert (transition.observation[1].tolist(), transition.next_observation[1].tolist()) == ([0, 0], [1, 1])
        assert (session.transitions_checked, meddling.closed) == (2, 0)
        return
    reason = "closed meanwhile" if meddle == "close()" else "this session is dead: its step has not ended"
    with pytest.raises(BridgeError, match=reason):
        session.step([0, 0])
    with pytest.raises(BridgeError, match="dead"):
        session.step([0, 0])
    session.close()
    assert meddling.closed == 1


def test_a_signal_handler_that_closes_the_session_while_it_steps():
    session = odd_session("1 worker", "os.kill(os.getppid(), 14); __import__('time').sleep(20)", "step")
    before = signal.signal(signal.SIGALRM, lambda *_: session.close())
    try:
        fails_at_step_2(session, BridgeError, "step 2: the session was closed meanwhile")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert_gone(session._servers[0].process.pid)


def test_a_session_that_another_thread_closes_says_so(workplace):
    """And not that its server has sent two replies to one request, the second being that to the close."""
    with ThreadPoolExecutor(1) as pool:
        for _ in range(5):
            session = odd_session("1 worker", "__import__('time').sleep(0.5)", "step")
            session.reset(0)
            session.step([0, 0, 0])
            stepping = pool.submit(session.step, [0, 0, 0])
            time.sleep(0.05)
            session.close()
            with pytest.raises(BridgeError, match=r"^step 2: the session was closed meanwhile"):
                stepping.result(timeout=10)


def test_a_signals_exception_within_contextlib_is_not_followed_by_another():
    """Where it comes between a generator's frames, the generator is closed when it is forgotten, and not told why."""
    session = cartpole_session(1)
    guarded = session._guarded("step")
    guarded.__enter__()
    guarded.gen.close()  # raises what would otherwise be printed, and ignored
    with pytest.raises(BridgeError, match="this session is dead"):
        session.reset(1)


def test_a_session_that_a_signal_handler_replaces_leaves_the_new_one_alone(monkeypatch):
    """The new one's pipes have the old one's numbers, and the old one has yet to send its request."""
    sessions = []

    def replace():
        for old in sessions[-1:]:
            old.close()
        sessions.append(GymnasiumSession("odd_envs:Counting-v0", Contract((2,), 3)))
        sessions[-1].reset(0)

    def current_core():  # is asked right before
        if len(sessions) == 1:
            signal.raise_signal(signal.SIGALRM)
        return -1

    replace()
    before = signal.signal(signal.SIGALRM, lambda *_: replace())
    try:
        monkeypatch.setattr(gym_bridge, "_current_core", current_core)
        with pytest.raises(BridgeError, match="the session was closed meanwhile"):
            sessions[0].step([2])
    finally:
        signal.signal(signal.SIGALRM, before)
    with sessions[1]:
        assert sessions[1].step([1]).next_observation.tolist() == [[1, 1]]  # its first step


@pytest.mark.parametrize("method", ["step", "close"])
def test_a_sigterm_that_ends_the_trainer_is_not_a_native_environments_failure(method):
    class Struck:
        def close(self):
            signal.raise_signal(signal.SIGTERM)

        def step(self, action):
            self.close()

        def reset(self, seed=None):
            return np.zeros(2, np.float32), {}

    session = NativeSession([Struck()], Contract((2,), 2))
    session.reset(0)

    def leave(number, _):
        signal.signal(number, signal.SIG_IGN)  # once is enough
        sys.exit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit, match="143"):
            session.step([0]) if method == "step" else session.close()
    finally:
        signal.signal(signal.SIGTERM, before)


def enough(number, frame):
    raise TimeoutError("enough")


def enough_once(number, *_):
    """So that the second one kills."""
    signal.signal(number, signal.SIG_DFL)
    enough(number, None)


@pytest.mark.parametrize("handler", [enough, enough_once, functools.partial(enough), lambda *both: enough(*both)])
@pytest.mark.parametrize("kind", ["native", "1 worker"])
def test_what_a_signal_handler_raises_arrives_as_it_is(kind, handler):
    """Someone else's deadline, say: no failure of the environment."""
    before = signal.signal(signal.SIGALRM, handler)
    try:
        session = odd_session(kind, f"os.kill({os.getpid()}, 14); __import__('time').sleep(20)", "step")
        fails_at_step_2(session, TimeoutError, "enough")
        with pytest.raises(BridgeError, match="this session is dead"):
            session.step([0, 0, 0])
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_an_environment_forks_does_not_answer_and_does_not_hide_a_crash():
    session = odd_session("1 worker", "os.fork() or __import__('time').sleep(60); os.kill(os.getpid(), 9)", "step")
    fails_at_step_2(session, BridgeError, match=r"(?s)step 2: the server hung up.*SIGKILL")
    with odd_session("1 worker", "os.fork()", "step") as session:  # and the child goes on as if it were the server
        session.reset(0)
        for _ in range(20):
            session.step([0, 0, 0])


def test_a_trainer_that_was_stopped_for_longer_than_the_timeout_gets_a_reply_longer_than_the_pipe(workplace):
    program = (
        "from gym_bridge import *\n"
        'case = \'open("asked", "w").close(); __import__("time").sleep(1)\'\n'
        "kwargs = {'shape': [400, 400], 'case': case}\n"
        "session = GymnasiumSession('odd_envs:Shaped-v0', Contract((400, 400), 2, 'uint8'), 2, 1, kwargs)\n"
        "session.reset(0); session.step([0, 0]); session._timeout = 2\n"
        "print(session.step([0, 0]).observation.shape)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{workplace}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as process:
        until(Path("asked").exists)
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60) == ("(2, 400, 400)\n", "")


def test_a_crashed_server_does_not_kill_a_trainer_that_heeds_sigpipe():
    program = (
        "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL); from gym_bridge import *\n"
        "session = GymnasiumSession('odd_envs:Odd-v0', Contract((2,), 2), make_kwargs={'case': 'os._exit(7)'})\n"
        "session.reset(1)\n"
        "while True: session.step([0])"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = run([sys.executable, "-c", program], env=environment)
    assert (done.returncode, "exit code 7" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_environment_that_does_not_want_to_be_closed(error):
    """close() raises nothing, but Ctrl-C is heard."""

    class Clinging:
        def close(self):
            raise error

    session = NativeSession([Clinging()], Contract((2,), 2))
    with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else contextlib.nullcontext():
        session.close()


def test_one_that_cannot_be_closed_does_not_keep_the_others_open():
    closed = []

    class Clinging:
        def close(self):
            raise OSError("no")

    class Good:
        def close(self):
            closed.append(self)

    NativeSession([Clinging(), Good()], Contract((2,), 2)).close()
    assert len(closed) == 1


def test_what_nobody_has_thought_of_is_a_bridge_error():
    class Number(np.float64):
        def __float__(self):
            raise ValueError("not now")

    class Sly:
        def reset(self, seed=None):
            return np.zeros(2), {}

        def step(self, action):
            return np.zeros(2), Number(1), False, False, {}

    session = NativeSession([Sly()], Contract((2,), 2))
    session.reset(0)
    with pytest.raises(BridgeError, match="step 1: ValueError: not now") as caught:
        session.step([0])
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(BridgeError, match="dead"):
        session.step([0])


@pytest.mark.parametrize("all_of_them", [False, True], ids=["trainer", "servers too"])
def test_what_was_stopped_for_longer_than_the_timeout_goes_on(workplace, all_of_them):
    """A Ctrl-Z stops the trainer, and the replies come meanwhile; a docker pause stops the servers, too."""
    (workplace / "trainer.py").write_text(f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from gym_bridge import *
case = "open('asked', 'w').close(); __import__('time').sleep(1)"
with GymnasiumSession("odd_envs:Odd-v0", Contract((2,), 2), 3, 2, dict(case=case)) as session:
    print(*[server.process.pid for server in session._servers], flush=True)
    session.reset(0)
    session.step([0, 0, 0])
    session._timeout = 3
    session.step([0, 0, 0])
print("through")
""")
    trainer = subprocess.Popen([sys.executable, "trainer.py"], stdout=subprocess.PIPE, text=True)
    servers = [int(pid) for pid in trainer.stdout.readline().split()]
    until(Path("asked").exists)  # the second server: so both have been
    stopped = [trainer.pid, *(servers if all_of_them else [])]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(4.5)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    assert trainer.communicate(timeout=20)[0] == "through\n"


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, though a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_an_error_is_reported(workplace, ctrl_c, monkeypatch):
    """The report waits for an exit code, which does not come: the server has hung up, and lives."""
    session = fake_session(workplace, "step", "os.close(1); time.sleep(60)")
    session.reset(0)
    monkeypatch.setattr(gym_bridge._Server, "report", lambda server: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        session.step([0, 1, 0])
    for server in session._servers:
        assert_gone(server.process.pid)
    with pytest.raises(BridgeError):
        session.observation  # noqa: B018


HANGS = [
    "pass",
    "import time; time.sleep(60)",
    "import ctypes; ctypes.PyDLL(None).sleep(60)",
    "os.kill(os.getpid(), 19)",
]


@pytest.mark.parametrize("in_thread", [False, True], ids=["", "session made in a thread"])
@pytest.mark.parametrize("hang", HANGS, ids=["busy", "asleep", "holding the interpreter", "stopped"])
def test_no_server_outlives_a_killed_trainer(hang, in_thread):
    trainer = subprocess.Popen(
        [sys.executable, "-c", f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from gym_bridge import *
from concurrent.futures import ThreadPoolExecutor
case = "__import__('subprocess').Popen(['sleep', '61']); open('asked', 'w').close(); {hang}"
def make(): return GymnasiumSession("odd_envs:Odd-v0", Contract((2,), 2), 2, 2, {{"case": case}})
if {in_thread}:
    with ThreadPoolExecutor() as pool: session = pool.submit(make).result()
else: session = make()
print(*[server.process.pid for server in session._servers], flush=True)
session.reset(0)
while True: session.step([0, 0])
"""], stdout=subprocess.PIPE, text=True)  # fmt: skip
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    until(Path("asked").exists)
    trainer.kill()
    trainer.wait()
    for pid in pids:
        assert_gone(pid)
    trainer.stdout.close()


def test_whatever_stands_in_for_a_server_does_not_outlive_a_killed_trainer():
    """Before it has said a word, too: this one will never."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from gym_bridge import *
command = ["sh", "-c", "trap '' TERM HUP; sleep 60; true"]
session = GymnasiumSession("Fake-v0", Contract((2,), 2), 2, server_command=command, wait=False)
print(session._servers[0].process.pid, flush=True)
session.reset(0)
"""], stdout=subprocess.PIPE, text=True)  # fmt: skip
    pid = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    assert_gone(pid)
    trainer.stdout.close()


def test_a_server_behind_a_launcher_that_stays_and_drops_descriptors_does_not_outlive_a_killed_trainer():
    """It neither leads its session nor has the lifeline, but knows that there was one."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", f"""
import sys; sys.path.insert(0, {str(HERE)!r})
from gym_bridge import *
launcher = ["sh", "-c", 'for f in 3 4 5 6 7 8 9; do eval "exec $f<&-"; done; "$0" "$@"; true']
command = [*launcher, sys.executable, {str(HERE / "gym_bridge.py")!r}]
case = dict(case="open('asked', 'w').close(); __import__('time').sleep(60)")
session = GymnasiumSession("odd_envs:Odd-v0", Contract((2,), 2), 2, 1, case, server_command=command)
session.reset(0)
session.step([0, 0])
print(session._servers[0].process.pid, flush=True)
session.step([0, 0])
"""], stdout=subprocess.PIPE, text=True)  # fmt: skip
    group = int(trainer.stdout.readline())
    until(Path("asked").exists)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert_gone(group, 4)  # two of them are its grace


@pytest.mark.parametrize("wait", [True, False], ids=["ready", "starting"])
def test_a_session_that_is_dropped_takes_its_servers_along(wait):
    for command in None, [*DROPS, sys.executable, str(HERE / "gym_bridge.py")]:
        session = GymnasiumSession("CartPole-v1", CARTPOLE, 2, 2, server_command=command, wait=wait)
        pids = [server.process.pid for server in session._servers]
        del session
        gc.collect()
        for pid in pids:
            assert_gone(pid, 20)  # without a lifeline it has to start before it can see that nobody is there


def test_a_session_that_is_dropped_while_an_environment_is_being_made_takes_its_server_along():
    """The environment does not let Python run."""
    kwargs = {"fault": "open('asked', 'w').close(); import ctypes; ctypes.PyDLL(None).sleep(60)"}
    session = GymnasiumSession("odd_envs:Unfinished-v0", ODD, make_kwargs=kwargs, wait=False)
    group = session._servers[0].process.pid
    until(Path("asked").exists)
    del session
    gc.collect()
    assert_gone(group)


def test_a_second_ctrl_c_while_servers_are_being_ended(workplace, ctrl_c, monkeypatch):
    fault = "signal.signal(15, signal.SIG_IGN); os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    session = fake_session(workplace, "step", fault)
    session.reset(0)
    waits, original = [], gym_bridge._wait_for_exits

    def wait(servers, seconds):
        waits.append(seconds)
        if len(waits) == 1:
            signal.raise_signal(signal.SIGINT)
        original(servers, seconds)

    monkeypatch.setattr(gym_bridge, "_wait_for_exits", wait)
    with pytest.raises(KeyboardInterrupt):
        session.step([0, 1, 0])
    assert waits == [gym_bridge.ERROR_GRACE, gym_bridge.CLOSE_GRACE]  # no time for a SIGTERM
    for server in session._servers:
        assert_gone(server.process.pid)
    with pytest.raises(BridgeError, match="dead: KeyboardInterrupt"):
        session.step([0, 1, 0])


def test_two_threads_do_not_mix_their_steps():
    """Each step is one thread's, whole; the other is refused meanwhile."""

    class Clock:
        def reset(self, seed=None):
            self.t = 0.0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            return np.full(1, self.t, np.float32), 0.0, False, False, {}

    session = NativeSession([Clock()], Contract((1,), 2))
    session.reset(0)
    taken, refused = [], []

    def step():
        for _ in range(10_000):
            try:
                transition = session.step([0])
                taken.append((transition.observation.item(), transition.next_observation.item()))
            except BridgeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=step) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # they take turns as often as they can
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert sorted(taken) == [(t, t + 1) for t in range(len(taken))]
    assert len(taken) == session.transitions_checked == 20_000 - len(refused)
    reasons = "its step has not ended", "another thread is in it"
    assert set(refused) <= {f"this session is dead: {reason}" for reason in reasons}


def test_sessions_leave_no_descriptor_and_no_thread_behind(workplace):
    def open_and_close():
        session = fake_session(workplace, "step", "sys.exit(3)")
        session.reset(0)
        with pytest.raises(BridgeError):
            session.step([0, 1, 0])
        with GymnasiumSession("CartPole-v1", CARTPOLE) as other:
            other.reset(0)
        return session, other

    def count():
        return len(os.listdir("/dev/fd")), threading.active_count()

    kept = [open_and_close()]
    gc.collect()  # what earlier tests left
    before = count()
    kept += [open_and_close() for _ in range(4)]
    until(lambda: all(now <= then for now, then in zip(count(), before, strict=True)))  # a thread may take a moment


def test_nothing_grows():
    """The short form of the soak: 20,000 steps, then sessions opened, closed and killed."""
    command = [sys.executable, str(HERE / "benchmarks/soak.py"), "--steps", "20000", "--sessions", "4"]
    done = run(command)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "nothing has grown"), done.stdout + done.stderr


def test_a_person_can_hold_the_conversation():
    typed = """{"id": 1, "cmd": "describe"}
{"id": 2, "cmd": "reset", "seed": 1}
{"id": 3, "cmd": "step", "actions": [0, 1]}
what?
{"id": "five", "cmd": "step", "actions": [0, 9]}
{"id": [1e999], "cmd": "reset"}
{"id": 7, "cmd": "reset", "sed": 1}
{"id": 8, "cmd": "reset", "seed": -1}
{"id": 9, "cmd": "fly"}
["fly"]
{"id": 10, "cmd": "step", "actions": "01"}
{"id": 11, "cmd": "reset", "encoding": "gzip"}
{"id": 12, "cmd": "close"}
"""
    command = [sys.executable, str(HERE / "gym_bridge.py"), "--env-id", "CartPole-v1", "--num-envs", "2"]
    done = run(command, input=typed)
    assert done.returncode == 0
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert [reply["id"] for reply in replies] == [1, 2, 3, None, "five", None, 7, 8, 9, None, 10, 11, 12]
    assert [reply["id"] for reply in replies if reply["ok"]] == [1, 2, 3, None, 12]
    assert replies[0]["obs_high"] == [pytest.approx(4.8), None, pytest.approx(math.radians(24)), None]
    assert np.shape(replies[1]["obs"]) == (2, 4)
    assert (replies[2]["reward"], replies[2]["terminated"], replies[2]["reset_obs"]) == ([1, 1], [False, False], {})
    assert replies[3]["error"].startswith("a request is one line of strict JSON (Expecting value")
    assert "traceback" not in replies[3]
    broken = {"rule": "action_range", "expected": "0 .. 1", "got": "9", "env": 1}
    error = "contract rule action_range broken: expected 0 .. 1, got 9"
    assert replies[4] == {"id": "five", "ok": False, "error": error, **broken}
    known = "a request is {\"id\": 1, \"cmd\": one of ['describe', 'reset', 'step', 'close'], ...}"
    assert [reply["error"] for reply in replies[6:12]] == [
        "reset takes no ['sed']",
        "seed is a non-negative integer or null, not -1",
        known,
        known,
        "actions is a list, not '01'",
        'encoding is "base64" or "json", not \'gzip\'',
    ]


def test_the_conversation_is_the_docstrings():
    spoken = re.findall(r"^    ([<>]) ({.*?})$", gym_bridge.__doc__, re.MULTILINE | re.DOTALL)
    typed = "".join(line + "\n" for who, line in spoken if who == ">")
    command = [sys.executable, str(HERE / "gym_bridge.py"), "--env-id", "CartPole-v1", "--num-envs", "2"]
    done = run(command, input=typed)
    promised = [re.escape(re.sub(r"\s+", " ", line)).replace(r"\.\.\.", ".+") for who, line in spoken if who == "<"]
    assert len(promised) == 4
    for reply, pattern in zip(done.stdout.splitlines(), promised, strict=True):
        assert re.fullmatch(pattern, json.dumps(json.loads(reply)))


def test_a_person_who_stops_listening_or_asks_for_no_environment_or_presses_ctrl_c():
    command = [sys.executable, str(HERE / "gym_bridge.py"), "--env-id", "CartPole-v1"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server.stdout.close()
    assert server.communicate('{"id": 1, "cmd": "describe"}\n')[1] == ""
    assert server.returncode == 0
    done = run([*command, "--num-envs", "0"])
    assert done.returncode == 2
    assert done.stderr.endswith("gym_bridge.py: error: --num-envs must be at least 1\n")
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server.stdin.write('{"id": 1, "cmd": "describe"}\n')
    server.stdin.flush()
    assert '"ok": true' in server.stdout.readline()
    server.send_signal(signal.SIGINT)
    assert server.communicate(timeout=10)[1] == ""
    assert server.returncode == -signal.SIGINT


@pytest.mark.parametrize("what", ["start", "step"])
def test_requests_piped_in_are_answered_however_long_it_takes(workplace, what):
    """The server leads its session, as in a container: a hang-up ends it, but not before everything is answered."""
    (workplace / "slow.py").write_text(f"import time\nimport odd_envs\ntime.sleep({3 * (what == 'start')})\n")
    command = [sys.executable, str(HERE / "gym_bridge.py"), "--env-id", "slow:Odd-v0"]
    command += ["--make-kwargs", quote(json.dumps({"case": "__import__('time').sleep(3)"}))] if what == "step" else []
    requests = [
        {"id": 1, "cmd": "reset", "seed": 1},
        {"id": 2, "cmd": "step", "actions": [0]},
        {"id": 3, "cmd": "step", "actions": [0]},
        {"id": 4, "cmd": "close"},
    ]
    text = "".join(json.dumps(request) + "\n" for request in requests)
    done = run(command, input=text, start_new_session=True)
    assert [(json.loads(line)["id"], json.loads(line)["ok"]) for line in done.stdout.splitlines()] == [
        (1, True), (2, True), (3, True), (4, True),
    ]  # fmt: skip
    assert done.returncode == 0


def test_a_socket_that_is_hung_up_on_one_side(workplace):
    """So does an ssh that ends; the environment hangs and never reads again."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, str(HERE / "gym_bridge.py"), "--env-id", "odd_envs:Odd-v0", "--num-envs", "2"]
    command += ["--make-kwargs", quote(json.dumps({"case": "import time; time.sleep(60)"})), "--lifeline", "99"]
    with ours, subprocess.Popen(command, stdin=theirs, stdout=theirs, start_new_session=True) as server:
        theirs.close()
        for request in ({"cmd": "reset", "seed": 0}, {"cmd": "step", "actions": [0, 0]}):
            ours.sendall(json.dumps({"id": 1, **request}).encode() + b"\n")
            assert b'"ok": true' in ours.recv(9999)
        ours.sendall(b'{"id": 2, "cmd": "step", "actions": [0, 0]}\n')
        time.sleep(0.2)
        ours.shutdown(socket.SHUT_WR)
        assert server.wait(5) == -signal.SIGKILL


def test_importing_gym_bridge_takes_the_standard_library_and_numpy():
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import gym_bridge; "
    code += "sys.exit(bool({'torch', 'gymnasium', 'ale_py', 'tyro'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --------------------------------------------------------------------------------------- a reply, mutated in any way

DESCRIBED = {"id": 1, "ok": True, "protocol": 1, "env_id": "Fake-v0", "num_envs": 2, "n_actions": 2, "obs_shape": [2],
             "obs_dtype": "float32", "obs_low": [-1, None], "obs_high": [1, None], "versions": {}}  # fmt: skip
STEPPED = {"id": 3, "ok": True, "next_obs": [[0.5, -0.25], [1.0, 0.75]], "reward": [1.0, 0.5],
           "terminated": [False, True], "truncated": [False, False], "reset_obs": {"1": [0.125, 0.0]}}  # fmt: skip


def packed(rows):
    return base64.b64encode(np.array(rows, "<f4").tobytes()).decode()


STEPPED_BASE64 = {**STEPPED, "next_obs": packed(STEPPED["next_obs"]), "reset_obs": {"1": packed([0.125, 0.0])}}


def oracle(line):
    """What a reply to the step says, if it says it exactly (None if not): the rules once more, in plain Python."""

    def unique(pairs):
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    def refuse(token):
        raise AssertionError(token)

    def observation(raw):
        if type(raw) is str:
            assert re.fullmatch("[A-Za-z0-9+/]{11}=", raw)
            numbers = np.frombuffer(base64.b64decode(raw), "<f4").astype(float).tolist()
        else:
            assert type(raw) is list
            assert all(type(number) in (int, float) for number in raw)
            assert all(abs(number) < 2 for number in raw)
            numbers = [float(np.float32(number)) for number in raw]  # what is rounded to 1 lies in the range
        assert len(numbers) == 2
        assert all(-1 <= number <= 1 for number in numbers)
        return numbers

    try:
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        reply = json.loads(line.decode(), object_pairs_hook=unique, parse_constant=refuse)
        assert type(reply) is dict
        assert reply.keys() == STEPPED.keys()
        assert (type(reply["id"]), reply["id"], reply["ok"]) == (int, 3, True)
        assert type(reply["ok"]) is bool
        rows = reply["next_obs"]
        if type(rows) is str:
            assert re.fullmatch("[A-Za-z0-9+/]{22}==", rows)
            raw = base64.b64decode(rows)
            rows = [base64.b64encode(raw[:8]).decode(), base64.b64encode(raw[8:]).decode()]
        else:
            assert all(type(row) is list for row in rows)
        assert len(rows) == len(reply["reward"]) == len(reply["terminated"]) == len(reply["truncated"]) == 2
        for name in "reward", "terminated", "truncated":
            assert type(reply[name]) is list
        for reward, *flags in zip(reply["reward"], reply["terminated"], reply["truncated"], strict=True):
            assert type(reward) in (int, float)
            assert 0 <= reward <= 1
            assert all(type(flag) is bool for flag in flags)
            assert flags != [True, True]
        done = [str(env) for env in (0, 1) if reply["terminated"][env] or reply["truncated"][env]]
        assert type(reply["reset_obs"]) is dict
        assert sorted(reply["reset_obs"]) == done
        first = {env: observation(raw) for env, raw in reply["reset_obs"].items()}
        following = [observation(row) for row in rows]
        return (following, [float(reward) for reward in reply["reward"]], reply["terminated"], reply["truncated"],
                [first.get(str(env), following[env]) for env in (0, 1)])  # fmt: skip
    except (AssertionError, ValueError, TypeError, OverflowError, RecursionError):
        return None


NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([0.0, -0.0, 1.0000001, 1e39, 10**400, 2**63])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=4), st.sampled_from(["1", "AAAAAAAAAAA="])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("01ab"), inner, max_size=2)),
    max_leaves=4,
)


def places(node):
    """(container, key) of everything in a JSON value."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from places(node[key])


@st.composite
def mutated_lines(draw):
    """A valid reply with one or two things changed: a byte, a field, a number, a length."""
    reply = json.loads(json.dumps(draw(st.sampled_from([STEPPED, STEPPED_BASE64]))))
    if draw(st.booleans()):
        for _ in range(draw(st.integers(1, 2))):
            container, key = draw(st.sampled_from(list(places(reply))))
            action = draw(st.sampled_from(["replace", "disguise", "delete", "add", "repeat"]))
            if action == "replace":
                container[key] = draw(VALUES)
            elif action == "disguise":  # what a careless reader would take for the same
                value = container[key]
                like = [str(value), [value], None]
                for kind in (int, float, bool) if isinstance(value, (bool, int, float)) else ():
                    with contextlib.suppress(OverflowError, ValueError):  # an infinity is no integer
                        like.append(kind(value))
                container[key] = draw(st.sampled_from(like))
            elif action == "delete":
                del container[key]
            elif isinstance(container, list):
                container.insert(key, draw(VALUES) if action == "add" else container[key])
            else:
                container[draw(st.text(max_size=3))] = draw(VALUES) if action == "add" else container[key]
        return json.dumps(reply).encode() + b"\n"
    line = bytearray(json.dumps(reply).encode() + b"\n")
    if draw(st.booleans()):
        key = draw(st.sampled_from(list(reply)))  # a field twice, a line more
        field = json.dumps({key: draw(st.sampled_from([reply[key], 0]))}).encode()[1:-1]
        return bytes(
            draw(st.sampled_from([b"{" + field + b", " + line[1:], line[:-2] + b", " + field + b"}\n", 2 * line]))
        )
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(line) - 1))
        length = draw(st.integers(0, 4))
        line[at : at + length] = draw(st.binary(max_size=4) | st.sampled_from([b"1", b"0", b"-", b"e9", b",", b"\n"]))
    return bytes(line)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated_lines())
@example(json.dumps(STEPPED).encode() + b"\n")
@example(json.dumps(STEPPED_BASE64).encode() + b"\n")
@example(json.dumps(STEPPED).encode())
def test_a_mutated_reply_is_exactly_right_or_an_error(line):
    """Read from a real process.  No other exception, no hang, and never a value that the line does not say."""
    Path("describe").write_text(json.dumps(DESCRIBED) + "\n")
    Path("reset").write_text('{"id":2,"ok":true,"obs":[[0,0],[0,0]]}\n')
    Path("step").write_bytes(line)
    script = "for reply in describe reset step; do read -r request; cat $reply; done; read -r request"
    contract = dataclasses.replace(FAKE, obs_range=(-1, 1))
    command = ["sh", "-c", script, "sh"]
    session = GymnasiumSession("Fake-v0", contract, 2, timeout=20, server_command=command)
    session.reset(0)
    session._timeout = 20.0 if b"\n" in line else 0.2  # no line end: nothing but the deadline will tell
    expected = oracle(line)
    if expected is None:
        with pytest.raises((ContractViolation, BridgeError)):
            session.step([0, 1])
        with pytest.raises(BridgeError, match="dead"):
            session.step([0, 1])
    else:
        new = session.step([0, 1])
        found = new.next_observation, new.reward, new.terminated, new.truncated, session.observation
        assert tuple(array.tolist() for array in found) == expected
    session.close()


@pytest.mark.parametrize("padding", ["", "="])
def test_base64_has_no_more_padding_than_it_needs(padding):
    """Python's decoder lets it pass where none is needed, up to 3.12."""
    Path("describe").write_text(json.dumps({**DESCRIBED, "num_envs": 3}) + "\n")
    Path("reset").write_text(json.dumps({"id": 2, "ok": True, "obs": packed([[0, 0]] * 3) + padding}) + "\n")
    script = "for reply in describe reset; do read -r request; cat $reply; done; read -r request"
    rule = "obs_shape" if sys.version_info < (3, 13) else "obs_type"
    refused = pytest.raises(ContractViolation, match=rule) if padding else contextlib.nullcontext()
    with GymnasiumSession("Fake-v0", FAKE, 3, server_command=["sh", "-c", script, "sh"]) as session, refused:
        session.reset(0)


# ----------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        # gamma = 0.5, lambda = 0.5; r = 1, 2; V = 4, 8; V' = 6, 10.
        # delta_0 = 1 + 0.5 * 6 - 4 = 0 (terminated: 1 - 4 = -3); delta_1 = 2 + 0.5 * 10 - 8 = -1
        (False, False, [0 + 0.25 * -1, -1]),
        (True, False, [-3, -1]),
        (False, True, [0, -1]),
        (True, True, [-3, -1]),
    ],
    ids=["continue", "terminate", "truncate", "both"],
)
def test_gae_by_hand(terminated, truncated, expected):
    numbers = torch.tensor([[1.0, 2.0], [4.0, 8.0], [6.0, 10.0]]).unsqueeze(-1)  # (3, T, N)
    flags = torch.tensor([[terminated, False], [truncated, False]]).unsqueeze(-1)
    advantages = ppo.gae(*numbers, *flags, 0.5, 0.5)
    assert advantages.squeeze(1).tolist() == expected


def test_flags_may_be_zeros_and_ones():
    """As in code that keeps them among floats."""
    numbers, flags = torch.randn(3, 4, 3), torch.rand(2, 4, 3) < 0.4
    expected = ppo.gae(*numbers, *flags, 0.9, 0.8)
    for dtype in torch.float32, torch.int64, torch.uint8:
        assert torch.equal(ppo.gae(*numbers, *flags.to(dtype), 0.9, 0.8), expected)


def test_what_comes_after_the_end_may_be_nan():
    """As in code that has no observation to show there, and so no V(s')."""
    numbers, terminated = torch.randn(3, 4, 3), torch.rand(4, 3) < 0.4
    expected = ppo.gae(*numbers, terminated, ~terminated, 0.9, 0.8)
    numbers[2][terminated] = math.nan
    assert torch.equal(ppo.gae(*numbers, terminated, ~terminated, 0.9, 0.8), expected)


def test_shapes_that_would_broadcast_are_refused():
    """A critic's (B, 1) beside returns (B,) is the commonest of mistakes, and would train on (B, B)."""
    good = [torch.zeros(3, 2) for _ in range(3)] + [torch.zeros(3, 2, dtype=torch.bool) for _ in range(2)]
    ppo.gae(*good, 0.9, 0.9)
    for i in range(5):
        wrong = [each.unsqueeze(-1) if i == k else each for k, each in enumerate(good)]
        with pytest.raises(ValueError, match=r"must all be \(T, N\)"):
            ppo.gae(*wrong, 0.9, 0.9)
    flat = [each.flatten() for each in good]  # one environment's steps would follow another's
    with pytest.raises(ValueError, match=r"must all be \(T, N\), not {\(\d+,\)}"):
        ppo.gae(*flat, 0.9, 0.9)
    batch = [torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, dtype=torch.int64)] + [torch.zeros(3)] * 3
    ppo.ppo_loss(*batch)
    for i in range(7):  # at last all of them: a rollout that was not flattened
        wrong = [each.unsqueeze(0).expand(2, *each.shape) if i == 6 else each for each in batch]
        wrong = [each.unsqueeze(-1) if i == k else each for k, each in enumerate(wrong)]
        with pytest.raises(ValueError, match=r"logits must be \(B, A\), and all other tensors \(B,\)"):
            ppo.ppo_loss(*wrong)
    with pytest.raises(ValueError, match="B > 1"):  # what a last minibatch of one sample would be normalised to is NaN
        ppo.ppo_loss(*(each[:1] for each in batch))


def test_gae_takes_the_buffers_of_others():
    """Whose done flags and episode starts stand one row later: the recipe in the README, against their recursion."""
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 9, 3))
    dones, next_value, next_done = rng.random((9, 3)) < 0.3, rng.normal(size=3), np.array([True, False, False])
    expected, advantage = np.zeros((9, 3)), np.zeros(3)
    going_on, value = ~next_done, next_value
    for t in reversed(range(9)):
        advantage = rewards[t] + 0.9 * value * going_on - values[t] + 0.9 * 0.8 * going_on * advantage
        expected[t], going_on, value = advantage, ~dones[t], values[t]
    theirs = rewards, values, next_value, dones, next_done
    rewards, values, next_value, dones, next_done = (torch.from_numpy(each) for each in theirs)
    terminated = torch.cat([dones[1:], next_done[None]])
    next_values = torch.cat([values[1:], next_value[None]])
    ours = ppo.gae(rewards, values, next_values, terminated, torch.zeros_like(terminated), 0.9, 0.8)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["old_log_probs", "advantages", "targets"])
def test_gradients_where_there_should_be_none_are_refused(name):
    """With a gradient in old_log_probs, the policy's would be 0; in a target, the critic would chase itself."""
    batch = {each: torch.zeros(3) for each in ("values", "old_log_probs", "advantages", "targets")}
    batch |= {"logits": torch.zeros(3, 2), "actions": torch.zeros(3, dtype=torch.int64)}
    batch[name].requires_grad_()
    with pytest.raises(ValueError, match=r"compute old_log_probs, .* under torch\.no_grad\(\)"):
        ppo.ppo_loss(**batch)
    with torch.no_grad():
        batch[name] = batch[name] + 0
    ppo.ppo_loss(**batch)


@given(seed=st.integers(0, 2**31), steps=st.integers(1, 12), gamma=st.floats(0, 1), gae_lambda=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_gae_and_returns_against_the_closed_form(seed, steps, gamma, gae_lambda):
    """V(s_t) + A_t is the lambda-return: the average of the n-step returns with weights (1 - lambda) lambda^(n-1)."""
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, steps, 2))
    terminated, truncated = rng.random((2, steps, 2)) < 0.2
    # Within an episode, the state that an action led to is the one in the next row.
    next_values[:-1] = np.where(terminated | truncated, next_values, np.roll(values, -1, axis=0))[:-1]
    tensors = [torch.from_numpy(array) for array in (rewards, values, next_values, terminated, truncated)]
    ours = ppo.gae(*tensors, gamma, gae_lambda).numpy()
    for env in range(2):
        for t in range(steps):
            last = next((k for k in range(t, steps) if terminated[k, env] or truncated[k, env]), steps - 1)
            n_step_returns = []
            for n in range(1, last - t + 2):
                end = t + n - 1
                bootstrap = 0.0 if terminated[end, env] else gamma**n * next_values[end, env]
                n_step_returns.append(sum(gamma**k * rewards[t + k, env] for k in range(n)) + bootstrap)
            weights = [(1 - gae_lambda) * gae_lambda ** (n - 1) for n in range(1, len(n_step_returns))]
            weights.append(gae_lambda ** (len(n_step_returns) - 1))
            expected = sum(w * g for w, g in zip(weights, n_step_returns, strict=True)) - values[t, env]
            direct = 0.0
            for k in range(t, last + 1):
                bootstrap = 0.0 if terminated[k, env] else next_values[k, env]
                direct += (gamma * gae_lambda) ** (k - t) * (rewards[k, env] + gamma * bootstrap - values[k, env])
            assert ours[t, env] == pytest.approx(direct, abs=1e-9)
            assert ours[t, env] == pytest.approx(expected, abs=1e-9)


# What a researcher cuts out of a file, what the README says that it needs, what is done with it, the output.
PASTE_ROWS = [
    (
        [ppo.gae, ppo.ppo_loss],
        "import torch",
        """
zeros = torch.zeros(3, 2)
print(gae(zeros + 1, zeros, zeros, zeros.bool(), zeros.bool(), 1.0, 1.0).tolist())
actions, zero, one = torch.tensor([0, 1]), torch.zeros(2), torch.ones(2)
loss, info = ppo_loss(torch.zeros(2, 2), zero, actions, zero, torch.eye(2)[0], one)
print(loss.item() == (info["policy_loss"] + 0.5 * info["value_loss"]).item())
""",
        "[[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]\nTrue\n",
    ),
    (
        [ppo.Rollout, ppo.collect_rollout, ppo.evaluate],
        """
from __future__ import annotations
from dataclasses import dataclass, fields
import numpy as np, torch
from torch import nn
from gym_bridge import CheckedSession, Transition
""",
        """
from gym_bridge import Contract, NativeSession
from odd_envs import Counting
with NativeSession([Counting(), Counting()], Contract((2,), 3)) as session:
    session.reset(0)
    rollout = collect_rollout(session, nn.Linear(2, 3), lambda seen: seen.sum(-1), 4)
    print(rollout.done.tolist(), evaluate(session, nn.Linear(2, 3), 0, 1).shape)
""",
        "[[False, False], [False, False], [True, True], [False, False]] (2,)\n",
    ),
    (
        [pong.Inputs, pong.InputLinear, pong.Muon, pong.orthogonalize],
        "import math, torch; from torch import nn; from typing import Any",
        """
inputs, seen = Inputs((2, 3)), torch.arange(24, dtype=torch.uint8).view(4, 2, 3)
inputs.update(seen)
outputs = InputLinear(inputs.size, 2)(inputs(seen))
weights = nn.Parameter(torch.eye(2))
optimizer = Muon([weights])
weights.sum().backward()
optimizer.step()
print(list(outputs.shape), bool((weights != torch.eye(2)).all()))
""",
        "[4, 2] True\n",
    ),
]


@pytest.mark.parametrize(("things", "needs", "use", "output"), PASTE_ROWS, ids=["gae", "rollout", "muon"])
def test_what_is_pasted_runs(things, needs, use, output):
    program = "\n\n".join([needs.strip(), *map(inspect.getsource, things), use])
    path = {"PYTHONPATH": f"{HERE}:."}
    done = run([sys.executable, "-c", program], env={**os.environ, **path})
    assert done.stdout == output, done.stderr


# ------------------------------------------------------------------------------------------------------------- PPO loss


def loss_oracle(logits, values, actions, old_log_probs, advantages, targets, clip, vf, ent):
    """Equations 7 and 9 of the PPO paper sample by sample, in double precision, without torch."""
    size = len(actions)
    mean = sum(advantages) / size
    std = math.sqrt(sum((a - mean) ** 2 for a in advantages) / (size - 1))
    surrogate = value_error = entropy = kl = clipped = 0.0
    for row, value, action, old, advantage, target in zip(
        logits, values, actions, old_log_probs, advantages, targets, strict=True
    ):
        partition = sum(math.exp(logit) for logit in row)
        probabilities = [math.exp(logit) / partition for logit in row]
        ratio = probabilities[action] / math.exp(old)
        normalised = (advantage - mean) / (std + 1e-8)
        if normalised >= 0:
            surrogate += normalised * min(ratio, 1 + clip) / size
        else:
            surrogate += normalised * max(ratio, 1 - clip) / size
        value_error += (value - target) ** 2 / size
        entropy -= sum(p * math.log(p) for p in probabilities) / size
        kl += (ratio - 1 - math.log(ratio)) / size
        clipped += (not 1 - clip <= ratio <= 1 + clip) / size
    return -surrogate + vf * value_error - ent * entropy, {
        "policy_loss": -surrogate,
        "value_loss": value_error,
        "entropy": entropy,
        "approx_kl": kl,
        "clip_fraction": clipped,
    }


@given(seed=st.integers(0, 2**31), size=st.integers(2, 9), clip=st.floats(0.05, 0.4), ent=st.floats(0, 0.1))
@settings(deadline=None, max_examples=60)
def test_ppo_loss_against_the_oracle(seed, size, clip, ent):
    rng = np.random.default_rng(seed)
    logits, old_logits = rng.normal(size=(2, size, 3))
    actions = rng.integers(0, 3, size)
    old = torch.from_numpy(old_logits).log_softmax(-1).numpy()[np.arange(size), actions]
    values, advantages, targets = rng.normal(size=(3, size))
    arrays = (logits, values, actions, old, advantages, targets)
    loss, info = ppo.ppo_loss(*(torch.from_numpy(array) for array in arrays), clip, 0.5, ent)
    expected_loss, expected_info = loss_oracle(*(array.tolist() for array in arrays), clip, 0.5, ent)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-9)
    assert {key: value.item() for key, value in info.items()} == pytest.approx(expected_info, abs=1e-9)
    loss, _ = ppo.ppo_loss(*(torch.from_numpy(array) for array in arrays))  # unless told otherwise
    assert loss.item() == pytest.approx(loss_oracle(*(array.tolist() for array in arrays), 0.2, 0.5, 0.0)[0], abs=1e-9)


@pytest.mark.parametrize("spread", [0.0, 0.19])
def test_the_gradient_is_the_policy_gradient_times_the_ratio(spread):
    """With respect to a row's logits: -A * r * (1[a] - pi), in a mean over the rows; r is 1 at first (spread 0)."""
    rng = np.random.default_rng(1)
    ratios = rng.uniform(1 - spread, 1 + spread, 5)  # too near 1 to be clipped
    logits = torch.from_numpy(rng.normal(size=(5, 3))).requires_grad_()
    actions, advantages = torch.from_numpy(rng.integers(0, 3, 5)), torch.from_numpy(rng.normal(size=5))
    old = logits.detach().log_softmax(-1)[torch.arange(5), actions] - torch.from_numpy(np.log(ratios))
    loss, info = ppo.ppo_loss(logits, torch.zeros(5), actions, old, advantages, torch.zeros(5))
    loss.backward()
    assert not any(value.requires_grad for value in info.values())  # for the log
    normalised = (advantages.numpy() - advantages.numpy().mean()) / (advantages.numpy().std(ddof=1) + 1e-8)
    powers = np.exp(logits.detach().numpy())
    grad_log_pi = np.eye(3)[actions.numpy()] - powers / powers.sum(1, keepdims=True)
    np.testing.assert_allclose(logits.grad.numpy(), -(normalised * ratios)[:, None] * grad_log_pi / 5, atol=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "sign"),
    [
        (1, 0.5, +1),  # good and less likely than it was: make it more likely
        (1, 1.1, +1),
        (1, 1.3, 0),  # good, but already more than 1 + eps times as likely: no further
        (-1, 1.5, -1),  # bad and more likely than it was: make it less likely
        (-1, 0.9, -1),
        (-1, 0.7, 0),  # bad, but already less than 1 - eps times as likely: no further
    ],
)
def test_the_clip_cuts_the_gradient_on_the_far_side_only(advantage, ratio, sign):
    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([0, 0])
    old_log_probs = torch.log(torch.tensor([0.5 / ratio, 0.5], dtype=torch.float64))
    advantages = torch.tensor([advantage, -advantage], dtype=torch.float64)  # the second only makes a mean of 0
    loss, _ = ppo.ppo_loss(logits, torch.zeros(2), actions, old_log_probs, advantages, torch.zeros(2), clip_coef=0.2)
    loss.backward()
    assert np.sign(-logits.grad[0, 0].item()) == sign  # the direction in which descent moves the action's logit


def test_entropy_bonus_and_value_loss_pull_the_right_way():
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    values = torch.tensor([0.0, 0.0], requires_grad=True)
    zeros = torch.zeros(2)
    loss, _ = ppo.ppo_loss(logits, values, torch.tensor([0, 1]), zeros, zeros, torch.tensor([2.0, -2.0]), ent_coef=1.0)
    loss.backward()
    assert (logits.grad[:, 0] > 0).all()  # towards undecided
    assert values.grad.sign().tolist() == [-1, 1]  # towards the returns


def test_the_kl_estimate_is_unbiased_and_never_negative():
    """Averaged over the actions of the old policy, the estimator is the exact KL(old, new)."""
    old = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    new = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    exact = (old * (old / new).log()).sum()
    estimate = 0.0
    for action in range(3):
        twice = torch.tensor([action, action])
        _, info = ppo.ppo_loss(
            new.log().repeat(2, 1), torch.zeros(2), twice, old.log()[twice], torch.tensor([1.0, -1.0]), torch.zeros(2)
        )
        assert info["approx_kl"] >= 0
        estimate += old[action] * info["approx_kl"]
    assert estimate.item() == pytest.approx(exact.item())


def test_the_kl_estimate_of_a_small_step_is_exact_in_float32():
    """r - 1 - log r for log r = x = 1e-4 is x^2 / 2 + x^3 / 6 + ...; with r rounded first, a quarter would be lost."""
    old = torch.full((2,), math.log(0.5))
    log_pi = torch.tensor([[math.log(0.5) + 1e-4, math.log(1 - 0.5 * math.exp(1e-4))]]).repeat(2, 1)
    chosen = torch.zeros(2, dtype=torch.int64)
    step = (log_pi.log_softmax(-1)[0, 0] - old[0]).double().item()  # as float32 has it
    _, info = ppo.ppo_loss(log_pi, torch.zeros(2), chosen, old, torch.tensor([1.0, -1.0]), torch.zeros(2))
    assert info["approx_kl"].item() == pytest.approx(step**2 / 2 + step**3 / 6, rel=0.01)


# ------------------------------------------------------------------------------------------------- rollout and evaluate


def networks(seed=0):
    torch.manual_seed(seed)
    return ppo.Actor((4,), 2), ppo.Critic((4,))


class Constant(torch.nn.Module):
    """The same logits in every state."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits, dtype=torch.float32))

    def forward(self, observations):
        return self.logits.expand(*observations.shape[:-1], len(self.logits))


class Bytes:
    """Pays 0 or -1.  Every third step ends an episode, and every fifth cuts one short."""

    t = 0

    def reset(self, seed=None):
        return np.zeros(2, np.uint8), {}

    def step(self, action):
        self.t += 1
        return np.array([200 * action, self.t % 9], np.uint8), -float(action), self.t % 3 == 0, self.t % 5 == 0, {}


def small_session(script):
    """Two environments that the script can learn from, with episodes that end, and others that are cut short."""
    if script is ppo:
        return native("Counting", 2, Contract((2,), 3))
    return NativeSession([Bytes(), Bytes()], Contract((2,), 2, "uint8"), frame_stack=3, append_action=True)


def small_args(script, **flags):
    smallest = {"updates": 1, "num_envs": 2, "num_minibatches": 1, "eval_episodes": 1, "eval_max_steps": 1}
    return script.Args(**{"env_id": "Small", **smallest, **flags})


def test_a_rollout_goes_on_where_the_last_one_ended():
    class Sum(torch.nn.Module):
        def forward(self, observations):
            return observations.sum(-1)

    with native("Counting", 2, Contract((2,), 3)) as session:
        session.reset(0)
        rollouts = [ppo.collect_rollout(session, Constant(-1e9, -1e9, 0), Sum(), 2) for _ in range(3)]
    seen = torch.cat([rollout.observations for rollout in rollouts])[:, 0].tolist()
    reached = torch.cat([rollout.next_observations for rollout in rollouts])[:, 0].tolist()
    assert seen == [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [3, 0]]
    assert reached == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [3, 1]]
    assert rollouts[0].rewards.tolist() == [[12, 12], [12, 12]]
    both, neither = [True, True], [False, False]
    assert [rollout.terminated.tolist() for rollout in rollouts[1:]] == [[both, neither], [neither, neither]]
    assert [rollout.truncated.tolist() for rollout in rollouts[1:]] == [[neither, neither], [both, neither]]
    assert rollouts[1].values.tolist() == [[3, 3], [2, 2]]  # V(s)
    assert rollouts[1].next_values.tolist() == [[4, 4], [3, 3]]  # V(s'), before the reset
    assert rollouts[1].log_probs.tolist() == [[0, 0], [0, 0]]


def test_a_rollout_out_of_step_cannot_be_made():
    with cartpole_session() as session:
        session.reset(0)
        rollout = ppo.collect_rollout(session, *networks(), 3)
    both = torch.ones_like(rollout.terminated)
    assert dataclasses.replace(rollout, terminated=both, truncated=both).done.all()
    for field in dataclasses.fields(rollout):
        shorter = getattr(rollout, field.name)[:-1]
        with pytest.raises(ValueError, match=re.escape(f"'{field.name}': {tuple(shorter.shape)}")):
            dataclasses.replace(rollout, **{field.name: shorter})


def test_actions_are_sampled_from_the_policy():
    torch.manual_seed(0)
    with cartpole_session(8) as session:
        session.reset(0)
        rollout = ppo.collect_rollout(session, Constant(math.log(0.2), math.log(0.8)), networks()[1], 250)
    assert rollout.actions.float().mean().item() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 2000))
    expected = torch.where(rollout.actions == 1, math.log(0.8), math.log(0.2))
    assert torch.allclose(rollout.log_probs, expected)


def test_log_probs_are_those_of_the_policy_that_acted():
    """Also where it would say something else when asked again, as with dropout."""

    class Fickle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.said = []

        def forward(self, observations):
            self.said.append(torch.randn(*observations.shape[:-1], 2))
            return self.said[-1]

    actor = Fickle()
    with cartpole_session(3) as session:
        session.reset(0)
        rollout = ppo.collect_rollout(session, actor, networks()[1], 5)
    assert len(actor.said) == 5
    for t, logits in enumerate(actor.said):
        expected = logits.double().log_softmax(-1)[range(3), rollout.actions[t]]
        assert torch.allclose(rollout.log_probs[t].double(), expected, atol=1e-6)


def test_an_action_may_be_masked():
    """As the docstring says: its probability is 0, and neither loss nor entropy nor gradients see it."""
    torch.manual_seed(3)
    logits, rest = torch.randn(8, 2), [torch.randn(8) for _ in range(4)]
    results = []
    for masked in False, True:
        shown = torch.cat([logits, torch.full((8, 1), -1e9)], -1) if masked else logits.clone()
        shown.requires_grad_()
        loss, info = ppo.ppo_loss(shown, rest[0], torch.tensor([0, 1] * 4), *rest[1:], ent_coef=0.1)
        loss.backward()
        assert not shown.grad[:, 2:].any()
        results.append([loss.detach(), *info.values(), *shown.grad[:, :2].flatten()])
    assert torch.allclose(*map(torch.stack, results))


def recorded(owner, name, monkeypatch, what=lambda args, returned: returned):
    """A list of ``what`` is to be known of every call of this function or method, from now on; else what it returns."""
    calls, original = [], getattr(owner, name)

    def record(*args):
        returned = original(*args)
        calls.append(what(args, returned))
        return returned

    monkeypatch.setattr(owner, name, record)
    return calls


@pytest.mark.parametrize("script", [ppo, pong])
def test_ratio_is_one_before_the_first_step(script, monkeypatch):
    """In the real training loop: the first minibatch of every update, but for rounding (batches differ in size)."""
    losses = recorded(script, "ppo_loss", monkeypatch)
    script.train(small_args(script, updates=3, update_epochs=2, num_minibatches=4), small_session(script))
    infos = [info for _, info in losses]
    first, later = infos[:: 2 * 4], [info for k, info in enumerate(infos) if k % 8]
    assert len(first) == 3
    assert [info["approx_kl"].item() for info in first] == pytest.approx([0] * 3, abs=1e-10)
    assert [info["clip_fraction"].item() for info in first] == [0.0, 0.0, 0.0]
    assert all(info["approx_kl"] > 1e-10 for info in later)


@pytest.mark.parametrize("script", [ppo, pong])
def test_flags_arrive(script, monkeypatch):
    judged = recorded(script, "gae", monkeypatch, lambda args, _: args[5:])
    losses = recorded(script, "ppo_loss", monkeypatch, lambda args, _: args[6:])
    flags = {"gamma": 0.44, "gae_lambda": 0.55, "clip_coef": 0.11, "vf_coef": 0.22, "ent_coef": 0.33}
    script.train(small_args(script, update_epochs=1, **flags), small_session(script))
    assert (judged, losses) == ([(0.44, 0.55)], [(0.11, 0.22, 0.33)])


@pytest.mark.parametrize("script", [ppo, pong])
def test_minibatches_are_shuffled_parts_of_the_rollout(script, monkeypatch):
    """Every epoch has all of it, in another order, and what belongs to a sample stays with it."""
    rollouts = recorded(script, "collect_rollout", monkeypatch)
    columns = lambda args, _: [column.detach().double() for column in args[1:6]]  # noqa: E731
    calls = recorded(script, "ppo_loss", monkeypatch, columns)
    forgiving = {} if script is ppo else {"leniency": 0.6}
    args = small_args(script, updates=2, num_steps=16, num_minibatches=4, update_epochs=3, **forgiving)
    script.train(args, small_session(script))
    (_, rollout), calls = rollouts, calls[12:]  # of the second update: in the first one Pong's inputs are all 0
    assert rollout.terminated.any()
    assert rollout.truncated.any()
    rewards = rollout.rewards * (1 if script is ppo else 1 - args.leniency / 2)  # Bytes pays 0 or -1
    judged = (rewards, rollout.values, rollout.next_values, rollout.terminated, rollout.truncated)
    advantages = script.gae(*judged, args.gamma, args.gae_lambda)
    columns = (rollout.actions, rollout.log_probs, advantages, advantages + rollout.values)
    whole = torch.stack([column.flatten().double() for column in columns]).T.tolist()
    seen = [torch.stack(columns) for _, *columns in calls]
    epochs = [torch.cat(seen[k : k + 4], 1).T.tolist() for k in (0, 4, 8)]
    assert {minibatch.shape for minibatch in seen} == {(4, 8)}
    for epoch in epochs:
        assert sorted(epoch) == sorted(whole)
        assert epoch != whole
    assert epochs[0] != epochs[1] != epochs[2]
    values, _, _, advantages, targets = calls[0]
    assert torch.allclose(values, targets - advantages, atol=1e-5)  # before the first step the critic says what it did


@pytest.mark.parametrize("script", [ppo, pong])
def test_a_gradient_is_of_one_minibatch_and_clipped_for_each_network(script, monkeypatch):
    runs = recorded(script.Run, "__init__", monkeypatch, lambda args, _: args[2:4])  # actor, critic

    def norms_of_gradients(*_):
        return [float(sum(w.grad.square().sum() for w in each.parameters()).sqrt()) for each in runs[-1]]

    first_to_step = getattr(script, "Muon", torch.optim.Adam)
    norms = recorded(first_to_step, "step", monkeypatch, norms_of_gradients)
    rates = {field.name: 1e-30 for field in dataclasses.fields(script.Args) if field.name.endswith("learning_rate")}
    args = small_args(script, updates=2, update_epochs=3, max_grad_norm=1e9, **rates)
    script.train(args, small_session(script))
    for first in 0, 3:  # within an update the weights stay, and so do the gradients: nothing is left of the last
        assert norms[first + 1 : first + 3] == [pytest.approx(norms[first], rel=1e-3)] * 2
    norms.clear()
    script.train(dataclasses.replace(args, max_grad_norm=1e-5), small_session(script))
    assert norms == [pytest.approx([1e-5, 1e-5], rel=1e-2)] * 6


def test_one_update_changes_both_networks():
    torch.manual_seed(5)
    before = {"actor": ppo.Actor((4,), 2).state_dict(), "critic": ppo.Critic((4,)).state_dict()}
    after = ppo.train(small_args(ppo, seed=5), cartpole_session(2)).snapshot
    for network, state in before.items():
        for name, weights in state.items():
            assert not torch.equal(weights, after[network][name]), f"{network} {name}"


@pytest.mark.parametrize("script", [ppo, pong])
def test_target_kl_cuts_epochs(script, monkeypatch):
    """Where that of an epoch's last minibatch is above it, which none of the others is."""
    losses = recorded(script, "ppo_loss", monkeypatch)
    args = small_args(script, updates=2, num_minibatches=4, update_epochs=6, solved_return=1e8)
    script.train(args, small_session(script))
    assert len(losses) == 2 * 24
    *others, last = [info["approx_kl"].item() for _, info in losses[:4]]
    assert max(others) < 0.99 * last
    for target_kl, steps in (1e-12, [8]), (0.99 * last, range(2 * 4, 2 * 24)), (1e9, [2 * 24]):
        losses.clear()
        script.train(dataclasses.replace(args, target_kl=target_kl), small_session(script))
        assert len(losses) in steps
    losses.clear()
    script.train(dataclasses.replace(args, updates=1, target_kl=0.99 * last), small_session(script))
    assert len(losses) == 4


def test_the_sampled_return_against_an_oracle(monkeypatch):
    """Of one update, from the rollout that it collected, in plain Python."""
    rollouts = recorded(ppo, "collect_rollout", monkeypatch)
    args = small_args(ppo, num_steps=64, num_envs=4)
    run = ppo.train(args, native("Counting", 4, Contract((2,), 3)))
    (rollout,) = rollouts
    assert (rollout.terminated.any(), rollout.truncated.any()) == (True, True)
    returns = []
    for rewards, done in zip(rollout.rewards.T.tolist(), rollout.done.T.tolist(), strict=True):  # an environment each
        total = 0.0
        for reward, ended in zip(rewards, done, strict=True):
            total += reward
            if ended:
                returns.append(total)
                total = 0.0
    assert len(returns) > 0
    assert run.history["sampled_return"][-1] == pytest.approx(np.mean(returns))


@pytest.mark.parametrize("script", [ppo, pong])
def test_explained_variance_against_an_oracle(script, monkeypatch):
    judged = recorded(script, "gae", monkeypatch, lambda args, advantages: (advantages.numpy(), args[1].numpy()))
    session = cartpole_session(2) if script is ppo else small_session(script)  # in which it is far from 0
    run = script.train(small_args(script, updates=3, eval_every=1), session)
    advantages, values = judged[-1]
    expected = 1 - np.var(advantages) / np.var(advantages + values)
    assert abs(expected) > 0.01
    assert run.history["explained_variance"][-1] == pytest.approx(expected, abs=1e-4)


def test_observations_of_two_dimensions_and_integers():
    assert ppo.train(small_args(ppo), native("Shaped", 2, Contract((2, 3), 2, "uint8"))).update == 1


def test_a_row_is_the_mean_of_the_updates_since_the_row_before(monkeypatch):
    losses = recorded(ppo, "ppo_loss", monkeypatch)
    args = small_args(ppo, updates=4, update_epochs=2, num_minibatches=2, eval_every=2)
    history = ppo.train(args, cartpole_session(2)).history
    infos = [info for _, info in losses]
    for name in infos[0]:
        values = [float(info[name]) for info in infos]
        assert history[name][1:] == pytest.approx([np.mean(values[:8]), np.mean(values[8:])])


def test_the_sampled_return_of_episodes_longer_than_a_rollout():
    class Five:
        """Episodes of five steps; those of the first pay 1 each, of the second 2, of the third 3."""

        paid = 0.0

        def reset(self, seed=None):
            self.t, self.paid = 0, self.paid + 1
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            return np.zeros(1, np.float32), self.paid, self.t == 5, False, {}

    args = small_args(ppo, updates=8, num_steps=2, eval_every=4)
    run = ppo.train(args, NativeSession([Five(), Five()], Contract((1,), 2)))
    assert run.history["sampled_return"][1:] == [5.0, 12.5]  # one episode within 8 steps, two more within 16


@pytest.mark.parametrize("script", [ppo, pong])
@pytest.mark.parametrize("anneal", [True, False])
def test_annealing_lets_the_learning_rate_fall_and_pongs_entropy_bonus_faster(script, anneal, monkeypatch):
    rates = recorded(torch.optim.Adam, "step", monkeypatch, lambda args, _: args[0].param_groups[0]["lr"])
    bonuses = recorded(script, "ppo_loss", monkeypatch, lambda args, _: args[-1])
    torch.set_num_threads(2)
    flags = {"updates": 4, "anneal_lr": anneal, "learning_rate": 0.008, "ent_coef": 0.512, "update_epochs": 1}
    flags["eval_every"] = 2
    run = script.train(small_args(script, **flags), small_session(script))
    assert rates == pytest.approx([0.008, 0.006, 0.004, 0.002] if anneal else [0.008] * 4)
    assert run.history["learning_rate"][1:] == pytest.approx([0.007, 0.003] if anneal else [0.008] * 2)
    cubes = script is pong and anneal
    assert bonuses == pytest.approx([0.512, 0.216, 0.064, 0.008] if cubes else [0.512] * 4)
    assert torch.get_num_threads() == 1  # set by train


class Rising:
    """Episodes of two steps: the second makes up for the first, and pays what the episode is to return."""

    def __init__(self, *returns):
        self.returns = iter(returns)

    def reset(self, seed=None):
        self.t, self.paid = 0, next(self.returns, 0)
        return np.zeros(2, np.uint8), {}

    def step(self, action):
        self.t += 1
        paid = -5 if self.t == 1 else 5 + self.paid  # an evaluation ends after -5
        return np.zeros(2, np.uint8), paid, self.t == 2, False, {}


def rising_session(*returns):
    contract = Contract((2,), 2, "uint8")
    return NativeSession([Rising(*returns), Rising(*returns)], contract, frame_stack=3, append_action=True)


RISING = {"num_steps": 2, "eval_every": 1, "update_epochs": 1, "learning_rate": 0.01}  # an episode an update


@pytest.mark.parametrize(("goal", "shares"), [(10, [1, 1, 1, 0.5, 0.25]), (None, [1] * 5), (-1, [1] * 5)])
def test_pongs_learning_rate_falls_sooner_near_the_goal(goal, shares, monkeypatch):
    rates = recorded(torch.optim.Adam, "step", monkeypatch, lambda args, _: args[0].param_groups[0]["lr"])
    args = small_args(pong, updates=5, solved_return=goal, **RISING)
    run = pong.train(args, rising_session(0, 5, 8, 9.75, 10))
    assert run.history["sampled_return"][1:] == [0, 5, 8, 9.75, 10]
    assert rates == pytest.approx(0.01 * np.array([1, 0.8, 0.6, 0.4, 0.2]) * shares)


def test_how_near_the_goal_is_the_first_row_after_resume_does_not_say(monkeypatch):
    rates = recorded(torch.optim.Adam, "step", monkeypatch, lambda args, _: args[0].param_groups[0]["lr"])
    args = small_args(pong, updates=2, solved_return=10, **RISING)
    pong.train(args, rising_session(0, 5))
    run = pong.train(dataclasses.replace(args, updates=6, resume=True), rising_session(8, 9.75, 10, 10))
    assert run.history["sampled_return"][1:] == [0, 5, 8, 9.75, 10, 10]
    left = 1 - np.array([0 / 2, 1 / 2, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert rates == pytest.approx(0.01 * left * [1, 1, 1, 1, 0.25, 0.25])  # the 8 alone would make it a half


@pytest.mark.parametrize("script", [ppo, pong])
def test_where_all_episodes_are_alike_a_resumed_run_is_the_whole_one(script, monkeypatch):
    class Two:
        """Two steps: every rollout ends with an episode, as a new session begins with one."""

        def reset(self, seed=None):
            self.t = 0
            return np.zeros(2, np.uint8), {}

        def step(self, action):
            self.t += 1
            return np.array([200 * action, self.t], np.uint8), -float(action), self.t == 2, False, {}

    def session():
        shown = {} if script is ppo else {"frame_stack": 3, "append_action": True}
        return NativeSession([Two(), Two()], Contract((2,), 2, "uint8"), **shown)

    def interrupted(*each):
        calls.append(each)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*each)

    args, calls, original = small_args(script, updates=4, anneal_lr=True), [], script.collect_rollout
    whole = script.train(args, session()).snapshot
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(script, "collect_rollout", interrupted)
        script.train(args, session())
    resumed = script.train(dataclasses.replace(args, resume=True), session()).snapshot
    for name in "update", "env_steps", "actor", "critic", "optimizers", "rng":
        assert same(resumed[name], whole[name]), name


def test_a_schedule_goes_on_after_resume(monkeypatch):
    rates = recorded(torch.optim.Adam, "step", monkeypatch, lambda args, _: args[0].param_groups[0]["lr"])
    args = small_args(ppo, updates=2, anneal_lr=True, learning_rate=0.008, update_epochs=1)
    ppo.train(args, cartpole_session(2))
    ppo.train(dataclasses.replace(args, updates=4, resume=True), cartpole_session(2))
    assert rates == pytest.approx([0.008, 0.004, 0.004, 0.002])


def test_optimizers_without_decorators_compute_the_same(monkeypatch):
    def weights_after_five_steps():
        weights = [torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
        optimizer = torch.optim.Adam([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.3}], lr=0.1, eps=1e-5)
        for k in range(5):
            optimizer.zero_grad()
            (weights[0] * weights[1] ** 2 * (k + 1)).sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        return torch.cat(weights)

    expected = weights_after_five_steps()
    for owner in torch.optim.Optimizer, torch.optim.Adam:
        for name in "add_param_group", "zero_grad", "state_dict", "load_state_dict", "step":
            monkeypatch.setattr(owner, name, getattr(owner, name))  # so that it comes back
    ppo.undecorate_optimizers()
    assert torch.equal(weights_after_five_steps(), expected)


def test_muon_is_for_matrices_that_have_a_gradient():
    layer = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="give all other weights to Adam"):
        pong.Muon(layer.parameters())
    frozen = torch.nn.Parameter(torch.ones(2, 2))
    muon = pong.Muon([{"params": [layer.weight, frozen]}])
    before = layer.weight.detach().clone()
    layer(torch.ones(3)).sum().backward()
    muon.step()
    assert frozen.eq(1).all()
    assert layer.weight.ne(before).all()


def test_muon_takes_a_step_that_is_about_equally_long_in_all_directions():
    """Against torch.optim.Muon, and numpy's singular value decomposition: of a gradient U S V', a step follows U V'.

    Columns without a gradient, of inputs that never change, stay, and the others move further.
    """
    for shape, used in ((128, 268), 268), ((128, 268), 72), ((128, 128), 128), ((60, 20), 20):
        matrices = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(2)]
        optimizers = [
            pong.Muon([{"params": [matrices[0]], "lr": 0.1}]),
            torch.optim.Muon([matrices[1]], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        ]
        for seed in range(3):
            gradient = np.random.default_rng(seed).normal(size=shape)
            gradient[: shape[0] // 4] *= 0.1  # directions that few samples ask for
            gradient[:, used:] = 0
            for matrix, optimizer in zip(matrices, optimizers, strict=True):
                matrix.grad = torch.from_numpy(gradient).float()
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
            ours, theirs = (matrix.detach().double().numpy() for matrix in matrices)
            assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs)  # theirs has two digits (bfloat16)
            if seed == 0:
                assert not ours[:, used:].any()
                ours = ours[:, :used]
                left, lengths, right = np.linalg.svd(gradient[:, :used], full_matrices=False)
                step = 0.1 * (0.3 if used == 72 else 0.2)  # of the rate, which is 0.1
                assert 0.75 * step < np.sqrt(np.square(ours).mean()) < 1.25 * step
                assert -(ours * (left @ right)).sum() > 0.95 * np.linalg.norm(ours) * np.linalg.norm(left @ right)
                polynomial = lengths / np.linalg.norm(gradient)
                for _ in range(5):
                    polynomial = 3.4445 * polynomial - 4.775 * polynomial**3 + 2.0315 * polynomial**5
                expected = left @ np.diag(polynomial) @ right * -0.1 * 0.2 * math.sqrt(max(shape))
                assert np.allclose(ours, expected, rtol=0, atol=1e-6)


def test_evaluation_is_greedy_and_every_environment_counts_once():
    stay = Constant(0, 0.001, 0)  # prefers action 1, by a hair: sampling would often take another
    with native("Counting", 2, Contract((2,), 3)) as session:
        assert ppo.evaluate(session, stay, seed=0, max_steps=100).tolist() == [33.0, 33.0]  # three steps of episode 1
        session._envs[0].episode = 1
        # Environment 0 plays episode 2, of two steps; what it does while the other plays its third is not counted.
        session._envs[1].episode = 2
        assert ppo.evaluate(session, stay, seed=0, max_steps=100).tolist() == [2 * 21.0, 3 * 31.0]
        assert ppo.evaluate(session, stay, seed=0, max_steps=1)[1] == 51.0  # cut short

    class Once:
        """Pays 1 for its first step, and something absurd ever after."""

        def reset(self, seed=None):
            self.pay, self.steps = (-math.inf, 0) if seed is None else (1.0, seed)
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.steps -= 1
            return np.zeros(1, np.float32), self.pay, self.steps <= 0, False, {}

    with NativeSession([Once(), Once()], Contract((1,), 3, check_reward_finite=False)) as session:
        assert ppo.evaluate(session, stay, seed=1, max_steps=9).tolist() == [1.0, 2.0]


def test_a_new_actor_is_undecided_and_the_weights_are_orthogonal():
    actor, critic = networks()
    observations = torch.randn(100, 4)
    probabilities = actor(observations).softmax(-1)
    assert (probabilities - 0.5).abs().max() < 0.02
    assert critic(observations).shape == (100,)
    for net, outputs, last_gain in (actor.net, 2, 0.01), (critic.net, 1, 1.0):
        shapes = [tuple(weights.shape) for weights in net.parameters()]
        assert shapes == [(64, 4), (64,), (64, 64), (64,), (outputs, 64), (outputs,)]
        for k, gain in (1, math.sqrt(2)), (3, math.sqrt(2)), (5, last_gain):
            small = net[k].weight if net[k].weight.shape[0] <= net[k].weight.shape[1] else net[k].weight.T
            assert torch.allclose(small @ small.T, gain**2 * torch.eye(len(small)), atol=1e-5)  # orthogonal
            assert not net[k].bias.any()
        hidden = (observations @ net[1].weight.T).tanh() @ net[3].weight.T
        assert torch.allclose(net(observations), hidden.tanh() @ net[5].weight.T, atol=1e-5)


# ------------------------------------------------------------------------------------------------- what Pong changes


def test_the_scripts_share_all_but_what_pong_changes():
    """What is tested on one script holds for the other, because it is the same text."""
    changed = {"Args", "Actor", "Critic", "mlp", "open_session", "train"}
    names = [name for name, value in vars(ppo).items() if getattr(value, "__module__", "") == ppo.__name__]
    assert {"gae", "ppo_loss", "collect_rollout", "evaluate", "Rollout", "Run", "watch", "main"} <= set(names) - changed
    for name in set(names) - changed:
        assert inspect.getsource(getattr(ppo, name)) == inspect.getsource(getattr(pong, name)), name
    own = {"CORES", "FRAME_STACK", "InputLinear", "Inputs", "Muon", "orthogonalize", "goal_factor"}
    assert vars(pong).keys() ^ vars(ppo).keys() == own
    ours, theirs = ({field.name: field.type for field in dataclasses.fields(script.Args)} for script in (ppo, pong))
    added = {"critic_learning_rate": "float", "cut_at_reward": "bool | None", "leniency": "float | None"}
    assert theirs == {**ours, **added}


@given(seed=st.integers(0, 2**31), rollouts=st.integers(1, 3), constant=st.booleans())
@settings(deadline=None, max_examples=30)
def test_input_scaling_against_numpy(seed, rollouts, constant):
    """Mean and deviation in one piece from everything seen; differences of bytes, sines and cosines counted out."""
    rng = np.random.default_rng(seed)
    size = 3
    batches = [rng.integers(0, 256, (int(rng.integers(2, 6)), 2, 3, size), np.uint8) for _ in range(rollouts)]
    for batch in batches:
        batch[..., 0] = 7 if constant else batch[..., 0]
    inputs = pong.Inputs((3, size))
    assert inputs(torch.from_numpy(batches[0]))[0].shape == (*batches[0].shape[:2], 0)  # nothing is known yet
    for batch in batches:
        inputs.update(torch.from_numpy(batch))

    def features(observation):
        first, second, third = observation.tolist()
        pairs = [*zip(first, second, strict=True), *zip(second, third, strict=True)]
        turns = [math.tau * byte / period for period in (128, 64, 32) for byte in third]
        changes = [(after - before + 128) % 256 - 128 for before, after in pairs]
        return [*third, *changes, *map(math.sin, turns), *map(math.cos, turns)]

    seen = np.array([features(o) for batch in batches for o in batch.reshape(-1, 3, size)])
    std = seen.std(0)
    asked = rng.integers(0, 256, (4, 3, size), np.uint8)
    known = std > 1e-4  # the values of a byte may lie whole periods apart, but for rounding
    values = [len({o[-1, k] for batch in batches for o in batch.reshape(-1, 3, size)}) for k in range(size)]
    known[3 * size :] &= np.tile(np.array(values) > 2, 6)  # of two values a sine would say the same
    raw = np.array([features(o) for o in asked])
    expected = np.where(known, (raw - seen.mean(0)) / np.where(known, std, 1), 0).clip(-5, 5)
    result, places = inputs(torch.from_numpy(asked))
    assert result.dtype == torch.float32
    whole = torch.zeros(4, inputs.size).index_copy(1, places.long(), result)  # what is not shown is 0
    np.testing.assert_allclose(whole.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert places.tolist() == known.nonzero()[0].tolist()
    assert not constant or (places % size != 0).all()


def test_inputs_are_stacks_of_bytes():
    for shape in (128,), (1, 128):
        with pytest.raises(ValueError, match="give the session a frame_stack"):
            pong.Inputs(shape)
    inputs = pong.Inputs((3, 2))
    with pytest.raises(TypeError, match="must be bytes"):
        inputs(torch.zeros(4, 3, 2))
    for shape in (4, 2, 3), (4, 2, 2), (4, 3, 1), (4, 3, 4), (6,):  # else they would be looked up in other rows
        for call in inputs, inputs.update:
            with pytest.raises(ValueError, match=re.escape(f"must be (..., 3, 2), not {shape}")):
                call(torch.zeros(shape, dtype=torch.uint8))


def test_inputs_are_clipped_at_five_deviations():
    """Of a hundred bytes 0 and one 255, that one."""
    inputs = pong.Inputs((2, 1))
    seen = torch.zeros(101, 2, 1, dtype=torch.uint8)
    seen[0] = 255
    inputs.update(seen)
    assert inputs(seen)[0][:2, 0].tolist() == [5.0, pytest.approx(-0.1)]


def test_inputs_are_scaled_by_what_was_acted_on(monkeypatch):
    """So in the first update all of them are 0, and only the biases of the outputs learn."""
    rollouts = recorded(pong, "collect_rollout", monkeypatch)
    torch.set_num_threads(1)  # as train does: two make other orthogonal matrices, by rounding
    torch.manual_seed(1)
    new = pong.Actor((3, 4), 2), pong.Critic((3, 4))
    run = pong.train(small_args(pong), small_session(pong))
    for before, network in zip(new, (run.actor, run.critic), strict=True):
        first, second, third = rollouts[0].observations.flatten(0, 1).unbind(1)
        for counts, values in zip(network.inputs.counts, (third, second - first, third - second), strict=True):
            assert torch.equal(counts, torch.stack([values[:, k].bincount(minlength=256) for k in range(4)]))
        moved = [name for name, weights in before.named_parameters() if not weights.equal(network.get_parameter(name))]
        assert moved == ["net.2.bias"]
    assert run.actor.inputs is run.critic.inputs


@pytest.mark.parametrize("shape", [(5, 3), (7,), ()])
@pytest.mark.parametrize("places", [[], [1, 3], [0, 1, 2, 3]])
def test_a_layer_of_the_inputs_that_are_shown_is_the_whole_layer_with_zeros_for_the_others(shape, places):
    """Against nn.Linear, outputs and gradients."""
    lean, whole = pong.InputLinear(4, 6), torch.nn.Linear(4, 6)
    whole.load_state_dict(lean.state_dict())
    inputs, places = torch.randn(*shape, len(places)), torch.tensor(places, dtype=torch.int32)
    padded = torch.zeros(*shape, 4).index_copy(-1, places.long(), inputs)
    outputs, expected = lean((inputs, places)), whole(padded)
    torch.testing.assert_close(outputs, expected)
    (outputs**2).sum().backward()
    (expected**2).sum().backward()
    for name in "weight", "bias":
        torch.testing.assert_close(lean.get_parameter(name).grad, whole.get_parameter(name).grad)
    with torch.no_grad():
        lean.weight[:, [place for place in range(4) if place not in places]] = math.nan
    assert lean((inputs, places)).isfinite().all()  # what is left out is not even looked at


def test_a_network_of_float64_computes_what_one_of_float32_does():
    actor = pong.Actor((2, 4), 3)
    observations = torch.randint(256, (9, 2, 4), dtype=torch.uint8)
    actor.inputs.update(observations)
    expected = actor(observations)
    logits = actor.double()(observations)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), expected)


@pytest.mark.skipif(gym_bridge.CORES < 2, reason="needs two cores")
def test_torch_takes_a_second_thread_only_while_the_emulators_rest(monkeypatch):
    threads = {
        name: recorded(pong, name, monkeypatch, lambda *_: torch.get_num_threads())
        for name in ("collect_rollout", "ppo_loss", "evaluate")
    }
    torch.set_num_threads(2)
    pong.train(small_args(pong), small_session(pong))
    assert {name: set(numbers) for name, numbers in threads.items()} == {
        "collect_rollout": {1},
        "ppo_loss": {2},
        "evaluate": {1},
    }


@pytest.mark.skipif(not list(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="torch has other threads here")
@pytest.mark.parametrize(("given", "expected"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_are_told_how_long_to_wait_awake(given, expected):
    """What GNU's OpenMP says for itself: it reads the variable once, when torch loads it."""
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    env |= {"OMP_DISPLAY_ENV": "verbose", **given}
    command = [sys.executable, "-c", "import ppo_pong_ram"]
    done = run(command, env=env, cwd=HERE, check=True)
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


def test_pongs_new_actor_is_undecided_and_the_weights_are_orthogonal():
    actor, critic = pong.Actor((2, 134), 6), pong.Critic((2, 134))
    hidden = [(128, 8 * 134), (128,), (128,), (128,), (128, 128), (128,), (128,), (128,)]
    for net, outputs, gain in (actor.net, 6, 0.01), (critic.net, 1, 1.0):
        assert [tuple(weights.shape) for weights in net.parameters()] == [*hidden, (outputs, 128), (outputs,)]
        for layer, expected in (net[0][0], math.sqrt(2)), (net[1][0], math.sqrt(2)), (net[2], gain):
            assert torch.allclose(layer.weight @ layer.weight.T, expected**2 * torch.eye(len(layer.weight)), atol=1e-5)
            assert not layer.bias.any()
        units = net[:2]((torch.randn(100, 8 * 134), torch.arange(8 * 134)))
        assert (units >= 0).all()
        assert units.max() > 1.5  # ReLU
    observations = torch.randint(0, 256, (100, 2, 134), dtype=torch.uint8)
    assert not actor(observations).any()  # nothing is known of the inputs yet, and so nothing is shown
    actor.inputs.update(observations)
    assert (actor(observations).softmax(-1) - 1 / 6).abs().max() < 0.02


def test_input_statistics_are_saved_and_no_parameters():
    actor = pong.Actor((3, 134), 6)
    actor.inputs.update(torch.randint(0, 256, (50, 3, 134), dtype=torch.uint8))
    twin = pong.Actor((3, 134), 6)
    twin.load_state_dict(actor.state_dict())
    observations = torch.randint(0, 256, (5, 3, 134), dtype=torch.uint8)
    assert torch.equal(actor(observations), twin(observations))
    assert (twin.inputs.counts.sum(-1) == 50).all()
    assert not any("inputs" in name for name, _ in actor.named_parameters())


def test_all_of_pongs_rates_fall(monkeypatch):
    def rates_of_both(args, _):
        return [group["lr"] for group in args[0].param_groups]

    rates = {kind: recorded(kind, "step", monkeypatch, rates_of_both) for kind in (torch.optim.Adam, pong.Muon)}
    flags = {"update_epochs": 1, "learning_rate": 0.1, "critic_learning_rate": 0.4}
    pong.train(small_args(pong, updates=5, **flags), small_session(pong))
    for optimizer, actor_rate in (torch.optim.Adam, 0.1), (pong.Muon, 0.2):
        falling = [[actor_rate * left, 0.4 * left] for left in (1, 0.8, 0.6, 0.4, 0.2)]
        assert rates[optimizer] == [pytest.approx(each) for each in falling]


@pytest.mark.parametrize("which", ["actor", "critic"])
def test_pongs_networks_have_a_rate_each(which):
    """One whose rate is next to nothing stays as it is; of the other all weights move."""
    torch.manual_seed(1)
    before = {"actor": pong.Actor((3, 4), 2).state_dict(), "critic": pong.Critic((3, 4)).state_dict()}
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    rates["critic_learning_rate" if which == "actor" else "learning_rate"] = 1e-30
    after = pong.train(small_args(pong, updates=2, **rates), small_session(pong)).snapshot
    for network, state in before.items():
        for name, weights in state.items():
            if "inputs" not in name:
                moved = (weights - after[network][name]).abs().max() > 1e-5
                assert moved == (network == which), f"{network} {name}"


@pytest.mark.parametrize("default", [False, True], ids=["another game", "Pong"])
@pytest.mark.parametrize("cut", [None, True, False])
def test_pongs_credit_ends_at_a_reward(cut, default, monkeypatch):
    rollouts = recorded(pong, "collect_rollout", monkeypatch)
    judged = recorded(pong, "gae", monkeypatch, lambda args, _: args[3:5])
    if default:
        monkeypatch.setattr(pong, "ENV_ID", "Small")  # what small_args says
    pong.train(small_args(pong, cut_at_reward=cut, solved_return=1e8), small_session(pong))
    (rollout,), ((terminated, truncated),) = rollouts, judged
    cuts = default if cut is None else cut
    assert terminated.equal(rollout.terminated | ((rollout.rewards != 0) & cuts))
    assert truncated.equal(rollout.truncated)
    assert (rollout.rewards[~rollout.done] != 0).any()
    assert rollout.terminated.any()
    assert rollout.truncated.any()


@pytest.mark.parametrize(("anneal", "kept"), [(True, [0.6, 0.7, 0.8, 0.9]), (False, [0.6, 0.6, 0.6, 0.6])])
def test_pong_forgives_less_and_less_of_a_loss(anneal, kept, monkeypatch):
    rollouts = recorded(pong, "collect_rollout", monkeypatch)
    judged = recorded(pong, "gae", monkeypatch, lambda args, _: args[0])
    monkeypatch.setattr(Bytes, "step", lambda self, action: (self.reset()[0], [2.0, -3.0][action], False, False, {}))
    run = pong.train(small_args(pong, updates=4, leniency=0.4, anneal_lr=anneal), small_session(pong))
    assert {reward for rollout in rollouts for reward in rollout.rewards.flatten().tolist()} == {2.0, -3.0}
    for rollout, rewards, share in zip(rollouts, judged, kept, strict=True):
        assert torch.allclose(rewards, torch.where(rollout.rewards > 0, 2.0, -3.0 * share))
    assert run.episode_returns.sum() == sum(rollout.rewards.sum() for rollout in rollouts)  # the log's are as they were
    with pytest.raises(ValueError, match=r"--leniency must lie in 0 \.\. 1, not 1\.5"):
        pong.Args(leniency=1.5)


@pytest.mark.parametrize(("default", "kept"), [(False, 1), (True, 0.4)], ids=["another game", "Pong"])
def test_unless_told_otherwise_pong_forgives_losses_in_pong_alone(default, kept, monkeypatch):
    rollouts = recorded(pong, "collect_rollout", monkeypatch)
    judged = recorded(pong, "gae", monkeypatch, lambda args, _: args[0])
    if default:
        monkeypatch.setattr(pong, "ENV_ID", "Small")  # what small_args says
    pong.train(small_args(pong, solved_return=1e8), small_session(pong))
    assert (rollouts[0].rewards < 0).any()
    assert torch.allclose(judged[0], kept * rollouts[0].rewards)  # Bytes pays 0 or -1


def test_pong_learns():
    """To say of a byte whether it is above 127; every episode is one guess."""

    class Above:
        def reset(self, seed=None):
            self.random = self.random if seed is None else np.random.default_rng(seed)
            self.byte = self.random.integers(256, dtype=np.uint8)
            return np.array([self.byte]), {}

        def step(self, action):
            return np.array([self.byte]), float(action == (self.byte > 127)), True, False, {}

    shown = {"frame_stack": 2, "append_action": True}
    session = NativeSession([Above() for _ in range(8)], Contract((1,), 2, "uint8"), **shown)
    args = pong.Args(env_id="Above", num_envs=8, num_steps=64, updates=12, num_minibatches=4, eval_episodes=100)
    run = pong.train(args, session)
    assert run.history["avg_return"][0] < 0.7
    assert run.history["avg_return"][-1] > 0.9


PONG_SHORT = ["--eval-every", "2", "--eval-episodes", "2", "--eval-max-steps", "20", "--num-envs", "4"]
PONG_SHORT += ["--num-steps", "32"]


def test_pong_from_the_command_line_and_resumed(monkeypatch):
    """Two updates on the real emulator, then a third after --resume."""
    done = run_script("--seed", "5", "--updates", "2", *PONG_SHORT, script="ppo_pong_ram.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.match(
        r"not solved: ALE/Pong-v5, greedy return -?[\d.]+ ± [\d.]+ over 30 fresh", done.stdout.split("\n")[-2]
    )
    log = read_log("data/rl/ppo_pong_ram_trainlog.json")
    assert (log["title"], log["steps"]) == ("PPO on ALE/Pong-v5, seed 5", [0, 2])
    assert "version_ale_py" in notes(log)
    one_worker = ["--num-workers", "1", "--log", "again.json", "--checkpoint", "again.pt"]
    monkeypatch.setattr(pong, "FINAL_EPISODES", 1)  # 30 games take long to start
    pong.train(tyro.cli(pong.Args, args=["--seed", "5", "--updates", "2", *PONG_SHORT, *one_worker]))
    assert read_log("again.json")["series"] == log["series"]  # the seed fixes the numbers, whoever hosts the games
    state = torch.load("data/rl/ppo_pong_ram.pt", weights_only=True)
    assert (state["actor"]["inputs.counts"].sum(-1) == 256).all()
    for name in "inputs.counts", "inputs.table", "inputs.used":
        assert torch.equal(state["actor"][name], state["critic"][name])

    again = pong.stored_args(pong.Args(log=Path("again.json"), checkpoint=Path("again.pt")))
    pong.train(dataclasses.replace(again, resume=True, updates=3))
    after = torch.load("again.pt", weights_only=True)
    assert (after["update"], after["env_steps"]) == (3, 384)
    assert (after["actor"]["inputs.counts"].sum(-1) == 384).all()
    assert after["history"]["avg_return"][:2] == state["history"]["avg_return"]
    muon, adam = (optimizer["state"] for optimizer in after["optimizers"])
    assert [moments.keys() for moments in muon.values()] == [{"momentum_buffer"}] * 4
    shapes = [tuple(moments["momentum_buffer"].shape) for moments in muon.values()]
    assert shapes == [(128, 8 * 134), (128, 128)] * 2  # the matrices of the hidden layers
    assert [moments["step"] for moments in adam.values()] == [3 * 24] * 16
    assert after["optimizers"][1]["param_groups"][0]["eps"] == 1e-5
    muon[0]["momentum_buffer"] = torch.zeros(1)
    torch.save(after, "damaged.pt")
    with pytest.raises(pong.BadInput, match=r"^damaged\.pt does not fit"):
        pong.train(dataclasses.replace(again, resume=True, updates=4, checkpoint=Path("damaged.pt")))

    done = run_script("--resume", "--checkpoint", "data/rl/ppo_pong_ram.pt")
    assert done.returncode == 2
    assert "is not a checkpoint of ppo_cartpole.py" in done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can be taken away on Linux only")
def test_pong_has_a_worker_for_each_core_up_to_four():
    """On one core of however many, one worker."""
    assert pong.Args().num_workers == min(4, len(os.sched_getaffinity(0)))
    code = "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); import ppo_pong_ram as pong; "
    code += "print(pong.Args().num_workers)"
    assert run([sys.executable, "-c", code], cwd=HERE).stdout == "1\n"


def test_pong_is_held_to_bytes_and_single_points():
    """The contract is what the environment declares, with the reward that Pong promises."""
    declared = Contract.from_env(pong.ENV_ID, pong.MAKE_KWARGS)
    assert dataclasses.replace(declared, reward_range=(-1.0, 1.0)) == pong.CONTRACT
    with pong.open_session(pong.Args(), 2) as session:
        assert session.contract == pong.CONTRACT
        assert session.obs_shape == (2, 134)  # as in the legend of the script
        rewards = set()
        session.reset(1)
        for _ in range(120):
            rewards |= set(session.step([0, 3]).reward.tolist())
        assert rewards == {0.0, -1.0}  # nobody moves: the computer scores


def test_cartpole_is_held_to_its_reward():
    with ppo.open_session(ppo.Args(), 1) as session:
        assert session.contract == ppo.CONTRACT
    assert ppo.CONTRACT.reward_range == (0.0, 1.0)


@pytest.mark.parametrize("script", [ppo, pong], ids=["cartpole", "pong"])
def test_what_an_environment_is_made_with_reaches_it(script):
    """--watch says so what it wants to see."""
    with pytest.raises(BridgeError, match="argument 'nonsense'"):
        script.open_session(script.Args(), 1, nonsense=1).reset()


@pytest.mark.parametrize(("name", "shown"), [("Odd", "float32 of shape (2,)"), ("Shaped", "uint8 of shape (2, 3)")])
def test_pong_wants_a_vector_of_bytes(name, shown, monkeypatch):
    monkeypatch.setattr(pong, "MAKE_KWARGS", {})  # no obs_type: these are no games of Atari
    with pytest.raises(pong.BadInput, match=re.escape(f"odd_envs:{name}-v0 shows {shown}: this script wants a vector")):
        pong.open_session(pong.Args(env_id=f"odd_envs:{name}-v0"), 1)


@pytest.mark.parametrize(("script", "message"), [(ppo, "too large for these networks"), (pong, "at most 10,000 bytes")])
def test_up_to_10_000_inputs(script, message, monkeypatch):
    for size in 10_000, 10_001:
        monkeypatch.setattr(script, "MAKE_KWARGS", {"shape": [size]})
        with pytest.raises(script.BadInput, match=message) if size > 10_000 else contextlib.nullcontext():
            script.open_session(script.Args(env_id="odd_envs:Shaped-v0"), 1).close()


def test_another_atari_game_needs_no_change(monkeypatch, capsys):
    monkeypatch.setattr(pong, "FINAL_EPISODES", 2)  # games take long to start
    pong.train(tyro.cli(pong.Args, args=["--env-id", "ALE/Breakout-v5", "--updates", "1", *PONG_SHORT]))
    assert "finished: ALE/Breakout-v5, greedy return" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "CartPole-v1"], "unexpected keyword argument 'obs_type'"),
        (["--server-command", f"{sys.executable} no_ale.py"], "pip install ale-py"),
    ],
    ids=["no Atari game", "no ale-py"],
)
def test_pong_needs_an_atari_game_and_ale_py(workplace, flags, message):
    without_ale = f"""
        import runpy, sys
        sys.modules["ale_py"] = None  # what `import ale_py` then says is what a Python without it says
        sys.path.insert(0, {str(HERE)!r})
        runpy.run_path({str(HERE / "gym_bridge.py")!r}, run_name="__main__")
    """
    (workplace / "no_ale.py").write_text(textwrap.dedent(without_ale))
    done = run_script(*flags, script="ppo_pong_ram.py")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------------- training


def test_it_learns():
    """From a session in this process, default arguments: at least 475 over 100 fresh greedy episodes."""
    run = ppo.train(ppo.Args(seed=11), cartpole_session(8))
    assert run.solved
    assert run.final_returns.shape == (100,)
    assert run.final_returns.mean() >= 475
    assert run.history["avg_return"][0] < 475


SHORT = ["--updates", "4", "--eval-every", "2", "--eval-episodes", "3", "--eval-max-steps", "50"]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """One short run from the command line that several tests look at."""
    folder = tmp_path_factory.mktemp("short_run")
    return folder, run([sys.executable, str(HERE / "ppo_cartpole.py"), "--seed", "3", *SHORT], cwd=folder)


def test_what_a_run_shows(short_run):
    folder, done = short_run
    assert len(list((folder / "data/rl").iterdir())) == 3
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines.pop(0) == "PPO on CartPole-v1, seed 3: starting 8 environments"
    assert lines.pop(-2) == "playing 100 fresh episodes"
    assert [line.split("  ")[0] for line in lines[:-1]] == ["update 0/4", "update 2/4", "update 4/4"]
    for word in "steps", "/s", "0:0", "left", "sampled", "greedy", "KL", "entropy":
        assert word in lines[1]
    assert "  sampled -  " in lines[0]
    assert "nan" not in done.stdout
    assert re.match(r"not solved: CartPole-v1, greedy return [\d.]+ ± [\d.]+ over 100 fresh episodes", lines[-1])
    assert "1,024 environment steps" in lines[-1]
    assert "data/rl/ppo_cartpole.pt" in lines[-1]


def test_speed_is_counted_from_the_first_rollout(monkeypatch):
    began = recorded(ppo.Run, "start_clock", monkeypatch, lambda args, _: args[0].rows[:])
    ppo.train(small_args(ppo), cartpole_session(2))
    assert began == [[], [0]]  # when the run is made, and once more after the evaluation before training


def test_the_progress_line_counts_all_environments(capsys, monkeypatch):
    run = ppo.train(ppo.Args(updates=2, eval_episodes=1, eval_max_steps=1), cartpole_session(8))
    run.args = dataclasses.replace(run.args, updates=102)  # 100 * 32 * 8 steps to go, at 100 steps a second
    monkeypatch.setattr(ppo, "time", SimpleNamespace(perf_counter=lambda: 10.0))
    run.began, run.began_steps = 0.0, run.env_steps - 1000
    run.recent["sampled_return"] += [123.0, 125.0]  # since the row before
    run.print_line()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("update 2/102  512 steps  100/s  4:16 left  sampled 124.0  ")
    assert notes(run.train_log(0.0))["steps_per_second"] == "100"


def on_a_terminal(columns, *flags, ctrl_c_after="never"):
    """What ppo_cartpole.py shows there, and its exit code."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, str(HERE / "ppo_cartpole.py"), *flags]
    streams = {"stdin": subprocess.DEVNULL, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(command, env=environment, **streams) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # which is how Linux says that it was all
            while chunk := os.read(ours, 9999):
                if ctrl_c_after.encode() in shown + chunk and ctrl_c_after.encode() not in shown:
                    process.send_signal(signal.SIGINT)
                shown += chunk
    os.close(ours)
    return shown.decode(), process.returncode


def test_ctrl_c_on_a_terminal_leaves_the_last_line_whole():
    shown, code = on_a_terminal(
        80, *SHORT[2:], "--updates", "9999", "--solved-return", "9999", ctrl_c_after="update 3/"
    )
    assert code == 130
    last, saved, interrupted = shown.split("\r\x1b[K")[-1].splitlines()
    assert re.match(r"update \d+/9999  ", last)
    assert saved.startswith("saved everything up to update ")
    assert interrupted == "ppo_cartpole.py: interrupted"


@pytest.mark.parametrize("columns", [30, 60, 80])
def test_a_terminal_shows_one_line_that_is_rewritten_and_never_wraps(columns):
    shown, code = on_a_terminal(columns, *SHORT)
    assert code == 0
    _, *rewritten, last = shown.split("\r\x1b[K")
    last, verdict = last.splitlines()
    assert verdict.startswith("not solved: CartPole-v1")
    assert {line[:10] for line in rewritten} >= {f"update {k}/4" for k in (0, 1, 2, 3, 4)}
    for line in (*rewritten, last):
        assert len(line) < columns
        assert columns < 80 or re.search(r"left  sampled .*KL .*entropy|playing", line)
        assert re.match(r"update \d/4  |playing 100", line), line
    assert last.startswith("update 4/4  0:00 left" if columns == 60 else "update 4/4  ")


def test_a_terminal_that_knows_no_sparkline():
    done = run_script("--updates", "1", "--eval-max-steps", "1", "--eval-episodes", "1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert " ? " in done.stdout.splitlines()[-1]


def test_what_the_log_says(short_run):
    folder, done = short_run
    log = read_log(folder / "data/rl/ppo_cartpole_trainlog.json")
    assert list(log) == ["title", "steps", "series", "notes"]
    assert log["title"] == "PPO on CartPole-v1, seed 3"
    assert log["steps"] == [0, 2, 4]
    names = (
        "avg_return sampled_return approx_kl clip_fraction entropy policy_loss value_loss explained_variance "
        "learning_rate env_steps"
    )
    assert [series["name"] for series in log["series"]] == names.split()
    for series in log["series"]:
        assert list(series) == ["name", "values", "color"]
        assert len(series["values"]) == 3
        assert all(isinstance(value, (int, float)) for value in series["values"][1:])
    by_name = {series["name"]: series["values"] for series in log["series"]}
    assert by_name["env_steps"] == [0, 512, 1024]
    assert by_name["approx_kl"][0] == "NaN"  # nothing was learned yet
    assert 0 < by_name["entropy"][1] <= math.log(2) + 1e-6
    found = notes(log)
    for argument in dataclasses.fields(ppo.Args):
        assert argument.name in found
    assert (found["seed"], found["violations"], found["device"]) == ("3", "0", "cpu")
    assert (found["environment_steps"], found["solved"]) == ("1024", "False")
    assert f"{int(found['transitions_checked']):,} transitions checked" in done.stdout
    seconds = float(re.search(r"environment steps and ([\d.]+) s, ", done.stdout)[1])
    assert seconds == pytest.approx(float(found["wall_seconds"]), abs=1)
    assert found["version_torch"] == torch.__version__
    assert "version_gymnasium" in found


def test_the_picture_is_self_contained_svg(short_run):
    from xml.etree import ElementTree

    folder, _ = short_run
    text = (folder / "data/rl/ppo_cartpole_trainlog.svg").read_text()
    words = [element.text for element in ElementTree.fromstring(text).iter() if element.text and element.text.strip()]
    for word in "PPO on CartPole-v1, seed 3", "environment steps", "return per episode", "solved: 475", "greedy policy":
        assert word in words
    assert text.count("<polyline") == 2
    assert "href" not in text


def test_the_curve_is_drawn_to_the_scale_of_its_axes():
    history = {"avg_return": [0.0, 500.0], "sampled_return": [math.nan, 100.0], "env_steps": [0, 1000]}
    picture = ppo.learning_curve(SimpleNamespace(history=history, solved_return=400.0, title="<&>"))
    assert "&lt;&amp;&gt;" in picture
    ticks = dict(re.findall(r'x="([\d.]+)" y="370" text-anchor="middle">([\d,]+)<', picture))
    assert (ticks["70.0"], ticks["690.0"]) == ("0", "1,000")
    key = re.findall(r'h24" stroke="(#\w+)".*?\n<text [^>]*>([^<]*)<', picture)
    assert key == [(ppo.SERIES["avg_return"], "greedy policy"), (ppo.SERIES["sampled_return"], "sampled, in training")]
    assert re.findall(r'<polyline points="[^"]*" stroke="(#\w+)"', picture) == [colour for colour, _ in key]
    ticks = dict(re.findall(r'y="([\d.]+)" text-anchor="end">(\d+)<', picture))
    assert (ticks["354.0"], ticks["64.0"]) == ("0", "500")  # four pixels below their lines
    assert re.findall(r'points="(.*?)"', picture) == ["70.0,350.0 690.0,60.0", "690.0,292.0"]
    assert 'd="M70 118.0h620" stroke="#666"' in picture  # solved: 400


@pytest.mark.parametrize("flags", [[], ["--num-workers", "2"]], ids=["again", "2 workers"])
def test_one_seed_fixes_the_log(short_run, flags):
    folder, _ = short_run
    ppo.train(tyro.cli(ppo.Args, args=["--seed", "3", *SHORT, *flags]))
    ours, theirs = read_log(), read_log(folder / "data/rl/ppo_cartpole_trainlog.json")
    different = {key for key, value in notes(ours).items() if value != notes(theirs)[key]}
    assert different <= {"wall_seconds", "steps_per_second", "num_workers"}
    assert {**ours, "notes": []} == {**theirs, "notes": []}


def test_another_seed_gives_another_log(short_run):
    folder, _ = short_run
    ppo.train(tyro.cli(ppo.Args, args=["--seed", "4", *SHORT]))
    ours, theirs = read_log(), read_log(folder / "data/rl/ppo_cartpole_trainlog.json")
    assert ours["series"][0] != theirs["series"][0]


def test_resume_continues_exactly_but_for_the_episodes(short_run, workplace):
    folder, _ = short_run
    checkpoint = str(folder / "data/rl/ppo_cartpole.pt")
    half = ["--checkpoint", "half.pt", "--log", "half.json"]
    half_way = ["--seed", "3", *SHORT, "--updates", "2", *half]
    run = ppo.train(tyro.cli(ppo.Args, args=half_way))
    random_state, weights = torch.get_rng_state(), run.actor.state_dict()
    checked = run.transitions_checked
    (seconds,) = (float(note.split("=")[1]) for note in read_log("half.json")["notes"] if "wall_seconds" in note)
    run = ppo.train(tyro.cli(ppo.Args, args=[*half_way, "--resume"]))  # takes all of it up, and has nothing left to do
    assert run.transitions_checked == checked  # of the evaluations, too
    assert run.seconds_before == pytest.approx(seconds, abs=0.006)  # two digits
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(weights[name], weight) for name, weight in run.actor.state_dict().items())
    done = run_script("--resume", "--updates", "4", *half)
    assert done.returncode == 0, done.stderr
    whole, resumed = (torch.load(path, weights_only=True) for path in (checkpoint, "half.pt"))
    assert (resumed["update"], resumed["env_steps"], resumed["steps"]) == (4, 1024, [0, 2, 4])
    assert resumed["args"] == {**whole["args"], "checkpoint": "half.pt", "log": "half.json", "resume": True}
    assert resumed["history"]["avg_return"][:2] == whole["history"]["avg_return"][:2]
    assert resumed["optimizers"][0]["state"][0]["step"] == whole["optimizers"][0]["state"][0]["step"]
    assert read_log("half.json")["steps"] == [0, 2, 4]


def test_a_run_that_completes_no_update_leaves_an_older_runs_files_as_they_are(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    run = ppo.train(ppo.Args(updates=1, eval_max_steps=1))
    old = [path.read_bytes() for path in run.places]
    monkeypatch.setattr(ppo, "collect_rollout", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(ppo.Args(seed=2, eval_max_steps=1))
    assert [path.read_bytes() for path in run.places] == old
    assert len(os.listdir("data/rl")) == 3
    assert capsys.readouterr().err == "nothing is saved before the first update is complete\n"


def test_evaluation_0_decides_nothing_even_where_it_has_reached_the_goal():
    assert ppo.train(tyro.cli(ppo.Args, args=[*SHORT, "--solved-return", "1"])).rows == [0, 2]


def test_the_clock_of_a_resumed_run():
    args = ppo.Args(updates=1, eval_episodes=1, eval_max_steps=1)
    ppo.train(args, cartpole_session(8))
    state = ppo.load_checkpoint(args.checkpoint)
    torch.save({**state, "seconds": 1000.0}, args.checkpoint)
    run = ppo.train(dataclasses.replace(args, resume=True), cartpole_session(8))
    assert 1000 <= run.seconds < 1060  # the seconds before count
    assert math.isnan(run.speed)  # the steps before do not, and there are no others


@pytest.mark.parametrize("script", [ppo, pong])
def test_an_update_that_is_interrupted_leaves_no_trace(script, monkeypatch):
    args = small_args(script)
    whole = script.train(args, small_session(script)).snapshot
    calls = []
    original = script.ppo_loss

    def interrupted(*each):
        calls.append(each)
        if len(calls) == args.update_epochs + 3:  # in the second update
            raise KeyboardInterrupt
        return original(*each)

    monkeypatch.setattr(script, "ppo_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.train(dataclasses.replace(args, updates=2), small_session(script))
    kept = script.load_checkpoint(args.checkpoint)
    for name in "update", "env_steps", "actor", "critic", "optimizers", "rng":
        assert same(kept[name], whole[name]), name


def test_no_episode_is_played_twice():
    """Not with another seed, nor for another purpose, nor after another update, nor after --resume."""
    seeds = []

    class Witness:
        def reset(self, seed=None):
            seeds.extend([] if seed is None else [seed])
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), 0.0, True, False, {}

    args = small_args(ppo, updates=2, eval_every=1)
    for flags in {"seed": 1}, {"seed": 2}, {"seed": 2, "resume": True, "updates": 3}:
        ppo.train(dataclasses.replace(args, **flags), NativeSession([Witness(), Witness()], Contract((1,), 2)))
    assert len(seeds) == 3 * (2 + 100) + 3 + 3 + 1  # training and verdicts; evaluations of the three runs
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**31 + 100


def test_runs_side_by_side_in_one_folder_do_not_fell_each_other(monkeypatch):
    """They overwrite each other's files, whole ones with whole ones."""
    original = os.replace

    def replace(source, target):
        monkeypatch.setattr(os, "replace", original)
        assert run_script("--updates", "1", "--eval-max-steps", "1").returncode == 0  # a whole run, just now
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert ppo.train(ppo.Args(updates=2, eval_max_steps=1)).update == 2
    assert read_log()["steps"] == [0, 2]


@pytest.mark.parametrize(
    ("healthy", "stage", "rows"), [(0, "evaluation, step 1", None), (2, "final evaluation, step 3", [0, 1])]
)
def test_an_error_in_an_evaluation_says_so(healthy, stage, rows):
    """Steps are counted since the session was opened: the two evaluations before took one each."""

    class Sick:
        """Plays a few healthy episodes."""

        episodes = 0

        def reset(self, seed=None):
            self.episodes += 1
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.full(1, math.nan if self.episodes > healthy else 0.0, np.float32), 0.0, False, False, {}

    args = ppo.Args(updates=1, num_envs=2, eval_episodes=1, eval_max_steps=1)
    contract = Contract((1,), 2)
    with pytest.raises(ContractViolation, match=rf"^{stage}, environment 0: contract rule obs_finite"):
        ppo.train(args, NativeSession([Sick(), Sick()], contract))
    assert args.log.exists() == (rows is not None)
    assert rows is None or read_log()["steps"] == rows


@pytest.mark.parametrize("script", [ppo, pong])
def test_a_verdict_that_was_interrupted_is_made_up_for(script, monkeypatch):
    def interrupted(run):
        raise KeyboardInterrupt

    args = small_args(script, updates=9, eval_every=1, solved_return=-1e8)
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "evaluate_finally", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.train(args, small_session(script))
    run = script.train(dataclasses.replace(args, resume=True), small_session(script))
    assert (run.solved, run.update, run.rows) == (True, 1, [0, 1])


@pytest.mark.parametrize("script", [ppo, pong])
@pytest.mark.parametrize(("goal", "rows"), [(None, [0, 2, 3]), (-1e8, [0, 2])])
def test_an_evaluation_that_was_interrupted_is_made_up_for(script, goal, rows, monkeypatch):
    def session():  # whose episodes are the same however many came before
        return cartpole_session(2) if script is ppo else small_session(pong)

    args = small_args(script, updates=3, num_steps=4, eval_every=2, solved_return=goal)
    unbroken = script.train(args, session())
    whole = script.Run.evaluate

    def interrupted(run, *asked):
        if run.update == 2:
            raise KeyboardInterrupt
        return whole(run, *asked)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.train(args, session())
    log = args.log.read_text()
    assert json.loads(log)["series"][0]["values"][1] == "NaN"
    run = script.train(dataclasses.replace(args, resume=True), session())
    assert (run.rows, run.solved) == (rows, goal is not None)
    for name in "avg_return", "approx_kl", "env_steps":
        assert run.history[name][1] == unbroken.history[name][1]


def test_a_verdict_that_does_not_confirm_the_goal_is_not_the_last(capsys):
    class Fluke:
        """Pays in the second episode that has a seed, an evaluation's; from the 103rd on, the next one's, for good."""

        seeded = 0

        def reset(self, seed=None):
            self.seeded += seed is not None
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), float(self.seeded == 2 or self.seeded > 102), True, False, {}

    args = small_args(ppo, updates=9, eval_every=1, solved_return=1.0)
    run = ppo.train(args, NativeSession([Fluke(), Fluke()], Contract((1,), 2)))
    assert (run.solved, run.update, run.history["avg_return"]) == (True, 2, [0.0, 1.0, 1.0])
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("solved: ")
    assert said.count("0.0 ± 0.0 over 100 fresh episodes: training goes on") == 1
    assert len([line for line in said if "fresh episodes" in line]) == 4  # two announced, one not enough, one last line


def test_a_goal_of_0_is_a_goal():
    args = ppo.Args(updates=1, eval_every=1, eval_episodes=1, eval_max_steps=1, solved_return=0)
    assert ppo.train(args, cartpole_session(8)).solved


def test_the_verdict_comes_at_the_end_whatever_the_last_evaluation_was():
    class Priceless:
        """Pays without end in the two evaluations, 1 in the fresh episodes."""

        steps = 0

        def reset(self, seed=None):
            return np.zeros(4, np.float32), {}

        def step(self, action):
            self.steps += 1
            return np.zeros(4, np.float32), math.inf if self.steps <= 2 else 1.0, True, False, {}

    evaluations = NativeSession([Priceless()], Contract((4,), 2, check_reward_finite=False))
    run = ppo.train(ppo.Args(updates=1, eval_episodes=1), cartpole_session(8), evaluations)
    assert run.history["avg_return"] == [math.inf] * 2
    assert run.final_returns.tolist() == [1.0] * ppo.FINAL_EPISODES


def test_a_run_that_was_interrupted_shows_its_last_evaluation():
    args = ppo.Args(updates=1, eval_episodes=1, eval_max_steps=7)
    run = ppo.train(args)
    run.add_row()
    assert run.greedy_return == 7.0
    assert not run.awaits_verdict


def test_sparkline():
    assert ppo.sparkline([]) == ""
    assert ppo.sparkline([3.0, math.nan, 3.0]) == "▄▄"
    assert ppo.sparkline([0.0, 5.0, 10.0]) == "▁▄█"
    assert ppo.sparkline([99.0, *map(float, range(12))]) == "▁▁▂▂▃▄▄▅▆▆▇█"  # the last twelve
    for seed in range(1000):  # the least is the lowest bar, the most the highest, however sums are rounded
        values = np.random.default_rng(seed).uniform(-500, 500, 3)
        assert {ppo.sparkline(values.tolist())[i] for i in (values.argmin(), values.argmax())} == {"▁", "█"}


def test_numbers_that_json_does_not_know():
    numbers = (1.5, math.inf, -math.inf, math.nan)
    assert [ppo.json_number(number) for number in numbers] == [1.5, "Infinity", "-Infinity", "NaN"]


def test_a_rollout_without_differences_does_not_spoil_the_row(monkeypatch):
    class Late:
        """Nothing happens for 40 steps, more than a rollout: all targets are equal."""

        t = 0

        def reset(self, seed=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            late = float(self.t > 40)
            return np.full(1, late, np.float32), late, False, False, {}

    args = ppo.Args(updates=2, eval_every=2, eval_episodes=1, eval_max_steps=1, num_envs=2, num_minibatches=2)
    run = ppo.train(args, NativeSession([Late(), Late()], Contract((1,), 2)))
    assert math.isfinite(run.history["explained_variance"][-1])
    # All targets are 1 but for rounding: there is nothing to explain.
    rollouts, judged = (recorded(ppo, name, monkeypatch) for name in ("collect_rollout", "gae"))
    run = ppo.train(ppo.Args(updates=2, eval_every=1, eval_episodes=1, eval_max_steps=1, gamma=0.0))
    for rollout, advantages in zip(rollouts, judged, strict=True):
        assert not advantages.var() / (advantages + rollout.values).var() < 1e8
    assert np.isnan(run.history["explained_variance"]).all()


def test_returns_are_summed_in_double_precision():
    class Large:
        def reset(self, seed=None):
            self.t = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            reward = {1: 1e8, 31: -1e8}.get(self.t, 1.0)
            return np.zeros(1, np.float32), reward, self.t == 31, False, {}

    args = ppo.Args(updates=1, num_envs=2, eval_episodes=1)
    run = ppo.train(args, NativeSession([Large(), Large()], Contract((1,), 2)))
    assert run.history["sampled_return"][1:] == run.history["avg_return"][1:] == [29.0]


def test_what_others_did_in_a_session_is_not_counted():
    session = cartpole_session(8)
    session.reset(1)
    session.step([0] * 8)
    run = ppo.train(ppo.Args(updates=1, eval_episodes=1, eval_max_steps=1), session)
    assert run.transitions_checked == sum(each.transitions_checked for each in run.sessions) - 8


@pytest.mark.parametrize("last", [0, 1, 256, 1280, 98_765, 4_096_000])
@pytest.mark.parametrize("returns", [(0.0, 0.0), (-0.3, 0.0), (-1.0, -0.1), (-21.0, 19.4), (9.0, 500.0), (1e-3, 2e-3)])
def test_ticks_of_the_picture(last, returns):
    """Different numbers, evenly spaced, within the frame."""
    history = {"avg_return": returns, "sampled_return": returns, "env_steps": (0, last)}
    picture = ppo.learning_curve(SimpleNamespace(history=history, solved_return=math.inf, title="title"))
    for axis, low, high in (
        (r'x="([\d.]+)" y="370" text-anchor="middle"', 70, 690),
        (r'y="([\d.]+)" text-anchor="end"', 64, 355),
    ):
        places, labels = zip(*re.findall(rf"<text [^>]*{axis}>([^<]+)<", picture), strict=True)
        assert low <= min(map(float, places)) <= max(map(float, places)) <= high
        assert all(re.fullmatch(r"-?[\d,.]+", label) for label in labels)  # no 2e-16 for 0
        steps = np.diff([float(label.replace(",", "")) for label in labels])
        assert np.allclose(steps, steps[:1])
        assert (steps > 0).all()
        assert 1 <= len(steps) <= 10 or returns == (0.0, 0.0)


def test_the_verdict_is_over_fresh_episodes_each_with_a_seed_of_its_own(capsys):
    args = small_args(ppo, eval_episodes=8)  # 100 is no multiple of 8
    run = ppo.train(args, native("Honest", 2, Contract((1,), 2)))
    assert run.final_returns.tolist() == [run.episode_seed("final evaluation") + i for i in range(100)]
    assert run.episode_seed("final evaluation") != run.episode_seed("evaluation")
    run.final_returns = np.array([1.0, 5.0])
    verdict = notes(run.train_log(0.0))
    assert (verdict["final_return_mean"], verdict["final_return_std"]) == ("3.0", "2.0")
    run.finish()
    assert "greedy return 3.0 ± 2.0 over 2 fresh episodes" in capsys.readouterr().out.splitlines()[-1]


def test_a_session_of_another_size_is_refused():
    with pytest.raises(ppo.BadInput, match="the session has 3 environments: say so in"):
        ppo.train(ppo.Args(), cartpole_session(3))
    session = cartpole_session(8)
    with pytest.raises(ppo.BadInput, match="needs environments of its own"):
        ppo.train(ppo.Args(), session, session)


def test_an_evaluation_does_not_play_in_the_environments_of_training():
    """Two sessions over the same ones would each see transitions of the other's episodes."""
    from gymnasium import wrappers

    envs = cartpole_session(8)._envs
    again = NativeSession([wrappers.TransformReward(env, abs) for env in envs[:1]], ppo.CONTRACT)
    with pytest.raises(ppo.BadInput, match="needs environments of its own"):
        ppo.train(ppo.Args(), NativeSession(envs, ppo.CONTRACT), again)


def test_a_session_that_was_closed_cannot_be_evaluated_in():
    session = cartpole_session(8)
    closed = session.twin(1)
    closed.close()
    with pytest.raises(BridgeError, match=r"^evaluation: this session is dead: it was closed$"):
        ppo.train(ppo.Args(), session, closed)


def test_both_sessions_are_closed_in_the_end():
    run = ppo.train(ppo.Args(updates=1, eval_episodes=1, eval_max_steps=1), cartpole_session(8))
    refused = (cartpole_session(8), cartpole_session(1))
    with pytest.raises(ppo.BadInput, match="--num-minibatches"):
        ppo.train(ppo.Args(num_minibatches=7), *refused)
    without_training = cartpole_session(1)
    with pytest.raises(BridgeError, match="cannot make"):
        ppo.train(ppo.Args(env_id="Nope-v0"), None, without_training)
    for session in (*run.sessions, *refused, without_training):
        with pytest.raises(BridgeError, match="dead: it was closed"):
            session.reset(0)


def test_a_run_in_a_thread():
    """Where no signal arrives, and no handler can be set."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ppo.train, small_args(ppo), cartpole_session(2)).result().update == 1


@pytest.mark.parametrize("script", [ppo, pong])
def test_there_are_as_many_workers_as_asked_for_but_no_more_than_environments(script):
    """--watch plays in one environment, however many workers there were in training."""
    for num_envs, workers in (1, 1), (4, 3):
        with script.open_session(script.Args(num_workers=3), num_envs) as session:
            assert len(session._servers) == workers


ARGS_ROWS = [
    ("updates", 2.5, "must be of type int, not 2.5"),
    ("num_steps", "3", "must be of type int, not '3'"),
    ("num_envs", True, "must be of type int, not True"),
    ("seed", 1.0, "must be of type int"),
    ("seed", 2**63, "must lie in 0 .. 2**63 - 1"),
    ("learning_rate", "0.1", "must be of type float"),
    ("learning_rate", True, "must be of type float"),
    ("learning_rate", math.inf, "must be positive"),
    ("learning_rate", math.nan, "must be positive"),
    ("learning_rate", 0, "must be positive"),
    ("clip_coef", math.inf, "must be positive"),
    ("max_grad_norm", 0.0, "must be positive"),
    ("ent_coef", math.nan, "must not be negative"),
    ("vf_coef", math.inf, "must not be negative"),
    ("gamma", 1.5, "must lie in 0 .. 1"),
    ("gamma", None, "must be of type float, not None"),
    ("gae_lambda", math.nan, "must lie in 0 .. 1"),
    ("target_kl", 0, "must be positive"),
    ("solved_return", math.inf, "must lie in -1e9 .. 1e9"),
    ("solved_return", math.nan, "must lie in -1e9 .. 1e9"),
    ("cuda", "no", "must be of type bool"),
    ("env_id", 3, "must be of type str"),
    ("log", None, "must be of type Path"),
    ("log", "rate0.1", "must end in .json"),
    ("log", "", "must end in .json"),
    ("checkpoint", "", "must name a file"),
    ("server_command", ["python", "gym_bridge.py"], "must be of type str | None"),
    ("server_command", " ", "is empty"),
    ("server_command", "python 'x", "cannot be split into words"),
]


@pytest.mark.parametrize("script", [ppo, pong])
@pytest.mark.parametrize(("name", "value", "message"), ARGS_ROWS)
def test_a_value_that_cannot_be_is_refused(name, value, message, script):
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} {re.escape(message)}"):
        script.Args(**{name: value})


@pytest.mark.parametrize("script", [ppo, pong])
def test_what_cannot_be_negative_is_refused(script):
    numbers = [field.name for field in dataclasses.fields(script.Args) if re.match("int|float", str(field.type))]
    assert len(numbers) > 15
    for name in set(numbers) - {"solved_return"}:
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must "):
            script.Args(**{name: -1})
    script.Args(ent_coef=0, vf_coef=0)


def test_what_python_gives_in_the_place_of_floats_and_paths_can_be_resumed():
    numbers = {"seed": np.int64(3), "num_envs": np.int32(8), "learning_rate": np.float64(0.5), "gamma": 1}
    ppo.train(ppo.Args(updates=1, eval_max_steps=1, solved_return=400, log="log.json", checkpoint="point", **numbers))
    stored = ppo.stored_args(ppo.Args(checkpoint="point"))
    assert {name: getattr(stored, name) for name in numbers} == numbers
    assert (stored.solved_return, stored.updates) == (400, 1)
    assert read_log("log.json")["steps"] == [0, 1]


def test_sizes_given_with_resume_are_held_against_those_of_the_checkpoint(monkeypatch):
    ppo.train(ppo.Args(updates=1, eval_max_steps=1, num_envs=4, num_steps=96, num_minibatches=6))
    flags = ["--resume", "--num-minibatches", "3"]  # no divisor of the default, 8 * 32
    args = tyro.cli(ppo.Args, args=flags, default=ppo.stored_args(tyro.cli(ppo.Args, args=flags)))
    assert (args.num_envs, args.num_steps, args.num_minibatches) == (4, 96, 3)
    ppo.check_args(args)
    with pytest.raises(ppo.BadInput, match=r"--num-minibatches must divide --num-envs \* --num-steps \(384\).*not 7"):
        ppo.check_args(dataclasses.replace(args, num_minibatches=7))
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", None)  # train starts no server before it has looked
        for script in ppo, pong:
            with pytest.raises(script.BadInput, match="--num-minibatches must divide"):
                script.train(script.Args(num_minibatches=7))
    done = run_script("--resume", "--updates", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PPO on CartPole-v1, seed 1, after update 1: starting 4 environments")


def test_files_that_cannot_be_are_refused_before_the_first_step():
    Path("real").mkdir()
    Path("link").symlink_to("real")
    with pytest.raises(ppo.BadInput, match="must be different files"):
        ppo.check_args(ppo.Args(log="real/x.json", checkpoint="link/x.json"))
    Path("x.old").mkdir()
    with pytest.raises(ppo.BadInput, match=r"cannot write x\.old: it is no file"):
        ppo.check_args(ppo.Args(checkpoint="x"))


def test_a_folder_that_is_gone_is_refused_before_the_first_step():
    Path("gone").mkdir()
    os.chdir("gone")
    Path("../gone").rmdir()
    with pytest.raises(ppo.BadInput, match="cannot find the current directory"):
        ppo.check_args(ppo.Args())


def test_a_file_that_does_not_fit_on_the_disk_leaves_the_old_one_and_nothing_else():
    ppo.replace_file(Path("file"), b"old")
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
    try:
        with pytest.raises(OSError, match="too large"):
            ppo.replace_file(Path("file"), bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert [path.name for path in Path().iterdir() if path.name.startswith("file")] == ["file"]
    assert Path("file").read_bytes() == b"old"


def test_where_one_file_cannot_be_written_the_others_are():
    run = ppo.train(ppo.Args(updates=1, eval_max_steps=1, checkpoint="away/checkpoint.pt"))
    for path in run.places:
        path.unlink()
    Path("away").rmdir()
    run.save()
    assert all(path.is_file() for path in run.places)  # whoever removes a folder gets it back
    for bad in range(3):
        for path in run.places:
            path.unlink() if path.is_file() else path.rmdir()
        run.places[bad].mkdir()
        with pytest.raises(IsADirectoryError):
            run.save()
        assert [path.is_file() for path in run.places] == [k != bad for k in range(3)]


def test_a_disk_that_is_full_ends_the_run(monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ppo, "replace_file", full)
    with pytest.raises(OSError, match="No space left"):
        ppo.train(small_args(ppo), cartpole_session(2))
    shown = capsys.readouterr()
    assert "could not save everything: [Errno 28]" in shown.err
    assert "update 0/" in shown.out
    assert "update 1/" not in shown.out  # at the first evaluation from which something is kept


class LastStraw(CartPoleEnv):
    """It takes the checkpoint's place away, and then shows a NaN."""

    def step(self, action):
        observation, *rest = super().step(action)
        if Path("log.json").exists():  # there has been an update, and an evaluation
            Path("checkpoint.pt").unlink()
            Path("checkpoint.pt").mkdir()
            observation = np.full_like(observation, np.nan)
        return observation, *rest


def test_what_cannot_be_saved_does_not_hide_what_ended_the_run(capsys):
    flags = {"num_envs": 1, "num_steps": 2, "num_minibatches": 1, "eval_every": 1, "eval_max_steps": 1}
    args = ppo.Args(**flags, log="log.json", checkpoint="checkpoint.pt")
    with pytest.raises(ContractViolation, match="step 3, environment 0: contract rule obs_finite broken"):
        ppo.train(args, NativeSession([LastStraw()], ppo.CONTRACT), NativeSession([CartPoleEnv()], ppo.CONTRACT))
    assert re.match(r"could not save everything: .*checkpoint\.pt", capsys.readouterr().err)
    assert notes(read_log("log.json"))["violations"] == "1"  # the others are saved all the same


class Wanderer(CartPoleEnv):
    """It changes the directory that this process works in."""

    def reset(self, **kwargs):
        Path("elsewhere").mkdir(exist_ok=True)
        os.chdir("elsewhere")
        return super().reset(**kwargs)


def test_files_stay_where_they_were_meant_to_be(workplace):
    ppo.train(ppo.Args(updates=1, num_envs=2, eval_episodes=1), NativeSession([Wanderer(), Wanderer()], ppo.CONTRACT))
    assert Path.cwd() != workplace
    assert (workplace / ppo.Args().checkpoint).is_file()
    assert (workplace / ppo.Args().log).is_file()


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_an_actor_that_says_nan_chooses_no_action(logit):
    """Finite observations can be too large for a sum in float32; argmax takes a NaN for the largest."""
    actor = Constant(logit, 0)
    with cartpole_session() as session, pytest.raises(FloatingPointError, match="scale"):
        ppo.evaluate(session, actor, 1, 100)
    with cartpole_session() as session:
        session.reset(1)
        with pytest.raises(FloatingPointError, match="scale"):
            ppo.collect_rollout(session, actor, networks()[1], 100)


def test_a_new_run_sets_the_checkpoint_aside_that_it_finds(capsys):
    first, second = (ppo.train(ppo.Args(seed=seed, updates=1, eval_max_steps=1)) for seed in (1, 2))
    said = "data/rl/ppo_cartpole.pt is there already, and will become data/rl/ppo_cartpole.pt.old\n"
    assert capsys.readouterr().out.count(said) == 1
    kept = ppo.load_checkpoint(Path(f"{first.args.checkpoint}.old"))
    assert kept["args"]["seed"] == 1
    assert ppo.load_checkpoint(second.args.checkpoint)["args"]["seed"] == 2
    assert all(torch.equal(kept["actor"][name], weights) for name, weights in first.actor.state_dict().items())
    with pytest.raises(BridgeError):  # a run that cannot start leaves things as they are
        ppo.train(ppo.Args(seed=3, server_command="false"))
    assert ppo.load_checkpoint(second.args.checkpoint)["args"]["seed"] == 2


def test_a_flag_given_with_resume_counts(short_run, workplace):
    folder, _ = short_run
    (workplace / "copy.pt").write_bytes((folder / "data/rl/ppo_cartpole.pt").read_bytes())
    flags = ["--checkpoint", "copy.pt", "--log", "copy.json"]
    done = run_script("--resume", "--updates", "5", "--learning-rate", "1e-30", *flags)
    assert done.returncode == 0, done.stderr
    before, after = (torch.load(path, weights_only=True) for path in (folder / "data/rl/ppo_cartpole.pt", "copy.pt"))
    assert (before["update"], after["update"]) == (4, 5)
    for name, weights in before["actor"].items():
        assert torch.equal(weights, after["actor"][name])
    done = run_script("--resume", "--checkpoint", "copy.pt", "--log", "/proc/nowhere/log.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ppo_cartpole.py: cannot write /proc/nowhere/log.json")
    done = run_script("--resume", *flags)
    assert done.returncode == 0, done.stderr
    done_for = "PPO on CartPole-v1, seed 3, after update 5: nothing left to do (there would be with"
    assert done.stdout.startswith(f"{done_for} a larger --updates)\n")
    assert "\nnot solved" in done.stdout
    done = run_script("--resume", *flags, "--solved-return", "0")
    assert done.stdout.startswith(f"{done_for} a larger --updates and a higher --solved-return)\n")
    done = run_script("--resume", *flags, "--solved-return", "0", "--updates", "6")
    assert done.stdout.startswith(f"{done_for} a higher --solved-return)\n")
    assert "\nsolved" in done.stdout


def test_the_checkpoint_is_data_only(short_run):
    folder, _ = short_run
    state = torch.load(folder / "data/rl/ppo_cartpole.pt", weights_only=True)
    assert state["args"]["seed"] == 3
    assert state["update"] == 4
    assert state["optimizers"][0]["param_groups"][0]["eps"] == 1e-5
    actor = ppo.Actor((4,), 2)
    actor.load_state_dict(state["actor"])


# name, what is wrong with the checkpoint (``moments``: what Adam remembers of the first weights), what the message says
DAMAGE_ROWS = [
    ("moments of another shape", "moments['exp_avg'] = torch.zeros(1)", "invalid optimizer"),
    # One number in memory, where Adam's kernel expects many.
    ("moments that look like the weights", "moments['exp_avg'] = torch.zeros(1).expand(64, 4)", "invalid optimizer"),
    (
        "a run that has learned nothing",
        "state |= {'update': 0, 'steps': [0], 'history': {key: row[:1] for key, row in state['history'].items()}}",
        "invalid update",
    ),
    ("weights of another shape", "state['actor']['net.1.weight'] = torch.zeros(3, 3)", "invalid actor"),
    ("weights of another dtype", "state['actor']['net.1.weight'] = torch.zeros(64, 4).double()", "invalid actor"),
    ("history that is no list", "state['history']['entropy'] = (0.5, 0.5, 0.5)", "invalid history"),
    ("endless number", "state['history']['entropy'][0] = 10**400", "invalid history"),
    ("no number of steps", "state['history']['env_steps'][-1] = math.nan", "invalid history"),
    ("rows of the future", "state['steps'][-1] = 99", "rows of its history are not in order"),
    ("short history", "state['history']['entropy'].pop()", "series have different lengths"),
    ("no arguments", "del state['args']", "this script's arguments: 'args'"),
    ("an argument less", "del state['args']['gamma']", "missing ['gamma']"),
    ("an argument more", "state['args']['theta'] = 1.0", "unknown ['theta']"),
    ("argument of another type", "state['args']['num_envs'] = 8.0", "--num-envs must be of type int"),
    ("truth for a number", "state['args']['seed'] = True", "--seed must be of type int"),
    ("word for a number", "state['update'] = 'four'", "invalid update"),
    ("another script", "state['script'] = 'other.py'", "is not a checkpoint of ppo_cartpole.py"),
]


@pytest.mark.parametrize(
    ("statement", "message"), [row[1:] for row in DAMAGE_ROWS], ids=[row[0] for row in DAMAGE_ROWS]
)
def test_a_damaged_checkpoint_is_refused(short_run, statement, message):
    folder, _ = short_run
    state = torch.load(folder / "data/rl/ppo_cartpole.pt", weights_only=True)
    exec(statement, {"torch": torch, "math": math, "state": state, "moments": state["optimizers"][0]["state"][0]})
    torch.save(state, "damaged.pt")
    args = ppo.Args(resume=True, updates=9, checkpoint=Path("damaged.pt"))
    with pytest.raises(ppo.BadInput, match=rf"^damaged\.pt .*{re.escape(message)}"):
        ppo.train(ppo.stored_args(args), cartpole_session(8))


def begin_from(checkpoint):
    """What --resume does before it plays."""
    args = ppo.stored_args(ppo.Args(resume=True, checkpoint=Path(checkpoint)))
    actor, critic = networks()
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], eps=1e-5, fused=True)
    return ppo.Run(args, actor, critic, [optimizer])


def test_a_checkpoint_that_would_unpack_to_gigabytes_is_refused(short_run):
    folder, _ = short_run
    whole = zipfile.ZipFile(folder / "data/rl/ppo_cartpole.pt")
    with whole, zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for record in whole.namelist():
            packed.writestr(record, whole.read(record))
        for info in packed.infolist():
            info.external_attr = 0  # torch writes none
    with pytest.raises(ppo.BadInput, match="is no plain file"):
        ppo.load_checkpoint(Path("packed.pt"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_checkpoint_with_other_bytes_is_the_same_or_refused(short_run, data):
    folder, _ = short_run
    whole = (folder / "data/rl/ppo_cartpole.pt").read_bytes()
    content = bytearray(whole)
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(len(content) - 6000, len(content) - 1))
    length = data.draw(st.sampled_from([0, 1, 1, 4, len(content)]))
    content[at : at + length] = data.draw(st.binary(max_size=4))
    Path("whole.pt").write_bytes(whole)
    Path("other.pt").write_bytes(content)
    try:
        state = ppo.load_checkpoint(Path("other.pt"))
    except ppo.BadInput as error:
        assert str(error).startswith("other.pt is not a")  # noqa: PT017
    else:
        assert same(state, ppo.load_checkpoint(Path("whole.pt")))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # a tensor where a dictionary was
@settings(max_examples=70, deadline=None)
@given(data=st.data())
def test_a_checkpoint_with_another_value_is_taken_as_it_stands_or_refused(short_run, data):
    folder, _ = short_run
    state = torch.load(folder / "data/rl/ppo_cartpole.pt", weights_only=True)
    container, key = data.draw(st.sampled_from(list(places(state))))
    action = data.draw(st.sampled_from(["replace", "delete", "repeat", "tensor"]))
    if action == "replace":
        container[key] = data.draw(VALUES)
    elif action == "tensor":
        shape = data.draw(st.sampled_from([(1,), (2, 2), (64, 4), (64,)]))
        container[key] = torch.full(shape, data.draw(st.sampled_from([0.0, math.nan, math.inf])))
    elif action == "delete" or not isinstance(container, list):
        del container[key]
    else:
        container.insert(key, container[key])
    torch.save(state, "other.pt")
    try:
        run = begin_from("other.pt")
    except ppo.BadInput as error:
        assert "other.pt" in str(error)  # noqa: PT017
    else:
        begun = run.state()
        for name in "update", "env_steps", "actor", "critic":
            assert same(begun[name], state[name]), name
        assert same(begun["optimizers"][0]["state"], state["optimizers"][0]["state"])
        assert same(run.history, {name: state["history"][name] for name in ppo.SERIES})


FLAGS = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ppo.Args)]
WORDS = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(["0", "-1", "1", "4", "7", "0.5", "nan", "inf", "1e400", "None", "True", "", ".", "CartPole-v1"]),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=6),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(WORDS, max_size=4).map(lambda words: [w for w in words if w not in ("-h", "--help")]))
def test_a_command_line_is_understood_or_refused_with_code_2(words):
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
            args = tyro.cli(ppo.Args, args=words)
    except SystemExit as end:
        assert end.code == 2  # noqa: PT017
        assert len(heard.getvalue()) > 20
    else:
        assert 0 < args.learning_rate < math.inf
        assert 0 <= args.gamma <= 1
        if (args.log, args.checkpoint) == (ppo.Args.log, ppo.Args.checkpoint):  # other places may be anywhere
            with contextlib.suppress(ppo.BadInput):
                ppo.check_args(args)
                assert args.num_envs * args.num_steps % args.num_minibatches == 0


def test_a_strangers_checkpoint_runs_no_code():
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("pwned",)

    torch.save({"script": "ppo_cartpole.py", "args": Evil()}, "evil.pt")
    with pytest.raises(ppo.BadInput, match="is not a readable checkpoint"):
        ppo.load_checkpoint(Path("evil.pt"))
    assert not Path("pwned").exists()
    torch.load("evil.pt", weights_only=False)  # what it would have done
    assert Path("pwned").exists()


@pytest.mark.parametrize("flag", ["--resume", "--watch"])
def test_a_strangers_checkpoint_runs_no_command_and_names_no_file(short_run, flag):
    folder, _ = short_run
    state = torch.load(folder / "data/rl/ppo_cartpole.pt", weights_only=True)
    state["args"] |= {"server_command": "touch pwned", "log": "overwritten.json"}
    torch.save(state, "stranger.pt")
    flags = ["--checkpoint", "stranger.pt", "--eval-episodes", "1", "--eval-max-steps", "3"]
    flags += ["--log", "own.json"] if flag == "--resume" else []
    assert run_script(flag, *flags, SDL_VIDEODRIVER="dummy").returncode == 0
    assert not Path("pwned").exists()
    assert not Path("overwritten.json").exists()


def test_a_resumed_run_does_not_overwrite_the_log_of_another():
    """A log at another place has to be named again."""
    kept = ["--log", "kept/log.json", "--checkpoint", "kept/one.pt", *SHORT]
    assert run_script(*kept).returncode == 0
    assert run_script(*SHORT, "--seed", "2").returncode == 0
    before = Path("data/rl/ppo_cartpole_trainlog.json").read_bytes()
    done = run_script("--resume", "--checkpoint", "kept/one.pt")
    assert (done.returncode, done.stderr) == (
        2,
        "ppo_cartpole.py: kept/one.pt: to go on with its log, say --log 'kept/log.json'\n",
    )
    assert Path("data/rl/ppo_cartpole_trainlog.json").read_bytes() == before
    assert run_script("--resume", *kept).returncode == 0


def test_what_was_trained_on_a_gpu_goes_on_without(short_run):
    folder, _ = short_run
    state = torch.load(folder / "data/rl/ppo_cartpole.pt", weights_only=True)
    state["args"]["cuda"], state["rng"]["cuda"] = True, torch.zeros(16, dtype=torch.uint8)
    torch.save(state, "gpu.pt")
    flags = ["--resume", "--checkpoint", "gpu.pt", "--updates", "5"]
    done = run_script(*flags, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, "use --no-cuda" in done.stderr) == (2, True)
    done = run_script(*flags, "--no-cuda", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (0, "")
    state = torch.load("gpu.pt", weights_only=True)
    assert (state["update"], state["args"]["cuda"], state["rng"]["cuda"]) == (5, False, None)


def test_watch_plays_the_checkpoint(short_run):
    folder, _ = short_run
    flags = ["--watch", "--checkpoint", str(folder / "data/rl/ppo_cartpole.pt"), "--eval-episodes", "2"]
    done = run_script(*flags, "--eval-max-steps", "5", "--cuda", SDL_VIDEODRIVER="dummy")  # as if trained on a GPU
    assert done.stdout.splitlines() == ["episode 1: return 5", "episode 2: return 5"], done.stderr
    Path("pygame.py").write_text("raise ImportError")  # as if it were not installed
    done = run_script(*flags, PYTHONPATH=os.getcwd(), SDL_VIDEODRIVER="dummy")
    assert done.returncode == 2
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("seed", [7, 2**62 + 7])
def test_watch_plays_another_episode_each_time(monkeypatch, capsys, seed):
    """Their seeds are consecutive, and fit into 32 bits: more than that some environments refuse."""
    args = ppo.Args(seed=seed, env_id="odd_envs:Honest-v0", updates=1, eval_episodes=3, num_workers=2)
    ppo.train(args)
    capsys.readouterr()
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    ppo.watch(args)
    assert capsys.readouterr().out.splitlines() == [f"episode {k}: return {6 + k}" for k in (1, 2, 3)]


def test_watch_of_another_environment(short_run):
    folder, _ = short_run
    flags = ["--checkpoint", str(folder / "data/rl/ppo_cartpole.pt"), "--env-id", "Acrobot-v1"]
    done = run_script("--watch", *flags, SDL_VIDEODRIVER="dummy")
    assert done.returncode == 2
    assert "ppo_cartpole.pt does not fit Acrobot-v1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a display needs no variable")
def test_watch_needs_a_display(short_run):
    folder, _ = short_run
    displays = dict.fromkeys(["DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"], "")
    done = run_script("--watch", "--checkpoint", str(folder / "data/rl/ppo_cartpole.pt"), **displays)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ppo_cartpole.py: --watch needs a display")


def test_watch_elsewhere_needs_no_display_here(short_run):
    folder, _ = short_run
    displays = dict.fromkeys(["DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"], "")
    command = f"env SDL_VIDEODRIVER=dummy {sys.executable} {HERE / 'gym_bridge.py'}"
    flags = ["--checkpoint", str(folder / "data/rl/ppo_cartpole.pt"), "--eval-episodes", "1", "--eval-max-steps", "2"]
    done = run_script("--watch", *flags, "--server-command", command, **displays)
    assert (done.returncode, done.stdout) == (0, "episode 1: return 2\n"), done.stderr


def test_another_environment_needs_no_change():
    done = run_script("--env-id", "odd_envs:Counting-v0", "--num-steps", "8", *SHORT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("finished: odd_envs:Counting-v0")


def test_ctrl_c_while_torch_is_being_imported():
    """It ends without a word: until main() SIGINT is the kernel's."""
    Path("torch.py").write_text("open('asked', 'w').close(); import time; time.sleep(60)")
    command, path = [sys.executable, str(HERE / "ppo_cartpole.py")], {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **path})
    until(Path("asked").exists)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == -signal.SIGINT


def test_ctrl_c_while_the_servers_start():
    process = subprocess.Popen([sys.executable, str(HERE / "ppo_cartpole.py")], stderr=subprocess.PIPE, text=True)

    def parents():
        return run(["ps", "-A", "-o", "ppid="]).stdout.split()

    until(lambda: str(process.pid) in parents())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].endswith("ppo_cartpole.py: interrupted\n")
    assert process.returncode == 130


@pytest.mark.parametrize("script", ["ppo_cartpole", "ppo_pong_ram"])
def test_nothing_compiled_is_imported_once_training_has_begun(script):
    """While numpy.random is, an exception can be lost: of 60 Ctrl-Cs while the servers started, 7 were."""
    flags = "--updates 1 --num-envs 2 --num-workers 1 --num-steps 8 --eval-episodes 1 --eval-max-steps 2"
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import {script} as ppo
before = set(sys.modules)
sys.argv[1:] = {flags.split()}
ppo.main()
files = [getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before]
print([file for file in files if file and not file.endswith(".py")])
"""
    done = run([sys.executable, "-c", code])
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr


def test_ctrl_c_before_there_is_anything_to_save():
    """And before the server, which has been asked, has said a word."""
    Path("sleep-walker").write_text("#!/bin/sh\nread -r request\necho $$ > pid\nmv pid asked\nsleep 60\n")
    Path("sleep-walker").chmod(0o755)
    command = [sys.executable, str(HERE / "ppo_cartpole.py"), "--server-command", "./sleep-walker"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(Path("asked").exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out == "PPO on CartPole-v1, seed 1: starting 8 environments\n"
    assert err == "nothing is saved before the first update is complete\nppo_cartpole.py: interrupted\n"
    assert process.returncode == 130
    assert not Path("data/rl/ppo_cartpole.pt").exists()
    assert_gone(int(Path("asked").read_text()))


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_and_leaves_with_130(times):
    script = str(HERE / "ppo_cartpole.py")
    process = subprocess.Popen(
        [sys.executable, "-u", script, "--solved-return", "9999", "--updates", "9999", "--eval-every", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "update 3/" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.3)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "saved everything up to update" in err
    state = torch.load("data/rl/ppo_cartpole.pt", weights_only=True)
    assert state["update"] >= 3
    assert read_log()["steps"][-1] == state["update"]
    if times == 2:
        flags = ["--updates", str(state["update"] + 1), "--solved-return", "9999", "--eval-max-steps", "50"]
        assert run_script("--resume", *flags).returncode == 0


# An environment that is CartPole until it does what the file "sickness" says: in step 313 of 8 of them, which is in the
# tenth update of 32.
SICK = """
import os, time, gymnasium, numpy as np
from pathlib import Path
from gymnasium.envs.classic_control import CartPoleEnv
class Sick(CartPoleEnv):
    steps = 0
    def step(self, action):
        Sick.steps += 1
        obs, reward, terminated, truncated, info = super().step(action)
        if Sick.steps == 2500 and Path("sickness").exists():
            exec(Path("sickness").read_text())
        return obs, reward, terminated, truncated, info
gymnasium.register("Sick-v0", Sick, max_episode_steps=500)
"""
# name, what the environment does, what the message says
SICK_ROWS = [
    ("nan", "obs[1] = np.nan", r"step 313, environment \d: contract rule obs_finite broken: .*got nan"),
    ("raises", "raise OverflowError('too much')", r"step 313, environment \d: .*OverflowError: too much.*sick.py"),
    ("killed", "os.kill(os.getpid(), 9)", r"step 313: the server hung up.*SIGKILL"),
    ("hangs", "time.sleep(60)", r"step 313: no whole reply within .*was running"),
    ("prints", "os.write(2, b'last words'); os._exit(7)", r"step 313: .*exit code 7.*last words"),
]


@pytest.mark.parametrize(("name", "sickness", "message"), SICK_ROWS, ids=[row[0] for row in SICK_ROWS])
def test_a_run_whose_environment_falls_ill(name, sickness, message):
    """One message, exit code 1, everything up to the last completed update, and --resume goes on from there."""
    Path("sick.py").write_text(SICK)
    Path("sickness").write_text(sickness)
    Path("run.py").write_text(f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import ppo_cartpole as ppo
if __name__ == "__main__":  # main() with a deadline of its own
    train, contract = ppo.train, ppo.Contract.from_env("sick:Sick-v0")
    session = ppo.GymnasiumSession("sick:Sick-v0", contract, 8)
    session._timeout = 5  # now that it has started
    ppo.train = lambda args: train(args, session)
    ppo.main()
""")
    flags = ["--env-id", "sick:Sick-v0", "--eval-every", "4", "--eval-episodes", "2", "--eval-max-steps", "20"]
    done = run_script("--updates", "100", *flags, script=Path("run.py").absolute())
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"saved everything up to update 9, for --resume: .*\nppo_cartpole\.py: " + message, done.stderr, re.DOTALL
    )
    assert ("Traceback" in done.stderr) == (name == "raises")  # the environment's own
    state = torch.load("data/rl/ppo_cartpole.pt", weights_only=True)
    assert (state["update"], state["steps"]) == (9, [0, 4, 8, 9])
    assert all(torch.isfinite(weights).all() for weights in state["actor"].values())
    assert (read_log()["steps"], notes(read_log())["violations"]) == ([0, 4, 8, 9], str(int(name == "nan")))
    assert "<polyline" in Path("data/rl/ppo_cartpole_trainlog.svg").read_text()
    Path("sickness").unlink()
    if name == "nan":  # the module of a checkpoint is code, and nobody has asked for it
        done = run_script("--resume", "--updates", "11")
        assert done.returncode == 2
        assert "say --env-id 'sick:Sick-v0'" in done.stderr
        done = run_script("--resume", "--updates", "11", "--env-id", "sick:Sick-v0")
        assert done.returncode == 0, done.stderr
    else:  # the same, without starting Python and torch once more
        stored = ppo.stored_args(ppo.Args(env_id="sick:Sick-v0"))
        ppo.train(dataclasses.replace(stored, resume=True, updates=11))
    assert (read_log()["steps"], notes(read_log())["violations"]) == ([0, 4, 8, 9, 11], str(int(name == "nan")))


def test_an_environment_that_falls_ill_while_it_is_watched():
    """That is a fault, exit code 1; an environment that cannot be shown was wrong input."""
    Path("sick.py").write_text(SICK.replace("2500", "5"))
    flags = ["--env-id", "sick:Sick-v0", "--eval-episodes", "2", "--eval-max-steps", "20"]
    assert run_script("--updates", "1", "--eval-every", "1", *flags).returncode == 0
    Path("sickness").write_text("raise OSError('ill')")
    done = run_script("--watch", *flags, SDL_VIDEODRIVER="dummy")
    assert (done.returncode, done.stdout) == (1, "")
    assert "OSError: ill" in done.stderr


def test_a_terminal_that_is_closed_and_a_reader_that_leaves():
    """SIGHUP saves like Ctrl-C, and so does Ctrl-C when nobody reads the output any more (as at the end of | tee)."""
    for number, code in (signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143):
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, if the tests run under nohup
        process = subprocess.Popen(
            [sys.executable, str(HERE / "ppo_cartpole.py"), "--solved-return", "9999", "--updates", "9999"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        signal.signal(signal.SIGHUP, before)
        while "update 5/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)  # lest it print a line between these two
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # a signal takes a while to arrive
        process.stdout.close()
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=20) == code
        assert torch.load("data/rl/ppo_cartpole.pt", weights_only=True)["update"] >= 5


@pytest.mark.parametrize("module", ["numpy", "tyro", "torch"])
def test_ctrl_c_while_a_module_is_imported_needs_no_traceback(module):
    Path(f"{module}.py").write_text("import os; os.kill(os.getpid(), 2)")
    command = [sys.executable, HERE / "ppo_cartpole.py"]
    done = run(command, env={**os.environ, "PYTHONPATH": "."}, preexec_fn=lambda: signal.signal(2, signal.SIG_DFL))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_nohup_and_the_sigterm_of_a_cluster():
    command = [sys.executable, "-u", str(HERE / "ppo_cartpole.py"), "--solved-return", "9999", "--updates", "9999"]
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command],  # what nohup does
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for number, moment in (signal.SIGHUP, "update 5/"), (signal.SIGTERM, "update 15/"):
        while moment not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert "saved everything up to update" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_wait_for_a_file_to_be_whole(number):
    heard = []

    def hear(*_):
        heard.append(1)

    before = signal.signal(number, hear)
    try:
        with ppo.uninterrupted():
            signal.raise_signal(number)
            assert heard == []
        assert heard == [1]
        with pytest.raises(OSError, match="full"), ppo.uninterrupted():
            raise OSError("full")
        assert signal.getsignal(number) is hear
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("where", ["state", "add_row", "save"])
def test_ctrl_c_waits_until_everything_is_recorded(where, ctrl_c, monkeypatch):
    """Amid an update's bookkeeping, amid a row, and while an earlier Ctrl-C is being saved."""
    original = getattr(ppo.Run, where)

    def struck(run):
        if run.update == 1:
            signal.raise_signal(signal.SIGINT)
        return original(run)

    monkeypatch.setattr(ppo.Run, where, struck)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(small_args(ppo, updates=2, eval_every=1), cartpole_session(2))
    kept = ppo.load_checkpoint(ppo.Args().checkpoint)
    assert (kept["update"], kept["steps"]) == (1, [0, 1])
    assert math.isfinite(kept["history"]["avg_return"][1]) == (where != "state")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is full exists on Linux only")
@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_output_that_cannot_be_written(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody, open("/dev/full", "w") as full:
        for output, message in (nobody, "[Errno 32] Broken pipe"), (full, "[Errno 28] No space left on device"):
            done = subprocess.run(
                [sys.executable, HERE / "ppo_cartpole.py", *SHORT],
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            )
            assert (done.returncode, done.stderr) == (1, f"ppo_cartpole.py: {message}\n")


def test_a_run_without_stdout():
    done = run(["sh", "-c", f"exec {sys.executable} {HERE / 'ppo_cartpole.py'} {' '.join(SHORT)} >&-"])
    assert (done.returncode, done.stderr) == (0, "")


def test_weights_that_diverge_end_the_run_with_advice():
    done = run_script("--learning-rate", "1e30", *SHORT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("a lower --learning-rate, or smaller rewards, may help")
    assert "Traceback" not in done.stderr
    assert not Path("data/rl/ppo_cartpole.pt").exists()  # the first update has ruined them


def test_a_critic_that_diverges_is_not_kept():
    class Jackpot:
        """Pays so much in the second rollout that sums overflow."""

        def reset(self, seed=None):
            self.t = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            return np.zeros(1, np.float32), 3e38 if self.t > 8 else 1.0, False, False, {}

    args = small_args(ppo, updates=3, num_steps=8, eval_every=1, eval_max_steps=1)
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        ppo.train(args, NativeSession([Jackpot(), Jackpot()], Contract((1,), 2)))
    assert ppo.load_checkpoint(args.checkpoint)["update"] == 1


# name, flags, what the message says
PERSON_ROWS = [
    ("unknown_flag", ["--sed", "1"], "--sed"),
    ("zero_envs", ["--num-envs", "0"], "--num-envs must be above 0"),
    ("minibatches", ["--num-minibatches", "7"], "--num-minibatches must divide --num-envs * --num-steps (256)"),
    ("tiny_minibatches", ["--num-minibatches", "256"], "into parts of at least 2, not 256"),
    ("checkpoint_spelt_otherwise", ["--log", "1.json", "--checkpoint", "./two/../1.json"], "must be different files"),
    ("log_over_checkpoint", ["--log", "1.json", "--checkpoint", "1.json"], "must be different files"),
    ("picture_over_checkpoint", ["--log", "1.json", "--checkpoint", "1.svg"], "must be different files"),
    ("log_nowhere", ["--log", "/proc/nowhere/log.json"], "cannot write /proc/nowhere/log.json"),
    ("checkpoint_is_folder", ["--checkpoint", ".."], "cannot write .."),
    ("checkpoint_is_another_file", ["--checkpoint", "odd_envs.py"], "odd_envs.py is there already, and is no"),
    ("no_cuda", ["--cuda"], "no CUDA device"),
    ("unknown_env", ["--env-id", "CartPol-v1"], "Did you mean: `CartPole`"),
    ("registered_elsewhere", ["--env-id", "Mine-v0"], "(if a module of yours registers it: my_module:Mine-v0)"),
    ("unknown_module", ["--env-id", "nowhere:Some-v0"], "No module named 'nowhere'"),
    ("module_that_python_has", ["--env-id", "json:Some-v0"], "(json is "),
    ("two_modules", ["--env-id", "one:two:Some-v0"], "an id may name one module"),
    ("no_module", ["--env-id", ":CartPole-v1"], "an id may name one module"),
    ("like_a_flag", ["--env-id=-foo"], "Environment `-foo` doesn't exist"),
    ("missing_package", ["--env-id", "GymV26Environment-v0"], "pip install"),
    ("continuous_actions", ["--env-id", "Pendulum-v1"], "Box(-2.0, 2.0, (1,), float32); it must be Discrete"),
    ("late_actions", ["--env-id", "odd_envs:LateActions-v0"], "Discrete(2, start=1); it must be Discrete"),
    ("unlike_each_other", ["--env-id", "odd_envs:Unlike-v0"], "environment 1 declares other spaces than environment 0"),
    ("dict_observation", ["--env-id", "odd_envs:DictObservation-v0"], "it must be a Box"),
    ("pictures", ["--env-id", "ALE/Pong-v5"], "has observations of shape (210, 160, 3): too large for"),
    ("no_server", ["--server-command", "no_such_command"], "no_such_command"),
    ("no_checkpoint", ["--resume"], "ppo_cartpole.py: there is no checkpoint"),
    ("damaged_checkpoint", ["--resume", "--checkpoint", "odd_envs.py"], "not a readable checkpoint"),
]


@pytest.mark.parametrize(("name", "flags", "message"), PERSON_ROWS, ids=[row[0] for row in PERSON_ROWS])
def test_bad_input_gets_one_clear_message(name, flags, message):
    if name == "no_cuda" and torch.cuda.is_available():
        pytest.skip("this machine has what the row needs missing")
    done = run_script(*flags)
    assert done.returncode == 2
    shown = re.sub(r"[│╭╮╰╯─\s]+", " ", done.stderr)
    assert message in shown
    assert "Traceback" not in done.stderr
    assert "server pid" not in done.stderr  # a server that is well is no matter
    goal = "(without --solved-return it ends after update 300)"
    started = f"PPO on odd_envs:Unlike-v0, seed 1: starting 8 environments {goal}\n"
    assert done.stdout == (started if name == "unlike_each_other" else "")  # the others are refused before that


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "Acrobot-v1"], "has env_id 'CartPole-v1', not 'Acrobot-v1'"),
        (["--seed", "4"], "has seed 3, not 4"),
        (["--updates", "3"], "has completed 4 updates; --updates includes these: raise it"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(short_run, flags, message):
    folder, _ = short_run
    done = run_script("--resume", "--checkpoint", str(folder / "data/rl/ppo_cartpole.pt"), *flags)
    assert done.returncode == 2
    assert done.stderr == f"ppo_cartpole.py: {folder}/data/rl/ppo_cartpole.pt {message}\n"


@pytest.mark.parametrize("script", ["ppo_cartpole.py", "ppo_pong_ram.py"])
def test_garbage_is_collected_once_torch_has_been_imported(script):
    """Not before: that takes a third of the import's time.  And what was imported is not looked through later."""
    code = f"""
import gc, runpy, sys
searches = []
gc.callbacks.append(lambda phase, info: searches.append(info["generation"]))
sys.path.insert(0, {str(HERE)!r})
sys.argv = [{script!r}, "--watch"]
try:
    runpy.run_path({str(HERE / script)!r}, run_name="__main__")
except SystemExit as end:
    print(end.code, 2 in searches, gc.isenabled(), gc.get_freeze_count() > 50_000, len(gc.get_objects()) < 20_000)
"""
    done = run([sys.executable, "-c", code])
    assert "there is no checkpoint" in done.stderr
    assert done.stdout.split() == ["2", "False", "True", "True", "True"]


def test_help_names_every_flag_and_says_what_it_does():
    done = run_script("--help", COLUMNS="120")
    assert done.returncode == 0
    for argument in dataclasses.fields(ppo.Args):
        assert f"--{argument.name.replace('_', '-')}" in done.stdout
    assert "epsilon: a sample stops pushing once" in done.stdout


@pytest.mark.parametrize("script", ["ppo_cartpole.py", "ppo_pong_ram.py"])
@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_help_whose_reader_has_left(script, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, HERE / script, "--help"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered, "COLUMNS": "40"},  # more than 8 KiB, a buffer's size
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# ----------------------------------------------------------------------------------------------------------- the README


def test_the_readme_names_every_rule():
    readme = (HERE / "README.md").read_text()
    for rule, meaning in RULES.items():
        assert f"| `{rule}` | {meaning} |" in readme


@pytest.mark.parametrize("script", ["ppo_cartpole.py", "ppo_pong_ram.py"])
def test_uv_installs_what_the_requirements_say(script):
    listed = re.search(r"# dependencies = (\[.*\])", (HERE / script).read_text())[1]
    wanted = (HERE / "requirements.txt").read_text().splitlines()
    assert json.loads(listed) == [each for each in wanted if script == "ppo_pong_ram.py" or "ale-py" not in each]


def test_the_readme_counts_and_compares_the_files_as_they_are():
    """Line counts, and what Pong changes (put the output of the diff into the README where this fails)."""
    readme = (HERE / "README.md").read_text()
    counts = re.findall(r"^\| `([\w/]+\.py)` \| ([\d,]+) \|", readme, re.MULTILINE)
    assert len(counts) == 4
    for name, count in counts:
        assert len((HERE / name).read_text().splitlines()) == int(count.replace(",", "")), name
    scripts = ["ppo_cartpole.py", "ppo_pong_ram.py"]
    shown = re.search(r"```diff\n(.*?)```", readme, re.DOTALL)[1]
    assert shown == run(["diff", *scripts], cwd=HERE).stdout


def test_defaults_are_those_of_the_readme():
    readme = re.sub(r"\s+", " ", (HERE / "README.md").read_text())
    args, default = pong.Args(), ppo.Args()
    for text in (
        f"(gamma {args.gamma}, lambda {args.gae_lambda})",
        f"entropy bonus that is large at first, {args.ent_coef},",
        f"a greedy mean of {pong.SOLVED_RETURN:g} (of 21) over {pong.FINAL_EPISODES} fresh games",
        f"over {args.eval_episodes} games reaches {pong.SOLVED_RETURN:g}",
        f"gamma={default.gamma}, gae_lambda={default.gae_lambda})",
        f"default is 0 in the function, {default.ent_coef} in CartPole's script, in Pong's {args.ent_coef} at first",
        f"{default.eval_episodes} games of ten seconds",
    ):
        assert text in readme


PYTHON = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
BLOCKS = [textwrap.dedent(code) for _, code in PYTHON.findall((HERE / "README.md").read_text())]
BEFORE = {  # what such a block takes for granted
    "Contract(": "from gym_bridge import Contract",
    "import json": "import ppo_cartpole as ppo; "
    "ppo.train(ppo.Args(updates=1, eval_episodes=1, eval_max_steps=1, num_envs=2, num_workers=1))",
    "with torch": "import torch; from ppo_cartpole import Actor, Critic, gae, ppo_loss; "
    "rewards, values, next_values, log_probs = torch.randn(4, 8, 2); terminated = truncated = rewards > 9; "
    "actions = (rewards > 0).long(); observations = torch.randn(8, 2, 4); actor, critic = Actor((4,), 2), Critic((4,))",
    "mode =": "import gymnasium, numpy as np; env_id = 'CartPole-v1'",
}


@pytest.mark.parametrize("block", BLOCKS, ids=[code.split("\n")[0] for code in BLOCKS])
def test_python_in_the_readme_runs(workplace, block):
    """Of trainings, one update."""
    assert len(BLOCKS) == 9
    begin = next((code for start, code in BEFORE.items() if block.startswith(start)), "")
    if "Lake-v0" in block:  # Lander-v0, beside it, is made of what is not installed for the tests
        (workplace / "my_envs.py").write_text(block)
        block = "import gym_bridge; assert gym_bridge.Contract.from_env('my_envs:Lake-v0').obs_shape == (16,)"
    server = f"{sys.executable!r}, {str(HERE / 'gym_bridge.py')!r}"
    block = block.replace('"/other/venv/bin/python", "gym_bridge.py"', server)
    program = f"{begin}\n{re.sub(r'updates=[0-9]+', 'updates=1', block)}"
    path = {"PYTHONPATH": str(HERE)}
    done = run([sys.executable, "-c", program], env={**os.environ, **path})
    assert done.returncode == 0, done.stderr
