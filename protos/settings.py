"""Settings of a service: one field of a dataclass each, from which its check, command-line option and help are derived."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from stillhouse.protos.errors import Reason, StillhouseError

SHARED: Mapping[str, str] = {
    "listen": "HOST:PORT or unix:PATH; port 0 is any free one.",
    "address_file": "Written with the bound address once the service is ready.",
    "shutdown_grace_s": "Seconds for running calls after SIGTERM.",
    "tokens": "Tokens required of callers; `stillhouse token create` makes the file.",
    "audit_log": "Audit log of calls, as JSON lines.",
    "metrics_host": "Address of the Prometheus metrics.",
    "metrics_port": "Port of the metrics; 0 for none.  [default: 100 above that of --listen]",
    "insecure": "Allow an address beyond loopback without TLS, or without tokens or client certificates.",
    "tls_cert": "Certificate chain of the service, PEM.",
    "tls_key": "Private key of that certificate, PEM.",
    "tls_client_ca": "Authority of client certificates, which it makes required, PEM.",
    "reflection": "Server reflection.  [default: on loopback]",
    "log_level": "Lowest level logged.",
}
"""Help of the settings that both services have, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Metadata of a field of a service's settings."""

    help: str
    flag: str = ""
    """Command-line flag, or several with spaces between; empty derives it from the field's name."""
    between: tuple[float, float] | None = None
    """Lowest and highest value; None is unbounded."""
    choices: tuple[str, ...] = ()
    """Valid values; empty allows any."""


def setting(text: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A field with this help, default and metadata; without a default it is required."""
    return field(default=default, metadata={"setting": Setting(help=text, **metadata)})


def check_settings(settings: Any) -> None:
    """Raises StillhouseError(INVALID_CONFIG) for the first value outside its choices or range, and for half a key pair."""
    for each in fields(settings):
        value, rule = getattr(settings, each.name), _setting_of(each)
        if rule.choices and value not in rule.choices:
            raise bad_setting(_flags(each)[0], value, f"Valid are {', '.join(rule.choices)}.")
        if rule.between and value is not None and not rule.between[0] <= value <= rule.between[1]:
            raise bad_setting(_flags(each)[0], value, "Give a value in [{}, {}].".format(*rule.between))
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise StillhouseError(
            Reason.INVALID_CONFIG, "--tls-cert and --tls-key belong together: give both or none."
        )
    if settings.tls_client_ca is not None and settings.tls_cert is None:
        raise StillhouseError(Reason.INVALID_CONFIG, "--tls-client-ca needs --tls-cert and --tls-key.")


def bad_setting(flag: str, value: object, remedy: str) -> StillhouseError:
    """The error of a setting that cannot work."""
    return StillhouseError(Reason.INVALID_CONFIG, f"{flag} is {value}. {remedy}")


def options_of(cls: type[Any], **special: dict[str, Any]) -> Callable[[Any], Any]:
    """Decorates a click command with an option for each field of `cls`; `special` overrides the arguments of single ones."""
    hints = get_type_hints(cls)

    def decorate(command: Any) -> Any:
        for each in reversed(fields(cls)):
            command = _option(each, hints[each.name], special.get(each.name, {}))(command)
        return command

    return decorate


def _option(each: Field[Any], hint: Any, special: dict[str, Any]) -> Any:
    import click

    rule = _setting_of(each)
    multiple = get_origin(hint) is tuple
    kind = next(iter({*(get_args(hint) or (hint,))} - {NoneType, Ellipsis}), str)
    how: dict[str, Any] = {"help": rule.help, "multiple": multiple}
    if "callback" in special:
        pass
    elif kind is not bool:
        path = click.Path(path_type=Path)
        how["type"] = click.Choice(rule.choices) if rule.choices else path if kind is Path else kind
    elif each.default is False:
        how["is_flag"] = True
    if each.default is MISSING:
        how["required"] = True
    elif not multiple:
        how["default"] = each.default
    return click.option(*_flags(each), each.name, **how | special)


def _setting_of(each: Field[Any]) -> Setting:
    rule: Setting = each.metadata["setting"]
    return rule


def _flags(each: Field[Any]) -> list[str]:
    return (_setting_of(each).flag or "--" + each.name.replace("_", "-")).split()
