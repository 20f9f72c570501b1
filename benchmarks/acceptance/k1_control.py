"""Control of the acceptance experiment: the k1 estimate of reverse KL as a loss, which has no training signal.

log q(y) - log p(y) of the student's own sample y is an unbiased estimate of KL(q || p), but its gradient is that of
log q(y), whose expectation over y ~ q is zero. One function is replaced, the policy gradient; data, teacher and
optimizer are those of `python -m stillhouse.student_trainer.train`. No run file expresses it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from stillhouse.student_trainer.train.__main__ import main
from stillhouse.student_trainer.train.loss import objective
from stillhouse.student_trainer.train.loss.policy_gradient import SampledTokens


def k1_as_loss(student_logprobs: Float[Tensor, "B T"], sampled: SampledTokens) -> Float[Tensor, "B T"]:
    """Returns the estimate itself, differentiated as it stands."""
    return student_logprobs - sampled.teacher_logprobs


if __name__ == "__main__":
    # The name that the objective calls; if it changes, the control trains, and fails.
    objective.policy_gradient = k1_as_loss  # type: ignore[attr-defined]
    main()
