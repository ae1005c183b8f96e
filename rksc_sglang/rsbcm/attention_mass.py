"""How much attention the slots of the KV pool get, sampled while requests decode.

Every few decode passes, in a few layers, the new queries of a few requests are multiplied with the
keys in the pool; the softmax, averaged over heads, is added to a buffer of one number a slot, which
decays. It reads queries and pool by itself, and works beside any attention backend whose passes run
in Python.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rksc_sglang.compat import has_extension
from rksc_sglang.decoder import UnsupportedModel, decoder_layers

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeNode
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)


class SlotMass:
    """Attention that each slot has got, with decay.

    Attributes:
        mass: [slots] float32.
    """

    def __init__(self, slots: int, device: torch.device | str, decay: float = 0.98) -> None:
        self.mass = torch.zeros(slots, device=device)
        self.decay = decay

    def add(self, slots: Tensor, attention: Tensor) -> None:
        """Add attention, float32, to slots, [n] int64; a slot may be there several times."""
        self.mass.index_add_(0, slots, attention)

    def fade(self) -> None:
        self.mass.mul_(self.decay)

    def forget(self, slots: Tensor) -> None:
        """Slots that are written anew, [n] int64."""
        self.mass[slots] = 0.0

    def of_nodes(self, nodes: Iterable[UnifiedTreeNode]) -> dict[UnifiedTreeNode, float]:
        """Mean mass of each node's slots, over the mean of all slots with any; one transfer."""
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        some = list(nodes)
        values = [node.component_data[ComponentType.FULL].value for node in some]
        if not values:
            return {}
        counts = torch.tensor([len(value) for value in values], device=self.mass.device)
        owners = torch.repeat_interleave(torch.arange(len(values), device=self.mass.device), counts)
        sums = torch.zeros(len(values), device=self.mass.device)
        sums.index_add_(0, owners, self.mass[torch.cat(values)])
        mean = self.mass.sum() / (self.mass > 0).sum().clamp(min=1)
        means = sums / counts / mean.clamp(min=torch.finfo(torch.float32).tiny)
        return dict(zip(some, means.tolist()))


class AttentionSampler:
    """Fills a :class:`SlotMass` from a model's decode passes.

    Args:
        wanted: asked before each sample: whether anything is about to be evicted.
        on_error: called with a word for where; after a failure nothing is sampled.
        every: decode passes from one sample to the next.
        requests: at most, of one sample; others have their turn at the next one.

    Attributes:
        seconds: spent so far.

    Raises:
        UnsupportedModel: its layers' attention or the pool are not of the kind that can be read.
    """

    def __init__(
        self,
        model: nn.Module,
        slot_mass: SlotMass,
        rows: ReqToTokenPool,
        pool: Any,
        wanted: Callable[[], bool],
        on_error: Callable[[str], None],
        every: int = 16,
        requests: int = 4,
    ) -> None:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        if not isinstance(pool, MHATokenToKVPool):
            raise UnsupportedModel(f"keys in a {type(pool).__name__} cannot be read")
        self.slot_mass, self.rows, self.pool = slot_mass, rows, pool
        self.wanted, self.on_error = wanted, on_error
        self.every, self.requests = every, requests
        self.passes = self.turn = 0
        self.seconds = 0.0
        self.sampling = False
        layers = _attentions(model)
        # Behind the first layers, which attend to what is near, and before the last ones.
        self.chosen = sorted({len(layers) // 3, 2 * len(layers) // 3})
        for place, index in enumerate(self.chosen):
            first, last = place == 0, place == len(self.chosen) - 1
            observe = functools.partial(self._see, first, last)
            if has_extension("attention_queries"):
                layers[index].query_observer = observe
            else:
                hook = functools.partial(_hand_over, observe)
                layers[index].register_forward_pre_hook(hook, with_kwargs=True)

    def _see(
        self,
        first: bool,
        last: bool,
        attention: RadixAttention,
        query: Tensor,
        batch: ForwardBatch,
    ) -> None:
        """Before a layer's attention."""
        start = time.perf_counter()
        try:
            if first:
                self.slot_mass.forget(batch.out_cache_loc)
                self.sampling = batch.forward_mode.is_decode() and self._is_due()
            if self.sampling:
                self._sample(attention, query, batch)
                if last:
                    self.turn += self.requests
        except Exception:
            logger.exception("RKSC: attention mass is not sampled any more")
            self.on_error("attention_mass")
            self.wanted = lambda: False
            self.sampling = False
        finally:
            self.seconds += time.perf_counter() - start

    def _is_due(self) -> bool:
        self.passes += 1
        if self.passes % self.every or not self.wanted():
            return False
        self.slot_mass.fade()
        return True

    def _sample(self, attention: RadixAttention, query: Tensor, batch: ForwardBatch) -> None:
        keys = self.pool.get_key_buffer(attention.layer_id)
        queries = query.view(-1, attention.tp_q_head_num, attention.qk_head_dim)
        rows, lengths = batch.req_pool_indices, batch.seq_lens
        count = batch.batch_size
        for place in {(self.turn + i) % count for i in range(min(self.requests, count))}:
            # The key of the token itself is not in the pool yet.
            slots = self.rows.req_to_token[rows[place], : int(lengths[place]) - 1].long()
            attended = attention_of(queries[place], keys[slots], attention.scaling)
            self.slot_mass.add(slots, attended)


def _hand_over(
    observe: Callable[..., None], attention: RadixAttention, args: tuple, kwargs: dict[str, Any]
) -> None:
    """A module hook; attention is called with ``q, k, v, forward_batch``, by place or by name."""
    query = args[0] if args else kwargs["q"]
    batch = args[3] if len(args) > 3 else kwargs["forward_batch"]
    observe(attention, query, batch)


def attention_of(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Softmax of one query over keys, averaged over heads.

    Args:
        query: [heads, head_dim].
        keys: [tokens, kv_heads, head_dim].

    Returns:
        [tokens] float32, of sum 1.
    """
    groups = query.float().view(keys.shape[1], -1, query.shape[-1])
    scores = torch.einsum("khd,tkd->kht", groups, keys.float()) * scale
    return scores.softmax(-1).mean((0, 1))


def _attentions(model: nn.Module) -> Sequence[RadixAttention]:
    """The attention of each layer, of those that keep all of their keys."""
    from sglang.srt.layers.radix_attention import RadixAttention

    found = [
        module
        for layer in decoder_layers(model)
        for module in layer.modules()
        if isinstance(module, RadixAttention) and module.sliding_window_size == -1
    ]
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no layer that keeps all of its keys")
    return found
