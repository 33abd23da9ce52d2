"""What VisionZip scores tokens by, from a Hugging Face tower."""

from __future__ import annotations

import torch
from fidelity_models import Checkpoint, observe_attention
from image_tokens import NEWLINE
from pruned_prompts import llava_patches

from sglang_rotatek.pruning.visionzip import attention_received


class TowerScores:
    """Of each image token the attention that it receives [N] and its metric [N, d], the Keys' mean
    over heads: of a Qwen tower from all patches, in the last block that sees whole pictures; of
    CLIP from the class token of its tile, in the layer that the model takes features from."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        model = checkpoint.model.model
        if checkpoint.has_mrope:
            self._tower = model.visual
            self._attention = self._tower.blocks[max(self._tower.fullatt_block_indexes)].attn
        else:
            self._tower = model.vision_tower
            encoder = next(module for module in self._tower.modules() if hasattr(module, "layers"))
            self._attention = encoder.layers[model.config.vision_feature_layer].self_attn
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        observe_attention(self._attention.config, f"visionzip-{id(self)}", self._record)

    def _record(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> None:
        if module is self._attention:
            self._seen = query.float(), key.float()

    def of(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the picture that the tower saw last, whose model inputs are ``inputs``."""
        query, key = self._seen
        if self._checkpoint.has_mrope:
            return self._of_qwen(
                query[0].transpose(0, 1), key[0].transpose(0, 1), inputs["image_grid_thw"]
            )
        patch_of, _ = llava_patches(self._checkpoint, inputs)
        weights = torch.einsum("thd,thsd->ths", query[:, :, 0], key) * query.shape[-1] ** -0.5
        received = weights.softmax(-1)[:, :, 1:].sum(1).flatten()
        metric = key[:, :, 1:].mean(1).flatten(0, 1)
        # Newlines have no patch, and are never asked for.
        patch_of = torch.where(patch_of == NEWLINE, 0, patch_of).to(received.device)
        return received[patch_of], metric[patch_of]

    def _of_qwen(
        self, query: torch.Tensor, key: torch.Tensor, grid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        tower = self._tower
        patches = tower.spatial_merge_size**2
        received = attention_received(query, key).view(-1, patches).mean(1)
        metric = key.mean(1).view(len(received), patches, -1).mean(1)
        windows, _ = get_vision_window_index(
            grid,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        raster = windows.argsort().to(received.device)
        return received[raster], metric[raster]
