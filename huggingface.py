"""Reads and writes the released models' layout, and exports runs.

    python huggingface.py SRC DST [--quantize=True] [--check=False] [--overwrite]
    python huggingface.py SRC DST.gguf [--gguf_dtype=F32] [--check=False] [--overwrite]

SRC is a run's folder or a checkpoint file. DST is a new directory for transformers, which opens
here, too. DST.gguf is a file for llama.cpp. Both programs compute DeepSeek-V3's formulas, not those
of an edited model.py. So if transformers is installed, it computes logits from the written files,
and a network with other logits is not exported. (MTP modules are not compared, so an edit of these
goes unnoticed.)
In the released layout weights are safetensors, in one file or in shards, each tensor under its
released name. The decoding factors of an FP8 weight, one per 128x128 block, are stored beside it as
NAME_scale_inv. Optional packages are imported where they are needed: safetensors, tokenizers (which
installs huggingface_hub), transformers, gguf.
"""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

import fp8
from load import Undrawn, load_model
from model import DeepSeekV3, ModelConfig
from support.files import check_free, new_folder, read_json, write_whole
from support.gguf import write_gguf
from support.release_tokenizer import export_tokenizer
from support.settings import Refusal, and_more, as_field, info, parse_args, run_command, short
from support.tokenizer import Tokenizer

MTP_PARTS = {f"{part}.weight" for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
FAMILY = ("deepseek_v3", "kimi_k2")  # the values of model_type with V3's network
# config.json's other keys that change logits, each with the only value that model.py implements.
FIXED_KEYS = {"architectures": ["DeepseekV3ForCausalLM"], "hidden_act": "silu"}
FIXED_KEYS |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights not in FP8
FP8_KEYS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
# The projections of attention and FFN are stored in FP8; gate, norms and eh_proj are not.
FP8_WEIGHTS = re.compile(r"(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
# Our stacked experts (E, 2F, D) and (E, D, F) are stored one by one, gate and up separately.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

# ---- Weights -------------------------------------------------------------------------------------


def config_from_json(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json, in the style of transformers 4 or 5.

    Keys without effect on the network are ignored. Raises Refusal for another architecture, and for
    a value that would change the logits in a way that model.py does not implement.
    """
    family, text_part = config.get("model_type"), config.get("text_config")
    if family not in (None, *FAMILY):
        if isinstance(text_part, dict):
            family = f"{family}, whose text part (text_config) is {text_part.get('model_type')}"
        raise Refusal(
            f"config.json has model_type {family}, expected {' or '.join(FAMILY)}: DeepSeek-V3, "
            "V3.1, R1, Moonlight, Kimi-K2 or a relative."
        )
    scaling, parameters, quantization = (
        as_field(f"{key} of config.json", config.get(key), dict | None) or {}
        for key in ("rope_scaling", "rope_parameters", "quantization_config")
    )
    # transformers 5 gathers rope_theta and rope_scaling in one dictionary.
    rope = dict(scaling or parameters)
    original = "original_max_position_embeddings"
    if config.get(original):  # it overrides the value in that dictionary
        rope[original] = config[original]
    # The keys of the file and of its two nested objects in one dictionary. Missing keys get
    # transformers' defaults, which differ from ours in these two.
    stated = {"max_position_embeddings": 4096, "initializer_range": 0.02}
    stated |= config | rope | quantization
    for key, value in (FIXED_KEYS | FP8_KEYS | {"partial_rotary_factor": 1}).items():
        if stated.get(key) not in (None, value):
            raise Refusal(f"config.json has {key} {stated[key]!r:.100}, expected {value!r}.")
    apart = ("rope_theta", "partial_rotary_factor")  # the other keys of `rope` are YaRN's
    stated["rope_scaling"] = {key: value for key, value in rope.items() if key not in apart}
    known = ModelConfig.__dataclass_fields__
    stated = {k: as_field(k, x, known[k].type) for k, x in stated.items() if k in known}
    return ModelConfig(**stated)


def checkpoint_views(model: DeepSeekV3) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a released checkpoint by name, as views of the corresponding parts of our
    parameters. Saving reads the views, opening writes to them."""
    L = model.config.num_hidden_layers
    for name, x in model.state_dict().items():
        # MTP module k is stored as layer L + k, and the norm after it as shared_head.norm.
        name = re.sub(r"^mtp\.(\d+)\.(block\.)?", lambda m: f"layers.{L + int(m[1])}.", name)
        name = re.sub(r"(\d)\.norm\.", r"\1.shared_head.norm.", name)
        name = name if name == "lm_head.weight" else f"model.{name}"
        stem, _, kind = name.rpartition(".")
        if kind in STACKED:
            for e, weight in enumerate(x):
                parts = zip(STACKED[kind], weight.chunk(len(STACKED[kind])), strict=True)
                yield from ((f"{stem}.{e}.{part}.weight", view) for part, view in parts)
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            yield name, x


def foreign_mtp_parts(model: DeepSeekV3) -> list[str]:
    """The tensors of MTP modules, their experts aside, that no release has: their names are neither
    those of a layer nor V3's for such a module. Programs that read the layout ignore them."""
    L, in_layers, in_modules = model.config.num_hidden_layers, set(), {}
    for name, _ in checkpoint_views(model):
        if found := re.match(r"model\.layers\.(\d+)\.(.*)", name):
            number, part = int(found[1]), found[2]
            if number < L:
                in_layers.add(part)
            else:
                in_modules.setdefault(part, name)
    known = in_layers | MTP_PARTS
    return [x for part, x in in_modules.items() if part not in known and part[:4] != "mlp."]


def checkpoint_copies(model: DeepSeekV3) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a released checkpoint repeats under other names: a tied head, and embedding
    and head in every MTP module."""
    if model.config.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head.weight
    for k in range(len(model.mtp)):
        layer = f"model.layers.{model.config.num_hidden_layers + k}"
        yield f"{layer}.embed_tokens.weight", model.embed_tokens.weight
        yield f"{layer}.shared_head.head.weight", model.lm_head.weight


def open_files(directory: Path, device: str) -> dict[str, Any]:
    """{name of a tensor: the open file that contains it}. Files are memory-mapped, not read. Raises
    Refusal."""
    import safetensors

    stored = {}
    for path in sorted(directory.glob("model*.safetensors")):
        try:
            file = safetensors.safe_open(path, "pt", device)
            if twice := stored.keys() & file.keys():
                raise Refusal(f"it repeats {min(twice)}: one of the files is of another version")
            stored |= dict.fromkeys(file.keys(), file)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise Refusal(f"{path} cannot be used ({short(error)}): download all again.") from None
    if not stored:
        raise Refusal(f"{directory} has no weights in model*.safetensors, the only known format.")
    return stored


def check_tensors(model: DeepSeekV3, stored: dict[str, Any], directory: Path):
    """Raises Refusal unless names and shapes are the model's. Copies (checkpoint_copies) may be
    missing."""
    needed, copies = dict(checkpoint_views(model)), dict(checkpoint_copies(model))
    if missing := sorted(needed.keys() - stored.keys()):
        raise Refusal(
            f"{directory} lacks {and_more(missing)}, expected by its config.json: "
            "is a file missing?"
        )
    for name in sorted(stored.keys() - needed.keys() - copies.keys()):
        empty = 0 in stored[name].get_slice(name).get_shape()  # transformers' n_shared_experts 0
        if not (empty or name.endswith(("_scale_inv", "rotary_emb.inv_freq"))):
            raise Refusal(f"{directory} has {name}, which its config.json does not include.")
    for name, x in needed.items():
        if (shape := tuple(stored[name].get_slice(name).get_shape())) != x.shape:
            expected = tuple(x.shape)
            raise Refusal(f"{name} in {directory} is {shape}, but by its config.json {expected}.")


def read_tensor(name: str, stored: dict[str, Any], directory: Path) -> Tensor:
    """A stored weight; if it is in FP8, decoded in float32. Raises Refusal."""
    x, scale = stored[name].get_tensor(name), f"{name}_scale_inv"
    if x.dtype in DTYPES and scale not in stored:
        return x
    if x.dtype != torch.float8_e4m3fn:  # such as int8 or E5M2, which torch would convert silently
        found = f"{x.dtype} with {scale}" if scale in stored else f"{x.dtype}"
        expected = "float8_e4m3fn with block scales, or float32, bfloat16, float16 without"
        raise Refusal(f"{name} in {directory} is {found}, expected {expected}.")
    if scale not in stored:
        raise Refusal(f"{name} in {directory} is in FP8, but has no {scale}.")
    try:
        return fp8.dequantize(x, stored[scale].get_tensor(scale), fp8.BLOCK)
    except ValueError as error:  # such as one scale for the whole tensor
        raise Refusal(f"{name} in {directory}: {error}") from None


@torch.no_grad()
def from_pretrained(
    directory: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> DeepSeekV3:
    """Opens a checkpoint of the DeepSeek-V3 family in bf16, fp16, fp32 or block-wise FP8, in one
    file or several.

    dtype None: that of config.json, else of the final norm; bf16 for FP8. The model has MTP modules
    if the checkpoint has their tensors. Raises ValueError or its subclass Refusal, which names the
    wrong file, key or tensor.
    """
    directory = Path(directory)
    raw, stored = read_json(directory / "config.json"), open_files(directory, str(device))
    config = config_from_json(raw)
    config.num_nextn_predict_layers = sum(name.endswith(".eh_proj.weight") for name in stored)
    with Undrawn():
        model, norm = DeepSeekV3(config), "model.norm.weight"
    check_tensors(model, stored, directory)
    kind = raw.get("dtype") or raw.get("torch_dtype") or stored[norm].get_tensor(norm).dtype
    kind = "bfloat16" if raw.get("quantization_config") else str(kind).removeprefix("torch.")
    named = getattr(torch, kind, None)
    if named not in DTYPES:
        raise Refusal(f"config.json has dtype {kind!r:.100}, expected one such as float32.")

    model = model.to(device, dtype or named)
    for name, view in checkpoint_views(model):
        view.copy_(read_tensor(name, stored, directory))
    copies = {name: x for name, x in checkpoint_copies(model) if name in stored}
    for name, original in copies.items():
        if not torch.equal(stored[name].get_tensor(name).to(original.dtype), original):
            message = "this is another architecture"
            if name == "lm_head.weight":
                message = "set tie_word_embeddings to false in config.json"
            raise Refusal(f"{name} differs from its original: {message}.")
    model.trained_length = config.max_position_embeddings
    return model.eval()


@torch.no_grad()
def save_pretrained(model: DeepSeekV3, directory: str | Path, quantize: bool = False, **extra: Any):
    """Writes a checkpoint in the released layout, for transformers and other programs.

    quantize: FP8 weights with 128x128 block scales, as released. extra: further keys of
    config.json, which is written last: an incomplete directory does not open. Only `check` finds
    out whether other programs compute the same as an edited network.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    config, kinds = asdict(model.config), ModelConfig.__annotations__
    # transformers refuses 1 for 1.0.
    config = {key: float(x) if kinds[key] is float else x for key, x in config.items()}
    config |= FIXED_KEYS | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": model.config.num_attention_heads,
        "bos_token_id": None,  # unless in extra; without these keys readers would stop at token 1
        "eos_token_id": None,
        "torch_dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
    }
    tensors = dict(checkpoint_views(model)) | dict(checkpoint_copies(model))
    if quantize:
        config["quantization_config"] = FP8_KEYS | {"activation_scheme": "dynamic"}
        for name in filter(FP8_WEIGHTS.search, [*tensors]):
            tensors[name], tensors[f"{name}_scale_inv"] = fp8.quantize(tensors[name], fp8.BLOCK)
    # Copies, because tensors that share memory (experts, embedding and head) would be refused.
    tensors = {name: x.to("cpu", copy=True) for name, x in tensors.items()}
    try:
        save_torch_state_dict(tensors, directory)
    except SafetensorError as error:  # such as a full disk
        raise Refusal(f"the weights cannot be written to {directory} ({short(error)})") from None
    (directory / "config.json").write_text(json.dumps(config | extra, indent=2))
    for file in directory.glob("model*.safetensors"):  # written so that only the owner can read it
        shutil.copymode(directory / "config.json", file)


# ---- The command ---------------------------------------------------------------------------------


@dataclass
class ConvertConfig:
    quantize: bool = False  # FP8 weights with 128x128 block scales, as released
    check: bool = True  # compare logits with transformers, and refuse to export if they differ
    gguf_dtype: Literal["F32", "F16", "BF16", "Q8_0"] = "F16"  # of matrices in DST.gguf
    overwrite: bool = False  # rename an existing DST to DST.old-1, and so on


@torch.no_grad()
def check(directory: Path):
    """Compares our logits with transformers', in float32, on random tokens that include an end of
    text. One of four texts must agree. Raises Refusal otherwise."""
    import transformers  # installed: see compares()

    transformers.logging.set_verbosity_error()  # or it would list the MTP modules' tensors
    transformers.logging.disable_progress_bar()
    # It initialises weights whose name or shape is not V3's at random, so the logits will differ.
    options = dict(experts_implementation="eager", ignore_mismatched_sizes=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, **options
    )
    model, generator = from_pretrained(directory, torch.float32), torch.Generator()
    generator.seed()  # a random seed, so that another export draws other texts
    config, eos = model.config, theirs.config.eos_token_id
    length = min(1024, config.max_position_embeddings)
    for _ in range(4):  # in some texts rounding swaps two experts with nearly equal scores
        tokens = torch.randint(config.vocab_size, (1, length), generator=generator)
        tokens[:, length // 3] = eos[0] if isinstance(eos, list) else eos
        logits, expected = model(tokens), theirs(tokens).logits
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        if error < 1e-3:
            break
    without = "; the MTP modules were not compared" if model.mtp else ""
    info(f"logits differ from those of transformers by {error:.1e} of the largest{without}")
    if not error < 1e-3:  # nan, too
        raise Refusal(
            "the difference is more than rounding in 4 random texts: other programs compute "
            "DeepSeek-V3, but model.py no longer does; nothing was written (if model.py is "
            "unchanged, export again, which draws other texts)"
        )


def compares(config: ConvertConfig) -> bool:
    """Whether to compare an export with transformers; prints a message if not. Nothing else detects
    that model.py no longer computes DeepSeek-V3."""
    installed = all(importlib.util.find_spec(x) for x in ("transformers", "safetensors"))
    if installed:  # `check` needs an option of version 5
        installed = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
    if not (config.check and installed):
        reason = "pip install 'transformers>=5' safetensors" if config.check else "--check=False"
        info(f"nothing was compared ({reason}): other programs compute V3, not your edit")
    return config.check and installed


def check_alone(model: DeepSeekV3, tokenizer: Tokenizer, beside: Path):
    """Like `check`, for an export that transformers cannot read: writes and checks a temporary copy
    in its layout."""
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=f"{beside.name}.part-") as scratch:
        export(model, tokenizer, Path(scratch), quantize=False)
        check(Path(scratch))


def export(model: DeepSeekV3, tokenizer: Tokenizer, directory: Path, quantize: bool):
    """Writes the model and its tokenizer for transformers."""
    if foreign := foreign_mtp_parts(model):
        info(f"no release has {and_more(foreign)}: other programs ignore it, or lack V3's part")
    export_tokenizer(tokenizer, directory)
    eos = tokenizer.eos[0] if len(tokenizer.eos) == 1 else tokenizer.eos
    bos = tokenizer.bos if tokenizer.files else eos  # a release's may be None
    keys = {"bos_token_id": bos, "eos_token_id": eos}
    keys["max_position_embeddings"] = model.trained_length
    save_pretrained(model, directory, quantize=quantize, **keys)


def export_gguf(source: Path, target: Path, options: ConvertConfig):
    """Writes weights and tokenizer as one file for llama.cpp."""
    model, tokenizer = load_model(source)
    config = asdict(model.config) | {"max_position_embeddings": model.trained_length}
    weights, dtype = model.state_dict().items(), options.gguf_dtype

    def write(file: BinaryIO):
        write_gguf(Path(file.name), weights, config, tokenizer.encoding, dtype)

    target.parent.mkdir(parents=True, exist_ok=True)
    if compares(options):
        check_alone(model, tokenizer, target)
    write_whole(target, write, keep_old=True)
    info(f"wrote {target}")
    if model.mtp:
        info("left out the MTP modules: llama.cpp decodes without drafts")


def main(argv: list[str]):
    about = "Write DST, a directory in Hugging Face's layout or a file for llama.cpp (DST.gguf)."
    paths = [Path(word) for word in argv if not word.startswith("-")]
    options = [word for word in argv if word.startswith("-")]
    config = ConvertConfig(**parse_args(about, options, ConvertConfig, positional="src dst")[1])
    to_gguf = [path.suffix for path in paths[1:]] == [".gguf"]
    if len(paths) != 2 or (config.quantize and to_gguf):
        info("usage: python huggingface.py SRC DIR [--quantize=True], or SRC DST.gguf")
        sys.exit(2)
    source, target = paths
    needed = ["gguf"] if to_gguf else ["tokenizers", "safetensors"]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise Refusal(f"an export needs more packages: pip install {' '.join(missing)}")
    check_free(target, config.overwrite)
    if (source / "config.json").exists():
        raise Refusal(
            f"{source} has Hugging Face's layout, but SRC must be a run or a checkpoint file: "
            "to rewrite it, use from_pretrained and save_pretrained in Python."
        )
    if to_gguf:
        return export_gguf(source, target, config)
    model, tokenizer = load_model(source)
    with new_folder(target, config.overwrite) as folder:
        export(model, tokenizer, folder, config.quantize)
        if compares(config):
            check_alone(model, tokenizer, folder) if config.quantize else check(folder)
    info(f"wrote {target}: {', '.join(sorted(file.name for file in target.iterdir()))}")
    weights = [(name, x) for name, x in checkpoint_views(model) if FP8_WEIGHTS.search(name)]
    partly = [name for name, x in weights if any(n > 128 and n % 128 for n in x.shape)]
    if config.quantize and partly:
        names = and_more(partly)
        info(f"transformers cannot read FP8 weights whose last blocks are partly filled: {names}")
    if model.mtp:
        info(
            "transformers will list the MTP modules' tensors as unexpected: only "
            "generate(use_mtp=True) uses them (docs/TUTORIAL.md, Export to transformers)"
        )


if __name__ == "__main__":
    run_command(main)
