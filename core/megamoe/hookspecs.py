"""The hooks of the plugin system: how a stage, more variants, a veto or an observer reach the core."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from megamoe.model import Decision, Stage, Variant

PROJECT = "megamoe"  # also the entry point group of third-party plugins
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def megamoe_stage() -> Stage:  # type: ignore[empty-body]
    """Declare one stage. Called once, when plugins load; must import neither torch nor cutlass."""


@hookspec
def megamoe_variants(stage: str) -> Sequence[Variant]:  # type: ignore[empty-body]
    """Add variants to a stage that another plugin declared.

    Args:
        stage: Id of the stage that is being assembled.
    """


@hookspec
def megamoe_refuse(stage: str, variant: Variant) -> str | None:
    """Keep a variant from being chosen: return the reason, or None to let it pass.

    Args:
        stage: Id of the stage that is being planned.
        variant: The variant in question.
    """


@hookspec
def megamoe_decided(decision: Decision) -> None:
    """Observe a decision when a plan is made; a planned call does not come here again.

    Args:
        decision: What was chosen, with every reason.
    """
