"""Every experiment runs, with a tiny network and few steps, and no arm in its table is broken."""

import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sysconfig
from pathlib import Path

import attention
import attention_step
import balance
import cards
import expert_parallel
import experts
import fp8_accumulation
import fp8_error
import fp8_loss
import long_context
import mtp
import node_limit
import numpy as np
import prose
import pytest
import report
import run
import scale
import specialisation
import speculation
import token_classes
import torch
import unseen

import bench
import model
import prepare_data
from support.checkpoints import load_checkpoint
from support.sizes import parameter_counts

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments/results"
pytestmark = pytest.mark.usefixtures("v3")
# Heads, experts, gamma and cosine as in experiments/base.py, so that no two arms are the same.
CHANGES = dict(vocab_size=300, num_attention_heads=4, n_routed_experts=16, num_experts_per_tok=4)
CHANGES |= dict(batch_size=4, block_size=16)
CHANGES |= dict(gamma=0.01, decay_start=0.3, decay_end=1.0, min_lr=0.02)
# From a process that has imported what they need, and not four times from the start.
multiprocessing.set_forkserver_preload(["training", "expert_parallel"])
FORKS = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with some files of Python's library as data, and tiny.py, a base for them."""
    folder = tmp_path_factory.mktemp("experiments")
    source, library = folder / "source", Path(sysconfig.get_path("stdlib"))
    source.mkdir()
    # The test text has small files alone, and at least five.
    small = ("bisect", "contextvars", "keyword", "struct", "this", "token", "tty")
    for path in [*library.glob("co[dlp]*.py"), *(library / f"{name}.py" for name in small)]:
        shutil.copy(path, source)
    data = prepare_data.prepare(
        prepare_data.DataConfig(str(source), "text", str(folder), vocab_size=300, test_fraction=0.4)
    )
    changes = "".join(f"\n{name} = {value}" for name, value in CHANGES.items())
    text = (ROOT / "config/tiny.py").read_text(encoding="utf-8")
    (folder / "tiny.py").write_text(f"{text}{changes}\ndata = {str(data)!r}\n", encoding="utf-8")
    return folder


@pytest.fixture
def make(place, monkeypatch):
    """Runs an experiment; returns the result of every arm in its table, the base's first."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(run, "code_id", lambda *arguments: "this code")
    begin_alike = run.begin_alike

    def with_usual_weights(net, base):
        """An arm's own matrices have a standard deviation that the base's have, too."""
        usual = [x.std().item() for x in base.parameters() if x.ndim >= 2]
        for name, x in net.named_parameters():
            if x.ndim >= 2:
                assert any(x.std().item() == pytest.approx(std, rel=0.2) for std in usual), name
        return begin_alike(net, base)

    monkeypatch.setattr(run, "begin_alike", with_usual_weights)

    def make(experiment: run.Experiment, *more: str, steps: int = 4, alike=()) -> dict[str, dict]:
        given = dict(steps=steps, config="tiny.py", seeds="0", results="results", docs="docs")
        options = run.Options(**given)
        run.main([*(f"--{key}={value}" for key, value in given.items()), *more], experiment)
        found = {arm: xs[0] for arm, xs in report.collect(experiment, options).items()}
        assert all("against" in x for x in [*found.values()][1:])
        losses = {arm: x["test_nats"] for arm, x in found.items() if "test_nats" in x}
        for arm, nats in losses.items():
            bits = sum(nats) / math.log(2) / sum(found[arm]["test_bytes"])
            assert found[arm]["test_bpb"] == pytest.approx(bits, rel=1e-5)
        # An arm without an effect has another's losses.
        for one, other in itertools.combinations(losses, 2):
            assert losses[one] != losses[other] or {one, other} == {*alike}, (one, other)
        return found

    return make


# ---- Trainings -----------------------------------------------------------------------------------


def test_balance_and_specialisation(make, monkeypatch):
    few = functools.partial(token_classes.visits_by_domain, tokens=1 << 11)
    monkeypatch.setattr(balance, "visits_by_domain", few)
    found = make(balance.EXPERIMENT)
    for x in found.values():
        visits, by_domain = np.array(x["visits"]), np.array(x["domain_visits"])
        assert visits.shape == (2, 8, 16) and by_domain.shape == (2, 3, 16)
        # Every token visits four experts in each layer, and not those that all others visit.
        assert (by_domain.sum(2) == 4 * 2048).all() and visits.sum(2).max() > 1000
        assert 1e-3 < x["domain_bits"] < np.log2(3) and 1e-3 < x["mean_bits"] < 3
    assert specialisation.EXPERIMENT.results == "balance"
    again = make(specialisation.EXPERIMENT)
    assert [*again] == [*found] and "against" in again["nothing"]


def test_attention(make):
    found = make(attention.EXPERIMENT)
    width = {"MHA": 4 * 2 * 4, "MHA normed": 4 * 2 * 4, "GQA 2": 4 * 2 * 2, "MQA": 4 * 2}
    arms = attention.arms(run.Options(config="tiny.py").base())
    for name, numbers in width.items():
        assert found[name]["cache_bytes"] == numbers * arms[name].settings["v_head_dim"] * 3
    assert found["MLA (base)"]["cache_bytes"] == 4 * (16 + 8) * 3


def test_experts(make):
    found = make(experts.EXPERIMENT)
    assert {name for name, x in found.items() if x["max_vio_global"] == 0} == {
        "dense", "dense longer",
    }  # fmt: skip
    assert found["dense"]["parameters"] == found["dense"]["active"]


def test_arms_of_the_base_configuration_are_as_large_as_they_say():
    base = run.Options(config=str(ROOT / "experiments/base.py")).base()
    forms, count = attention.arms(base), {}
    for name, arm in {"base": run.BASE, **forms, **experts.arms(base)}.items():
        with torch.device("meta"), arm.in_place():
            count[name] = parameter_counts(run.new_network(base | arm.settings, 0))
    total, active = ({name: x[key] for name, x in count.items()} for key in ("total", "active"))
    assert active == dict.fromkeys(active, pytest.approx(active["base"], rel=0.01))
    assert [total[name] for name in forms] == [pytest.approx(total["base"], rel=0.02)] * 4
    for name in experts.arms(base):
        recorded = [x for x in report.read_results(RESULTS, "experts") if x["arm"] == name]
        assert {(x["parameters"], x["active"]) for x in recorded} == {(total[name], active[name])}
    heads = [forms[name].settings["v_head_dim"] for name in ("MHA", "GQA 2", "MQA")]
    assert heads == [22, 29, 35]  # those of attention_step.py


def test_node_limit(make, capsys, monkeypatch):
    """And that results of different code get one message."""
    found = make(node_limit.EXPERIMENT)
    nodes = [found[name]["nodes_per_token"] for name in ("1 group", "2 groups (base)", "4 groups")]
    assert nodes[0] == 1 < nodes[1] <= 2 < nodes[2] < 4
    assert found["1 group"]["experts_per_node"] == 4
    assert "the results have source" not in capsys.readouterr().err
    monkeypatch.setattr(run, "code_id", lambda *arguments: "other code")
    make(node_limit.EXPERIMENT, "--plot")
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "results have source" in x]
    assert line.startswith("node_limit.json: the results have source") and "(2)" in line


def test_mtp(make, monkeypatch):
    monkeypatch.setattr(mtp, "NEW", 6)
    monkeypatch.setattr(mtp, "PROMPTS", 1)
    found = make(mtp.EXPERIMENT)
    depths = [len(x["val_mtp_losses"]) for x in found.values()]
    assert [*zip(found, depths, strict=True)] == [
        ("one module (base)", 1), ("off", 0), ("off longer", 0), ("depth 2", 2),
    ]  # fmt: skip
    for x, depth in zip(found.values(), depths, strict=True):
        shares = [x[key] for key in ("given_greedy", "given_0.8", "greedy_1", "0.8_4") if key in x]
        assert len(shares) == (4 if depth else 0) and all(0 <= share <= 1 for share in shares)
        assert not depth or 0.5 < x["given_0.8"] < 1  # both are nearly even yet


def test_fp8_loss(make):
    # Here a block holds all gradients of a product, so it is one scale. Activations have tiles in
    # one of the two, but they are normalised, and powers of two as scales round most of them alike.
    found = make(fp8_loss.EXPERIMENT, alike=("one scale", "gradients in blocks"))
    assert max(abs(x["against"]) for x in [*found.values()][1:]) < 0.05


def test_long_context(make):
    found = make(long_context.EXPERIMENT, steps=12)
    for name, x in found.items():
        assert np.mean(x["by_position"]) == pytest.approx(x["nats_long"], rel=0.02)
        assert x["context_gain"] == pytest.approx(x["nats_short"] - x["nats_long"], abs=1e-4)
        # The arms have learnt with YaRN already.
        assert ("by_position_yarn" in x) == name.endswith("base")
        assert x.get("by_position_yarn") != x["by_position"]


# ---- Without a training --------------------------------------------------------------------------


def test_attention_step(make):
    found = make(attention_step.EXPERIMENT)
    assert [*found] == ["MLA (base)", "MHA", "GQA 2", "MQA"]
    assert all(x["ms_256"] > 0 for x in found.values())


def test_fp8_error(make, monkeypatch):
    found = make(fp8_error.EXPERIMENT)
    errors = [x["error_8"] for x in found.values()]
    assert errors[0] < errors[1] < 0.1 < errors[2] < errors[3] < 1.01
    monkeypatch.setattr(fp8_accumulation, "LENGTHS", [128, 4096])
    found = make(fp8_accumulation.EXPERIMENT)
    arms = ("fp32 (base)", "every 32", "every 128", "every 512", "never")
    errors = [found[arm]["uniform_4096"] for arm in arms]
    assert errors == sorted(errors) and errors[0] < 1e-6 and len({*errors}) == 5


def test_an_evaluation_takes_less_memory_than_training():
    options = {"num_hidden_layers": 2, "grad_accum": 80}
    case = cards.Case("RTX 4090", "one_gpu", options)
    training, evaluation = cards.count(case), cards.count(case, evaluation=True)
    assert evaluation.peak < training.peak
    low, high = cards.hours(case, training)
    assert 0 < low < high


def test_the_gpu_page_has_what_small_takes():
    """The row that is counted in seconds."""
    page = (cards.run.ROOT / "docs/GPU.md").read_text(encoding="utf-8")
    case = cards.CASES[2]
    row, starts = cards.row(case), round(cards.count(case).operations, -2)
    low, _, high = row["time"].partition(" to ")
    assert (row["config"], low) == ("small", high)  # limited by the host
    assert f"| H100 | the same | {row['GB']} | {low} |" in page, row
    assert f"starts {starts:,.0f} operations a step" in " ".join(page.split())


def test_scale_computes_its_results():
    found = {
        "cost": {path.stem: scale.cost(path) for path in (scale.V3, scale.SMALL)},
        "traffic": scale.traffic(scale.V3),
        "pipeline": scale.pipeline(),
        "memory": {"a card": scale.memory(scale.V3)},
    }
    results = json.loads((RESULTS / "scale.json").read_text(encoding="utf-8"))
    assert found.keys() == results.keys()
    for part, columns in found.items():
        for name, numbers in columns.items():
            assert numbers == pytest.approx(results[part][name]), (part, name)


def test_experts_on_four_processes_are_the_layer_in_one(place, monkeypatch):
    """Each process compares, or raises. What is counted is near what is computed, since a token of
    two nodes begins on either of them as often."""
    monkeypatch.setattr(torch.multiprocessing, "spawn", FORKS)
    found = expert_parallel.measure(str(place / "tiny.py"))
    rows = [[*x.values()] for x in found.values()]
    assert rows[0][0] > rows[1][0] > rows[2][0] == 1  # nodes that a token visits
    for _, between, computed, within, computed_within in rows:
        assert between == pytest.approx(computed, rel=0.05)
        assert within == pytest.approx(computed_within, rel=0.05)


def test_speeds_are_compared_like_with_like():
    """With transformers' fastest in the same number format, compiled if this is."""
    times = {("ours", "float32"): 1.0, ("a", "float32"): 3.0, ("b", "float32"): 2.0}
    times |= {("ours", "bfloat16"): 4.0, ("ours", "float32 compiled"): 0.5}
    times |= {("b", "float32 compiled"): 0.75, ("a", "float32 compiled"): 0.6}
    rows = bench.speed_table("", {key: [x] for key, x in times.items()}, 6).rows
    found = [row["x transformers"] for row in rows]
    assert found == [[2.0], [2 / 3], [1.0], None, [0.6 / 0.5], [0.6 / 0.75], [1.0]]
    assert [row["tokens/s"] for row in rows][:3] == [6.0, 2.0, 3.0]


def test_prose_has_whole_sentences():
    words = "<p>Of every page the <b>paragraphs</b> &amp; nothing else are taken{}</p>"
    page = f'<p>no</p><div role="main">{words.format(".")}<p>Short.</p>{words.format("")}</div>'
    assert prose.paragraphs(page) == ["Of every page the paragraphs & nothing else are taken."]


# ---- Of one run ----------------------------------------------------------------------------------


def test_programs_that_read_a_run(make, place, capsys):
    base = make(node_limit.EXPERIMENT)["2 groups (base)"]
    folders = map(str, Path("out/experiments").glob("base-0-*"))
    (ckpt,) = [x for x in folders if load_checkpoint(x, whole=False)["step"] == 4]
    capsys.readouterr()
    unseen.main([ckpt, "--device=cpu"])
    line = f"{base['test_bpb']:.4f} bits/byte in windows of 16 tokens"
    assert line in capsys.readouterr().out
    options = ["--rounds=1", "--new_tokens=6", "--prompts=1", "--compile=False", "--device=cpu"]
    speculation.main([ckpt, *options])
    assert capsys.readouterr().out.count("1/1") == 5  # greedily all numbers of drafts


# ---- Which results are there already -------------------------------------------------------------


def test_the_identity_is_measured_with_the_changes_of_an_arm(place, monkeypatch):
    """A formula that runs with them alone makes results of another identity."""
    monkeypatch.setitem(run.SMALL, "steps", 2)
    options = run.Options(config=str(place / "tiny.py"))
    form = attention.MultiHeadAttention

    def identities() -> list[str]:
        arms = run.Arm({"rope_interleave": False}), run.Arm(replace={"model.MLA": form})
        return [run.code_id.__wrapped__(), *(run.change_hash(x, None, options) for x in arms)]

    base, half, stand_in = identities()
    assert identities() == [base, half, stand_in]
    rotate, both = model.rotate, form.keys_and_values
    with monkeypatch.context() as patch:
        patch.setattr(model, "rotate", lambda x, *rest: rotate(x, *rest) * (1 if rest[1] else 1.1))
        now = identities()
        assert now[0] == base and now[1] != half and now[2] == stand_in
    with monkeypatch.context() as patch:
        patch.setattr(form, "keys_and_values", lambda *x: [1.1 * y for y in both(*x)])
        now = identities()
        assert now[0] == base and now[1] == half and now[2] != stand_in
