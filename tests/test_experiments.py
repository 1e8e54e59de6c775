"""What the experiments measure is what they say; figures and tables are those of the JSON files."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import attention
import attention_step
import experts
import fp8_error
import fp8_loss
import long_context
import mtp
import page
import run
import speculation
import tables
import token_classes

import fp8
import prepare_data
import train
from config import parse_args
from model import DeepSeekV3, ModelConfig

ROOT = Path(__file__).parent.parent
TINY = dict(
    vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=8,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=16,
    moe_intermediate_size=8, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
    n_shared_experts=1, n_group=4, topk_group=2, max_position_embeddings=64, batch_size=4,
    block_size=16, eval_batch=64, lr=5e-3,
)  # fmt: skip
TRAINED = ["balance", "mtp", "attention", "node_limit", "experts", "fp8_loss", "specialisation"]
TRAINED += ["long_context"]
ALL = [*TRAINED, "attention_step", "fp8_error"]


def experiment(name: str) -> run.Experiment:
    return importlib.import_module(name).EXPERIMENT


# ---- The runner, on a tiny network ---------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny corpus of Python files and a configuration, where all runs are made."""
    folder, size = tmp_path_factory.mktemp("experiments"), 0
    (folder / "source").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py")):
        if size < 60_000 and path.stat().st_size < 12_000:
            size += path.stat().st_size
            shutil.copyfile(path, folder / "source" / path.name)
    settings = prepare_data.DataConfig(str(folder / "source"), "text", str(folder), vocab_size=300)
    data = prepare_data.prepare(settings)
    lines = [f"{key} = {value!r}" for key, value in {**TINY, "data": str(data)}.items()]
    (folder / "tiny.py").write_text("\n".join(lines))
    return folder


@pytest.fixture
def options(place, monkeypatch) -> list[str]:
    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(mtp, "NEW", 6)
    monkeypatch.setattr(mtp, "PROMPTS", 1)
    settings = {"steps": 2, "seeds": "0", "config": place / "tiny.py"}
    settings |= {"results": place / "results", "docs": place / "docs"}
    return [f"--{key}={value}" for key, value in settings.items()]


def parsed(options: list[str]) -> run.Options:
    return run.Options(**parse_args("", options, run.Options)[1])


@pytest.mark.parametrize("name", TRAINED)
def test_every_experiment_trains_its_arms_once(name, options, capsys, monkeypatch):
    e = experiment(name)
    arms = list(e.arms(parsed(options).base()))
    if name in ("balance", "specialisation", "node_limit", "fp8_loss", "long_context"):
        arms = arms[-1:]  # the others differ in numbers, or are tested below
    more = ["--steps=12"] if name == "long_context" else []  # the last is in long windows
    options = [*options, f"--arms={','.join(['base', *arms])}", *more]
    page_before = f"before\n<!-- {name} -->\nold\n<!-- end of {name} -->\nafter\n"
    Path("docs").mkdir(exist_ok=True)
    Path("docs/RESULTS.md").write_text(page_before)
    run.main(options, e)
    printed = capsys.readouterr().out.strip()
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["arm", f"{e.base} (base)" if e.base else "base", *arms]
    shown = f"{printed}\n\n![{name}](figures/{name}.svg)"
    assert Path("docs/RESULTS.md").read_text() == page_before.replace("old", shown)
    assert (
        f"results {figure_digest(e, parsed(options))}"
        in Path(f"docs/figures/{name}.svg").read_text()
    )
    results = tables.collect(e, parsed(options))
    results = {arm: xs[0] for arm, xs in results.items() if xs}
    assert [arm for arm, x in results.items() if "against" in x] == arms
    for key in e.columns:
        assert any(key in x for x in results.values()), key
    assert all(math.isfinite(x["val_bpb"]) for x in results.values())
    monkeypatch.setattr(run, "save_figure", lambda *_: None)
    with mock.patch.object(run, "train_arm", side_effect=AssertionError("trained again")):
        run.main(options, e)
    assert not list(Path("out/experiments").glob(f"{name}-*"))  # of arms nothing else is kept


def figure_digest(e: run.Experiment, options: run.Options) -> str:
    return tables.digest(json.dumps(tables.collect(e, options)))


def test_what_makes_a_new_result(options, place, monkeypatch):
    """Another length, code, setting, stand-in or measure; not another comment or column."""
    monkeypatch.setattr(run, "figures_of", lambda trained: {"val_bpb": 1.0})
    trained = []

    def count(arm, options, seed, folder, first):
        trained.append(seed)
        folder.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(run, "train_arm", count)

    def runs(arm=None, measure=None, more=()) -> int:
        trained.clear()
        e = run.Experiment("new", lambda base: {"a": arm or run.Arm()}, {"val_bpb": ""})
        e.measure = measure
        run.main([*options, "--arms=a", *more], e)
        return len(trained)

    one = {"model.MLA": attention.MultiHeadAttention}
    other = {"model.MLA": attention.MultiQueryAttention}
    assert runs() == 1 and runs() == 0
    assert runs(more=["--steps=3"]) == 1 and runs(more=["--seeds=0,1"]) == 1
    assert runs(run.Arm({"gamma": 0.5})) == 1 and runs(run.Arm(longer=2.0)) == 1
    assert runs(run.Arm(replace=one)) == 1 and runs(run.Arm(replace=other)) == 1
    assert runs(run.Arm(replace=one)) == 0
    config = (place / "tiny.py").read_text()
    (place / "other.py").write_text(f"# a comment\n{config}")
    assert runs(more=[f"--config={place / 'other.py'}"]) == 0
    (place / "third.py").write_text(config.replace("lr = 0.005", "lr = 0.004"))
    assert runs(more=[f"--config={place / 'third.py'}"]) == 1


def test_stand_ins_are_part_of_the_hash_with_what_they_inherit():
    mha, arm = attention.MultiHeadAttention, run.Arm(replace={"a": attention.MultiQueryAttention})

    def hash_if(code: str) -> str:
        with mock.patch.object(run.inspect, "getsource", lambda x: code if x is mha else "2"):
            return run.change_hash(arm, None)

    assert hash_if("a = 1  # why\n") == hash_if("a  =  1\n") != hash_if("a = 2")


def test_interrupted_run_goes_on_and_keeps_what_is_done(options, place):
    """Stopped before the last step, then again: the same result as without."""
    e, weights = run.Experiment("stop", lambda base: {"a": run.Arm()}, {"val_bpb": ""}), []
    e.measure = lambda trained: weights.append(trained.net.norm.weight.clone()) or {}
    evaluate = train.evaluate
    with mock.patch.object(run, "change_hash", lambda arm, measure: "x"):
        with (
            mock.patch.object(train, "evaluate", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            run.main([*options, "--arms=a", "--steps=4"], e)
        (folder,) = Path("out/experiments").glob("stop-a-0-*")
        saved = torch.load(folder / "ckpt.pt", weights_only=True)
        assert saved["step"] == 3
        with mock.patch.object(train, "evaluate", side_effect=evaluate) as evaluated:
            run.main([*options, "--arms=a", "--steps=4"], e)
        assert evaluated.call_count == 1
        run.main([*options, "--arms=a", "--steps=4", f"--results={place / 'afresh'}"], e)
    assert torch.equal(*weights)


def test_finished_run_is_opened_as_it_ended(options):
    """Also with RoPE stretched, as its last phase left it."""
    e, seen = experiment("long_context"), []

    def measure(trained):
        seen.append((trained.net.config.rope_scaling, trained.net.trained_length))
        raise KeyboardInterrupt

    e = replace(e, name="ended", measure=measure)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.main([*options, "--arms=last tenth long", "--steps=12"], e)
    assert seen[0] == seen[1] and seen[0][0]["factor"] == 4 and seen[0][1] == 64


def test_arms_begin_with_the_same_weights_where_shapes_agree(options):
    """Also those with other classes, whose own first weights follow another sequence."""
    first, begun = run.new_network(parsed(options).base(), 0).state_dict(), {}

    def begin(net, data, config, machine, saved):
        begun.update(net.state_dict())

    for name, part in ("experts", "dense"), ("attention", "MHA"):
        e, begun = experiment(name), {}
        with mock.patch.object(train, "train", begin), pytest.raises(KeyboardInterrupt):
            run.main([*options, f"--arms={part}", "--steps=9"], e)
        same = {k for k, v in begun.items() if k in first and torch.equal(v, first[k])}
        other = {k for k, v in begun.items() if k not in first or first[k].shape != v.shape}
        assert same == begun.keys() - other and 0 < len(other) < len(same)
    other = run.new_network(parsed(options).base(), 1).lm_head.weight
    assert not torch.equal(first["lm_head.weight"], other)


def test_unknown_arm_is_refused_in_a_sentence(options):
    with pytest.raises(ValueError, match="no arm 'x'; choose from base, off"):
        run.main([*options, "--arms=x"], experiment("mtp"))


# ---- Tables and figures --------------------------------------------------------------------------


def test_interval_is_students():
    assert tables.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert tables.interval([1.0]) == (1.0, None)


def test_differences_are_paired_by_seed_length_code_and_data(tmp_path, options):
    settings = parsed(options)
    settings.results, common = str(tmp_path), {"source": "s", "corpus": "c", "steps": 2}
    for seed, base, arm in (0, 1.0, 1.5), (1, 2.0, 2.25), (2, 3.0, 3.75):
        x = {"seed": seed, **common}
        tables.add_result(settings, "base", {"arm": "base", **x, "val_bpb": base})
        for other in {"source": "other"}, {"corpus": "other"}, {"steps": 3}:
            tables.add_result(settings, "base", {"arm": "base", **x, **other, "val_bpb": 9.0})
            tables.add_result(settings, "t", {"arm": "a", **x, **other, "val_bpb": 0.0})
        tables.add_result(settings, "t", {"arm": "a", **x, "val_bpb": 7.0})  # the newest counts
        tables.add_result(settings, "t", {"arm": "a", **x, "val_bpb": arm})
    e = run.Experiment("t", lambda base: {"a": 0, "b": 0}, {"val_bpb": "bits"}, base="zero")
    assert [x["against"] for x in tables.collect(e, settings)["a"]] == [0.5, 0.25, 0.75]
    wide, half = tables.interval([1.5, 2.25, 3.75])[1], 4.303 * 0.25 / 3**0.5
    assert tables.table(e, settings).splitlines()[2:4] == [
        f"| zero (base) | 3 | 2.000 ± {4.303 / 3**0.5:.3f} |  |",
        f"| a | 3 | 2.500 ± {wide:.3f} | +0.500 ± {half:.3f} |",
    ]
    assert "2 steps a run" in tables.table(e, settings)
    assert tables.table(e, settings).endswith("Not yet run: b.")


@pytest.mark.parametrize("name", ALL)
def test_page_and_figures_show_what_the_json_files_hold(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    e, options = experiment(name), run.Options()
    text = Path("docs/RESULTS.md").read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", text, re.DOTALL)
    assert shown[1] == tables.section(e, options), f"python experiments/{name}.py --plot"
    assert f"python experiments/{name}.py" in text
    if f"figures/{name}.svg" in text:
        svg = Path(f"docs/figures/{name}.svg").read_text(encoding="utf-8")
        assert f"results {figure_digest(e, options)}" in svg, f"python experiments/{name}.py --plot"


# ---- Stand-ins -----------------------------------------------------------------------------------


def test_grouped_queries_are_heads_that_share_keys_and_values():
    config = ModelConfig(**train.split_configs({**TINY, "num_attention_heads": 4})[0])
    torch.manual_seed(0)
    few, many = attention.GroupedQueryAttention(config), attention.MultiHeadAttention(config)
    few.o_proj, few.q_proj = many.o_proj, many.q_proj
    for name in ("k_proj", "v_proj"):
        heads = getattr(few, name).weight.unflatten(0, (2, -1))
        getattr(many, name).weight.data = heads.repeat_interleave(2, 0).flatten(0, 1)
    x, rope = torch.randn(1, 9, config.hidden_size), DeepSeekV3(config).rope(torch.zeros(1, 9), 0)
    y = many(x, rope)
    torch.testing.assert_close(few(x, rope), y)
    torch.testing.assert_close(many(x[:, :5], [table[:5] for table in rope]), y[:, :5])  # causal


def test_arms_of_the_small_configuration_are_as_large_as_they_say():
    base, counts = run.Options(config=str(ROOT / "config/small.py")).base(), {}
    for arms in (attention.arms(base), experts.arms(base), {"base": run.Arm()}):
        for name, arm in arms.items():
            with torch.device("meta"), mock.patch.dict({}):
                patches = [mock.patch(*item) for item in arm.replace.items()]
                for patch in patches:
                    patch.start()
                net = DeepSeekV3(ModelConfig(**train.split_configs(base | arm.settings)[0]))
                for patch in patches:
                    patch.stop()
            counts[name] = net.parameter_counts()
    assert {n: c["active"] for n, c in counts.items()} == {
        n: pytest.approx(counts["base"]["active"], rel=0.01) for n in counts
    }
    for name in ("MHA", "GQA 2", "MQA"):
        assert counts[name]["total"] == pytest.approx(counts["base"]["total"], rel=0.01)
    heads = {n: a.settings["v_head_dim"] for n, a in attention.arms(base).items()}
    assert heads == {"MHA": 22, "GQA 2": 29, "MQA": 35}  # attention_step.py's


@pytest.mark.parametrize("name", ["base", "MHA", "GQA 2", "MQA"])
def test_decoding_steps_are_timed(name, monkeypatch):
    monkeypatch.setattr(attention_step, "LENGTHS", (8, 16))
    times = attention_step.step_times(name, 0)
    assert times.keys() == {"ms_8", "ms_16"} and min(times.values()) > 0


@pytest.mark.parametrize("block", [fp8.TILE, fp8.BLOCK])
@pytest.mark.parametrize("shape", [(100, 200), (2, 100, 200)])
def test_contrast_has_one_scale_and_loses_small_tokens(block, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[..., :10, :] *= 1e-6
    q, tiles = fp8.quantize(x, block, pow2=True)
    with mock.patch("fp8.quantize", fp8_error.one_scale):
        q_one, one = fp8.quantize(x, block, pow2=True)
        assert fp8.quantize(x[..., :0, :], block)[0].numel() == 0
    assert one.shape == tiles.shape and one.unique().numel() == 1 and one.max() == tiles.max()
    assert not fp8.dequantize(q_one, one, block)[..., :10, :].any()  # below E4M3's smallest
    assert torch.equal(fp8.quantize(x, block, pow2=True)[0].float(), q.float())  # patch undone


def test_contrast_of_gradients_changes_backward_alone():
    torch.manual_seed(0)
    layer, x, grads, ys = fp8.FP8Linear(128, 128), torch.randn(128, 128), {}, {}
    dy = torch.randn(128, 128) * torch.logspace(-6, 0, 128)[:, None]  # tokens of very unlike size
    for kind in ("tiles", "gradients in blocks"):
        replaced = fp8_loss.ARMS[kind].replace or {"fp8.TILE": fp8.TILE}
        with mock.patch(*next(iter(replaced.items()))):
            leaf = x.clone().requires_grad_()
            ys[kind] = layer(leaf)
            ys[kind].backward(dy)
            grads[kind] = leaf.grad
    assert torch.equal(*ys.values())
    assert grads["tiles"][0].any() and not grads["gradients in blocks"][0].any()


# ---- Measures ------------------------------------------------------------------------------------

CODE = '''"""Module."""
import x  # why

def f(a):
    \'\'\'Doc.\'\'\'
    return a + 12 * "é"
'''


def test_classes_are_those_of_pythons_tokeniser():
    classes = [token_classes.CLASSES[i] for i in token_classes.classes_of_text(CODE)]
    parts = {}
    for character, kind in zip(CODE, classes, strict=True):
        parts[kind] = parts.get(kind, "") + character
    assert parts.pop("space").strip() == ""
    assert parts == {
        "keyword": "importdefreturn", "name": "xfaa", "number": "12", "string": '"é"',
        "comment": "# why", "docstring": '"""Module."""\'\'\'Doc.\'\'\'', "operator": "():+*",
    }  # fmt: skip


def test_classes_of_tokens_and_documents_that_are_no_python(monkeypatch):
    """A token is what its first character that is no space is; <|endoftext|> parts documents."""
    pieces = [b"def", b" f", b"():", b"\n ", b" return", b" '", "é".encode(), b"'\n", b"", b"def ("]
    fake = mock.Mock(eot_token=8, decode_tokens_bytes=lambda ids: [pieces[i] for i in ids])
    monkeypatch.setattr(prepare_data, "load_tokenizer", lambda folder: fake)
    ids = np.array([*range(8), 8, 9, 8, *range(8)])
    names = [("-", *token_classes.CLASSES)[i + 1] for i in token_classes.classes_of(ids, Path())]
    good = ["keyword", "name", "operator", "space", "keyword", "string", "string", "string"]
    assert names == [*good, "-", "-", "-", *good]


def test_information():
    assert token_classes.information(np.eye(4) * 7) == pytest.approx(2)
    assert token_classes.information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0)
    assert token_classes.information(np.zeros((3, 2))) == 0


def tiny_run(place, steps: int = 1) -> run.Trained:
    """An untrained network, as a measure gets it."""
    values = {**TINY, "data": str(place / "text"), "seed": 0}
    network, settings = train.split_configs(values)
    config = train.TrainConfig(**settings, out=str(place / "text"))
    torch.manual_seed(0)
    net = DeepSeekV3(ModelConfig(**network, initializer_range=0.3)).eval()
    machine = train.Machine(torch.device("cpu"), torch.float32)
    return run.Trained(net, train.open_data(config, 300, machine)[0], config, machine)


@torch.no_grad()
def test_visits_are_all_known_tokens_to_all_their_experts(place):
    trained = tiny_run(place)
    found = token_classes.expert_visits(trained)
    visits, ids = np.array(found["visits"]), trained.data.val.arrays[0].astype(int)
    ids = ids[: len(ids) // 16 * 16]
    classes = token_classes.classes_of(ids, place / "text")
    known = np.bincount(classes[classes >= 0], minlength=8)
    assert visits.shape == (1, 8, 8) and (visits.sum(2) == 2 * known).all() and known.sum() > 100
    trained.net(torch.from_numpy(ids[:16])[None])
    one = trained.net.routing[0][0, 5].tolist()
    assert all(visits[0, classes[5], e] > 0 for e in one)
    assert found["mean_bits"] == pytest.approx(token_classes.information(visits[0]))


@torch.no_grad()
def test_acceptance_on_given_text():
    """Sure where the module draws as the model does, 0 where it never does."""

    class Net:
        def __call__(self, tokens, return_mtp):
            return self.logits, [self.draft]

    net = Net()
    net.logits = torch.randn(2, 6, 9) * 3
    net.draft = net.logits[:, 1:]
    same = mtp.on_given_text(net, None)
    assert same["given_greedy"].all() and torch.allclose(same["given_0.8"], torch.ones(2, 5))
    net.draft = net.logits[:, :-1]
    assert mtp.on_given_text(net, None)["given_0.8"].mean() < 0.9
    net.draft = F.one_hot(net.logits[:, 1:].argmin(-1), 9) * 1e4
    never = mtp.on_given_text(net, None)
    assert not never["given_greedy"].any() and (never["given_0.8"] < 0.1).all()


@torch.no_grad()
def test_loss_by_position_is_the_models(place, monkeypatch):
    trained = tiny_run(place)
    found = long_context.measure(trained)
    T, ids = 64, torch.from_numpy(trained.data.val.arrays[0].astype(int))
    n = (len(ids) - 1) // T
    main, *_ = trained.net(ids[: n * T].view(n, T), ids[1 : n * T + 1].view(n, T))
    assert np.mean(found["by_position"]) == pytest.approx(main.item(), rel=1e-5)
    assert found["by_position"] != found["by_position_yarn"]
    assert found["beyond"] == pytest.approx(np.mean(found["by_position"][-4:]))
    assert asdict(trained.net.config)["rope_scaling"] is None


def test_allowed_speed_up_and_repeats():
    theorem = (1 - 0.8**3) / ((1 - 0.8) * (2 * 0.1 + 1))
    assert speculation.allowed([0.8, 0.64], 0.1, 1.0) == pytest.approx(theorem)
    assert speculation.allowed([0.5], 0.25, 1.25) == pytest.approx(1.0)
    assert speculation.repeats([1, 2, 3, 1, 2, 3, 4], n=3) == pytest.approx(1 / 5)


def test_prompts_are_drawn_alike_each_time():
    first, again = (speculation.unseen_prompts(lambda s: [*s.encode()], 3, 50) for _ in range(2))
    assert first == again and len(set(map(bytes, first))) in (1, 3)  # 1: Python without its tests


# ---- The page of experts -------------------------------------------------------------------------


def made_page(place, ids: list[int]) -> str:
    return page.page(tiny_run(place).net, [ids], lambda i: ["<b>&", "</script>", "é\n"][i % 3])


def test_page_has_every_tokens_experts_and_drafts(place):
    ids, net = [5, 6, 7, 8, 9, 10], tiny_run(place).net
    data = json.loads(re.search(r'id="data">(.*?)</script>', made_page(place, ids), re.DOTALL)[1])
    assert data["layers"] == 1 and data["experts"] == 8
    (tokens,) = data["texts"]
    with torch.no_grad():
        logits, (draft,) = net(torch.tensor([ids]), return_mtp=True)
    for i, token in enumerate(tokens):
        assert {e for e, _ in token["experts"][0]} == set(net.routing[0][0, i].tolist())
        weights = [w for _, w in token["experts"][0]]
        assert weights == sorted(weights, reverse=True) and sum(weights) == pytest.approx(
            2.5, rel=0.01
        )
        if i >= 2:
            assert token["choice"] == ["<b>&", "</script>", "é\n"][logits[0, i - 1].argmax() % 3]
            assert token["draft"] == ["<b>&", "</script>", "é\n"][draft[0, i - 2].argmax() % 3]
    assert [t["draft"] for t in tokens[:2]] == [None, None]


def test_page_works_in_a_browser(place, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs chromium")
    html = made_page(place, [5, 6, 7, 8, 9, 10])
    act = "slider.oninput(); document.querySelectorAll('pre span')[3].onmouseenter()"
    (tmp_path / "page.html").write_text(f"{html}<script>{act}</script>", "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    body = dom[dom.index("<pre>") : dom.index("</pre>")]
    assert body.count("<span") == 6 and body.count("background") == 6
    assert body.count('class="yes"') + body.count('class="no"') == 4
    assert "&lt;/script&gt;" in body and "&lt;b&gt;&amp;" in body  # text, not markup
    assert re.search(r'id="tip">"é\\n" +experts \d: \d\.\d\d, \d: .*\ndraft .*choice', dom)
