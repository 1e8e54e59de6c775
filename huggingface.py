"""Files: the layout of the released models, both ways, its tokenizers, and our own runs.

    python huggingface.py SRC DST [--quantize=True] [--check=True]

SRC is a run's folder, a checkpoint file or a Hugging Face directory; DST, the directory written,
opens in transformers and here. Its weights are safetensors, one file or shards, each tensor under
its released name. In FP8 the decoding factors of W's 128x128 blocks are stored as W_scale_inv.
Optional packages are imported where they are needed: safetensors, tokenizers, transformers.
"""

import base64
import json
import os
import pickle
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

import fp8
from config import info, parse_args, run_command
from model import DeepSeekV3, ModelConfig
from prepare_data import END_OF_TEXT, encoding_from, load_tokenizer

# What config.json says besides the fields of ModelConfig; there is one way to compute it.
FIXED_KEYS = {"hidden_act": "silu", "scoring_func": "sigmoid"}
FIXED_KEYS |= {"topk_method": "noaux_tc", "moe_layer_freq": 1}
FP8_KEYS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
# Stored in FP8 are the projections of attention and FFN, not gate, norms or eh_proj.
FP8_WEIGHTS = re.compile(r"(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
EMBED, HEAD, INDEX = "model.embed_tokens.weight", "lm_head.weight", "model.safetensors.index.json"
# The files that may lie in a Hugging Face directory besides config.json and weights.
TEXTS = r"(tokenizer|tokenizer_config|special_tokens_map|generation_config)\.json"
TEXTS += r"|tiktoken\.model|tokenization_\w+\.py|chat_template\.jinja"
OURS = rf"{TEXTS}|config\.json|model(-\d+-of-\d+)?\.safetensors|{re.escape(INDEX)}"
# How Moonlight and Kimi split text (&& is intersection): their release has it in code, not in data.
_PRE, _END = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_U = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_L = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KIMI_PATTERN = rf"[\p{{Han}}]+|{_PRE}{_U}*{_L}+{_END}|{_PRE}{_U}+{_L}*{_END}|{_REST}"
# GPT-2's printable stand-in for each byte in tokenizer.json: itself if it can be seen, else 256 on.
_SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _SEEN]
BYTE_CHARS = {b: chr(b) for b in _SEEN} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}


def quoted(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is missing or no JSON object ({quoted(error)}).") from None


# ---- Weights -------------------------------------------------------------------------------------


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
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json has rope_scaling {rope!r}, but must have an object.")
    stated = config | (config.get("quantization_config") or {}) | rope
    for key, value in (FIXED_KEYS | FP8_KEYS | {"partial_rotary_factor": 1}).items():
        if stated.get(key) not in (None, value):
            raise ValueError(f"config.json has {key} {stated[key]!r}, but must have {value!r}.")
    # Where config.json is silent, transformers' defaults hold; these differ from ours.
    config = {"max_position_embeddings": 4096, "initializer_range": 0.02} | config
    config["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    apart = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    rope = {key: x for key, x in rope.items() if key not in apart and x is not None}
    for key, value in rope.items():
        if not isinstance(value, int | float):
            raise ValueError(f"config.json has {key} {value!r} in rope_scaling: expected a number.")
    config["rope_scaling"] = {"type": kind, **rope} if rope or kind != "default" else None
    for key in ("n_shared_experts", "num_nextn_predict_layers"):
        config[key] = config.get(key, getattr(ModelConfig, key)) or 0
    known = {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{key: value for key, value in config.items() if key in known})


def checkpoint_views(model: DeepSeekV3) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint: released names, and views of our memory to read or write."""
    for name, x in model.state_dict().items():
        if name.startswith("mtp."):  # module k is stored as layer L + k
            _, k, name = name.split(".", 2)
            name = name.removeprefix("block.")
            name = "shared_head.norm.weight" if name == "norm.weight" else name
            name = f"model.layers.{model.config.num_hidden_layers + int(k)}.{name}"
        elif name != HEAD:
            name = f"model.{name}"
        elif model.config.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":  # (E, 2F, D), stored expert by expert
            for e, weight in enumerate(x):
                gate, up = weight.chunk(2)
                yield f"{stem}.{e}.gate_proj.weight", gate
                yield f"{stem}.{e}.up_proj.weight", up
        elif kind == "down_proj":  # (E, D, F)
            yield from ((f"{stem}.{e}.down_proj.weight", weight) for e, weight in enumerate(x))
        else:
            yield name, x


def checkpoint_copies(config: ModelConfig) -> dict[str, str]:
    """What released checkpoints store again with every MTP layer, and what it repeats."""
    copies, L = {}, config.num_hidden_layers
    for layer in range(L, L + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = EMBED
        head = EMBED if config.tie_word_embeddings else HEAD
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


def stored_tensors(directory: Path, device: str = "cpu") -> Iterator[tuple[str, Any]]:
    """The name of every tensor with the file to get it from; one file is mapped at a time."""
    import safetensors

    files = ["model.safetensors"]
    if not (directory / files[0]).exists():
        where = read_json(directory / INDEX).get("weight_map")
        files = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
        if not files or any(Path(file).name != file for file in files):
            raise ValueError(f"{directory / INDEX} needs a weight_map: plain file names by tensor.")
    for file in files:
        try:
            with safetensors.safe_open(directory / file, "pt", str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                    yield name, tensors
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{directory / file} is missing, truncated or not safetensors ({quoted(error)}): "
                "fetch it again."
            ) from None


@torch.no_grad()
def from_pretrained(
    directory: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> DeepSeekV3:
    """Opens a checkpoint of the DeepSeek-V3 family in bf16, fp16, fp32 or block-wise FP8.

    dtype None is the one config.json names (bf16 for FP8 weights). MTP modules are there if
    their tensors are. Besides the model, one file is mapped and one tensor decoded at a time.
    Raises ValueError naming the file, key or tensor that is wrong.
    """
    directory, why = Path(directory), "config.json and the weights do not belong together."
    raw = read_json(directory / "config.json")
    config, names, scales, filled = config_from_json(raw), set(), {}, set()
    for name, file in stored_tensors(directory):
        names.add(name)
        if name.endswith("_scale_inv"):  # a small part, perhaps in another file than its weight
            scales[name] = file.get_tensor(name).to(device, torch.float32, copy=True)
    config.num_nextn_predict_layers = sum(name.endswith(".eh_proj.weight") for name in names)
    stated = "bfloat16" if scales else raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    dtype = dtype or getattr(torch, stated, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"{directory} cannot be opened as {dtype or stated}: give another dtype.")
    with torch.device("meta"):
        model = DeepSeekV3(config).to(dtype)
    views, copies = dict(checkpoint_views(model.materialize(device))), checkpoint_copies(config)
    if config.tie_word_embeddings:
        copies[HEAD] = EMBED
    names -= copies.keys() | {f"{name}_scale_inv" for name in views}  # may be there or not
    if wrong := {x for x in views.keys() ^ names if not x.endswith("rotary_emb.inv_freq")}:
        state = "lacks the" if min(wrong) in views else "has the unknown"
        raise ValueError(f"{directory} {state} tensor {min(wrong)} (1 of {len(wrong)}): {why}")
    for name, file in stored_tensors(directory, device):
        original = copies.get(name, name)
        if original not in views:
            continue
        x, view, scale = file.get_tensor(name), views[original], scales.get(f"{name}_scale_inv")
        blocks = [-(-n // 128) for n in x.shape]
        good = x.is_floating_point() and x.dtype.itemsize > 1
        if scale is not None:
            good = x.dtype == torch.float8_e4m3fn and list(scale.shape) == blocks
        if x.shape != view.shape or not good:
            raise ValueError(
                f"{name} in {directory} is {x.dtype} of shape {list(x.shape)}, but must be floats "
                f"of shape {list(view.shape)}, or E4M3 with a scale of shape {blocks}: {why}"
            )
        if scale is not None:
            x = fp8.dequantize(x, scale, fp8.BLOCK)
        if original in filled and not torch.equal(x.to(view.dtype), view):
            raise ValueError(
                f"{name} in {directory} differs from {original}, but a DeepSeek-V3 has one "
                "embedding and one head for all: this is another architecture."
            )
        view.copy_(x)
        filled.add(original)
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
    data in one file, scales aside. files: further text files by name (a tokenizer's). extra:
    further keys of config.json. The directory appears whole or not at all, and replaces an
    earlier checkpoint.
    """
    from safetensors.torch import save_file

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
    views = dict(checkpoint_views(model))
    views |= {copy: views[name] for copy, name in checkpoint_copies(model.config).items()}
    in_fp8 = {name for name in views if quantize and FP8_WEIGHTS.search(name)}
    shards, size = [[]], 0  # the names in each file
    for name, x in views.items():
        size += (nbytes := x.numel() if name in in_fp8 else x.nbytes)
        if shards[-1] and size > shard_bytes:
            shards.append([])
            size = nbytes
        shards[-1].append(name)

    with replacing(Path(directory)) as part:
        weight_map, total = {}, 0
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            file = file if len(shards) > 1 else "model.safetensors"
            tensors = {}  # on the CPU, each in memory of its own
            for name in names:
                tensors[name] = views[name].cpu().clone(memory_format=torch.contiguous_format)
                if name in in_fp8:
                    q, scale = fp8.quantize(tensors[name], fp8.BLOCK)
                    tensors |= {name: q, f"{name}_scale_inv": scale}
            save_file(tensors, part / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(x.nbytes for x in tensors.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            texts[INDEX] = json.dumps(index, indent=2)
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new folder that takes the place of `directory` when the block succeeds, else vanishes."""
    directory = directory.absolute()
    for path in directory.iterdir() if directory.exists() else ():
        if not re.fullmatch(OURS, path.name):
            raise ValueError(f"{path} would be deleted with {directory}: choose another directory.")
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


# ---- Tokenizers ----------------------------------------------------------------------------------


@dataclass
class Tokenizer:
    """Text to ids, one id to bytes, and the ids that end a text."""

    encode: Callable[[str], list[int]]  # the ids begin with bos, if there is one
    to_bytes: Callable[[int], bytes]  # nothing for ids without text: a vocabulary may be padded
    eos: list[int]
    encoding: tiktoken.Encoding | None = None  # where it is one: eos[0] is its END_OF_TEXT
    bos: int | None = None


def texts_by_id(ranks: dict[bytes, int], special: dict[str, int]) -> defaultdict[int, bytes]:
    texts = {i: token for token, i in ranks.items()}
    return defaultdict(bytes, texts | {i: name.encode() for name, i in special.items()})


def hf_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory: tokenizer.json or, as Kimi's, tiktoken.model.

    It is a tiktoken.Encoding too where one expression splits the text. DeepSeek-V3's has three
    stages, which no single expression repeats exactly. Raises ValueError.
    """

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    settings = read("tokenizer_config.json")
    eos = (read("config.json") | read("generation_config.json")).get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    path, parsed, pattern = folder / "tokenizer.json", None, KIMI_PATTERN
    path = path if path.exists() else folder / "tiktoken.model"
    if not path.exists():
        return None
    if path.suffix == ".json":
        import tokenizers
    try:
        if path.suffix == ".json":
            parsed = tokenizers.Tokenizer.from_file(str(path))
            special = {x.content: i for i, x in parsed.get_added_tokens_decoder().items()}
            byte_of = {char: byte for byte, char in BYTE_CHARS.items()}
            vocab = parsed.get_vocab(with_added_tokens=False).items()
            ranks = {bytes(byte_of[c] for c in t): i for t, i in vocab if t not in special}
            spec = read("tokenizer.json")
            stages = (spec["pre_tokenizer"] or {}).get("pretokenizers", [])
            single = [stage["type"] for stage in stages] == ["Split", "ByteLevel"]
            single = single and not spec["normalizer"]
            pattern = stages[0]["pattern"].get("Regex") if single else None
        else:
            lines = [line.split() for line in path.read_bytes().splitlines()]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            added = settings.get("added_tokens_decoder", {})
            special = {token["content"]: int(i) for i, token in added.items()}
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{path} is no byte-level tokenizer ({quoted(error)}).") from None
    # Ours is called END_OF_TEXT; the name of a special token matters to no text.
    names = {END_OF_TEXT if i in eos[:1] else name: i for name, i in special.items()}
    encoding = encoding_from(ranks, pattern, names) if pattern else None
    bos = settings.get("bos_token") if settings.get("add_bos_token") else None
    bos = special.get(bos["content"] if isinstance(bos, dict) else bos)

    def encode(text: str) -> list[int]:
        begin = [] if bos is None else [bos]
        if parsed:
            return begin + parsed.encode(text, add_special_tokens=False).ids
        return begin + encoding.encode_ordinary(text)

    to_bytes = texts_by_id(ranks, special).__getitem__
    return Tokenizer(encode, to_bytes, eos, encoding if END_OF_TEXT in names else None, bos)


def tokenizer_json(encoding: tiktoken.Encoding) -> str:
    """The tokenizer in the format of Hugging Face's tokenizers, giving the same ids.

    tiktoken joins any two neighbours whose concatenation has a rank, lowest rank first; there each
    pair is listed by itself. So every way to split a token in two becomes a merge, in rank order.
    """
    import tokenizers

    ranks = encoding._mergeable_ranks
    text = {token: "".join(BYTE_CHARS[b] for b in token) for token in sorted(ranks, key=ranks.get)}
    merges = [
        (text[token[:i]], text[token[i:]])
        for token in text
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    vocab = {text[token]: ranks[token] for token in text} | encoding._special_tokens
    model = tokenizers.models.BPE(vocab, merges, ignore_merges=True)  # a word may be a token
    steps, made = tokenizers.pre_tokenizers, tokenizers.Tokenizer(model)
    split = steps.Split(tokenizers.Regex(encoding._pat_str), "isolated")
    to_chars = steps.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = steps.Sequence([split, to_chars])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(encoding._special_tokens))
    return made.to_str()


# ---- Runs ----------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, map_location: str = "cpu") -> dict[str, Any]:
    """What train.py saved in a file, or in a run's folder (best.pt, else ckpt.pt).

    Tensors stay on the disk until they are used; nothing in the file can run code. Raises
    FileNotFoundError or ValueError.
    """
    file = Path(path)
    if file.is_dir():
        file /= "best.pt" if (file / "best.pt").exists() else "ckpt.pt"
    if not file.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}: expected a run's folder with best.pt or ckpt.pt, such a "
            "file, or a Hugging Face directory; python train.py config/small.py makes a run"
        )
    try:
        saved = torch.load(file, map_location, weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError):
        raise ValueError(
            f"{file} is truncated, no checkpoint of train.py, or holds more than tensors and "
            "numbers, which could run code; copy it again or use another one"
        ) from None
    saved = saved if isinstance(saved, dict) else {"": saved}
    config, known = saved.get("model_config"), {field.name for field in fields(ModelConfig)}
    if not (isinstance(config, dict) and isinstance(saved.get("model"), dict)):
        keys = ", ".join(map(str, list(saved)[:4]))
        raise ValueError(f"{file} is no checkpoint of train.py (it holds {keys}).")
    if unknown := config.keys() - known:
        raise ValueError(f"{file} has the setting {min(unknown)!r} of another version.")
    return saved


def load_model(
    ckpt: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[DeepSeekV3, Tokenizer | None, Path]:
    """The model of a run, file or Hugging Face directory, its tokenizer, and where they lie.

    dtype None is the stored one. The tokenizer is None if a Hugging Face directory has none.
    Raises FileNotFoundError or ValueError.
    """
    path = Path(ckpt)
    if (path / "config.json").exists():
        return from_pretrained(path, dtype, str(device)), hf_tokenizer(path), path
    saved = load_checkpoint(path)
    with torch.device("meta"):
        model = DeepSeekV3(ModelConfig(**saved["model_config"]))
    try:
        stored = saved["model"]["norm.weight"].dtype
        model.to(dtype or stored).materialize(device).load_state_dict(saved["model"])
    except (RuntimeError, KeyError, AttributeError) as error:
        why = f"weights and configuration do not match ({quoted(error)})."
        raise ValueError(f"{ckpt}: {why}") from None
    model.trained_length = saved.get("trained_length", model.trained_length)
    encoding = load_tokenizer(path if path.is_dir() else path.parent)
    to_bytes = texts_by_id(encoding._mergeable_ranks, encoding._special_tokens).__getitem__
    tokenizer = Tokenizer(encoding.encode_ordinary, to_bytes, [encoding.eot_token], encoding)
    return model.eval(), tokenizer, path


# ---- The command ---------------------------------------------------------------------------------


@dataclass
class ConvertConfig:
    quantize: bool = False  # FP8 weights with 128x128 block scales, as released
    check: bool = False  # compare logits with those of transformers (not where weights are FP8)


def convert(source: Path, target: Path, quantize: bool):
    """Writes what transformers' AutoModelForCausalLM and AutoTokenizer open."""
    if (source / "config.json").exists():  # its texts and ids are kept
        model, raw = from_pretrained(source), read_json(source / "config.json")
        ids = {k: raw.get(k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        kept = [file for file in source.iterdir() if re.fullmatch(TEXTS, file.name)]
        texts = {file.name: file.read_text(encoding="utf-8") for file in kept}
    else:
        model, tokenizer, _ = load_model(source)
        names = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
        ids = {f"{name}_id": tokenizer.eos[0] for name in names}
        settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names, indent=2)
        texts = {"tokenizer_config.json": settings}
        texts["tokenizer.json"] = tokenizer_json(tokenizer.encoding)
    save_pretrained(model, target, quantize=quantize, files=texts, **ids)
    info(f"wrote {target}: {', '.join(sorted(file.name for file in target.iterdir()))}")


@torch.no_grad()
def check(directory: Path):
    """Compares logits with those of transformers, in float32. Raises ValueError."""
    import transformers

    transformers.logging.set_verbosity_error()  # it would list the MTP modules, which it ignores
    ours = from_pretrained(directory, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    )
    tokens = torch.arange(32)[None] * 7919 % ours.config.vocab_size
    expected = theirs(tokens).logits
    error = ((ours(tokens) - expected).abs().max() / expected.abs().max()).item()
    text = f"logits differ from those of transformers by {error:.1e} of the largest"
    if not error < 1e-3:
        raise ValueError(f"{text}, more than rounding explains")
    info(f"{text}: rounding")


def main(argv: list[str]):
    text = "Write a Hugging Face directory: python huggingface.py SRC DST [--key=value]"
    paths = [word for word in argv if not word.startswith("-")]
    _, values = parse_args(text, [word for word in argv if word.startswith("-")], ConvertConfig)
    config = ConvertConfig(**values)
    if len(paths) != 2 or (config.check and config.quantize):
        info("usage: python huggingface.py SRC DST [--quantize=True or --check=True]")
        sys.exit(2)
    convert(*map(Path, paths), config.quantize)
    if config.check:
        check(Path(paths[1]))


if __name__ == "__main__":
    run_command(main)
