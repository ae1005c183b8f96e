"""Stopping decided requests at a middle layer, inside SGLang's forward pass.

A prefill batch runs through the decoder layers one after the other. In front of some layers the
last tokens of verifications are looked at (:mod:`rksc_sglang.cgee.exit_rule`); those that are
decided leave the batch, with the residual stream that they have, and the other requests go on in a
smaller one: rows of the residual stream, positions, KV slots and the attention backend's plan are
those of the requests that are left. Behind the last layer all rows are put together again, so that
the final norm and the logits are SGLang's own. A batch without verifications that may exit runs as
if none of this were here.

The KV that a stopped request has not computed is never read: it ends with this pass, and its
``report`` must see to it that it is not inserted.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rksc_sglang.cgee.exit_rule import ExitRule
from rksc_sglang.decoder import UnsupportedModel, decoder_layers

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

#: Per-request and per-token fields of a ForwardBatch that decoder layers and attention backends
#: read. Everything else stays as it is.
_REQUEST_TENSORS = (
    "req_pool_indices",
    "req_pool_indices_cpu",
    "seq_lens",
    "seq_lens_cpu",
    "orig_seq_lens",
    "extend_seq_lens",
    "extend_prefix_lens",
)
_REQUEST_LISTS = (
    "extend_seq_lens_cpu",
    "extend_prefix_lens_cpu",
    "extend_logprob_start_lens_cpu",
    "rids",
    "lora_ids",
)
_TOKEN_TENSORS = ("input_ids", "positions", "out_cache_loc")


class Candidate(NamedTuple):
    """A request of the batch that may stop.

    Attributes:
        row: its place in the batch.
        labels: token ids.
        report: called once, when it stops or the pass ends, with the layer (None: it did not
            stop), the scores at that layer and what was read in all checks.
    """

    row: int
    labels: tuple[int, ...]
    rule: ExitRule
    report: Callable[[int | None, list[float], list[list[float]]], None]


class _Group:
    """Candidates of one rule and one set of labels: they are looked at together."""

    def __init__(self, candidates: list[Candidate]) -> None:
        self.candidates = candidates
        self.rule, self.labels = candidates[0].rule, list(candidates[0].labels)
        self.seen: list[Tensor] = []  # a check [candidates, n]
        self.entropy: list[Tensor] = []  # a check [candidates]

    def report(self, places: Sequence[int], layer: int | None) -> None:
        if not self.seen:
            return
        seen = torch.stack(self.seen)
        scores = self.rule.scores(seen).tolist()
        for place in places:
            self.candidates[place].report(layer, scores[place], seen[:, place].tolist())

    def drop(self, places: Sequence[int]) -> None:
        stay = [place for place in range(len(self.candidates)) if place not in set(places)]
        self.candidates = [self.candidates[place] for place in stay]
        self.seen = [seen[stay] for seen in self.seen]
        self.entropy = [entropy[stay] for entropy in self.entropy]


class _Pass:
    """One forward pass, and who is still in it.

    Attributes:
        batch: of the requests that are left; ``rows`` are their places in the original one.
        left: row -> its tokens' contribution and residual, of requests that have stopped.
    """

    def __init__(self, batch: ForwardBatch, candidates: Sequence[Candidate]) -> None:
        self.original = self.batch = batch
        self.rows = list(range(batch.batch_size))
        self.left: dict[int, tuple[Tensor, Tensor | None]] = {}
        groups: dict[tuple, list[Candidate]] = {}
        for candidate in candidates:  # a rule may be long: it is known by what it is
            groups.setdefault((id(candidate.rule), candidate.labels), []).append(candidate)
        self.groups = [_Group(some) for some in groups.values()]

    @property
    def shrunk(self) -> bool:
        return self.batch is not self.original


class LayerExit:
    """Lets requests leave the decoder layers of one model.

    Args:
        model: a causal language model of SGLang.
        attention: its attention backend.
        candidates_of: tells who may stop; called once a prefill batch.
        on_error: called, with a word for where, when a pass could not be looked at; those who are
            still in it then stay to its end.

    Raises:
        UnsupportedModel: there are no decoder layers, final norm and output matrix where they are
            in SGLang's models.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: AttentionBackend,
        candidates_of: Callable[[ForwardBatch], Sequence[Candidate]],
        on_error: Callable[[str], None],
    ) -> None:
        self.attention = attention
        self.candidates_of = candidates_of
        self.on_error = on_error
        self.layers, self.norm, self.head = _parts(model)
        _check_batch()
        self._pass: _Pass | None = None
        self._signatures = [inspect.signature(layer.forward) for layer in self.layers]
        if hasattr(model.model, "layer_interceptor"):
            model.model.layer_interceptor = self._around
            return
        for depth, layer in enumerate(self.layers):
            enter = functools.partial(self._enter, depth)
            # In front of whoever else reads the layer's input: that is the smaller batch's.
            layer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            layer.forward = self._wrap(depth, layer.forward)

    def _around(self, depth: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In the place of a call of the layer."""
        args, kwargs = self._enter(depth, layer, args, kwargs) or (args, kwargs)
        return self._run(depth, layer, *args, **kwargs)

    def _enter(
        self,
        depth: int,
        layer: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Before a layer: look, let requests leave, and hand it the batch of those who stay."""
        if depth and self._pass is None:
            return None
        signature = self._signatures[depth]
        given = signature.bind(*args, **kwargs).arguments
        if depth == 0:
            self._pass = self._begin(given["forward_batch"])
        now = self._pass
        if now is None:
            return None
        try:
            new = {"hidden_states": self._look(now, depth, given["hidden_states"])}
        except Exception:
            logger.exception("RKSC: the layers of a batch were not looked at")
            self.on_error("layer_exit")
            now.groups = []
            new = {}
        if now.shrunk:
            new |= {"forward_batch": now.batch, "positions": now.batch.positions}
        # Each stays where it was, by place or by name: others change the call behind this.
        places = list(signature.parameters)[: len(args)]
        args = tuple(new.get(name, value) for name, value in zip(places, args))
        return args, {name: new.get(name, value) for name, value in kwargs.items()}

    def _wrap(self, depth: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self._run(depth, forward, *args, **kwargs)

        return run

    def _run(
        self,
        depth: int,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run a layer on those who are left, if there are any; behind the last one, end."""
        now = self._pass
        if now is None:
            return forward(*args, **kwargs)
        if now.rows:
            hidden = forward(*args, **kwargs)
        else:
            hidden = self._signatures[depth].bind(*args, **kwargs).arguments["hidden_states"]
        if depth == len(self.layers) - 1:
            self._pass = None
            hidden = self._end(now, hidden)
        return hidden

    def _begin(self, batch: ForwardBatch) -> _Pass | None:
        if not batch.forward_mode.is_extend():
            return None
        try:
            candidates = self.candidates_of(batch)
        except Exception:
            logger.exception("RKSC: a batch's verifications were not found")
            self.on_error("layer_exit")
            return None
        return _Pass(batch, candidates) if candidates else None

    def _look(self, now: _Pass, depth: int, hidden: Any) -> Any:
        """Check those whose rule looks here; gives the layer's input, of those who stay."""
        due = [group for group in now.groups if depth in group.rule.layers and group.candidates]
        if not due:
            return hidden
        contribution, residual = _open(now.batch, hidden)
        ends = dict(zip(now.rows, itertools.accumulate(now.batch.extend_seq_lens_cpu)))
        stopped: list[tuple[_Group, list[int]]] = []
        for group in due:
            last = torch.tensor([ends[c.row] - 1 for c in group.candidates])
            last = last.to(contribution.device)
            stream = contribution[last] if residual is None else contribution[last] + residual[last]
            state = self.norm(stream).float()
            check = group.rule.layers.index(depth)
            read = group.rule.read(check, state, self.head.weight, group.labels)
            # A handful of numbers: the rule works on the host, which waits for the device once.
            group.seen.append(read.cpu())
            if group.rule.needs_entropy:
                logprobs = (state @ self.head.weight.float().T).log_softmax(1)
                group.entropy.append(-(logprobs.exp() * logprobs).sum(1).cpu())
            entropy = torch.stack(group.entropy) if group.entropy else None
            decided = group.rule.decided(torch.stack(group.seen), entropy).tolist()
            stopped.append((group, [place for place, stop in enumerate(decided) if stop]))
        leave = {group.candidates[place].row for group, places in stopped for place in places}
        if leave:
            contribution, residual = self._let_go(now, leave, contribution, residual)
        for group, places in stopped:
            group.report(places, depth)
            group.drop(places)
        return _close(now.batch, contribution, residual)

    def _let_go(
        self, now: _Pass, leave: set[int], contribution: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Put the rows in ``leave`` aside; gives the residual stream of the others."""
        counts = list(now.batch.extend_seq_lens_cpu)
        parts = contribution.split(counts)
        residuals = residual.split(counts) if residual is not None else [None] * len(counts)
        stay = [place for place, row in enumerate(now.rows) if row not in leave]
        aside = {
            row: (parts[place], residuals[place])
            for place, row in enumerate(now.rows)
            if row in leave
        }
        tokens = torch.repeat_interleave(
            torch.tensor([row not in leave for row in now.rows]), torch.tensor(counts)
        ).to(contribution.device)
        batch = shrink(now.batch, stay, tokens)
        if stay:
            self.attention.init_forward_metadata(batch)
        now.batch, now.rows = batch, [now.rows[place] for place in stay]
        now.left |= aside
        return contribution[tokens], residual[tokens] if residual is not None else None

    def _end(self, now: _Pass, hidden: Any) -> Any:
        """Behind the last layer: report who stayed, and put all rows together again."""
        for group in now.groups:
            group.report(range(len(group.candidates)), None)
        if not now.shrunk:
            return hidden
        rows = dict(now.left)
        contribution, residual = _open(now.batch, hidden)
        counts = list(now.batch.extend_seq_lens_cpu)
        residuals = residual.split(counts) if residual is not None else [None] * len(counts)
        rows |= zip(now.rows, zip(contribution.split(counts), residuals))
        order = [rows[row] for row in range(now.original.batch_size)]
        contribution = torch.cat([part for part, _ in order])
        if residual is not None:
            residual = torch.cat([part for _, part in order if part is not None])
        return _close(now.original, contribution, residual)


def shrink(batch: ForwardBatch, stay: Sequence[int], tokens: Tensor) -> ForwardBatch:
    """A batch of some of a prefill batch's requests, for decoder layers and attention.

    Args:
        stay: places of these requests.
        tokens: [tokens] bool, which tokens are theirs.
    """
    small = copy.copy(batch)
    for name in _TOKEN_TENSORS:
        value = getattr(batch, name)
        setattr(small, name, value[tokens] if value is not None else None)
    for name in _REQUEST_TENSORS:
        value = getattr(batch, name)
        setattr(small, name, value[list(stay)] if value is not None else None)
    for name in _REQUEST_LISTS:
        value = getattr(batch, name)
        setattr(small, name, [value[place] for place in stay] if value is not None else None)
    small.batch_size = len(stay)
    small.extend_num_tokens = int(tokens.sum())
    small.seq_lens_sum = int(small.seq_lens.sum())
    small.extend_start_loc = small.extend_seq_lens.cumsum(0) - small.extend_seq_lens
    return small


def _open(batch: ForwardBatch, hidden: Any) -> tuple[Tensor, Tensor | None]:
    """What a layer's input is made of: [tokens, hidden_size] each, to be added up."""
    stream = batch.residual_stream
    if stream.pending is not None and not stream.pending.update.is_plain_add:
        raise UnsupportedModel("its layers do more to the residual stream than add to it")
    return stream.export(hidden)


def _close(batch: ForwardBatch, contribution: Tensor, residual: Tensor | None) -> Any:
    """The reverse of :func:`_open`."""
    from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
    from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream

    hidden, batch.residual_stream = ResidualStream.from_handoff(contribution, residual, PLAIN_ADD)
    return hidden


def _check_batch() -> None:
    """Raise UnsupportedModel when SGLang's batches have lost a field that :func:`shrink` cuts."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    for name in (*_TOKEN_TENSORS, *_REQUEST_TENSORS, *_REQUEST_LISTS, "residual_stream"):
        if name not in ForwardBatch.__dataclass_fields__:
            raise UnsupportedModel(f"SGLang moved ForwardBatch.{name}: it is gone")


def _parts(model: nn.Module) -> tuple[nn.ModuleList, nn.Module, nn.Module]:
    """Decoder layers, final norm and output matrix.

    Raises:
        UnsupportedModel: one of them is not where it is in SGLang's models.
    """
    layers = decoder_layers(model)
    norm = getattr(model.model, "norm", None)
    head = getattr(model, "lm_head", None)
    name = type(model).__name__
    if not isinstance(norm, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
        raise UnsupportedModel(f"{name} has no final norm and output matrix that can be used alone")
    for layer in layers:
        known = inspect.signature(layer.forward).parameters
        if not {"positions", "hidden_states", "forward_batch"} <= set(known):
            raise UnsupportedModel(
                f"{type(layer).__name__} takes no batch that could be made smaller"
            )
    return layers, norm, head
