"""llama.cpp's server on a network's weights, for the measurements of bench.py.

It needs two optional packages: xllamacpp and gguf.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from support.gguf import write_gguf
from support.tokenizer import END_OF_TEXT, PATTERN, encoding_from

LLAMA_CPP = {"float32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}  # q8_0: a byte for each weight
# In a process of its own: beside torch's, its threads are 4 times as slow. In float32 all is:
# weights, cache and attention. Else the cache has 16 bits, and attention is llama.cpp's choice.
SERVER = """
import sys, xllamacpp
file, dtype, threads = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.verbosity, params.fit_params = file, -1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
if dtype == "float32":
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()  # which ends with the measurement
"""


@contextmanager
def llama_cpp(
    model: nn.Module, dtype: str, text: Tensor, new: int
) -> Iterator[Callable[[Tensor], Tensor]]:
    """llama.cpp's server on the same weights and threads: prompt (1, T) -> (1, T + new), greedy.

    text: ours; the end token, which llama.cpp must not write here, is none of it.
    """
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}  # any will do: ids go in and out
    end = min({*range(257, model.config.vocab_size)} - {*text.flatten().tolist()})
    vocabulary = encoding_from(ranks, PATTERN, {END_OF_TEXT: end})
    wishes = {"n_predict": new, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
    wishes |= {"cache_prompt": False, "return_tokens": True}

    def complete(prompt: Tensor) -> Tensor:
        body = json.dumps(wishes | {"prompt": prompt[0].tolist()}).encode()
        request = urllib.request.Request(f"{address}/completion", body)
        with urllib.request.urlopen(request) as answer:
            ids = json.load(answer)["tokens"]
        return torch.cat((prompt, torch.tensor([ids])), -1)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        weights, config = model.state_dict().items(), asdict(model.config)
        write_gguf(file, weights, config, vocabulary, LLAMA_CPP[dtype])
        words = SERVER, str(file), dtype, str(torch.get_num_threads())
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with subprocess.Popen([sys.executable, "-c", *words], **pipes) as server:
            address = server.stdout.readline().strip()
            yield complete
