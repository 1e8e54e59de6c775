"""Does llama.cpp compute the same network from our file? An oracle that shares no line with us.

Random networks go through the real exporter, and llama.cpp (its wheel xllamacpp) has to give the
same greedy tokens and, in float32, the same log-probabilities of the whole vocabulary to 1e-3.
"""

import json
import math
import shutil
import urllib.request
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import regex
import test_model
import torch
from tiktoken_ext.openai_public import r50k_pat_str

import huggingface
from model import DeepSeekV3
from prepare_data import read_stdlib
from sample import generate
from support.gguf import write_gguf
from support.llama_cpp import llama_cpp
from support.settings import Refusal
from support.tokenizer import (
    PATTERN,
    encoding_from,
    stored_tokenizer,
    tokenizer_of,
    train_bpe,
    write_tokenizer,
)

gguf = pytest.importorskip("gguf", reason="gguf, which writes the files, is not installed")
llama = pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp's wheel, is not installed")

TEXT = "def f(x):\n    return x + 1\n\nprint(f(2), 'in the end', \"don't\")\n" * 3
YARN = dict(type="yarn", factor=8, original_max_position_embeddings=16, mscale=1, mscale_all_dim=1)
V3 = test_model.TINY | dict(vocab_size=300, rms_norm_eps=1e-6, max_position_embeddings=128)
NEVER = [*range(128, 256), 298]  # ids of halves of characters, and the end
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
def folder(tmp_path_factory) -> Path:
    """A run's folder without weights: the tokenizer alone."""
    path = tmp_path_factory.mktemp("run")
    ranks = train_bpe([TEXT], 298, PATTERN)
    encoding = encoding_from(ranks, PATTERN, {"<|endoftext|>": len(ranks)})
    write_tokenizer(tokenizer_of(encoding), path)
    return path


@pytest.fixture
def export(folder, tmp_path):
    """Writes a network as a run does and exports it by the command: the model and the file."""

    def call(dtype: str = "F32", **changes) -> tuple[DeepSeekV3, Path]:
        model = test_model.tiny(torch.float32, **V3 | changes)
        run, file = shutil.copytree(folder, tmp_path / "run"), tmp_path / "x.gguf"
        saved = {"model_config": asdict(model.config), "model": model.state_dict()}
        torch.save(saved | {"trained_length": 96}, run / "ckpt.pt")
        huggingface.main([str(run), str(file), f"--gguf_dtype={dtype}"])
        return model, file

    return call


def serve(file: Path):
    """llama.cpp's server, its cache in float32, too."""
    params = llama.CommonParams()
    params.model.path, params.verbosity, params.fit_params = str(file), -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama.Server(params)


def complete(server, prompt: str | list[int], tokens: int, **options) -> dict:
    """llama.cpp's greedy text, without tokens that are half a character, of which its server
    reports no probabilities."""
    request = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "cache_prompt": False}
    request["logit_bias"] = [[i, False] for i in NEVER]
    answer = server.handle_completions(request | options)
    assert "choices" in answer, answer
    return answer["choices"][0]


def greedy(server, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """llama.cpp's next tokens, and the log-probabilities that it had for each (tokens, 300)."""
    steps = complete(server, prompt, tokens, n_probs=300)["logprobs"]["content"]
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


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0"])
def test_other_formats_hold_the_weights_as_rounded(dtype, export, folder):
    """llama.cpp multiplies by what the file holds, as well as it can in that format."""
    wide = dict(hidden_size=64, moe_intermediate_size=32, kv_lora_rank=32)
    model, file = export(dtype, **wide)
    stored = {x.name: x for x in gguf.GGUFReader(file).tensors}
    kinds = {name: x.tensor_type.name for name, x in stored.items()}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down_exps.weight"] == dtype
    assert kinds["blk.1.attn_k_b.weight"] == ("F16" if dtype == "Q8_0" else dtype)  # rows of 6
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"
    embedding = stored["token_embd.weight"]
    read = torch.tensor(gguf.dequantize(embedding.data, embedding.tensor_type))
    error = (read - model.embed_tokens.weight).abs().max() / model.embed_tokens.weight.abs().max()
    assert 0 < error < {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127}[dtype]
    ids, _ = greedy(serve(file), [5, 6, 7], 8)
    assert len(ids) == 8


def test_text_goes_in_and_comes_out_and_ends(export, folder):
    _, file = export()
    server, tokenizer = serve(file), stored_tokenizer(folder)
    prompt = tokenizer.encode(TEXT[:40])
    ids, _ = greedy(server, prompt, 12)
    assert complete(server, TEXT[:40], 12)["text"] == tokenizer.decode(ids)
    ended = complete(server, TEXT[:40], 12, logit_bias=[[tokenizer.eos[0], 100]])
    assert (ended["finish_reason"], ended["text"]) == ("stop", "")
    fields = gguf.GGUFReader(file).fields
    assert fields["deepseek2.context_length"].contents() == 96
    assert not fields["tokenizer.ggml.add_bos_token"].contents()


def ids_by_llama_cpp(server, text: str) -> list[int]:
    request = {"content": text, "add_special": False, "parse_special": False}
    body, kind = json.dumps(request).encode(), {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{server.listening_address}/tokenize", body, kind)
    return json.load(urllib.request.urlopen(call))["tokens"]


@pytest.mark.parametrize("pattern", [PATTERN, r50k_pat_str], ids=["ours", "gpt2"])
def test_texts_become_the_same_ids(pattern, tmp_path):
    """But for several blanks before a number, as the exporter says, which are made one here."""
    every_character = "".join(map(chr, [*range(0x3400), *range(0xA000, 0xB000)]))
    texts = [text for _, text in sorted(read_stdlib().items())[::20]]
    ranks = train_bpe([*texts[::4], every_character], 1500, pattern)
    encoding = encoding_from(ranks, pattern, {"<|endoftext|>": len(ranks)})
    model = test_model.tiny(torch.float32, **V3 | {"vocab_size": len(ranks) + 1})
    write_gguf(
        tmp_path / "x.gguf", model.state_dict().items(), asdict(model.config), encoding, "F16"
    )
    server = serve(tmp_path / "x.gguf")
    if pattern == PATTERN:
        assert ids_by_llama_cpp(server, "x =   1") != encoding.encode_ordinary("x =   1")
        texts = [regex.sub(r"\s{2,}(?=\p{N})", "\n", text) for text in texts]
    for text in texts:
        assert ids_by_llama_cpp(server, text) == encoding.encode_ordinary(text)


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


def test_other_weights_and_tokenizers_are_refused(folder, tmp_path):
    ours, config = stored_tokenizer(folder).encoding, asdict(test_model.tiny(**V3).config)
    other = encoding_from(ours._mergeable_ranks, r"\w+|\W", {"<|endoftext|>": 299})
    bias = {"layers.0.self_attn.q_proj.bias": torch.zeros(3)}
    for words, tensors, encoding in (
        ("layers.0.self_attn.q_proj.bias is no weight", bias, ours),
        ("tokenizer splits", {}, None),  # that of a tokenizer.json
        ("tokenizer splits", {}, other),
    ):
        with pytest.raises(Refusal, match=words):
            write_gguf(tmp_path / "x.gguf", tensors.items(), config, encoding, "F32")
        assert not list(tmp_path.iterdir())


def test_the_command_tells_what_differs_and_a_failure_leaves_the_old_file(
    export, tmp_path, monkeypatch, capsys
):
    _, file = export(num_nextn_predict_layers=1)
    told, before = capsys.readouterr().err, file.read_bytes()
    assert "left out the MTP modules" in told and "several blanks before a number" in told
    full = mock.Mock(side_effect=OSError("no space left on device"))
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="no space"):
        huggingface.main([str(tmp_path / "run"), str(file), "--overwrite"])
    assert file.read_bytes() == before


def test_the_benchmark_has_the_same_text():
    model = test_model.tiny(torch.float32, **V3)
    prompt = torch.randint(256, (1, 24))
    text = generate(model, prompt, 16, temperature=0, speculative=0)
    with llama_cpp(model, "float32", text, 16) as complete:
        assert complete(prompt).equal(text)
