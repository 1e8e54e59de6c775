"""How many parameters a network has, and how many numbers decoding keeps of a text."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Counts the parameters of a DeepSeekV3:

    total     parameters and correction biases of the main model
    active    those that one token uses: K of the E experts, and one row of an embedding table that
              an edit added
    mtp       parameters of the MTP modules, which are not in `total`
    """
    E, K = model.config.n_routed_experts, model.config.num_experts_per_tok
    tables = [x for x in model.modules() if isinstance(x, nn.Embedding)]
    row = {x.weight: x.embedding_dim for x in tables if x is not model.embed_tokens}
    count, stored = {"total": 0, "active": 0, "mtp": 0}, model.state_dict().keys()
    for name, x in (*model.named_parameters(), *model.named_buffers()):  # tied weights once
        if name not in stored:  # such as a gate's load
            continue
        if name.startswith("mtp."):
            count["mtp"] += x.numel()
        else:
            count["total"] += x.numel()
            used = x.numel() * K // E if ".experts." in name else x.numel()
            count["active"] += row.get(x, used)
    return count


def caches(layers: Iterable[nn.Module], size: int, like: Tensor) -> list[Tensor]:
    """What these layers keep of one text of `size` tokens: shapes and dtypes, no memory."""
    kept = tree_leaves([layer.new_cache(1, size, like.to("meta")) for layer in layers])
    return [x for x in kept if x is not None]


def longest_window(model: nn.Module) -> int:
    """The number of places in the longest cache that does not grow with the text: the second
    dimension of a ring buffer (B, places, ...) or of a state. 0 if all caches grow."""
    parts, like = (*model.layers, *model.mtp), model.embed_tokens.weight
    n = model.config.max_position_embeddings
    pairs = zip(*(caches(parts, size, like) for size in (n, 2 * n)), strict=True)
    return max((x.shape[1] for x, y in pairs if x.shape == y.shape and x.ndim > 1), default=0)


def cache_numbers(model: nn.Module) -> tuple[int, int, int]:
    """The size of a DeepSeekV3's cache, in numbers of the weights' dtype: per token; per text,
    whatever its length (0 with MLA; more if an edit adds a ring buffer or a recurrent state); and,
    to compare, per token in multi-head attention, which keeps all heads' keys and values."""
    config, like = model.config, model.embed_tokens.weight

    def numbers(size: int) -> int:  # in the caches of all layers, for one text
        return sum(x.nbytes for x in caches(model.layers, size, like)) // like.element_size()

    n = config.max_position_embeddings
    per_token = (numbers(2 * n) - numbers(n)) // n
    head = config.qk_nope_head_dim + config.v_head_dim
    heads = len(model.layers) * config.num_attention_heads * head
    return per_token, numbers(n) - per_token * n, heads
