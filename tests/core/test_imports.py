"""What must stay light: importing megamoe, its help and its roadmap load neither torch nor cutlass."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "cutlass", "transformers", "triton")


@pytest.mark.parametrize(
    "code",
    [
        "import megamoe",
        "from megamoe.cli import main; main(['--help'])",
        "from megamoe.cli import main; assert main(['roadmap']) == 0",
        "from megamoe.cli import main; assert main(['roadmap', '--json']) == 0",
        "from megamoe.cli import main; assert main(['explain', 'swiglu_quant', '--arch', 'sm_90']) == 0",
        "from megamoe.cli import main; assert main(['config']) == 0",
    ],
)
def test_imports_neither_torch_nor_cutlass(code: str) -> None:
    check = f"{code}\nimport sys\nprint([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"
