"""The run's cache of targets: opened once, and put before every stream of queries about fixed text.

Modes: "write_through" queries teachers on a miss and stores the result, "read" does not store it, "only" queries no teacher.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import structlog

from stillhouse.protos.cache.format import CacheMeta, Codec
from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.cache.writer import CacheWriter
from stillhouse.protos.stillhouse.v1.teacher_pb2 import DistributionConfig
from stillhouse.student_trainer.config.schema import CacheConfig
from stillhouse.student_trainer.train.teacher.identity import adapter_fingerprint
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RunCache:
    """An open cache and the mode in which the run uses it."""

    config: CacheConfig
    path: Path
    reader: CacheReader
    writer: CacheWriter | None

    @classmethod
    def open(cls, config: CacheConfig | None, data_dir: Path, stack: ExitStack) -> RunCache | None:
        """Opens the cache that a run names, closed with `stack`; None if it names none.

        Raises:
            StillhouseError: CACHE_NOT_FOUND, CACHE_LOCKED; CACHE_INVALID for a damaged shard in mode "only".
        """
        if config is None:
            return None
        path = data_dir / config.path
        if config.mode == "write_through":
            writer = stack.enter_context(CacheWriter(path, codec=cast("Codec", config.codec)))
            reader = writer.reader
        else:
            writer = None
            reader = CacheReader(path, ignore_broken=config.mode == "read")
            stack.callback(reader.close)
        for broken in reader.broken:
            log.warning("a shard of the cache is left out", why=broken.error.message)
        log.info("cache opened", path=str(path), mode=config.mode, answers=len(reader))
        return cls(config, path, reader, writer)

    @staticmethod
    def make_meta(
        teacher: TeacherClient, request: DistributionConfig, *, held_out: bool = False
    ) -> CacheMeta:
        """Describes the results of `request` from a teacher that has been reached."""
        info, config = teacher.info, teacher.config
        meta = CacheMeta.from_config(
            info,
            request,
            adapter=config.adapter,
            adapter_fingerprint=adapter_fingerprint(info, config.adapter, config.targets[0]),
        )
        student = teacher.text_tokenizer
        other = student != info.tokenizer_fingerprint
        return replace(
            meta,
            held_out=held_out,
            name=config.name,
            student_tokenizer_fingerprint=student if other else "",
            shared_size=teacher.shared_size if other else 0,
            template_date=teacher.template_date,
        )
