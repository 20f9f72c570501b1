"""Client of one teacher: checks its services before training and again after every break, so that models never mix.

Every mismatch of student and teacher is refused here, in second 1 and not in step 1000.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_CODED_QUERIES,
    CAPABILITY_LOG_PARTITIONS,
    CAPABILITY_QUERY_LOGPROBS,
    CAPABILITY_SAMPLED_TOKENS,
    CAPABILITY_STRATIFIED_SAMPLES,
    CAPABILITY_TAIL_SAMPLES,
    Capability,
    GetTeacherInfoResponse,
)
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.protos.tokenizers.tokenizer_json import TokenizerJson
from stillhouse.student_trainer.config.rules.contexts import query_loss_path, run_losses
from stillhouse.student_trainer.config.rules.cross_tokenizer import is_bridged
from stillhouse.student_trainer.config.rules.loss import DRAWN_TARGETS
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.settled.layer_pairs import teacher_layers
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.teacher.endpoints import Endpoint, is_passing
from stillhouse.student_trainer.train.teacher.hidden_demands import require_layers
from stillhouse.student_trainer.train.teacher.identity import (
    adapter_fingerprint,
    changed,
    read_identity,
    require_kind,
    write_identity,
)
from stillhouse.student_trainer.train.teacher.prefix_reuse import PrefixReuse
from stillhouse.student_trainer.train.teacher.prompt_limits import check_prompt_limit, longest_prompted
from stillhouse.student_trainer.train.teacher.query import TeacherQuery
from stillhouse.student_trainer.train.teacher.service_limits import (
    QueriedDraws,
    check_queried_draws,
    common,
    queried_draws,
)
from stillhouse.student_trainer.train.teacher.tokenizer_compat import (
    Verdict,
    compare,
    fetch_tokenizer,
    foreign_tokenizer,
)

log = structlog.get_logger()

_DRAW_CAPABILITIES = {
    "sampled_tail": CAPABILITY_TAIL_SAMPLES,
    "stratified_tail": CAPABILITY_STRATIFIED_SAMPLES,
}
"""Capability that a target needs; other draws need CAPABILITY_SAMPLED_TOKENS. A greater one includes the lesser ones."""
FIRST_CONTACT_S = 15.0
"""Seconds to wait for a teacher that was never reached in this run; later ones get retry.teacher_wait_s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demands:
    """Requirements of a run on its teacher."""

    tokenizer_fingerprint: str
    """Fingerprint of the student's tokenizer."""
    tokenizer_json: str
    """The student's tokenizer, compared with the teacher's where the fingerprints differ."""
    bridged: bool
    """Teachers score text in their own tokens, so that any tokenizer will do."""
    top_k: int
    """Largest top-k of training and evaluation."""
    top_k_field: str
    """Its place in the run file."""
    temperature: float | None
    """Temperature whose log-partition is needed; None if none is."""
    query_field: str
    """Place in the run file of a loss that needs query_logprobs; empty if none does."""
    draws_field: str
    """Place in the run file of a loss whose targets the teacher samples; empty if none has such."""
    draws_capability: Capability.ValueType
    """Capability that these need."""
    queried_draws: Sequence[QueriedDraws] = ()
    """Draws of the student that the teacher is queried for."""
    longest: Example
    """The longest example."""
    longest_prompted: Mapping[str, TeacherQuery] = field(default_factory=dict)
    """The longest sequence behind prompts that teachers see alone, by their names."""
    largest: Example
    """The example with the largest token id."""
    end_ids: Sequence[int] = ()
    """Tokens that end a text of the student, ascending."""
    template_date: str = ""
    """Corpus.template_date."""
    classes: bool = False
    """Distributions over classes are wanted, of a classifier."""
    hidden_layers: tuple[int, ...] | None = None
    """Layers whose states are needed; empty while these are not settled, None if none are."""

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        tokenizer_fingerprint: str,
        tokenizer_json: str,
        corpus: Corpus,
        end_ids: Sequence[int] = (),
    ) -> Demands:
        """The requirements of `config`; `end_ids` end a text of the student besides those of the data."""
        bridged = is_bridged(config)
        without_top_k = bridged or config.classifies
        asked = {"evaluation.top_k": 0 if without_top_k else config.evaluation.top_k}
        tempered: list[float | None] = [None]
        drawn, draws_capability = [""], CAPABILITY_SAMPLED_TOKENS
        for path, loss in run_losses(config):
            if loss.asks_teacher and not config.classifies:
                if loss.sparse_target in DRAWN_TARGETS:
                    drawn.append(f"{path}.sparse_target")
                    needed = _DRAW_CAPABILITIES.get(loss.sparse_target, CAPABILITY_SAMPLED_TOKENS)
                    draws_capability = max(draws_capability, needed)
                asked[f"{path}.top_k"] = 0 if bridged else loss.least_top_k
                if loss.temperature != 1 and loss.temperature_mode == "exact":
                    tempered.append(loss.temperature)
        field = max(asked, key=lambda name: (asked[name], name != "evaluation.top_k"))
        return cls(
            tokenizer_fingerprint=tokenizer_fingerprint,
            tokenizer_json=tokenizer_json,
            bridged=bridged,
            top_k=asked[field],
            top_k_field=field,
            temperature=tempered[-1],
            query_field=query_loss_path(config),
            draws_field=drawn[-1],
            draws_capability=draws_capability,
            queried_draws=queried_draws(config),
            longest=corpus.longest,
            longest_prompted=longest_prompted(config, corpus),
            largest=corpus.largest,
            template_date=corpus.template_date,
            classes=config.classifies,
            hidden_layers=_hidden_layers(config),
            end_ids=sorted({*corpus.end_ids, *end_ids}),
        )


class TeacherClient:
    """One frozen model and the services that serve it: all of them have the same fingerprints, tokenizer and adapter."""

    def __init__(self, config: TeacherConfig, demands: Demands, run_dir: RunDir) -> None:
        self.config = config
        self.endpoints = tuple(
            Endpoint(target, config, self._check) for target in dict.fromkeys(config.targets)
        )
        """Its services, in the order of the run file."""
        self._demands = demands
        self._run_dir = run_dir
        self._identity = read_identity(run_dir, config.name)
        self._lock = threading.Lock()
        self._verdicts: dict[str, Verdict] = {}
        self._seen: dict[str, GetTeacherInfoResponse] = {}
        self._tokenizers: dict[str, bytes] = {}
        self.shared_size = 0
        """Ids below it mean the same to the student and to the teacher."""
        self.info = GetTeacherInfoResponse()
        """Common information of all services reached: the least of each limit, and the capabilities of all."""
        self.prefix_reuse = PrefixReuse()

    def demand(self, demands: Demands) -> None:
        """Checks every later contact, and the services reached so far, against `demands`. Raises StillhouseError."""
        with self._lock:
            self._demands = demands
            seen = dict(self._seen)
        for target, info in seen.items():
            check_demands(demands, info, target, self.config.name)

    def connect(self, patience: TeacherWait) -> None:
        """Reaches and checks the teacher for the first time in this process: one service at least, and each that answers.

        Raises:
            Stopped: the run was asked to stop.
            StillhouseError: TEACHER_UNREACHABLE; TOKENIZER_MISMATCH, TEACHER_CHANGED, TOP_K_TOO_LARGE, SEQUENCE_TOO_LONG,
                CAPABILITY, ADAPTER_NOT_FOUND, or a service's own error, unless another service will do.
        """
        known_before, since = self._identity is not None, time.monotonic()
        while True:
            errors = self._reach_all()
            refusals = [
                error
                for error in errors
                if not is_passing(error) or (error.reason is Reason.UNAUTHENTICATED and not known_before)
            ]
            if refusals and (not known_before or len(refusals) == len(self.endpoints)):
                # In a run that begins it is unknown which of two services is the right one.
                raise refusals[0]
            if len(errors) < len(self.endpoints):
                for error in errors:
                    log.warning("a teacher's service is not used yet", why=error.message)
                patience.answered()
                return
            error = errors[-1]
            silent = error.reason is Reason.TEACHER_UNREACHABLE
            if silent and not known_before and time.monotonic() - since > FIRST_CONTACT_S:
                raise StillhouseError(
                    Reason.TEACHER_UNREACHABLE,
                    f"No teacher was reached within {FIRST_CONTACT_S:g} s, the longest wait of a run for one that it never "
                    f"had. {error.message} Start the teacher first, then `stillhouse run resume` the run.",
                )
            if silent and not known_before:
                patience.reported_limit_s = min(FIRST_CONTACT_S, patience.limit_s)
            patience.pause(error)

    @property
    def text_tokenizer(self) -> str:
        """Fingerprint of the tokenizer of its queries: the student's, or its own where that is foreign."""
        demands = self._demands
        return self.info.tokenizer_fingerprint if demands.bridged else demands.tokenizer_fingerprint

    def reads_coded_queries(self, target: str) -> bool:
        """True if one of its services, as it was last checked, takes queried ids as DIFFERENCES."""
        return CAPABILITY_CODED_QUERIES in self._seen[target].capabilities

    @property
    def template_date(self) -> str:
        """Day that the chat template wrote into the run's text; empty if it wrote none."""
        return self._demands.template_date

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence that it takes, or that its own prompt may make."""
        limit = self.config.prompt.max_sequence_tokens if self.config.prompt else None
        return min(self.info.max_sequence_tokens, limit or self.info.max_sequence_tokens)

    @property
    def tokenizer_json(self) -> bytes:
        """Its tokenizer.json, which a foreign teacher has sent."""
        return self._tokenizers[self.info.tokenizer_fingerprint]

    def close(self) -> None:
        """Closes the channels."""
        for each in self.endpoints:
            each.close()

    def _reach_all(self) -> list[StillhouseError]:
        """Reaches each service; the errors of those that cannot be used."""
        first, *others = self.endpoints
        # Before the others, so that the same service always sets the run's identity.
        errors = [_why_not(first)]
        if others:
            with ThreadPoolExecutor(len(others)) as pool:
                errors += pool.map(_why_not, others)
        return [error for error in errors if error is not None]

    def _check(self, endpoint: Endpoint, stub: TeacherServiceStub, info: GetTeacherInfoResponse) -> None:
        """Returns if a service is the run's teacher; its information is kept. Raises grpc.RpcError, StillhouseError."""
        target = endpoint.target
        shared_size = self._shared_size(stub, info, target)
        check_demands(self._demands, info, target, self.config.name)
        identity = {
            "model_fingerprint": info.model_fingerprint,
            "adapter": self.config.adapter,
            "adapter_fingerprint": adapter_fingerprint(info, self.config.adapter, target),
            "tokenizer_fingerprint": info.tokenizer_fingerprint,
        }
        with self._lock:
            if self._identity is None:
                write_identity(self._run_dir, self.config.name, {**identity, "model": info.model})
                self._identity = identity
            part = changed(self._identity, identity)
            if part:
                raise StillhouseError(
                    Reason.TEACHER_CHANGED,
                    f"The teacher at {target} is not the one that this run began with: its {part} is {identity[part]}, "
                    f"and was {self._identity[part]}. Start the former teacher there again, or create a new run for this one.",
                    metadata={"expected": self._identity[part], "found": identity[part], "target": target},
                )
            if target not in self._seen:
                log.info("teacher reached", target=target, model=info.model, engine=info.engine)
                self._tell_ends(info, target)
            self._seen[target] = info
            self.info, self.shared_size = common(list(self._seen.values())), shared_size

    def _tell_ends(self, info: GetTeacherInfoResponse, target: str) -> None:
        """Logs the tokens that end a text of one side alone: the other writes on behind them."""
        ours, theirs = set(self._demands.end_ids), set(info.eos_token_ids)
        if self._demands.bridged or not theirs or ours == theirs:
            return
        texts = TokenizerJson(self._demands.tokenizer_json).tokens
        log.warning(
            "student and teacher end their texts with different tokens",
            target=target,
            student_alone=[texts.get(each, each) for each in sorted(ours - theirs)],
            teacher_alone=[texts.get(each, each) for each in sorted(theirs - ours)],
        )

    def _shared_size(self, stub: TeacherServiceStub, info: GetTeacherInfoResponse, target: str) -> int:
        """Number of ids that mean the same to both. Raises grpc.RpcError, or StillhouseError(TOKENIZER_MISMATCH)."""
        key = info.tokenizer_fingerprint
        if self._demands.bridged:
            if key not in self._tokenizers:
                self._tokenizers[key] = fetch_tokenizer(stub)
            return info.tokenizer_size
        if key == self._demands.tokenizer_fingerprint:
            return info.tokenizer_size
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = compare(self._demands.tokenizer_json, fetch_tokenizer(stub))
            if verdict.kind != "foreign":
                log.info(
                    "tokenizers differ at their ends alone", shared_size=verdict.shared_size, target=target
                )
        if verdict.kind == "foreign":
            raise foreign_tokenizer(
                self._demands.tokenizer_fingerprint, key, verdict.why, target, classes=self._demands.classes
            )
        return min(verdict.shared_size, info.tokenizer_size)


def _hidden_layers(config: RunConfig) -> tuple[int, ...] | None:
    compared = [loss for _, loss in run_losses(config) if loss.compares_hidden]
    return tuple(sorted({layer for loss in compared for layer in teacher_layers(loss)})) if compared else None


def _why_not(endpoint: Endpoint) -> StillhouseError | None:
    try:
        endpoint.probe()
    except StillhouseError as error:
        return error
    return None


def check_demands(demands: Demands, info: GetTeacherInfoResponse, target: str, name: str = "") -> None:
    """Returns if the teacher `name` meets `demands`; raises as `TeacherClient.connect` does, with limit and remedy."""
    require_kind(info, target, classes=demands.classes)
    if demands.hidden_layers is not None:
        require_layers(info, target, demands.hidden_layers, demands.longest)
    largest_id = int(demands.largest.token_ids.max())
    if largest_id >= info.tokenizer_size and not demands.bridged:
        raise StillhouseError(
            Reason.TOKENIZER_MISMATCH,
            f"{demands.largest.place} has token id {largest_id}, which the student's tokenizer added; the teacher at "
            f"{target} has ids below {info.tokenizer_size}. Leave such tokens out of the data, or use a teacher that knows them.",
            metadata={"value": str(largest_id), "limit": str(info.tokenizer_size)},
        )
    if demands.query_field and CAPABILITY_QUERY_LOGPROBS not in info.capabilities:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"{demands.query_field} compares on the student's likeliest tokens, which needs query_logprobs; the engine of the "
            f"teacher at {target} ({info.engine}) does not give them. Set its divergence to reverse_kl and its estimator "
            "to policy_gradient, which every engine serves, or start the teacher with --engine hf.",
            metadata={"capability": "CAPABILITY_QUERY_LOGPROBS"},
        )
    check_queried_draws(demands.queried_draws, info, target)
    draws = demands.draws_capability
    if demands.draws_field and draws not in info.capabilities:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"{demands.draws_field} has targets that the teacher draws, which the engine of the teacher at {target} "
            f"({info.engine}) does not do. Set it to tail_bucket, or start the teacher with --engine hf.",
            metadata={"capability": Capability.Name(draws)},
        )
    if demands.top_k > info.max_top_k:
        raise StillhouseError(
            Reason.TOP_K_TOO_LARGE,
            f"{demands.top_k_field} is {demands.top_k}; the teacher at {target} gives at most {info.max_top_k}. "
            f"Lower it, or start the teacher with --max-top-k {demands.top_k}.",
            metadata={"value": str(demands.top_k), "limit": str(info.max_top_k)},
        )
    if demands.temperature is not None and CAPABILITY_LOG_PARTITIONS not in info.capabilities:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"loss.temperature {demands.temperature:g} in mode exact needs log_partitions, which the engine of the teacher "
            f"at {target} ({info.engine}) does not give. Set loss.temperature_mode: conditional, or start the teacher "
            "with --engine hf.",
            metadata={"capability": "CAPABILITY_LOG_PARTITIONS"},
        )
    check_prompt_limit(demands.longest_prompted.get(name), info, target)
    longest = len(demands.longest.token_ids)
    if longest > info.max_sequence_tokens and not demands.bridged:
        raise StillhouseError(
            Reason.SEQUENCE_TOO_LONG,
            f"{demands.longest.place} has {longest} tokens; the teacher at {target} takes at most "
            f"{info.max_sequence_tokens}. Set data.max_sequence_tokens: {info.max_sequence_tokens}, or start the teacher "
            "with a larger --max-sequence-tokens.",
            metadata={"value": str(longest), "limit": str(info.max_sequence_tokens)},
        )
