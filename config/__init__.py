"""How a config file and --key=value become dataclasses: shared by all commands."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def info(text: str) -> None:
    """Everything but the product of a command goes to stderr."""
    print(text, file=sys.stderr, flush=True)


# ---- The command line, shared by all scripts ----------------------------------------------------

KINDS = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
KINDS |= {str: "text", dict: "a dict such as {'key': 1}"}


def kinds_of(annotation: Any) -> list[type]:
    """int | None -> [int, NoneType]; dict[str, int] -> [dict]."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    return [typing.get_origin(kind) or kind for kind in kinds]


def unknown_key(name: str, known: Iterable[str]) -> str:
    """The sentence for a key that does not exist."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), 1)
    return f"unknown key {name}; " + (f"did you mean {close[0]}?" if close else "see --help")


def check_value(name: str, value: Any, annotation: Any) -> Any:
    """The value as its field's type: 1e6 may be an int, 1 a float. Raises ValueError."""
    kinds = kinds_of(annotation)
    if isinstance(value, bool):  # to Python an int, not to us
        if bool in kinds:
            return value
    elif isinstance(value, tuple(kinds)):
        return value
    elif float in kinds and isinstance(value, int):
        return float(value)
    elif int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    expected = " or ".join(KINDS.get(kind, kind.__name__) for kind in kinds)
    raise ValueError(f"{name} must be {expected}, not {value!r}; --help shows the defaults")


def parse_value(name: str, text: str, annotation: Any) -> Any:
    """A value from the command line: true, false, none, one of Python's literals, or text."""
    kinds, word = kinds_of(annotation), text.strip().lower()
    if bool in kinds and word in ("true", "false", "1", "0"):
        return word in ("true", "1")
    if type(None) in kinds and word in ("none", "null"):
        return None
    try:
        value = check_value(name, ast.literal_eval(text.strip()), annotation)
    except (ValueError, SyntaxError):
        value = text
    return check_value(name, text if isinstance(value, str) else value, annotation)


def parse_args(
    description: str, argv: list[str], *config_classes: type, positional: str = ""
) -> tuple[str | None, dict[str, Any]]:
    """Read [POSITIONAL] [--key=value ...] with the dataclasses' fields as keys.

    Returns the positional argument (None if absent) and the values given, by field. --help prints
    each field's default and the comment on its line. Exits with 2 and a sentence where a key is
    unknown or a value is not of its field's type.
    """
    usage = f"%(prog)s {f'[{positional.upper()}] ' if positional else ''}[--key=value ...]"
    parser = argparse.ArgumentParser(usage=usage, description=description, allow_abbrev=False)
    if positional:
        parser.add_argument("0", nargs="?", metavar=positional.upper())
    annotations = {}
    for config in config_classes:
        group = parser.add_argument_group(config.__name__)
        hints, source = typing.get_type_hints(config), inspect.getsource(config)
        for field in dataclasses.fields(config):
            if field.name in annotations:
                continue
            annotations[field.name] = hints[field.name]
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default
            comment = re.search(rf"(?m)^    {field.name}:.*?  # (.*)$", source)
            text = f"{comment[1] if comment else ''} (default: {default!r})".replace("%", "%%")
            kind = "|".join(kind.__name__ for kind in kinds_of(hints[field.name]))
            group.add_argument("--" + field.name, metavar=kind, help=text)
    flags = ["--" + name for name, kind in annotations.items() if bool in kinds_of(kind)]
    given, unknown = parser.parse_known_args([a + "=true" if a in flags else a for a in argv])
    if unknown and unknown[0].startswith("--"):
        parser.error(unknown_key(unknown[0][2:].split("=")[0], annotations))
    if unknown:
        parser.error(f"unexpected argument {unknown[0]!r}; write --key=value")
    values = vars(given)
    argument = values.pop("0", None)
    try:
        return argument, {
            name: parse_value(name, text, annotations[name])
            for name, text in values.items()
            if text is not None
        }
    except ValueError as error:
        parser.error(str(error))


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a script's main: a refusal becomes a sentence and exit code 1, a bug keeps its trace."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        info("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        info(f"error: {error}")
        sys.exit(1)


def read_config_file(path: str, *config_classes: type) -> dict[str, Any]:
    """The assignments of a config file, checked against the fields of the dataclasses."""
    if not Path(path).is_file():
        have = ", ".join(sorted(str(p) for p in Path("config").glob("*.py"))) or "none here"
        raise FileNotFoundError(f"no config file {path}; there are: {have}")
    try:
        values = runpy.run_path(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from None
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    types = {field.name: field.type for c in config_classes for field in dataclasses.fields(c)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{path}: {unknown_key(name, types)}")
        values[name] = check_value(f"{path}: {name}", value, types[name])
    return values
