"""A control of the acceptance experiment: the training process with the k1 estimate of reverse KL taken as a loss, from which nothing can be learnt.

log q(y) - log p(y) of the student's own token y is an unbiased estimate of KL(q || p), but its gradient is that of
log q(y), whose expectation over y ~ q is zero. One function is replaced, that of the policy gradient: text, teacher,
optimizer and everything else are those of `python -m stillhouse.student_trainer.train`. No run file can ask for it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from stillhouse.student_trainer.train.__main__ import main
from stillhouse.student_trainer.train.loss import objective
from stillhouse.student_trainer.train.loss.policy_gradient import SampledTokens


def k1_as_loss(student_logprobs: Float[Tensor, "B T"], sampled: SampledTokens) -> Float[Tensor, "B T"]:
    """The estimate itself, differentiated as it stands."""
    return student_logprobs - sampled.teacher_logprobs


if __name__ == "__main__":
    # The name by which the objective calls it; where that is another one, the control learns, and fails.
    objective.policy_gradient = k1_as_loss  # type: ignore[attr-defined]
    main()
