"""Opens the weights of a run, or of a directory in Hugging Face's layout (huggingface.py)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model import DeepSeekV3, ModelConfig
from support.checkpoints import checkpoint_file, load_checkpoint, note_edit
from support.settings import Refusal, and_more, info, short
from support.tokenizer import Tokenizer, stored_tokenizer

DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)  # as constructors call them


class Undrawn(TorchFunctionMode):
    """Within it parameters get no random initial values, which stored weights would replace."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in DRAWS and isinstance(kwargs["tensor"], nn.Parameter):
            return kwargs["tensor"]
        return function(*args, **kwargs)


def compare(
    stored: dict[str, Tensor], needed: dict[str, Tensor], source: Path, message: str, extend: bool
):
    """Raises Refusal, beginning with `message`, if a stored weight has the wrong shape, is missing
    or is not needed. With extend, missing weights and those not needed are only reported."""
    for name in sorted(needed.keys() | stored.keys()):
        have = tuple(stored[name].shape) if name in stored else "missing"
        want = tuple(needed[name].shape) if name in needed else "no part of this network"
        if have != want and not (extend and (name not in stored or name not in needed)):
            raise Refusal(f"{message}: {name} is {have} in the file, but {want} by the settings")
    if new := sorted(needed.keys() - stored.keys()):
        info(f"{source} lacks {and_more(new)}: missing weights of this network are initialised")
    if old := sorted(stored.keys() - needed.keys()):
        info(f"{source} has {and_more(old)}: this network does not use these weights")


def read_run(path: Path) -> tuple[ModelConfig, dict[str, Tensor], int, Tokenizer]:
    """The settings, weights, trained length and tokenizer of a run or a checkpoint file. Raises
    Refusal."""
    saved, known = load_checkpoint(path), ModelConfig.__dataclass_fields__
    if unknown := sorted(saved["model_config"].keys() - known.keys()):
        raise Refusal(
            f"{path} has {and_more(unknown)}, unknown to this model.py: use the model.py that "
            "trained it."
        )
    try:
        config, weights = ModelConfig(**saved["model_config"]), saved["model"]
    except (TypeError, KeyError, ValueError) as error:
        raise Refusal(f"{path}: weights and settings do not match: {short(error)}") from None
    meaning = "if a formula has changed, the weights compute something else"
    note_edit("model.py", saved, checkpoint_file(path), meaning)
    tokenizer = stored_tokenizer(path if path.is_dir() else path.parent)
    if tokenizer.n_vocab > config.vocab_size:
        raise Refusal(
            f"{path} has weights for {config.vocab_size} tokens, but its tokenizer has "
            f"{tokenizer.n_vocab}: copy the tokenizer of the weights' run."
        )
    length = saved.get("trained_length", config.max_position_embeddings)
    return config, weights, length, tokenizer


def load_model(
    ckpt: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    extend: bool = False,
    settings: dict[str, Any] | None = None,
) -> tuple[DeepSeekV3, Tokenizer | None]:
    """The model of a run, file or Hugging Face directory, and its tokenizer.

    dtype None: the stored dtype. The tokenizer is None if a Hugging Face directory has none.
    settings: values of ModelConfig that replace the stored ones; messages name those that change.
    extend: the weights may lack parameters of the model, which are then initialised, or have some
    that it lacks, because model.py or the settings have changed; messages name them. Raises
    ValueError, of which Refusal is one.
    """
    path, settings = Path(ckpt), settings or {}
    if (path / "config.json").exists():
        from huggingface import from_pretrained
        from support.release_tokenizer import hf_tokenizer

        model, tokenizer = from_pretrained(path, dtype, str(device)), hf_tokenizer(path)
        stored, weights, length = model.config, model.state_dict(), model.trained_length
        if replace(stored, **settings) == stored:
            return model, tokenizer
    else:
        stored, weights, length, tokenizer = read_run(path)
    config, message = replace(stored, **settings), f"{path}: weights and settings do not match"
    now, before = vars(config), vars(stored)
    if changed := [key for key in now if now[key] != before[key]]:
        message = f"{path} cannot get {and_more([f'{key} {now[key]}' for key in changed])}"
    for key in changed:
        info(f"{key} is now {now[key]} (was {before[key]} in {path})")
    with Undrawn():
        model = DeepSeekV3(config)
    compare(weights, model.state_dict(), path, message, extend)
    if not model.state_dict().keys() <= weights.keys():
        model = DeepSeekV3(config)  # what the weights lack gets initial values
    model = model.to(device, dtype or weights["embed_tokens.weight"].dtype)
    model.load_state_dict(weights, strict=False)
    model.trained_length = length
    return model.eval(), tokenizer
