"""Checks a loss: ranges of its divergences' parameters, and combinations of its fields."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.protos.errors import FieldViolation
from stillhouse.student_trainer.config.fields import Choices, fields_of
from stillhouse.student_trainer.config.schema import DIVERGENCE_PARAMETERS, LossConfig, LossTermConfig

PLAIN_TARGETS, TAIL_TARGETS = ("sampled", "top_k_and_sampled"), ("sampled_tail", "stratified_tail")
"""Values of sparse_target whose ids the teacher draws from all tokens, and from those outside top_k."""
DRAWN_TARGETS = (*PLAIN_TARGETS, *TAIL_TARGETS)
STUDENT_TAIL = "student_tail"
"""Value of sparse_target whose ids the student draws, in its own texts, from outside its top-k."""
MAX_SAMPLES = 512
"""Most draws that a teacher takes."""
MAX_DRAWN_BETA = 0.5
"""Largest beta of alpha_beta at which an estimate from draws has a bounded variance."""
CONTROLLED_TEMPERATURE = 2.0
"""Least temperature at which estimates from draws have a control variate."""
DIVERGENCES = fields_of(LossTermConfig)["divergence"].rule(Choices) or ()
WITHOUT_CONDITIONAL_FORM = ("adaptive_kl", "mse")


def check_loss(path: str, loss: LossConfig) -> Iterator[FieldViolation]:
    """Problems of the loss at `path` of the run file."""
    if not loss.asks_teacher and loss.hard_weight == 0:
        yield FieldViolation(
            f"{path}.hard_weight", "is 0, and so is every term's weight: nothing would be trained."
        )
    for i, term in enumerate(loss.terms):
        here = f"{path}.terms[{i}]"
        yield from _check_parameters(here, term)
        known = term.divergence in DIVERGENCES
        if known and term.weight > 0 and term.estimator == "full":
            yield from _check_target(here, term, loss)
            yield from _check_temperature(here, term, loss)
    if (loss.num_samples or 0) > MAX_SAMPLES and loss.sparse_target in ("auto", *DRAWN_TARGETS):
        yield FieldViolation(
            f"{path}.num_samples",
            f"is {loss.num_samples}; teachers draw at most {MAX_SAMPLES} ids a position.",
        )
    yield from _check_draw_logprobs(path, loss)
    if loss.sparse_target in TAIL_TARGETS and loss.temperature != 1 and loss.temperature_mode != "exact":
        yield FieldViolation(
            f"{path}.temperature_mode",
            f'is "{loss.temperature_mode}", but sparse_target "{loss.sparse_target}" compares at the temperature of its '
            'draws, which needs "exact". Use this, or sparse_target tail_bucket.',
        )
    elif loss.sparse_target in (*PLAIN_TARGETS, STUDENT_TAIL) and loss.temperature != 1 and loss.asks_teacher:
        yield FieldViolation(
            f"{path}.temperature",
            f'is {loss.temperature:g}, but the tokens of sparse_target "{loss.sparse_target}" are sampled at temperature 1 '
            "and are not exact at another. Use temperature 1, or sparse_target tail_bucket.",
        )


def _check_draw_logprobs(path: str, loss: LossConfig) -> Iterator[FieldViolation]:
    if loss.draw_logprobs is False and needs_draw_logprobs(loss):
        others = ", ".join(sorted({term.divergence for term in _full_terms(loss)} - {"forward_kl"}))
        yield FieldViolation(
            f"{path}.draw_logprobs",
            f"is false, but {others} cannot be estimated from draws without their log-probabilities. Leave it out.",
        )


def why_no_tail_draws(term: LossTermConfig) -> str:
    """The reason that keeps a term from an estimate by draws from the tail; empty if it has one of bounded variance."""
    parameters = term.parameters
    reverse = f"{term.divergence} weighs tokens by the student, and draws of the teacher would estimate it without bound"
    if term.divergence in ("adaptive_kl", "mse"):
        return f"{term.divergence} is no f-divergence, and has no unbiased estimate from draws"
    if (
        term.divergence == "reverse_kl"
        or (term.divergence.startswith("jsd") and parameters["beta"] == 1)
        or (term.divergence == "skew_reverse_kl" and parameters["alpha"] == 0)
        or (term.divergence == "alpha_beta" and parameters["beta"] > MAX_DRAWN_BETA)
    ):
        return reverse
    return ""


def takes_draw_logprobs(loss: LossConfig) -> bool:
    """True if stratified draws are requested with their log-probabilities: as the loss says, else where they are needed or, for
    forward KL, from the temperature on from which they make it steadier."""
    if loss.draw_logprobs is not None:
        return loss.draw_logprobs
    return needs_draw_logprobs(loss) or (is_controlled(loss) and any(_full_terms(loss)))


def needs_draw_logprobs(loss: LossConfig) -> bool:
    """True if no estimate from draws of the tail goes without their log-probabilities: for all but forward KL, which is linear in p."""
    return any(term.divergence != "forward_kl" for term in _full_terms(loss))


def _full_terms(loss: LossConfig) -> Iterator[LossTermConfig]:
    return (term for term in loss.terms if term.weight > 0 and term.estimator == "full")


def is_controlled(loss: LossConfig) -> bool:
    """True if estimates from draws of the tail have a control variate: it helps where temperature brings student and teacher
    close, and harms elsewhere."""
    return loss.temperature >= CONTROLLED_TEMPERATURE


def _check_parameters(path: str, term: LossTermConfig) -> Iterator[FieldViolation]:
    known = DIVERGENCE_PARAMETERS.get(term.divergence, {})
    for name in ("alpha", "beta", "mu"):
        value = getattr(term, name)
        if value is None:
            continue
        if name not in known:
            yield FieldViolation(f"{path}.{name}", f'has no meaning for "{term.divergence}"; leave it out.')
        elif value > 1 and term.divergence != "alpha_beta":
            yield FieldViolation(f"{path}.{name}", f"{value:g} is out of range; it must be in [0, 1].")
        elif value == 1 and term.divergence.startswith("skew"):
            yield FieldViolation(
                f"{path}.{name}",
                "is 1, which compares a distribution with itself: nothing would be trained. It must be in [0, 1).",
            )
    if term.divergence == "alpha_beta":
        parameters = term.parameters
        total = parameters["alpha"] + parameters["beta"]
        if abs(total - 1) > 1e-9:
            yield FieldViolation(
                f"{path}.beta",
                f"alpha + beta is {total:g}; it must be 1. Of all tokens beyond top_k the teacher sends one sum, the tail. "
                "Merging tokens into it can only lower an f-divergence, and with equal distributions leaves it 0; "
                "alpha-beta is one only if alpha + beta = 1, and any other pair could rise through the merging.",
            )


def _check_target(path: str, term: LossTermConfig, loss: LossConfig) -> Iterator[FieldViolation]:
    """Targets without a tail fit forward KL alone, draws from the teacher's tail what they estimate with a bounded variance, and
    draws from the student's reverse KL."""
    if loss.sparse_target == STUDENT_TAIL:
        if term.divergence != "reverse_kl":
            yield FieldViolation(
                f"{path}.divergence",
                f'"{term.divergence}" does not go with sparse_target "{STUDENT_TAIL}", whose draws estimate reverse_kl alone. '
                "Use this, or sparse_target auto.",
            )
        return
    if loss.sparse_target in TAIL_TARGETS:
        why = why_no_tail_draws(term)
        if why:
            yield FieldViolation(
                f"{path}.divergence",
                f'does not go with sparse_target "{loss.sparse_target}": {why}. Use sparse_target tail_bucket.',
            )
        return
    if loss.sparse_target in ("auto", "tail_bucket") or term.divergence == "forward_kl":
        return
    why = (
        "whose ids are sampled: unbiased only for a loss that is linear in the teacher"
        if loss.sparse_target in DRAWN_TARGETS
        else "which has no tail: the student's mass on other tokens would cost nothing, or without limit"
    )
    yield FieldViolation(
        f"{path}.divergence",
        f'"{term.divergence}" does not go with sparse_target "{loss.sparse_target}", {why}. Use forward_kl, or '
        "sparse_target tail_bucket.",
    )


def _check_temperature(path: str, term: LossTermConfig, loss: LossConfig) -> Iterator[FieldViolation]:
    if (
        loss.temperature != 1
        and loss.temperature_mode == "conditional"
        and term.divergence in WITHOUT_CONDITIONAL_FORM
    ):
        yield FieldViolation(
            f"{path}.divergence",
            f'"{term.divergence}" is not an f-divergence and does not split into "a kept token or not" and "which one". '
            "Use temperature_mode exact, or temperature 1.",
        )
