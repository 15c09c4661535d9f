"""Ops: the callables that users hold. A call plans once per kind of problem, and then is a dict lookup.

Every op is also the torch.library operator `torch.ops.megamoe.<stage id>`, which is what torch.compile sees.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megamoe import config as configs
from megamoe.config import Config
from megamoe.errors import ConfigError
from megamoe.model import Arch, Decision, Machine, Stage
from megamoe.plugins import load
from megamoe.runtime import Runtime, explain, runtime
from megamoe.signature import Signature

__all__ = ["Observer", "Op", "Session", "explain", "op", "use"]


class Observer(Protocol):
    """Sees every call of every op inside `use(..., observer=...)`."""

    def called(
        self, stage_id: str, decision: Decision, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Must return the result of `run(*args, **kwargs)`."""


@dataclass(frozen=True, slots=True)
class Session:
    """A configuration with the plans made under it, stage id -> problem -> callable; keep one to plan only once.

    `decisions` are those that plans follow from, and those that were only asked for.
    """

    config: Config
    observer: Observer | None = None
    plans: dict[str, dict[Hashable, Callable[..., Any]]] = field(default_factory=dict)
    decisions: dict[tuple[str, Hashable], Decision] = field(default_factory=dict)
    _watched: dict[int, Session] = field(default_factory=dict)

    def under(self, observer: Observer | None) -> Session:
        """This session, or its twin that an observer watches."""
        if observer is None or observer is self.observer:
            return self
        twin = self._watched.get(id(observer))
        if twin is None or twin.observer is not observer:
            twin = self._watched[id(observer)] = Session(self.config, observer)
        return twin

    def of(self, stage_id: str) -> dict[Hashable, Callable[..., Any]]:
        """Plans of one op."""
        return self.plans.setdefault(stage_id, {})


_is_compiling = torch.compiler.is_compiling
_session: ContextVar[Session | None] = ContextVar("megamoe_session", default=None)
_lock = threading.RLock()
_ops: dict[str, Op] = {}
_default: Session | None = None


class Op:
    """One op: call it like its reference.

    Args:
        current: The runtime that decides.
        stage: The op's stage.
    """

    def __init__(self, current: Runtime, stage: Stage) -> None:
        self.stage = stage
        self._runtime = current
        self._contract = load_module(stage.contract)
        self._problem = self._contract.problem
        self._id = stage.id
        self.reference: Callable[..., Any] = load(stage.reference.target)
        self.signature = Signature.of(self.reference, stage.mutates)
        self.__doc__ = self.reference.__doc__
        self.__name__ = stage.id
        self.__signature__ = inspect.signature(self.reference)
        self._operator = self._register()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the variant chosen for these arguments under the configuration in force.

        `make_op` replaces this by a function with the op's own signature that does the same: see `_CALL`.
        """
        if _is_compiling():
            return self._traced(args, kwargs)
        session = _session.get() or _default_session()
        try:
            run = session.plans[self._id][self._problem(*args, **kwargs)]
        except Exception:  # not planned yet, or arguments so wrong that they make no problem
            run = self._plan(session, args, kwargs)
        return run(*args, **kwargs)

    def decide(self, *args: Any, **kwargs: Any) -> Decision:
        """The decision for a call with these arguments, without running it; a dict lookup once it has been made."""
        session = _session.get() or _default_session()
        try:
            problem = self._problem(*args, **kwargs)
        except Exception:
            self._contract.check(*args, **kwargs)  # names what is wrong
            raise
        return self._decide(session, problem)

    def facts(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What selection may look at in these arguments, by name."""
        return facts_of(self._problem(*args, **kwargs))

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments by name, defaults filled in."""
        return self.signature.bind(args, kwargs)

    @property
    def bounds(self) -> Mapping[str, Any]:
        """How far each output of a variant may be from the reference's, from the stage's contract."""
        bounds: Mapping[str, Any] = self._contract.BOUNDS
        return bounds

    def _plan(self, session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """Checks the arguments, so that wrong ones are named, and decides."""
        self._contract.check(*args, **kwargs)
        problem = self._problem(*args, **kwargs)
        decision = self._decide(session, problem)
        self._runtime.plugins.decided(decision)
        run: Callable[..., Any] = load(decision.variant.target)
        if session.observer is not None:
            run = _observed(session.observer, self._id, decision, run)
        with _lock:
            return session.of(self._id).setdefault(problem, run)

    def _decide(self, session: Session, problem: Any) -> Decision:
        known, config = session.decisions.get((self._id, problem)), session.config
        if known is not None:
            return known
        if config.choice(self._id) == "off":
            raise ConfigError(f"{self._id} is off ({config.origin(self._id)}), so it cannot be called")
        machine = machine_of(self._runtime, problem.device)
        decision = self._runtime.decide(self.stage, machine, config, facts_of(problem))
        return session.decisions.setdefault((self._id, problem), decision)

    def _register(self) -> Any:
        """Makes the torch.library operator; its fake implementation is the contract's `fake`."""
        signature = self.signature

        def eager(*flat: Any, **keywords: Any) -> Any:
            return signature.flatten_result(self(**signature.unflatten(flat, keywords)))

        def fake(*flat: Any, **keywords: Any) -> Any:
            return signature.flatten_result(self._contract.fake(**signature.unflatten(flat, keywords)))

        operator = torch.library.custom_op(
            f"megamoe::{self._id}", eager, mutates_args=signature.mutates, schema=signature.schema()
        )
        operator.register_fake(fake)
        return operator

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self.signature.bind(args, kwargs)
        flat, keywords = self.signature.flatten(bound)
        return self.signature.unflatten_result(self._operator(*flat, **keywords), bound)

    def __repr__(self) -> str:
        return f"<op {self._id}{self.__signature__}>"


# An op's own __call__: arguments pass through by name, so that no tuple and dict of them are built twice a call.
_CALL = """
def __call__(self, {parameters}):
    if _is_compiling():
        return self._traced(({positional}), dict({keywords}))
    session = _session.get() or _default_session()
    try:
        run = session.plans[{id!r}][_problem({forwarded})]
    except Exception:
        run = self._plan(session, ({positional}), dict({keywords}))
    return run({forwarded})
"""


def make_op(current: Runtime, stage: Stage) -> Op:
    """An op whose call costs as little as a call can: a subclass of Op with `_CALL` for the stage's signature."""
    general = Op(current, stage)
    parameters: list[str] = []
    defaults: dict[str, Any] = {}
    for p in general.signature.parameters:
        if p.keyword_only and "*" not in parameters:
            parameters.append("*")
        parameters.append(p.name if p.default is ... else f"{p.name}=_value_of_{p.name}")
        defaults[f"_value_of_{p.name}"] = p.default
    positional = [p.name for p in general.signature.parameters if not p.keyword_only]
    keywords = [f"{p.name}={p.name}" for p in general.signature.parameters if p.keyword_only]
    source = _CALL.format(
        id=stage.id,
        parameters=", ".join(parameters),
        positional="".join(f"{name}, " for name in positional),
        keywords=", ".join(keywords),
        forwarded=", ".join([*positional, *keywords]),
    )
    scope = {**globals(), **defaults, "_problem": general._problem}
    exec(compile(source, f"<call of {stage.id}>", "exec"), scope)
    general.__class__ = type("Op", (Op,), {"__call__": scope["__call__"], "__module__": __name__})
    return general


def op(name: str) -> Op:
    """The op of a stage or item id.

    Raises:
        UnknownNameError: There is none; names the nearest.
    """
    found = _ops.get(name)
    if found is None:
        stage = runtime().stage(name)
        with _lock:
            found = _ops.get(stage.id) or _ops.setdefault(stage.id, make_op(runtime(), stage))
    return found


@contextlib.contextmanager
def use(
    config: Session | Config | Mapping[str, str] | str | Path | None = None, *, observer: Observer | None = None
) -> Iterator[Config]:
    """Runs a block, in this thread or task, under a configuration.

    Args:
        config: A Config; or stage or item id to choice, on top of what is in force ("default" and "evidence" are
            accepted as keys too); or a file; or a Session, whose plans are kept; None keeps what is in force.
        observer: Sees every call; see Observer. Default: whoever watches already.

    Raises:
        ConfigError, UnknownNameError: A key, id or value that does not exist; the nearest one is named.
    """
    outer = _session.get()
    if observer is None and outer is not None:
        observer = outer.observer
    session = config if isinstance(config, Session) else Session(resolve(config))
    token = _session.set(session.under(observer))
    try:
        yield current_config()
    finally:
        _session.reset(token)


def resolve(config: Config | Mapping[str, str] | str | Path | None) -> Config:
    """The Config that `use` would put in force; see there."""
    current = runtime()
    if isinstance(config, Config):
        return config
    if isinstance(config, str | Path):
        return configs.load(current.names, config)
    base = current_config()
    given = dict(config or {})
    default, evidence = given.pop("default", None), given.pop("evidence", None)
    return configs.override(base, current.names, given, default=default, evidence=evidence)


def current_config() -> Config:
    """The configuration in force here."""
    session = _session.get()
    return session.config if session is not None else runtime().default_config


def facts_of(problem: Any) -> dict[str, Any]:
    """A problem as plain values that a record can hold; the device is not one of them."""
    facts = problem._asdict()
    del facts["device"]
    return {key: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for key, v in facts.items()}


def machine_of(current: Runtime, device: torch.device) -> Machine:
    """The machine that a tensor's device stands for."""
    if device.type != "cuda":
        return current.machine(None)
    major, minor = torch.cuda.get_device_capability(device)
    return current.machine(Arch(10 * major + minor))


def load_module(name: str) -> Any:
    """Imports a stage's contract, which must hold check, problem, fake and BOUNDS."""
    for needed in ("check", "problem", "fake", "BOUNDS"):
        load(f"{name}:{needed}")
    return importlib.import_module(name)


def forget_plans() -> None:
    """Drops every plan and what was read of the evidence: the next calls decide anew."""
    global _default
    runtime().forget()
    with _lock:
        _default = None


def _default_session() -> Session:
    global _default
    if _default is None:
        with _lock:
            _default = _default or Session(runtime().default_config)
    return _default


def _observed(observer: Observer, stage_id: str, decision: Decision, run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return observer.called(stage_id, decision, run, args, kwargs)

    return call
