"""Pictures and prompts of LLaVA-NeXT in the Hugging Face layout, for SGLang's tokenizer process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.managers.mm_utils import hash_feature
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.processors.base_processor import (
    BaseMultimodalProcessor,
    MultimodalSpecialTokens,
)

from sglang_rotatek.config import RotateKError
from sglang_rotatek.requests.pictures import Picture, picture_size, rgb

from .llava_next import (
    LlavaNextForConditionalGeneration,
    num_image_tokens,
    tile_grid,
    unpadded_grid,
)

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


class LlavaNextProcessor(BaseMultimodalProcessor):
    models = [LlavaNextForConditionalGeneration]

    def __init__(
        self, hf_config: Any, server_args: ServerArgs, processor: Any, *args: Any, **kwargs: Any
    ) -> None:
        # Published checkpoints leave these to the model's configuration. CLIP always has one class
        # token.
        processor.patch_size = hf_config.vision_config.patch_size
        processor.vision_feature_select_strategy = hf_config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1
        super().__init__(hf_config, server_args, processor, *args, **kwargs)
        self.image_token_id = hf_config.image_token_index
        self.mm_tokens = MultimodalSpecialTokens(
            image_token=processor.image_token, image_token_id=self.image_token_id
        ).build(processor)

    def collect_mm_items_from_processor_output(
        self, data_dict: dict, modality: Modality | None = None
    ) -> list[MultimodalDataItem]:
        """One item per image. Pictures can follow each other without text between them, so their
        places are counted out from their sizes."""
        if "pixel_values" not in data_dict:
            return super().collect_mm_items_from_processor_output(data_dict, modality)
        positions = np.flatnonzero(
            np.asarray(data_dict["input_ids"]).reshape(-1) == self.image_token_id
        )
        sizes = [tuple(size) for size in torch.as_tensor(data_dict["image_sizes"]).tolist()]
        lengths = [num_image_tokens(self.hf_config, size) for size in sizes]
        if sum(lengths) != len(positions):
            raise RotateKError(
                f"expected {sum(lengths)} image tokens for pictures of {sizes} (height, width) px, "
                f"found {len(positions)} in the prompt: give one {self.mm_tokens.image_token} per "
                "picture."
            )
        starts = np.cumsum([0, *lengths[:-1]])
        items = []
        for start, length, size, tiles in zip(
            starts, lengths, sizes, data_dict["pixel_values"], strict=True
        ):
            rows, columns = tile_grid(self.hf_config, size)
            at = int(positions[start])
            item = MultimodalDataItem(
                modality=Modality.IMAGE,
                # The processor pads to the most tiles of any picture.
                feature=tiles[: 1 + rows * columns],
                offsets=[(at, at + length - 1)],
                model_specific_data={"image_sizes": size},
            )
            # Two blank pictures have the same tiles and, unpadded, another number of tokens.
            item.set_hash(hash((hash_feature(item.feature), *size)) & (2**63 - 1))
            items.append(item)
        return items

    def _checked(self, loaded: list) -> list:
        """The pictures in RGB; what the client has processed itself, a dictionary, stays.
        ValueError for a picture that leaves no row of patches."""
        pictures = [rgb(each) if isinstance(each, Picture) else each for each in loaded]
        for number, picture in enumerate(pictures, 1):
            if isinstance(picture, Picture):
                height, width = picture_size(picture)
                if not all(unpadded_grid(self.hf_config, (height, width))):
                    raise ValueError(
                        f"picture {number} is {width} x {height} px: too long and narrow to leave "
                        "one row of patches; crop it."
                    )
        return pictures

    async def process_mm_data_async(
        self,
        image_data: list,
        input_text: str | list[int],
        request_obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> MultimodalProcessorOutput:
        """``input_text``: prompt text with one image token per picture, or its token ids.
        ValueError for video and audio, which the model does not take."""
        for kind in ("video", "audio"):
            if getattr(request_obj, f"{kind}_data", None):
                raise ValueError(
                    f"LLaVA-NeXT takes text and pictures, got {kind}: leave it out, or send frames "
                    "as pictures."
                )
        loaded = await self.load_mm_data(
            prompt=input_text,
            image_data=image_data,
            multimodal_tokens=self.mm_tokens,
            discard_alpha_channel=True,
        )
        loaded.images = self._checked(loaded.images)
        items, input_ids, _ = await self.process_and_combine_mm_data_async(loaded, self.mm_tokens)
        return MultimodalProcessorOutput(
            input_ids=input_ids.tolist(), mm_items=items, im_token_id=self.image_token_id
        )
