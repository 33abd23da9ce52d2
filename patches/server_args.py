"""The flags. REPLACEs ``sglang.srt.server_args.ServerArgs`` and ``Engine.server_args_class``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Optional
from typing import Annotated as A

from sglang.srt.arg_groups.arg_utils import NS, Arg
from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view, resolving_view
from sglang.srt.configs.model_config import ModelConfig, register_model_config_factory
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from sglang_rotatek.config import BASES, TOKEN_PRUNERS, RotateKConfig, RotateKError
from sglang_rotatek.kernels.row_format import KEY_BITS, VALUE_BITS
from sglang_rotatek.models import register_llava_next

from .model_config import check_model
from .refusals import BACKEND, refuse_device, refuse_unsupported

if TYPE_CHECKING:
    from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker

logger = logging.getLogger(__name__)
DEFAULTS = RotateKConfig()
FLAGS = asdict(DEFAULTS)  # rotatek_{name} -> default


class RotateKServerArgs(ServerArgs, dict=True):  # type: ignore[call-arg]
    """The host's arguments and RotateK's. Without ``enable_rotatek`` it behaves as its base class.

    Every process makes it, by its constructor, from what the launcher sends.
    """

    enable_rotatek: A[
        bool,
        "Store image tokens in rotated, narrow rows (RotateK): nearly three times as many chats "
        "that are mostly images in the same memory, with answers closer to exact than an FP8 KV "
        "cache gives. Selects --attention-backend rotatek and --radix-cache-backend rotatek.",
        NS("memory"),
    ] = False
    rotatek_key_bits: A[
        int,
        Arg(
            help="Keys of image tokens. 4 or 2: all channels coded, 16 principal components at 8 "
            "bits and the rest, turned by a Hadamard matrix, at so many. 16: the kept channels of "
            "--rotatek-keep-ratio in the model's dtype, as the RotateK paper has them.",
            choices=list(KEY_BITS),
        ),
        NS("memory"),
    ] = DEFAULTS.key_bits
    rotatek_value_bits: A[
        Optional[int],
        Arg(
            help="Values of image tokens. 16: the model's dtype. 8: FP8. 4 or 2: codes with steps "
            "and zero points a token. Default: 4 with coded Keys, else 16.",
            choices=list(VALUE_BITS),
        ),
        NS("memory"),
    ] = DEFAULTS.value_bits
    rotatek_head_channels: A[
        Optional[int],
        "Principal components that coded Keys keep at 8 bits, a multiple of 16. Default: 16.",
        NS("memory"),
    ] = DEFAULTS.head_channels
    rotatek_max_error: A[
        Optional[float],
        "An image whose coded Keys are off by more than this share of their energy (squared, mean "
        "over layers and heads) is stored at full width from the next request on. Default: no "
        "limit.",
        NS("memory"),
    ] = DEFAULTS.max_error
    rotatek_keep_ratio: A[
        Optional[float],
        "With --rotatek-key-bits 16, share of the Key channels kept for image tokens; rank = ratio "
        "* head_dim, a multiple of 16. Lower holds more images, higher is closer to full "
        "attention: image tokens per byte are 1.33, 1.6 and 1.78 times stock's at 0.5, 0.25 and "
        "0.125; 1.0 is exact and saves nothing. Default: 0.25.",
        NS("memory"),
    ] = DEFAULTS.keep_ratio
    rotatek_basis: A[
        str,
        Arg(
            help="How the kept channels are chosen, per image, layer and KV head. pca: principal "
            "components of the Keys, independent of the question, so a cached image is as good for "
            "later questions. With --rotatek-key-bits 16 also paper: weighted by the last 32 "
            "prompt queries, fits the first question better; and think: unrotated channel "
            "selection, a baseline.",
            choices=list(BASES),
        ),
        NS("memory"),
    ] = DEFAULTS.basis
    rotatek_keep_tokens: A[
        float,
        "Share of an image's tokens that stay, chosen by the image alone after the vision tower: "
        "less prefill and less memory, and fine print is lost first. Default: 1.0, all.",
        NS("memory"),
    ] = DEFAULTS.keep_tokens
    rotatek_token_pruner: A[
        str,
        Arg(
            help="Which tokens stay with --rotatek-keep-tokens. divprune: those most unlike each "
            "other. residual: those that few principal components explain worst. visionzip: those "
            "that the vision tower attends to most, and one in 20 into which the others are "
            "merged. uniform: evenly spaced, a baseline.",
            choices=list(TOKEN_PRUNERS),
        ),
        NS("memory"),
    ] = DEFAULTS.token_pruner
    rotatek_visual_fraction: A[
        float,
        "Share of the KV memory that images may hold at most, so that text always finds the rest. "
        "Within it images and text share the memory as they come. --max-total-tokens N means the "
        "bytes of N stock tokens.",
        NS("memory"),
    ] = DEFAULTS.visual_fraction
    rotatek_min_image_tokens: A[
        Optional[int],
        "Images with fewer tokens keep full-width Keys. Default: those that would take no less "
        "memory with narrow ones, since a basis takes as much as some 60 tokens save.",
        NS("memory"),
    ] = DEFAULTS.min_image_tokens
    rotatek_segment_tokens: A[
        Optional[int],
        "Cut images into segments of at most this many tokens with a basis each: closer to full "
        "attention for models with 1-D RoPE (LLaVA-NeXT: 576), at one basis more per segment. "
        "Default: one per image.",
        NS("memory"),
    ] = DEFAULTS.segment_tokens

    native_llava_next: A[
        bool,
        "Serve LLaVA-NeXT checkpoints in the Hugging Face layout "
        "(LlavaNextForConditionalGeneration) with a native model, hence with radix cache and "
        "chunked prefill, instead of the Transformers backend. Implied by --enable-rotatek.",
        NS("model"),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.enable_rotatek or self.native_llava_next):
            return
        config = rotatek_config(self)  # validates the flags
        if config is not None:
            refuse_unsupported(self, config)
            self.disable_prefill_cuda_graph = True  # else the host's default for some models
            self.attention_backend = self.radix_cache_backend = BACKEND
        register_model_config_factory(RotateKServerArgs, _model_config)

    def __reduce__(self) -> tuple:
        """The host's, with RotateK made whole in the process that unpickles the record."""
        rebuild, arguments = super().__reduce__()
        return _rebuild, (rebuild, arguments)

    def resolve_once(self) -> None:
        """The host's resolution, then the refusals again: it may have resolved a default to
        something else."""
        if getattr(self, "_resolution_finished", False):
            return
        try:
            super().resolve_once()
            config = rotatek_config(self)
            self._warn_of_idle_flags(config)
            if config is not None:
                view = resolved_view(self)
                refuse_unsupported(view, config)
                refuse_device(view)
                if not self._has_no_model():
                    model = model_config_of(self)
                    check_model(model, self.model_path)
                    config.row_format(model.head_dim, model.v_head_dim)
                    config.check_prunable(model.hf_config.architectures[0])
        except RotateKError as error:
            if getattr(self, "_is_of_command_line", False):
                raise SystemExit(f"error: {error}") from error
            raise

    def _warn_of_idle_flags(self, config: RotateKConfig | None) -> None:
        if config is None:
            for name, default in FLAGS.items():
                if (value := getattr(self, f"rotatek_{name}")) != default:
                    flag = f"--rotatek-{name.replace('_', '-')} {value}"
                    logger.warning("%s does nothing without --enable-rotatek; add it.", flag)
        elif config.keep_tokens == 1 and config.token_pruner != DEFAULTS.token_pruner:
            logger.warning(
                "--rotatek-token-pruner %s does nothing while all tokens stay; add "
                "--rotatek-keep-tokens.",
                config.token_pruner,
            )

    def get_tokenizer_worker_class(self) -> type[TokenizerWorker]:
        """What each process of --tokenizer-worker-num runs."""
        if not self.enable_rotatek:
            return super().get_tokenizer_worker_class()
        from .tokenizer_manager import RotateKTokenizerWorker

        return RotateKTokenizerWorker

    def _has_no_model(self) -> bool:
        return self.model_path.lower() in ("none", "dummy")

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> RotateKServerArgs:
        try:
            record = super().from_cli_args(args)
        except RotateKError as error:
            raise SystemExit(f"error: {error}") from error
        record._is_of_command_line = True
        return record


def _rebuild(rebuild: Callable, arguments: tuple) -> RotateKServerArgs:
    """The record that the launcher sent. HTTP workers (``--tokenizer-worker-num``) get it before
    their first request, and load no plugins by themselves. Raises RotateKError for hooks that did
    not take."""
    record = rebuild(*arguments)
    if record.enable_rotatek or record.native_llava_next:
        from sglang_rotatek.plugin import check_hooks  # which imports this module

        load_plugins()
        check_hooks()
    return record


def _model_config(server_args: RotateKServerArgs, **kwargs: Any) -> ModelConfig:
    """The host's model configuration, in any process, with the models that it lacks."""
    register_llava_next()
    # A view of the record: the host finds no factory for its type and goes on by itself.
    return ModelConfig.from_server_args(resolving_view(server_args), **kwargs)


def rotatek_config(server_args: ServerArgs) -> RotateKConfig | None:
    """The validated configuration, or None when RotateK is off. Raises RotateKError."""
    if not getattr(server_args, "enable_rotatek", False):
        return None
    return RotateKConfig(**{name: getattr(server_args, f"rotatek_{name}") for name in FLAGS})
