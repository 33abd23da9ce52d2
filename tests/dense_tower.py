"""An oracle of a vision tower's attention: the weights that Transformers computes eagerly, picture
by picture."""

from __future__ import annotations

import sys
from typing import NamedTuple
from unittest import mock

import torch
from transformers.vision_utils import get_vision_window_index


class TowerRun(NamedTuple):
    """Of one batch of pictures: features [N, hidden] of each, what its tokens receive in the last
    block [N] and their metric [N, d], in raster order; and q and k [T, H, d] of that block, in the
    tower's."""

    features: list[torch.Tensor]
    received: list[torch.Tensor]
    metric: list[torch.Tensor]
    q: torch.Tensor
    k: torch.Tensor


@torch.inference_mode()
def run_tower(visual: torch.nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> TowerRun:
    """``visual``: of Qwen2-VL or Qwen2.5-VL as Transformers has it; pixels [T, c] and grid
    [pictures, 3]: of its processor."""
    module = sys.modules[type(visual).__module__]
    pictures = []

    def attend(attention, q, k, *arguments, **kwargs):
        out, weights = module.eager_attention_forward(attention, q, k, *arguments, **kwargs)
        if attention is visual.blocks[-1].attn:
            pictures.append((q[0].transpose(0, 1), k[0].transpose(0, 1), weights[0]))
        return out, weights

    with mock.patch.object(module.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: attend):
        features = visual(pixels, grid_thw=grid).pooler_output
    q, k = (torch.cat(each) for each in list(zip(*pictures, strict=True))[:2])
    received = torch.cat([weights.mean(0).sum(0) for *_, weights in pictures]).view(-1, 4).mean(1)
    metric = k.mean(1).view(len(received), 4, -1).mean(1)
    if hasattr(visual, "window_size"):
        order = get_vision_window_index(
            grid, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )[0].argsort()
        received, metric = received[order], metric[order]
    lens = (grid.prod(-1) // 4).tolist()
    return TowerRun(*(list(each.split(lens)) for each in (features, received, metric)), q, k)


@torch.inference_mode()
def class_token_scores(tower: torch.nn.Module, tiles: torch.Tensor) -> torch.Tensor:
    """[tiles, 1 + patches, 1 + d]: what each patch receives from CLIP's class token in the last
    layer but one, and its metric. ``tower``: a CLIPVisionModel; tiles [tiles, 3, side, side]."""
    module = sys.modules[type(tower).__module__]
    seen = []

    def attend(attention, q, k, *arguments, **kwargs):
        out, weights = module.eager_attention_forward(attention, q, k, *arguments, **kwargs)
        if attention is tower.encoder.layers[-2].self_attn:
            seen.append(torch.cat((weights[:, :, 0].sum(1)[..., None], k.sum(1)), dim=-1))
        return out, weights

    with mock.patch.object(module.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: attend):
        tower(tiles)
    return seen[0]
