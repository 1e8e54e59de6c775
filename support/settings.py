"""How a config file and --key=value become dataclasses: shared by all commands."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import shlex
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any


def info(text: str) -> None:
    """Print to stderr, as stdout is for results; of several processes, only the first prints."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


# What nanoGPT's options are called here.
FROM_NANOGPT = {
    "learning_rate": "lr", "max_iters": "steps", "gradient_accumulation_steps": "grad_accum",
    "grad_clip": "clip", "eval_interval": "eval_every", "log_interval": "log_every",
    "dataset": "data", "out_dir": "out", "start": "prompt", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_embd": "hidden_size",
}  # fmt: skip


def unknown_key(name: str, known: Iterable[str]) -> str:
    """The sentence for a key that does not exist."""
    known = list(known)
    close = [FROM_NANOGPT[name]] if FROM_NANOGPT.get(name) in known else []
    close = close or difflib.get_close_matches(name, known, 1, 0.75)  # less hints at nonsense
    return f"unknown key {name}; " + (f"did you mean {close[0]}?" if close else "see --help")


def kind_of(annotation: Any) -> str:
    """A field's type in words."""
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(str(x) or "''" for x in typing.get_args(annotation))
    return inspect.formatannotation(annotation)


def as_field(name: str, value: Any, annotation: Any) -> Any:
    """The value as its field's type: 1e6 may be an int, 1 a float. Raises ValueError.

    Text, which is all that a command line has, may spell a literal of Python, true, false and none
    in any case, but in a field for text it stays as it is: a prompt may look like anything.
    """
    kinds, x = typing.get_args(annotation) or (annotation,), value  # of a Literal the choices
    if type(x) is str and str not in kinds and x not in kinds:
        with suppress(Exception):  # text that is no literal
            x = ast.literal_eval(x.title() if x.strip().isalpha() else x)  # none is None
    if type(x) in kinds or x in kinds:  # to isinstance a bool would be an int
        return x
    for kind in kinds:
        with suppress(OverflowError, ValueError):  # int(inf), int(nan)
            if kind in (bool, int, float) and type(x) in (int, float) and kind(x) == x:
                return kind(x)
    raise ValueError(f"{name} is {value!r:.200}, expected {kind_of(annotation)}")


def parse_args(
    description: str, argv: list[str], *config_classes: type, positional: str = "", usage: str = ""
) -> tuple[str | None, dict[str, Any]]:
    """Read [POSITIONAL] [--key=value ...], the keys being the fields of the dataclasses.

    Returns the positional argument or None, and the values given. Exits with 2 and a sentence
    where a key is unknown or a value is not of its field's type.
    """
    usage = usage or f"%(prog)s {f'[{positional.upper()}] ' if positional else ''}[--key=value ...]"
    parser = argparse.ArgumentParser(usage=usage, description=description, allow_abbrev=False)
    if positional:
        parser.add_argument("0", nargs="?", metavar=positional.upper())
    source = "".join(map(inspect.getsource, config_classes))
    fields = {f.name: f for kind in config_classes for f in dataclasses.fields(kind)}
    for name, field in fields.items():
        comment = re.search(rf"(?m)^    {name}:.*?  # (.*)$", source)
        text = (comment[1] if comment else "") + f" (default: {field.default!r})"
        help = text.replace("%", "%%")
        parser.add_argument("--" + name, metavar=kind_of(field.type), help=help)
    flags = ["--" + name for name, field in fields.items() if field.type is bool]
    given, unknown = parser.parse_known_args([a + "=true" if a in flags else a for a in argv])
    if unknown:
        word = unknown[0]
        name = word.removeprefix("--").split("=")[0]
        alone = not word.startswith("-") and "=" not in word and name not in fields
        if alone and "prompt" in fields:
            parser.error(f"{word!r} stands alone; write --prompt={shlex.quote(word)}")
        if alone:
            parser.error(f"{word!r} is one word too many; put a pattern such as '*.txt' in quotes")
        parser.error(f"write --{word}" if name in fields else unknown_key(name, fields))
    values = {name: text for name, text in vars(given).items() if text is not None}
    argument = values.pop("0", None)
    try:
        return argument, {n: as_field(n, text, fields[n].type) for n, text in values.items()}
    except ValueError as error:
        parser.error(str(error))


def with_home(values: dict[str, Any], *names: str) -> dict[str, str]:
    """Those of the named values that are given, with ~ as the home folder: a shell leaves ~ after
    an = as it is."""
    return {name: os.path.expanduser(values[name]) for name in names if name in values}


def read_config_file(path: str, *config_classes: type) -> dict[str, Any]:
    """The assignments of a config file, checked against the fields of the dataclasses."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no config file {path}: name one, as config/small.py")
    try:
        values = runpy.run_path(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from None
    fields = {f.name: f for kind in config_classes for f in dataclasses.fields(kind)}
    values = {name: x for name, x in values.items() if not name.startswith("_")}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{path}: {unknown_key(name, fields)}")
        values[name] = as_field(f"{path}: {name}", value, fields[name].type)
    return values


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
    except (ValueError, OSError, ModuleNotFoundError) as error:
        hint = f": pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        print("error:", textwrap.shorten(str(error), 600) + hint, file=sys.stderr)
        sys.exit(1)
