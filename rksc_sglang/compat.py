"""Where RKSC touches SGLang, and the start-up checks that each touch took effect.

Two kinds. *Seams* are extension points that SGLang offers: subclassed methods and registries.
*Hooks* wrap a private name, a last resort; all of them are here. SGLang only logs a plugin that
fails, so every one is checked: on the class before the model loads, on the live scheduler after.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

SGLANG_VERSION = "0.5.23"


class CompatError(RuntimeError):
    """SGLang is not what RKSC was built for; the message names what moved."""


class Seam(NamedTuple):
    """A method of SGLang that RKSC overrides, with the parameters it relies on."""

    owner: str  # dotted class name
    method: str
    parameters: tuple[str, ...]


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_CACHE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_STREAM = "sglang.srt.layers.layer_boundary.residual.stream.ResidualStream"
_ATTENTION = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend"
_CORE = "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"
_PYTHON_CORE = "sglang.srt.mem_cache.unified_cache.unified_tree_core.UnifiedTreeCore"

SEAMS = (
    Seam(_SCHEDULER, "get_prefill_adder_class", ()),
    Seam(_SCHEDULER, "get_output_streamer_class", ()),
    Seam(_SCHEDULER, "_create_generation_req", ("recv_req", "args", "kwargs")),
    Seam(_SCHEDULER, "get_init_info", ()),
    Seam(_SCHEDULER, "get_internal_state", ("recv_req",)),
    Seam(_SCHEDULER, "set_internal_state", ("recv_req",)),
    Seam(_SCHEDULER, "run_batch", ("batch", "pp_proxy_tensors")),
    Seam(_SCHEDULER, "process_batch_result", ("batch", "result")),
    Seam(_SCHEDULER, "handle_generate_request", ("recv_req", "mm_input_error")),
    Seam(_SCHEDULER, "on_idle", ()),
    Seam(_STREAMER, "stream_output", ("reqs", "return_logprob", "skip_req")),
    Seam(_STREAMER, "build_additional_customized_info", ("reqs",)),
    Seam(_STREAMER, "is_request_level_customized_info_key", ("key",)),
    Seam(_ADDER, "add_one_req", ("req", "has_chunked_req", "truncation_align_size")),
    Seam(_TOKENIZER, "generate_request", ("obj", "request")),
    Seam(_TOKENIZER, "abort_request", ("rid", "abort_all")),
    Seam(
        _TOKENIZER,
        "update_request_meta_info",
        ("meta_info", "state", "customized_info", "index", "finish_reason"),
    ),
    Seam(_CACHE, "match_prefix", ("params",)),
    Seam(_CACHE, "insert", ("params",)),
    Seam(_CACHE, "evict", ("params",)),
    Seam(_CACHE, "evict_for_alloc", ("params", "allocation_reclaim_satisfied")),
    Seam(_CACHE, "reset", ()),
    Seam(_CACHE, "checkpoint_into_tree", ("req", "up_to", "kwargs")),
    Seam(_CACHE, "init_load_back", ("params",)),
    Seam(_CACHE, "load_back_is_cache_owned", ()),
    Seam(_CACHE, "prefix_device_indices", ("req",)),
    Seam(_CACHE, "claim_kv_row", ("req",)),
    Seam(_CACHE, "on_release", ("req", "checkpointed")),
    Seam(_CACHE, "release_aborted_request", ("request",)),
    Seam(_STREAM, "export", ("hidden", "takes_handoff")),
    Seam(_ATTENTION, "init_forward_metadata", ("forward_batch",)),
    Seam(_CORE, "evict_device_start", ("component_type", "request_cnt")),
    Seam(_CORE, "evict_device_next_node", ("component_type", "tracker")),
    Seam(_CORE, "evict_device_leaf", ("node_id", "is_write_back")),
    Seam(_PYTHON_CORE, "_split_node", ("key", "child", "split_len")),  # called, not overridden
)


def check_version() -> None:
    import sglang

    if sglang.__version__ != SGLANG_VERSION:
        raise CompatError(
            f"rksc_sglang is built for sglang=={SGLANG_VERSION}, found {sglang.__version__}"
        )


def check_seam(seam: Seam) -> None:
    """Raise CompatError when the method is gone or takes other parameters."""
    try:
        owner = pkgutil.resolve_name(seam.owner)
    except (ImportError, AttributeError) as error:
        raise CompatError(f"SGLang has no {seam.owner}: {error}") from error
    # Look behind our own subclass, which has replaced SGLang's class by now.
    stock = next(cls for cls in owner.__mro__ if not cls.__module__.startswith("rksc_sglang."))
    method = getattr(stock, seam.method, None)
    if method is None:
        raise CompatError(f"SGLang moved {seam.owner}.{seam.method}: it is gone")
    found = tuple(inspect.signature(method).parameters)[1:]
    if found != seam.parameters:
        raise CompatError(
            f"SGLang moved {seam.owner}.{seam.method}: it takes {found}, not {seam.parameters}"
        )


def check_registrations() -> None:
    """Check, in a process that is about to build a scheduler, that the plugin did its work.

    Raises:
        CompatError: naming the first thing that is missing or has moved.
    """
    check_version()
    from sglang.srt.managers import scheduler
    from sglang.srt.mem_cache.registry import get_radix_cache_factory

    from rksc_sglang.serving.radix_cache import BACKEND, create_cache
    from rksc_sglang.serving.scheduler import RkscScheduler

    for seam in SEAMS:
        check_seam(seam)
    if scheduler.Scheduler is not RkscScheduler:
        raise CompatError(
            "SGLang's scheduler was not replaced: the plugin 'rksc' did not run in this process "
            "(is SGLANG_PLUGINS set without it?)"
        )
    if get_radix_cache_factory(BACKEND) is not create_cache:
        raise CompatError(f"the radix cache backend {BACKEND!r} is not RKSC's")


def check_scheduler(scheduler: Any) -> None:
    """Check a scheduler after its construction: the classes it picked are RKSC's.

    Raises:
        CompatError: naming the part that SGLang built by other means.
    """
    from rksc_sglang.serving.internal import InternalState, ModelFacts, make_internal_req
    from rksc_sglang.serving.radix_cache import RkscRadixCache
    from rksc_sglang.serving.scheduler import RkscOutputStreamer

    if not isinstance(scheduler.output_streamer, RkscOutputStreamer):
        raise CompatError("SGLang did not use get_output_streamer_class of the scheduler")
    model = ModelFacts(1, None)
    probe = make_internal_req("probe", [0], InternalState("probe"), model=model)
    if not hasattr(probe, "discard_output_reason"):
        raise CompatError("SGLang moved Req.discard_output_reason: it is gone")
    wants_cache = scheduler.tree_cache.supports_prefix_sharing()
    if wants_cache and not isinstance(scheduler.tree_cache, RkscRadixCache):
        raise CompatError(
            f"the radix cache is {type(scheduler.tree_cache).__name__}, not RkscRadixCache"
        )
    if wants_cache and scheduler.tree_cache.strategy is not None:
        for name in ("eviction_strategy", "evictable_device_leaves"):
            if not hasattr(scheduler.tree_cache.tree_core, name):
                raise CompatError(f"SGLang moved {name} of its Python tree core: it is gone")


class Extension(NamedTuple):
    """An extension point that patches/ adds to SGLang, and what is done where it is missing."""

    place: str  # dotted name
    stand_in: str


EXTENSIONS = {
    "frontend_nodes": Extension(
        "sglang.lang.ir.SglExpr.execute", "a hook on the interpreter's _execute"
    ),
    "frontend_endings": Extension(
        "sglang.lang.interpreter.end_later", "hooks on the program states' finalizers"
    ),
    "model_layers": Extension(
        "sglang.srt.model_executor.layer_interceptor.InterceptableLayers",
        "wrapped forwards of the layers",
    ),
    "attention_queries": Extension(
        "sglang.srt.layers.radix_attention.RadixAttention.query_observer",
        "PyTorch's hooks on the attention modules",
    ),
    "request_validation": Extension(f"{_TOKENIZER}.validate_request", "a middleware"),
    "admission": Extension(f"{_ADDER}.should_hold", "an overridden add_one_req"),
}


@functools.cache
def has_extension(name: str) -> bool:
    """Whether this SGLang has one of :data:`EXTENSIONS`."""
    try:
        pkgutil.resolve_name(EXTENSIONS[name].place)
    except (ImportError, AttributeError):
        return False
    return True


def extensions() -> dict[str, str]:
    """What is used at each of :data:`EXTENSIONS`, for the status page."""
    return {
        name: "extension point" if has_extension(name) else extension.stand_in
        for name, extension in EXTENSIONS.items()
    }


# Hooks: private names of SGLang. All are in the frontend, and none where it was patched.

_EXECUTE = "sglang.lang.interpreter.StreamExecutor._execute"
_FINALIZERS = (
    "sglang.lang.interpreter.StreamExecutor.__del__",
    "sglang.lang.interpreter.ProgramState.__del__",
)


def hook_stream_executor(node_class: Any) -> None:
    """Let SGLang's frontend interpreter run nodes of ``node_class``, by their ``execute`` method.

    The interpreter knows its own node types only, in one chain of type tests.

    Raises:
        CompatError: the hook, or SGLang's extension point, did not take effect.
    """
    if not has_extension("frontend_nodes"):
        _hook_execute(node_class)
    _check_stream_executor(_probe_executor(), node_class)


def _hook_execute(node_class: Any) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def execute(original: Any, executor: Any, expr: Any) -> Any:
        if isinstance(expr, node_class):
            return expr.execute(executor)
        return original(executor, expr)

    check_seam(Seam(_EXECUTE.rsplit(".", 1)[0], "_execute", ("other",)))
    HookRegistry.register(_EXECUTE, execute, HookType.AROUND)
    HookRegistry.apply_hooks()


def hook_finalizers(end_later: Callable[[Any], None]) -> None:
    """Have program states that are garbage ended by ``end_later``, and not by the collector.

    Raises:
        CompatError: the hooks did not take effect.
    """
    from sglang.lang.interpreter import ProgramState
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def finalize(garbage: Any) -> None:
        end_later(getattr(garbage, "stream_executor", garbage))

    for target in _FINALIZERS:
        check_seam(Seam(target.rsplit(".", 1)[0], "__del__", ()))
        HookRegistry.register(target, finalize, HookType.REPLACE)
    HookRegistry.apply_hooks()
    _check_finalizers(ProgramState)


def _check_finalizers(state_class: Any) -> None:
    """Throw away a state, and see that its executor is ended in another thread."""
    ended: list[int] = []
    done = threading.Event()

    def end() -> None:
        ended.append(threading.get_ident())
        done.set()

    executor = _probe_executor()
    executor.end = end
    state = state_class(executor)
    del state, executor
    if not done.wait(60) or threading.get_ident() in ended:
        raise CompatError(f"SGLang moved {_FINALIZERS[1]}: states are not ended as RKSC would")


def _probe_executor() -> Any:
    """A real executor, with no thread and no server."""
    from sglang.lang.backend.base_backend import BaseBackend
    from sglang.lang.interpreter import StreamExecutor
    from sglang.lang.ir import SglSamplingParams

    return StreamExecutor(
        BaseBackend(), {}, SglSamplingParams(), None, stream=False, use_thread=False
    )


def _check_stream_executor(executor: Any, node_class: Any) -> None:
    """Send a probe node through an executor."""

    class Probe(node_class):
        reached = False

        def __init__(self) -> None:
            super().__init__("probe", None)

        def execute(self, executor: Any) -> None:
            self.reached = True

    probe = Probe()
    executor.submit(probe)
    if not probe.reached:
        raise CompatError(f"SGLang moved {_EXECUTE}: RKSC's nodes do not reach it")
