"""The main job, `megamoe run`: see `main.run`."""

from megamoe.job.main import RunOptions, run
from megamoe.job.result import Distance, OpRow, RunResult, Speed

__all__ = ["Distance", "OpRow", "RunOptions", "RunResult", "Speed", "run"]
