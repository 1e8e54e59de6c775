"""Is it really DeepSeek-V3? The Hugging Face layout, both ways, against transformers.

Every checkpoint is made at random here: by transformers, which model.py must then open with the
same logits, routing and greedy text; or by model.py, which transformers must open. `reference.py`,
plain float64 numpy from the equations, arbitrates where transformers rounds to float32. Weights are
drawn so large, and correction biases so different, that a mistake moves the logits by whole units.
"""

import json
import logging
import runpy
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import transformers
from reference import forward as reference
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

import model as M
from model import Cache, DeepSeekV3, ModelConfig

INDEX = "model.safetensors.index.json"
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 640,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
NO_GROUPS = {"n_group": 1, "topk_group": 1}
VARIANTS = {
    "DeepSeek-V3": {"rope_scaling": YARN},
    "Moonlight": NO_GROUPS
    | {"q_lora_rank": None, "n_shared_experts": 2, "rope_theta": 50000.0}
    | {"routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5},
    "Kimi-K2": NO_GROUPS
    | {"rope_scaling": YARN | {"factor": 32, "beta_fast": 1}, "rope_theta": 50000.0}
    | {"qk_rope_head_dim": 16, "n_routed_experts": 24, "num_experts_per_tok": 8},
    "mscales differ": {
        "rope_scaling": YARN | {"mscale_all_dim": 0.7, "original_max_position_embeddings": 4096},
        "rope_theta": 100.0,  # so slow that the last rotated pair is beyond the half
    },
    "bare yarn": {"rope_scaling": {"type": "yarn", "factor": 8}},
    "yarn untruncated": {
        "rope_scaling": YARN | {"attention_factor": 0.9, "truncate": False},
        "qk_rope_head_dim": 16,
    },
    "attention bias": {"attention_bias": True},
    "attention bias, no q latent": {"attention_bias": True, "q_lora_rank": None},
    "half-split": {"rope_interleave": False, "rope_scaling": YARN},
    "weights not normalised": {"norm_topk_prob": False},
    "tied": {"tie_word_embeddings": True},
    "all layers dense": {"first_k_dense_replace": 3},
    "no layer dense": {"first_k_dense_replace": 0, "topk_group": 4},
    "every expert": {"topk_group": 4, "num_experts_per_tok": 16},
    "eps": {"rms_norm_eps": 0.1},
    "one token of size": {"num_attention_heads": 1, "num_key_value_heads": 1, "kv_lora_rank": 2},
    "crossing 128": {"hidden_size": 136, "kv_lora_rank": 130, "moe_intermediate_size": 129},
}
TOKENS = torch.randint(TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """transformers names the tensors that it does not know; the tests ask for them instead."""
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "level", logging.CRITICAL)
    torch.manual_seed(0)


@torch.no_grad()
def randomise(model: torch.nn.Module):
    """Matrices that keep the size of activations, norms around 1, biases that change choices."""
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            x.uniform_(-1.2, 0.4)  # mostly negative: a masked group must not win with a 0
        elif isinstance(x, torch.nn.Parameter) and x.ndim >= 2:
            x.normal_(std=1.5 * x.shape[-1] ** -0.5)
        elif isinstance(x, torch.nn.Parameter):
            x.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.4)
    return model.eval()


def theirs(directory: Path, **keys):
    """Opened by transformers; its grouped product takes neither float64 nor odd widths."""
    return DeepseekV3ForCausalLM.from_pretrained(directory, experts_implementation="eager", **keys)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def saved_by_them(request, tmp_path) -> Path:
    config = DeepseekV3Config(**json.loads(json.dumps(TINY | request.param)))  # it edits its input
    randomise(DeepseekV3ForCausalLM(config)).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def ours(depth: int = 1, **keys) -> DeepSeekV3:
    keys = {"num_nextn_predict_layers": depth} | keys
    known = {field.name for field in fields(ModelConfig)}
    keys = {key: value for key, value in (TINY | keys).items() if key in known}
    return randomise(DeepSeekV3(ModelConfig(**keys)))


@pytest.fixture
def saved_by_us(tmp_path) -> Path:
    ours(depth=1, rope_scaling=YARN).save_pretrained(tmp_path / "ours")
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


# ---- Their checkpoint, our network ---------------------------------------------------------------


@torch.no_grad()
def test_logits_and_routing(saved_by_them):
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.float64, 5e-5)):
        hf, chosen = theirs(saved_by_them, dtype=dtype), []
        for layer in hf.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(lambda *args, c=chosen: c.append(args[2][2]))
        expected = hf(TOKENS).logits
        model = DeepSeekV3.from_pretrained(saved_by_them, dtype=dtype)
        assert not model.mtp  # config.json promises a module, but its tensors are not there
        logits = model(TOKENS)
        assert logits.dtype == dtype
        assert difference(logits, expected) < tolerance
        assert expected.std() > 0.5
        for a, b in zip(model.routing, chosen, strict=True):
            assert torch.equal(a.flatten(0, 1).sort(-1).values, b.sort(-1).values)


@torch.no_grad()
def test_greedy_generation(saved_by_them):
    hf, T, new = theirs(saved_by_them), TOKENS.shape[1], 12
    expected = hf.generate(TOKENS, max_new_tokens=new, do_sample=False, eos_token_id=None)
    model = DeepSeekV3.from_pretrained(saved_by_them)
    plain = TOKENS
    for _ in range(new):
        plain = torch.cat((plain, model(plain)[:, -1:].argmax(-1)), 1)
    assert torch.equal(plain, expected)

    layers = model.config.num_hidden_layers
    cache = Cache(model.config, layers, len(TOKENS), T + new, model.norm.weight.detach())
    cached = following = TOKENS
    for _ in range(new):  # the prompt at once, then one token at a time
        h = model.trunk(following, cache)
        following = model.logits(h[:, -1:]).argmax(-1)
        cached = torch.cat((cached, following), 1)
    assert torch.equal(cached, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"bare yarn", "yarn untruncated"}))
def test_float64_reference(name, tmp_path):
    """The equations in numpy: no float32 anywhere, so the agreement is that of float64."""
    model = ours(depth=1, **VARIANTS[name]).double()
    model.save_pretrained(tmp_path / "a")
    weights, tokens = numpy_weights(tmp_path / "a"), TOKENS[0].tolist()
    expected, mtp = reference(weights, vars(model.config), tokens)
    logits, ours_mtp = DeepSeekV3.from_pretrained(tmp_path / "a")(TOKENS[:1], return_mtp=True)
    for a, b in zip([logits, *ours_mtp], [expected, *mtp], strict=True):
        assert difference(a[0], torch.from_numpy(b)) < 1e-9


def numpy_weights(directory: Path) -> dict[str, np.ndarray]:
    weights = load_file(directory / "model.safetensors")
    return {name: x.double().numpy() for name, x in weights.items()}


@torch.no_grad()
def test_config_in_the_style_of_the_releases(saved_by_them):
    """transformers 5 writes rope_parameters; the released config.json have rope_theta and
    rope_scaling, torch_dtype, and keys that only training used."""
    new = json.loads((saved_by_them / "config.json").read_text())
    assert "rope_parameters" in new
    expected = DeepSeekV3.from_pretrained(saved_by_them)
    rope = new.pop("rope_parameters")
    new["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    new["rope_scaling"] = {"type": kind, **rope} if kind == "yarn" else None
    new["torch_dtype"] = new.pop("dtype")
    new |= {"aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "pretraining_tp": 1}
    new |= {"auto_map": {"AutoConfig": "x"}, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    new |= {"model_type": "kimi_k2", "moe_layer_freq": 1, "attention_dropout": 0.0}
    (saved_by_them / "config.json").write_text(json.dumps(new))
    model = DeepSeekV3.from_pretrained(saved_by_them)
    assert model.config == expected.config
    assert difference(model(TOKENS), expected(TOKENS)) == 0


def test_silent_config_means_the_defaults_of_transformers():
    config = ModelConfig.from_hf({"architectures": ["DeepseekV3ForCausalLM"]})
    defaults = DeepseekV3Config()
    for field in fields(ModelConfig):
        if field.name not in ("rope_theta", "rope_scaling"):
            assert getattr(config, field.name) == getattr(defaults, field.name), field.name
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert defaults.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}


# ---- Our checkpoint, their network ---------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_opens_ours(name, tmp_path):
    keys = VARIANTS[name]
    if keys.get("rope_scaling") == {"type": "yarn", "factor": 8}:
        keys = keys | {"rope_scaling": {"rope_type": "yarn", "factor": 8}}
    model = ours(depth=0, **keys)
    model.save_pretrained(tmp_path / "a")
    hf, report = theirs(tmp_path / "a", output_loading_info=True)
    assert not any(report.values()), report
    assert hf.dtype == torch.float32
    assert difference(model(TOKENS), hf(TOKENS).logits) < 2e-4

    hf.save_pretrained(tmp_path / "b")  # through transformers and back: nothing is lost
    again = DeepSeekV3.from_pretrained(tmp_path / "b")
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_shared_experts(tmp_path):
    """transformers makes them zero wide; we leave them out."""
    model = ours(depth=0, n_shared_experts=0)
    model.save_pretrained(tmp_path / "a")
    assert difference(model(TOKENS), theirs(tmp_path / "a")(TOKENS).logits) < 2e-4
    edit_json(tmp_path / "a/config.json", n_shared_experts=None)
    again = DeepSeekV3.from_pretrained(tmp_path / "a")
    assert difference(model(TOKENS), again(TOKENS)) == 0


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("keys", [{"rope_scaling": YARN}, VARIANTS["Moonlight"], VARIANTS["tied"]])
def test_mtp(depth, keys, tmp_path, monkeypatch):
    """Our modules in transformers' own MtpModel: logits at every depth, and drafting with them."""
    model = ours(depth=depth, **keys)
    model.save_pretrained(tmp_path / "ours")
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

    one = TOKENS[:1]
    drafted = hf.generate(one, max_new_tokens=16, do_sample=False, use_mtp=True)
    plain = one
    for _ in range(16):
        plain = torch.cat((plain, model(plain)[:, -1:].argmax(-1)), 1)
    assert torch.equal(drafted, plain)


def test_layout(tmp_path):
    """Names, shapes and dtypes are those of the release; the whole V3 has 91,991 tensors."""
    model = ours(depth=1).bfloat16()
    model.save_pretrained(
        tmp_path / "a", quantize=True, files={"tokenizer.json": "{}"}, eos_token_id=7
    )
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json")
    }
    stored, mtp = load_file(tmp_path / "a/model.safetensors"), "model.layers.3."
    dtypes = {
        "model.embed_tokens.weight": torch.bfloat16,
        "model.layers.1.mlp.gate.weight": torch.bfloat16,
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.float32,
        "model.layers.1.mlp.experts.15.up_proj.weight": torch.float8_e4m3fn,
        "model.layers.1.mlp.experts.15.up_proj.weight_scale_inv": torch.float32,
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": torch.float8_e4m3fn,
        f"{mtp}mlp.gate.e_score_correction_bias": torch.float32,
        f"{mtp}self_attn.o_proj.weight": torch.float8_e4m3fn,
        **dict.fromkeys(
            (f"{mtp}{x}.weight" for x in ("enorm", "hnorm", "eh_proj")), torch.bfloat16
        ),
        f"{mtp}shared_head.norm.weight": torch.bfloat16,
    }
    assert {name: stored[name].dtype for name in dtypes} == dtypes
    assert torch.equal(stored[f"{mtp}embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored[f"{mtp}shared_head.head.weight"], stored["lm_head.weight"])
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert (config["eos_token_id"], config["torch_dtype"]) == (7, "bfloat16")

    v3 = meta_model("v3_671b")
    views = dict(v3.checkpoint_views())
    tensors = list(views.values()) + [views[name] for name in v3.checkpoint_copies().values()]
    scales = [
        (-(-x.shape[0] // 128)) * (-(-x.shape[1] // 128))
        for name, x in views.items()
        if M.FP8_WEIGHTS.search(name)
    ]
    assert len(tensors) + len(scales) == 91_991
    assert sum(x.numel() for x in tensors) + sum(scales) == 684_531_386_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [{"depth": 2}, {"tie_word_embeddings": True, "depth": 1}])
def test_round_trip_is_exact(dtype, keys, tmp_path):
    model = ours(rope_scaling=YARN, **keys).to(dtype)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    for directory in (tmp_path / "one", tmp_path / "many"):
        again = DeepSeekV3.from_pretrained(directory)
        assert again.config == model.config
        assert not again.training and all(p.requires_grad for p in again.parameters())
        assert again.state_dict().keys() == model.state_dict().keys()
        for name, x in again.state_dict().items():
            assert x.dtype == (torch.float32 if name.endswith("correction_bias") else dtype), name
            assert torch.equal(x, model.state_dict()[name]), name
        tied = again.lm_head.weight is again.embed_tokens.weight
        assert tied == model.config.tie_word_embeddings
        assert not again.expert_counts.any()
        half = DeepSeekV3.from_pretrained(directory, dtype=torch.bfloat16, device="cpu")
        assert torch.equal(half.norm.weight, model.norm.weight.bfloat16())
    bias = model.gates()[0].e_score_correction_bias
    assert not torch.equal(bias, bias.bfloat16().float())  # so a rounded bias would show


def test_shards(tmp_path):
    ours(depth=1).save_pretrained(tmp_path / "a", shard_bytes=50_000)
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    total = 0
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        tensors = load_file(file)
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        size = sum(x.nbytes for x in tensors.values())
        assert size <= 50_000 or len(tensors) == 1
        total += size
    assert total == index["metadata"]["total_size"]
    assert theirs(tmp_path / "a").config.vocab_size == TINY["vocab_size"]


def test_one_file_mapped_and_one_tensor_read_at_a_time(tmp_path, monkeypatch):
    ours(depth=1).save_pretrained(tmp_path / "a", quantize=True, shard_bytes=20_000)
    opened, most = 0, 0

    class Counted:
        def __init__(self, *args, **keys):
            self.file = real(*args, **keys)

        def __enter__(self):
            nonlocal opened, most
            self.file.__enter__()
            opened += 1
            most = max(most, opened)
            return self.file

        def __exit__(self, *args):
            nonlocal opened
            opened -= 1
            return self.file.__exit__(*args)

    real = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Counted)
    DeepSeekV3.from_pretrained(tmp_path / "a")
    assert (opened, most) == (0, 1)


def test_saving_is_atomic(tmp_path, monkeypatch):
    directory, first, second = tmp_path / "a", ours(), ours()
    first.save_pretrained(directory, shard_bytes=50_000)

    def stop(self, *args, **keys):
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", stop)
        with pytest.raises(OSError, match="disk full"):
            second.save_pretrained(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert torch.equal(DeepSeekV3.from_pretrained(directory).norm.weight, first.norm.weight)
    second.save_pretrained(directory)  # one file now: the shards and their index must be gone
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(DeepSeekV3.from_pretrained(directory).norm.weight, second.norm.weight)
    (directory / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.md is no part of a checkpoint"):
        second.save_pretrained(directory)
    assert (directory / "notes.md").read_text() == "mine"


# ---- FP8 -----------------------------------------------------------------------------------------


def write_fp8(directory: Path, powers_of_two: bool):
    """Turns a checkpoint into FP8 as the releases are, and returns what its weights then mean.

    The quantiser and its inverse are element by element, from the definition: W[i, j] = q[i, j] *
    scale[i // 128, j // 128].
    """
    meaning, stored = load_file(directory / "model.safetensors"), {}
    for name, x in meaning.items():
        stored[name] = x
        if (".self_attn." not in name and ".mlp." not in name) or "proj" not in name:
            continue
        rows, columns = x.shape
        scale = np.empty((-(-rows // 128), -(-columns // 128)), np.float32)
        full = np.empty((rows, columns), np.float32)
        for i, j in np.ndindex(*scale.shape):
            block = x[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            scale[i, j] = block.abs().max() / 448
            if powers_of_two:
                scale[i, j] = 2.0 ** np.ceil(np.log2(scale[i, j]))
        for i in range(rows):
            full[i] = scale[i // 128, np.arange(columns) // 128]
        full = torch.from_numpy(full)
        stored[name] = (x / full).to(torch.float8_e4m3fn)
        meaning[name] = stored[name].float() * full
        scale = torch.from_numpy(scale)
        stored[f"{name}_scale_inv"] = scale.to(torch.float8_e8m0fnu) if powers_of_two else scale
    save_file(stored, directory / "model.safetensors")
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    fp8 |= {"weight_block_size": [128, 128]} | ({"scale_fmt": "ue8m0"} if powers_of_two else {})
    edit_json(directory / "config.json", quantization_config=fp8)
    return meaning


LARGE = {
    "hidden_size": 136,
    "num_attention_heads": 2,
    "kv_lora_rank": 512,  # with the rope key 576 rows, as in the release: the last block is half
    "qk_rope_head_dim": 64,
    "q_lora_rank": 130,
    "moe_intermediate_size": 136,
    "intermediate_size": 260,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "rope_scaling": YARN,
}


@torch.no_grad()
@pytest.mark.parametrize("powers_of_two", [False, True])
@pytest.mark.parametrize("shards", ["one file", "scales in other shards"])
def test_fp8(powers_of_two, shards, tmp_path):
    directory = tmp_path / "a"
    ours(depth=1, **LARGE).save_pretrained(directory)
    meaning = write_fp8(directory, powers_of_two)
    if shards != "one file":
        split(directory, lambda name: name.endswith("_scale_inv"))
    model = DeepSeekV3.from_pretrained(directory, dtype=torch.float32)
    assert len(model.mtp) == 1
    for name, x in model.checkpoint_views():
        assert torch.equal(x, meaning[name]), name
    half = DeepSeekV3.from_pretrained(directory)  # multiplied in float32, then rounded
    for name, x in half.checkpoint_views():
        assert x.dtype == (torch.float32 if "bias" in name else torch.bfloat16)
        assert torch.equal(x, meaning[name].to(x.dtype)), name

    plain = tmp_path / "plain"  # the meaning in transformers
    plain.mkdir()
    save_file(meaning, plain / "model.safetensors")
    shutil.copy(directory / "config.json", plain)
    edit_json(plain / "config.json", quantization_config=None)
    assert difference(model(TOKENS), theirs(plain)(TOKENS).logits) < 2e-4


def split(directory: Path, second):
    """model.safetensors into two shards: those for which second(name), and the rest."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    first, last = files.values()
    for name, x in tensors.items():
        (last if second(name) else first)[name] = x
    for file, part in files.items():
        save_file(part, directory / file)
    where = {name: file for file, part in files.items() for name in part}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


@torch.no_grad()
def test_fp8_export(tmp_path):
    model = ours(depth=1, **LARGE)
    model.save_pretrained(tmp_path / "a", quantize=True)
    stored, again = load_file(tmp_path / "a/model.safetensors"), {}
    for name, x in DeepSeekV3.from_pretrained(
        tmp_path / "a", dtype=torch.float32
    ).checkpoint_views():
        again[name] = x
    for name, x in model.checkpoint_views():
        if stored[name].dtype != torch.float8_e4m3fn:
            assert torch.equal(again[name], x), name
            continue
        scale = stored[f"{name}_scale_inv"]
        full = scale.repeat_interleave(128, 0)[: len(x)].repeat_interleave(128, 1)[:, : x.shape[1]]
        assert torch.equal(again[name], stored[name].float() * full), name
        # 4 significant bits: half a unit is 1/16; below 2^-6 (of 448) the grid is 2^-9 wide
        assert ((again[name] - x).abs() <= (x.abs() / 16).maximum(full * 2**-10) * 1.001).all()
    assert {name for name in stored if stored[name].dtype == torch.float8_e4m3fn} == {
        name
        for name, x in stored.items()
        if "_proj" in name and "eh_" not in name and x.ndim == 2 and not name.endswith("_scale_inv")
    }


# ---- Refusals ------------------------------------------------------------------------------------

CONFIG_REFUSALS = {
    "another architecture": ({"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM'"),
    "only its type": ({"architectures": None, "model_type": "deepseek_v2"}, "'deepseek_v2'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu', but must have 'silu'"),
    "softmax": ({"scoring_func": "softmax"}, "scoring_func 'softmax', but must have 'sigmoid'"),
    "choice": ({"topk_method": "greedy"}, "topk_method 'greedy', but must have 'noaux_tc'"),
    "layer frequency": ({"moe_layer_freq": 2}, "moe_layer_freq 2, but must have 1"),
    "int4": (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        "quant_method 'compressed-tensors', but must have 'fp8'",
    ),
    "e5m2": ({"quantization_config": {"fmt": "e5m2"}}, "fmt 'e5m2', but must have 'e4m3'"),
    "block": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        "weight_block_size [64, 64], but must have [128, 128]",
    ),
    "rope type": ({"rope_scaling": {"type": "linear", "factor": 2}}, "type 'linear', but must be"),
    "rope type 5": (
        {"rope_scaling": None, "rope_parameters": {"rope_type": "llama3"}},
        "type 'llama3', but must be",
    ),
    "rope key": (
        {"rope_scaling": YARN | {"short_factor": [1]}},
        "rope_scaling has ['short_factor']",
    ),
    "rope by layer": (
        {"rope_scaling": None, "rope_parameters": {"full_attention": {}}},
        "has ['full_attention']",
    ),
    "no factor": ({"rope_scaling": {"type": "yarn"}}, "'yarn' lacks 'factor'"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, but must have 1"),
    "partial rope 5": (
        {"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5, but must have 1",
    ),
    "null": ({"n_group": None}, "n_group is None, but must be of type int"),
    "text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', but must be of type float"),
    "negative": ({"hidden_size": -1}, "hidden_size is -1, but must be at least 1"),
    "odd rope": ({"qk_rope_head_dim": 5}, "qk_rope_head_dim is 5"),
    "groups": ({"n_group": 5}, "n_routed_experts 16 is not a multiple of n_group 5"),
    "topk_group": ({"topk_group": 5}, "topk_group 5 is larger than n_group 4"),
    "too many experts": ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the 8"),
    "one a group": ({"n_group": 16, "topk_group": 8}, "n_group 16 leaves one expert a group"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn: give bfloat16"),
    "no dtype": ({"torch_dtype": "half_a_byte"}, "half_a_byte: give bfloat16"),
    "width": ({"vocab_size": 96}, "has shape [97, 32], but must have [96, 32]"),
    "too few experts": ({"n_routed_experts": 12}, "has the unknown tensor model.layers.1.mlp.exp"),
    "too many layers": ({"num_hidden_layers": 5}, "lacks the tensor model.layers.4."),
}


@pytest.mark.parametrize("changes, sentence", CONFIG_REFUSALS.values(), ids=CONFIG_REFUSALS)
def test_config_refused(changes, sentence, saved_by_us):
    edit_json(saved_by_us / "config.json", **changes)
    check_refusal(saved_by_us, sentence)


def check_refusal(directory: Path, sentence: str, error: type[Exception] = ValueError):
    with pytest.raises(error) as refusal:
        DeepSeekV3.from_pretrained(directory)
    text = str(refusal.value)
    assert sentence in text and text.endswith(".") and "\n" not in text, text


Q = "model.layers.1.self_attn.q_b_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EMBED, EXPERT = "model.layers.3.embed_tokens.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
TENSOR_REFUSALS = {
    "missing": (lambda x: x.pop(Q), f"lacks the tensor {Q} (and 0 more)"),
    "no bias": (lambda x: x.pop(BIAS), f"lacks the tensor {BIAS}"),
    "no expert": (lambda x: x.pop(EXPERT), f"lacks the tensor {EXPERT}"),
    "surplus": (lambda x: x.update(extra=torch.ones(2)), "has the unknown tensor extra"),
    "misshapen": (lambda x: x.update({Q: x[Q].T.contiguous()}), f"{Q} in "),
    "int8": (lambda x: x.update({Q: x[Q].to(torch.int8)}), "is I8, but must be one of ['BF16'"),
    "e5m2": (lambda x: x.update({Q: x[Q].to(torch.float8_e5m2)}), "is F8_E5M2, but must be"),
    "no scale": (
        lambda x: x.update({Q: x[Q].to(torch.float8_e4m3fn)}),
        f"lacks the tensor {Q}_scale_inv",
    ),
    "surplus scale": (
        lambda x: x.update({f"{Q}_scale_inv": torch.ones(1, 1)}),
        f"has the unknown tensor {Q}_scale_inv",
    ),
    "misshapen scale": (
        lambda x: x.update({Q: x[Q].to(torch.float8_e4m3fn), f"{Q}_scale_inv": torch.ones(2, 1)}),
        f"{Q}_scale_inv in ",
    ),
    "half an MTP module": (
        lambda x: x.pop("model.layers.3.eh_proj.weight"),
        "has the unknown tensor model.layers.3.embed_tokens.weight",
    ),
    "another embedding": (lambda x: x[EMBED].add_(1), f"{EMBED} in "),
}


@pytest.mark.parametrize("change, sentence", TENSOR_REFUSALS.values(), ids=TENSOR_REFUSALS)
def test_tensors_refused(change, sentence, saved_by_us):
    edit_tensors(saved_by_us, change)
    check_refusal(saved_by_us, sentence)


def test_tensors_that_may_be_there_or_not(saved_by_us, tmp_path):
    """The MTP copies may be absent, old files carry RoPE's frequencies, tied ones the head."""
    expected = DeepSeekV3.from_pretrained(saved_by_us).state_dict()

    def change(x):
        del x[EMBED], x["model.layers.3.shared_head.head.weight"]
        x["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    edit_tensors(saved_by_us, change)
    again = DeepSeekV3.from_pretrained(saved_by_us).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in expected.items())

    ours(depth=1, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    embed = "model.embed_tokens.weight"
    edit_tensors(tmp_path / "tied", lambda x: x.update({"lm_head.weight": x[embed].clone()}))
    DeepSeekV3.from_pretrained(tmp_path / "tied")
    edit_tensors(tmp_path / "tied", lambda x: x["lm_head.weight"].add_(1))
    check_refusal(tmp_path / "tied", f"lm_head.weight in {tmp_path / 'tied'} differs from {embed}")


def test_files_refused(saved_by_us, tmp_path):
    weights, config = saved_by_us / "model.safetensors", saved_by_us / "config.json"
    whole = weights.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        weights.write_bytes(whole[:cut])
        check_refusal(saved_by_us, f"{weights} is truncated or not safetensors")
    weights.unlink()
    check_refusal(saved_by_us, "has neither model.safetensors nor", FileNotFoundError)
    weights.write_bytes(whole)

    split(saved_by_us, lambda name: "layers.2" in name)
    assert DeepSeekV3.from_pretrained(saved_by_us).config.num_hidden_layers == 3
    index, second = saved_by_us / INDEX, saved_by_us / "model-00002-of-00002.safetensors"
    names = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=names | {"model.ghost": second.name})
    check_refusal(saved_by_us, f"promises model.ghost (and 0 more) in {second.name}")
    edit_json(index, weight_map=names)
    second.rename(tmp_path / "elsewhere")
    check_refusal(saved_by_us, f"{second} is missing", FileNotFoundError)
    edit_json(index, weight_map=None)
    check_refusal(saved_by_us, "has no 'weight_map'")
    index.write_text("[]")
    check_refusal(saved_by_us, "holds a list, but must hold an object")
    index.write_text("{")
    check_refusal(saved_by_us, f"{index} is not valid JSON")
    config.unlink()
    check_refusal(saved_by_us, f"{config} is missing", FileNotFoundError)
    with pytest.raises(ValueError, match=r"cannot be opened as torch\.int8: give bfloat16"):
        ours().save_pretrained(tmp_path / "a")
        DeepSeekV3.from_pretrained(tmp_path / "a", dtype=torch.int8)


# ---- The real configurations ---------------------------------------------------------------------


def meta_model(name: str) -> DeepSeekV3:
    """config/NAME.py, built without memory."""
    path = Path(__file__).parent.parent / "config" / f"{name}.py"
    keys = {key: x for key, x in runpy.run_path(str(path)).items() if not key.startswith("__")}
    with torch.device("meta"):
        return DeepSeekV3(ModelConfig(**keys))


REAL = {  # total, active, MTP; numbers in the cache per token: ours, multi-head attention's
    "v3_671b": (671_026_419_200, 37_552_297_472, 11_610_068_224, 35_136, 1_998_848),
    "moonlight_16b": (15_960_110_208, 2_914_776_192, 0, 15_552, 110_592),
    "kimi_k2": (1_026_408_232_448, 32_861_500_928, 0, 35_136, 999_424),
}


@pytest.mark.parametrize("name", REAL)
def test_sizes_of_the_real_models(name):
    model = meta_model(name)
    assert (*model.parameter_counts().values(), *model.config.cache_numbers()) == REAL[name]
