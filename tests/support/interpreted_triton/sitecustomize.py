"""Start-up hook that gives vLLM on a CPU its second model runner, whose Triton kernels run in Triton's interpreter.

`PYTHONPATH=tests/support/interpreted_triton stillhouse-teacher ...` starts a teacher so: slow, and exact.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


class _Driver:
    """Driver of no device, which vLLM asks for before it uses Triton."""

    @staticmethod
    def is_active() -> bool:
        return True


try:
    from triton.backends import backends
except ImportError:
    pass
else:
    backends.setdefault("cpu", SimpleNamespace(driver=_Driver, compiler=None))
