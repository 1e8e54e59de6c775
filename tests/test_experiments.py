"""What the experiments measure is what they say; figures and tables are those of the JSON files."""

import importlib
import json
import math
import os
import re
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path
from unittest import mock

import attention
import balance
import expert_parallel
import experts
import fp8_error
import fp8_loss
import intervals
import long_context
import longer
import mtp
import numpy as np
import page
import pytest
import run
import speculation
import tables
import token_classes
import torch
import torch.nn.functional as F
import unseen

import fp8
import prepare_data
import train
from model import DeepSeekV3, ModelConfig
from support import ops
from support.tokenizer import END_OF_TEXT, load_tokenizer
from support.tokens import load_dataset

ROOT = Path(__file__).parent.parent
MODULES = [importlib.import_module(x.stem) for x in sorted((ROOT / "experiments").glob("*.py"))]
EXPERIMENTS = {x.__name__: x.EXPERIMENT for x in MODULES if hasattr(x, "EXPERIMENT")}
EXPERIMENTS["fp8_accumulation"] = fp8_error.ACCUMULATION


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny corpus of Python files and a configuration, where all runs are made."""
    folder = tmp_path_factory.mktemp("experiments")
    source = folder / "source"
    source.mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    small = ("bisect", "keyword", "this", "token")  # the test text has small files alone
    for path in [*library.glob("co[dlp]*.py"), *(library / f"{name}.py" for name in small)]:
        shutil.copy(path, source)
    settings = prepare_data.DataConfig(
        str(source), "text", str(folder), vocab_size=300, test_fraction=0.4
    )
    data = str(prepare_data.prepare(settings))
    changes = f"data = {data!r}\nvocab_size = 300\nbatch_size = 4\nblock_size = 16\neval_batch = 64"
    (folder / "tiny.py").write_text((ROOT / "config/tiny.py").read_text() + changes)
    return folder


@pytest.fixture
def options(place, monkeypatch) -> run.Options:
    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(run, "code_id", lambda *dtype, **fp8: "this code")
    monkeypatch.setattr(longer, "CONFIG", "tiny.py")
    monkeypatch.setattr(longer, "RUN", "out/tiny")
    monkeypatch.setattr(longer, "LENGTH", 128)
    phase = ["--steps=2", "--block_size=32", "--long_block_size=128", "--long_start=0"]
    monkeypatch.setattr(longer, "PHASE", [*phase, "--max_position_embeddings=128"])
    monkeypatch.setattr(mtp, "NEW", 6)
    monkeypatch.setattr(mtp, "PROMPTS", 1)
    return run.Options(steps=2, seeds="0", config="tiny.py", results="results")


def start(e: run.Experiment, options: run.Options, **changes):
    run.main([f"--{key}={value}" for key, value in (vars(options) | changes).items()], e)


@pytest.fixture(scope="module")
def trained(place) -> run.Trained:
    """An untrained network, as a measure gets it."""
    base = run.Options(config=str(place / "tiny.py")).base() | {"initializer_range": 0.3}
    config = train.TrainConfig(**train.split_configs(base | {"out": str(place / "text")})[1])
    machine = train.Machine(torch.device("cpu"), torch.float32)
    data, folder = train.open_data(config, 300)
    return run.Trained(run.new_network(base, 0).eval(), data, folder, config, machine)


# ---- The runner, on a tiny network ---------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_makes_its_results_once(name, options, capsys, monkeypatch):
    e = EXPERIMENTS[name]
    arms = [arm for arm, x in e.arms(options.base()).items() if not x.rate]
    arms = arms[::2] if name == "mtp" else arms[-1:]  # the others differ in numbers
    if name == "longer":  # it goes on from a run
        arms = list(e.arms(options.base()))
        command = ["tiny.py", "--out=out/tiny", "--steps=4", "--long_block_size=32", "--overwrite"]
        train.main([*command, "--long_start=0.5", "--max_position_embeddings=32"])
        capsys.readouterr()
    changes = {"arms": ",".join(["base", *arms])}
    changes |= {"steps": 12} if name == "long_context" else {}  # the last is in long windows
    before = f"before\n<!-- {name} -->\nold\n<!-- end of {name} -->\nafter\n"
    Path("docs").mkdir(exist_ok=True)
    Path("docs/RESULTS.md").write_text(before)
    start(e, options, **changes)
    printed = capsys.readouterr().out.strip()
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["arm", f"{e.base} (base)" if e.base else "base", *arms]
    shown = f"{printed}\n\n![{name}](figures/{name}.svg)"
    assert Path("docs/RESULTS.md").read_text() == before.replace("old", shown)
    collected = tables.collect(e, options)
    digest = tables.digest(json.dumps(collected))
    assert f"results {digest}" in Path(f"docs/figures/{name}.svg").read_text()
    results = {arm: xs[0] for arm, xs in collected.items() if xs}
    assert [arm for arm, x in results.items() if "against" in x] == arms
    assert all(any(key in x for x in results.values()) for key in e.columns)
    assert all(math.isfinite(x[e.against]) for x in results.values())
    assert not list(Path("out").glob(f"*/{name}-*"))  # of arms nothing else is kept
    monkeypatch.setattr(run, "save_figure", lambda *_: None)
    with mock.patch.object(run, "add_result", side_effect=AssertionError("made again")):
        start(e, options, **changes)


def test_what_makes_a_new_result(options, monkeypatch):
    """Another length, seed, code, setting or stand-in, or what that inherits; not a comment."""
    monkeypatch.setattr(run, "figures_of", lambda trained: {"test_bpb": 1.0})

    def runs(arm=None, **changes) -> int:
        e = run.Experiment("new", lambda base: {"a": arm or run.Arm()}, {"test_bpb": ""})
        with mock.patch.object(run, "train_arm") as trained, mock.patch("shutil.rmtree"):
            start(e, options, **{"arms": "a"} | changes)
        return trained.call_count

    forms = [run.Arm(replace={"model.MLA": form}) for form in attention.FORMS.values()]
    arms = [None, run.Arm({"gamma": 0.5}), run.Arm(longer=2.0), *forms]
    assert [runs(arm) for arm in [*arms, *arms]] == [1] * 7 + [0] * 7
    assert runs(steps=3) == 1 and runs(seeds="0,1") == 1
    for line in "lr = 4e-3", 'dtype = "float64"':
        Path("other.py").write_text(f"{Path('tiny.py').read_text()}\n{line}")
        assert runs(config="other.py") == 1
    base, source = attention.MultiHeadAttention, run.inspect.getsource
    with mock.patch("inspect.getsource", lambda x: "a = 1" if x is base else source(x)):
        assert runs(forms[2]) == 1
    assert run.code_hash("a = 1  # why") == run.code_hash("a  =  1") != run.code_hash("a = 2")
    monkeypatch.setattr(run, "code_id", lambda *dtype, **fp8: "other code")
    assert runs() == 1


def test_code_is_the_same_if_it_trains_alike(monkeypatch):
    """To eight digits: with the twins of ops.py, and without."""
    code_id = run.code_id.__wrapped__
    monkeypatch.setitem(run.SMALL, "steps", 5)
    code = code_id()
    monkeypatch.setattr(ops, "enabled", False)
    assert code_id() == code
    monkeypatch.setattr(train, "lr_at", lambda config, step: config.lr * (1 + 1e-5))
    assert code_id() != code


def test_interrupted_run_goes_on(options):
    """In a step, then in its measurement, whose network is as at the end of the training."""
    nets = []

    def measure(trained):
        nets.append(trained.net)
        if len(nets) == 1:
            raise KeyboardInterrupt
        return {}

    e = replace(EXPERIMENTS["long_context"], name="stop", measure=measure, draw=None)
    options = replace(options, arms="last tenth long", steps=12)
    for moments, steps in ([*[mock.DEFAULT] * 10, KeyboardInterrupt], 11), (None, 3):
        count = mock.patch.object(train, "lr_at", wraps=train.lr_at, side_effect=moments)
        with count as taken, pytest.raises(KeyboardInterrupt):
            start(e, options)
        assert taken.call_count == steps  # the second time after the last checkpoint
    start(e, options)
    torch.testing.assert_close(*(net.state_dict() for net in nets), rtol=0, atol=0)
    for net in nets:
        assert net.config.rope_scaling["factor"] == 4 and net.trained_length == 64


def test_arms_begin_with_the_same_weights_where_shapes_agree(options):
    """Also those with other classes, whose own first weights follow another sequence."""
    first, other = (run.new_network(options.base(), seed).state_dict() for seed in (0, 1))
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    begin = mock.Mock(side_effect=KeyboardInterrupt)
    with mock.patch.object(train, "train", begin), pytest.raises(KeyboardInterrupt):
        start(EXPERIMENTS["attention"], options, arms="MHA", steps=9)
    begun = begin.call_args[0][0].state_dict()
    same = {k for k, v in begun.items() if k in first and torch.equal(v, first[k])}
    other = {k for k, v in begun.items() if k not in first or first[k].shape != v.shape}
    assert same == begun.keys() - other and 0 < len(other) < len(same)


# ---- The test text -------------------------------------------------------------------------------


def test_an_interval_over_documents_weighs_them_by_their_bytes():
    size = np.array([100.0] * 50 + [300.0] * 50)
    nats = np.array([1.0, 3.0] * 50) * size * math.log(2)
    spread = 1.96 * math.sqrt((size**2).sum()) / size.sum()  # 1 from the mean, either way
    expected = pytest.approx((2 - spread, 2 + spread), abs=0.05)
    assert intervals.over_documents(nats, size) == expected
    assert intervals.over_documents(2 * size * math.log(2), size) == pytest.approx((2, 2))


def test_documents_are_told_apart_by_marks_before_or_after_them():
    """Ours begin with a mark; a release's end with one, and may begin with another."""
    ids = np.array([9, 1, 2, 9, 3, 9, 4])
    assert unseen.documents_of(ids, [9], []).tolist() == [0, 0, 0, 1, 1, 2, 2]
    ids = np.array([8, 1, 2, 9, 8, 3, 9, 8, 9])
    assert unseen.documents_of(ids, [8], [9]).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]


def test_a_run_is_measured_on_its_test_text_in_both_lengths(options, capsys):
    command = ["tiny.py", "--out=out/seen", "--steps=4", "--long_block_size=32", "--overwrite"]
    train.main([*command, "--long_start=0.5"])
    capsys.readouterr()
    unseen.main(["out/seen"])
    lines = capsys.readouterr().out.splitlines()
    data = load_dataset("text")
    files = int((data.test.arrays[0] == data.vocab_size - 1).sum())
    text = load_tokenizer("text").decode(data.test.arrays[0])
    size = len(text.encode()) - files * len(END_OF_TEXT)
    for line, T in zip(lines, (16, 32), strict=True):
        assert f"in windows of {T} tokens" in line and f"{files} files of {size:,} bytes" in line


def test_the_loss_of_documents_is_that_of_all_their_tokens(trained):
    """Of windows by hand, and in sum that of train.evaluate on the same text."""
    T, config = 16, replace(trained.config, eval_batch=7)  # no divisor of the number of windows
    nats, size = unseen.nats_by_document(
        trained.net, trained.data, trained.folder, T, config, trained.machine
    )
    ids = trained.data.test.arrays[0].astype(np.int64)
    encoding = load_tokenizer(trained.folder)
    texts = [x for x in encoding.decode(ids.tolist()).split(END_OF_TEXT) if x]
    assert len(texts) > 1 and size.tolist() == [len(text.encode()) for text in texts]
    begins = [i for i, x in enumerate(ids) if x == encoding.eot_token]
    by_hand = np.zeros(len(ids))
    for start in range(0, len(ids) - 1, T):
        x = torch.from_numpy(ids[start : start + T + 1])
        loss = F.cross_entropy(trained.net(x[None, :-1])[0], x[1:], reduction="none")
        by_hand[start + 1 : start + 1 + len(loss)] = loss.detach()
    assert nats == pytest.approx(np.add.reduceat(by_hand, begins), rel=1e-5)
    data = replace(trained.data, val=trained.data.test, val_bytes_per_token=size.sum() / len(ids))
    result = train.evaluate(trained.net, data, trained.config, trained.machine)
    trained.net.eval()
    share = (len(ids) - 1) / len(ids)  # the first token is predicted by none
    assert unseen.bits_per_byte(nats, size) == pytest.approx(result["val_bpb"] * share, rel=1e-5)


# ---- Stand-ins -----------------------------------------------------------------------------------


def test_grouped_queries_are_heads_that_share_keys_and_values(options):
    config = ModelConfig(**train.split_configs(options.base() | {"num_attention_heads": 4})[0])
    few, many = attention.GroupedQueryAttention(config), attention.MultiHeadAttention(config)
    few.o_proj, few.q_proj = many.o_proj, many.q_proj
    for name in ("k_proj", "v_proj"):
        heads = getattr(few, name).weight.unflatten(0, (2, -1))
        getattr(many, name).weight.data = heads.repeat_interleave(2, 0).flatten(0, 1)
    x, rope = torch.randn(1, 9, config.hidden_size), DeepSeekV3(config).rope(torch.zeros(1, 9), 0)
    y = many(x, rope)
    torch.testing.assert_close(few(x, rope), y)
    torch.testing.assert_close(many(x[:, :5], [table[:5] for table in rope]), y[:, :5])  # causal


def test_arms_of_the_base_configuration_are_as_large_as_they_say(monkeypatch):
    base, total, active = run.Options(config=str(ROOT / "experiments/base.py")).base(), {}, {}
    forms = attention.arms(base)
    for name, arm in {"base": run.Arm(), **forms, **experts.arms(base)}.items():
        with torch.device("meta"), monkeypatch.context() as patch:
            for item in arm.replace.items():
                patch.setattr(*item)
            count = run.new_network(base | arm.settings, 0).parameter_counts()
        total[name], active[name] = count["total"], count["active"]
    assert active == dict.fromkeys(active, pytest.approx(active["base"], rel=0.01))
    assert [total[name] for name in forms] == [pytest.approx(total["base"], rel=0.01)] * len(forms)
    heads = [forms[name].settings["v_head_dim"] for name in ("MHA", "MHA normed", "GQA 2", "MQA")]
    assert heads == [22, 22, 29, 35]  # attention_step.py's


def test_the_batch_wise_loss_takes_a_batch_as_one_sequence():
    """Two sequences that prefer an expert each are even together, as uneven as can be alone."""
    s = torch.full((2, 6, 2), 0.001)
    s[0, :, 0] = s[1, :, 1] = 1.0
    assert balance.batch_wise(s, 1).item() == pytest.approx(1, rel=1e-3)
    assert balance.sequence_wise(s, 1).item() == pytest.approx(2, rel=0.01)


def test_norms_of_keys_and_values_are_each_heads_own(options):
    config = ModelConfig(**train.split_configs(options.base())[0])
    normed = attention.NormedMultiHeadAttention(config)
    plain = attention.MultiHeadAttention(config)
    plain.load_state_dict(normed.state_dict(), strict=False)
    h = torch.randn(2, 5, config.hidden_size)
    for x, y in zip(plain.keys_and_values(h), normed.keys_and_values(h), strict=True):
        expected = F.normalize(x, dim=-1) * x.shape[-1] ** 0.5
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    normed.k_norm.weight.data.mul_(3)
    assert torch.equal(normed.keys_and_values(h)[1], y)


@pytest.mark.parametrize("block", [fp8.TILE, fp8.BLOCK])
def test_contrast_has_one_scale_and_loses_small_tokens(block):
    x = torch.randn(2, 100, 200, generator=torch.Generator().manual_seed(0))
    x[:, :10] *= 1e-6
    _, tiles = fp8.quantize(x, block, pow2=True)
    q, one = fp8_error.one_scale(x, block, pow2=True)
    assert one.shape == tiles.shape and one.unique() == tiles.max()
    decoded = fp8.dequantize(q, one, block)
    assert not decoded[:, :10].any()  # below E4M3's smallest
    assert torch.equal(fp8_error.one_scale(x, block, pow2=True, decode=True)[0], decoded)


def test_a_group_is_aligned_to_its_largest_and_cut_to_14_bits():
    def add(total: float, *products: float) -> float:
        group = torch.zeros(1, 1, fp8_error.GROUP)
        group[..., : len(products)] = torch.tensor(products)
        return fp8_error.add_group(torch.tensor([[total]]), group).item()

    assert add(0.0) == 0.0 and add(0.0, 3.0, -1.25) == 1.75
    assert add(1.0, 2.0**-13) == 1 + 2.0**-13  # 14 bits, the leading one counted
    assert add(1.0, *[2.0**-14] * 32) == 1.0  # together 2^-9, but cut off one by one
    assert add(0.0, *[2.0**-14] * 32) == 2.0**-9  # nothing larger among them
    assert add(2.0**-20, 1.0) == 1.0  # the total is aligned too
    assert add(8.0, 0.75 * 2.0**-10) == 8.0 == add(8.0, -0.75 * 2.0**-10)  # towards zero
    assert add(8.0, 2.75 * 2.0**-10) == 8.0 + 2.0**-9
    assert add(16383.0, 16383.0, 1.0) == 32766.0  # 32767 has 15 bits
    assert add(-16383.0, -16383.0, -1.0) == -32766.0


def test_promoted_sums_err_as_if_K_were_the_interval(monkeypatch):
    """Up to the first promotion all are alike; after it only the sum that goes on errs more."""
    monkeypatch.setattr(fp8_error, "LENGTHS", [128, 1024])
    monkeypatch.setitem(fp8_error.INTERVALS, "never", 1024)
    found = {name: fp8_error.sum_error(name, 0) for name in ("base", *fp8_error.INTERVALS)}
    assert found["never"]["uniform_128"] == found["every 128"]["uniform_128"]
    assert found["never"]["uniform_1024"] > 10 * found["never"]["uniform_128"]
    assert found["every 128"]["uniform_1024"] < found["every 128"]["uniform_128"]
    for kind in fp8_error.NUMBERS:
        order = [found[name][f"{kind}_1024"] for name in ("base", *reversed(fp8_error.INTERVALS))]
        assert order == sorted(order) and order[0] < 1e-6 and len({*order}) == 5


def test_contrast_of_gradients_changes_backward_alone(monkeypatch):
    layer, x = fp8.FP8Linear(128, 128), torch.randn(128, 128, requires_grad=True)
    dy = torch.randn(128, 128) * torch.logspace(-6, 0, 128)[:, None]  # tokens of very unlike size
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    for item in fp8_loss.ARMS["gradients in blocks"].replace.items():
        monkeypatch.setattr(*item)
    other = layer(x)
    (dx_other,) = torch.autograd.grad(other, x, dy)
    assert torch.equal(y, other) and dx[0].any() and not dx_other[0].any()


# ---- Experts on several processes ---------------------------------------------------------------


def test_experts_on_four_processes_are_the_layer_in_one():
    """In float64, forward and backward: each process compares, or raises. A token of two nodes
    begins on either as often, so what is counted is near what is computed."""
    found = expert_parallel.measure(str(ROOT / "experiments/base.py"))
    rows = [[*x.values()] for x in found.values()]
    assert rows[0][0] > rows[1][0] > rows[2][0] == 1  # nodes that a token visits
    for _, between, computed, within, computed_within in rows:
        assert between == pytest.approx(computed, rel=0.05)
        assert within == pytest.approx(computed_within, rel=0.05)


# ---- Measures ------------------------------------------------------------------------------------

CODE = {  # by token of the text: the class of its first character that is no space
    b'"""A."""': "docstring", b"\n": "space", b"import": "keyword", b" x": "name",
    b"  # why": "comment", b"\n\n": "space", b"def": "keyword", b" f": "name", b"():": "operator",
    b"\n ": "space", b" return": "keyword", b" 12": "number", b" +": "operator", b" '": "string",
    b"\xc3\xa9": "string", b"'\n": "string",
}  # fmt: skip


def test_classes_are_those_of_pythons_tokeniser(monkeypatch):
    """<|endoftext|> parts documents, and one that is no Python has none."""
    pieces, end = [*CODE, b"", b"def ("], len(CODE)
    fake = mock.Mock(eot_token=end, decode_tokens_bytes=lambda ids: [pieces[i] for i in ids])
    monkeypatch.setattr(token_classes, "load_tokenizer", lambda folder: fake)
    ids = np.array([*range(end), end, end + 1, end, *range(end)])
    names = [("-", *token_classes.CLASSES)[i + 1] for i in token_classes.classes_of(ids, Path())]
    assert names == [*CODE.values(), "-", "-", "-", *CODE.values()]


def test_information():
    assert token_classes.information(np.eye(4) * 7) == pytest.approx(2)
    assert token_classes.information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0)
    assert token_classes.information(np.zeros((3, 2))) == 0


@torch.no_grad()
def test_visits_by_domain_are_the_routing_of_their_texts(trained):
    found = token_classes.visits_by_domain(trained, 64)
    visits = np.array(found["domain_visits"])
    for domain, ids in enumerate(token_classes.domain_texts(trained, 64)):
        trained.net.trunk(torch.from_numpy(ids).view(-1, 16))
        for layer, chosen in enumerate(trained.net.routing):
            counts = chosen.flatten().bincount(minlength=visits.shape[2])
            assert visits[layer, domain].tolist() == counts.tolist()
    bits = [token_classes.information(layer) for layer in visits]
    assert found["domain_bits"] == pytest.approx(np.mean(bits)) and 0 < np.mean(bits) < math.log2(3)


@torch.no_grad()
def test_visits_are_all_known_tokens_to_all_their_experts(place, trained):
    found = token_classes.expert_visits(trained)
    visits, ids = np.array(found["visits"]), trained.data.val.arrays[0].astype(int)
    ids = ids[: len(ids) // 16 * 16]
    classes = token_classes.classes_of(ids, place / "text")
    known = np.bincount(classes[classes >= 0], minlength=8)
    assert visits.shape == (2, 8, 8) and (visits.sum(2) == 2 * known).all() and known.sum() > 100
    trained.net(torch.from_numpy(ids[:16])[None])
    for layer, chosen in zip(visits, trained.net.routing[:2], strict=True):
        assert layer[classes[5], chosen[0, 5]].all()
    bits = [token_classes.information(layer) for layer in visits]
    assert found["bits"] == bits and found["mean_bits"] == pytest.approx(np.mean(bits))


def test_acceptance_on_given_text():
    """Sure where the module draws as the model does, 0 where it never does."""
    logits = torch.randn(2, 6, 9) * 3
    never = F.one_hot(logits[:, 1:].argmin(-1), 9) * 1e4
    for draft, greedy, at_08 in (logits[:, 1:], 1, (0.999, 1.001)), (never, 0, (0, 0.1)):
        found = mtp.on_given_text(lambda tokens, return_mtp, d=draft: (logits, [d]), None)
        assert (found["given_greedy"] == greedy).all()
        assert at_08[0] <= found["given_0.8"].min() <= found["given_0.8"].max() <= at_08[1]


@torch.no_grad()
def test_loss_by_position_is_the_models(trained):
    found = long_context.measure(trained)
    T, ids = 64, torch.from_numpy(trained.data.test.arrays[0].astype(int))
    n = (len(ids) - 1) // T
    main = trained.net(ids[: n * T].view(n, T), ids[1 : n * T + 1].view(n, T))["loss"]
    assert np.mean(found["by_position"]) == pytest.approx(main.item(), rel=1e-5)
    assert found["by_position"] != found["by_position_yarn"]
    assert found["beyond"] == pytest.approx(np.mean(found["by_position"][-4:]))
    assert trained.net.config.rope_scaling is None


def test_allowed_speed_up_and_repeats():
    theorem = (1 - 0.8**3) / ((1 - 0.8) * (2 * 0.1 + 1))
    assert speculation.allowed([0.8, 0.64], 0.1, 1.0) == pytest.approx(theorem)
    assert speculation.repeats([1, 2, 3, 1, 2, 3, 4], n=3) == pytest.approx(1 / 5)


@torch.inference_mode()
def test_table_of_drafts(trained):
    """Greedily every number of drafts, made by the module or copied, writes the same texts."""
    options = speculation.SpeculationOptions(rounds=1, new_tokens=12)
    prompts = [trained.data.val.arrays[0][:20].tolist(), [1, 2, 3, 4] * 5]
    table = speculation.speculation(trained.net, prompts, options, False, 0.0)
    assert [row["drafts"] for row in table.rows[:5]] == ["0", "1", "2", "3", "4"]
    assert [row["same texts"] for row in table.rows] == ["2/2"] * 7
    assert table.rows[0]["tokens/forward"] == 1
    assert ["allowed" in row for row in table.rows] == [False, *[True] * 4, False, False]


# ---- The page of experts -------------------------------------------------------------------------

IDS, WORDS = [5, 6, 7, 8, 9, 10], ["<b>&", "</script>", "é\n"]


@pytest.fixture
def html(trained, tmp_path, monkeypatch) -> str:
    words = mock.Mock(encode=lambda text: IDS, to_bytes=lambda i: WORDS[i % 3].encode(), eos=[])
    monkeypatch.setattr(page, "load_model", lambda *_: (trained.net, words, tmp_path))
    (tmp_path / "a.py").write_text("class A")
    page.main([f"--out={tmp_path}/page.html", f"--text={tmp_path}/a.py", "--start=class"])
    return (tmp_path / "page.html").read_text("utf-8")


@torch.no_grad()
def test_page_has_every_tokens_experts_and_drafts(html, trained):
    (tokens,) = json.loads(re.search(r'(?s)id="data">(.*?)</script>', html)[1])["texts"]
    logits, (draft,) = trained.net(torch.tensor([IDS]), return_mtp=True)
    for i, token in enumerate(tokens):
        for layer, chosen in zip(token["experts"], trained.net.routing[:2], strict=True):
            experts, weights = zip(*layer, strict=True)
            assert {*experts} == {*chosen[0, i].tolist()}
            assert weights == (*sorted(weights, reverse=True),)
            assert sum(weights) == pytest.approx(1, rel=0.01)
    choices, drafts = ([WORDS[j % 3] for j in x[0].argmax(-1)] for x in (logits, draft))
    assert [t["choice"] for t in tokens] == [None, *choices[:-1]]
    assert [t["draft"] for t in tokens] == [None, None, *drafts[:-1]]
