"""What the experiments measure is what they say; figures and tables are those of the JSON files."""

import importlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import attention
import balance
import claims
import expert_parallel
import experts
import fp8_error
import fp8_loss
import intervals
import long_context
import longer
import mtp
import page
import plan
import run
import speculation
import tables
import token_classes
import unseen
import verdicts

import fp8
import model
import prepare_data
import sample
import train
from model import DeepSeekV3, ModelConfig
from support import ops
from support.settings import Refusal
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
    Path("other.py").write_text(Path("tiny.py").read_text() + "\nlr = 4e-3")
    assert runs(config="other.py") == 1
    Path("other.py").write_text(Path("tiny.py").read_text() + '\ndtype = "float64"')
    assert runs(config="other.py") == 1
    found = tables.read_results(options, "new")
    assert [x["dtype"] for x in found] == ["float32"] * (len(found) - 1) + ["float64"]
    base, source = attention.MultiHeadAttention, run.inspect.getsource
    with mock.patch("inspect.getsource", lambda x: "a = 1" if x is base else source(x)):
        assert runs(forms[2]) == 1
    assert run.code_hash("a = 1  # why") == run.code_hash("a  =  1") != run.code_hash("a = 2")
    monkeypatch.setattr(run, "code_id", lambda *dtype, **fp8: "other code")
    assert runs() == 1
    with pytest.raises(Refusal, match="no arm 'x'; choose from base, a"):
        runs(arms="x")


def test_code_is_the_same_if_it_trains_alike(monkeypatch):
    """To eight digits: with the twins of ops.py, and without."""
    code_id = run.code_id.__wrapped__
    monkeypatch.setitem(run.SMALL, "steps", 5)
    code = code_id()
    monkeypatch.setattr(ops, "enabled", False)
    assert code_id() == code
    monkeypatch.setattr(train, "lr_at", lambda config, step: config.lr * (1 + 1e-5))
    assert code_id() != code


def test_interrupted_run_goes_on_and_a_finished_one_is_opened_as_it_ended(options):
    """Stopped in a step, in its measurement, not: the same weights, and RoPE as at the end."""
    seen = []

    def measure(trained):
        assert trained.net.config.rope_scaling["factor"] == 4 and trained.net.trained_length == 64
        seen.append(trained.net.state_dict())
        if len(seen) == 1:
            raise KeyboardInterrupt
        return {}

    e = replace(EXPERIMENTS["long_context"], name="stop", measure=measure, draw=None)
    options = replace(options, arms="last tenth long", steps=12)
    stop = [*[mock.DEFAULT] * 10, KeyboardInterrupt]
    stop = mock.patch.object(train, "lr_at", wraps=train.lr_at, side_effect=stop)
    with stop, pytest.raises(KeyboardInterrupt):
        start(e, options)
    with mock.patch.object(train, "lr_at", wraps=train.lr_at) as steps:
        with pytest.raises(KeyboardInterrupt):
            start(e, options)
        start(e, options)
    assert steps.call_count == 3  # after the last checkpoint
    start(e, options, results="afresh")
    for weights in seen[1:]:
        torch.testing.assert_close(weights, seen[0], rtol=0, atol=0)


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


# ---- Tables and figures --------------------------------------------------------------------------


def add_results(options, values: dict[str, list[float]], **more):
    """The results of arms of the experiment t, seed by seed."""
    for arm, ys in values.items():
        for seed, y in enumerate(ys):
            x = {"arm": arm, "seed": seed, "source": "s", "corpus": "c", "steps": 2, "test_bpb": y}
            tables.add_result(options, "base" if arm == "base" else "t", x | more)


def test_differences_are_paired_by_seed_length_code_and_data(tmp_path, options):
    options.results = str(tmp_path)
    add_results(options, {"a": [7.0, 7.0, 7.0]})  # made again below: the newest counts
    for other in {"source": "other"}, {"corpus": "other"}, {"steps": 3}:
        add_results(options, {"base": [9.0] * 3, "a": [0.0] * 3}, **other)
    add_results(options, {"base": [1.0, 2.0, 3.0], "a": [1.5, 2.25, 3.75]})
    e = run.Experiment(
        "t", lambda base: {"a": run.Arm(), "b": run.Arm()}, {"test_bpb": "bits"}, base="zero"
    )
    assert [x["against"] for x in tables.collect(e, options)["a"]] == [0.5, 0.25, 0.75]
    # Arms differ by 0.5 on average, and each pair by 0, -0.25, 0.25 from that; so the residuals are
    # half of these, their squares add up to 2 (1/64 + 1/64), and 6 - 2 - 3 + 1 = 2 are free.
    deviation = (4 / 64 / 2) ** 0.5
    half, t = 4.303 * deviation * (2 / 3) ** 0.5, 4.303 / 3**0.5
    lines = tables.table(e, options).splitlines()
    assert lines[0].endswith("| bits | bits against base |")
    assert lines[2:] == [
        f"| zero (base) | 3 | 2.000 ± {t:.3f} |  |",
        f"| a | 3 | 2.500 | +0.500 ± {half:.3f} |",  # the base's and the difference
        *("", "2 steps a run."),
        f"Intervals from the pairs of one arm alone: a ± {t / 4:.3f}.",
        *("", "Not yet run: b."),
    ]
    p = 1 - (x := 0.5 / (half / 4.303)) / (x * x + 2) ** 0.5  # the distribution with 2 of freedom
    found = tables.differences(e, options, tables.collect(e, options))
    assert found["a"].p == pytest.approx(p, rel=1e-3) and [*found] == ["a"]


def test_two_arms_are_compared_on_the_seeds_that_both_have(tmp_path, options):
    """Beside the base: the base is not asked."""
    options.results = str(tmp_path)
    add_results(options, {"base": [0.0, 9.0, 0.2], "a": [1.0, 1.2, 1.1], "b": [0.5, 0.9]})
    arms = {name: run.Arm() for name in "ab"}
    e = run.Experiment("t", lambda base: arms, {"test_bpb": "bits"}, pairs=(("a", "b"),))
    found = tables.differences(e, options, tables.collect(e, options))
    assert [*found] == ["a", "b", "a against b"]
    pair = found["a against b"]
    assert pair.mean == pytest.approx(0.4) and pair.pairs == 2
    assert pair.half == pytest.approx(found["a"].half * (3 / 2) ** 0.5)
    assert pair.alone == pytest.approx(12.706 * 0.1, rel=1e-3)
    lines = tables.table(e, options).splitlines()
    assert [line for line in lines if line.startswith("* a against b: +0.400 ± ")]
    none = tables.Spreads((), (0.0, 0), (0.0, 0))
    one = tables.compare(*([{"seed": 0, "y": y}] for y in (3.0, 1.0)), "y", none)
    assert (one.mean, one.half, one.alone, one.p) == (2, None, None, None)  # one seed


def test_other_learning_rates_are_in_no_table(tmp_path, options):
    options.results = str(tmp_path)
    add_results(options, {"base": [1.0, 1.2], "a": [1.5, 1.6], "a lr x0.3": [2.0, 2.5]})
    arms = {"a": run.Arm()} | run.at_rates({"a": run.Arm()}, {"lr": 1.0})
    e = run.Experiment("t", lambda base: arms, {"test_bpb": "bits"})
    assert [*tables.collect(e, options)] == ["base", "a"]
    assert len(tables.collect(e, options, rates=True)["a lr x0.3"]) == 2
    assert "lr" not in tables.table(e, options)


def test_how_much_bits_per_byte_vary_is_known_from_all_experiments(tmp_path, options):
    """Of the same length, code and data, by two classes of networks; another measure's deviation
    is its own table's."""
    options.results = str(tmp_path)
    add_results(options, {"base": [0.0, 0.1, 0.2], "a": [1.0, 1.2, 1.1]})
    shared, other = {"source": "s", "corpus": "c", "steps": 2}, {"corpus": "another", "arm": "z"}
    values = {"x": [0.5, 0.7, 0.8], "u": [1.0, 2.0, 4.0], "v": [1.0, 1.0, 1.0]}
    for arm, ys in values.items():
        more = {"active": 7} if arm in "uv" else {}  # u and v have other shapes
        for seed, y in enumerate(ys):
            x = {"arm": arm, "seed": seed, "test_bpb": y, "other": y} | more | shared
            tables.add_result(options, "else", x)
            tables.add_result(options, "else", x | other)
    e = run.Experiment("t", lambda base: {"a": run.Arm()}, {"test_bpb": "bits"})
    results = tables.collect(e, options)
    found = {k: x["test_bpb"] for k, x in tables.pooled("test_bpb", options, results).items()}
    like = {("base base", i): y for i, y in enumerate([0.0, 0.1, 0.2])}
    like |= {("t a", i): y for i, y in enumerate([1.0, 1.2, 1.1])}
    like |= {("else x", i): y for i, y in enumerate(values["x"])}
    others = {(f"else {arm}", i): y for arm in "uv" for i, y in enumerate(values[arm])}
    assert found == like | others
    varies = tables.spreads("test_bpb", options, results)
    for spread, values, freedom in (varies.like_base, like, 4), (varies.others, others, 2):
        assert spread == (pytest.approx(intervals.residual_deviation(values)[0]), freedom)
    assert varies.of({"active": 7}) == varies.others != varies.of({}) == varies.like_base
    assert varies.of({"val_mtp_losses": [1.0]}) == varies.others  # one more module
    own = {"base": [{"seed": 0, "other": 1.0}], "a": [{"seed": 0, "other": 2.0}]}
    assert {*tables.pooled("other", options, own)} == {("base", 0), ("a", 0)}


def test_intervals_are_those_of_the_textbooks():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 9: 2.262, 30: 2.042, 120: 1.980}
    for freedom, t in known.items():
        assert intervals.quantile(0.05, freedom) == pytest.approx(t, abs=1e-3)
        assert intervals.p_value(-t, freedom) == pytest.approx(0.05, abs=1e-4)
    assert intervals.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}) == pytest.approx(
        {"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.5}
    )
    assert intervals.holm({"a": 0.01, "b": 0.02}, 4) == pytest.approx({"a": 0.04, "b": 0.06})
    assert intervals.own_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5, abs=1e-3))
    # A seed that shifts all arms, and a missing run, leave no residual.
    exact = {(a, s): x + 10 * s for a, x in {"a": 1.0, "b": 3.0}.items() for s in range(4)}
    del exact["b", 2]
    deviation, freedom = intervals.residual_deviation(exact)
    assert deviation == pytest.approx(0, abs=1e-9) and freedom == 7 - 2 - 4 + 1
    assert intervals.residual_deviation({}) == (0.0, 0)
    # 1.96 + 0.84 standard errors, of many degrees of freedom
    assert intervals.seen_with(1.0, 1000, 1) == pytest.approx(2.80, abs=0.01)


def test_two_classes_of_arms_vary_as_welch_says():
    """A t of their mean difference, drawn at random, is as often beyond the quantile as it says."""
    assert intervals.standard_error((3.0, 9), (3.0, 9), 8) == (1.5, 9)  # one estimate, used twice
    assert intervals.standard_error((3.0, 9), (4.0, 0), 8) == (0.0, 0)
    error, freedom = intervals.standard_error((3.0, 10), (4.0, 5), 25)
    assert error == 1.0 and freedom == int(25**2 / (81 / 10 + 256 / 5))
    rng, beyond, draws = np.random.default_rng(0), 0, 4000
    for _ in range(draws):
        ones, others = rng.normal(0, 1, 6), rng.normal(0, 2, 9)
        spreads = (ones.std(ddof=1), 5), (others.std(ddof=1), 8)
        error, freedom = intervals.standard_error(*spreads, 4)
        mean = rng.normal(0, 1, 4).mean() - rng.normal(0, 2, 4).mean()
        beyond += abs(mean / error) > intervals.quantile(0.05, freedom)
    assert beyond / draws == pytest.approx(0.05, abs=0.012)


def test_p_of_an_equality_is_small_where_the_interval_lies_within_the_margin():
    for mean in (0.0, 0.3, -0.8, 1.1):
        half = intervals.quantile(0.05, 12) * 0.2
        p = intervals.p_of_equality(mean, 0.2, 12, 1.0)
        assert (p < 0.05) == (abs(mean) + half < 1.0)
    assert intervals.p_of_equality(1.1, 0.2, 12, 1.0) == 1.0
    assert intervals.p_of_equality(1.0 - half, 0.2, 12, 1.0) == pytest.approx(0.05, rel=1e-3)


def test_a_difference_that_is_said_to_be_found_is_found():
    """Of 400 tables drawn at random, of 4 arms without any difference and one with this one, all
    with 8 seeds but the last with 3: in 80 % its p-value stays below 0.05 after the correction by
    the number of arms, and its interval holds the difference in 95 %."""
    rng, draws, seeds = np.random.default_rng(0), 400, 8
    cells = [(arm, seed) for arm in range(6) for seed in range(3 if arm == 5 else seeds)]
    names = [(str(arm), seed) for arm, seed in cells]
    freedom = intervals.residual_deviation(dict.fromkeys(names, 0.0))[1]
    assert freedom == 43 - 6 - 8 + 1
    true = intervals.seen_with(math.sqrt(2 / 3), freedom, 5)
    strict, usual = (intervals.quantile(p, freedom) for p in (0.05 / 5, 0.05))
    found = held = 0
    for _ in range(draws):
        shift = 3 * rng.normal(size=seeds)
        y = {c: rng.normal() + shift[c[1]] + true * (c[0] == "5") for c in names}
        error = intervals.residual_deviation(y)[0] * math.sqrt(2 / 3)
        mean = np.mean([y["5", seed] - y["0", seed] for seed in range(3)])
        found += abs(mean) > strict * error
        held += abs(mean - true) < usual * error
    assert found / draws == pytest.approx(0.8, abs=0.05)
    assert held / draws == pytest.approx(0.95, abs=0.03)


def test_an_interval_over_documents_weighs_them_by_their_bytes():
    size = np.array([100.0] * 50 + [300.0] * 50)
    nats = np.array([1.0, 3.0] * 50) * size * math.log(2)
    low, high = intervals.over_documents(nats, size)
    spread = 1.96 * math.sqrt((size**2).sum()) / size.sum()  # 1 from the mean, either way
    assert low == pytest.approx(2 - spread, abs=0.05) and high == pytest.approx(
        2 + spread, abs=0.05
    )
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
    printed = capsys.readouterr().out
    lines = re.findall(
        r"([\d.]+) bits/byte in windows of (\d+) .* (\d+) files of ([\d,]+) bytes", printed
    )
    data = load_dataset("text")
    size = len(load_tokenizer("text").decode(data.test.arrays[0]))
    files = int((data.test.arrays[0] == data.vocab_size - 1).sum())
    markers = files * len(END_OF_TEXT)
    assert [line[1:] for line in lines] == [
        (T, f"{files}", f"{size - markers:,}") for T in ("16", "32")
    ]
    (Path("text") / "test.bin").rename("kept")
    with pytest.raises(Refusal, match=r"has no test.bin: make it anew"):
        unseen.main(["out/seen"])
    Path("kept").rename(Path("text") / "test.bin")


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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_page_and_figures_show_what_the_json_files_hold(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    e, options = EXPERIMENTS[name], run.Options()
    again = f"python experiments/{Path(inspect.getfile(e.arms)).name}"
    text = Path("docs/RESULTS.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL)
    assert shown[1] == tables.section(e, options), f"{again} --plot"
    assert again in text
    if f"figures/{name}.svg" in text:
        svg = Path(f"docs/figures/{name}.svg").read_text(encoding="utf-8")
        digest = tables.digest(json.dumps(tables.collect(e, options)))
        assert f"results {digest}" in svg, f"{again} --plot"


def test_prose_has_the_differences_of_the_tables(monkeypatch):
    """Those with three digits, such as 0.016 ± 0.004, of RESULTS and README."""
    monkeypatch.chdir(ROOT)
    found = []
    for options in run.Options(), run.Options(**claims.PROSE):
        for e in verdicts.EXPERIMENTS.values():
            differences = tables.differences(e, options, tables.collect(e, options))
            found += [(x.mean, x.half or 0) for x in differences.values()]
    known = {f"{abs(mean):.3f} ± {half:.3f}" for mean, half in found}
    pages = (Path(x).read_text(encoding="utf-8") for x in ("docs/RESULTS.md", "README.md"))
    prose = re.sub(r"(?s)<!-- (\w+) -->.*?<!-- end of \1 -->", "", "".join(pages))
    written = re.findall(r"\d\.\d{3}\s±\s\d\.\d{3}(?!\d)", prose)
    stale = {" ".join(x.split()) for x in written} - known
    assert len(written) > 12 and not stale


# ---- Verdicts ------------------------------------------------------------------------------------

SURE = {"mean": 0.02, "half": 0.004, "p": 0.001, "alone": 0.005}
EQUAL = {"mean": -0.001, "half": 0.002, "p": 0.7, "alone": 0.0024, "margin": 0.0035}
EQUAL |= {"p_equal": 0.01}


@pytest.mark.parametrize(
    "kind, numbers, word, opposite",
    [
        ("better", SURE, "shown", "contradicts"),
        ("better", SURE | {"tuned": (0.01, 0.009)}, "shown", "contradicts"),
        ("better", SURE | {"alone": None}, "shown", "contradicts"),
        ("better", SURE | {"simulated": True}, "seen in a model", "contradicts"),
        ("equal", SURE | {"margin": 0.0035, "p_equal": 1}, "differs: better", "differs: worse"),
        ("equal", EQUAL, "equal", "equal"),
        ("equal", EQUAL | {"p": 0.01, "half": 0.0005, "alone": 0.0005}, "equal", "equal"),
        ("equal", EQUAL | {"p_equal": 0.06}, "suggestive", "suggestive"),
        ("equal", EQUAL | {"alone": 0.0026}, "suggestive", "suggestive"),
        ("equal", EQUAL | {"tuned": (0.002, 0.002)}, "suggestive", "suggestive"),
        ("equal", EQUAL | {"elsewhere": False}, "cannot tell", "cannot tell"),
        ("equal", EQUAL | {"half": 0.0026}, "cannot tell", "cannot tell"),
        ("equal", EQUAL | {"mean": 0.0026}, *2 * ["suggestive of a difference"]),
        ("better", EQUAL, "cannot tell", "cannot tell"),  # a margin is for claims of equality
        ("better", SURE | {"half": 0.021, "p": 0.06}, "cannot tell", "cannot tell"),
        ("better", SURE | {"p": 0.06}, "suggestive", "suggestive of the opposite"),
        ("better", SURE | {"alone": 0.021}, "suggestive", "suggestive of the opposite"),
        ("better", SURE | {"unlike": True}, "suggestive", "suggestive of the opposite"),
        ("better", SURE | {"tuned": (0.01, 0.011)}, "suggestive", "suggestive of the opposite"),
        ("better", SURE | {"tuned": (-0.01, 0.004)}, "suggestive", "suggestive of the opposite"),
        ("equal", SURE | {"p": 0.06, "margin": 0.01}, *2 * ["suggestive of a difference"]),
        ("better", {"mean": 0.5}, "cannot tell", "cannot tell"),  # one seed
    ],
)
def test_a_verdict_is_a_function_of_numbers(kind, numbers, word, opposite):
    """The same conditions in both directions."""
    assert claims.verdict(kind, **numbers) == word
    tuned = numbers.get("tuned")
    turned = {"mean": -numbers["mean"], "tuned": tuned and (-tuned[0], tuned[1])}
    assert claims.verdict(kind, **numbers | turned) == opposite
    assert {word, opposite} <= claims.WORDS.keys()
    assert claims.verdict(kind, None) == "not yet run"


def test_a_bound_is_reached_missed_or_open():
    words = [claims.bound(0.85, mean, 0.02) for mean in (0.9, 0.86, 0.84, 0.8, None)]
    assert words == ["shown", "cannot tell", "cannot tell", "lower here", "not yet run"]
    assert claims.bound(0.85, 0.9, None) == "cannot tell"


def test_claims_name_arms_margins_and_rates_that_exist():
    assert len({claim.text for claim in claims.CLAIMS}) == len(claims.CLAIMS)
    base = run.Options(config=str(ROOT / "experiments/base.py")).base()
    known = {name: {"base", *e.arms(base)} for name, e in verdicts.EXPERIMENTS.items()}
    for claim in claims.CLAIMS:
        assert {claim.one, claim.other} - {""} <= known[claim.experiment]
        assert (claim.kind == "equal") == (claim.margin in claims.MARGINS)
        assert {*claim.networks} <= {*plan.CHOSEN, *plan.LIKE_BASE} and claim.short
    for name, seeds in claims.SEEDS.items():
        assert {*seeds} <= known.get(name, {"base"})
    for network, experiment in (plan.CHOSEN | plan.LIKE_BASE).items():
        arms = {plan.arm_at(network, times) for times in (*plan.SMALLER, plan.SMALLEST)}
        assert arms <= known[experiment] or network in plan.LIKE_BASE
        assert plan.arm_at(network, 1) in known[experiment]
    assert len(verdicts.HEADLINES) == 6 and len(verdicts.ON_FRESH_SEEDS) == 8
    assert len(verdicts.p_values(verdicts.ON_FRESH_SEEDS)) == 10  # as PLAN.md has it


@pytest.mark.parametrize("page", ["docs/RESULTS.md", "README.md"])
def test_pages_have_the_words_that_the_rule_gives(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, part in verdicts.pages()[page].items():
        shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL)[1]
        assert shown == part, "python experiments/verdicts.py"


@pytest.fixture
def asked(options, tmp_path, monkeypatch):
    """A function: the Numbers of a claim on hand-made runs of the arms a and b."""
    arms = {name: run.Arm() for name in "ab"}
    e = run.Experiment("t", lambda base: arms, {"test_bpb": ""}, pairs=(("b", "a"),))
    monkeypatch.setattr(verdicts, "EXPERIMENTS", {"t": e})
    options.results = str(tmp_path)

    def numbers(claim: claims.Claim, values: dict[str, list[float]], **more) -> verdicts.Numbers:
        for path in tmp_path.glob("*.json"):
            path.unlink()
        add_results(options, values, **more)
        return verdicts.numbers_of(claim, verdicts.read_tables(options))

    return numbers


VALUES = {"base": [1.0, 1.1, 1.2], "a": [1.5, 1.6, 1.75], "b": [2.0, 2.1, 2.2]}


def test_numbers_above_zero_favour_the_claim(asked):
    """Base against arm, arm against base, two arms, more instead of less, and one figure alone."""
    for one, other, mean in ("base", "b", 1), ("b", "base", -1), ("a", "b", 0.4833), ("b", "", 2.1):
        x = asked(claims.Claim("", "t", one, other), VALUES)
        assert x.mean == pytest.approx(mean, abs=1e-4) and x.pairs == 3 and x.p < 0.05
    x = asked(claims.Claim("", "t", "base", "b", less=False), VALUES)
    assert x.mean == pytest.approx(-1)
    x = asked(claims.Claim("", "t", "base", "b", kind="equal", margin="fp8"), VALUES)
    assert x.margin == pytest.approx(0.0025 * 1.1) and x.p_equal == 1
    x = asked(claims.Claim("", "t", "base", "a"), VALUES)
    assert x.half != x.alone > 0
    x = asked(claims.Claim("", "t", "base", "a", other_measure="far"), VALUES, far=1.75)
    assert x.mean == pytest.approx(1.75 - 1.1) and x.half == pytest.approx(
        intervals.own_interval(VALUES["base"])[1]
    )
    x = asked(claims.Claim("", "t", "a", "b"), VALUES)
    assert x.alone == pytest.approx(intervals.own_interval([0.5, 0.5, 0.45])[1])
    assert asked(claims.Claim("", "t", "a", "b"), {"base": [1.0], "a": [1.0]}).mean is None


def test_arms_that_differ_in_something_else_are_told(asked):
    claim = claims.Claim("", "t", "base", "b", alike="seed")
    assert not asked(claim, VALUES).unlike
    assert asked(claim, VALUES | {"b": [2.0, 2.1, 2.2, 2.3]}).unlike  # their means of it: 1, 1.5


def test_all_tests_of_a_page_are_one_family(asked, options):
    """An equality counts twice, a bound not at all, and a claim without runs counts, too."""
    kinds = {"a": "better", "b": "equal", "c": "better", "": "bound"}
    family = [claims.Claim(f"than {arm}", "t", "base", arm, kind=kind,
                           margin="loss" if kind == "equal" else "")
              for arm, kind in kinds.items()]  # fmt: skip
    near = {"base": [1.0, 1.1, 1.2], "a": [1.2, 1.1, 1.4], "b": [1.3, 1.2, 1.6]}
    asked(family[0], near)
    numbers = verdicts.all_numbers(family, verdicts.read_tables(options))
    tests = [("than a", "p"), ("than b", "p"), ("than b", "p_equal"), ("than c", "p")]
    assert verdicts.p_values(family) == tests
    raw = {(text, test): getattr(numbers[text], test) for text, test in tests[:3]}
    p = verdicts.corrected(family, numbers)
    assert p == intervals.holm(raw, 4) and p["than b", "p"] == 4 * raw["than b", "p"]
    words = verdicts.words_of(family, numbers)
    assert words["than c"] == "not yet run" and words["than a"] == "cannot tell"


def test_an_equality_on_two_texts_needs_both():
    x, second = verdicts.Numbers(p_equal=0.01), verdicts.Numbers(0.002, 0.001, p_equal=0.2)
    second.margin = 0.0025
    verdicts.with_second_text(x, second)
    assert x.p_equal == 0.2 and not x.elsewhere
    second.margin = 0.0035
    verdicts.with_second_text(x, second)
    assert x.elsewhere


def test_the_seeds_column_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(claims, "SEEDS", {"t": {"a": 8, "base": 5}})
    claim, planned = claims.Claim("", "t", "base", "a"), verdicts.planned_seeds
    assert planned(claim) == 8 and planned(replace(claim, other="b")) == 3
    assert planned(replace(claim, other="")) == 5
    x = verdicts.Numbers(0.01234, 0.005, 0.00001, pairs=3)
    assert verdicts.seeds_cell(x, 8) == "3 of 8" and verdicts.seeds_cell(x, 3) == "3"
    assert verdicts.measured(claim, x) == "+0.0123 ± 0.0050 bits/byte"
    bound = replace(claim, kind="bound", unit="kept")
    assert verdicts.measured(bound, verdicts.Numbers(0.9, 0.02)) == "90.0% ± 2.0% kept"
    assert verdicts.measured(claim, verdicts.Numbers()) == ""


def test_what_a_difference_is_worth_in_steps(monkeypatch):
    """From arms that differ in nothing but their length: e times the steps gain 0.2 here."""
    arms = {"a": run.Arm(), "a longer": run.Arm(longer=math.e)}
    e = run.Experiment("t", lambda base: arms, {})
    monkeypatch.setattr(verdicts, "EXPERIMENTS", {"t": e})
    monkeypatch.setattr(verdicts, "LONGER", (("t", "a", "a longer"),))
    runs = {"a": [1.0, 1.1, 9.0], "a longer": [0.8, 0.9]}  # seeds of both count
    runs = {k: [{"seed": i, "test_bpb": y} for i, y in enumerate(v)] for k, v in runs.items()}
    slope = verdicts.bits_of_e_times_the_steps({"t": verdicts.Table(runs, None)})
    assert slope == pytest.approx(0.2)
    claim = claims.Claim("", "t", "a")
    assert verdicts.worth(claim, verdicts.Numbers(0.2 * math.log(1.05)), slope) == "+5.0%"
    assert verdicts.worth(claim, verdicts.Numbers(0.2 * math.log(0.9)), slope) == "-10.0%"
    assert verdicts.worth(replace(claim, unit="nats"), verdicts.Numbers(1.0), slope) == ""


def test_earlier_runs_are_all_there():
    """Those that the history of this repository has: 69 and 72 trainings."""
    folder = ROOT / claims.EARLIER["results"]
    runs = [x for path in folder.glob("*.json") for x in json.loads(path.read_text())]
    steps = [x["steps"] for x in runs if "val_bpb" in x]
    assert (steps.count(600), steps.count(200), len(steps)) == (69, 72, 141)


def test_power_of_an_equality():
    """At no difference the mean has to lie within the margin less half the interval."""
    error = 0.0029 * math.sqrt(2 / 8)
    rng = np.random.default_rng(0)
    means = abs(rng.normal(size=100_000))
    for tests, margin in (1, 0.004), (10, 0.0055):
        room = margin / error - intervals.quantile(0.05 / tests, 89)
        found = intervals.equal_with(error, 89, margin, tests)
        assert found == pytest.approx((means < room).mean(), abs=0.01)
    assert intervals.equal_with(0.0029, 89, 0.004) == 0


# ---- The plan ------------------------------------------------------------------------------------


@pytest.fixture
def planning(tmp_path, monkeypatch):
    """A function that writes validation losses of a network's rates, and the plan on them."""
    options = run.Options(results=str(tmp_path))
    monkeypatch.setattr(run.Options, "results", str(tmp_path))
    monkeypatch.setattr(run.Options.__init__, "__defaults__", tuple(vars(options).values()))
    monkeypatch.setattr(plan, "CONFIRMATION", str(tmp_path / "fresh"))

    def write(network: str, values: dict[float, list[float]], results: str = "", **more):
        for times, ys in values.items():
            arm = plan.arm_at(network, times)
            file = "base" if arm == "base" else (plan.CHOSEN | plan.LIKE_BASE)[network]
            for seed, y in enumerate(ys, more.get("first", 0)):
                x = {"arm": arm, "seed": seed, "steps": 600, "source": "s", "corpus": "c"}
                x |= {"val_bpb": y, "test_bpb": y + 0.001 * (seed % 3)}
                tables.add_result(replace(options, results=results or str(tmp_path)), file, x)

    return write


def test_the_rate_is_that_of_the_least_mean_on_the_validation_text(planning):
    """Known when all runs are there; the smallest is tried where the next one wins."""
    same = [2.0, 2.0, 2.0]
    planning("MLA", {1: same, 0.67: [1.0, 1.0, 3.9], 0.45: [2.0, 2.0]})
    assert plan.best_rate("MLA") is None
    planning("MLA", {0.45: [2.0, 2.0, 2.1]})
    assert plan.best_rate("MLA") == 0.67 and plan.rates_of("MLA") == (1, 0.67, 0.45)
    planning("dense", {1: same, 0.67: same, 0.45: [1.9, 1.9, 1.9]})
    assert plan.rates_of("dense")[-1] == 0.3 and plan.best_rate("dense") is None
    planning("dense", {0.3: [1.9, 1.9, 2.0]})
    assert plan.best_rate("dense") == 0.45
    planning("MHA", {1: [1.0, 1.0, 1.0], 0.67: same, 0.45: same})
    assert plan.best_rate("MHA") == 1
    arms = [plan.confirming(x, 8).arm for x in ("MLA", "loss 0.01", "tiles", "dense", "MHA")]
    assert arms == [f"{x} lr x0.67" for x in ("MLA", "loss 0.01", "tiles")] + [
        "dense lr x0.45", "MHA"]  # fmt: skip
    assert plan.confirming("GQA 2", 8) is None


def test_the_plan_is_in_order(planning):
    """Rates, the clock, then seed by seed all arms; what waits for a rate has its place."""
    runs = [*plan.planned()]
    assert len(runs) == 6 * 2 * 3 + 1 + 7 * 8 + 3 * 8 + 12
    assert [x.seed for x in runs[:6]] == [0, 1, 2] * 2 and runs[36] == plan.clock()
    assert all(x is None for x in runs[37:])
    for network in plan.CHOSEN:
        planning(network, {x: [3.0 - x] * 3 for x in (1, 0.67, 0.45)})
    fresh = [*plan.planned()][37:]
    assert {x.arm for x in fresh[:7]} == {"base", *plan.CHOSEN, "loss 0.01"} - {"MLA"}
    assert [x.seed for x in fresh] == [s for s in range(8, 16) for _ in range(7)] + [
        s for s in range(16, 24) for _ in range(3)] + [*range(8, 20)]  # fmt: skip
    assert {x.results for x in fresh} == {plan.CONFIRMATION}


def test_two_processes_never_train_the_same_run(tmp_path, monkeypatch):
    """One takes the first that is free; what another has ended meanwhile is not made again."""
    done, trained = set(), []

    class Run:
        def __init__(self, name):
            self.name = name

        def missing(self):
            return ([] if self.name in done else ["x"]), tmp_path / self.name

        def train(self):
            trained.append(self.name)
            done.add(self.name)

    runs = [Run(name) for name in "abc"]
    monkeypatch.setattr(plan, "planned", lambda: iter([runs[0], None, *runs[1:]]))
    done.add("a")
    with plan.taken(tmp_path / "b") as mine, plan.taken(tmp_path / "b") as again:
        assert mine and not again
        assert plan.train_next() and trained == ["c"]
        assert not plan.train_next()
    assert plan.train_next() and trained == ["c", "b"]


def test_fresh_seeds_give_a_word_when_all_their_runs_are_there(planning, monkeypatch):
    claim = claims.Claim("it", "attention", "base", "MHA", networks=("MLA", "MHA"))
    monkeypatch.setattr(verdicts, "ON_FRESH_SEEDS", [claim])
    monkeypatch.setattr(plan, "MORE", {"MLA": range(8, 24)})
    for network in plan.CHOSEN:
        planning(network, {x: [3.0 - x] * 3 for x in (1, 0.67, 0.45)})
    ys = [1.0, 1.1, 1.05, 1.2, 1.15, 1.0, 1.1, 1.3]
    fresh = {"results": plan.CONFIRMATION, "first": 8}
    planning("MLA", {1: ys}, **fresh)
    planning("MHA", {1: [y + 0.1 for y in ys[:7]]}, **fresh)
    x = verdicts.on_fresh_seeds()["it"]
    assert (x.there, x.planned, x.word, x.numbers.mean) == (15, 16, "", None)
    assert verdicts.fresh_cell(claim, {"it": x}) == "not yet confirmed: 15 of 16 runs"
    assert verdicts.fresh_cell(claim, {}) == "none planned"
    planning("MHA", {1: [y + 0.1 + 0.01 * (i % 2) for i, y in enumerate(ys)]}, **fresh)
    x = verdicts.on_fresh_seeds()["it"]
    assert x.word == "shown" and x.numbers.pairs == 8
    assert verdicts.fresh_cell(claim, {"it": x}).startswith("+0.1050 ± 0.00")
    planning("MLA", {1: [y + 9 for y in ys]}, results=plan.CONFIRMATION, first=16)
    assert verdicts.on_fresh_seeds()["it"].numbers.mean == x.numbers.mean  # MHA has no such seeds


def test_experts_on_four_processes_are_the_layer_in_one():
    """In float64, forward and backward: each process compares, or raises. A token of two nodes
    begins on either as often, so what is counted is near what is computed."""
    found = expert_parallel.measure(str(ROOT / "experiments/base.py"))
    nodes, between, computed, within, computed_within = zip(
        *(x.values() for x in found.values()), strict=True
    )
    assert nodes[0] > nodes[1] > nodes[2] == 1
    assert between == pytest.approx(computed, rel=0.05) and within == pytest.approx(
        computed_within, rel=0.05
    )


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


def test_learning_rates_are_checked_on_the_arms_themselves():
    base = run.Options(config=str(ROOT / "experiments/base.py")).base()
    arms = attention.arms(base) | experts.arms(base) | mtp.arms(base)
    checks = {name for name, arm in arms.items() if arm.rate}
    names = ("MLA", "MHA", "GQA 2", "dense", "no shared", "off")
    assert checks == {f"{x} lr x{y}" for x in names for y in run.RATES}
    for name in checks:
        whose, _, times = name.partition(" lr x")
        arm = arms.get(whose, run.Arm())  # MLA is the base
        assert arms[name].settings == arm.settings | {"lr": float(times) * base["lr"]}
        assert arms[name].replace == arm.replace


def test_the_batch_wise_loss_takes_a_batch_as_one_sequence():
    """Two sequences that prefer an expert each are even together, as uneven as can be alone."""
    s = torch.full((2, 6, 2), 0.001)
    s[0, :, 0] = s[1, :, 1] = 1.0
    assert balance.batch_wise(s, 1).item() == pytest.approx(1, rel=1e-3)
    assert balance.sequence_wise(s, 1).item() == pytest.approx(2, rel=0.01)
    with mock.patch("model.balance_loss", balance.batch_wise):  # as the arm has it
        assert model.balance_loss(s, 1).item() == pytest.approx(1, rel=1e-3)


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


@torch.no_grad()
def test_visits_by_domain_are_the_routing_of_their_texts(trained):
    found = token_classes.visits_by_domain(trained, 64)
    texts, long = (token_classes.domain_texts(trained, n) for n in (64, 1 << 14))
    encoding = load_tokenizer(trained.folder)
    source, english, table = (encoding.decode(ids.tolist()) for ids in texts)
    assert [len(ids) for ids in texts] == [64] * 3 and "assert" in english and "0x" not in source
    text = encoding.decode(long[2].tolist())
    assert text.startswith(table) and text.count("\n    '") > 0.8 * text.count("\n")  # its rows
    visits = np.array(found["domain_visits"])
    for domain, ids in enumerate(texts):
        trained.net.trunk(torch.from_numpy(ids).view(-1, 16))
        for layer, chosen in enumerate(trained.net.routing):
            counts = chosen.flatten().bincount(minlength=visits.shape[2])
            assert visits[layer, domain].tolist() == counts.tolist()
    bits = [token_classes.information(layer) for layer in visits]
    assert found["domain_bits"] == pytest.approx(np.mean(bits))
    assert 0 < found["domain_bits"] < math.log2(3)


@pytest.mark.parametrize("block", [fp8.TILE, fp8.BLOCK])
def test_contrast_has_one_scale_and_loses_small_tokens(block):
    x = torch.randn(2, 100, 200, generator=torch.Generator().manual_seed(0))
    x[:, :10] *= 1e-6
    _, tiles = fp8.quantize(x, block, pow2=True)
    q, one = fp8_error.one_scale(x, block, pow2=True)
    assert one.shape == tiles.shape and one.unique() == tiles.max()
    assert not fp8.dequantize(q, one, block)[:, :10].any()  # below E4M3's smallest


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
def html(trained) -> str:
    return page.page(trained.net, [IDS], lambda i: WORDS[i % 3])


@torch.no_grad()
def test_page_has_every_tokens_experts_and_drafts(html, trained):
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["layers"] == 2 and data["experts"] == 8
    (tokens,) = data["texts"]
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


def test_page_of_what_the_model_writes(trained, tmp_path, monkeypatch):
    """The prompt and the text that generate makes of it, to the token that ends it."""
    words = mock.Mock(encode=lambda text: IDS, to_bytes=lambda i: b"%d" % i, eos=[])
    monkeypatch.setattr(page, "load_model", lambda *_: (trained.net, words, tmp_path))

    def written(*options) -> dict:
        page.main([f"--out={tmp_path}/x.html", *options])
        found = (tmp_path / "x.html").read_text("utf-8")
        return json.loads(re.search(r'id="data">(.*?)</script>', found, re.DOTALL)[1])

    generator = torch.Generator().manual_seed(3)
    ids = sample.generate(
        trained.net, torch.tensor([IDS]), 9, temperature=0.8, top_k=200, generator=generator
    )[0].tolist()
    data = written("--prompt=<b>", "--length=15", "--seed=3")
    assert [int(token["text"]) for token in data["texts"][0]] == ids
    assert data["origin"] == "The model has written all that follows '<b>'."
    words.eos = [ids[9]]
    data = written("--prompt=<b>", "--length=15", "--seed=3")
    assert [int(token["text"]) for token in data["texts"][0]] == ids[: ids.index(ids[9], 6) + 1]


def test_page_works_in_a_browser(html, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs chromium")
    act = "slider.oninput(); document.querySelectorAll('pre span')[3].onmouseenter()"
    (tmp_path / "page.html").write_text(f"{html}<script>{act}</script>", "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    body = dom[dom.index("<pre>") : dom.index("</pre>")]
    assert body.count("<span") == 6 and body.count("background") == 6
    assert body.count('class="yes"') + body.count('class="no"') == 4
    assert "&lt;/script&gt;" in body and "&lt;b&gt;&amp;" in body  # text, not markup
    assert 'id="origin">The text is given' in dom
    assert re.search(r'id="tip">"é\\n" +experts \d: \d\.\d\d, \d: .*\ndraft .*choice', dom)
