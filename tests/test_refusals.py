"""What RotateK cannot serve is refused at start, in one sentence that names the flag, the value and
the remedy."""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import server_args as host_server_args
from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.environ import EnvBool, envs
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig

from sglang_rotatek import SUPPORTED_SGLANG, plugin
from sglang_rotatek.config import RotateKError
from sglang_rotatek.patches import kv_cache_configurator
from sglang_rotatek.patches.refusals import (
    REFUSED,
    REFUSED_ENVIRONMENT,
    REFUSED_OF_A_TIER,
    VIT_GRAPHS,
    refuse_device,
)
from sglang_rotatek.patches.server_args import (
    RotateKServerArgs,
    rotatek_config,
)

# A value to refuse for each field whose flag takes one; a flag that takes none is refused when it
# is there.
VALUES = {
    "attention_backend": "triton",
    "prefill_attention_backend": "torch_native",
    "decode_attention_backend": "flashinfer",
    "radix_cache_backend": "other",
    "page_size": 16,
    "kv_cache_dtype": "fp8_e5m2",
    "speculative_algorithm": "EAGLE",
    "hicache_storage_backend": "file",
    "hicache_host_memory_mode": "buffer_only",
    "hicache_mem_layout": "page_head",
    "hicache_io_backend": "direct",
    "disaggregation_mode": "prefill",
    "kv_canary": "log",
    "pp_size": 2,
    "attn_cp_size": 2,
    "dcp_size": 2,
    "attn_dp_size": 2,
    "dllm_algorithm": "LowConfidence",
    "disaggregation_decode_retraction_backup": "host_pool",
    "radix_eviction_policy": "tlru",
    "schedule_policy": "shortest-prefill-first",
    "cuda_graph_backend_prefill": "full",
    "model_impl": "transformers",
}
OF_A_TIER = [name for name, _, _ in REFUSED_OF_A_TIER]
FIELDS = [*(name for name, _, _ in REFUSED), *OF_A_TIER]


def parse(*flags: str) -> RotateKServerArgs:
    """As ``sglang serve`` does with the plugin loaded, up to the start of its processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_server_args, "ServerArgs", RotateKServerArgs)
        patch.setattr(logging, "basicConfig", lambda **_: None)
        args = host_server_args.prepare_server_args(["--device", "cpu", *flags])
        args.resolve_once()
        return args


def remedy_of(message: str) -> str:
    assert message.count(". ") == 0 and message.endswith("."), f"not one sentence: {message}"
    assert "; " in message, f"no remedy: {message}"
    return message.rsplit("; ", 1)[1]


@pytest.mark.parametrize("name", FIELDS)
def test_a_refused_feature_is_named_with_its_value_and_the_remedy(name):
    value = VALUES.get(name, True)
    features = {name: value, "enable_hierarchical_cache": name in OF_A_TIER}
    with pytest.raises(RotateKError) as error:
        RotateKServerArgs(model_path="none", enable_rotatek=True, **features)
    message, flag = str(error.value), "--" + name.replace("_", "-")
    assert f"does not work with {flag if value is True else f'{flag} {value}'}: " in message
    assert remedy_of(message).endswith("or drop --enable-rotatek.")


@pytest.mark.parametrize("name", FIELDS)
def test_a_refused_feature_is_off_by_default_and_its_flag_is_the_hosts(name):
    fine = next(fine for field, fine, _ in REFUSED + REFUSED_OF_A_TIER if field == name)
    assert getattr(RotateKServerArgs(model_path="none"), name) in fine
    parser = host_server_args.argparse.ArgumentParser()
    RotateKServerArgs.add_cli_args(parser)
    assert "--" + name.replace("_", "-") in parser._option_string_actions


@pytest.mark.parametrize("name", OF_A_TIER)
def test_what_shapes_a_tier_that_is_off_is_not_refused(name):
    RotateKServerArgs(model_path="none", enable_rotatek=True, **{name: VALUES[name]})


@pytest.mark.parametrize("name", FIELDS)
def test_without_rotatek_nothing_is_refused(name):
    args = RotateKServerArgs(model_path="none", **{name: VALUES.get(name, True)})
    assert getattr(args, name) == VALUES.get(name, True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rotatek-keep-tokens", "0.5"], "--rotatek-keep-tokens 0.5 does nothing without"),
        (
            ["--enable-rotatek", "--rotatek-token-pruner", "residual"],
            "--rotatek-token-pruner residual does nothing while all tokens stay",
        ),
        (["--rotatek-keep-tokens", "0.5", "--enable-rotatek"], None),
        ([], None),
    ],
)
def test_a_flag_without_effect_is_told(flags, said, caplog):
    parse("--model-path", "none", *flags)
    found = [message for message in caplog.messages if "does nothing" in message]
    assert len(found) == (said is not None) and (said is None or found[0].startswith(said))


@pytest.mark.parametrize("value", ["1", "true", "Yes", "y"])
@pytest.mark.parametrize("name", REFUSED_ENVIRONMENT)
def test_a_refused_environment_variable_is_named_with_its_value_and_the_remedy(
    name, value, monkeypatch
):
    assert isinstance(getattr(type(envs), name), EnvBool)
    monkeypatch.setenv(name, value)
    with pytest.raises(RotateKError) as error:
        RotateKServerArgs(model_path="none", enable_rotatek=True)
    assert f"{name}={value}: " in str(error.value)
    assert remedy_of(str(error.value)) == "unset it, or drop --enable-rotatek."


@pytest.mark.parametrize("value", ["0", "false", ""])
def test_an_environment_variable_that_is_off_is_fine(value, monkeypatch):
    for name in REFUSED_ENVIRONMENT:
        monkeypatch.setenv(name, value)
    args = RotateKServerArgs(model_path="none", enable_rotatek=True)
    assert (args.attention_backend, args.radix_cache_backend) == ("rotatek", "rotatek")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotatek_keep_ratio", 0.0),
        ("rotatek_keep_ratio", 1.5),
        ("rotatek_basis", "svd"),
        ("rotatek_visual_fraction", 1.0),
        ("rotatek_min_image_tokens", 0),
        ("rotatek_segment_tokens", 8),
    ],
)
def test_a_bad_value_of_a_rotatek_flag_is_refused(field, value):
    with pytest.raises(RotateKError, match=f"--{field.replace('_', '-')} .*{value}"):
        RotateKServerArgs(
            model_path="none", enable_rotatek=True, rotatek_key_bits=16, **{field: value}
        )


@pytest.mark.parametrize(
    ("fields", "environment", "found", "remedy"),
    [
        ({"mm_enable_dp_encoder": True}, {}, "--mm-enable-dp-encoder", "leave it out"),
        ({}, {VIT_GRAPHS: "true"}, f"{VIT_GRAPHS}=true", "unset it"),
    ],
)
def test_pruning_by_an_attention_that_is_out_of_reach_is_refused(
    fields, environment, found, remedy, monkeypatch
):
    for name, value in environment.items():
        assert isinstance(getattr(type(envs), name), EnvBool)
        monkeypatch.setenv(name, value)
    pruning = {"model_path": "none", "enable_rotatek": True, "rotatek_token_pruner": "visionzip"}
    with pytest.raises(RotateKError) as error:
        RotateKServerArgs(**pruning, rotatek_keep_tokens=0.5, **fields)
    assert f"--rotatek-token-pruner visionzip does not work with {found}: " in str(error.value)
    assert remedy_of(str(error.value)) == f"{remedy}, or use --rotatek-token-pruner divprune."
    RotateKServerArgs(**pruning, **fields)  # which prunes nothing
    RotateKServerArgs(
        **pruning | {"rotatek_token_pruner": "residual"}, rotatek_keep_tokens=0.5, **fields
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--page-size", "16"], ["--page-size 16: ", "leave it out, or drop --enable-rotatek."]),
        (
            ["--disaggregation-mode", "decode"],
            ["--disaggregation-mode decode: ", "use --disaggregation-mode null"],
        ),
        (
            ["--disable-radix-cache"],
            ["--disable-radix-cache: ", "leave it out, or drop --enable-rotatek."],
        ),
        (
            ["--rotatek-key-bits", "16", "--rotatek-keep-ratio", "0.3"],
            ["--rotatek-keep-ratio 0.3", "ratios that fit this model:"],
        ),
        (
            [
                "--rotatek-keep-tokens",
                "0.5",
                "--rotatek-token-pruner",
                "visionzip",
                "--mm-enable-dp-encoder",
            ],
            [
                "--rotatek-token-pruner visionzip does not work with --mm-enable-dp-encoder: ",
                "leave it out, or use",
            ],
        ),
    ],
    ids=["page_size", "disaggregation_mode", "disable_radix_cache", "rank", "dp_encoder"],
)
def test_the_command_line_ends_with_the_error(models, flags, expected):
    with pytest.raises(SystemExit) as end:
        parse("--model-path", str(models["qwen2_5_vl"]), "--enable-rotatek", *flags)
    message = str(end.value)
    assert message.startswith("error: --")
    assert [text for text in expected if text not in message] == []


def test_the_command_line_refuses_a_model_without_images(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "vocab_size": 128,
    }
    config |= {
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        parse("--model-path", str(tmp_path), "--enable-rotatek", "--load-format", "dummy")
    assert f"cannot serve {tmp_path} (LlamaForCausalLM): it takes no images; " in str(end.value)


def test_the_command_line_accepts_a_supported_model(models):
    args = parse(
        "--model-path",
        str(models["qwen2_5_vl"]),
        "--enable-rotatek",
        "--rotatek-key-bits",
        "16",
        "--rotatek-keep-ratio",
        "0.5",
    )
    resolved = resolved_view(args)
    assert (resolved.attention_backend, resolved.radix_cache_backend, resolved.page_size) == (
        "rotatek",
        "rotatek",
        1,
    )
    assert resolved.cuda_graph_config.prefill.backend == "disabled"


@pytest.mark.parametrize(
    ("resolved", "expected"),
    [
        ({"device": "xpu"}, "found xpu; use one, or drop --enable-rotatek."),
        ({"device": "npu"}, "found npu; use one, or drop --enable-rotatek."),
        (
            {"cuda_graph_config": CudaGraphConfig(prefill=PhaseConfig(backend=Backend.BREAKABLE))},
            "found breakable: compression is decided anew for every prefill; add "
            "--disable-prefill-cuda-graph, or drop",
        ),
    ],
)
def test_what_the_host_resolves_to_is_refused_too(resolved, expected):
    with pytest.raises(RotateKError) as error:
        refuse_device(SimpleNamespace(**{"device": "cpu", "cuda_graph_config": None} | resolved))
    assert expected in str(error.value)


def test_an_amd_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(RotateKError, match="found rocm; use one"):
        refuse_device(SimpleNamespace(device="cuda", cuda_graph_config=None))


def configurator(dtype: torch.dtype, **flags) -> SimpleNamespace:
    """The host's KVCacheConfigurator of a model with 128 channels, as far as RotateK looks at
    it."""
    flags = RotateKServerArgs(model_path="dummy", device="cpu", enable_rotatek=True, **flags)
    model = SimpleNamespace(head_dim=128, v_head_dim=128, get_num_kv_heads=lambda tp_size: 8)
    layers = SimpleNamespace(num_effective_layers=32)
    return SimpleNamespace(
        model_config=model,
        kv_cache_dtype=dtype,
        model_dtype=torch.bfloat16,
        server_args=flags,
        layer_info=layers,
    )


def shape_of(kvc):
    return kv_cache_configurator.kv_shape(kvc, rotatek_config(kvc.server_args))


def test_a_checkpoint_that_turns_the_kv_cache_into_what_text_rows_know_not_is_refused(monkeypatch):
    monkeypatch.setattr(
        kv_cache_configurator, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1)
    )
    with pytest.raises(
        RotateKError,
        match="auto took torch.float8_e5m2 from the checkpoint; add --kv-cache-dtype bf",
    ):
        shape_of(configurator(torch.float8_e5m2))


def test_rows_wider_than_those_of_text_in_fp8_are_refused(monkeypatch):
    monkeypatch.setattr(
        kv_cache_configurator, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1)
    )
    with pytest.raises(
        RotateKError, match=r"81920 bytes, more than the 65536 of .* use --rotatek-key-bits 4"
    ):
        shape_of(configurator(torch.float8_e4m3fn, rotatek_key_bits=16))
    shape = shape_of(configurator(torch.float8_e4m3fn))
    assert (shape.kv_bytes, shape.dtype_bytes, shape.visual_row_bytes) == (1, 2, 32 * 8 * 152)


@pytest.fixture
def other_sglang(monkeypatch):
    monkeypatch.setattr(plugin, "version", lambda _: "0.5.17")


def test_another_sglang_version_ends_a_server_that_asks_for_rotatek(other_sglang, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sglang", "--enable-rotatek"])
    with pytest.raises(SystemExit) as end:
        plugin.register()
    assert f"supports SGLang {SUPPORTED_SGLANG}, found 0.5.17" in str(end.value)
    assert f"install sglang=={SUPPORTED_SGLANG}" in str(end.value)


def test_another_sglang_version_only_warns_a_server_without_rotatek(
    other_sglang, monkeypatch, caplog
):
    monkeypatch.setattr(sys, "argv", ["sglang", "serve"])
    monkeypatch.setattr(plugin, "hook_table", lambda: pytest.fail("hooks were registered"))
    plugin.register()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "RotateK is off: sglang-rotatek supports SGLang" in caplog.text
