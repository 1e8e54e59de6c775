"""A release on one's own text, end to end: prepare with its tokenizer, train on, sample, give back.

A small random network, made by transformers, stands for the release. It has what Moonlight has: one
group, no MTP module, a tiktoken.model, more rows than ids.
"""

import base64
import json
import logging
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from safetensors.torch import load_file
from test_huggingface import HF_SIZES, theirs
from training import log_of
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import huggingface
import prepare_data as pd
import sample
import train
from load import load_model
from support.release_tokenizer import KIMI_PATTERN
from support.tokenizer import PATTERN, stored_tokenizer, train_bpe
from support.tokens import load_dataset

pytestmark = pytest.mark.usefixtures("v3")
SHORT = ["--batch_size=2", "--block_size=16", "--eval_every=2"]
SHORT += ["--dtype=float32"]
ON = ["--init_from=release", *SHORT]
MARK = "<|im_user|>"
PROMPT = "Größe of line 17 is"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "level", logging.CRITICAL)
    monkeypatch.setattr(train, "show_result", lambda *arguments: None)


def make_release(folder: Path):
    """Its end token is told by name only, and ids without a token lie before it."""
    keys = {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "vocab_size": 400}
    keys |= {"num_nextn_predict_layers": 0, "eos_token_id": None, "bos_token_id": None}
    config = DeepseekV3Config(**HF_SIZES | keys)
    model = DeepseekV3ForCausalLM(config)
    for layer in model.model.layers[1:]:
        torch.nn.init.uniform_(layer.mlp.gate.e_score_correction_bias, -1, 1)
    model.save_pretrained(folder)
    ranks = train_bpe([text(i) for i in range(9)], 380, PATTERN)
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    names = {"390": "[BOS]", "391": "[EOS]", "392": MARK}
    added = {i: {"content": name, "special": True} for i, name in names.items()}
    told = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": {"content": "[EOS]"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "tokenization_moonshot.py").write_text("# transformers runs it\n")


def text(number: int) -> str:
    lines = [f"Größe of line {i} is {number * i}, 中文 don't\n" for i in range(number % 3 + 1)]
    return "".join(lines)


def expected_ids(folder: Path, document: str) -> list[int]:
    """The ids of a document of a token file, as the release's own code makes them."""
    lines = map(bytes.split, (folder / "tiktoken.model").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {"[BOS]": 390, "[EOS]": 391, MARK: 392}
    keys = dict(pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    own = tiktoken.Encoding("x", **keys)
    return [*own.encode(document, allowed_special="all"), 391]


def prepare(name: str, tokenizer: str) -> Path:
    asked = {"val_fraction": 0.1, "test_fraction": 0.2, "tokenizer": tokenizer}
    return pd.prepare(pd.DataConfig("texts.jsonl", name, **asked))


def write_texts() -> list[str]:
    """A hundred documents, every third of which has one of the release's marks."""
    documents = [MARK * (i % 3 == 0) + text(i) for i in range(100)]
    lines = (json.dumps({"text": document}) for document in documents)
    Path("texts.jsonl").write_text("\n".join(lines))
    return documents


def test_the_text_is_prepared_as_the_release_reads_it(monkeypatch):
    make_release(Path("release"))
    documents = write_texts()
    folder = prepare("mine", "release")
    data = load_dataset(folder)
    assert data.vocab_size == 393
    made = expected_ids(Path("release"), "\n".join(documents))
    assert made.count(392) == 34  # a mark is one token

    named = {f"texts.jsonl:{i}": document for i, document in enumerate(documents)}
    parts = pd.split_documents(named, 0.1, 0.2)
    for tokens, part in zip((data.train, data.val, data.test), parts, strict=True):
        found = iter(tokens.arrays[0].tolist())
        for document in part[:7]:
            expected = expected_ids(Path("release"), document)
            assert [next(found) for _ in expected] == expected
    size = sum(len(document.removeprefix(MARK).encode()) for document in parts[1])
    assert data.val_bytes_per_token == pytest.approx(size / len(data.val), rel=1e-12)

    monkeypatch.setattr("support.tokens.PIECE", 60)  # characters; a piece at a time is encoded
    pieces = load_dataset(prepare("pieces", "release"))
    for split in "train", "val", "test":
        one, other = getattr(pieces, split).arrays[0], getattr(data, split).arrays[0]
        assert one.tolist() == other.tolist()


def test_a_release_is_trained_sampled_and_given_back(capsys):
    make_release(Path("release"))
    write_texts()
    folder = prepare("mine", "release")

    # At a learning rate of 0 all comes back as it was: gates and correction biases, too.
    train.main([*ON, "--data=mine", "--out=same", "--steps=1", "--lr=0", "--gamma=0"])
    huggingface.main(["same", "unchanged"])
    before, after = (load_file(f"{x}/model.safetensors") for x in ("release", "unchanged"))
    assert before.keys() == after.keys() and any("correction_bias" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    opened = [load_model(x)[0].config for x in ("release", "unchanged")]
    assert opened[0] == opened[1]

    train.main([*ON, "--data=mine", "--out=run", "--steps=6", "--lr=0.01", "--warmup=0"])
    losses = [line["val_loss"] for line in log_of("run") if "val_loss" in line]
    assert losses[-1] < losses[0]

    capsys.readouterr()
    options = ("--temperature=0", "--max_new_tokens=12", "--device=cpu")
    sample.main(["run", f"--prompt={PROMPT}", *options])
    said = capsys.readouterr().out
    huggingface.main(["run", "back"])
    assert "differ from those of transformers by" in capsys.readouterr().err

    # What came out has the release's files, and is to transformers what it is here.
    for file in stored_tokenizer("run").files:
        assert (Path("back") / file.name).read_bytes() == (Path("release") / file.name).read_bytes()
    assert {"tokenizer.tiktoken", "meta.json"}.isdisjoint(x.name for x in Path("back").iterdir())
    hf = theirs(Path("back"), dtype=torch.float32)
    tokenizer, reopened = load_model("run")[1], load_model("back")[1]
    ids = tokenizer.encode(PROMPT)
    assert ids == reopened.encode(PROMPT) and reopened.eos == tokenizer.eos
    assert ids + tokenizer.eos == expected_ids(Path("back"), PROMPT)
    assert hf.generation_config.eos_token_id == tokenizer.eos[0]
    written = hf.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0].tolist()
    shown = [i for i in written[len(ids) :] if i not in tokenizer.eos]
    assert said.rstrip("\n") == (PROMPT + tokenizer.decode(shown)).rstrip("\n")

    # The run and what it gave back are releases as the first one: more text for the same tokens.
    for source in "run", "back":
        other = prepare(f"from_{source}", source)
        assert (other / "meta.json").read_bytes() == (folder / "meta.json").read_bytes()
    train.main(["--init_from=back", "--data=from_run", "--out=on", "--steps=1", *SHORT])
    train.main(["--out=run", "--resume", "--steps=7", "--data=from_back"])
