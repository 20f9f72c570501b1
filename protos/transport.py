"""How the three programs meet: the names that they take from here, and nothing of its own."""

from protos.audit import AuditLog
from protos.auth import Caller, TokenFile, current_caller
from protos.channel import (
    FLUSH_BYTES,
    MAX_MESSAGE_BYTES,
    RECEIVE_LIMIT_BYTES,
    ChannelOptions,
    connect,
    connect_async,
    is_loopback,
    process_name,
)
from protos.interceptor import ErrorInterceptor
from protos.logs import configure_logging
from protos.server import Server, write_address_file
from protos.tls import ServerTls

__all__ = [
    "FLUSH_BYTES",
    "MAX_MESSAGE_BYTES",
    "RECEIVE_LIMIT_BYTES",
    "AuditLog",
    "Caller",
    "ChannelOptions",
    "ErrorInterceptor",
    "Server",
    "ServerTls",
    "TokenFile",
    "configure_logging",
    "connect",
    "connect_async",
    "current_caller",
    "is_loopback",
    "process_name",
    "write_address_file",
]
