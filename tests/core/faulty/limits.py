from __future__ import annotations

from collections.abc import Mapping


def supports(facts: Mapping[str, object]) -> list[str]:
    return ["9 rows are too many"] if facts["rows"] == 9 else []
