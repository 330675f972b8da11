"""Gymnasium in another process, with every transition checked against a contract before anyone may learn from it.

    contract = Contract(obs_shape=(4,), n_actions=2)
    with GymnasiumSession("CartPole-v1", contract, num_envs=8) as session:
        observation = session.reset(seed=1)                 # (8, 4)
        transition = session.step([0, 1, 0, 1, 0, 1, 0, 1])  # a Transition, checked, or an exception

The conversation (protocol 1).  The trainer, that is, the process that opens a session, starts one or more servers
(workers), each with a share of the environments, and talks to each over its stdin and stdout (the wire) in lines of
strict JSON: one object to a line, exactly one reply to each request, with the request's id.  A person can hold the same
conversation: ``python gym_bridge.py --env-id CartPole-v1 --num-envs 2``, then type what follows a ``>``:

    > {"id": 1, "cmd": "describe"}
    < {"id": 1, "ok": true, "protocol": 1, "env_id": "CartPole-v1", "num_envs": 2, "n_actions": 2, "obs_shape": [4],
       "obs_dtype": "float32", "obs_low": [...], "obs_high": [...], "versions": {...}}
    > {"id": 2, "cmd": "reset", "seed": 1}
    < {"id": 2, "ok": true, "obs": [[...], [...]]}
    > {"id": 3, "cmd": "step", "actions": [0, 1]}
    < {"id": 3, "ok": true, "next_obs": [[...], [...]], "reward": [1.0, 1.0], "terminated": [false, false],
       "truncated": [false, false], "reset_obs": {}}
    > {"id": 4, "cmd": "close"}
    < {"id": 4, "ok": true}

Environment i is seeded ``seed + i``; the seed may be null.  ``obs_low`` and ``obs_high`` are nested as an observation
is, with null for an open side; ``versions`` maps names to strings.  ``next_obs`` is where the actions led.  An
environment whose episode has ended begins the next one at once: ``"reset_obs": {"1": [...]}`` is environment 1's first
observation of it.  A request that fails is answered with ``"ok": false`` and ``"error"``, and also with ``rule``,
``expected`` and ``got`` if a rule is broken, ``env`` if one environment is at fault, ``traceback`` if it raised.

A request may say ``"encoding": "base64"``: then ``obs`` and ``next_obs`` are one string each, base64 of all their bytes
(little-endian, in C order), and so is each value of ``reset_obs``.  (A reply may use lists all the same.)  The server
keeps the wire on private duplicates of its stdin and stdout; whatever an environment prints goes to stderr, and its
stdin is empty.

Failure.  A reply is either exactly right, or it is an error: ``ContractViolation`` where the data broke a rule,
``BridgeError`` where anything else went wrong.  After an error the session is dead.  Nothing is retried, so no late
reply can be taken for the answer to another request, and all of a bad batch is discarded.

The end.  ``close()`` asks all servers to close, sends SIGTERM to those that have not, then SIGKILL to every process
group, and waits a bounded time after each of the three.  For each server the trainer holds the writing end of a pipe,
the lifeline, and the server the reading end; nothing is ever written to it.  Once the trainer and all that it has
forked are gone, for whatever reason, the pipe is closed, and Linux kills the server's process group; elsewhere the
server sees that its stdin has closed, and exits.

As a server this file needs the standard library, numpy and gymnasium (and ale_py for ``ALE/...`` ids), so that the
environment may live in another virtual environment, container or host.  Anything that holds the conversation may stand
in its place.  It is started with ``--env-id=ID --num-envs N`` (also ``--awake``, ``--lifeline`` and, where there are
some, ``--make-kwargs``), must flush every reply, and put no other keys into it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import ctypes
import itertools
import json
import math
import operator
import os
import platform
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import IO, Any, NamedTuple, NoReturn
from urllib.parse import quote, unquote

import numpy as np

Array = np.ndarray[Any, Any]

PROTOCOL = 1
TIMEOUT = 60.0  # seconds for one reply: slow imports and level loads fit in, and a hang is noticed within a minute
CLOSE_GRACE = 1.0  # seconds a server gets to close its environments when asked; files and windows want closing
ERROR_GRACE = 0.3  # the same after an error: whoever waits for the message may have waited for a timeout already
TERMINATE_GRACE = 0.2  # seconds between SIGTERM and SIGKILL: what ignores the first would ignore it for longer, too
STOPPED_GRACE = 2.0  # seconds that a reply gets, at most, after a Ctrl-Z or a docker pause that outlasted the timeout
# Cores that this process may use.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
AWAKE = 2e-3  # seconds to poll a pipe before sleeping: without, 8 CartPoles mostly take a seventh longer
MAX_OBS_BYTES = 4 << 20  # a declared observation larger than this is a mistake (a 1024 x 1024 RGB image has 3 MiB)
MAX_ACTIONS = 1 << 16  # one logit for each of them in each environment
MAX_DESCRIBE_BYTES = 128 << 20  # the bounds of such an image, written out; later replies have a limit of their own
FINITE = float(np.finfo(np.float32).max)  # networks compute in float32: whatever is larger is infinite to them
STDERR_LINES = 20  # of the server's stderr, quoted in an error: a traceback fits in
# The core on which a thread runs, or -1 where the C library cannot tell (it can on Linux).
_current_core = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "sched_getcpu", lambda: -1)

REQUESTS = {
    "describe": {"id", "cmd"},
    "reset": {"id", "cmd", "seed", "encoding"},
    "step": {"id", "cmd", "actions", "encoding"},
    "close": {"id", "cmd"},
}
HALF_WAY = "some environments may be ahead of others, since a request failed half-way: reset first"
NUMBERS, BOOLEANS, LISTS = (int, float), (bool, np.bool_), (list, tuple)  # exact types; built once, compared each step
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

RULES = {
    "declared_space": "declared shape, dtype and actions are the contract's; its range, if any, lies in the declared",
    "reset_result": "reset returns a tuple (observation, info)",
    "step_result": "step returns a tuple (observation, reward, terminated, truncated, info)",
    "batch_size": "a batch holds one value for each environment",
    "obs_type": "an observation is a numpy array, or nested lists of numbers (no strings, booleans or nulls in them)",
    "obs_shape": "an observation has the contract's shape",
    "obs_dtype": "every value is a number that fits the contract's dtype: no float for an integer, no overflow",
    "obs_finite": "every value of an observation is finite, in float32 too",
    "obs_range": "every value of an observation lies in the contract's range, both ends included",
    "reward_type": "a reward is a number, not a boolean, a string or null",
    "reward_finite": "a reward is finite, in float32 too",
    "reward_range": "a reward lies in the contract's range, both ends included",
    "done_type": "terminated and truncated are booleans",
    "done_exclusive": "an episode is terminated or truncated, not both (with require_exclusive_done_flags)",
    "reset_obs": "exactly the environments whose episode has ended bring the first observation of the next one",
    "action_count": "one action for each environment",
    "action_type": "an action is an integer, not a float or a boolean",
    "action_range": "an action lies in 0 .. n_actions - 1",
}


# ------------------------------------------------------------------------------------------------------------- errors


class SessionFailure(RuntimeError):
    """What both errors have in common: where it happened.  ``str()`` tells all of it.

    Attributes: ``stage`` ("start", "reset", "step"; in the scripts also "evaluation, step"), ``step`` (number of the
    batched step, counted since the session was opened), ``env`` (index of the environment), ``server`` (pid, exit code
    or signal, last lines of its stderr); each None (or empty) where there is none.
    """

    def __init__(self, what: str, env: int | None = None) -> None:
        self.what, self.env = what, env  # ``args`` stays as given, so that a pool's process can pickle this
        self.stage: str | None = None
        self.step: int | None = None
        self.server: str | None = None

    def __str__(self) -> str:
        stage = self.stage if self.step is None else f"{self.stage} {self.step}"
        where = [stage] if stage else []
        where += [f"environment {self.env}"] if self.env is not None else []
        return (", ".join(where) + ": " if where else "") + self.what + (f"\n[{self.server}]" if self.server else "")


class ContractViolation(SessionFailure):
    """The data broke a rule.  Attributes beside those of ``SessionFailure``: ``rule``, ``expected``, ``got``."""

    def __init__(self, rule: str, expected: str, got: str, env: int | None = None) -> None:
        self.rule, self.expected, self.got = rule, expected, got
        super().__init__(f"contract rule {rule} broken: expected {expected}, got {got}", env)


class BridgeError(SessionFailure):
    """Anything else has gone wrong.

    A server did not start, answer, answer in time or make sense, an environment raised or cannot be made, or the
    session was misused (``step`` before ``reset``, a bad seed, anything after an error).
    """


def _show(value: object) -> str:
    """A value for an error message: with its type where that may be the point, and never a screenful."""
    try:
        text = repr(value[:120] if isinstance(value, (str, bytes, list, tuple)) else value)
    except (Exception, SystemExit):  # an environment's, nested without end, or an integer of 10,000 digits
        return f"a {type(value).__name__} that cannot be shown"
    text = text if len(text) <= 120 else text[:117] + "..."
    plain = (int, float, str, bytes, list, tuple, dict, type(None))
    return text if isinstance(value, plain) else f"{text} ({type(value).__name__})"


def _show_error(error: BaseException, whole: bool = False) -> str:
    """What an error says of itself; whole: with its traceback."""
    try:
        text = "".join((traceback.format_exception if whole else traceback.format_exception_only)(error)).strip()
    except Exception:  # an error need not be well made
        text = f"{type(error).__name__}, which cannot be shown"
    most = 50_000 if whole else 10_000  # a reply has its limit, and JSON may need 12 bytes for a character
    return text if len(text) <= most else text[:most] + "..."


# ----------------------------------------------------------------------------------------------- contract, transition


@dataclass(frozen=True)
class Contract:
    """What the trainer demands of every reset observation and of every transition.

    obs_shape, n_actions, obs_dtype: the spaces ``Box(shape=obs_shape, dtype=obs_dtype)`` and ``Discrete(n_actions)``.
    obs_range: (low, high), each a number or nested as ``obs_shape``; ``None`` demands no range.  Ends included; NaN
        lies in no range.  (Compared in obs_dtype, in which values are kept: what is rounded into the range lies in it.
        Bounds beyond 2**53 are rounded.)
    reward_range: (low, high), likewise.  (Held in float64: np.float32(0.1) lies above 0.1, and outside (0, 0.1).)
    check_obs_finite, check_reward_finite: refuse NaN, infinities, and what would be one in float32.  (In a list an
        infinity is always refused: it may be a number that was too large.  A server always refuses such rewards.)
    require_exclusive_done_flags: refuse a step that is both terminated and truncated (Gymnasium allows both).

    Raises ValueError if it contradicts itself.
    """

    obs_shape: tuple[int, ...]
    n_actions: int
    obs_dtype: str = "float32"
    obs_range: tuple[Any, Any] | None = None
    reward_range: tuple[float, float] | None = None
    check_obs_finite: bool = True
    check_reward_finite: bool = True
    require_exclusive_done_flags: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.obs_shape) if isinstance(self.obs_shape, Iterable) else ()
        if not 1 <= len(shape) <= 32 or not all(_is_int(size) and size > 0 for size in shape):
            raise ValueError(f"obs_shape must be 1 to 32 positive integers, not {_show(self.obs_shape)}")
        shape = tuple(map(int, shape))  # numpy's could overflow below
        if not _is_int(self.n_actions) or not 1 <= self.n_actions <= MAX_ACTIONS:
            raise ValueError(f"n_actions must be an integer in 1 .. {MAX_ACTIONS}, not {_show(self.n_actions)}")
        if type(self.obs_dtype) is not str or self.obs_dtype not in DTYPES:
            raise ValueError(f"obs_dtype must be one of {', '.join(DTYPES)}, not {_show(self.obs_dtype)}")
        if math.prod(shape) * self._dtype.itemsize > MAX_OBS_BYTES:
            raise ValueError(f"an observation of shape {_show(shape)} is larger than {MAX_OBS_BYTES >> 20} MiB")
        # How a frozen dataclass puts fields into one form.
        object.__setattr__(self, "obs_shape", shape)
        object.__setattr__(self, "n_actions", int(self.n_actions))  # Gymnasium's Discrete(2).n is an np.int64
        if self.reward_range is not None:
            low, high = _limits("reward_range", self.reward_range, ())
            object.__setattr__(self, "reward_range", (low.item(), high.item()))
        if self.obs_range is not None:
            object.__setattr__(self, "obs_range", tuple(_tuples(bound.tolist()) for bound in self._obs_range))

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.obs_dtype)

    @cached_property
    def _obs_range(self) -> tuple[Array, Array]:
        """The bounds of every element, unbounded where nothing is demanded; compared in the observation's dtype."""
        low, high = _limits("obs_range", self.obs_range, self.obs_shape)
        if self._dtype.kind == "f":
            with np.errstate(all="ignore"):
                cast = low.astype(self._dtype), high.astype(self._dtype)
            if (np.isinf(cast) & np.isfinite((low, high))).any():
                raise ValueError(f"obs_range {_show(self.obs_range)} does not fit {self.obs_dtype}")
            return cast
        limits = np.iinfo(self._dtype)  # in Python, an integer and a float compare exactly, and nothing overflows
        lows = [math.ceil(max(bound, limits.min)) for bound in low.ravel().tolist()]
        highs = [math.floor(min(bound, limits.max)) for bound in high.ravel().tolist()]
        if any(map(operator.gt, lows, highs)):
            raise ValueError(f"obs_range {_show(self.obs_range)} holds no {self.obs_dtype}")
        low, high = np.array([lows, highs], self._dtype).reshape(2, *self.obs_shape)
        return low, high

    # The bounds that _first_outside compares with; None where there is nothing to check.  Range and finiteness are one
    # question: with the bounds pulled in to the largest finite values, an infinity is out of range, and NaN fails every
    # comparison (hence >= and <= below, never < and >).

    @cached_property
    def _obs_bounds(self) -> tuple[Array, Array] | None:
        low, high = self._obs_range
        if self._dtype.kind == "f":
            if not self.check_obs_finite:
                return None if self.obs_range is None else (low, high)
            most = min(float(np.finfo(self._dtype).max), FINITE)
            return low.clip(-most), high.clip(None, most)
        everything = bool((low <= np.iinfo(self._dtype).min).all() and (high >= np.iinfo(self._dtype).max).all())
        return None if everything else (low, high)

    @cached_property
    def _reward_bounds(self) -> tuple[Array, Array] | None:
        if not self.check_reward_finite and self.reward_range is None:
            return None
        low, high = self.reward_range or (-math.inf, math.inf)
        most = FINITE if self.check_reward_finite else math.inf
        return np.array(max(low, -most)), np.array(min(high, most))

    @classmethod
    def from_env(
        cls,
        env_id: str,
        make_kwargs: dict[str, Any] | None = None,
        server_command: Sequence[str] | None = None,
        timeout: float = TIMEOUT,
    ) -> Contract:
        """The contract that an environment declares with its spaces, asked of a server started for the purpose.

        Raises BridgeError if the server fails, or for spaces of another kind than a Box of numbers and a Discrete that
        starts at 0; ContractViolation if one of these is impossible.
        """
        anything = cls((1,), 1)  # plays no part: this session ends before its first reset
        session = GymnasiumSession(env_id, anything, 1, 1, make_kwargs, timeout, server_command, wait=False)
        with session:
            return session._handshake(demanded=None)

    # Exact types: these turn what an environment returned, or what JSON brought, into arrays, or refuse it.

    def _observation(self, array: Any, env: int) -> Array:
        """One observation as an array ``obs_shape`` of ``obs_dtype``; may share memory with what came."""
        if type(array) in LISTS:
            return self._from_list(array, env)
        if type(array) is np.memmap:  # rows of a file
            array = np.asarray(array)
        if type(array) is not np.ndarray:  # nor another subclass: a masked array or a matrix has ideas of its own
            raise ContractViolation("obs_type", "an array of numbers", _show(array), env)
        if array.shape != self.obs_shape:
            raise ContractViolation("obs_shape", str(self.obs_shape), str(array.shape), env)
        if array.dtype == self._dtype:
            return array
        # Where the values fit, another width is welcome (many compute in float64), and so are integers for floats.
        if array.dtype.kind not in ("fiu" if self._dtype.kind == "f" else "iu"):
            raise ContractViolation("obs_dtype", self.obs_dtype, f"{array.dtype.name} {_show(array.tolist())}", env)
        with np.errstate(all="ignore"):
            cast = array.astype(self._dtype)
        fits = (np.isfinite(cast) | ~np.isfinite(array)) if self._dtype.kind == "f" else cast == array
        if not fits.all():
            index = _first_true(~fits)
            raise ContractViolation("obs_dtype", f"numbers that fit {self.obs_dtype}", str(array[index]), env)
        return cast

    def _from_list(self, raw: Any, env: int) -> Array:
        parts = self._flatten(raw, self.obs_shape, env)
        numbers = [part.item() if _is_scalar(part) else part for part in parts]
        floats = self._dtype.kind == "f"
        limits: Any = np.finfo(self._dtype) if floats else np.iinfo(self._dtype)
        # A float is rounded to the largest one if it is less than half a step above it.
        high = float(limits.max) * (1 + float(limits.eps) / 4) if floats else int(limits.max)
        low = -high if floats else int(limits.min)
        for number in numbers:
            if type(number) not in NUMBERS:
                raise ContractViolation("obs_type", "numbers", _show(number), env)
            fits = low <= number <= high or number != number  # NaN is looked for later; infinity may have been 1e999
            if (type(number) is float and not floats) or not fits:
                raise ContractViolation("obs_dtype", f"numbers that fit {self.obs_dtype}", _show(number), env)
        return np.array(numbers, self._dtype).reshape(self.obs_shape)

    def _flatten(self, raw: Any, shape: tuple[int, ...], env: int) -> Iterator[Any]:
        if not shape:
            yield raw
        elif type(raw) in LISTS and len(raw) == shape[0]:
            for part in raw:
                yield from self._flatten(part, shape[1:], env)
        else:
            raise ContractViolation("obs_shape", f"{self.obs_shape}, nested lists of these lengths", _show(raw), env)

    @staticmethod
    def _outcome(reward: Any, terminated: Any, truncated: Any, env: int) -> tuple[float, bool, bool]:
        """Reward and flags of one environment."""
        if type(reward) not in NUMBERS and not _is_scalar(reward):
            raise ContractViolation("reward_type", "a number", _show(reward), env)
        if type(terminated) not in BOOLEANS or type(truncated) not in BOOLEANS:
            flags = _show((terminated, truncated))
            raise ContractViolation("done_type", "booleans for terminated and truncated", flags, env)
        try:
            return float(reward), bool(terminated), bool(truncated)
        except OverflowError:  # an integer of hundreds of digits
            raise ContractViolation("reward_finite", "a finite reward", _show(reward), env) from None

    # Values: these look at whole batches of exact type.  Each is two comparisons where all is well.

    def _check_observations(self, observations: Array, envs: Sequence[int] | None = None) -> None:
        """(n, *obs_shape), row k of environment ``envs[k]`` (default: k)."""
        if index := _first_outside(observations, self._obs_bounds):
            value, element = observations[index], f"observation{list(index[1:])}"
            env = index[0] if envs is None else envs[index[0]]
            if self.check_obs_finite and not abs(float(value)) <= FINITE:
                raise ContractViolation("obs_finite", f"a finite {element} (in float32)", str(value), env)
            low, high = (bound[index[1:]] for bound in self._obs_range)
            raise ContractViolation("obs_range", f"{element} in [{low}, {high}]", str(value), env)

    def _check_rewards(self, rewards: Array) -> None:
        if index := _first_outside(rewards, self._reward_bounds):
            value, env = rewards[index], index[0]
            if self.check_reward_finite and not abs(value) <= FINITE:
                raise ContractViolation("reward_finite", "a finite reward (in float32)", str(value), env)
            low, high = self.reward_range  # type: ignore[misc]
            raise ContractViolation("reward_range", f"a reward in [{low}, {high}]", str(value), env)

    def _check_actions(self, actions: Any, num_envs: int) -> Array:
        """(N,) integers, as a new int64 array."""
        if isinstance(actions, LISTS) and not all(map(_is_int, actions)):
            raise ContractViolation("action_type", "integers", _show(actions))
        actions = np.array(actions)  # first of all: what is checked is what will be sent, whoever changes theirs
        if actions.shape != (num_envs,):
            raise ContractViolation("action_count", f"shape ({num_envs},)", str(actions.shape))
        if actions.dtype.kind not in "iu":
            raise ContractViolation("action_type", "integers", str(actions.dtype))
        if index := _first_outside(actions, (0, self.n_actions - 1)):
            raise ContractViolation("action_range", f"0 .. {self.n_actions - 1}", str(actions[index]), index[0])
        return np.array(actions, np.int64)


def _first_outside(values: Array, bounds: tuple[Any, Any] | None) -> tuple[int, ...] | None:
    """The index of the first value that does not lie within the bounds."""
    if bounds is None:
        return None
    good = (values >= bounds[0]) & (values <= bounds[1])
    return None if np.count_nonzero(good) == good.size else _first_true(~good)  # count_nonzero: quicker than all()


def _first_true(mask: Array) -> tuple[int, ...]:
    return tuple(np.argwhere(mask)[0].tolist())


def _is_scalar(value: Any) -> bool:
    """A number of numpy's."""
    return isinstance(value, np.generic) and value.dtype.kind in "fiu"


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _tuples(nested: Any) -> Any:
    """Nested lists as nested tuples, which can be hashed."""
    return tuple(_tuples(part) for part in nested) if isinstance(nested, list) else nested


def _limits(name: str, limits: tuple[Any, Any] | None, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """(low, high) as float64 arrays of ``shape``; without limits, infinities."""
    try:
        low, high = limits if limits is not None else (-np.inf, np.inf)
        if any(np.asarray(bound).dtype.kind in "SU" for bound in (low, high)):  # numpy would read numbers in them
            raise TypeError
        low, high = (np.broadcast_to(np.asarray(bound, np.float64), shape) for bound in (low, high))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a pair of numbers of shape {shape}, not {_show(limits)}") from None
    if not ((low <= high) & (low < np.inf) & (high > -np.inf)).all():
        raise ValueError(f"{name} must have low <= high, and for an open side -inf or inf, not {_show(limits)}")
    return low, high


@dataclass(frozen=True)
class Transition:
    """One checked step of N environments.  Arrays of its own: nothing overwrites them later."""

    observation: Array  # (N, *session.obs_shape) obs_dtype, what the actions were chosen from
    action: Array  # (N,) int64
    reward: Array  # (N,) float64
    next_observation: Array  # (N, *session.obs_shape) obs_dtype, what the actions led to, before any auto-reset
    terminated: Array  # (N,) bool, the episode ended by the rules of the task
    truncated: Array  # (N,) bool, the episode was cut short from outside (a time limit)

    @property
    def done(self) -> Array:
        """(N,) bool: the episode is over, for whichever reason."""
        return self.terminated | self.truncated


# ----------------------------------------------------------------------------------------------------------- sessions


class _Batch(NamedTuple):
    """One step of n environments, exact in type and shape, its values not yet checked."""

    next_obs: Array  # (n, *obs_shape)
    reward: Array  # (n,) float64
    terminated: Array  # (n,) bool
    truncated: Array  # (n,) bool
    reset_obs: dict[int, Array]  # environment -> (*obs_shape), for those that finished


class CheckedSession(ABC):
    """N environments, stepped together, every reset and transition checked.  The checks are here, for every kind.

    An environment that finishes is reset at once (Gymnasium: same-step autoreset): ``Transition.next_observation`` is
    where the episode ended (its ``final_obs``), the session's ``observation`` is where the next one begins.

    Where one observation does not tell all, a session can show more, always of the same episode:
    append_action: each observation (a vector) is followed by the action that led to it, one-hot; zeros after a reset.
    frame_stack: F > 1 shows the last F of them, newest last; an episode begins with its first one F times.

    Attributes: ``num_envs``, ``contract``, ``obs_shape`` (of what is shown: the contract's, changed by these two),
    ``transitions_checked``, ``versions`` (what the environments run on).
    ``reset`` and ``step`` raise ContractViolation or BridgeError, or what a signal handler raises meanwhile; after that
    the session is dead.  It belongs to one process, and one thread at a time.
    """

    def __init__(self, num_envs: int, contract: Contract, frame_stack: int = 1, append_action: bool = False) -> None:
        if not isinstance(contract, Contract):
            raise TypeError(f"contract must be a Contract, not {_show(contract)}")
        if not (_is_int(frame_stack) and frame_stack >= 1):
            raise ValueError(f"frame_stack must be a positive integer, not {frame_stack!r}")
        if append_action and len(contract.obs_shape) != 1:
            raise ValueError(f"append_action needs observations that are vectors, not {contract.obs_shape}")
        self.num_envs, self.contract = int(num_envs), contract
        self.frame_stack, self.append_action = frame_stack, append_action
        self.transitions_checked = 0
        self.versions: dict[str, str] = {}
        self._observation: Array | None = None
        self._dead: str | None = None
        self._closed = False
        self._process, self._turn = os.getpid(), threading.Lock()

    @property
    def obs_shape(self) -> tuple[int, ...]:
        shape = self.contract.obs_shape
        shape = (shape[0] + self.contract.n_actions,) if self.append_action else shape
        return shape if self.frame_stack == 1 else (self.frame_stack, *shape)

    @property
    def observation(self) -> Array:
        """(N, *self.obs_shape): what the next actions are to be chosen from."""
        if self._dead is not None:
            raise BridgeError(f"this session is dead: {self._dead}")
        if self._observation is None:
            raise BridgeError("there is no observation before reset()")
        return self._observation.copy()

    def reset(self, seed: int | None = None) -> Array:
        """Begin a new episode everywhere; environment i is seeded ``seed + i``.  Returns ``observation``."""
        with self._guarded("reset"):
            if seed is not None and not (_is_int(seed) and seed >= 0):
                raise BridgeError(f"a seed is a non-negative integer or None, not {_show(seed)}")
            first = self._reset(None if seed is None else int(seed))
            self.contract._check_observations(first)
            self._observation = self._begin(first)
            return self._observation.copy()

    def step(self, actions: Sequence[int] | Array) -> Transition:
        """Take ``actions`` (N,), one per environment; finished environments begin a new episode."""
        with self._guarded("step"):
            if self._observation is None:
                raise BridgeError("step() before reset()")
            contract = self.contract
            action = contract._check_actions(actions, self.num_envs)
            next_obs, reward, terminated, truncated, reset_obs = self._step(action)
            contract._check_observations(next_obs)
            contract._check_rewards(reward)
            if contract.require_exclusive_done_flags and (terminated & truncated).any():
                env = int(np.argmax(terminated & truncated))
                raise ContractViolation("done_exclusive", "terminated or truncated", "both", env)
            done = terminated | truncated
            finished = done.nonzero()[0].tolist()
            if finished != sorted(reset_obs):
                env = min(set(finished) ^ set(reset_obs))
                expected, got = ("one", "none") if done[env] else ("none (it did not finish)", "one")
                raise ContractViolation("reset_obs", f"{expected} for this environment", got, env)
            if self.append_action:
                next_obs = np.hstack([next_obs, action[:, None] == np.arange(contract.n_actions)])  # one-hot
            if self.frame_stack > 1:
                next_obs = np.concatenate([self._observation[:, 1:], next_obs[:, None]], axis=1)
            observation = next_obs.copy()
            if finished:
                first = np.array([reset_obs[env] for env in finished])
                contract._check_observations(first, finished)
                observation[finished] = self._begin(first)
            transition = Transition(self._observation, action, reward, next_obs, terminated, truncated)
            self._observation = observation
            self.transitions_checked += self.num_envs
            return transition

    def close(self) -> None:
        """End everything, whatever state it is in.  Raises nothing (Ctrl-C is heard), may be called again.

        Servers are gone within 3 seconds; what is in this process takes as long as it takes.
        """
        if not self._closed and self._process == os.getpid():
            grace = CLOSE_GRACE if self._dead is None else ERROR_GRACE
            self._closed, self._dead = True, self._dead or "it was closed"
            self._close(grace)

    def __enter__(self) -> CheckedSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def twin(self, num_envs: int) -> CheckedSession:
        """A second session over environments of the same kind, not yet reset (for evaluation, say)."""

    def shares_environments(self, other: CheckedSession) -> bool:
        """Whether a step of one is a step of the other, too."""
        return other is self

    def _begin(self, first: Array) -> Array:
        """What is shown of episodes that begin with ``first`` (n, *contract.obs_shape)."""
        if self.append_action:
            first = np.pad(first, [(0, 0), (0, self.contract.n_actions)])
        return first if self.frame_stack == 1 else np.repeat(first[:, None], self.frame_stack, axis=1)

    @abstractmethod
    def _reset(self, seed: int | None) -> Array: ...

    @abstractmethod
    def _step(self, actions: Array) -> _Batch: ...

    @abstractmethod
    def _close(self, grace: float) -> None: ...

    def _report(self, env: int | None) -> str | None:
        """What an error should say of the process behind environment ``env``."""
        return None

    @contextlib.contextmanager
    def _guarded(self, stage: str) -> Iterator[None]:
        """Any exception within ends the session, Ctrl-C too, since a reply may still be on its way.

        While it runs, the session counts as dead to the environment being stepped and to signal handlers.
        """
        if self._process != os.getpid():  # one would take the other's reply for its own
            raise BridgeError("this session belongs to the process that opened it, not to one forked from there")
        # Two threads could both find it alive: hence the lock.  (Once dead, it may keep that.)
        if not self._turn.acquire(blocking=False) or self._dead is not None:
            raise BridgeError(f"this session is dead: {self._dead or 'another thread is in it'}")
        self._dead = f"its {stage} has not ended"
        step = self.transitions_checked // self.num_envs + 1 if stage == "step" else None
        try:
            yield
            if self._closed:
                raise BridgeError("the session was closed meanwhile")
            self._dead = None
        except GeneratorExit:  # a signal handler has raised within contextlib: that exception is on its way already
            self._observation = None
            self.close()
            raise
        except BaseException as error:
            self._observation, failure = None, error
            try:
                if self._closed and not _is_of_a_signal(error):  # whatever was seen may come of that
                    failure = BridgeError("the session was closed meanwhile")
                elif not isinstance(error, SessionFailure) and not _is_of_a_signal(error):  # nobody has thought of it
                    failure = BridgeError(_show_error(error))
                if isinstance(failure, SessionFailure):
                    failure.stage, failure.step = stage, step
                    if failure.server is None:
                        failure.server = self._report(failure.env)
                self._dead = f"{type(failure).__name__}: {failure}"
            finally:
                self.close()
            if failure is not error:
                raise failure from error
            raise
        finally:
            self._turn.release()


class GymnasiumSession(CheckedSession):
    """Gymnasium in ``num_workers`` subprocesses that share the N environments between them.

    num_workers: if there is one per core, each is pinned to its own (Linux, no ``server_command``).
    make_kwargs: for ``gymnasium.make`` (JSON values).  timeout: seconds for one reply.
    server_command: what to run in place of ``[sys.executable, "-u", "gym_bridge.py"]``, for an environment that lives
    elsewhere: ``["/other/venv/bin/python", "gym_bridge.py"]``, ``["docker", "run", "-i", ...]``, ``["ssh", ...]``.
    The flags of the server (``--env-id`` and so on) are appended to it.
    wait: False leaves the handshake to the first ``reset``, so that servers start while the caller does other things.

    Raises ValueError or TypeError for invalid arguments, BridgeError if the command cannot be run; and (with
    ``wait=False``, in ``reset``) BridgeError if a server does not start, or if the spaces are not a Box of numbers and
    a Discrete that starts at 0, ContractViolation if they are, but do not fit the contract.
    """

    def __init__(
        self,
        env_id: str,
        contract: Contract,
        num_envs: int = 1,
        num_workers: int = 1,
        make_kwargs: dict[str, Any] | None = None,
        timeout: float = TIMEOUT,
        server_command: Sequence[str] | None = None,
        wait: bool = True,
        frame_stack: int = 1,
        append_action: bool = False,
    ) -> None:
        if not (_is_int(num_envs) and _is_int(num_workers) and 1 <= num_workers <= num_envs):
            raise ValueError(f"need integers 1 <= num_workers <= num_envs, not {num_workers!r} and {num_envs!r}")
        if isinstance(server_command, str):
            raise ValueError(f"server_command must be a list of words (see shlex.split), not {server_command!r}")
        if server_command is not None and not server_command:
            raise ValueError("server_command is empty: leave it out for this Python")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
        super().__init__(num_envs, contract, frame_stack, append_action)
        num_workers = int(num_workers)
        self._env_id, self._timeout = str(env_id), timeout
        self._again = partial(
            GymnasiumSession,
            env_id,
            contract,
            make_kwargs=copy.deepcopy(make_kwargs),
            timeout=timeout,
            server_command=list(server_command) if server_command else None,
            frame_stack=frame_stack,
            append_action=append_action,
        )
        self._connected = False
        self._servers: list[_Server] = []
        self._talking_to: _Server | None = None
        command = [*(server_command or [sys.executable, "-u", os.path.abspath(__file__)]), f"--env-id={env_id}"]
        command += ["--make-kwargs", quote(json.dumps(make_kwargs))] if make_kwargs else []
        awake = AWAKE if num_workers < CORES else 0.0  # a core for each server and for the trainer
        cuts = [worker * self.num_envs // num_workers for worker in range(num_workers + 1)]
        with self._guarded("start"):
            for envs in map(range, cuts, cuts[1:]):
                self._servers.append(_Server(command, envs, timeout, awake))
            if num_workers == CORES and not server_command and sys.platform == "linux":
                # Held to a core each: left to itself, the kernel lets two of them begin on the same one at times.
                for server, core in zip(self._servers, sorted(os.sched_getaffinity(0)), strict=False):
                    with contextlib.suppress(OSError):  # it may have died already
                        os.sched_setaffinity(server.process.pid, {core})
                        server.core = core
        if wait:
            self._handshake(contract)

    def twin(self, num_envs: int) -> GymnasiumSession:
        return self._again(num_envs, min(len(self._servers), num_envs), wait=False)

    def reset(self, seed: int | None = None) -> Array:
        if not self._connected:
            self._handshake(self.contract)
        return super().reset(seed)

    def _handshake(self, demanded: Contract | None) -> Contract:
        """The spaces that the servers declare; they must be those that ``demanded`` names, if it is given."""
        with self._guarded("start"):
            deadline = time.monotonic() + self._timeout
            for server in self._each():
                server.send({"cmd": "describe"}, deadline)
            replies = [server.receive(deadline) for server in self._each()]
            for server, reply in zip(self._each(), replies, strict=True):
                declared, self.versions = _decode_describe(reply, server.envs, self._env_id)
                if demanded is not None:
                    _compare(declared, demanded)
                # Every number of next_obs and of reset_obs written out, and room for all the rest or for a traceback.
                server.max_line_bytes = 64 * len(server.envs) * (math.prod(declared.obs_shape) + 2) + (1 << 20)
        self._connected = True
        return declared

    def _each(self, last: int = -1) -> Iterator[_Server]:
        """Every server in turn, that of core ``last`` at the end; an error during its turn reports its state."""
        for server in sorted(self._servers, key=lambda server: server.core == last):
            self._talking_to = server
            yield server
        self._talking_to = None

    def _reset(self, seed: int | None) -> Array:
        contract, deadline = self.contract, time.monotonic() + self._timeout
        for server in self._each():
            own_seed = None if seed is None else seed + server.envs.start
            server.send({"cmd": "reset", "seed": own_seed, "encoding": "base64"}, deadline)
        return np.concatenate([_decode_reset(one.receive(deadline), one.envs, contract) for one in self._each()])

    def _step(self, actions: Array) -> _Batch:
        contract, deadline = self.contract, time.monotonic() + self._timeout
        # A server that wakes up on this thread's core interrupts it: so the others are asked first.
        for server in self._each(last=_current_core()):
            own = actions[server.envs.start : server.envs.stop]
            server.send({"cmd": "step", "actions": own.tolist(), "encoding": "base64"}, deadline)
        batches = [_decode_step(one.receive(deadline), one.envs, contract) for one in self._each()]
        if len(batches) == 1:
            return batches[0]
        next_obs, reward, terminated, truncated, reset_obs = zip(*batches, strict=True)
        merged = {env: first for own in reset_obs for env, first in own.items()}
        join = np.concatenate
        return _Batch(join(next_obs), join(reward), join(terminated), join(truncated), merged)

    def _report(self, env: int | None) -> str | None:
        host = self._talking_to or next((server for server in self._servers if env in server.envs), None)
        return host.report() if host else None

    def _close(self, grace: float) -> None:
        _end(self._servers, grace)


class NativeSession(CheckedSession):
    """In-process environments (objects with Gymnasium's ``reset`` and ``step``) behind the same checks.

    What an environment returns is copied at once (many overwrite their arrays), in the contract's dtype if it fits.
    An exception of an environment becomes a BridgeError; nothing here can stop one that hangs.
    """

    def __init__(
        self, envs: Sequence[Any], contract: Contract, frame_stack: int = 1, append_action: bool = False
    ) -> None:
        self._envs = list(envs)
        if not self._envs or len(_innermost(self._envs)) < len(self._envs):
            raise ValueError("need at least one environment, and each an object of its own (not [env] * 8)")
        super().__init__(len(self._envs), contract, frame_stack, append_action)

    def twin(self, num_envs: int) -> NativeSession:
        """Deep copies of the environments: whatever state they share outside themselves stays shared."""
        envs = [copy.deepcopy(self._envs[i % self.num_envs]) for i in range(num_envs)]
        if _overlap(envs, self._envs):
            raise ValueError("an environment's copy is itself, so that a twin would step this session's environments")
        return NativeSession(envs, self.contract, self.frame_stack, self.append_action)

    def shares_environments(self, other: CheckedSession) -> bool:
        return isinstance(other, NativeSession) and _overlap(self._envs, other._envs)

    def _reset(self, seed: int | None) -> Array:
        return np.stack([self._first(env, None if seed is None else seed + env) for env in range(self.num_envs)])

    def _step(self, actions: Array) -> _Batch:
        contract = self.contract
        next_obs = np.empty((self.num_envs, *contract.obs_shape), contract._dtype)
        outcomes, reset_obs = [], {}
        for env, action in enumerate(actions):  # np.int64, as in Gymnasium: a plain int could wrap around in uint8
            result = self._ask(env, "step", action)
            if not isinstance(result, tuple) or len(result) != 5:
                raise ContractViolation("step_result", RULES["step_result"], _show(result), env)
            observation, reward, terminated, truncated, _ = result
            next_obs[env] = contract._observation(observation, env)
            outcomes.append(contract._outcome(reward, terminated, truncated, env))
            if terminated or truncated:
                reset_obs[env] = self._first(env, None)
        rewards, terminations, truncations = map(np.array, zip(*outcomes, strict=True))
        return _Batch(next_obs, rewards, terminations, truncations, reset_obs)

    def _first(self, env: int, seed: int | None) -> Array:
        result = self._ask(env, "reset", seed=seed)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ContractViolation("reset_result", RULES["reset_result"], _show(result), env)
        return self.contract._observation(result[0], env).copy()

    def _close(self, grace: float) -> None:
        for env in range(self.num_envs):
            with contextlib.suppress(BridgeError):  # it may have no close
                self._ask(env, "close")

    def _ask(self, env: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Whatever an environment raises is its own failure, SystemExit and a panic of Rust too."""
        try:
            return getattr(self._envs[env], method)(*args, **kwargs)
        except BaseException as error:
            if _is_of_a_signal(error):
                raise
            raise BridgeError(f"the environment raised {_show_error(error)}", env) from error


def _innermost(envs: list[Any]) -> dict[int, Any]:
    """The environments without their wrappers, by identity (which says nothing once an object is gone)."""
    return {id(inner): inner for inner in (getattr(env, "unwrapped", env) for env in envs)}


def _overlap(envs: list[Any], others: list[Any]) -> bool:
    return not _innermost(envs).keys().isdisjoint(_innermost(others))


def _is_of_a_signal(error: BaseException) -> bool:
    """Whether a signal handler has raised it, while something else ran: Ctrl-C, or a SIGTERM that is to end it all."""
    if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        return True  # (a server leaves SIGINT to the kernel)
    # A handler is given the frame that it interrupts, its caller in the traceback.  (Which handlers are installed says
    # less: one may take itself off, so that the second Ctrl-C kills.)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for interrupted, frame in itertools.pairwise(frames):
        for local in frame.f_locals.values():
            if any(each is interrupted for each in (local if type(local) is tuple else [local])):
                return True
    return False


# ------------------------------------------------------------------------------------------------------------- client


class _Server:
    """One server process, seen from the trainer: its pipes, the ids of its replies, its last words.

    ``envs`` are the environments of the session that it hosts; the server itself counts its own from 0.
    """

    def __init__(self, command: Sequence[str], envs: range, timeout: float, awake: float) -> None:
        self.envs, self.timeout, self.awake, self.last_id = envs, timeout, awake, 0
        self.core: int | None = None  # that it is held to
        if os.name != "posix":
            raise BridgeError("Gymnasium in a subprocess needs Linux or macOS; on Windows, run this inside WSL")
        command = [*map(os.fsdecode, command), "--num-envs", str(len(envs)), "--awake", str(awake)]
        # Where stdin, stdout or stderr is closed, a pipe would take its number, and hear what servers print.
        while (lowest_free := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(lowest_free)
        # Nothing is ever written to the lifeline.  However this process ends, it closes, and that kills the server,
        # whatever it is, and even if it hangs: the kernel has been told so, by us.
        lifeline, held = os.pipe()
        self.lifeline = os.fdopen(held, "wb", 0)
        command += ["--lifeline", str(lifeline)]
        try:
            self.process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[lifeline],
                start_new_session=True,  # a process group of its own: Ctrl-C is the trainer's, and kill reaches all
            )
            _kill_when_closed(lifeline, self.process.pid)
        except (OSError, ValueError) as error:
            self.lifeline.close()
            raise BridgeError(f"cannot start the environment server: {error}\n[{shlex.join(command)[:1000]}]") from None
        finally:
            os.close(lifeline)
        # A dropped Popen keeps a living child's pipes open; a child without a lifeline lives until its stdin ends.
        weakref.finalize(self, self.process.stdin.close)  # type: ignore[union-attr]
        self.stdin: int = self.process.stdin.fileno()  # type: ignore[union-attr]
        self.stdout: int = self.process.stdout.fileno()  # type: ignore[union-attr]
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)  # a server could take back what poll() has seen
        self.readable, self.writable = select.poll(), select.poll()
        self.readable.register(self.stdout, select.POLLIN)
        self.writable.register(self.stdin, select.POLLOUT)
        self.max_line_bytes = MAX_DESCRIBE_BYTES
        self.stderr_tail = bytearray()
        # The thread knows the pipe and the tail, not this object: a session that is dropped can be collected.
        self.stderr_thread = threading.Thread(target=_drain, args=(self.process.stderr, self.stderr_tail), daemon=True)
        try:
            self.stderr_thread.start()
        except RuntimeError:  # one thread too many; nobody else knows of this server yet
            _signal_group(self, signal.SIGKILL)
            raise

    def send(self, request: dict[str, Any], deadline: float) -> None:
        if self.readable.poll(0):
            unasked = os.read(self.stdout, 200)
            raise BridgeError(f"the server spoke without being asked: {unasked!r}" if unasked else "the server hung up")
        self.last_id += 1
        data = _dumps({"id": self.last_id, **request}).encode() + b"\n"
        while data:
            try:
                data = data[os.write(self.stdin, data) :]
            except BlockingIOError:
                if not _poll(self.writable, deadline):
                    raise BridgeError(f"the server has not read its request within {self.timeout:g} s") from None
            except BrokenPipeError:
                raise BridgeError("the server hung up") from None

    def receive(self, deadline: float) -> dict[str, Any]:
        """The reply to the last request, without id and ok: exactly one line."""
        line, _, rest = self._read(deadline).partition(b"\n")
        try:
            reply = _loads(line)
        except ValueError as error:
            raise BridgeError(f"the reply is not a line of strict JSON ({error}): {_show(line)}") from None
        if not isinstance(reply, dict) or not _is_int(reply.get("id")) or type(reply.get("ok")) is not bool:
            raise BridgeError(f"a reply is an object with an integer id and a boolean ok, not {_show(line)}")
        if reply["id"] != self.last_id:
            raise BridgeError(f"the reply has id {_show(reply['id'])}, the request had {self.last_id}")
        if rest:
            raise BridgeError(f"more than one reply to one request: {_show(rest)}")
        del reply["id"]
        if not reply.pop("ok"):
            _decode_error(reply, self.envs, starting=self.last_id == 1)
        return reply

    def _read(self, deadline: float) -> bytes:
        """What the server writes until there is a line end in it."""
        data, chunk, grace = bytearray(), b"", STOPPED_GRACE
        while b"\n" not in chunk:
            ready = _poll(self.readable, deadline, self.awake)
            if not ready or time.monotonic() > deadline:
                # By how much the wait was too long: next to nothing, unless this process was stopped.
                if (late := min(time.monotonic() - deadline, grace)) <= 0:
                    raise BridgeError(f"no whole reply within {self.timeout:g} s; so far {_show(bytes(data))}")
                deadline, grace = time.monotonic() + late, 0.0  # as long again, once: the server may have been, too
                continue
            chunk = os.read(self.stdout, 1 << 16)
            data += chunk
            if not chunk:
                so_far = f" in the middle of a reply: {_show(bytes(data))}" if data else ""
                raise BridgeError(f"the server hung up{so_far}")
            if len(data) > self.max_line_bytes:
                raise BridgeError(f"the reply is longer than {self.max_line_bytes:,} bytes: {_show(bytes(data))}")
        return bytes(data)

    def report(self) -> str:
        """Pid, how it ended, the last lines of its stderr."""
        if self.readable.poll(0):  # readable after the last reply: most likely end of file, so the exit code is near
            _wait_for_exits([self], 0.3)
        code, state = self.process.poll(), "was running"
        if code is not None:
            self.stderr_thread.join(0.2)
            names = {-number: number.name for number in signal.Signals}
            state = f"exit code {code}" if code >= 0 else f"killed by signal {-code} ({names.get(code, 'real-time')})"
        lines = self.stderr_tail.decode(errors="replace").splitlines()[-STDERR_LINES:]
        last = "; its last lines on stderr:\n  " + "\n  ".join(lines) if lines else ""
        return f"server pid {self.process.pid}, {state}{last}"


def _kill_when_closed(pipe: int, group: int) -> None:
    """Ask the kernel to kill a process group when the writing end of ``pipe`` is closed (Linux; macOS cannot).

    That stays with the reading end: it holds for as long as someone in the group has that open.
    """
    import fcntl  # not on Windows, where this is never called

    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -group)
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)  # type: ignore[attr-defined, unused-ignore]
        fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC | fcntl.fcntl(pipe, fcntl.F_GETFL))


def _drain(stderr: IO[bytes], tail: bytearray) -> None:
    """Pass on what the environments print, and keep the end of it for an error message."""
    while chunk := stderr.read(1 << 16):
        tail += chunk
        del tail[:-8192]
        with contextlib.suppress(OSError):  # the trainer's own stderr may be closed: then nobody is listening
            os.write(2, chunk)  # not sys.stderr: a daemon thread must not hold its lock when the program ends
    stderr.close()


def _poll(poller: select.poll, deadline: float, awake: float = 0.0) -> bool:
    """Whether the pipe is ready by the deadline; the first ``awake`` seconds of waiting are spent without sleep."""
    now = time.monotonic()
    asleep_from = min(now + awake, deadline)
    while now < asleep_from:
        if poller.poll(0):
            return True
        os.sched_yield()  # whoever has work to do goes first, the other end of the pipe not least
        now = time.monotonic()
    # Past the deadline, too: after a Ctrl-Z and fg the time is over, but the reply may have long been there.
    return bool(poller.poll(max(0.0, min((deadline - now) * 1000, 2**31 - 1))))


def _end(servers: list[_Server], grace: float) -> None:
    """Ask (after an error, too: environments may have files to close), terminate, kill.

    Servers are waited for, within bounds; what they started dies with them.
    """
    try:
        for server in servers:
            with contextlib.suppress(OSError):  # it is exiting, or it reads no more
                if server.process.poll() is None:  # else a trainer that heeds SIGPIPE would be gone without a word
                    os.write(server.stdin, _dumps({"id": server.last_id + 1, "cmd": "close"}).encode() + b"\n")
            server.stdin = -1  # the number may soon be another file's; a signal handler can have come between two uses
            server.process.stdin.close()  # type: ignore[union-attr]
        _wait_for_exits(servers, grace)
        for server in servers:
            if server.process.poll() is None:
                _signal_group(server, signal.SIGTERM)
        _wait_for_exits(servers, TERMINATE_GRACE)
    finally:  # Ctrl-C may cut the waiting short, but not this
        for server in servers:
            _signal_group(server, signal.SIGKILL)
            server.lifeline.close()
        _wait_for_exits(servers, CLOSE_GRACE)  # a moment, unless the machine is very busy
    deadline = time.monotonic() + 0.2  # the last words are a matter of moments
    for server in servers:
        server.stdout = -1
        server.process.stdout.close()  # type: ignore[union-attr]
        server.stderr_thread.join(max(0.0, deadline - time.monotonic()))


def _wait_for_exits(servers: list[_Server], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for server in servers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(max(0.0, deadline - time.monotonic()))


def _signal_group(server: _Server, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody left (macOS says: not permitted)
        os.killpg(server.process.pid, number)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(record := dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return record


def _no_nan_or_infinity(token: str) -> NoReturn:
    raise ValueError(f"{token} is no JSON")


# Made once: making them takes as long as reading a reply.
_STRICT = json.JSONDecoder(object_pairs_hook=_no_key_twice, parse_constant=_no_nan_or_infinity)
_dumps = json.JSONEncoder(allow_nan=False).encode


def _loads(line: bytes) -> Any:
    """Strict JSON.  Raises ValueError for anything else: bad UTF-8, NaN, a key given twice, nesting without end."""
    try:
        return _STRICT.decode(line.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _keys(reply: dict[str, Any], required: set[str], optional: Collection[str] = ()) -> None:
    if reply.keys() == required:  # all is well: looked at first, since this is asked at every step
        return
    if missing := required - reply.keys():
        raise BridgeError(f"the reply lacks {sorted(missing)}")
    if unknown := reply.keys() - required - set(optional):
        raise BridgeError(f"the reply has unknown {_show(sorted(unknown))}")


def _decode_error(reply: dict[str, Any], envs: range, starting: bool) -> NoReturn:
    """A failed request: the environment raised, or the server itself saw a rule broken."""
    _keys(reply, {"error"}, {"traceback", "env", "rule", "expected", "got"})
    env = reply.get("env")
    in_range = env is None or (_is_int(env) and 0 <= env < len(envs))
    if not in_range or not all(type(text) is str for key, text in reply.items() if key != "env"):
        raise BridgeError(f"a malformed error reply: {_show(reply)}")
    env = None if env is None else envs[env]
    if reply.keys() >= {"rule", "expected", "got"} and reply["rule"] in RULES:
        raise ContractViolation(reply["rule"], reply["expected"], reply["got"], env)
    failure = BridgeError("\n".join([reply["error"], reply.get("traceback", "").rstrip()]).rstrip(), env)
    if starting and env is None and "traceback" not in reply:
        failure.server = ""  # the server is well: what was asked of it cannot be
    raise failure


def _decode_describe(reply: dict[str, Any], envs: range, env_id: str) -> tuple[Contract, dict[str, str]]:
    spaces = {"n_actions", "obs_shape", "obs_dtype", "obs_low", "obs_high"}
    _keys(reply, {"protocol", "env_id", "num_envs", "versions"} | spaces)
    for key, expected in ("protocol", PROTOCOL), ("env_id", env_id), ("num_envs", len(envs)):
        if type(reply[key]) is not type(expected) or reply[key] != expected:
            raise BridgeError(f"describe: {key} must be {expected!r}, not {_show(reply[key])}")
    versions = reply["versions"]
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise BridgeError(f"describe: versions must map names to strings, not {_show(versions)}")
    try:
        plain = Contract(reply["obs_shape"], reply["n_actions"], reply["obs_dtype"])
        low, high = _unbound(plain, reply["obs_low"], -math.inf), _unbound(plain, reply["obs_high"], math.inf)
        bounded = (low > -np.inf).any() or (high < np.inf).any()
        return replace(plain, obs_range=(low, high) if bounded else None), versions
    except (ValueError, OverflowError, ContractViolation) as error:
        declared = {key: reply[key] for key in sorted(spaces)}
        raise ContractViolation("declared_space", f"valid spaces ({error})", _show(declared)) from None


def _unbound(contract: Contract, raw: object, fill: float) -> Array:
    """Declared bounds, null meaning unbounded, as a float64 array of the contract's shape."""
    numbers = [fill if bound is None else bound for bound in contract._flatten(raw, contract.obs_shape, 0)]
    if not all(type(number) in NUMBERS for number in numbers):
        raise ValueError("a bound must be a number or null")
    return np.array(numbers, np.float64).reshape(contract.obs_shape)


def _compare(declared: Contract, demanded: Contract) -> None:
    """The environment's declared spaces against the contract's; a contract may demand a narrower range."""
    if any(getattr(declared, k) != getattr(demanded, k) for k in ("obs_shape", "obs_dtype", "n_actions")):
        raise ContractViolation("declared_space", _show_spaces(demanded), _show_spaces(declared))
    if demanded.obs_range is not None:
        (low, high), (lowest, highest) = demanded._obs_range, declared._obs_range
        if (wider := (low < lowest) | (high > highest)).any():
            index = _first_true(wider)
            expected = f"observation{list(index)} in [{low[index]}, {high[index]}] or a wider range"
            raise ContractViolation("declared_space", expected, f"[{lowest[index]}, {highest[index]}]")


def _show_spaces(contract: Contract) -> str:
    bounds = "any" if contract.obs_range is None else _show(contract.obs_range)
    return f"Box({contract.obs_shape}, {contract.obs_dtype}, range {bounds}), Discrete({contract.n_actions})"


def _decode_reset(reply: dict[str, Any], envs: range, contract: Contract) -> Array:
    _keys(reply, {"obs"})
    return _decode_observations(reply["obs"], envs, contract)


def _decode_step(reply: dict[str, Any], envs: range, contract: Contract) -> _Batch:
    _keys(reply, {"next_obs", "reward", "terminated", "truncated", "reset_obs"})
    next_obs = _decode_observations(reply["next_obs"], envs, contract)
    for key in "reward", "terminated", "truncated":
        if type(reply[key]) is not list or len(reply[key]) != len(envs):
            raise ContractViolation("batch_size", f"a list of {len(envs)} for {key}", _show(reply[key]))
    outcomes = map(contract._outcome, reply["reward"], reply["terminated"], reply["truncated"], envs)
    reward, terminated, truncated = map(np.array, zip(*outcomes, strict=True))
    if type(reply["reset_obs"]) is not dict:
        raise ContractViolation("reset_obs", "an object", _show(reply["reset_obs"]))
    names = {str(own): env for own, env in enumerate(envs)} if reply["reset_obs"] else {}
    reset_obs = {}
    for name, raw in reply["reset_obs"].items():
        if name not in names:
            expected = f"this server's environments, 0 .. {len(envs) - 1}"
            raise ContractViolation("reset_obs", expected, _show(name))
        alone = raw if isinstance(raw, str) else [raw]
        reset_obs[names[name]] = _decode_observations(alone, [names[name]], contract)[0]
    return _Batch(next_obs, reward, terminated, truncated, reset_obs)


def _decode_observations(raw: object, envs: Sequence[int], contract: Contract) -> Array:
    """(len(envs), *obs_shape) from base64, or from nested lists (a server that speaks no base64 is understood)."""
    if type(raw) is str:
        env = envs[0] if len(envs) == 1 else None
        try:
            data = base64.b64decode(raw, validate=True)
        except ValueError as error:
            raise ContractViolation("obs_type", f"base64 ({error})", _show(raw), env) from None
        dtype = contract._dtype
        shape = (len(envs), *contract.obs_shape)
        size = math.prod(shape) * dtype.itemsize
        if len(data) != size or len(raw) != (size + 2) // 3 * 4:  # Python 3.12 lets "=" too many pass
            got = f"{len(data)} bytes in {len(raw)} characters"
            raise ContractViolation("obs_shape", f"{shape} of {dtype.name} in base64", got, env)
        return np.ndarray(shape, dtype.newbyteorder("<"), data).astype(dtype)
    if type(raw) is not list or len(raw) != len(envs):
        raise ContractViolation("batch_size", f"observations of {len(envs)} environments", _show(raw))
    return np.stack([contract._observation(row, env) for env, row in zip(envs, raw, strict=True)])


# ------------------------------------------------------------------------------------------------------------- server


def _make(env_id: str, num_envs: int, make_kwargs: dict[str, Any]) -> tuple[NativeSession, dict[str, Any]]:
    """The environments, held to the types that they declare, and the answer to "describe"."""
    import gymnasium

    versions = {"python": platform.python_version(), "numpy": np.__version__, "gymnasium": gymnasium.__version__}
    sys.path.append(os.getcwd())  # so that --env-id my_module:MyEnv-v0 finds a my_module.py in this folder
    if env_id.startswith("ALE/"):
        try:
            import ale_py
        except ImportError as error:
            raise BridgeError(f"{env_id} needs the package ale-py ({error}): pip install ale-py") from None
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner for each environment
        gymnasium.register_envs(ale_py)
        versions["ale_py"] = ale_py.__version__
    module, colon, _ = env_id.rpartition(":")
    if colon and (not module or ":" in module):
        raise BridgeError(f"cannot make {env_id}: an id may name one module, as in my_module:MyEnv-v0")
    try:
        # A copy of the arguments for each: it may change what is in them.
        envs = [gymnasium.make(env_id, disable_env_checker=True, **copy.deepcopy(make_kwargs)) for _ in range(num_envs)]
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        known = isinstance(error, gymnasium.error.Error) or (isinstance(error, ImportError) and not module)
        asked = [f"'{module or env_id}'", *(f"argument '{name}'" for name in make_kwargs)]
        if not known and not any(what in str(error) for what in asked):
            raise  # a fault within: its traceback tells where
        file = getattr(sys.modules.get(module), "__file__", None)  # Python's own module, if it has one of that name
        found = f" ({module} is {file})" if file else ""
        if isinstance(error, gymnasium.error.NameNotFound) and not module:  # the trainer may have registered it
            found = f" (if a module of yours registers it: my_module:{env_id})"
        raise BridgeError(f"cannot make {env_id}: {error}{found}") from None
    observation, action = envs[0].observation_space, envs[0].action_space
    if not isinstance(action, gymnasium.spaces.Discrete) or action.start != 0:
        raise BridgeError(f"{env_id} has the action space {action}; it must be Discrete(n), starting at 0")
    if not isinstance(observation, gymnasium.spaces.Box) or observation.dtype.kind not in "fiu":
        raise BridgeError(f"{env_id} has the observation space {observation}; it must be a Box of floats or integers")
    try:
        contract = Contract(observation.shape, int(action.n), observation.dtype.name)
    except ValueError as error:
        raise BridgeError(f"{env_id} has the spaces {observation} and {action}: {error}") from None
    for i, env in enumerate(envs):
        if (env.observation_space, env.action_space) != (observation, action):
            raise BridgeError(f"{env_id}: environment {i} declares other spaces than environment 0")
    null = np.array(None)
    low = np.where(observation.low == -np.inf, null, observation.low).tolist()
    high = np.where(observation.high == np.inf, null, observation.high).tolist()
    spaces = {"n_actions": contract.n_actions, "obs_shape": list(contract.obs_shape), "obs_dtype": contract.obs_dtype}
    about = {"protocol": PROTOCOL, "env_id": env_id, "num_envs": num_envs, **spaces, "obs_low": low, "obs_high": high}
    return NativeSession(envs, contract), {**about, "versions": versions}


def _answer(request: Any, session: NativeSession, about: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request, without id and ok.

    Checked here: types, shapes, actions, and whether rewards are finite.  The other values are the trainer's to check.
    """
    command = request.get("cmd") if isinstance(request, dict) else None
    if not isinstance(command, str) or command not in REQUESTS:
        raise BridgeError(f'a request is {{"id": 1, "cmd": one of {list(REQUESTS)}, ...}}')
    if unknown := request.keys() - REQUESTS[command]:
        raise BridgeError(f"{command} takes no {sorted(unknown)}")
    if command == "describe":
        return about
    if command == "close":
        return {}
    encoding = request.get("encoding", "json")
    if encoding not in ("json", "base64"):
        raise BridgeError(f'encoding is "base64" or "json", not {_show(encoding)}')
    if command == "reset":
        seed = request.get("seed")
        if seed is not None and not (_is_int(seed) and seed >= 0):
            raise BridgeError(f"seed is a non-negative integer or null, not {_show(seed)}")
        session._dead = HALF_WAY
        observations = session._reset(seed)
        session._dead = None
        return {"obs": _encode(observations, encoding)}
    actions = request.get("actions")
    if not isinstance(actions, list):
        raise BridgeError(f"actions is a list, not {_show(actions)}")
    checked = session.contract._check_actions(actions, session.num_envs)
    if session._dead:
        raise BridgeError(session._dead)
    session._dead = HALF_WAY
    batch = session._step(checked)
    session.contract._check_rewards(batch.reward)  # finite in float32: JSON has no word for infinities
    session._dead = None
    return {
        "next_obs": _encode(batch.next_obs, encoding),
        "reward": batch.reward.tolist(),
        "terminated": batch.terminated.tolist(),
        "truncated": batch.truncated.tolist(),
        "reset_obs": {str(env): _encode(obs, encoding) for env, obs in batch.reset_obs.items()},
    }


def _encode(observations: Array, encoding: str) -> Any:
    if encoding == "base64":
        little = observations.astype(observations.dtype.newbyteorder("<"), copy=False)
        return base64.b64encode(little.tobytes()).decode()
    return observations.tolist()


def _error(error: BaseException) -> dict[str, Any]:
    """A failed request as a reply: with the traceback, unless the fault is plainly in what was asked."""
    if not isinstance(error, SessionFailure):
        return {"error": _show_error(error), "traceback": _show_error(error, whole=True)}
    reply: dict[str, Any] = {"error": error.what} if error.env is None else {"error": error.what, "env": error.env}
    if isinstance(error, ContractViolation):
        return {**reply, "rule": error.rule, "expected": error.expected, "got": error.got}
    if (cause := error.__cause__) is None:
        return reply  # what cannot be done as asked
    if type(cause).__name__ == "DependencyNotInstalled":
        return {"error": str(cause)}  # what to install
    return {**reply, "traceback": _show_error(cause, whole=True)}  # what an environment raised


def _serve(env_id: str, num_envs: int, make_kwargs: dict[str, Any], awake: float, wire_in: int, wire_out: int) -> None:
    """Answer requests until told to close, or until there is nobody left to ask."""
    try:
        made: tuple[NativeSession, dict[str, Any]] | BaseException = _make(env_id, num_envs, make_kwargs)
    except BaseException as error:  # an environment may raise anything, SystemExit, too; every request will be told
        made = error
    command = None
    request_pipe = select.poll()
    request_pipe.register(wire_in, select.POLLIN)
    hung_up = contextlib.suppress(BrokenPipeError)  # closing a file whose last write failed tries that write again
    with hung_up, os.fdopen(wire_in, "rb") as requests, os.fdopen(wire_out, "wb") as replies:
        while command != "close":
            if awake:
                _poll(request_pipe, time.monotonic() + awake, awake)
            if not (line := requests.readline()):
                break
            number = None
            try:
                try:
                    request = _loads(line)
                except ValueError as error:
                    raise BridgeError(f"a request is one line of strict JSON ({error})") from None
                if isinstance(request, dict):
                    number, command = request.get("id"), request.get("cmd")
                    number = number if isinstance(number, (int, str)) else None  # 1e999 can be read, but not written
                if isinstance(made, BaseException):
                    raise made
                reply = {"id": number, "ok": True, **_answer(request, *made)}
                text = _dumps(reply)
            except BaseException as error:  # whatever it was, this request gets its one reply
                text = _dumps({"id": number, "ok": False, **_error(error)})
            replies.write(text.encode() + b"\n")
            replies.flush()
    if not isinstance(made, BaseException):
        made[0].close()


def _watch(wire_in: int, grace: float) -> None:
    """See to it that this process group does not outlive the trainer where the lifeline does not reach.

    That is on macOS, and at the far end of a docker or an ssh.  When the wire is hung up, it has ``grace`` seconds.
    """
    hang_up = select.poll()
    # macOS sees only what it is asked for, and only once: hence the loop.  A socket (ssh) may be hung up on one side.
    hang_up.register(wire_in, select.POLLHUP | getattr(select, "POLLRDHUP", 0))
    while not hang_up.poll(250):
        pass
    time.sleep(grace)  # when the main loop has ended, so does this thread
    os.killpg(0, signal.SIGKILL)
    os._exit(1)  # the first process of a container does not hear a signal from inside


def json_object(text: str) -> Any:
    """JSON, quoted as in a URL: that passes through any shell, such as the one at the far end of an ssh."""
    return json.loads(unquote(text))


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a person's Ctrl-C ends it without a traceback
    parser = argparse.ArgumentParser(description="Serve Gymnasium environments over stdin and stdout (JSON lines).")
    parser.add_argument("--env-id", required=True, help="Gymnasium's id, or my_module:MyEnv-v0")
    parser.add_argument("--num-envs", type=int, default=1, help="how many of them to step together")
    parser.add_argument("--make-kwargs", type=json_object, default={}, help="for gymnasium.make: JSON (%% as %%25)")
    parser.add_argument("--awake", type=float, default=0.0, help="seconds to wait for a request without sleeping")
    parser.add_argument("--lifeline", type=int, default=-1, help="a pipe; this process group dies when it is closed")
    args = parser.parse_args()
    if os.name != "posix":
        parser.error("needs Linux or macOS; on Windows, run it inside WSL")
    if args.num_envs < 1:
        parser.error("--num-envs must be at least 1")
    wire_in, wire_out = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # from here on, print() and printf() cannot touch the wire
    # Nor can what an environment forks (multiprocessing does): it would answer, too, and hold the wire after a crash.
    os.register_at_fork(after_in_child=lambda: [os.dup2(0, wire, inheritable=False) for wire in (wire_in, wire_out)])
    # Started by a GymnasiumSession (behind a launcher, docker or ssh, too), or else the leader of a process session?
    if args.lifeline >= 0 or os.getsid(0) == os.getpid():
        # A trainer that hangs up has been answered, or will not listen; whoever piped requests in wants them answered.
        grace = CLOSE_GRACE + TERMINATE_GRACE if args.lifeline >= 0 else TIMEOUT
        threading.Thread(target=_watch, args=(wire_in, grace), daemon=True).start()
    _serve(args.env_id, args.num_envs, args.make_kwargs, args.awake, wire_in, wire_out)


if __name__ == "__main__":
    _main()
