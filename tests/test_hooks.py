"""The hook table against the installed SGLang: each target exists, takes our arguments, and is left
alone when off."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig
from torch import nn

from sglang_rotatek import plugin
from sglang_rotatek.config import RotateKError
from sglang_rotatek.patches import schedule_batch
from sglang_rotatek.patches.pool_stats_observer import RotateKPoolStats

TABLE = plugin.hook_table()
AROUND = [hook for hook in TABLE if hook.kind == "AROUND"]
AFTER = [hook for hook in TABLE if hook.kind == "AFTER"]


def hook_id(hook: plugin.Hook) -> str:
    return hook.target.removeprefix("sglang.srt.")


def original(hook: plugin.Hook):
    """The host's own function or class, whether or not a hook is applied."""
    owner, name = hook.target.rsplit(".", 1)
    found = inspect.getattr_static(pkgutil.resolve_name(owner), name)
    return inspect.unwrap(
        found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
    )


def in_fresh_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_the_plugin_loader_applies_every_hook():
    code = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt import server_args\n"
        "from sglang.srt.entrypoints.engine import Engine\n"
        "from sglang_rotatek.plugin import missing_hooks\n"
        "from sglang.srt.entrypoints import http_server\n"
        "record = server_args.ServerArgs.__name__, Engine.server_args_class.__name__\n"
        "manager = Engine.init_tokenizer_manager_func.func.__module__\n"
        "print(missing_hooks(), *record, manager, http_server.OllamaServing.__name__)"
    )
    patches = "sglang_rotatek.patches.tokenizer_manager RotateKOllamaServing"
    expected = f"[] RotateKServerArgs RotateKServerArgs {patches}"
    assert in_fresh_interpreter(code) == expected


def test_a_hook_whose_target_does_not_exist_is_reported():
    code = (
        "import dataclasses; from sglang_rotatek import plugin\n"
        "table = plugin.hook_table()\n"
        "table[5] = dataclasses.replace(table[5], target='sglang.srt.mem_cache.allocation.gone')\n"
        "plugin.hook_table = lambda: table\n"
        "from sglang.srt.plugins.hook_registry import HookRegistry\n"
        "plugin.register(); HookRegistry.apply_hooks()\n"
        "print(plugin.missing_hooks())"
    )
    assert in_fresh_interpreter(code) == "['sglang.srt.mem_cache.allocation.gone']"


def test_a_process_that_is_sent_the_arguments_gets_the_hooks_if_rotatek_is_on():
    code = (
        "import pickle; from sglang_rotatek.patches.server_args import RotateKServerArgs\n"
        "from sglang_rotatek.plugin import hook_table, missing_hooks\n"
        "def send(**flags):\n"
        "    return pickle.loads(pickle.dumps(RotateKServerArgs(model_path='none', **flags)))\n"
        "off = send(rotatek_keep_ratio=0.5); before = len(missing_hooks()) == len(hook_table())\n"
        "on = send(enable_rotatek=True)\n"
        "print(before, off.rotatek_keep_ratio, missing_hooks(), on.attention_backend)"
    )
    assert in_fresh_interpreter(code) == "True 0.5 [] rotatek"


def test_a_missing_hook_ends_the_start_with_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(plugin, "missing_hooks", lambda: ["sglang.srt.mem_cache.allocation.gone"])
    with pytest.raises(
        RotateKError,
        match="could not hook sglang.srt.mem_cache.allocation.gone in SGLang .*reinstall",
    ):
        plugin._verify(None, None)


def test_a_pool_of_another_kind_ends_the_start_with_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(plugin, "missing_hooks", list)
    with pytest.raises(
        RotateKError, match="expected a RotateKKVPool, found a SimpleNamespace: .*--enable-rotatek"
    ):
        plugin._verify(SimpleNamespace(), None)


def test_there_are_few_hooks():
    assert len(TABLE) <= 14


def test_no_target_is_hooked_twice():
    targets = [hook.target for hook in TABLE]
    assert sorted(set(targets)) == sorted(targets)


@pytest.mark.parametrize("hook", TABLE, ids=hook_id)
def test_every_target_exists_in_the_installed_sglang(hook):
    assert callable(original(hook))
    assert hook.why and hook.remove_when


@pytest.mark.parametrize("hook", [hook for hook in TABLE if hook.kind == "REPLACE"], ids=hook_id)
def test_a_replacement_is_a_subclass_of_what_it_replaces(hook):
    found = original(hook)
    assert hook.function is found or issubclass(hook.function, found)


@pytest.mark.parametrize("hook", AROUND + AFTER, ids=hook_id)
def test_a_hook_takes_the_hosts_arguments_after_its_own_first_one(hook):
    first, *ours = inspect.signature(hook.function).parameters.values()
    hosts = list(inspect.signature(original(hook)).parameters.values())
    assert first.name == ("original" if hook.kind == "AROUND" else "result")
    positional = [p for p in hosts if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = {p.name: p.default for p in hosts if p.kind is p.KEYWORD_ONLY}
    sentinel = object()
    every = [sentinel] * len(positional), dict.fromkeys(keyword, sentinel)
    required = (
        [sentinel] * sum(p.default is p.empty for p in positional),
        {name: sentinel for name, default in keyword.items() if default is inspect.Parameter.empty},
    )
    signature = inspect.signature(hook.function)
    for args, kwargs in (every, required):
        signature.bind(sentinel, *args, **kwargs)
    # A caller may name what the hook names, so the names must be the host's; self goes by position.
    names = {p.name for p in hosts[1:]} | {"args", "kwargs"}
    assert {p.name for p in ours[1:]} <= names


class Recorder:
    """The host's function: notes each call and returns a result of its own."""

    def __init__(self) -> None:
        self.calls = []
        self.result = object()

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.result


STOCK = SimpleNamespace(
    server_args=SimpleNamespace(enable_rotatek=False),
    token_to_kv_pool_allocator=SimpleNamespace(),
    chunked_req=SimpleNamespace(),
    tree_cache=SimpleNamespace(),
    forward_mode=SimpleNamespace(is_extend=lambda: True),
)
# Arguments of each AROUND hook as a stock server passes them.
STOCK_CALLS = {
    "get_prefill_adder_class": ((STOCK,), {}),
    "create_memory_pool_configurator": ((STOCK,), {}),
    "_build_mha_kv_pool": (
        (STOCK,),
        {"max_total_num_tokens": 8, "mha_pool_class": dict, "quant_method": None},
    ),
    "_build_token_to_kv_pool_allocator": ((STOCK,), {"token_to_kv_pool": STOCK}),
    "alloc_for_extend": ((STOCK,), {}),
    "init_req_max_new_tokens": ((STOCK, STOCK), {}),
    "init_new": ((type, STOCK, STOCK), {}),
    "init_tokenizer_manager": ((STOCK.server_args, STOCK, None), {}),
    "set_pad_value": ((MultimodalDataItem(modality=Modality.IMAGE, feature=torch.ones(2)),), {}),
}
RETURN_NOTHING = {"init_req_max_new_tokens", "set_pad_value"}


@pytest.mark.parametrize("hook", AROUND, ids=hook_id)
def test_without_rotatek_the_original_is_called_once_as_it_was(hook, monkeypatch):
    monkeypatch.setattr(schedule_batch, "get_server_args", lambda: STOCK.server_args)
    name = hook.target.rsplit(".", 1)[1]
    args, kwargs = STOCK_CALLS[name]
    host = Recorder()
    before = dict(vars(STOCK))
    result = hook.function(host, *args, **kwargs)
    assert host.calls == [(args, kwargs)]
    assert result is (None if name in RETURN_NOTHING else host.result)
    assert vars(STOCK) == before


@pytest.mark.parametrize("hook", AFTER, ids=hook_id)
def test_without_rotatek_the_result_stays_as_it_is(hook):
    result = ["host"]
    parameters = inspect.signature(hook.function).parameters
    changed = hook.function(result, *[STOCK] * (len(parameters) - 1))
    # The registry keeps the result for a None.
    assert (result if changed is None else changed) == ["host"]


def test_the_torch_path_on_a_gpu_is_refused_with_cuda_graphs(monkeypatch):
    runner = SimpleNamespace(
        device="cuda",
        model=nn.Module(),
        server_args=SimpleNamespace(
            cuda_graph_config=CudaGraphConfig(decode=PhaseConfig(backend=Backend.FULL))
        ),
        token_to_kv_pool=None,
        token_to_kv_pool_allocator=None,
    )
    monkeypatch.setattr(plugin, "_verify", lambda *_: None)
    monkeypatch.setenv(plugin.REFERENCE_ENVIRONMENT, "1")
    with pytest.raises(RotateKError, match="add --disable-cuda-graph, or unset it"):
        plugin._attention_backend(runner)


def test_the_gauges_are_set_with_the_hosts_metrics_and_not_whenever_the_pools_are_looked_at():
    updates = []
    stats = RotateKPoolStats(
        full_num_used=1,
        full_token_usage=0.5,
        full_available_size=1,
        full_evictable_size=0,
        usage=["of images: 0.25"],
        gauges=SimpleNamespace(update=lambda: updates.append(1)),
    )
    assert (
        stats.get_prefill_usage_msg_parts()[-1]
        == stats.get_decode_usage_msg_parts()[-1]
        == "of images: 0.25"
    )
    assert updates == []
    stats.update_scheduler_stats(SimpleNamespace())
    assert updates == [1]
