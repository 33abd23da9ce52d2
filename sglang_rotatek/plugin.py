"""Entry point: the table of every place in SGLang that RotateK touches, and the check that all of
it took."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from . import SUPPORTED_SGLANG
from .config import RotateKError

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext
    from sglang.srt.model_executor.model_runner import ModelRunner

    from .memory.tree import RotateKRadixCache

logger = logging.getLogger(__name__)
ENABLE_FLAG = "--enable-rotatek"
REFERENCE_ENVIRONMENT = "SGLANG_ROTATEK_REFERENCE"


@dataclass(frozen=True)
class Hook:
    """One touch point. ``kind``: AROUND, AFTER or REPLACE of the host's hook registry."""

    target: str
    kind: str
    function: Callable
    why: str
    remove_when: str


def hook_table() -> list[Hook]:
    """All hooks. Each function returns the host's own result when RotateK is off."""
    from .patches import (
        allocation,
        forward_batch_info,
        kv_cache_configurator,
        ollama_serving,
        pool_configurator,
        pool_stats_observer,
        schedule_batch,
        scheduler,
        server_args,
        tokenizer_manager,
    )

    srt = "sglang.srt."
    return [
        Hook(
            srt + "server_args.ServerArgs",
            "REPLACE",
            server_args.RotateKServerArgs,
            "flags for the command line and Engine(...), refusals, choice of backend and radix "
            "cache",
            "the host has a registry for a plugin's arguments",
        ),
        Hook(
            srt + "managers.scheduler.Scheduler.get_prefill_adder_class",
            "AROUND",
            scheduler.get_prefill_adder_class,
            "admission that counts image tokens as what they take; the host's budget is told "
            "lengths alone",
            "the host asks the allocator what a request takes",
        ),
        Hook(
            srt + "model_executor.pool_configurator.create_memory_pool_configurator",
            "AROUND",
            pool_configurator.create_memory_pool_configurator,
            "tokens that fit the KV bytes",
            "the host asks the pool class for its sizes",
        ),
        Hook(
            srt + "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
            "AROUND",
            kv_cache_configurator.build_mha_kv_pool,
            "the pool with two kinds of rows",
            "the host has a registry for KV pools",
        ),
        Hook(
            srt
            + "mem_cache.kv_cache_configurator.KVCacheConfigurator."
            + "_build_token_to_kv_pool_allocator",
            "AROUND",
            kv_cache_configurator.build_token_to_kv_pool_allocator,
            "the allocator of slabs",
            "the host has a registry for allocators",
        ),
        Hook(
            srt + "mem_cache.allocation.alloc_for_extend",
            "AROUND",
            allocation.alloc_for_extend,
            "visual slots for image tokens; the host never tells the allocator which tokens are "
            "visual",
            "the host passes token kinds to the allocator",
        ),
        Hook(
            srt + "managers.scheduler.Scheduler.init_req_max_new_tokens",
            "AROUND",
            scheduler.init_req_max_new_tokens,
            "a prompt that can never fit gets an error instead of waiting for ever; pads are held "
            "against the pictures",
            "the host tells the allocator a request's token ids, not their number alone",
        ),
        Hook(
            srt + "model_executor.forward_batch_info.ForwardBatch.init_new",
            "AROUND",
            forward_batch_info.init_new,
            "the plan travels from the batch to the backend",
            "the host's batches carry allocator data",
        ),
        Hook(
            srt + "entrypoints.engine.init_tokenizer_manager",
            "AROUND",
            tokenizer_manager.init_tokenizer_manager,
            "what a client sends wrong is HTTP 400 with the reason, not a hang, a crash or a "
            "picture left out",
            "the host holds the placeholders of a prompt against its pictures",
        ),
        Hook(
            srt + "managers.schedule_batch.MultimodalDataItem.set_pad_value",
            "AROUND",
            schedule_batch.set_pad_value,
            "pictures of other shape and the same pixels are two for the caches",
            "the host's key of a picture has its grid",
        ),
        Hook(
            srt + "entrypoints.ollama.serving.OllamaServing",
            "REPLACE",
            ollama_serving.RotateKOllamaServing,
            "pictures sent by Ollama's API are answered, and errors say why",
            "the host's Ollama API takes pictures",
        ),
        Hook(
            srt + "managers.scheduler.Scheduler.get_internal_state",
            "AFTER",
            scheduler.get_internal_state,
            "pools in /server_info",
            "never: observability",
        ),
        Hook(
            srt
            + "managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver."
            + "get_pool_stats",
            "AFTER",
            pool_stats_observer.get_pool_stats,
            "pool use for the log lines and the Prometheus gauges",
            "never: observability",
        ),
        Hook(
            srt + "managers.scheduler.Scheduler.emit_metrics_constants",
            "AFTER",
            scheduler.create_gauges,
            "the gauges exist from the start, once the host's collector does",
            "never: observability",
        ),
    ]


def register() -> None:
    """Called by SGLang's plugin loader in every process that loads plugins."""
    found = version("sglang")
    if found != SUPPORTED_SGLANG:
        message = (
            f"sglang-rotatek supports SGLang {SUPPORTED_SGLANG}, found {found}: install "
            f"sglang=={SUPPORTED_SGLANG}, or start the server without {ENABLE_FLAG}."
        )
        if ENABLE_FLAG in sys.argv:
            raise SystemExit(f"error: {message}")
        logger.warning("RotateK is off: %s", message)
        return

    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.entrypoints import engine
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from .patches.refusals import BACKEND
    from .patches.server_args import RotateKServerArgs
    from .patches.tokenizer_manager import init_tokenizer_manager

    for hook in hook_table():
        HookRegistry.register(hook.target, hook.function, HookType[hook.kind])
    # Class attributes, which the registry does not reach.
    Engine.server_args_class = RotateKServerArgs
    Engine.init_tokenizer_manager_func = staticmethod(
        partial(init_tokenizer_manager, engine.init_tokenizer_manager)
    )
    add_attention_backend_choices([BACKEND])
    register_attention_backend(BACKEND)(_attention_backend)
    register_radix_cache_backend(BACKEND, _radix_cache)


def missing_hooks() -> list[str]:
    """Targets of the table that the host's registry, which only logs its failures, did not
    patch."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    return [hook.target for hook in hook_table() if hook.target not in HookRegistry._patched]


def check_hooks() -> None:
    """Raise RotateKError unless every hook took in this process."""
    if missing := missing_hooks():
        raise RotateKError(
            f"RotateK could not hook {', '.join(missing)} in SGLang {version('sglang')}; reinstall "
            f"sglang=={SUPPORTED_SGLANG} without local changes and other plugins, or drop "
            f"{ENABLE_FLAG}."
        )


def _attention_backend(model_runner: ModelRunner) -> AttentionBackend:
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.model_executor.cuda_graph_config import Backend

    from .models.llava import match_tower_dtype
    from .patches.model_config import check_layers

    _verify(model_runner.token_to_kv_pool, model_runner.token_to_kv_pool_allocator)
    check_layers(model_runner.model)
    match_tower_dtype(model_runner.model)
    if model_runner.device == "cuda":
        if os.environ.get(REFERENCE_ENVIRONMENT) != "1":
            from .attention.gpu import RotateKGPUBackend

            return RotateKGPUBackend(model_runner)
        if (
            resolved_view(model_runner.server_args).cuda_graph_config.decode.backend
            != Backend.DISABLED
        ):
            raise RotateKError(
                f"{REFERENCE_ENVIRONMENT}=1 selects the plain-torch attention, which CUDA graphs "
                "cannot hold: add --disable-cuda-graph, or unset it."
            )
    from .attention.backend import RotateKTorchBackend

    return RotateKTorchBackend(model_runner)


def _radix_cache(context: TreeCacheBuildContext) -> RotateKRadixCache:
    from .patches.registry import radix_cache

    allocator = context.params.token_to_kv_pool_allocator
    _verify(allocator.get_kvcache(), allocator)
    return radix_cache(context)


def _verify(pool: Any, allocator: Any) -> None:
    """Raise RotateKError unless every hook took and pool and allocator are ours: never silently
    off."""
    from .memory.allocator import RotateKAllocator
    from .memory.pool import RotateKKVPool

    check_hooks()
    for found, expected in ((pool, RotateKKVPool), (allocator, RotateKAllocator)):
        if not isinstance(found, expected):
            raise RotateKError(
                f"RotateK expected a {expected.__name__}, found a {type(found).__name__}: start "
                f"the server with {ENABLE_FLAG}, which selects pool, allocator, radix cache and "
                "attention backend together."
            )
