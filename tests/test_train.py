"""Training is exact: schedules, windows, optimisers, one step, the evaluation, the command."""

import copy
import functools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training import (
    MACHINE,
    ROOT,
    SHORT,
    TEXT,
    TINY_FILE,
    assert_same,
    assert_same_run,
    load,
    log_of,
    refused,
    run,
)  # fmt: skip

import train
from huggingface import save_pretrained
from load import load_model
from model import DeepSeekV3, Gate, ModelConfig
from support import processes
from support.settings import Refusal, read_config_file
from support.tokenizer import END_OF_TEXT, stored_tokenizer
from support.tokens import Dataset, Tokens, load_dataset

pytestmark = pytest.mark.usefixtures("workplace")
LONG = ["--dtype=float32", "--long_block_size=32", "--long_start=0.5", "--log_every=3"]


# ---- Schedules -----------------------------------------------------------------------------------


def test_learning_rate_follows_section_4_2():
    config = train.TrainConfig(steps=10_000, lr=2.0)
    points = {
        0: 2 / 86, 42: 2 * 43 / 86, 84: 2 * 85 / 86, 85: 2, 6759: 2, 6760: 2,
        7485: 2 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), 8210: 2 * 0.55, 9659: 2 * 0.1,
        9660: 2 * 0.1, 9886: 2 * 0.1, 9887: 2 * 0.0332, 9999: 2 * 0.0332,
    }  # fmt: skip
    for step, expected in points.items():
        assert train.lr_at(config, step) == pytest.approx(expected, rel=1e-5), step


def test_what_changes_in_the_run_changes_at_its_very_step():
    config = train.TrainConfig(steps=10, block_size=16, long_block_size=64, long_start=0.5)
    config = replace(config, mtp_switch=0.5, gamma=0.25, gamma_stop=0.5)
    assert [train.block_at(config, step) for step in range(8)] == [16] * 5 + [64, 16, 64]
    assert [train.in_yarn_phase(config, step) for step in (4, 5, 6)] == [False, True, True]
    assert not train.in_yarn_phase(replace(config, long_block_size=0), 9)
    assert [train.mtp_weight_at(config, step) for step in (4, 5)] == [0.3, 0.1]
    assert [train.gamma_at(config, step) for step in (4, 5)] == [0.25, 0]


FILES = [*sorted((ROOT / "config").glob("[!_]*.py")), ROOT / "experiments/base.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_schedules_of_our_configurations_are_in_order(file):
    values = read_config_file(str(file), ModelConfig, train.TrainConfig)
    assert train.TrainConfig(**train.split_configs(values)[1])


# ---- Windows -------------------------------------------------------------------------------------


def test_every_token_comes_once_in_an_epoch():
    data = SimpleNamespace(train=Tokens([np.arange(1000, dtype=np.uint16)]), vocab_size=1000)
    config = train.TrainConfig(batch_size=4, block_size=16)
    x = np.concatenate([train.train_windows(data, config, step) for step in range(31)])
    assert x.shape == (31 * 4, 17) and x.max() < 1000 and np.all(np.diff(x) == 1)
    one, two = x[:, :-1].reshape(2, -1)  # 62 windows each, so the 16th step has both
    for epoch in (one, two):
        assert np.array_equal(np.sort(epoch), epoch.min() + np.arange(62 * 16))
    assert not np.array_equal(one - one.min(), two - two.min())
    begins = {train.epoch_starts(1337, epoch, 1000, 16).min() for epoch in range(20)}
    assert len(begins) > 4 and max(begins) < 8  # the borders move, by what 62 windows leave
    assert not np.array_equal(x[:4], train.train_windows(data, replace(config, seed=1), 0))


def test_long_windows_of_steps_that_take_turns_come_once_in_an_epoch():
    data = SimpleNamespace(train=Tokens([np.arange(1000, dtype=np.uint16)]), vocab_size=1000)
    config = train.TrainConfig(batch_size=4, block_size=16, long_block_size=32, long_start=0)
    starts = [train.train_windows(data, config, step)[:, 0] for step in range(1, 15, 2)]
    first = train.epoch_starts(config.seed, 0, 1000, 32)  # 31, of which 14 steps of 64 see half
    assert np.array_equal(np.array(starts), first[:28].reshape(-1, 4)[:, 2:])


# ---- Steps ---------------------------------------------------------------------------------------


def test_steps_equal_a_plain_training_loop(data):
    """Loss weights and their switch, clipping, AdamW, decay groups, schedule, bias update."""
    options = dict(
        steps=4, lr=0.02, warmup=0.3, decay_start=0.5, decay_end=0.9, min_lr=0.1, clip=0.5,
        weight_decay=0.3, beta1=0.8, beta2=0.9, mtp_weight=0.4, mtp_weight_late=0.2,
        mtp_switch=0.5, gamma=0.05, gamma_stop=0.75, alpha=0.3, seed=7,
        adamw_lr=3.0,  # without effect, as there is no Muon
    )  # fmt: skip
    out = run("--attention_bias", *(f"--{key}={value}" for key, value in options.items()))
    config = train.TrainConfig(**options, batch_size=4, block_size=16)
    dataset, lines = load_dataset(data), [x for x in log_of(out) if "loss" in x]
    torch.manual_seed(config.seed)
    model = DeepSeekV3(ModelConfig(**load(out)["model_config"])).double()
    groups = []
    for name, p in model.named_parameters():
        decayed = not ("norm" in name or name.endswith("bias"))
        groups.append({"params": [p], "weight_decay": 0.3 if decayed else 0.0})
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    norms = []
    for t in range(4):
        x = torch.from_numpy(train.train_windows(dataset, config, t))
        losses = model(x[:, :-1], x[:, 1:])
        if losses.keys() != {"loss", "mtp_loss", "balance_loss"}:
            pytest.skip("an edit has another loss, whose weight this loop does not know")
        loss = losses["loss"] + (0.4 if t < 2 else 0.2) * losses["mtp_loss"]
        loss += 0.3 * losses["balance_loss"]
        adamw.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        for group in adamw.param_groups:
            group["lr"] = train.lr_at(config, t)
        adamw.step()
        loads = [torch.bincount(chosen.flatten(), minlength=8).float() for chosen in model.chosen]
        vio = sum((x.max() / x.mean() - 1).item() for x in loads) / 3
        for gate, load_ in zip(model.gates(), loads, strict=True):
            if t < 3:
                gate.e_score_correction_bias += 0.05 * (load_.mean() - load_).sign()
        expected = dict(
            step=t + 1, tokens=(t + 1) * 64, max_vio=vio, grad_norm=norms[-1],
            lr=train.lr_at(config, t), **{name: loss.item() for name, loss in losses.items()},
        )  # fmt: skip
        assert lines[t] == pytest.approx(expected, rel=1e-6)
    assert_same(load(out)["model"], dict(model.state_dict()), 1e-10)
    assert max(norms) > 0.5, "no step was clipped"


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
def test_a_muon_run_goes_on_in_another_dtype(dtypes):
    for dtype, options in zip(dtypes, (["--steps=1"], ["--steps=2", "--resume"]), strict=True):
        run("--optimizer=muon", f"--dtype={dtype}", *options)
    state = load("run")["Muon 1"]["state"]
    assert {str(x["momentum_buffer"].dtype) for x in state.values()} == {f"torch.{dtypes[1]}"}


def test_muon_takes_the_matrices_one_by_one_and_adamw_the_rest(shared, capsys):
    """In bfloat16, as torch.optim.Muon does."""
    model = load_model(shared("--n_routed_experts=64", "--optimizer=adamw"))[0].float()
    layer = model.layers[1]
    layer.o_gate = torch.nn.Linear(8, 512, bias=False)  # a hacker's; rows as the vocabulary's
    # And what is none, or is no part of a layer.
    layer.table, model.own_head = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 512, bias=False)
    layer.conv, model.own_mix = torch.nn.Conv1d(6, 6, 3), torch.nn.Linear(6, 6, bias=False)
    settings = dict(optimizer="muon", lr=0.01, adamw_lr=2.0, weight_decay=0.3, dtype="bfloat16")
    config, own = train.TrainConfig(**settings), "table|own_head|conv|own_mix"
    optimizers, pairs = train.make_optimizers(model, config), []
    said = re.search(r"muon: (\d+) matrices of the layers; AdamW", capsys.readouterr().err)
    for name, p in model.named_parameters():
        matrices = [torch.nn.Parameter(x.clone()) for x in (p if p.ndim == 3 else [p])]
        if p.ndim == 1 or re.search(rf"embed_tokens|lm_head|mlp\.gate\.weight|{own}", name):
            decay = 0.3 if p.ndim > 1 else 0.0
            reference = torch.optim.AdamW(matrices, 0.02, (0.9, 0.95), weight_decay=decay)
        else:
            reference = torch.optim.Muon(matrices, 0.01, 0.3, adjust_lr_fn="match_rms_adamw")
        pairs.append((p, matrices, reference))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["lr_scale"]
    for _ in range(2):
        for p, matrices, reference in pairs:
            p.grad = torch.randn_like(p)
            for matrix, grad in zip(matrices, p.grad if p.ndim == 3 else [p.grad], strict=True):
                matrix.grad = grad.clone()
            reference.step()
        for optimizer in optimizers:
            optimizer.step()
    for p, matrices, _ in pairs:
        torch.testing.assert_close(p, torch.stack(matrices).view_as(p), rtol=1e-5, atol=1e-7)
    count = sum(len(x) for _, x, reference in pairs if isinstance(reference, torch.optim.Muon))
    # Of 3 + 1 layers, one of them dense: 5 matrices of attention each; 3 x (2 x 64 + 3) + 3 of
    # experts and MLPs; eh_proj; o_gate.
    assert int(said[1]) == count == 20 + 396 + 2


@pytest.mark.parametrize("how", ["recompute", "deterministic", "compile"])
def test_steps_are_the_same_recomputed_or_compiled(how, shared):
    """A graph for each kind of block, whatever its layer, the windows and the experts' choices."""
    options = [*LONG, "--dtype=bfloat16"] if how == "compile" else []
    torch._dynamo.utils.counters.clear()
    compile = functools.partial(torch.compile, backend="eager")
    again = mock.patch("model.checkpoint", wraps=torch.utils.checkpoint.checkpoint)
    decide = processes.Machine.eager_on_cpu
    asked = mock.patch.object(processes.Machine, "eager_on_cpu", autospec=True, side_effect=decide)
    with mock.patch.object(torch, "compile", compile), again as recomputed, asked as asked:
        ours = run(f"--{how}", *options)
    assert recomputed.called == (how == "recompute")
    # A dense block, a block of experts, an MTP module, the last norm, the loss.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5 * (how == "compile")
    # A batch on trial and two evaluations are eager, and the four steps of the last phase.
    assert asked.call_count == (7 if how == "compile" else 3)
    assert_same_run(shared(*options), ours, 1e-10 if how == "recompute" else 0.0)
    assert not torch.are_deterministic_algorithms_enabled()  # in training only


def test_a_line_has_the_means_since_the_last_one(shared):
    steps = [line for line in log_of(shared()) if "loss" in line]
    lines = [line for line in log_of(shared("--log_every=5")) if "loss" in line]
    assert [line["step"] for line in lines] == [5, 8]
    for line, since in zip(lines, (steps[:5], steps[5:]), strict=True):
        for key in ("loss", "mtp_loss", "balance_loss", "max_vio"):
            assert line[key] == pytest.approx(sum(x[key] for x in since) / len(since), rel=1e-12)
        assert (line["lr"], line["grad_norm"]) == (since[-1]["lr"], since[-1]["grad_norm"])


def test_a_bad_step_changes_neither_weights_nor_biases(faults, monkeypatch, capsys):
    faults.bad_gradients(3)
    updated, saved, update = [], [], DeepSeekV3.update_bias

    def update_bias(model, gamma):
        update(model, gamma)
        updated.append(copy.deepcopy(model.state_dict()))
        saved.append(load("run")["step"] if Path("run/ckpt.pt").exists() else 0)

    monkeypatch.setattr(DeepSeekV3, "update_bias", update_bias)
    run("--save_every=3", "--eval_every=3")
    assert_same(updated[1], updated[2])
    assert not updated[2]["norm.weight"].equal(updated[3]["norm.weight"])
    assert saved == [0, 0, 0, 0, 4, 4, 6, 6]  # what is due in the bad step comes after the next
    line = log_of("run")[2]
    assert line["grad_norm"] is None and line["loss"] > 0
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(told) == 1 and told[0].startswith("step 3/8:") and "1 skipped" in told[0]


def test_no_limit_of_the_gradient_norm_is_none():
    free, huge = (run(f"--clip={x}", "--steps=3", out=f"clip {x}") for x in ("0", "1e9"))
    assert min(line["grad_norm"] for line in log_of(free) if "loss" in line) > 1.2
    assert_same(load(free)["model"], load(huge)["model"])


# ---- Evaluation ----------------------------------------------------------------------------------


@pytest.fixture
def trained(shared, data) -> tuple[DeepSeekV3, Dataset, train.TrainConfig]:
    model, dataset = load_model(shared())[0], load_dataset(data)
    dataset.val = Tokens([dataset.val.arrays[0][:1000]])  # its last window is ragged
    return model, dataset, train.TrainConfig(block_size=16, batch_size=32)


def test_evaluation_predicts_every_token_once_whatever_its_batch(trained, data):
    model, dataset, config = trained
    grads = []  # nothing is kept for a backward pass
    model.norm.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    evaluate = functools.partial(train.evaluate, model, dataset, machine=MACHINE)
    result, *others = (
        evaluate(config=replace(config, batch_size=n, grad_accum=parts))
        for n, parts in ((32, 1), (1, 1), (14, 2))
    )
    for other in others:
        assert_same(result, other, 1e-12)
    assert {*grads} == {False}
    tokens = torch.from_numpy(dataset.val.arrays[0].astype(np.int64))
    nats, mtp, nodes, counts = [], [], [], 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):
            piece = tokens[start : start + 17]
            logits, (ahead, *_) = model(piece[None, :-1], return_mtp=True)
            nats += F.cross_entropy(logits[0], piece[1:], reduction="none").tolist()
            mtp += F.cross_entropy(ahead[0], piece[2:], reduction="none").tolist()
            counts += torch.stack(
                [x.flatten().bincount(minlength=8) for x in model.chosen]
            ).double()
            nodes += [len({e // 2 for e in row}) for x in model.chosen for row in x[0].tolist()]
    shares = (counts / counts.sum(1, keepdim=True)).float()
    assert_same(torch.tensor(result.pop("expert_load")), shares, 1e-5)
    assert result.pop("val_mtp_losses") == [result["val_mtp_loss"]]
    tokens_of_file = (data / "val.bin").stat().st_size // 2 - 512
    whole = stored_tokenizer(data).encoding.decode(np.fromfile(data / "val.bin", "<u2")[512:])
    bytes_of_file = len(whole.replace(END_OF_TEXT, "").encode())
    assert result == pytest.approx({
        "val_loss": np.mean(nats),
        "val_bpb": np.mean(nats) / math.log(2) * tokens_of_file / bytes_of_file,
        "val_mtp_loss": np.mean(mtp),
        "max_vio_global": (counts.amax(1) / counts.mean(1) - 1).mean().item(),
        "nodes_per_token": np.mean(nodes),
        "experts_per_node": 2 / np.mean(nodes),
    })  # fmt: skip


def test_an_evaluation_on_trial_leaves_no_trace(trained):
    model, dataset, config = trained
    dataset = SimpleNamespace(**vars(dataset))  # as check.py and the experiments have it
    model, sizes = copy.deepcopy(model).train(), []
    model.norm.register_forward_hook(lambda _, x, y: sizes.append((y.shape[0], torch.rand(1))))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    train.try_evaluation(model, dataset, replace(config, grad_accum=4), MACHINE)
    assert [size for size, _ in sizes] == [8] and model.training  # a micro-batch
    assert_same(before, model.state_dict())
    assert_same(random, torch.get_rng_state())


def test_experts_are_counted_in_an_edited_network(trained, monkeypatch):
    """A block runs twice, as two layers."""
    model, dataset, config = trained
    model, choose, kept = copy.deepcopy(model), Gate.forward, []
    model.layers.append(model.layers[-1])

    def edited(gate, x):
        scores, chosen, gain = choose(gate, x)
        kept.append(chosen.flatten(0, 1))
        return scores, chosen, gain

    monkeypatch.setattr(Gate, "forward", edited)
    dataset.val = Tokens([dataset.val.arrays[0][: 32 * 16 + 1]])  # one batch
    result = train.evaluate(model, dataset, config, MACHINE)
    loads = [x.flatten().bincount(minlength=8) for x in kept]
    groups = [{e // 2 for e in row} for x in kept for row in x.tolist()]
    assert_same(result["expert_load"], [(x / x.sum()).tolist() for x in loads], 1e-5)
    uneven = np.mean([(x.max() / x.float().mean() - 1).item() for x in loads])
    assert result["max_vio_global"] == pytest.approx(uneven)
    unused = torch.zeros(8)  # a layer's, of which no average is taken
    assert train.max_vio([*loads, unused]).item() == pytest.approx(uneven)
    assert train.max_vio([unused]).item() == 0
    assert result["nodes_per_token"] == pytest.approx(np.mean([len(x) for x in groups]))
    visits = sum(x.sum().item() for x in loads)
    assert result["experts_per_node"] == pytest.approx(visits / sum(map(len, groups)))


# ---- Long context --------------------------------------------------------------------------------


def test_the_last_part_of_a_run_extends_the_context(shared, data):
    out, dataset = shared(*LONG), load_dataset(data)
    config = train.TrainConfig(**load(out)["train_config"])
    shapes = [train.train_windows(dataset, config, step).shape for step in range(8)]
    assert shapes == [(4, 17)] * 5 + [(2, 33), (4, 17), (2, 33)]
    model, _ = load_model(out)
    yarn = model.config.rope_scaling
    assert (yarn["factor"], yarn["original_max_position_embeddings"]) == (2, 16)
    assert model.trained_length == 32
    first, last = (line for line in log_of(out) if "val_loss" in line)
    assert "val_bpb_long" not in first
    long = train.evaluate(model, dataset, replace(config, block_size=32), MACHINE)["val_bpb"]
    assert last["val_bpb_long"] == pytest.approx(long, rel=1e-6) != pytest.approx(last["val_bpb"])
    # A run that starts from these weights stretches the original length anew.
    train.extend_context(model, replace(config, block_size=32, long_block_size=64))
    assert (model.config.rope_scaling["factor"], model.trained_length) == (4, 64)


# ---- Weights from elsewhere ----------------------------------------------------------------------


def test_weights_without_a_tokenizer_need_a_vocabulary_of_the_same_size(data):
    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    save_pretrained(DeepSeekV3(ModelConfig(**small, vocab_size=1024)), "hf")
    with pytest.raises(Refusal, match=f"is 1024, but the vocabulary of {data} has 512 tokens"):
        train.command(["--init_from=hf", f"--data={data}", "--eval_only"])


def test_weights_that_a_run_starts_from_are_named_and_evaluated_once(shared, capsys):
    """Resumed, or with --eval_only, it evaluates its own, though its config file has init_from."""
    source = shared("--steps=4")
    (before,) = (x["val_loss"] for x in log_of(source) if "val_loss" in x)
    Path("my.py").write_text(f"{Path(TINY_FILE).read_text()}init_from = {str(source)!r}\n")
    options = ("my.py", "--out=run", *SHORT, "--eval_every=9", "--lr=0.1")  # too much
    capsys.readouterr()
    train.main([*options, "--steps=1"])
    said = capsys.readouterr().err
    assert f"start: from {source}\n" in said
    assert said.index("step 0/1: val_loss") < said.index("step 1/1: loss")
    assert (log_of("run")[0]["tokens"], load("run", "best.pt")["step"]) == (0, 1)
    train.main([*options, "--steps=2", "--resume"])
    lines = [line for line in log_of("run") if "val_loss" in line]
    assert [line["step"] for line in lines] == [0, 1, 2]
    initial, *losses = (line["val_loss"] for line in lines)
    assert initial == pytest.approx(before, rel=1e-9) and losses[0] > initial
    capsys.readouterr()
    train.main([*options, "--eval_only"])
    assert json.loads(capsys.readouterr().out)["val_loss"] == min(losses)
    train.main([*options, "--eval_only", "--rope_theta=9"])
    assert capsys.readouterr().err.count("rope_theta is now 9.0 (was 10000.0") == 1


def test_a_network_may_get_a_parameter_more_than_the_weights_it_starts_from(monkeypatch):
    """What the file has is kept: tests/test_huggingface.py."""
    old, init = run("--steps=1", out="old"), DeepSeekV3.__init__

    def with_gain(self, config):
        init(self, config)
        self.layers[0].gain = torch.nn.Parameter(torch.full((4,), 3.0))

    monkeypatch.setattr(DeepSeekV3, "__init__", with_gain)
    assert "layers.0.gain is missing" in refused("--resume", "--steps=2", out="old")
    run("--steps=1", f"--init_from={old}", "--lr=0", out="more")
    assert load("more")["model"]["layers.0.gain"].tolist() == [3.0] * 4


# ---- The command ---------------------------------------------------------------------------------


def test_from_text_to_text_on_the_command_line():
    def user(script: str, *argv: str) -> subprocess.CompletedProcess:
        argv = [sys.executable, str(ROOT / script), *argv]
        done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        warnings = [x for x in done.stderr.splitlines() if "Warning" in x and "/torch/" not in x]
        assert "Traceback" not in done.stderr and not warnings, done.stderr
        assert "\r" not in done.stderr, "no progress bars in a file"
        return done

    user("prepare_data.py", TEXT, "--name=text", "--vocab_size=512")
    done = user(
        "train.py", TINY_FILE, "--data=text", "--steps=40", "--block_size=32", "--log_every=2"
    )
    for words in (
        "M parameters",
        "bits/byte",
        "python sample.py out/tiny",
        "check.py out/tiny",
    ):
        assert words in done.stderr
    # The first step has a line of its own, before the first line of the log.
    line = r"(?m)^step 1/40: loss [\d.]+, [\d.]+ s, [\d:]+ left\nstep 2/40: "
    assert re.search(line, done.stderr)
    first = load_dataset("data/text").val.arrays[0][1:9].tolist()
    prompt = stored_tokenizer("out/tiny").encoding.decode(first).strip()
    assert done.stdout.startswith(prompt)
    files = {path.name for path in Path("out/tiny").iterdir()}
    copies = {"tokenizer.tiktoken", "meta.json", "model.py", "train.py"}
    assert files == {"ckpt.pt", "best.pt", "log.jsonl", ".lock"} | copies
    losses = [line["loss"] for line in log_of("out/tiny") if "loss" in line]
    assert losses[0] > losses[-1] and len(losses) == 20
    done = user("sample.py", "--ckpt=out/tiny", "--prompt=import ", "--max_new_tokens=20")
    assert done.stdout.startswith("import ") and len(done.stdout) > 10
