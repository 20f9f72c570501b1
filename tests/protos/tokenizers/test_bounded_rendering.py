"""The bounds of a rendering: a loop ends, whatever it catches, and nothing is left to interrupt others."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path

import jinja2
import pytest

from stillhouse.protos.tokenizers import bounded_rendering as bounds
from stillhouse.protos.tokenizers.bounded_rendering import RenderingTooLarge, bounded_rendering
from stillhouse.protos.tokenizers.bounded_templates import BoundedEnvironment

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_loops_is_ended() -> None:
    began = time.thread_time()
    with pytest.raises(RenderingTooLarge, match=r"still runs after 0\.2 s"), bounded_rendering(0.2):
        jinja2.Template(LOOP).render()
    assert time.thread_time() - began < 5


def test_a_template_that_gathers_texts_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_GROWTH_BYTES", 1 << 27)
    gather = "{% set found = namespace(all=[]) %}{% for i in range(9999) %}{% set found.all = found.all + ['a' * 9999999 ~ i] %}{% endfor %}"
    template = BoundedEnvironment().from_string(gather)
    before = bounds._resident_bytes()
    with pytest.raises(RenderingTooLarge, match="takes more than 128 MiB of memory"), bounded_rendering():
        template.render()
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
    assert peak - before < 4 << 30
    assert bounds._resident_bytes() - before < 1 << 29, "it is given back"


def test_a_process_that_grew_before_does_not_end_a_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    with bounded_rendering():
        pass  # the watcher is there
    monkeypatch.setattr(bounds, "MAX_GROWTH_BYTES", 1 << 27)
    held = bytearray(b"a") * (1 << 28)
    time.sleep(0.3)
    began = time.thread_time()
    with bounded_rendering():
        while time.thread_time() - began < 0.3:
            pass
    assert len(held) == 1 << 28


def test_a_process_that_grows_does_not_end_short_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_GROWTH_BYTES", 1 << 24)
    grown: list[bytearray] = []

    def grow() -> None:
        for _ in range(64):
            grown.append(bytearray(b"a") * (1 << 24))
            time.sleep(0.01)

    other = threading.Thread(target=grow)
    other.start()
    while other.is_alive():
        with bounded_rendering():
            began = time.thread_time()
            while time.thread_time() - began < 0.002:
                pass
    assert len(grown) == 64


@pytest.mark.parametrize("traced", [False, True])
def test_an_end_that_comes_late_or_is_caught_is_told_once(*, traced: bool) -> None:
    before = sys.gettrace()
    sys.settrace((lambda *_: None) if traced else None)
    try:
        for _ in range(3):
            with pytest.raises(RenderingTooLarge), bounded_rendering(0.1), contextlib.suppress(Exception):
                jinja2.Template(LOOP).render()
        for _ in range(1000):
            assert jinja2.Template("a").render() == "a"
    finally:
        sys.settrace(before)


def test_threads_have_bounds_of_their_own() -> None:
    ended: list[str] = []

    def loop() -> None:
        try:
            with bounded_rendering(0.2):
                jinja2.Template(LOOP).render()
        except RenderingTooLarge as error:
            ended.append(str(error))

    other = threading.Thread(target=loop)
    other.start()
    for _ in range(1000):
        with bounded_rendering():
            assert jinja2.Template("a").render() == "a"
    other.join(20)
    assert len(ended) == 1


def test_a_rendering_that_waits_is_not_interrupted() -> None:
    with bounded_rendering(0.05):
        time.sleep(0.4)
    with bounded_rendering(0.3):
        sum(range(100))


def test_long_texts_and_templates_are_refused() -> None:
    assert bounds.checked_length("a") == bounds.checked_template("a") == "a"
    with pytest.raises(RenderingTooLarge, match="writes 16777217 characters"):
        bounds.checked_length("a" * (bounds.MAX_RENDERED_CHARACTERS + 1))
    with pytest.raises(RenderingTooLarge, match="has 1048577 characters"):
        bounds.checked_template("a" * (bounds.MAX_TEMPLATE_CHARACTERS + 1))
