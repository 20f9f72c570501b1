"""Deals files to the workers of pytest-xdist: one file to one worker, and those that share something costly to the same one.

A fixture of the session lives once in each worker: an engine of vLLM takes from 13 s to a minute to start, the site of the
tests in a browser three runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

_ENGINES = "tests/teacher_service/engines"
SHARING: Mapping[str, tuple[str, ...]] = {
    "teachers": (  # vllm_teacher and second_runner_teacher
        *(f"{_ENGINES}/test_{name}.py" for name in ("adapters", "contract", "generation")),
        "tests/teacher_service/adapters/test_adapters_live.py",
        "tests/integration/test_on_policy_vllm.py",
        "tests/integration/test_online_run.py",
    ),
    "worker_engine": tuple(f"{_ENGINES}/vllm/test_{name}.py" for name in ("engine", "tiers")),
    "site": tuple(f"tests/client/web/browser/test_{name}.py" for name in ("new_run", "runs", "tokens")),
}
"""Files of tests by what they share."""
_GROUP_OF = {path: name for name, paths in SHARING.items() for path in paths}


class ByFixture(LoadFileScheduling):  # type: ignore[misc]
    """Deals whole files, and files that share a costly fixture together."""

    def _split_scope(self, nodeid: str) -> str:
        path: str = super()._split_scope(nodeid)
        return _GROUP_OF.get(path, path)
