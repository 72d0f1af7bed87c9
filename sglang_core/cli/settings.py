"""Flags and YAML keys, made from the fields of `sglang_core.config`; a new setting needs no line here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from sglang_core.cli.parser import Parser, did_you_mean
from sglang_core.config import EngineConfig, all_settings, setting_type
from sglang_core.errors import ConfigError

DEMO = "demo"
WHICH_MODEL = ("model_path", "device", "dtype", "load_format")  # shown by commands that are not `serve`


def flag_names(spec: Field[Any]) -> list[str]:
    """The option strings of a setting, its own first."""
    own = spec.metadata["flag"] or spec.name.replace("_", "-")
    return [f"--{name}" for name in (own, *spec.metadata["aliases"])]


def add_settings(parser: Parser, shown: Collection[str] | None = None) -> None:
    """Add every setting as a flag, grouped by owner, and `--config`.

    shown: settings that `--help` lists; by default those marked as common.
    """
    parser.options.add_argument(
        "--config", metavar="FILE", help="YAML file with any of these settings; flags win over it"
    )
    owners = EngineConfig()
    groups: dict[str, argparse._ArgumentGroup] = {}
    for branch, spec in all_settings():
        if branch not in groups:
            subject = (type(getattr(owners, branch)).__doc__ or "").splitlines()[0].rstrip(".")
            groups[branch] = parser.add_argument_group(f"{branch} settings ({subject})")
        is_shown = spec.metadata["common"] if shown is None else spec.name in shown
        _add_flag(groups[branch], branch, spec, parser.maybe(_help(spec), is_shown))


def _add_flag(group: argparse._ArgumentGroup, branch: str, spec: Field[Any], text: str) -> None:
    kind, _, repeated = setting_type(branch, spec.name)
    names = flag_names(spec)
    if kind is bool:
        off = [f"--no-{name[2:]}" for name in names]
        if spec.default:
            group.add_argument(*names, *off, dest=spec.name, action=_OnOff, help=text)
        else:
            group.add_argument(*names, dest=spec.name, action=_OnOff, help=text)
            group.add_argument(*off, dest=spec.name, action=_OnOff, help=argparse.SUPPRESS)  # undoes a YAML file
        return
    choices = spec.metadata["choices"]
    group.add_argument(
        *names,
        dest=spec.name,
        action="extend" if repeated else "store",
        nargs="+" if repeated else None,  # several after one flag, as SGLang takes them, or the flag again
        metavar="{" + ",".join(choices) + "}" if choices else _METAVARS[kind],
        default=argparse.SUPPRESS,
        help=text,
    )


_METAVARS: Mapping[type, str] = {str: "TEXT", int: "N", float: "X"}


class _OnOff(argparse.Action):
    """--flag is true, --no-flag is false, unsaid is unsaid."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not (option_string or "").startswith("--no-"))


def _help(spec: Field[Any]) -> str:
    default = "on" if spec.default is True else spec.default
    text: str = spec.metadata["help"]
    return text if default in (None, "", (), False) else f"{text} (default: {default})"


def engine_config(args: argparse.Namespace, **defaults: Any) -> EngineConfig:
    """The config that a parsed command line asks for: flags, else the file, else this command's own `defaults`.

    Raises ConfigError with the flag's name in it.
    """
    given = vars(args)
    flags = {spec.name: _value(branch, spec, given[spec.name]) for branch, spec in all_settings() if spec.name in given}
    from_file = read_yaml(args.config) if args.config else {}
    settings = defaults | from_file | flags
    try:
        config = EngineConfig.from_flat(**settings)
    except ConfigError as error:
        raise ConfigError(_name_the_flag(str(error), flags)) from None
    check_model_path(config.model.model_path)
    return config


def _value(branch: str, spec: Field[Any], given: Any) -> Any:
    kind, _, repeated = setting_type(branch, spec.name)
    if kind is bool:
        return given
    convert: Callable[[str], Any] = kind
    try:
        return tuple(convert(v) for v in given) if repeated else convert(given)
    except ValueError:
        raise ConfigError(f"{flag_names(spec)[0]} {given} must be {kind.__name__}") from None


def _name_the_flag(message: str, flags: Collection[str]) -> str:
    name = re.match(r"(\w+)=", message)
    if name is None or name[1] not in flags:
        return message
    spec = next(spec for _, spec in all_settings() if spec.name == name[1])
    return f"{flag_names(spec)[0]} {message[name.end() :]}"


def read_yaml(path: str) -> dict[str, Any]:
    """Settings of a YAML file by flat name. Keys are flags without dashes in front, in kebab or snake case, flat or under
    their owner (`cache: {page-size: 16}`). Raises ConfigError for an unknown or repeated key."""
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(document or {}, dict):
        raise ConfigError(f"--config {path} must hold `name: value` lines, not a {type(document).__name__}")
    names = {flag[2:]: spec.name for _, spec in all_settings() for flag in flag_names(spec)}
    branches = {branch for branch, _ in all_settings()}
    settings: dict[str, Any] = {}
    pending = list((document or {}).items())
    while pending:
        key, value = pending.pop(0)
        name = names.get(str(key).replace("_", "-"))
        if isinstance(value, dict) and key in branches:
            pending += value.items()
        elif name is None:
            raise ConfigError(f"--config {path}: unknown setting {key!r}{_near_key(str(key), names)}")
        elif name in settings:
            raise ConfigError(f"--config {path}: {name} is set twice")
        else:
            settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def _near_key(key: str, names: Mapping[str, str]) -> str:
    from sglang_core.cli.sglang_flags import why_unsupported

    kebab = key.replace("_", "-")
    if reason := why_unsupported(f"--{kebab}"):
        return f"; {reason}"
    return did_you_mean(kebab, names)


def check_model_path(model_path: str) -> None:
    """Raise ConfigError where a model path is missing or is a slip of the pen. What may be a hub id passes unseen."""
    if not model_path:
        raise ConfigError(
            "which model? give --model-path: a local folder, a hub id, or 'demo' for the embedded demo model"
        )
    path = Path(model_path).expanduser()
    if model_path == DEMO or path.exists():
        return
    folders = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    if "/" not in model_path:
        models = [name for name in folders if (path.parent / name / "config.json").is_file()]
        if near := did_you_mean(model_path, [DEMO, *models]):
            raise ConfigError(f"--model-path {model_path} does not exist{near}")
    elif model_path.startswith(("/", "./", "../", "~")):
        near = did_you_mean(path.name, folders, prefix=model_path.rstrip("/").removesuffix(path.name))
        place = f"{path.parent} has no such folder" if path.parent.is_dir() else f"neither does {path.parent}"
        raise ConfigError(f"--model-path {model_path} does not exist{near or f'; {place}'}")
