"""Is it really DeepSeek-V3? The Hugging Face layout, both ways, against transformers.

Every checkpoint is made at random here: by transformers, which model.py must then open with the
same logits, routing and greedy text; or by model.py, which transformers must open. (The equations
in float64 numpy, tests/reference.py, arbitrate in test_deepseek.py.) Weights are drawn so large,
and correction biases so different, that a mistake moves the logits by whole units.
"""

import functools
import json
import logging
import os
import shutil
from pathlib import Path

import huggingface_hub
import networks
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_sample import TEXT, make_run
from test_tokenizer import ODD_TEXTS
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

import huggingface
import load
import support.release_tokenizer
from huggingface import checkpoint_views, config_from_json
from load import load_model
from model import DeepSeekV3
from support.checkpoints import load_checkpoint
from support.settings import sentence_of
from support.tokenizer import PATTERN, encoding_from, stored_tokenizer, train_bpe

ROOT = Path(__file__).parent.parent
# Transformers' grouped product wants even widths.
HF_SIZES = networks.SIZES | {"max_position_embeddings": 640, "moe_intermediate_size": 12}
YARN = networks.YARN | {"factor": 40, "original_max_position_embeddings": 16}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}
NO_GROUPS = {"n_group": 1, "topk_group": 1}
VARIANTS = networks.VARIANTS | {
    "DeepSeek-V3": {"rope_scaling": YARN},
    "Moonlight": NO_GROUPS
    | {"q_lora_rank": None, "n_shared_experts": 2, "rope_theta": 50000.0}
    | {"routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5},
    "Kimi-K2": NO_GROUPS
    | {"rope_scaling": YARN | {"factor": 32, "beta_fast": 1}, "rope_theta": 50000.0}
    | {"qk_rope_head_dim": 16, "n_routed_experts": 24, "num_experts_per_tok": 8},
    "bare yarn": {
        "rope_scaling": {"type": "yarn", "factor": 8},
        "qk_rope_head_dim": 16,
        "max_position_embeddings": 4096,  # so long that beta_fast's default, 32, matters
    },
    "yarn untruncated": {
        # so long that truncation would change the frequencies
        "rope_scaling": YARN
        | {"attention_factor": 0.9, "truncate": False, "original_max_position_embeddings": 256},
        "qk_rope_head_dim": 16,
    },
    "attention bias, no q latent": {"attention_bias": True, "q_lora_rank": None},
    "every expert": {"topk_group": 4, "num_experts_per_tok": 8, "norm_topk_prob": False},
    # transformers takes 1.0 for a fraction, and refuses 1.
    "whole numbers": {"rope_theta": 10, "rms_norm_eps": 1, "initializer_range": 1}
    | {"routed_scaling_factor": 2},
    "narrow": {"num_attention_heads": 1, "kv_lora_rank": 2, "rms_norm_eps": 0.1},
}
for other in ("no_shared_expert", "no_mtp", "two_mtp_modules"):  # have tests of their own
    del VARIANTS[other]
TOKENS = torch.randint(HF_SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("v3")  # what these files know no other network has


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """transformers names the tensors that it does not know; the tests ask for them instead."""
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "level", logging.CRITICAL)


def theirs(directory: Path, **keys):
    """Opened by transformers; its grouped product takes neither float64 nor odd widths."""
    return DeepseekV3ForCausalLM.from_pretrained(directory, experts_implementation="eager", **keys)


@torch.no_grad()
def ours(depth: int = 1, **keys) -> DeepSeekV3:
    model = networks.tiny(torch.float32, **HF_SIZES | keys | {"num_nextn_predict_layers": depth})
    for gate in model.gates():  # mostly negative biases: a masked group must not win with a 0
        gate.e_score_correction_bias.uniform_(-1.2, 0.4)
    return model


@pytest.fixture
def saved_by_us(tmp_path) -> Path:
    """A checkpoint to damage."""
    huggingface.save_pretrained(ours(rope_scaling=YARN), tmp_path / "ours")
    return tmp_path / "ours"


@torch.no_grad()
def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, change):
    """Rewrites model.safetensors after `change` has worked on its dictionary."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# ---- Both ways -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_network_both_ways(name, tmp_path):
    """Ours opened by transformers, and what it then saves opened by us: the same logits, experts
    and greedy text; nothing is lost on the way. (The cache: test_check.py.)"""
    model = ours(depth=0, **VARIANTS[name])
    huggingface.save_pretrained(model, tmp_path / "a")
    hf, report = theirs(tmp_path / "a", output_loading_info=True)
    assert not any(report.values()) and hf.dtype == torch.float32, report
    hf.save_pretrained(tmp_path / "b")
    # config.json promises an MTP module, but its tensors are not there.
    edit_json(tmp_path / "b/config.json", num_nextn_predict_layers=1)
    again = huggingface.from_pretrained(tmp_path / "b")
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())

    T, new, chosen = TOKENS.shape[1], 12, []
    text = hf.generate(TOKENS, max_new_tokens=new, do_sample=False, eos_token_id=None)
    for layer in hf.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda *args: chosen.append(args[2][2]))
    expected, logits = hf(text).logits, again(text)
    assert difference(logits, expected) < 2e-4 and expected.std() > 0.5
    for a, b in zip(again.chosen, chosen, strict=True):
        assert torch.equal(a.flatten(0, 1).sort(-1).values, b.sort(-1).values)
    assert torch.equal(logits[:, T - 1 : -1].argmax(-1), text[:, T:])
    assert difference(again.double()(TOKENS), hf.double()(TOKENS).logits) < 5e-5


@torch.no_grad()
def test_an_original_length_outside_of_rope_scaling_has_the_last_word(tmp_path):
    key = "original_max_position_embeddings"
    huggingface.save_pretrained(ours(depth=0, rope_scaling=YARN), tmp_path, **{key: 64})
    model = huggingface.from_pretrained(tmp_path)
    assert model.config.rope_scaling[key] == 64 != YARN[key]
    assert model.trained_length == model.config.max_position_embeddings  # sample.py's limit
    assert difference(model(TOKENS), theirs(tmp_path)(TOKENS).logits) < 2e-4
    assert config_from_json({key: 64}).rope_scaling is None


def test_silent_config_means_the_defaults_of_transformers():
    assert config_from_json({}) == config_from_json(DeepseekV3Config().to_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    "name, depth", [("DeepSeek-V3", 2), ("Moonlight", 1), ("tied_embeddings", 2)]
)
def test_mtp(name, depth, tmp_path, monkeypatch):
    """Our modules in transformers' own MtpModel: logits at every depth, and drafting with them."""
    model = ours(depth=depth, **VARIANTS[name])
    huggingface.save_pretrained(model, tmp_path / "ours")
    pattern = [r"model\.layers\.(3|4)\..*"]  # the class knows the layer of the release only, 61
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", pattern)
    hf = theirs(tmp_path / "ours")
    logits, mtp = model(TOKENS, return_mtp=True)
    out = hf(TOKENS, output_hidden_states=True)
    assert difference(logits, out.logits) < 2e-4

    module, h = MtpModel.from_pretrained(hf), out.hidden_states[-1]
    assert len(module.layers) == len(mtp) == depth
    for k in range(depth):
        ids = TOKENS[:, k + 1 :]
        positions = torch.arange(ids.shape[1])[None] + k + 1
        h = module.forward_layer(k, h[:, :-1], positions, None, input_ids=ids)
        assert difference(mtp[k], module._project_to_logits(h)) < 2e-4

    text = hf.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, use_mtp=True)
    assert text.shape == (1, 32) and torch.equal(model(text)[:, 23:-1].argmax(-1), text[:, 24:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_round_trip_in_shards_is_exact(dtype, tmp_path, monkeypatch):
    save = functools.partial(huggingface_hub.save_torch_state_dict, max_shard_size=5_000)
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", save)
    model = ours(depth=2, rope_scaling=YARN).to(dtype)
    huggingface.save_pretrained(model, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1  # others may read all
    told = theirs(tmp_path).config
    assert (told.bos_token_id, told.eos_token_id) == (None, None)  # by default 0 and 1
    again = huggingface.from_pretrained(tmp_path)
    assert again.config == model.config
    assert not again.training and all(p.requires_grad for p in again.parameters())
    for name, x in again.state_dict().items():
        assert x.dtype == (torch.float32 if name.endswith("correction_bias") else dtype), name
        assert torch.equal(x, model.state_dict()[name]), name
    edit_json(tmp_path / "config.json", torch_dtype=None)  # then it is that of the weights
    again = load_model(tmp_path)[0]
    assert again.norm.weight.dtype == theirs(tmp_path).dtype == dtype


def test_saving_opens_whole_or_not_at_all_and_removes_nothing_else(saved_by_us, monkeypatch):
    (saved_by_us / "notes.md").write_text("mine")
    model = ours()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(huggingface_hub, "save_torch_state_dict", lambda *args: 1 / 0)
        huggingface.save_pretrained(model, saved_by_us)
    check_refusal("config.json", huggingface.from_pretrained, saved_by_us)
    split(saved_by_us, lambda name: "layers.2" in name)
    huggingface.save_pretrained(model, saved_by_us)  # one file now: no shards and no index
    files = {"config.json", "model.safetensors", "notes.md"}
    assert {path.name for path in saved_by_us.iterdir()} == files
    assert torch.equal(huggingface.from_pretrained(saved_by_us).norm.weight, model.norm.weight)


# ---- FP8 -----------------------------------------------------------------------------------------


LARGE = dict(  # with the rope key 576 rows of keys, as in the release: the last block is half
    hidden_size=136, num_attention_heads=2, kv_lora_rank=512, qk_rope_head_dim=64, q_lora_rank=130,
    moe_intermediate_size=136, intermediate_size=260, rope_scaling=YARN,
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_fp8(powers_of_two, tmp_path):
    """W[i, j] = q[i, j] * scale[i // 128, j // 128]; V3.1's scales in bytes, or in another file."""
    model, directory, meaning = ours(depth=1, **LARGE), tmp_path / "a", {}
    huggingface.save_pretrained(model, directory, quantize=True)
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert quantization["weight_block_size"] == [128, 128]
    stored = load_file(directory / "model.safetensors")
    if powers_of_two:
        for name in [name for name in stored if name.endswith("_scale_inv")]:
            stored[name] = stored[name].log2().ceil().exp2().to(torch.float8_e8m0fnu)
        save_file(stored, directory / "model.safetensors")
        split(directory, lambda name: name.endswith("_scale_inv"))
    originals = dict(checkpoint_views(model)) | dict(huggingface.checkpoint_copies(model))
    for name, x in originals.items():
        meaning[name], inside = stored[name], ".self_attn." in name or ".mlp." in name
        assert (stored[name].dtype == torch.float8_e4m3fn) == (inside and "proj" in name), name
        if stored[name].dtype != torch.float8_e4m3fn:
            assert torch.equal(stored[name], x), name
            continue
        scale = stored[f"{name}_scale_inv"].float()
        first = x[:128, :128].abs().max() / 448  # the largest of E4M3
        assert powers_of_two or scale[0, 0] == first, name
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        meaning[name] = stored[name].float() * scale[: x.shape[0], : x.shape[1]]
        assert powers_of_two or difference(meaning[name], x) <= x.abs().max() / 16, name
    opened = huggingface.from_pretrained(directory, dtype=torch.float32)
    half = huggingface.from_pretrained(directory)  # multiplied in float32, then rounded
    assert len(opened.mtp) == 1
    for (name, x), (_, y) in zip(checkpoint_views(opened), checkpoint_views(half), strict=True):
        assert torch.equal(x, meaning[name]) and torch.equal(y, meaning[name].to(y.dtype)), name
        assert y.dtype == (torch.float32 if "bias" in name else torch.bfloat16)


def split(directory: Path, second):
    """model.safetensors into two shards: those for which second(name), and the rest."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for i in (0, 1):
        part = {name: x for name, x in tensors.items() if second(name) == bool(i)}
        save_file(part, directory / f"model-0000{i + 1}-of-00002.safetensors")


# ---- Refusals ------------------------------------------------------------------------------------

UNUSABLE_CONFIGS = [  # changes of config.json, and what the sentence must name
    ({"architectures": ["DeepseekV2ForCausalLM"]}, "architectures ['DeepseekV2ForCausalLM'], exp"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
    ({"scoring_func": "softmax"}, "scoring_func 'softmax', expected 'sigmoid'"),
    ({"topk_method": "greedy"}, "topk_method 'greedy', expected 'noaux_tc'"),
    ({"moe_layer_freq": 2}, "moe_layer_freq 2, expected 1"),
    ({"torch_dtype": "int64"}, "dtype 'int64', expected"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors'"),
    ({"quantization_config": {"weight_block_size": [64, 64]}}, "[64, 64]"),
    ({"rope_scaling": None, "rope_parameters": {"rope_type": "llama3"}}, "'llama3'"),
    ({"rope_scaling": "yarn"}, "rope_scaling of config.json is 'yarn', expected dict"),
    ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5, expected 1"),
    ({"hidden_size": 16.5}, "hidden_size is 16.5, expected a whole number"),
    ({"vocab_size": 32}, "is (31, 16), but by its config.json (32, 16)."),
    ({"q_lora_rank": None}, "lacks model.layers.0.self_attn.q_proj.weight and 3 more, expected"),
    ({"tie_word_embeddings": True}, "lm_head.weight differs from its original: set tie_word_emb"),
    ({"n_shared_experts": 0}, "has model.layers.1.mlp.shared_experts.down_proj.weight, which its"),
    # Another family may have V3's keys: that it opens does not mean that it is computed rightly.
    ({"model_type": "glm4_moe_lite"}, "has model_type glm4_moe_lite, expected deepseek_v3 or"),
    ({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}},
     "has model_type kimi_k25, whose text part (text_config) is kimi_k2, expected deepseek_v3 or"),
]  # fmt: skip


def check_refusal(sentence: str, open_it, *args):
    with pytest.raises((OSError, ValueError)) as refusal:
        open_it(*args)
    text = sentence_of(refusal.value)
    assert sentence in text and len(text) < 600, text  # run_command makes one line of it


@pytest.mark.parametrize("changes, sentence", UNUSABLE_CONFIGS)
def test_a_config_of_another_network_is_refused(changes, sentence, saved_by_us):
    edit_json(saved_by_us / "config.json", **changes)
    check_refusal(sentence, load_model, saved_by_us)


Q = "model.layers.1.self_attn.q_b_proj.weight"
EMBED, HEAD = (f"model.layers.3.{x}.weight" for x in ("embed_tokens", "shared_head.head"))


@pytest.mark.parametrize(
    "name, dtype, sentence",
    [
        (Q, torch.float8_e4m3fn, f"is in FP8, but has no {Q}_scale_inv"),
        (EMBED, torch.float32, f"{EMBED} differs from its original"),
        (Q, torch.int8, "is torch.int8, expected float8_e4m3fn with block scales"),
        (Q, torch.float8_e5m2, "is torch.float8_e5m2, expected float8_e4m3fn"),
    ],
)
def test_tensors_refused(name, dtype, sentence, saved_by_us):
    edit_tensors(saved_by_us, lambda x: x.update({name: (x[name] + 1).to(dtype)}))
    check_refusal(sentence, huggingface.from_pretrained, saved_by_us)


def test_tensors_that_may_be_there_or_not(tmp_path):
    """The MTP copies may be absent, old files carry RoPE's frequencies, tied ones the head."""
    model, embed = ours(tie_word_embeddings=True), "model.embed_tokens.weight"
    huggingface.save_pretrained(model, tmp_path / "a")

    def change(x):
        del x[EMBED], x[HEAD]
        x["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        x["lm_head.weight"] = x[embed].clone()

    edit_tensors(tmp_path / "a", change)
    again = huggingface.from_pretrained(tmp_path / "a").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())


def test_files_refused(saved_by_us):
    whole = shutil.copy(saved_by_us / "model.safetensors", saved_by_us / "whole")
    split(saved_by_us, lambda name: "layers.2" in name)
    assert huggingface.from_pretrained(saved_by_us).config.num_hidden_layers == 3
    second = saved_by_us / "model-00002-of-00002.safetensors"
    os.truncate(second, second.stat().st_size - 1)
    check_refusal(f"{second} cannot be used", huggingface.from_pretrained, saved_by_us)
    os.replace(whole, second)
    check_refusal(f"{second} cannot be used (it repeats", huggingface.from_pretrained, saved_by_us)
    second.unlink()
    check_refusal("lacks model.layers.2.", huggingface.from_pretrained, saved_by_us)
    (saved_by_us / "model-00001-of-00002.safetensors").rename(saved_by_us / "pytorch_model.bin")
    check_refusal("has no weights in model*.safeten", huggingface.from_pretrained, saved_by_us)
    (saved_by_us / "config.json").write_text("{")
    check_refusal("config.json is not JSON", huggingface.from_pretrained, saved_by_us)


# ---- Our runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The vocabulary is padded, and windows were shorter than they may be."""
    folder = make_run(tmp_path_factory, lambda vocab_size: ours(vocab_size=vocab_size + 4))
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    torch.save(saved | {"trained_length": 48}, folder / "ckpt.pt")
    return folder


drawn = functools.partial(torch.nn.init.normal_, mean=1.0, std=0.0)
NEW_PARTS = {  # which a constructor adds; its sum is 6
    "a constant": lambda m: setattr(m, "new", torch.arange(4.0)),
    "a buffer that is not saved": lambda m: m.register_buffer("new", torch.ones(6), False),
    "a number": lambda m: setattr(m, "new", torch.tensor(torch.ones(6).sum().item())),
    "a drawn parameter": lambda m: setattr(m, "new", drawn(torch.nn.Parameter(torch.zeros(6)))),
    "a drawn constant": lambda m: setattr(m, "new", drawn(torch.zeros(6))),
}


@pytest.mark.parametrize("add", NEW_PARTS.values(), ids=NEW_PARTS)
def test_an_edited_network_opens_old_weights_and_has_the_rest_from_its_constructor(
    add, run, monkeypatch
):
    class Edited(DeepSeekV3):
        def __init__(self, config):
            super().__init__(config)
            add(self)
            self.mtp[0].norm = self.norm  # shared

    saved = load_model(run)[0]
    monkeypatch.setattr(load, "DeepSeekV3", Edited)
    model = load_model(run, extend=True)[0]
    assert model.new.sum() == 6 and not any(gate.load.any() for gate in model.gates())
    assert model.mtp[0].norm is model.norm and model.norm.weight is model.mtp[0].norm.weight
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)


# ---- Tokenizers and the command ------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0, 3])  # as cl100k_base has one before its special tokens
def test_exported_tokenizer_gives_the_same_ids(gap):
    ranks = train_bpe(ODD_TEXTS, 1500, PATTERN)
    special = {"<|x|>": len(ranks) + gap}
    encoding = encoding_from(ranks, PATTERN, special)
    exported = tokenizers.Tokenizer.from_str(support.release_tokenizer.tokenizer_json(encoding))
    for text in ODD_TEXTS:
        ids = encoding.encode_ordinary(text)
        assert exported.encode(text).ids == ids, text[:50]
        assert exported.decode(ids) == text
    assert exported.encode("a<|x|>").ids[1:] == [len(ranks) + gap]


@torch.no_grad()
def test_a_run_becomes_a_directory_that_transformers_and_we_open(run, tmp_path, capsys):
    target = tmp_path / "hf"
    huggingface.main([str(run), str(target)])
    said = capsys.readouterr().err
    assert "MTP modules were not compared" in said and "as unexpected" in said
    model, tokenizer = load_model(run)
    saved, ids, (eot,) = load_checkpoint(run)["model"], tokenizer.encode(TEXT), tokenizer.eos
    assert all(torch.equal(x, saved[name]) for name, x in model.state_dict().items())
    assert not model.training and tokenizer.bos is None
    hf = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(target)
    assert theirs(TEXT)["input_ids"] == ids and theirs.decode(ids) == TEXT
    assert theirs.eos_token_id == hf.generation_config.eos_token_id == hf.config.bos_token_id == eot
    again, opened = load_model(target)
    assert len(again.mtp) == 1 and torch.equal(model(TOKENS), again(TOKENS))
    assert again.trained_length == hf.config.max_position_embeddings == 48
    for folder in (run, target):
        changed = load_model(folder, settings={"rope_theta": 5.0})[0]
        assert (changed.config.rope_theta, changed.trained_length) == (5.0, 48)
        assert all(torch.equal(x, saved[name]) for name, x in changed.state_dict().items())
    assert difference(model(TOKENS), hf(TOKENS).logits) < 2e-4
    # prepare_data.py takes an exported one, too.
    assert ids == opened.encode(TEXT) == stored_tokenizer(target).encoding.encode_ordinary(TEXT)
    assert (opened.eos, opened.bos) == ([eot], None)
    assert [opened.to_bytes(eot + i) for i in (0, 1)] == [b"<|endoftext|>", b""]
    for name, bad in (
        ("tokenizer.json", "{"),
        ("tiktoken.model", "AAAA\n"),
        ("tiktoken.model", "AAAA 1\nAAAB 1"),  # cut off within 11
    ):
        (target / name).write_text(bad)
        check_refusal(f"the tokenizer of {target} cannot be read", load_model, target)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens, eot: (tokens == eot).cumsum(-1)[..., None] > 0,  # as a mask of documents
        lambda tokens, eot: torch.arange(tokens.shape[1])[:, None] > 499,  # as a window
        lambda tokens, eot: 0.02,
        lambda tokens, eot: torch.nan,
    ],
)
def test_an_edited_network_is_not_exported_as_v3(change, run, tmp_path, monkeypatch, capsys):
    model, tokenizer = load_model(run)
    (eot,) = tokenizer.eos
    model.register_forward_hook(lambda model, given, logits: logits + change(*given, eot))
    monkeypatch.setattr(huggingface, "from_pretrained", lambda *args: model)
    for name, *options in (("hf",), ("hf", "--quantize"), ("small.gguf",)):
        words = [str(run), str(tmp_path / name), *options]
        check_refusal("more than rounding", huggingface.main, words)
        assert not [*tmp_path.iterdir()]
    huggingface.main([str(run), str(tmp_path / "hf"), "--check=False"])
    assert "nothing was compared (--check=False)" in capsys.readouterr().err
    with monkeypatch.context() as old:
        old.setattr("importlib.metadata.version", lambda package: "4.57.6")
        huggingface.main([str(run), str(tmp_path / "old")])
    assert "nothing was compared (pip install 'transformers>=5' " in capsys.readouterr().err
    # Shapes that are not V3's, of which transformers knows nothing: it draws such weights.
    wide = functools.partial(huggingface.save_pretrained, moe_intermediate_size=14)
    monkeypatch.setattr(huggingface, "save_pretrained", wide)
    check_refusal("more than rounding", huggingface.main, [str(run), str(tmp_path / "wide")])


def test_parts_of_mtp_modules_that_no_release_has_are_named(run):
    """One that was renamed, and one that was added."""
    for right in (
        load_model(run)[0],
        networks.tiny(first_k_dense_replace=9, num_nextn_predict_layers=2),
    ):
        assert not huggingface.foreign_mtp_parts(right)
    model = load_model(run)[0]
    module = model.mtp[0]
    module.proj = module._modules.pop("eh_proj")
    module.block.self_attn.gain = torch.nn.Parameter(torch.ones(1))
    L = f"model.layers.{model.config.num_hidden_layers}"
    assert {*huggingface.foreign_mtp_parts(model)} == {
        f"{L}.proj.weight", f"{L}.self_attn.gain",
    }  # fmt: skip


def test_an_export_is_right_if_one_text_of_four_agrees(run, tmp_path, monkeypatch):
    """Rounding may choose another of two equal experts in the other three. Another export draws
    other texts."""
    model, seen = load_model(run)[0], []
    model.register_forward_pre_hook(lambda model, given: seen.append(given[0][0].tolist()))
    model.register_forward_hook(lambda model, given, x: x if len(seen) % 4 == 0 else x + 0.02)
    monkeypatch.setattr(huggingface, "from_pretrained", lambda *args: model)
    for name in ("a", "b"):
        huggingface.main([str(run), str(tmp_path / name)])
    assert len(seen) == 8 == len(set(map(tuple, seen)))
