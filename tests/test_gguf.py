"""Does llama.cpp compute the same network from our file? An oracle that shares no line with us.

Random networks go through the real exporter, and llama.cpp has to give the same greedy tokens and,
in float32, the same log-probabilities of the whole vocabulary to 1e-3. Its wheel is xllamacpp.
"""

import math
from dataclasses import asdict
from pathlib import Path

import networks
import pytest
import torch
from test_sample import make_run

import huggingface
from model import DeepSeekV3, ModelConfig
from support.gguf import stored_type, write_gguf
from support.settings import Refusal
from support.tokenizer import stored_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf, which writes the files, is not installed")

pytestmark = pytest.mark.usefixtures("v3")  # llama.cpp knows no other network
TEXT = "def f(x):\n    return x + 1\n\nprint(f(2), 'in the end', \"don't\")\n" * 30
YARN = dict(type="yarn", factor=8, original_max_position_embeddings=16, mscale=1, mscale_all_dim=1)
V3 = networks.SIZES | dict(vocab_size=300, rms_norm_eps=1e-6, max_position_embeddings=128)
NEVER = [*range(128, 256), 293]  # ids of halves of characters, and the end
VARIANTS = {
    "as V3, without YaRN": {},
    "YaRN": dict(rope_scaling=YARN),
    "YaRN, another mscale": dict(rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=0.7)),
    "YaRN, no ramp": dict(rope_scaling=YARN | dict(original_max_position_embeddings=512)),
    "Moonlight": dict(n_group=1, topk_group=1, q_lora_rank=None, n_shared_experts=2)
    | dict(rope_theta=50000.0, routed_scaling_factor=2.446),
    "no query latent, 27 layers": dict(q_lora_rank=None, num_hidden_layers=27),
    "pairs in two halves": dict(rope_interleave=False, rope_theta=100.0),
    "two halves, no query latent": dict(rope_interleave=False, q_lora_rank=None),
    "every group": dict(topk_group=4),
    "gates as they are": dict(norm_topk_prob=False),
    "one matrix for embedding and head": dict(tie_word_embeddings=True),
    "experts everywhere": dict(first_k_dense_replace=0),
    "all dense": dict(first_k_dense_replace=3),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory, lambda vocab_size: networks.tiny(**V3), TEXT)


@pytest.fixture
def export(run, tmp_path):
    """Exports the network of a run: the model and the file."""

    def call(**changes) -> tuple[DeepSeekV3, Path]:
        model, file = networks.tiny(torch.float32, **V3 | changes), tmp_path / "x.gguf"
        saved = {"model_config": asdict(model.config), "model": model.state_dict()}
        torch.save(saved, run / "ckpt.pt")
        huggingface.main([str(run), str(file), "--gguf_dtype=F32"])
        return model, file

    return call


def serve(file: Path):
    """llama.cpp's server, its cache in float32, too."""
    llama = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    params = llama.CommonParams()
    params.model.path, params.verbosity, params.fit_params = str(file), -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama.Server(params)


def greedy(server, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """llama.cpp's next tokens, and the log-probabilities that it had for each (tokens, 300). None
    of them is half a character: of these its server reports no probabilities."""
    request = dict(prompt=prompt, max_tokens=tokens, temperature=0, cache_prompt=False, n_probs=300)
    answer = server.handle_completions(request | {"logit_bias": [[i, False] for i in NEVER]})
    assert "choices" in answer, answer
    steps = answer["choices"][0]["logprobs"]["content"]
    logprobs = torch.full((len(steps), 300), torch.nan)
    for row, step in zip(logprobs, steps, strict=True):
        for token in step["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    return [step["id"] for step in steps], logprobs


@torch.no_grad()
def differences(model: DeepSeekV3, file: Path) -> torch.Tensor:
    """How far the two are apart, token by token; first asserts that the greedy text is the same."""
    prompt = torch.randint(290, (40,)).tolist()
    ids, theirs = greedy(serve(file), prompt, 24)
    logits = model(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]
    assert ids == logits.index_fill(-1, torch.tensor(NEVER), -math.inf).argmax(-1).tolist()
    return (theirs - logits.log_softmax(-1)).abs().amax(-1)


@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_computes_the_same_network(name, export):
    model, file = export(**VARIANTS[name])
    assert differences(model, file).max() < 1e-3
    head = any(x.name == "output.weight" for x in gguf.GGUFReader(file).tensors)
    assert head is not model.config.tie_word_embeddings  # it is not stored twice


@pytest.mark.parametrize(
    "name", ["self_attn.o_proj.bias", "self_attn.k_proj.weight", "norm.weight", "new"]
)
def test_a_parameter_of_an_edit_is_refused(name, run, tmp_path):
    config, encoding = asdict(ModelConfig(**V3)), stored_tokenizer(run).encoding
    with pytest.raises(Refusal, match=f"layers.0.{name} is no weight of DeepSeek-V3"):
        write_gguf(tmp_path / "x.gguf", [(f"layers.0.{name}", torch.ones(3))], config, encoding)
    assert not (tmp_path / "x.gguf").exists()


def test_vectors_and_gates_keep_float32_and_blocks_of_q8_are_whole():
    shapes = {"attn_norm": (32,), "ffn_gate_inp": (4, 32), "attn_q": (4, 32), "attn_kv_a": (4, 33)}
    of = {name: stored_type(f"blk.1.{name}", torch.ones(x), "Q8_0") for name, x in shapes.items()}
    assert list(of.values()) == ["F32", "F32", "Q8_0", "F16"]


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(rope_scaling=YARN | dict(mscale_all_dim=0.5)), "mscale 1, mscale_all_dim 0.5"),
        (dict(rope_scaling=dict(type="yarn", factor=8)), "mscale None"),
        (dict(rope_scaling=YARN | dict(factor=0.5)), "YaRN factor of 0.5"),
        (dict(rope_scaling=YARN | dict(attention_factor=1.0)), "attention_factor 1.0"),
        (dict(rope_scaling=YARN | dict(truncate=False)), "truncate False"),
        (dict(rope_scaling=YARN | dict(beta_fast=1)), "beta_fast 1 and beta_slow 1"),
        (dict(rms_norm_eps=1e-5), "rms_norm_eps 1e-05"),
        (dict(num_hidden_layers=26), "q_lora_rank 10 and 26 layers"),
        (dict(num_hidden_layers=27), "q_lora_rank 10 and 27 layers"),
        (dict(attention_bias=True), "attention_bias True"),
        (dict(n_shared_experts=0), "n_shared_experts 0"),
        (dict(routed_scaling_factor=0.0), "routed_scaling_factor 0"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes, word, export, tmp_path):
    with pytest.raises(Refusal, match=word) as error:
        export(**changes)
    assert "give a directory as DST" in str(error.value)
    assert not list(tmp_path.glob("*.gguf"))
