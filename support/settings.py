"""Config files and --key=value as dataclasses, and the end of a command: shared by all commands."""

import argparse
import ast
import dataclasses
import difflib
import errno
import inspect
import os
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


class Refusal(ValueError):
    """Input that cannot be used. The message is one sentence: what is wrong, what was expected,
    what to do. A command that raises it prints the sentence, without a trace, and exits with 1."""


def info(text: str) -> None:
    """Print to stderr, since stdout is for results. Only process 0 prints. A closed terminal does
    not end the command."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def short(text: object, length: int = 200) -> str:
    """The text as one line. Beyond `length` characters it is cut between words, with " ..."."""
    line = " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(text)).split())  # torch uses bold print
    if len(line) <= length:
        return line
    words, _, _ = line[: length + 1].rpartition(" ")
    return f"{words or line[:length]} ..."


def and_more(names: list[str]) -> str:
    """The first name, and the number of the others."""
    return f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]


# nanoGPT's names for our keys. "Coming from nanoGPT" in docs/REFERENCE.md says what else differs.
NANOGPT = dict(
    learning_rate="lr", max_iters="steps", lr_decay_iters="decay_end", warmup_iters="warmup",
    decay_lr="decay_start", grad_clip="clip", eval_interval="eval_every", eval_iters="eval_tokens",
    log_interval="log_every", always_save_checkpoint="save_every",
    gradient_accumulation_steps="grad_accum", n_layer="num_hidden_layers", n_embd="hidden_size",
    n_head="num_attention_heads", bias="attention_bias", dataset="data", out_dir="out ckpt",
    start="prompt",
)  # fmt: skip
# nanoGPT's keys without a counterpart here, and why.
NOT_HERE = dict(dropout="there is no dropout here", backend="here it follows from the device")
NOT_HERE |= dict.fromkeys(
    ("wandb_log", "wandb_project", "wandb_run_name"), "here experiments/plot.py draws the log"
)


def unknown_key(name: str, known: Iterable[str], kind: str = "key") -> str:
    """The message for a key, or another kind of word, that does not exist."""
    for ours in NANOGPT.get(name, "").split():
        if ours in known:
            return f"unknown key {name}, nanoGPT's name; here it is {ours} (docs/REFERENCE.md)"
    if name in NOT_HERE:
        return f"unknown key {name}, nanoGPT's name; {NOT_HERE[name]} (docs/REFERENCE.md)"
    close = difflib.get_close_matches(name, known, 1, 0.75)  # a lower cutoff suggests nonsense
    return f"unknown {kind} {name}; " + (f"did you mean {close[0]}?" if close else "see --help")


def type_name(annotation: Any) -> str:
    """A field's type in words."""
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(str(x) or "''" for x in typing.get_args(annotation))
    return inspect.formatannotation(annotation)


def may_be_true(annotation: Any) -> bool:
    """Whether a bare --name means True: the field is a bool, or True is among its choices."""
    return annotation is bool or any(x is True for x in typing.get_args(annotation))


def as_field(name: str, value: Any, annotation: Any) -> Any:
    """The value, converted to its field's type: 1e6 may become an int, 1 a float. Raises Refusal.

    Text, as on a command line, may spell a Python literal, with true, false and none in upper or
    lower case. In a field for text it stays text: a prompt may look like anything.
    """
    kinds, x = typing.get_args(annotation) or (annotation,), value  # for a Literal, the choices
    if type(x) is str and str not in kinds and x not in kinds:
        with suppress(Exception):  # not a literal
            x = ast.literal_eval(x.title() if x.strip().isalpha() else x)  # none becomes None
    if type(x) is int and abs(x) >= 2**63:  # torch takes no larger seed
        raise Refusal(f"{name} is {short(repr(value), 40)}, expected a number below 2^63")
    if type(x) in kinds:  # isinstance would take a bool for an int
        return x
    if x in kinds:  # 1 is True, 2.0 is 2
        return kinds[kinds.index(x)]
    for kind in kinds:
        with suppress(OverflowError, ValueError):  # int(inf), int(nan)
            if kind in (bool, int, float) and type(x) in (int, float) and kind(x) == x:
                return kind(x)
    words = {int: "a whole number", float: "a number", bool: "True or False"}
    literal = typing.get_origin(annotation) is typing.Literal
    expected = type_name(annotation) if literal else words.get(kinds[0], type_name(annotation))
    raise Refusal(f"{name} is {short(repr(value))}, expected {expected}")


def parse_args(
    description: str, argv: list[str], *config_classes: type, positional: str = "", usage: str = ""
) -> tuple[str | None, dict[str, Any]]:
    """Parse [POSITIONAL] [--key=value ...], where the keys are the fields of the dataclasses.

    Returns the positional argument or None, and the values by key, with the positional argument as
    the value of the field of its name, if there is one. Exits with code 2 and a message if a key is
    unknown or a value does not have its field's type.
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
        parser.add_argument("--" + name, metavar=type_name(field.type), help=help)
    flags = ["--" + name for name, field in fields.items() if may_be_true(field.type)]
    given, unknown = parser.parse_known_args([a + "=true" if a in flags else a for a in argv])
    if unknown:
        word = unknown[0]
        name = word.removeprefix("--").split("=")[0]
        if name in fields:
            parser.error(f"write --{word}")
        if not word.startswith("-") and "=" not in word:
            hint = "write an option as --key=value"
            hint += ", a prompt as --prompt='def main('" if "prompt" in fields else ""
            hint += ", and put a pattern such as '*.txt' in quotes" if "source" in fields else ""
            parser.error(f"{word!r} is one word too many; {hint}")
        parser.error(unknown_key(name, fields))
    values = {name: text for name, text in vars(given).items() if text is not None}
    argument = values.pop("0", None)
    if argument is not None and positional in fields:
        if positional in values:
            parser.error(f"{positional} is given twice, {argument} and --{positional}; give one")
        values[positional] = argument
    try:
        return argument, {n: as_field(n, text, fields[n].type) for n, text in values.items()}
    except Refusal as error:
        parser.error(str(error))


def with_home(values: dict[str, Any], *names: str) -> dict[str, str]:
    """The named values, if given, with ~ expanded: a shell does not expand it in --key=~/path."""
    return {name: os.path.expanduser(values[name]) for name in names if name in values}


def read_config_file(path: str, *config_classes: type) -> dict[str, Any]:
    """The assignments in a config file, checked against the fields of the dataclasses."""
    if not os.path.isfile(path):
        raise Refusal(f"there is no config file {path}: name one, such as config/small.py")
    fields = {f.name: f for kind in config_classes for f in dataclasses.fields(kind)}
    values = {k: x for k, x in runpy.run_path(path).items() if not k.startswith("_")}
    for name, value in values.items():
        if name not in fields:
            raise Refusal(f"{path}: {unknown_key(name, fields)}")
        values[name] = as_field(f"{path}: {name}", value, fields[name].type)
    return values


def merge(
    in_file: dict[str, Any],
    stored: dict[str, Any],
    command_line: dict[str, Any],
    named_later: Container[str] = (),
) -> dict[str, Any]:
    """Merges settings from the config file, a run's checkpoint (`stored`) and the command line.
    Later sources override earlier ones, so a resumed run keeps its settings even if the file has
    changed. Prints the stored settings that the command line changes, except those that another
    function names later, and the settings in the file that have no effect."""
    for key, value in stored.items():
        if key in command_line:
            if command_line[key] != value and key not in named_later:
                info(f"{key} is now {command_line[key]!r} (was {value!r})")
        elif in_file.get(key, value) != value:
            info(f"{key} stays {value} (the config file has {in_file[key]})")
    return in_file | stored | command_line


# Packages that training and sampling do not need. Any other missing package is a bug.
OPTIONAL = ("gguf", "huggingface_hub", "matplotlib", "pyarrow", "safetensors", "tokenizers")
OPTIONAL += ("transformers",)
LESS_MEMORY = 'see "Out of memory" in docs/REFERENCE.md (train.py: --grad_accum, --recompute)'
COMPILER = ("torch._dynamo.exc", "torch._inductor.exc")  # whose errors torch.compile raises


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, torch on a CPU, NumPy or Python has run out of memory."""
    message = "out of memory|(can't|Cannot) allocate memory"
    by_torch = isinstance(error, RuntimeError) and re.search(message, str(error))
    by_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or bool(by_torch or by_system)


def place_of(error: BaseException) -> str:
    """The innermost line of this repository in an error's trace, as " at FILE:LINE, in FUNCTION";
    "" if there is none."""
    root, lines = str(Path(__file__).parent.parent), traceback.extract_tb(error.__traceback__)
    own = [x for x in lines if x.filename.startswith(root) and x.filename != __file__]
    own = [x for x in own if "site-packages" not in x.filename]  # a .venv may be in this folder
    return f" at {own[-1].filename}:{own[-1].lineno}, in {own[-1].name}" if own else ""


def sentence_of(error: Exception) -> str | None:
    """The sentence with which an error ends a command: a Refusal, or model.py's ConfigError; a
    system error that names a file (with the line of this repository that caused it); lack of
    memory, of disk space, of a compiler or of an optional package; a line that cannot be compiled.
    None for all others: they are bugs and keep their trace."""
    # By name: model.py may be a copy, and imports nothing from here.
    if isinstance(error, Refusal) or type(error).__name__ == "ConfigError":
        return str(error)
    if is_out_of_memory(error):
        details = f" ({short(error, 100)})" if str(error) else ""  # Python's own error has none
        return f"out of memory{place_of(error)}{details}: {LESS_MEMORY}"
    if isinstance(error, OSError):
        named = error.errno is not None and error.filename is not None
        return f"{error}{place_of(error)}" if named or error.errno == errno.ENOSPC else None
    kind = type(error)
    if kind.__module__ in COMPILER and kind.__name__ != "TorchRuntimeError":  # that one is a bug
        stack = getattr(error, "real_stack", None)
        at = f" at {stack[-1].filename}:{stack[-1].lineno}, in {stack[-1].name}" if stack else ""
        return f"the network cannot be compiled{at} ({short(error)}): give --compile=False"
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
        return f"{error}: pip install {error.name}"
    return None


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a script's main. For an error with a sentence (see sentence_of), prints the sentence and
    exits with code 1. Every process prints its own error, since it may be the only one."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        info("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if (message := sentence_of(error)) is None:
            raise
        rank = os.environ.get("RANK", "0")
        who = "error:" if rank == "0" else f"error in process {rank}:"
        print(who, " ".join(message.split()), file=sys.stderr)
        sys.exit(1)
