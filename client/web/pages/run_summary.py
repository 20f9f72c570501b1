"""Summary of a run for a row of the list and the head of its page."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.client.core.json_output import enum_name
from stillhouse.client.trainer.advice import waits_for
from stillhouse.client.trainer.run_handle import ENDED
from stillhouse.client.trainer.run_lookup import run_id
from stillhouse.client.web.pages.sparkline import Sparkline, sparkline_of
from stillhouse.client.web.pages.text import number
from stillhouse.protos.stillhouse.v1.run_pb2 import Run

CONDITIONS = {
    Run.CONDITION_WAITING_FOR_TEACHER: "waits for its teacher",
    Run.CONDITION_RETRYING: "its process died; a new attempt starts",
    Run.CONDITION_ADOPTING: "the service restarted and takes it over",
    Run.CONDITION_NOT_RESPONDING: "its process sends no heartbeat",
    Run.CONDITION_PREPARING_DATA: "encodes its data",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """Values that a list shows of a run."""

    run: Run

    @property
    def id(self) -> str:
        """The id alone."""
        return run_id(self.run.name)

    @property
    def title(self) -> str:
        """Its display name, or its id."""
        return self.run.spec.display_name or self.id

    @property
    def state(self) -> str:
        """The state in small letters."""
        return (enum_name(Run.State.DESCRIPTOR, self.run.state) or "unknown").lower()

    @property
    def ended(self) -> bool:
        """True for a run that no process works on."""
        return self.run.state in ENDED

    @property
    def condition(self) -> str:
        """Reason that it makes no progress; empty if it makes some."""
        if self.run.condition:
            known = CONDITIONS.get(self.run.condition)
            return known or str(enum_name(Run.Condition.DESCRIPTOR, self.run.condition))
        waits = waits_for(self.run)
        return f"waits for {waits}" if waits else ""

    @property
    def steps(self) -> str:
        """Steps taken, of the whole if it is known."""
        progress = self.run.progress
        taken = f"{progress.step:,}"
        return f"{taken} of {progress.total_steps:,} steps" if progress.total_steps else f"{taken} steps"

    @property
    def speed(self) -> str:
        """Tokens per second of a live run; empty for others."""
        speed = self.run.progress.tokens_per_second
        return f"{number(speed, 3)} tokens/s" if speed and not self.ended else ""

    @property
    def sparkline(self) -> Sparkline | None:
        """The picture of its loss, if it has one."""
        return sparkline_of(self.run.progress.loss)

    @property
    def can_stop(self) -> bool:
        """True if the service would stop it."""
        return not self.ended and self.run.state != Run.STATE_STOPPING

    @property
    def can_resume(self) -> bool:
        """True if the service would queue it again."""
        return self.run.state in (Run.STATE_STOPPED, Run.STATE_FAILED)
