"""Every micro-kernel."""

from __future__ import annotations

from tests.ptxemu.truth import clusters, matrix, scalar, tiles
from tests.ptxemu.truth.micro import Micro


def kernels() -> dict[str, Micro]:
    """By name, in the order in which they are recorded."""
    return {
        micro.name: micro for micro in (*scalar.kernels(), *matrix.kernels(), *tiles.kernels(), *clusters.kernels())
    }
