"""How a run is watched beyond the files that every run writes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxunet.config import Config
from jaxunet.devices.distributed import is_main
from jaxunet.runs.profiling import Steps, Trace
from jaxunet.runs.wandb_log import WandbLog


@dataclass(frozen=True)
class Watch:
    """Asked for anew at each start: it changes nothing that is computed, and is no part of a
    run's configuration.

    Attributes:
        log: where the lines of the log go, too.
        profile_steps: how many steps are done when a trace begins, and when it ends.
    """

    log: Literal["wandb"] | None = None
    profile_steps: Steps | None = None

    def wandb_log(self, run: Path, config: Config) -> WandbLog | None:
        """What `log` asks for, on process 0."""
        return WandbLog(run, config) if self.log == "wandb" and is_main() else None

    def trace(self, run: Path, done: int, total: int, show: bool) -> Trace:
        """What `profile_steps` asks for; see `Trace`."""
        return Trace(self.profile_steps, run, done, total, show)


NOT_WATCHED = Watch()
