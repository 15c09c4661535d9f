"""A functional emulator of PTX for sm_90a and sm_100a on the CPU.

`emulate` runs a kernel given as PTX text; `run` runs a compiled CuTe DSL function, host code included. Both give a
`Report`. What is modelled and what is not is in README.md beside this file.
"""

from __future__ import annotations

from ptxemu.api import captured, emulate, load, run
from ptxemu.errors import (
    ArgumentError,
    BuildError,
    CaptureError,
    FaultError,
    PtxemuError,
    PtxSyntaxError,
    UnsupportedInstruction,
)
from ptxemu.policy import POLICIES
from ptxemu.report import Finding, FindingKind, LaunchFacts, Report

__all__ = [
    "POLICIES",
    "ArgumentError",
    "BuildError",
    "CaptureError",
    "FaultError",
    "Finding",
    "FindingKind",
    "LaunchFacts",
    "PtxSyntaxError",
    "PtxemuError",
    "Report",
    "UnsupportedInstruction",
    "captured",
    "emulate",
    "load",
    "run",
]
