"""Settings of `stillhouse-trainer`: default, range and help of each flag."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from stillhouse.protos.rpc.tls import ServerTls
from stillhouse.protos.settings import SHARED, bad_setting, check_settings, setting
from stillhouse.protos.telemetry.metrics import LOOPBACK

LEAST_SILENCE_S = 15.0
"""Three heartbeat intervals."""
StandbyMode = Literal["off", "queue", "always"]
"""Times at which a training process waits for a run."""
_SIZE = (1, 2**63 - 1)
_TIME = (0, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunServiceSettings:
    """Folders, limits and address of the run service."""

    data_dir: Path = setting("Folder for runs, datasets and the database; made if missing.")
    database: str | None = setting(
        "URL of a PostgreSQL database for runs and their history, such as postgresql://user@host/name; best given as "
        "STILLHOUSE_TRAINER_DATABASE or with its password in ~/.pgpass, since others see arguments.  [default: a file in "
        "--data-dir]",
        None,
    )
    listen: str = setting(SHARED["listen"], "127.0.0.1:7402")
    address_file: Path | None = setting(SHARED["address_file"], None)
    gpus: tuple[int, ...] | None = setting(
        'Devices for runs, such as "0,1"; "" for none.  [default: visible ones]', None
    )
    cpu_slots: int = setting("Runs at once on the CPU.", 1, between=(0, 1 << 16))
    allow_roots: tuple[Path, ...] = setting(
        "Folder below which run files may name models and datasets.  [default: / on loopback, else the data directory alone]",
        (),
        flag="--allow-root",
    )
    standby: StandbyMode = setting(
        'A training process that has imported its libraries and waits for the next run, which starts some seconds sooner: "queue" '
        "keeps one while a run is queued behind another and, where 4 GiB are free, for ten minutes after the service's start, a "
        "run's end, or a client's call that may precede a run; \"always\" keeps one. It takes memory while it waits.",
        "queue",
        choices=get_args(StandbyMode),
    )
    stop_grace_s: float = setting(
        "Seconds that a run has to write a checkpoint after a stop, before it is signalled.",
        300.0,
        flag="--stop-grace-s --stop-grace",
        between=_TIME,
    )
    stop_runs_on_exit: bool = setting(
        "Stop live runs when the service ends. Without it they continue, and the next start takes them over.",
        False,
    )
    shutdown_grace_s: float = setting(SHARED["shutdown_grace_s"], 30.0, between=_TIME)
    max_upload_bytes: int = setting("Largest uploaded dataset.", 64 * 2**30, between=_SIZE)
    max_calls: int = setting(
        "Calls at once, of which one client gets three quarters; more are refused.", 256, between=(1, 1 << 16)
    )
    max_log_bytes: int = setting(
        "Log of one attempt of a run; one that writes more is ended.", 2**30, between=_SIZE
    )
    max_metric_bytes: int = setting(
        "Metrics and events of a run; one that writes more is ended.", 2**30, between=_SIZE
    )
    max_silence_s: float = setting(
        "Seconds without a heartbeat after which a run's process is killed; 0 for never. It sends one every 5 s.",
        900.0,
        between=_TIME,
    )
    max_queued_runs: int = setting("Runs that one client may have in the queue.", 1000, between=_SIZE)
    keep_ended_days: float | None = setting(
        "Days after which an ended run and its files are removed.  [default: never]", None, between=_TIME
    )
    max_prepared_bytes: int = setting(
        "Size up to which data that runs have encoded is kept for the next ones; the longest unused goes first, and none "
        "that a run uses.",
        64 * 2**30,
        between=(0, 2**63 - 1),
    )
    keep_prepared_days: float = setting(
        "Days after its last use for which such data is kept.", 30.0, between=_TIME
    )
    tokens: Path | None = setting(
        SHARED["tokens"] + "  [default: tokens.json in --data-dir, once there]",
        None,
    )
    webhooks: Path | None = setting(
        "TOML file of the hosts that runs may notify, and their secrets, mode 0600.  [default: none]", None
    )
    audit_log: Path | None = setting(SHARED["audit_log"] + "  [default: audit.jsonl in --data-dir]", None)
    metrics_host: str = setting(SHARED["metrics_host"], LOOPBACK)
    metrics_port: int | None = setting(SHARED["metrics_port"], None, between=(0, 65535))
    insecure: bool = setting(SHARED["insecure"], False)
    tls_cert: Path | None = setting(SHARED["tls_cert"], None)
    tls_key: Path | None = setting(SHARED["tls_key"], None)
    tls_client_ca: Path | None = setting(SHARED["tls_client_ca"], None)
    web: bool = setting("Serve the HTTP API as well, as `stillhouse web`; needs the extra `web`.", False)
    web_listen: str = setting(
        "HOST:PORT of the HTTP API, with the service's own certificate if it has one.", "127.0.0.1:7400"
    )
    reflection: bool | None = setting(SHARED["reflection"], None, flag="--reflection/--no-reflection")
    log_level: str = setting(SHARED["log_level"], "info", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        """Raises `StillhouseError` with INVALID_CONFIG, naming flag, value and remedy."""
        check_settings(self)
        if 0 < self.max_silence_s < LEAST_SILENCE_S:
            raise bad_setting(
                "--max-silence-s",
                f"{self.max_silence_s:g}",
                f"Live processes need {LEAST_SILENCE_S:g}; 0 is never.",
            )

    @property
    def tls(self) -> ServerTls | None:
        """Certificate and key of the service, if it has them."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(cert=self.tls_cert, key=self.tls_key, client_ca=self.tls_client_ca)
