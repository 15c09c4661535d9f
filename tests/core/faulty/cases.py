from __future__ import annotations

from typing import Any

import torch

from megamoe.testing.cases import Case


def make(generator: torch.Generator, rows: int) -> dict[str, Any]:
    return {"x": torch.randn(rows, 8, generator=generator)}


CASES = {
    "unsupported": Case(make, {"rows": 9}),
    "first": Case(make, {"rows": 3}),
    "timed": Case(make, {"rows": 5}, bench=True),
    "last": Case(make, {"rows": 7}),
    "huge": Case(make, {"rows": 1 << 40}, gpu_only=True),
}
