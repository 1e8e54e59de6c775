"""Files: the layout of the released models, both ways, its tokenizers, and our own runs.

    python huggingface.py SRC DST [--quantize=True] [--check=True] [--overwrite=True]

SRC is a run's folder, a checkpoint file or a Hugging Face directory; DST, the directory written,
opens in transformers and here. Its weights are safetensors, one file or shards, each tensor under
its released name. In FP8 the decoding factors of W's 128x128 blocks are stored as W_scale_inv.
Optional packages are imported where they are needed: safetensors, tokenizers (which brings
huggingface_hub) and, to compare logits, transformers.
"""

import functools
import hashlib
import json
import pickle
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

import fp8
from config import info, parse_args, run_command
from model import DeepSeekV3, ModelConfig
from prepare_data import END_OF_TEXT, encoding_from, load_tokenizer, parse_ranks, replacing

# What config.json says besides the fields of ModelConfig; there is one way to compute it.
FIXED_KEYS = {"hidden_act": "silu", "scoring_func": "sigmoid"}
FIXED_KEYS |= {"topk_method": "noaux_tc", "moe_layer_freq": 1}
FP8_KEYS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
# Stored in FP8 are the projections of attention and FFN, not gate, norms or eh_proj.
FP8_WEIGHTS = re.compile(r"(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
HEAD, INDEX = "lm_head.weight", "model.safetensors.index.json"
# Our stacked experts (E, 2F, D) and (E, D, F) are stored expert by expert, gate and up apart.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# The files that may lie in a Hugging Face directory besides config.json and weights.
TEXTS = r"(tokenizer|tokenizer_config|special_tokens_map|generation_config)\.json"
TEXTS += r"|tiktoken\.model|tokenization_\w+\.py|chat_template\.jinja"
TEXTS += r"|meta\.json|tokenizer\.tiktoken"  # ours
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


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is missing or no JSON object ({error!s:.200}).") from None


# ---- Weights -------------------------------------------------------------------------------------


def config_from_json(config: dict[str, Any]) -> ModelConfig:
    """From a Hugging Face config.json, in the style of transformers 4 or 5.

    Keys without effect on the network are ignored. Raises ValueError for another architecture
    and for a value that would change the logits in a way that is not implemented.
    """
    kind = config.get("model_type")
    if kind not in ("deepseek_v3", "kimi_k2"):
        raise ValueError(
            f"config.json has model_type {kind!r}, but only the DeepSeek-V3 architecture can be "
            "opened: deepseek_v3 (V3, R1, Moonlight) or kimi_k2."
        )
    # transformers 5 gathers rope_theta and rope_scaling in one dictionary.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json has rope_scaling {rope!r}, but must have an object.")
    # Where config.json is silent, transformers' defaults hold; these differ from ours.
    stated = {"max_position_embeddings": 4096, "initializer_range": 0.02} | config | rope
    stated |= config.get("quantization_config") or {}
    for key, value in (FIXED_KEYS | FP8_KEYS | {"partial_rotary_factor": 1}).items():
        if stated.get(key) not in (None, value):
            raise ValueError(f"config.json has {key} {stated[key]!r}, but must have {value!r}.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    apart = ("rope_type", "rope_theta", "partial_rotary_factor")
    stated["rope_scaling"] = {k: x for k, x in rope.items() if k not in apart} | {"type": kind}
    known = {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{key: value for key, value in stated.items() if key in known})


def checkpoint_views(model: DeepSeekV3) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint: released names, and views of our memory to read or write."""
    L = model.config.num_hidden_layers
    for name, x in model.state_dict().items():
        if name == HEAD and model.config.tie_word_embeddings:
            continue
        # MTP module k is stored as layer L + k, and the norm after it as shared_head.norm.
        name = re.sub(r"^mtp\.(\d+)\.(block\.)?", lambda m: f"layers.{L + int(m[1])}.", name)
        name = re.sub(r"(\d)\.norm\.", r"\1.shared_head.norm.", name)
        name = name if name == HEAD else f"model.{name}"
        stem, _, kind = name.rpartition(".")
        if kind not in STACKED:
            yield name, x
            continue
        for e, weight in enumerate(x):
            parts = zip(STACKED[kind], weight.chunk(len(STACKED[kind])), strict=True)
            yield from ((f"{stem}.{e}.{part}.weight", view) for part, view in parts)


def checkpoint_copies(model: DeepSeekV3) -> Iterator[tuple[str, Tensor]]:
    """What released checkpoints store once more with every MTP layer."""
    for k in range(len(model.mtp)):
        layer = f"model.layers.{model.config.num_hidden_layers + k}"
        yield f"{layer}.embed_tokens.weight", model.embed_tokens.weight
        yield f"{layer}.shared_head.head.weight", model.lm_head.weight


def stored_tensors(directory: Path, device: str) -> dict[str, Any]:
    """The name of every tensor with the file to get it from, which is mapped, not read."""
    import safetensors

    files, tensors = ["model.safetensors"], {}
    if not (directory / files[0]).exists():
        where = read_json(directory / INDEX).get("weight_map")
        files = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
        if not files or any(Path(file).name != file for file in files):
            raise ValueError(f"{directory / INDEX} needs a weight_map: plain file names by tensor.")
    for file in files:
        try:
            opened = safetensors.safe_open(directory / file, "pt", str(device))
        except (OSError, safetensors.SafetensorError) as error:
            why = f"is missing, truncated or not safetensors ({error!s:.200}): fetch it again."
            raise ValueError(f"{directory / file} {why}") from None
        tensors |= dict.fromkeys(opened.keys(), opened)
    return tensors


@torch.no_grad()
def from_pretrained(
    directory: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> DeepSeekV3:
    """Opens a checkpoint of the DeepSeek-V3 family in bf16, fp16, fp32 or block-wise FP8.

    dtype None is the one config.json names (bf16 for FP8 weights). MTP modules are there if
    their tensors are. Raises ValueError naming the file, key or tensor that is wrong.
    """
    directory, why = Path(directory), "config.json and the weights do not belong together."
    raw = read_json(directory / "config.json")
    config, stored = config_from_json(raw), stored_tensors(directory, device)
    config.num_nextn_predict_layers = sum(name.endswith(".eh_proj.weight") for name in stored)
    in_fp8 = any(name.endswith("_scale_inv") for name in stored)
    stated = "bfloat16" if in_fp8 else raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    dtype = dtype or getattr(torch, stated, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"{directory} cannot be opened as {dtype or stated}: give another dtype.")
    with torch.device("meta"):
        model = DeepSeekV3(config).to(dtype)
    views, filled = dict(checkpoint_views(model.materialize(device))), set()
    places = {HEAD: model.lm_head.weight} | dict(checkpoint_copies(model)) | views
    wrong = views.keys() - stored.keys()  # a copy, or a tied head, may be there or not
    wrong |= {x for x in stored.keys() - places if x.removesuffix("_scale_inv") not in views}
    if wrong := {x for x in wrong if not x.endswith("rotary_emb.inv_freq")}:
        state = "lacks the" if min(wrong) in views else "has the unknown"
        raise ValueError(f"{directory} {state} tensor {min(wrong)} (1 of {len(wrong)}): {why}")
    for name, file in stored.items():
        if name not in places:
            continue
        x, view, scaled = file.get_tensor(name), places[name], stored.get(f"{name}_scale_inv")
        good, blocks = x.dtype.itemsize > 1, [-(-n // 128) for n in x.shape]
        if scaled:
            scale = scaled.get_tensor(f"{name}_scale_inv")
            good = x.dtype == torch.float8_e4m3fn and list(scale.shape) == blocks
        if x.shape != view.shape or not (good and x.is_floating_point()):
            raise ValueError(
                f"{name} in {directory} is {x.dtype} of shape {list(x.shape)}, but must be floats "
                f"of shape {list(view.shape)}, or E4M3 with a scale of shape {blocks}: {why}"
            )
        x = fp8.dequantize(x, scale, fp8.BLOCK) if scaled else x
        if view.data_ptr() in filled and not torch.equal(x.to(view.dtype), view):
            raise ValueError(
                f"{name} in {directory} differs from its copy under another name, but DeepSeek-V3 "
                "has one embedding and one head for all: this is another architecture."
            )
        view.copy_(x)
        filled.add(view.data_ptr())
    return model.eval()


@torch.no_grad()
def save_pretrained(
    model: DeepSeekV3,
    directory: str | Path,
    *,
    quantize: bool = False,
    shard_bytes: int = 5_000_000_000,
    **extra: Any,
):
    """Writes the checkpoint in the layout of the released ones, for transformers and others.

    quantize: FP8 weights with 128x128 block scales, as released. shard_bytes: the most tensor data
    in one file, counted before quantising. extra: further keys of config.json. The directory
    appears whole or not at all, and replaces an earlier checkpoint.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    config, length = asdict(model.config), model.config.max_position_embeddings
    if config["rope_scaling"]:  # YaRN falls back on the other key, which extra may change
        config["rope_scaling"].setdefault("original_max_position_embeddings", length)
    config |= FIXED_KEYS | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": model.config.num_attention_heads,
        "bos_token_id": None,  # unless given in extra: readers would stop at token 1
        "eos_token_id": None,
        "torch_dtype": str(model.norm.weight.dtype).removeprefix("torch."),
    }
    if quantize:
        config["quantization_config"] = FP8_KEYS | {"activation_scheme": "dynamic"}
    views = dict(checkpoint_views(model)) | dict(checkpoint_copies(model))
    sizes = {name: x.to("meta") for name, x in views.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)
    weight_map, total = {}, 0
    with replacing(Path(directory), OURS, overwrite=True) as new:
        for file, names in plan.filename_to_tensors.items():
            tensors = {name: views[name].to("cpu", copy=True) for name in names}
            for name in filter(FP8_WEIGHTS.search, names if quantize else ()):
                tensors[name], scale = fp8.quantize(tensors[name], fp8.BLOCK)
                tensors[f"{name}_scale_inv"] = scale
            save_file(tensors, new / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(x.nbytes for x in tensors.values())
        if plan.is_sharded:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (new / INDEX).write_text(json.dumps(index, indent=2))
        (new / "config.json").write_text(json.dumps(config | extra, indent=2))


# ---- Tokenizers ----------------------------------------------------------------------------------


@dataclass
class Tokenizer:
    """Text to ids, one id to bytes, and the ids that end a text."""

    encode: Callable[[str], list[int]]  # the ids begin with bos, if there is one
    to_bytes: Callable[[int], bytes]  # nothing for ids without text: a vocabulary may be padded
    eos: list[int]
    encoding: tiktoken.Encoding | None = None  # where it is one: eos[0] is its END_OF_TEXT
    bos: int | None = None

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.to_bytes, ids)).decode(errors="replace")


def from_encoding(encoding: tiktoken.Encoding, eos: list[int]) -> Tokenizer:
    texts = {i: token for token, i in encoding._mergeable_ranks.items()}
    texts |= {i: name.encode() for name, i in encoding._special_tokens.items()}
    to_bytes = defaultdict(bytes, texts).__getitem__
    return Tokenizer(encoding.encode_ordinary, to_bytes, eos, encoding)


def hf_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory: ours, Kimi's tiktoken.model or tokenizer.json.

    The last is no tiktoken.Encoding: DeepSeek-V3's splits text in three stages, which no single
    expression repeats exactly. Raises ValueError.
    """
    told = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        told |= read_json(folder / name) if (folder / name).exists() else {}
    eos = told.get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if (folder / "meta.json").exists():
        return from_encoding(load_tokenizer(folder), eos)
    path, kimis = folder / "tokenizer.json", folder / "tiktoken.model"
    if not (path.exists() or kimis.exists()):
        return None
    import tokenizers

    try:
        if kimis.exists():
            added = told.get("added_tokens_decoder", {})
            special = {token["content"]: int(i) for i, token in added.items() if int(i) != eos[0]}
            special[END_OF_TEXT] = eos[0]  # the name of a special token matters to no text
            ranks = parse_ranks(kimis.read_bytes())
            return from_encoding(encoding_from(ranks, KIMI_PATTERN, special), eos)
        parsed = tokenizers.Tokenizer.from_file(str(path))
        special = {x.content: i for i, x in parsed.get_added_tokens_decoder().items()}
        byte_of = {char: byte for byte, char in BYTE_CHARS.items()}
        vocab = parsed.get_vocab(with_added_tokens=False).items()
        texts = {i: bytes(byte_of[c] for c in token) for token, i in vocab if token not in special}
        texts |= {i: content.encode() for content, i in special.items()}
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{folder} has no byte-level tokenizer ({error!s:.200}).") from None
    bos = told.get("bos_token") if told.get("add_bos_token") else None
    bos = special.get(bos["content"] if isinstance(bos, dict) else bos)

    def encode(text: str) -> list[int]:
        ids = parsed.encode(text, add_special_tokens=False).ids
        return ids if bos is None else [bos, *ids]

    return Tokenizer(encode, defaultdict(bytes, texts).__getitem__, eos, bos=bos)


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


@functools.cache  # of the code that runs, also where the file is edited meanwhile
def source_hash() -> str:
    """Of model.py: a checkpoint keeps it, since its weights mean what that code made of them."""
    return hashlib.sha256(Path(__file__).with_name("model.py").read_bytes()).hexdigest()


def load_checkpoint(path: str | Path) -> dict[str, Any]:
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
    saved = None
    with suppress(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError):
        saved = torch.load(file, "cpu", weights_only=True, mmap=True)
    if not (isinstance(saved, dict) and isinstance(saved.get("model_config"), dict)):
        raise ValueError(
            f"{file} is truncated, no checkpoint of train.py, or holds more than tensors and "
            "numbers, which could run code; copy it again or use another one"
        )
    if unknown := saved["model_config"].keys() - {field.name for field in fields(ModelConfig)}:
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
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        why = f"weights and configuration do not match ({error!s:.200})."
        raise ValueError(f"{ckpt}: {why}") from None
    if saved.get("model_sha256", source_hash()) != source_hash():
        why = "if a formula did, logits differ (huggingface.py --check=True compares)"
        info(f"model.py has changed since {path} was trained: {why}")
    windows = saved.get("train_config", {}).get("block_size", model.trained_length)
    model.trained_length = saved.get("trained_length", windows)  # earlier versions had one length
    run = path if path.is_dir() else path.parent
    if not (run / "meta.json").exists():
        raise FileNotFoundError(
            f"{run} lacks meta.json and tokenizer.tiktoken: copy the run's there"
        )
    encoding = load_tokenizer(run)
    return model.eval(), from_encoding(encoding, [encoding.eot_token]), path


# ---- The command ---------------------------------------------------------------------------------


@dataclass
class ConvertConfig:
    quantize: bool = False  # FP8 weights with 128x128 block scales, as released
    check: bool = False  # compare logits with those of transformers (not where weights are FP8)
    overwrite: bool = False  # replace an earlier checkpoint in DST


def convert(source: Path, target: Path, quantize: bool = False, overwrite: bool = False):
    """Writes what transformers' AutoModelForCausalLM and AutoTokenizer open."""
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} would replace what it is made from: choose another DST.")
    with replacing(target, OURS, overwrite) as new:  # refuses before a large model is opened
        model, tokenizer, path = load_model(source)
        folder, theirs = path if path.is_dir() else path.parent, path / "config.json"
        if theirs.exists():
            keys = {k: x for k, x in read_json(theirs).items() if k.endswith("_token_id")}
        else:
            keys = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos[0])
            keys["max_position_embeddings"] = model.trained_length
        save_pretrained(model, new, quantize=quantize, **keys)
        for file in folder.iterdir():
            if re.fullmatch(TEXTS, file.name):
                shutil.copyfile(file, new / file.name)
        if not theirs.exists():
            settings = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            (new / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
            (new / "tokenizer.json").write_text(tokenizer_json(tokenizer.encoding), "utf-8")
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
    paths = [word for word in argv if not word.startswith("-")]
    keys = [word for word in argv if word.startswith("-")]
    about = (
        "Write the Hugging Face directory DST from SRC: a run, a checkpoint or such a directory."
    )
    config = ConvertConfig(**parse_args(about, keys, ConvertConfig, positional="src dst")[1])
    if len(paths) != 2 or (config.check and config.quantize):
        info("usage: python huggingface.py SRC DST [--quantize=True or --check=True]; see --help")
        sys.exit(2)
    convert(*map(Path, paths), config.quantize, config.overwrite)
    if config.check:
        check(Path(paths[1]))


if __name__ == "__main__":
    run_command(main)
