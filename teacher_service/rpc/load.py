"""Present load of a teacher as a message: the queue, totals, and tokens in a second by client."""

from __future__ import annotations

from stillhouse.protos.rpc.auth import current_caller
from stillhouse.protos.stillhouse.v1.teacher_pb2 import ClientLoad, TeacherLoad
from stillhouse.teacher_service.admission.fair_queue import ENGINE_UNITS
from stillhouse.teacher_service.admission.throughput import Rates
from stillhouse.teacher_service.rpc.service_state import ServiceState

MAX_CLIENTS = 50


def load_of(serving: ServiceState, client: str) -> TeacherLoad:
    """The load as `client`, the current caller, may see it."""
    rates, waiting = serving.throughput.rates(), serving.admission.waiting_by_client()
    clients = [
        ClientLoad(
            name=name,
            waiting=waiting.get(name, 0),
            scored_per_s=rates.get(name, Rates()).scored_per_s,
            generated_per_s=rates.get(name, Rates()).generated_per_s,
        )
        for name in rates.keys() | waiting.keys()
    ]
    clients.sort(key=lambda each: (-each.scored_per_s - each.generated_per_s, -each.waiting, each.name))
    if current_caller().is_admin:
        shown = [*clients[:MAX_CLIENTS], *_together(clients[MAX_CLIENTS:])]
    else:
        own = [each for each in clients if each.name == client]
        shown = [*own, *_together([each for each in clients if each.name != client])]
    counters, admission = serving.counters, serving.admission
    return TeacherLoad(
        uptime_s=serving.throughput.uptime_s,
        waiting=admission.total_waiting,
        running=admission.num_running,
        engine_used=1 - admission.free / ENGINE_UNITS,
        tokens_scored=counters.tokens_scored,
        tokens_generated=counters.tokens_generated,
        window_s=serving.throughput.window_s,
        clients=shown,
    )


def _together(clients: list[ClientLoad]) -> list[ClientLoad]:
    """One entry without a name for all of `clients`; none for none."""
    if not clients:
        return []
    return [
        ClientLoad(
            waiting=sum(each.waiting for each in clients),
            scored_per_s=sum(each.scored_per_s for each in clients),
            generated_per_s=sum(each.generated_per_s for each in clients),
        )
    ]
