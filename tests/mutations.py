"""Does a test notice? Plants easy mistakes into a copy of the repository, one at a time.

    python tests/mutations.py --help               this text and the sections
    python tests/mutations.py --check              whose old text is not found exactly once
    python tests/mutations.py support/ops.py               the mistakes in ops.py
    python tests/mutations.py tests/test_edits.py  those that these tests must notice
    python tests/mutations.py triu                 those with this text in their line
    python tests/mutations.py                      all of them, which takes hours

For every mistake it prints the test that failed first. It exits with 1 if a mistake survives or its
old text is not found exactly once, and with 2 if nothing fits the word.

A section's heading names the mutated file and the tests that must notice; every line below it is a
mistake, old text and new text around " => ": one that others have made, or that the equations
invite.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = r"""
# model.py tests/test_model.py
pair = -1 if interleave else -2 => pair = -2 if interleave else -1
a * cos - b * sin => a * cos + b * sin
theta ** (-2 * i / R) => theta ** (-i / R)
(1 - ramp) + frequency / factor * ramp => ramp + frequency / factor * (1 - ramp)
min(high, R - 1) => min(high, R // 2 - 1)
-0.5 * mscale**2 => -0.5 * mscale
yarn_mscale(factor, m) / yarn_mscale(factor, m_all) => 1.0
amplitude = yarn_mscale(factor, 1.0) => amplitude = 1.0
upcast(x[:0]).dtype) => x.dtype)
RMSNorm(C, 1e-6) => RMSNorm(C, config.rms_norm_eps)
latent = self.kv_a_layernorm(latent) => latent = latent * 1
config.qk_rope_head_dim) ** => config.v_head_dim) **
k_pe.expand(-1, -1, H, -1)) => 0 * k_pe.expand(-1, -1, H, -1))
q_pe, k_pe = pe.split([pe.shape[2] - 1, 1], 2) => q_pe, k_pe = pe[:, :, :-1], k_pe.unsqueeze(2)
W[:, :N], W[:, N:] => W[:, -N:], W[:, :-N]
> query  # (T => > query + 1  # (T
(S - T if start is None else start) => (0 if start is None else start)
and self.length + T > self.size: => and False:
torch.cat((latent, k_pe.squeeze(2)), -1) => torch.cat((2 * latent, k_pe.squeeze(2)), -1)
if isinstance(start, int) and start == 0: => if True:
dropped.unsqueeze(-1), -math.inf => dropped.unsqueeze(-1), 0.0
groups.topk(2).values.sum(-1) => groups.amax(-1)
gain = s.gather(-1, chosen) => gain = (s + self.e_score_correction_bias).gather(-1, chosen)
choice = s.detach() + self.e_score_correction_bias => choice = s.detach()
if config.norm_topk_prob: => if False:
gain * config.routed_scaling_factor => gain
linear32(x, self.weight).sigmoid() => linear32(x, self.weight).softmax(-1)
linear32(x, self.weight) => upcast(F.linear(x, self.weight.to(x.dtype)))
self.e_score_correction_bias = bias.to(now.device) => pass
if now.dtype != bias.dtype: => if True:
targets.clamp(min=-1) => targets
(linear and own == "weight") => parameter.ndim > 1
if linear and own == "bias": => if False:
load.mean(1, keepdim=True) - load).sign() => load - load.mean(1, keepdim=True)).sign()
load.mean(1, keepdim=True) - load).sign() => load.mean(1, keepdim=True) - load)
load.mean(1, keepdim=True) - load).sign() => load.mean() - load).sign()
self.expert_counts[row].add_(count => self.expert_counts[row].copy_(count
if self.training: => if True:
B, T, E = s.shape => B, T, E = (s := s.flatten(0, 1)[None]).shape
(f * P).sum(-1).mean() => (f * P).sum(-1).mean().detach() + 0 * s.sum()
P = (s / s.sum(-1, keepdim=True)).mean(1) => P = s.mean(1)
* E / (K * T) => * E / T
return s, chosen, gain => return s + self.e_score_correction_bias, chosen, gain
gate, up = F.linear(x[token], W_gate_up) => up, gate = F.linear(x[token], W_gate_up)
y + self.shared_experts(x) => y + 2.5 * self.shared_experts(x)
gain[token, choice]) => gain[token, 0])
self.mlp(self.post_attention_layernorm(x)) => self.mlp(self.input_layernorm(x))
keepdim=True) + eps)).to => keepdim=True))).to
x32 = upcast(x) => x32 = x
dense=i < config.first_k_dense_replace => dense=i < config.first_k_dense_replace - 1
self.enorm(embedding), self.hnorm(h) => self.hnorm(h), self.enorm(embedding)
hidden[-1][:, :-1] => (hidden[-1] / (self.norm.weight if k == 0 else 1))[:, :-1]
hidden[-1][:, :-1] => hidden[0][:, : -k - 1]
tokens[:, k + 1 :]) => tokens[:, k:-1])
return self.norm(u), routing => return u, routing
targets[:, k:].flatten() => targets[:, : h.shape[1]].flatten()
sum(mtp, zero) / max(1, len(mtp)) => sum(mtp, zero)
(targets >= 0).sum().clamp(min=1) => torch.tensor(len(targets))
return upcast(F.linear(h, weight)) => return F.linear(h, weight)
self.mtp_losses = [loss.detach() for => self.mtp_losses = [loss for
if config.tie_word_embeddings: => if False:

# support/ops.py tests/test_model.py
if not isinstance(scale, float) or not => if not
or not q.dtype == k.dtype == v.dtype: => or False:
k.shape[:2] == v.shape[:2] == (B, 1) => k.shape[1] == 1
k.shape[:2] == v.shape[:2] == (B, 1) => k.shape[1] == v.shape[1] == 1
newest = isinstance(start, Tensor) or start in (None, k.shape[2] - T) => newest = True
not (torch.compiler.is_compiling() or isinstance(start, Tensor)) => isinstance(start, int)
elif known and S >= LONG => elif S >= LONG
and k.stride() == v.stride() => 
place and k.shape[-1] >= v.shape[-1] => place
device=x.device), y.clamp(min=0) => device=x.device), y
copied and not kwargs and => copied and
if not on_gpu(x) or weight.shape != x.shape[-1:]: => if not on_gpu(x):
if last != 1 or any( => if any(
dy - y * (dy * y).mean(-1, keepdim=True) => dy
(upcast(x) * r)).reshape => upcast(x)).reshape
or isinstance(eps, Tensor): => or False:
if not compiles(): => if False:
-sin if back else sin => sin
or any(table.requires_grad for table in rope) => or False
gain * (expert == chosen) => gain
v.shape[:3]) or isinstance(start, Tensor) or start: => v.shape[:3]):
torch.promote_types(gate.dtype, up.dtype) => gate.dtype
.triu_(1) => .triu_(2)
k.mT, alpha=scale => k.mT
is_causal=True => is_causal=False
argsort(stable=True)  # 1 4 => argsort(descending=True)  # 1 4
order[real.cummax(0).values] => order.clamp(max=chosen.numel() - 1)
gather(dy, *ctx.saved_tensors) => dy[ctx.saved_tensors[0].view(-1)[: len(dy)]]
torch.where(owned, rows, len(dy)) => rows
scatter(0, slots.flatten(), gain.flatten()) => scatter(0, slots.flatten(), gain.mT.flatten())
torch.zeros_like(weight) if need => torch.ones_like(weight) if need
p[row, y] -= 1 => p[:, 0] -= 1
h = h * real => h = h * 1
dh.mul_(real) => dh
dw += p.T @ x => dw = p.T @ x
scale = grad / n => scale = 1 / n
high = low if on_gpu(h) else upcast(torch.empty_like(low)) => high = low
return y.view(n, K, D).sum(1) => return y.view(K, n, D).sum(0)

# support/ops.py tests/test_sample.py
later = torch.arange(S, device=device) > query => later = torch.arange(S, device=device) > query + 1
elif T > 1: => elif T > 2:
repeat(H, 1) => repeat_interleave(H, 0)
q = (q * scale).reshape => q = (1.0 * q).reshape
later = None if later is None else later[:, old:] => later = None
value=1 / x.shape[-1]).rsqrt_() => value=1).rsqrt_()
return torch.complex(cos, sin)[:, None] => return torch.complex(cos, cos)[:, None]
module.__class__ = nn.Linear => pass
w.__dict__.pop("_turned", None) => pass
module.__dict__.pop(name, None) => pass

# support/tokenizer.py tests/test_release.py
self.bos], self.eos[:1] => self.bos], []
allowed_special="all") => allowed_special=set(), disallowed_special=())
if told.get("add_bos_token"): => if False:
or ids[:1] == [self.bos] => or False
rows=told.get("vocab_size", 0) => rows=0

# support/tokens.py tests/test_release.py
before = [] if ids => [] if ids
after = [] if ids => [] if ids
pieces[0][0], pieces[-1][2] = before, after => pieces[0][0], pieces[0][2] = before, after

# huggingface.py tests/test_edits.py
"code" in saved and saved["code"] != code_of(ModelConfig) => "code" not in saved

# huggingface.py tests/test_huggingface.py
if function is torch.empty else {} => if False else {}
if unsaved or empty.keys() - stored: => if unsaved:
swap_tensors(x, nn.Parameter(y, => swap_tensors(x.clone(), nn.Parameter(y,
return model.to(device, dtype) => return model
ready=each_once) => ready=weights)
    if have != due: => if name not in released:
length, eos = min(128, => length, eos = min(64,
tokens[:, length // 3] = => _ =
i < config.first_k_dense_replace else moe => i < config.first_k_dense_replace + 1 else moe
("gate_proj", "up_proj") => ("up_proj", "gate_proj")
fp8.quantize(tensors[name], fp8.BLOCK) => fp8.quantize(tensors[name], fp8.BLOCK, pow2=True)
if family not in (None, *FAMILY): => if False:
if have != want and not (extend => if False and not (extend
if x.dtype != torch.float8_e4m3fn:  # such => if False:  # such
if tokenizer.n_vocab > config.vocab_size: => if False:
if config.get(original): => if False:
raw.get("torch_dtype") or stored[norm].get_tensor(norm).dtype => raw.get("torch_dtype")
empty = 0 in stored => empty = 0 and 0 in stored
any(n > 128 and n % 128 => any(n % 128

# support/gguf.py tests/test_gguf.py
W[:, :N].mT, W[:, N:] => W[:, -N:].mT, W[:, :-N]
x.chunk(2, dim=1) => x.chunk(2, dim=1)[::-1]
unflatten(1, (2, -1)).transpose(1, 2) => unflatten(1, (-1, 2)).transpose(1, 2)
1 if "kv_a" in kind else H => 1
r"\.(q|q_b)_proj\.|kv_a_proj_with_mqa" => r"\.q_b_proj\.|kv_a_proj_with_mqa"
if config["topk_group"] < config["n_group"]: => if config["topk_group"] <= config["n_group"]:
"expert_gating_func": 2, => "expert_gating_func": 1,
0.1 * yarn["mscale_all_dim"] => yarn["mscale_all_dim"]
float(config["rope_theta"]) => 10000.0
"ffn_gate_inp" in name => False
dtype == "Q8_0" and x.shape[-1] % 32 => False
end = encoding._special_tokens[END_OF_TEXT] => end = 0
{PATTERN: "deepseek-v3", => {PATTERN: "llama-bpe",
if a in ranks and b in ranks => if len(a) == 1 and b in ranks
name == "lm_head.weight" and config["tie_word_embeddings"] => False
(m and m == m_all) => m_all
(not config["routed_scaling_factor"], => (False,

# huggingface.py tests/test_gguf.py
check_free(target, config.overwrite) => pass
write_gguf(file, model => write_gguf(target, model
"max_position_embeddings": model.trained_length} => "max_position_embeddings": 4096}

# support/settings.py tests/test_settings.py
if typing.get_origin(annotation) is typing.Literal: => if False:

# sample.py tests/test_sample.py
self.depth = min(G, len(model.mtp)) => self.depth = len(model.mtp)
model = getattr(model, "_orig_mod", model) => pass
tokens, stats = tokens.long(), stats or Stats() => stats = stats or Stats()
(p / p.sum(-1, keepdim=True) * 2.0**52).floor().cumsum(-1) => p.cumsum(-1)
logits = logits.double() / temperature => logits = logits / temperature
stays = (u[:, :-1] * q_x < p_x) => stays = (u[:, :-1] * q_x <= p_x)
before >= top_p => before > top_p
MATCH = 3 => MATCH = 2
min(outcome[b][0] for b in live) => min(outcome[b][0] for b in range(B))
accepted = min(kept, len(ids)) => accepted = kept
start, hidden = n - 2 + step - k, => start, hidden = n - 1 + step - k,
count = self.drafts + self.depth => count = self.drafts + self.depth - 1
copies is None else self.depth => copies is None else 0
rest = (p_after - q_after).clamp(min=0) => rest = p_after
self.cache.length = n - 1 => pass
vocab_size).to(u.dtype) => vocab_size).to(u.dtype) / 2
kept = torch.where(finite, kept, -1) => pass
u[:, step : step + 1] => u[:, :1]
keepdim=True) > 0, rest, p_after) => keepdim=True) >= 0, rest, p_after)
if b in live else [0] * G => if b in live else row.look_up(G)
move((self, self.cache, self.mtp_cache), buffers) => pass
self.kind = drawn, *others => self.kind = True, *others
kind = copies is None, u.shape => kind = (u.shape,)
if all(found): => if any(found):

# sample.py tests/test_cache.py
hidden = model.trunk(tokens[:, :-1], self.cache) => hidden = model.trunk(tokens, self.cache)[:, :-1]
for n in (0, *range(MOST_NEW, 0, -1)) => for n in (0, *range(MOST_NEW - 1, 0, -1))
(0, shape[1] // 2), (False, True) => (0,), (False, True)
p.add_(shake.to(device), alpha=config.initializer_range) => pass
x[B:, start + kept : start + read] => x[:B, start + kept : start + read]
tokens.device) if tensor and start else start => tokens.device) if not start else start
off > 1e-8 * => off > 1e8 *
.nan_to_num(math.inf) =>
inputs[k][:, :-1], tokens[:, k:] => inputs[k][:, 1:], tokens[:, k:]
torch.float64).eval() => torch.float64)
copy.deepcopy(getattr(model, "_orig_mod", model)) => getattr(model, "_orig_mod", model)

# model.py tests/test_huggingface.py
self.o_proj = nn.Linear(H * V, D, bias=bias) => self.o_proj = nn.Linear(H * V, D, bias=False)
config.n_shared_experts * config => 1 * config

# support/ops.py tests/test_edits.py
if found != digits: => if False:
if enabled and copied and => if enabled and
fingerprint(formula, *others) => fingerprint(formula)
FORMULAS.get(f, f) => functools.reduce(lambda g, _: getattr(g, "__wrapped__", g), range(9), f)
return open_texts > 0 and => return True and

# support/graphs.py tests/test_edits.py
return [x.__self__, x.__func__] => return [x.__func__]
return sorted(map(repr, x)) => return []
isinstance(x, range | slice | numbers.Number) => False
isinstance(x, list | tuple | deque) => isinstance(x, list | tuple)
return [x.func] => return []
*(getattr(x, name, None) for name in slots) => *slots
isinstance(x, types.SimpleNamespace) or not foreign( => not foreign(
[getattr(x, "__wrapped__", None), => [
spaces.append(vars(value)) => pass
if f.__globals__ is globals(): => if False:

# support/digits.py tests/test_edits.py
outer |= {*node.names} => pass
names |= {getattr(node, field)} - {None} => pass
self.visit(first.iter)  # outside => pass
x.annotation = None => pass
node.annotation = None => pass
"kind", "returns", => "kind",
if not is_docstring(y) => if True
names_bound(node.body) | names => names_bound(node.body)
names_bound(x.target for x in node.generators) => {}
tree.decorator_list = [] => pass

# model.py tests/test_edits.py
zip(self.count_rows(), self.routing, strict=True): => enumerate(self.routing):

# train.py tests/test_edits.py
- 1).nanmean().nan_to_num() => - 1).mean().nan_to_num()

# fp8.py tests/test_edits.py
if found != digits: => if False:
if type(down) is not nn.Linear or down.bias is not None: => if False:
if module in gates: => if False:

# fp8.py tests/test_fp8.py
@once_differentiable => 
hook.remove() => pass

# prepare_data.py tests/test_prepare_data.py
start = file.read(2**16) => start = file.read()
isinstance(value, str): => value:
if copied > len(train[name]) / 2: => if copied >= len(train[name]) / 2:
if val_bytes < val_target / 2: => if val_bytes < val_target / 3:
if not lies_in(path, root): => if False:
steps = max(1, 5 * len => steps = max(1, 50 * len
if type(error) is ValueError: => if False:

# support/tokenizer.py tests/test_tokenizer.py
[^\s{_CJK}{_CJK_SIGNS}]) => \S)
(?=[^\s/])") => ")
if taken * total <= passed * limit: => if taken < limit:
if "/" in name or not any( => if not any(
if not lies_in(path, folder): => if False:
("tokenizer_sha256", "pattern", "special_tokens")} => ("tokenizer_sha256", "pattern")}
if len({*ranks.values()}) < len(rows): => if False:
self.encode_batch = without_panic(self.encode_batch) => pass
add_special_tokens=False => add_special_tokens=True
parsed.no_truncation() => pass
if first != bare and => if False and
if identity and identity["pattern"]: => if identity:
same and tokenizer.encode_batch(sample) == other.encode_batch(sample) => same

# support/tokens.py tests/test_tokens.py
files = -(-count // TOKENS_PER_FILE) => files = 1
min(start - begin_of_file, len(array) - length) => start - begin_of_file
np.concatenate(read("val")) => np.concatenate(read("val")[:1])
max(tokens[:1024].max(), tokens[-1024:].max()) => tokens[:1024].max()
path.stat().st_size != HEADER_BYTES => False and HEADER_BYTES

# support/processes.py tests/test_processes.py
import torch.distributed.nn => pass
of_all(choose_dtype(config, device))[0] => choose_dtype(config, device)
if differ := [name for name in first if other[name] != first[name]]: => if False:
trainer.require_backward_grad_sync = now => pass
dist.all_reduce(x) => pass
model.recompute = config.recompute or sharded => model.recompute = config.recompute

# support/checkpoints.py tests/test_processes.py
x = x.full_tensor() if hasattr(x, "full_tensor") else x => pass

# support/checkpoints.py tests/test_runs.py
torch.empty_like(own, dtype=x.dtype).copy_(x) => x.clone()
return x.clone()  # the file may be mapped => return x
torch.set_rng_state(cpu) => pass
@functools.cache  # this process => # this process
weights_only=True, mmap=True => weights_only=False, mmap=True
damaged = archive.testzip() if whole else None => damaged = None
name_of = {p: name for => name_of = {p: "x" for
(k not in made or x != made[k]) => k != "k"
if stored["names"] != self.names or => if
 or len(changed) != len(now): => :
group | options | {"params": group["params"]} => group
group | options | {"params": group["params"]} => group | options
if fused and isinstance(x, Tensor) and => if False and
shape = () if key == "step" else => shape = tuple(x.shape) if key == "step" else
cut_like(x, self.params[i]) for => x for
if self.measured != now: => if False:

# support/runs.py tests/test_runs.py
getattr(os, "O_NOFOLLOW", 0)  # Windows => 0  # Windows
fcntl.flock(file, => 0 and fcntl.flock(file,
if not is_lock_of(file, folder): => if False:
check_folder(out, resume, overwrite)  # only now => pass  # only now
if not is_lock_of(self.lock, self.out): => if False:
in line) < (step, True) => in line) < (step, False)
lambda copy, x=content: copy.write(x) => lambda copy, x=content: copy.write(x[1:])
thing.load_state_dict(cut_like(saved[name], thing.state_dict())) => pass
self.bad_in_a_row >= 5 => self.bad_in_a_row >= 6
(length, -loss) > (progress.best_length, -progress.best_loss) => loss < progress.best_loss
math.isfinite(loss) and progress.step > 0 => progress.step > 0
if self.finished and not math.isfinite(loss): => if False:
if not x.isfinite().all(): => if False:
spoilt=self.saved_step == step - n => spoilt=False
dict(**saved, **about, **more) => saved | about | more
torch.load(file.name, "cpu", weights_only=True, mmap=True) => pass
if stop.heard: => if False:

# support/clock.py tests/test_runs.py
if waiting > 0.25 and => if waiting > 0.35 and

# support/signals.py tests/test_runs.py
if handler not in left} => }
left = (signal.SIG_IGN, None) => left = (signal.SIG_IGN,)
("SIGINT", "SIGTERM", "SIGHUP") => ("SIGINT", "SIGTERM")
if "RANK" not in os.environ: => if self.machine.world == 1:

# support/files.py tests/test_runs.py
part.unlink(missing_ok=True)  # left by => pass  # left by

# support/settings.py tests/test_settings.py
os.open(os.devnull, os.O_RDWR) => pass
if getattr(sys, name) is None: => if False:

# prepare_data.py tests/test_refusals.py
if not re.fullmatch( => if not re.match(

# huggingface.py tests/test_refusals.py
config.check + config.quantize + to_gguf > 1: => False:
if (source / "config.json").exists(): => if False:

# train.py tests/test_refusals.py
runs.check_folder(out, resume=True, => dict(resume=True,
runs.check_folder(out, resume=False, => dict(resume=False,
if out.resolve() in (source, => if 0 and out in (source,

# support/runs.py tests/test_refusals.py
if lacking := self.states.keys() - saved.keys(): => if lacking := set():
if any(name.endswith(".bin") for name in names): => if False:
if names - {".lock"} and not => if False and not
begun = {".lock", "log.jsonl"} <= names => begun = "log.jsonl" in names

# support/settings.py tests/test_runs.py
return in_file | stored | given => return stored | in_file | given

# support/tokens.py tests/test_train.py
[: val_tokens or None] => 
is_path = len(path.parts) > 1 or => is_path =

# support/tokenizer.py tests/test_train.py
same = identity == tokenizer_identity(data) => same = True

# train.py tests/test_runs.py
if finite and save_due: => if save_due:
save_due |= evaluation => save_due = evaluation
stages_from(config, first): => stages_from(config, 0):

# support/signals.py tests/test_files.py
ours = [x for x in NUMBERS if => ours = [x for x in NUMBERS if False and

# support/files.py tests/test_files.py
os.path.lexists(old := => os.path.exists(old :=
not empty and not overwrite => not overwrite
file.flush() => file.flush(); file = open(os.devnull)
if not part.is_symlink():  # that => if False:  # that
check_free(path, overwrite)  # again => pass  # again
folder.rename(old)  # of => folder.rename(old); [x.unlink() for x in old.glob("thesis*")]  # of
if error.filename or error.errno is None: => if True:
with naming(new): => if True:
new = Path(own) / path.name => new = path.with_name(f"{path.name}.part-")
return real.is_relative_to(folder) or => return True or
or real.is_relative_to(cache / "blobs") => 

# support/tokens.py tests/test_prepare_data.py
pieces[0][0], pieces[-1][2] = before, after => pieces[-1][0], pieces[-1][2] = before, after

# support/tokenizer.py tests/test_prepare_data.py
sample_texts(texts, BPE_SAMPLE) => sample_texts(texts[::2], BPE_SAMPLE)

# train.py tests/test_train.py
math.ceil(config.steps / config.eval_every) => config.steps // config.eval_every
config.compile and machine.device.type == "cpu" and => False and
first = machine.rank * config.grad_accum => first = machine.rank
group["lr"] = lr * group.get("lr_scale", 1.0) => group["lr"] = lr
model.eval() => model.eval(); torch.set_grad_enabled(True)
for step in (steps[0], *steps[-2:]): => for step in steps[:1]:
if not file.exists():  # someone => if False:  # someone
config.clip or math.inf => config.clip or 1.0
epochs > MANY_EPOCHS and progress.step == 0 => epochs > MANY_EPOCHS
given |= settings.with_home(given, "out", "data", "init_from") => pass
given_weights = progress.step == 0 and config.init_from => given_weights = False
model.trained_length = max(model.trained_length, config.block_size) => model.trained_length = 9
first = step * config.batch_size * config.block_size // T => first = step * config.batch_size
batch_at(config, step) * config.block_size // T) => batch_at(config, step))
if extended(config, step) and step % 2 => if extended(config, step)
"loss": 1.0, => "loss": 2.0,
weight_of[name] * loss for => loss for
config.alpha * model.config.moe_layers, => config.alpha,
loss.detach() / len(batches) => loss.detach()
(total / len(batches)).backward() => total.backward()
if step < config.gamma_stop * => if step <= config.gamma_stop *

# exercises/check.py tests/test_exercises.py
return part * max( => return 1e4 * part * max(
if case.too_many and times > 3: => if False:
if 2 * same > len(wrong) and not elsewhere: => if True:
if text.count(old) != 1: => if text.count(old) != 2:
torch.zeros_like(x) if g is None else g for => torch.zeros_like(x) for

# docs/annotate.py tests/test_learn.py
lineno, function.end_lineno => lineno, function.lineno + 3
"""


def planted(word: str) -> Iterator[tuple[str, str, str]]:
    """Mutated file, its tests, and the line, of all mistakes for this word."""
    for section in MUTATIONS.strip().split("\n\n"):
        heading, *lines = section.splitlines()
        _, file, guard = heading.split()
        for line in lines:
            if word in (file, guard) or word in line:
                yield file, guard, line


def mutated(file: str, line: str) -> str | None:
    """The file's source with the mistake; none if its old text is not found exactly once."""
    source = (ROOT / file).read_text(encoding="utf-8")
    old, new = re.split(r" => ?", line)
    if source.count(old) != 1:
        return None
    source = source.replace(old, new)
    compile(source, line, "exec")  # a mistake that is no Python tests nothing
    return source


def first_failure(guard: str, file: str, source: str) -> str:
    """Runs the guard in a copy of the repository with this file; the first failing test, or ""."""
    with tempfile.TemporaryDirectory() as directory:
        copy, command = Path(directory) / "copy", [sys.executable, "-m", "pytest", "-qx", guard]
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "data", "out", "hf*"))
        (copy / file).write_text(source, encoding="utf-8")
        run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(?:::(.*?))?(?: - .*)?$", run.stdout, re.M)
    return "" if run.returncode == 0 else (failed and failed[1]) or "does not even import"


def check() -> int:
    """Names the lines that the code has outgrown; runs no test."""
    lost = [x for x in planted("") if mutated(x[0], x[2]) is None or not (ROOT / x[1]).exists()]
    for file, guard, line in lost:
        print(f"{file} {guard}: {line}")
    return 1 if lost else 0


def main(word: str) -> int:
    verdicts = []
    for file, guard, line in planted(word):
        source = mutated(file, line)
        caught = source is not None and first_failure(guard, file, source)
        verdicts.append(bool(caught))
        told = caught or ("OLD TEXT NOT FOUND ONCE" if source is None else "SURVIVED")
        print(f"{line}\n    {told}", flush=True)
    if not verdicts:
        print(f"no mistake fits {word!r}: --help lists the sections", file=sys.stderr)
        return 2
    print(f"{len(verdicts)} mistakes, {verdicts.count(False)} not caught")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    word = " ".join(sys.argv[1:])
    if word in ("-h", "--help"):
        print(__doc__)
        for (file, guard), count in Counter((x[0], x[1]) for x in planted("")).items():
            print(f"    {count:3} mistakes in {file}, for {guard}")
    else:
        sys.exit(check() if word == "--check" else main(word))
