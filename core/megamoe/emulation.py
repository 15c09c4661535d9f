"""Runs a variant's kernels in the PTX emulator: its own host code, over tensors in host memory, on no GPU at all.

The variant is called as it is. While it runs, tensors in host memory pass for tensors on a GPU of the architecture in
question, with few SMs so that persistent kernels take several turns, and `compiler.load` gives launchers that run the
compiled PTX in `ptxemu`. Variants keep the launchers they load, so this belongs in a process of its own: `verify` has
one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import ptxemu
from megamoe.cute import compiler
from megamoe.model import Arch
from ptxemu.report import Report

SMS = 4
POLICIES = (("eager", 0), ("tma_lazy", 0), ("mma_lazy", 0), ("lazy", 0), ("random", 1), ("random", 2))
MOST_ELEMENTS = 1 << 15  # of a case's largest tensor


class Emulator:
    """Emulates one architecture.

    Attributes:
        arch: What the kernels are compiled for and what host code sees.
        reports: Of the launches since `run` was last called.
    """

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.reports: list[Report] = []
        self._policy, self._seed = POLICIES[0]

    def run(self, function: Callable[..., Any], policy: str, seed: int, /, **arguments: Any) -> Any:
        """Calls a variant; its kernels complete their asynchronous operations as the policy says.

        Args:
            function: The variant.
            policy: One of `ptxemu.POLICIES`.
            seed: Of the random policy.
            arguments: The variant's, in host memory.

        Raises:
            ptxemu.FaultError: The emulator found something wrong; says under which policy.
        """
        self._policy, self._seed, self.reports = policy, seed, []
        with self._pretending():
            result = function(**arguments)
        for report in self.reports:
            try:
                report.raise_for_findings()
            except ptxemu.FaultError as error:
                name = f"{policy} (seed {seed})" if policy == "random" else policy
                raise ptxemu.FaultError(f"under policy {name}: {error}") from None
        return result

    def _load(self, spec: compiler.KernelSpec) -> Callable[..., None]:
        artifact = compiler.compile_kernel(spec)

        def launch(*arguments: Any) -> None:
            self.reports.append(ptxemu.run(artifact, *arguments, policy=self._policy, seed=self._seed))

        return launch

    @contextlib.contextmanager
    def _pretending(self) -> Iterator[None]:
        import cutlass.utils

        capability = divmod(self.arch.cc, 10)
        facts = SimpleNamespace(
            multi_processor_count=SMS, major=capability[0], minor=capability[1], name=str(self.arch)
        )
        info = SimpleNamespace(get_max_active_clusters=lambda ctas: max(1, SMS // ctas))
        with contextlib.ExitStack() as patches:
            for target, name, value in (
                (torch.Tensor, "is_cuda", property(lambda _: True)),
                (torch.cuda, "current_device", lambda: 0),
                (torch.cuda, "get_device_capability", lambda device=None: capability),
                (torch.cuda, "get_device_properties", lambda device=None: facts),
                (torch.cuda, "is_current_stream_capturing", lambda: False),
                (torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
                (torch.cuda, "synchronize", lambda device=None: None),
                (cutlass.utils, "HardwareInfo", lambda device=0: info),
                (compiler, "load", self._load),
            ):
                patches.enter_context(mock.patch.object(target, name, value, create=True))
            yield


def attempts(emulator: Emulator, function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The variant under each of the policies, as functions with its own signature."""
    return [functools.partial(emulator.run, function, policy, seed) for policy, seed in POLICIES]


def too_large(inputs: dict[str, Any]) -> list[str]:
    """Why a case is not emulated; empty for one that is."""
    from megamoe.testing import guards

    largest = max((t.numel() for value in inputs.values() for t in guards.tensors(value)), default=0)
    return [f"{largest} elements: the emulator takes cases up to {MOST_ELEMENTS}"] if largest > MOST_ELEMENTS else []
