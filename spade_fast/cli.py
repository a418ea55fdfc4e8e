# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the error of a wrong option, the device, and options that a dataclass declares.

A dataclass whose fields are made by `option` declares the options of a command. `add_options` puts them on the command
line, `parse` reads the command line, and `read_options` reads a JSON or YAML file. An option that is not given leaves
no trace, so that a caller can merge several sources.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import os
import re
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch


class ConfigError(ValueError):
    """An option is unknown, has the wrong type, is out of range, or contradicts another. The message names it."""


def pick_device(name: str) -> torch.device:
    """The device of an option: ``auto`` is the GPU if there is one, else the CPU.

    Raises:
        ConfigError: the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:  # torch raises AssertionError for a CUDA it was built without
        raise ConfigError(f"--device {name} can't be used: {str(e).splitlines()[0]}") from None


def option(group: str, default: Any, help: str, choices: tuple | None = None) -> Any:
    """A dataclass field that is an option.

    Args:
        group: the heading in ``--help`` under which the option stands.
        default: the value when nothing is given.
        help: one line for ``--help``.
        choices: the values allowed, or None for all.
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "choices": choices})


def flag(name: str) -> str:
    """The option as it is written on the command line.

    Examples:
        >>> flag("batch_size")
        '--batch-size'
    """
    return "--" + name.replace("_", "-")


@functools.cache
def kinds(schema: type) -> dict[str, tuple[type, ...]]:
    """The types that each field of a dataclass takes; NoneType is among them where None is allowed."""
    hints = get_type_hints(schema)
    names = [f.name for f in dataclasses.fields(schema)]
    return {n: get_args(hints[n]) if get_origin(hints[n]) in (Union, types.UnionType) else (hints[n],) for n in names}


def _convert(schema: type, name: str, value: Any, where: str) -> Any:
    """The value as the field's type. A whole number is taken for a float; a string is not taken for a number."""
    allowed = kinds(schema)[name]
    ok = isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)
    if not ok and float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value, ok = float(value), True
    if not ok:
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in allowed)
        raise ConfigError(f"{where}: {name} must be {wanted}, got {value!r}")
    choices = schema.__dataclass_fields__[name].metadata["choices"]  # type: ignore[attr-defined] # of a dataclass
    if choices and value is not None and value not in choices:
        raise ConfigError(f"{where}: {name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    return value


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known names that are close to it."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def read_options(
    path: str | Path, schema: type, migrate: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> dict[str, Any]:
    """The options that a JSON or YAML file gives. YAML (``.yaml``, ``.yml``) needs PyYAML.

    Args:
        path: the file; ``~`` is the home directory.
        schema: the dataclass of the options.
        migrate: turns names of an earlier version into today's.

    Raises:
        ConfigError: the file can't be read, has an unknown key or a value of the wrong type; or PyYAML is missing.
    """
    file = Path(os.path.expanduser(path))
    is_yaml = file.suffix in (".yaml", ".yml")
    try:
        text = file.read_text(encoding="utf-8-sig")
        values = _parse_yaml(text, path) if is_yaml else json.loads(text)
    except (OSError, ValueError) as e:  # of json and of UTF-8: they are ValueErrors
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{path}: not a readable {'YAML' if is_yaml else 'JSON'} file: {e}") from e
    if not isinstance(values, dict):
        what = "mapping" if is_yaml else "JSON object"
        raise ConfigError(f"{path}: must hold one {what}, got {type(values).__name__}")
    values = migrate(values)
    known = [f.name for f in dataclasses.fields(schema)]
    for name in values:
        if name not in known:
            raise ConfigError(f"{path}: unknown option {name!r}{suggest(str(name), known)}")
    return {name: _convert(schema, name, value, str(path)) for name, value in values.items()}


def _parse_yaml(text: str, path: str | Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError(f"{path}: reading YAML needs PyYAML: pip install pyyaml; JSON needs nothing") from None

    class Loader(yaml.SafeLoader):
        """PyYAML takes 1e-4 for a string, because YAML 1.1 wants a point in it. Here it is a number."""

    number = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)  # a SafeLoader: it makes plain containers alone
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not a readable YAML file: {' '.join(str(e).split())}") from e


def add_options(parser: argparse.ArgumentParser, schema: type) -> None:
    """Adds an option for every field, in groups. One that is not given leaves no trace in the namespace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(schema):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = next(k for k in kinds(schema)[field.name] if k is not type(None))
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None:
            text += f" (default: {field.default})"
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            groups[title].add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **common)
            continue
        choices = field.metadata["choices"]
        metavar = None if choices else kind.__name__.upper()
        groups[title].add_argument(flag(field.name), type=kind, choices=choices, metavar=metavar, **common)


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, schema: type | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Reads the command line. An unknown option ends the program; the message names close ones.

    Args:
        parser: has the options of `schema` and perhaps others.
        argv: the arguments (default: those of the program).
        schema: the dataclass of the options.

    Returns:
        All options, and those of `schema` that are given.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [s for action in parser._actions for s in action.option_strings]
        name = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
        parser.error(f"unknown option {name}{suggest(name, known)}")
    names = {f.name for f in dataclasses.fields(schema)} if schema is not None else set()
    return args, {name: value for name, value in vars(args).items() if name in names}
