"""Checkpoints: the layout of the released models, both ways, their tokenizers, and our own runs.

python huggingface.py out/small DIR [--quantize=True]
"""

import base64
import importlib
import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
from torch import Tensor

import fp8
from config import info
from model import DeepSeekV3, ModelConfig
from prepare_data import END_OF_TEXT, encoding_from, load_tokenizer

# How Moonlight and Kimi split text (&& is intersection): their release has it in code, not in data.
_PRE, _END = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_U = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_L = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KIMI_PATTERN = rf"[\p{{Han}}]+|{_PRE}{_U}*{_L}+{_END}|{_PRE}{_U}+{_L}*{_END}|{_REST}"
# GPT-2's printable stand-in for each byte in tokenizer.json: itself if it can be seen, else 256 on.
_SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _SEEN]
BYTE_CHARS = [(b, chr(b)) for b in _SEEN] + [(b, chr(256 + i)) for i, b in enumerate(_HIDDEN)]
# What config.json says besides the fields of ModelConfig; there is one way to compute it.
FIXED_KEYS = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
FP8_KEYS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def config_from_json(config: dict[str, Any]) -> ModelConfig:
    """From a Hugging Face config.json, in the style of transformers 4 or 5.

    Keys without effect on the network are ignored. Raises ValueError for another architecture
    and for a key whose value would change the logits in a way that is not implemented.
    """
    names = config.get("architectures") or [config.get("model_type")]
    if not {"DeepseekV3ForCausalLM", "deepseek_v3", "kimi_k2"} & set(names):
        raise ValueError(
            f"config.json describes {names[0]!r}, but only the DeepSeek-V3 architecture "
            "(DeepseekV3ForCausalLM: V3, R1, Moonlight, Kimi-K2) can be opened."
        )
    # transformers 5 gathers rope_theta and rope_scaling in one dictionary.
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    partial = config.get("partial_rotary_factor") or 1
    rotary = {"partial_rotary_factor": rope.pop("partial_rotary_factor", partial)}
    for section, fixed in (
        (config, FIXED_KEYS),
        (rotary, {"partial_rotary_factor": 1}),
        (config.get("quantization_config") or {}, FP8_KEYS),
    ):
        for key, value in fixed.items():
            if (given := section.get(key, value)) != value:
                raise ValueError(f"config.json has {key} {given!r}, but must have {value!r}.")
    # Where config.json is silent, transformers' defaults hold; these differ from ours.
    config = {"max_position_embeddings": 4096, "initializer_range": 0.02} | config
    config["rope_theta"] = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    kind, _, _ = (
        rope.get("rope_type") or rope.get("type") or "default",
        rope.pop("type", None),
        rope.pop("rope_type", None),
    )
    config["rope_scaling"] = {"type": kind, **rope} if rope or kind != "default" else None
    for key in ("n_shared_experts", "num_nextn_predict_layers"):
        config[key] = config.get(key, getattr(ModelConfig, key)) or 0
    known = {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{key: value for key, value in config.items() if key in known})


# -- the Hugging Face layout


def checkpoint_views(model: DeepSeekV3) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint: its name in the released layout, and a view of our memory
    to read it from or write it to."""
    for name, x in model.state_dict().items():
        if name.startswith("mtp."):  # module k is stored as layer L + k
            _, k, name = name.split(".", 2)
            name = name.removeprefix("block.")
            name = "shared_head.norm.weight" if name == "norm.weight" else name
            name = f"model.layers.{model.config.num_hidden_layers + int(k)}.{name}"
        elif name != "lm_head.weight":
            name = f"model.{name}"
        elif model.config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for e, pair in enumerate(x):
                for part, y in zip(("gate_proj", "up_proj"), pair.chunk(2), strict=True):
                    yield f"{stem}{e}.{part}.weight", y
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            yield from ((f"{stem}{e}.down_proj.weight", y) for e, y in enumerate(x))
        else:
            yield name, x


def checkpoint_copies(model: DeepSeekV3) -> dict[str, str]:
    """What released checkpoints store again with every MTP layer, and what it repeats."""
    embed, copies = "model.embed_tokens.weight", {}
    head = embed if model.config.tie_word_embeddings else "lm_head.weight"
    for k in range(model.config.num_nextn_predict_layers):
        layer = f"model.layers.{model.config.num_hidden_layers + k}"
        copies[f"{layer}.embed_tokens.weight"] = embed
        copies[f"{layer}.shared_head.head.weight"] = head
    return copies


@torch.no_grad()
def from_pretrained(
    directory: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> DeepSeekV3:
    """Opens a checkpoint of the DeepSeek-V3 family: config.json and safetensors, one file or
    shards, in bf16, fp16, fp32 or FP8 with a scale for each 128x128 block.

    dtype None is the one config.json names (bf16 for FP8 weights). MTP modules are there if
    their tensors are. Besides the model, one file is mapped and one tensor decoded at a time.
    Raises ValueError or FileNotFoundError naming the file, key or tensor that is wrong.
    """
    directory = Path(directory)
    raw = read_json(directory / "config.json")
    config, stored = config_from_json(raw), stored_tensors(directory)
    L, depth = config.num_hidden_layers, 0
    while f"model.layers.{L + depth}.eh_proj.weight" in stored:
        depth += 1
    config.num_nextn_predict_layers = depth
    if dtype is None:
        name = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
        dtype = getattr(torch, "bfloat16" if raw.get("quantization_config") else name, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(
            f"{directory} cannot be opened as {dtype or name}: give bfloat16, float16, float32 "
            "or float64 as dtype."
        )
    with torch.device("meta"):
        model = DeepSeekV3(config).to(dtype)
    scales = {f"{x}_scale_inv": x for x in stored if stored[x].dtype == "F8_E4M3"}
    copies = checkpoint_copies(model)
    shapes = {name: list(x.shape) for name, x in checkpoint_views(model)}
    shapes |= {scale: [-(-n // 128) for n in stored[x].shape] for scale, x in scales.items()}
    optional = {copy: shapes[name] for copy, name in copies.items()}
    if config.tie_word_embeddings:
        optional["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        copies["lm_head.weight"] = "model.embed_tokens.weight"
    check_tensors(directory, stored, shapes, optional)

    model.materialize(device)
    views = dict(checkpoint_views(model))

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors file by file, each file open only as long as it is read."""
        names = sorted(names, key=lambda name: stored[name].file)
        for file, part in itertools.groupby(names, lambda name: stored[name].file):
            with open_safetensors(file, device) as tensors:
                yield from ((name, tensors.get_tensor(name)) for name in part)

    scale = {name: x.to(torch.float32, copy=True) for name, x in read(scales)}  # 1/4096 of all
    for name, x in read(views):
        if x.dtype == torch.float8_e4m3fn:
            x = fp8.dequantize(x, scale.pop(f"{name}_scale_inv"), fp8.BLOCK)
        views[name].copy_(x)
    for name, x in read(copies.keys() & stored.keys()):
        if not torch.equal(x.to(dtype), views[copies[name]]):
            raise ValueError(
                f"{name} in {directory} differs from {copies[name]}, but a DeepSeek-V3 has "
                "one embedding and one head for all: this is another architecture."
            )
    return model.eval()


@torch.no_grad()
def save_pretrained(
    model: DeepSeekV3,
    directory: str | Path,
    *,
    quantize: bool = False,
    shard_bytes: int = 5_000_000_000,
    files: dict[str, str] | None = None,
    **extra: Any,
):
    """Writes the checkpoint in the layout of the released ones, for transformers and others.

    quantize: FP8 weights with 128x128 block scales, as released. shard_bytes: the most tensor
    data in one file. files: further text files by name (a tokenizer's). extra: further keys of
    config.json. The directory appears whole or not at all, and replaces an earlier checkpoint.
    """
    save_file = import_safetensors("torch").save_file
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **asdict(model.config),
        **FIXED_KEYS,
        "num_key_value_heads": model.config.num_attention_heads,
        "bos_token_id": None,  # unless given in extra: readers would stop at token 1
        "eos_token_id": None,
        "torch_dtype": str(model.norm.weight.dtype).removeprefix("torch."),
    }
    if quantize:
        config["quantization_config"] = FP8_KEYS | {"activation_scheme": "dynamic"}
    texts = {**(files or {}), "config.json": json.dumps(config | extra, indent=2)}

    with replacing(Path(directory)) as part:
        total, shards = 0, []  # the names in each file
        for shard in shards(model, quantize, shard_bytes):
            save_file(shard, part / f"shard-{len(shards)}", metadata={"format": "pt"})
            total += sum(x.nbytes for x in shard.values())
            shards.append(list(shard))
        weight_map = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            file = file if len(shards) > 1 else "model.safetensors"
            os.replace(part / f"shard-{i}", part / file)
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            texts["model.safetensors.index.json"] = json.dumps(index, indent=2)
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")


def shards(model: DeepSeekV3, quantize: bool, shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file, on the CPU, each in memory of its own."""
    views = dict(checkpoint_views(model))
    views |= {copy: views[name] for copy, name in checkpoint_copies(model).items()}
    shard, size = {}, 0
    for name, x in views.items():
        if quantize and FP8_WEIGHTS.search(name):
            q, scale = fp8.quantize(x.cpu(), fp8.BLOCK)
            tensors = {name: q, f"{name}_scale_inv": scale}
        else:
            tensors = {name: x.cpu().clone(memory_format=torch.contiguous_format)}
        for key, y in tensors.items():
            if shard and size + y.nbytes > shard_bytes:
                yield shard
                shard, size = {}, 0
            shard[key] = y
            size += y.nbytes
    yield shard


# What the release stores in FP8: the projections of attention and FFN, not gate, norms or eh_proj.
FP8_WEIGHTS = re.compile(r"(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")


class Stored(NamedTuple):
    """Where a tensor of a checkpoint lies, and what its header says of it."""

    file: Path
    dtype: str
    shape: list[int]


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """By name, the tensors of model.safetensors or of the shards that the index names."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    promised = {}
    if not single.exists():
        if not index.exists():
            raise FileNotFoundError(f"{directory} has neither {single.name} nor {index.name}.")
        promised = read_json(index).get("weight_map")
        if not promised:
            raise ValueError(f"{index} has no 'weight_map', the file of each tensor.")
    stored = {}
    for file in sorted(set(promised.values())) or [single.name]:
        with open_safetensors(directory / file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                if promised.get(name, file) == file:
                    x = tensors.get_slice(name)
                    stored[name] = Stored(directory / file, x.get_dtype(), x.get_shape())
    if absent := sorted(promised.keys() - stored.keys()):
        name, more = absent[0], len(absent) - 1
        raise ValueError(
            f"{index} promises {name} (and {more} more) in {promised[name]}, but it is not there: "
            "fetch both again."
        )
    return stored


def check_tensors(
    directory: Path, stored: dict[str, Stored], shapes: dict[str, list[int]], optional: dict
):
    """Refuses a checkpoint that lacks one of `shapes`, or has more than them and `optional`."""
    known = shapes | optional
    surplus = [x for x in stored if x not in known and not x.endswith("rotary_emb.inv_freq")]
    for what, names in (("lacks the", shapes.keys() - stored.keys()), ("has the unknown", surplus)):
        if names:
            raise ValueError(
                f"{directory} {what} tensor {min(names)} (and {len(names) - 1} more): config.json "
                "and the weights do not belong together."
            )
    for name in stored.keys() & known.keys():
        _, dtype, shape = stored[name]
        if shape != known[name]:
            raise ValueError(
                f"{name} in {directory} has shape {shape}, but must have {known[name]} by "
                "config.json: they do not belong together."
            )
        readable = {"BF16", "F16", "F32", "F64"}
        readable |= {"F8_E8M0"} if name.endswith("_scale_inv") else {"F8_E4M3"}
        if dtype not in readable:
            raise ValueError(
                f"{name} in {directory} is {dtype}, but must be one of {sorted(readable)}."
            )


def import_safetensors(module: str = ""):
    try:
        return importlib.import_module(f"safetensors.{module}" if module else "safetensors")
    except ImportError:
        raise ValueError(
            "the Hugging Face layout needs the package safetensors: pip install safetensors"
        ) from None


def open_safetensors(file: Path, device: str = "cpu"):
    safetensors = import_safetensors()
    try:
        return safetensors.safe_open(file, framework="pt", device=str(device))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing, but the index names it: fetch it.") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or not safetensors ({error}): fetch it.") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: a checkpoint directory has one.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, but must hold an object.")
    return value


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new folder that takes the place of `directory` when the block succeeds, else vanishes."""
    directory = directory.absolute()
    kinds = (".json", ".safetensors", ".tiktoken", ".model", ".jinja")
    for path in directory.iterdir() if directory.exists() else ():
        if path.is_dir() or path.suffix not in kinds:
            raise ValueError(
                f"{path} is no part of a checkpoint and would be deleted with {directory}: choose "
                "another directory."
            )
    part, old = (directory.with_name(f".{directory.name}.{end}") for end in ("new", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(directory, old)
        os.replace(part, directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def hf_encoding(folder: Path) -> tiktoken.Encoding:
    """The tokenizer of a Hugging Face directory, so that text can be prepared for its model.

    Read are tiktoken.model (Moonlight, Kimi) and a tokenizer.json that is byte-level BPE with one
    splitting expression (what sample.py --export writes). Raises ValueError for others, such as
    DeepSeek-V3's, whose three splitting stages no single expression repeats exactly.
    """

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    eos = (read("config.json") | read("generation_config.json")).get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    if (folder / "tiktoken.model").is_file():
        lines = [line.split() for line in (folder / "tiktoken.model").read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        added = read("tokenizer_config.json").get("added_tokens_decoder", {})
        special = {token["content"]: int(i) for i, token in added.items()}
        pattern = KIMI_PATTERN
    else:
        tokenizer = read("tokenizer.json")
        stages = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers", [])
        patterns = [stage["pattern"].get("Regex") for stage in stages if stage["type"] == "Split"]
        if len(patterns) != 1 or tokenizer["model"].get("type") != "BPE":
            raise ValueError(
                f"the tokenizer in {folder} cannot be used to prepare text: expected a prepared "
                f"folder, tiktoken.model, or a tokenizer.json with one splitting expression"
            )
        byte_of, pattern = {char: byte for byte, char in BYTE_CHARS}, patterns[0]
        special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        vocab = tokenizer["model"]["vocab"].items()
        ranks = {bytes(byte_of[c] for c in t): i for t, i in vocab if t not in special}
    if eos not in special.values():
        raise ValueError(f"{folder} names no end-of-text token that its tokenizer has ({eos})")
    # Ours is called END_OF_TEXT; the name of a special token matters to no text.
    special = {END_OF_TEXT if i == eos else text: i for text, i in special.items()}
    return encoding_from(ranks, pattern, special)


# ---- Loading -------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, map_location: str = "cpu") -> dict[str, Any]:
    """What train.py saved in a file, or in a run's folder (best.pt, else ckpt.pt).

    Tensors stay on the disk until they are used; nothing in the file can run code. Raises
    FileNotFoundError or ValueError.
    """
    file = Path(path)
    if file.is_dir():
        file = next((f for f in (file / "best.pt", file / "ckpt.pt") if f.exists()), file)
    if not file.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}: expected a run's folder with best.pt or ckpt.pt, such a "
            f"file, or a Hugging Face directory; python train.py config/small.py makes a run"
        )
    try:
        saved = torch.load(file, map_location, weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} holds other things than tensors and numbers, which could run code, so it was "
            f"not opened; expected a checkpoint of train.py"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file} is truncated or no checkpoint ({str(error).splitlines()[0]}); "
            f"copy it again or use another one"
        ) from None
    if not isinstance(saved, dict) or saved.get("format") != "nanov3":
        keys = ", ".join(map(str, list(saved)[:4])) if isinstance(saved, dict) else type(saved)
        raise ValueError(f"{file} is no checkpoint of train.py (it holds {keys}).")
    unknown = saved["model_config"].keys() - {f.name for f in fields(ModelConfig)}
    if unknown:
        raise ValueError(
            f"{file} has the unknown model setting {min(unknown)!r}: another version wrote it."
        )
    return saved


@dataclass
class Tokenizer:
    """All that sampling needs: text -> ids, one id -> bytes, and the ids that end a text."""

    encode: Callable[[str], list[int]]
    to_bytes: Callable[[int], bytes]
    eos: list[int]
    encoding: tiktoken.Encoding | None = None  # where it is one

    @classmethod
    def of(cls, encoding: tiktoken.Encoding, eos: list[int]) -> "Tokenizer":
        def to_bytes(token: int) -> bytes:
            try:
                return encoding.decode_single_token_bytes(token)
            except KeyError:  # a vocabulary padded to a round number has ids without text
                return b""

        return cls(encoding.encode_ordinary, to_bytes, eos, encoding)


def hf_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory: tokenizer.json or, as Kimi's, tiktoken.model."""

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    eos = (read("config.json") | read("generation_config.json")).get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if (folder / "tokenizer.json").exists():
        try:
            import tokenizers
        except ImportError:
            info(f"{folder}/tokenizer.json needs a package: pip install tokenizers")
            return None
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        special, byte_of = tokenizer.get_added_tokens_decoder(), {c: b for b, c in BYTE_CHARS}

        def to_bytes(token: int) -> bytes:
            text = tokenizer.id_to_token(token) or ""
            return text.encode() if token in special else bytes(byte_of[c] for c in text)

        config = read("tokenizer_config.json")
        bos = config.get("bos_token") if config.get("add_bos_token") else None
        bos = tokenizer.token_to_id(bos["content"] if isinstance(bos, dict) else bos or "")
        first = [] if bos is None else [bos]  # DeepSeek-V3's texts begin with one

        def encode(text: str) -> list[int]:
            return first + tokenizer.encode(text, add_special_tokens=False).ids

        return Tokenizer(encode, to_bytes, eos)
    if (folder / "tiktoken.model").exists():
        return Tokenizer.of(hf_encoding(folder), eos)
    return None


def load_model(
    ckpt: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[DeepSeekV3, Tokenizer | None, Path]:
    """The model of a run, file or Hugging Face directory, its tokenizer, and where they lie.

    dtype None is the stored one. The tokenizer is None if the directory has none that can be read.
    Raises FileNotFoundError or ValueError.
    """
    path = Path(ckpt)
    if (path / "config.json").exists():
        return DeepSeekV3.from_pretrained(path, dtype, str(device)), hf_tokenizer(path), path
    saved = load_checkpoint(path)
    folder = path if path.is_dir() else path.parent
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig(**saved["model_config"]))
    stored = next(iter(saved["model"].values())).dtype
    model = model.to(dtype or stored).materialize(device)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{ckpt}: weights and configuration do not match ({reason}).") from None
    encoding = load_tokenizer(folder)
    return model.eval(), Tokenizer.of(encoding, [encoding.eot_token]), path


# ---- A Hugging Face directory --------------------------------------------------------------------


def tokenizer_json(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """The tokenizer in the format of Hugging Face's tokenizers, giving the same ids.

    tiktoken joins any two neighbours whose concatenation has a rank, lowest rank first; there each
    pair is listed by itself. So every way to split a token in two becomes a merge, in rank order.
    """
    char, ranks = dict(BYTE_CHARS), encoding._mergeable_ranks
    text = {token: "".join(char[b] for b in token) for token in ranks}
    merges = [
        [text[token[:i]], text[token[i:]]]
        for token in sorted(ranks, key=ranks.get)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    special = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern={"Regex": encoding._pat_str}, behavior="Isolated")
    model = dict(type="BPE", merges=merges, ignore_merges=True)  # a word that is a token stays one
    model["vocab"] = {text[token]: ranks[token] for token in sorted(ranks, key=ranks.get)}
    steps = [split | {"invert": False}, byte_level]
    return {
        "version": "1.0",
        "added_tokens": [dict(id=i, content=text, special=True, **flags) for text, i in special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    }


def export(
    model: DeepSeekV3, tokenizer: Tokenizer | None, source: Path, target: str, quantize: bool
):
    """Writes what transformers' AutoModelForCausalLM and AutoTokenizer open."""
    names = ("tokenizer.json", "tokenizer_config.json", "tiktoken.model", "generation_config.json")
    texts = {n: (source / n).read_text("utf-8") for n in names if (source / n).is_file()}
    eos = tokenizer.eos[0] if tokenizer and tokenizer.eos else None
    ids = {"bos_token_id": eos, "eos_token_id": eos}
    if tokenizer and tokenizer.encoding and not texts:  # trained here
        special = {i: text for text, i in tokenizer.encoding._special_tokens.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special.get(eos),
            "eos_token": special.get(eos),
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.config.max_position_embeddings,
        }
        texts = {
            "tokenizer.json": json.dumps(tokenizer_json(tokenizer.encoding), ensure_ascii=False),
            "tokenizer_config.json": json.dumps(config, indent=2),
            "generation_config.json": json.dumps(ids, indent=2),
        }
    model.save_pretrained(target, quantize=quantize, files=texts, **ids)
    info(f"wrote {target}: {', '.join(sorted(f.name for f in Path(target).iterdir()))}")


# ---- The command ----


@dataclass
class ConvertConfig:
    ckpt: str = ""  # a run's folder, a checkpoint file, or a Hugging Face directory
    out: str = ""  # the directory to write
    quantize: bool = False  # FP8 weights with 128x128 block scales, as released
