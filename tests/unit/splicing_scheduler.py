"""Splicing at admission on SGLang's real tree, allocator, pools and prefill adder, without a model.

What a forward pass would write is written down beside the pool: the KV of a token is known by the
tokens that it was computed behind, or as tainted, when one of them was spliced.
"""

from types import SimpleNamespace

import pytest
import torch

from rksc_sglang.asks.content_index import ContentIndex
from rksc_sglang.asks.plan import Planner
from rksc_sglang.asks.profile import Thresholds
from rksc_sglang.asks.root_first import make_adder_class
from rksc_sglang.serving.admission import SplicingPrefillAdder
from rksc_sglang.serving.donors import Donors
from rksc_sglang.serving.internal import ModelFacts, is_internal
from rksc_sglang.serving.joined import JoinedPass
from rksc_sglang.serving.joining import JoiningSplicer
from rksc_sglang.serving.splice_state import SpliceState
from rksc_sglang.serving.splicing import Splicer
from rksc_sglang.serving.splicing_cache import SplicingRadixCache

TAINTED = "tainted"
DOC = [10 + i % 17 + i // 17 for i in range(40)]
LONG = list(range(100, 160))


class SymbolicKv:
    """A layer's cache of keys or values, in place of a tensor."""

    def __init__(self, kv):
        self.kv = kv

    def __getitem__(self, slots):
        return [self.kv.get(slot) for slot in slots.tolist()]

    def __setitem__(self, slots, values):
        self.kv.update(zip(slots.tolist(), values))


class Scheduler:
    """SGLang's scheduling steps around the splicer, on one small pool."""

    def __init__(
        self,
        make_cache,
        make_req,
        capacity=256,
        page_size=1,
        head=2,
        tail=1,
        min_tokens=4,
        joins=False,
    ):
        self.make_req = make_req
        self.cache = make_cache(SplicingRadixCache, capacity, page_size)
        self.capacity = capacity
        self.kv = {}  # slot -> the tokens up to its own, or TAINTED
        self.similarity = {}  # donor slot -> similarity; 1 where not given
        self.cache.enable_splicing(ContentIndex(capacity + page_size, window=2), self.copy)
        self.cache.on_error = self.fail
        self.counts = []
        signatures = SimpleNamespace(
            similarity=lambda own, others: [self.similarity.get(o[-1], 1.0) for o in others]
        )
        planner = Planner(head, tail, min_tokens, page_size)
        self.splicer = (JoiningSplicer if joins else Splicer)(
            self.cache,
            signatures,
            planner,
            Thresholds(0.5, 0.0, "test", "test"),
            ModelFacts(100, None),
            Donors(lambda: self.waiting),
            self.counts.append,
        )
        self.adder_class = make_adder_class(
            8,
            awaits=lambda req: False,
            on_held=lambda req: None,
            on_error=self.fail,
            base=SplicingPrefillAdder,
            splicer=self.splicer,
        )
        # What the attention backend does between the writing of KV and attention, for one layer.
        self.backend = SimpleNamespace(on_kv_written=None)
        pool = SimpleNamespace(k_buffer=[SymbolicKv(self.kv)], v_buffer=[SymbolicKv({})])
        shift = SimpleNamespace(of=self.shift)
        judge = self.splicer.judge if joins else None
        self.joined = JoinedPass(self.cache, self.backend, pool, shift, judge)
        self.splicer.joined = self.joined if joins else None
        self.waiting, self.running, self.computed = [], [], {}
        self.copied = []
        self.again = {}  # request id -> the request that took the place of a refused one

    def fail(self, where):
        pytest.fail(f"an error inside RKSC was swallowed: {where}")

    def copy(self, source, target, delta, head, donor_head):
        assert not set(source.tolist()) & set(target.tolist())
        if head is not None:
            self._check_heads(head.tolist(), donor_head.tolist(), source[0].item())
        for slot in target.tolist():
            self.kv[slot] = TAINTED
        for slot in source.tolist():
            assert self.kv[slot] != TAINTED, "a donor is not exact"
        self.copied.append((source.tolist(), target.tolist(), delta))

    def shift(self, runs):
        def add(k_caches, v_caches):
            for run in runs:
                # The latest: slots are used again.
                source = next(s for s, t, _ in self.copied[::-1] if t == run.target.tolist())
                self._check_heads(run.head.tolist(), run.donor_head.tolist(), source[0])

        return SimpleNamespace(add=add)

    def _check_heads(self, head, donor_head, first):
        """The head is the same tokens, right before those that are copied, in both contexts."""
        assert len(head) == len(donor_head) == self.splicer.planner.head
        assert self.kv[donor_head[-1]] == self.kv[first][:-1]
        for own, donors in zip(head, donor_head):
            assert self.kv[own] == TAINTED or self.kv[own][-1] == self.kv[donors][-1]

    def send(self, rid, tokens, tau=0.5, tenant=None, max_new_tokens=2):
        req = self.make_req(rid, tokens, extra_key=tenant)
        req.sampling_params.max_new_tokens = max_new_tokens
        req.sampling_params.normalize(None)
        req.rksc = SimpleNamespace(splice=None if tau is None else SpliceState(rid, tau))
        if tau is not None:
            self.splicer.arrived(req)
        self.waiting.append(req)
        return req

    def prefill(self):
        """One pass: admit, allocate, run, and publish or finish. Gives the admitted requests."""
        from sglang.srt.managers.schedule_policy import AddReqResult
        from sglang.srt.mem_cache.allocation import alloc_for_extend

        allocator = self.cache.token_to_kv_pool_allocator
        adder = self.adder_class(
            page_size=self.cache.page_size,
            tree_cache=self.cache,
            token_to_kv_pool_allocator=allocator,
            running_batch=SimpleNamespace(
                reqs=list(self.running),
                is_empty=lambda: not self.running,
                batch_size=lambda: len(self.running),
            ),
            new_token_ratio=1.0,
            rem_input_tokens=4096,
            rem_chunk_tokens=None,
        )
        for req in self.waiting:
            req.init_next_round_input(self.cache)
            if adder.add_one_req(req, False, None) != AddReqResult.CONTINUE:
                break
        batch = adder.can_run_list
        self.waiting = [req for req in self.waiting if all(req is not r for r in batch)]
        if not batch:
            return []
        lens = [req.extend_end for req in batch]
        alloc_for_extend(
            SimpleNamespace(
                reqs=batch,
                tree_cache=self.cache,
                req_to_token_pool=self.cache.req_to_token_pool,
                device="cpu",
                hisparse_coordinator=None,
                maybe_evict_swa=lambda: None,
                is_dllm=lambda: False,
                prefix_lens=[req.prefix_len for req in batch],
                extend_lens=[req.extend_len for req in batch],
                extend_num_tokens=sum(req.extend_len for req in batch),
                seq_lens=torch.tensor(lens),
                seq_lens_cpu=torch.tensor(lens),
            )
        )
        for req in batch:
            # As ScheduleBatch.prepare_for_extend counts.
            req.cached_tokens += req.prefix_len - req.already_computed
            req.already_computed = req.extend_end
            self.computed[req.rid] = self.computed.get(req.rid, 0) + req.extend_len
        self._run(batch)
        for req in self.joined.review(batch):
            self._serve_again(req)
        for req in batch:
            self._commit(req)
        return batch

    def _run(self, batch):
        """A layer of a forward pass: all KV is written, then it is read."""
        self.joined.begin()
        for joint in self.joined._joints:
            for slot in joint.own.tolist():
                self.kv.pop(slot, None)  # what it held for others before
        for req in batch:
            self._write(req, req.prefix_len, req.extend_end)
        if self.backend.on_kv_written is not None:
            self.backend.on_kv_written(0)
        self.joined.end()
        for req in batch:
            if not self._is_refused(req):  # of whom nothing is kept
                self._read(req, req.prefix_len)

    def _is_refused(self, req):
        return req.rksc.refused if is_internal(req) else getattr(req.rksc.splice, "refused", False)

    def _row(self, req):
        return self.cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx].tolist()

    def _write(self, req, start, stop):
        row, tokens = self._row(req), [*req.origin_input_ids, *req.output_ids]
        tainted = any(self.kv.get(slot) == TAINTED for slot in row[:start])
        for position in range(start, stop):
            self.kv[row[position]] = TAINTED if tainted else tuple(tokens[: position + 1])

    def _read(self, req, stop):
        row, tokens = self._row(req), [*req.origin_input_ids, *req.output_ids]
        for position in range(stop):
            known = self.kv[row[position]]
            assert known == TAINTED or known == tuple(tokens[: position + 1]), "wrong KV in a row"

    def _serve_again(self, req):
        again = self.send(req.rid, list(req.origin_input_ids), 0.5, req.extra_key)
        again.sampling_params = req.sampling_params
        again.rksc.splice.joins = False
        self.waiting.insert(0, self.waiting.pop())
        self.again[req.rid] = again

    def latest(self, req):
        return self.again.get(req.rid, req)

    def _commit(self, req):
        from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache

        if req.discard_output_reason is not None:  # as SGLang's batch result processor
            req.to_finish = req.discard_output_reason
            req.update_finish_state(0)
            release_kv_cache(req, self.cache, checkpoint=False)
            return
        req.output_ids.append(90 + len(req.output_ids) % 5)
        req.update_finish_state()
        if req.finished():
            release_kv_cache(req, self.cache, checkpoint=True)
            self.running = [r for r in self.running if r is not req]
        elif req not in self.running:
            checkpoint_kv_cache(req, self.cache)
            self.running.append(req)

    def decode(self):
        from sglang.srt.mem_cache.allocation import alloc_token_slots

        for req in list(self.running):
            position, page_size = req.kv.kv_allocated_len, self.cache.page_size
            table = self.cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
            if position % page_size:
                table[position] = table[position - 1] + 1
            else:
                table[position] = alloc_token_slots(self.cache, page_size)[0]
            req.kv.kv_allocated_len += 1
            req.kv.kv_committed_len += 1
            self._write(req, position, position + 1)
            self._read(req, position)
            self._commit(req)

    def retract(self, req):
        from sglang.srt.mem_cache.common import release_kv_cache

        release_kv_cache(req, self.cache, checkpoint=True)
        req.reset_for_retract()
        self.running = [r for r in self.running if r is not req]
        self.waiting.append(req)

    def abort_waiting(self, req):
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome

        self.waiting = [r for r in self.waiting if r is not req]
        self.cache.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)

    def serve(self, *reqs, limit=40):
        """Until all of these have finished; gives the number of prefill passes."""
        passes = 0
        while not all(self.latest(req).finished() for req in reqs):
            passes += bool(self.prefill())
            self.decode()
            limit -= 1
            assert limit, "requests are not served"
        return passes

    def check(self):
        tree = self.cache.all_values_flatten().tolist()
        assert all(self.kv[slot] != TAINTED for slot in tree), "tainted KV is in the exact tree"
        owned = [slot for state in self.cache.active.values() for slot in state.private.tolist()]
        for req in self.running:
            row = self.cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx].tolist()
            owned += row[req.kv.cache_protected_len : req.kv.kv_allocated_len]
        held = tree + owned
        assert len(held) == len(set(held)), "a slot has two owners"
        pages = {slot // self.cache.page_size for slot in held}
        free = self.cache.token_to_kv_pool_allocator.available_size()
        assert len(pages) * self.cache.page_size + free == self.capacity, "slots leaked"
        assert len(self.cache.index) == len(tree), "the index is out of step with the tree"
