"""The two trained models: their configurations and files, and a forward pass for batches of
pictures of one size.

The library's forward handles any mix of picture sizes with Python loops over images and attention
windows, too slow for training on thousands of small pictures. `QwenReader` and `LlavaReader`
compute the same function (tests/test_vlm_models.py) for batches whose pictures have one size and
come first in the prompt.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from architectures import (
    LLAVA_CHAT_TEMPLATE,
    LLAVA_ROLES,
    LLAVA_SPECIALS,
    MROPE_SECTION,
    QWEN2_5_VISION,
    QWEN_CHAT_TEMPLATE,
    QWEN_ROLES,
    QWEN_SPECIALS,
    llava_next_config,
    llava_processor,
    llava_text_config,
    mrope,
    qwen_config,
    qwen_processor,
    write_json,
)
from image_tokens import NEWLINE, ImageTokens, grid_tokens, tiled_tokens
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
)

NAMES = {"qwen2_5_vl": "reader-qwen2.5-vl", "llava_next": "reader-llava-next"}
HEAD_DIM, NUM_QO_HEADS, NUM_KV_HEADS = 128, 4, 2
HIDDEN_SIZE = HEAD_DIM * NUM_QO_HEADS
TOKEN = 28  # px: side of the picture square of one visual token, both backbones
IMAGE_MEAN = IMAGE_STD = 0.5

# Qwen2.5-VL: windows of 6 x 6 visual tokens divide all picture sizes of scripts/common/tasks.
WINDOW_TOKENS = 6
VISION_HEADS = 5
# With the base 1e6 of large models, columns turn the Keys by less than 0.01 rad and rows by little
# more: with four layers, rows must be visible to attention.
ROPE_BASE = 100.0

# LLaVA-NeXT: tiles of 336 px; every picture size of scripts/common/tasks is a grid of whole tiles.
TILE, TILE_TOKENS = 336, 336 // TOKEN
PINPOINTS = [
    [TILE * rows, TILE * columns]
    for rows in (1, 2, 3)
    for columns in (1, 2, 3)
    if rows * columns > 1
]


def make_tokenizer(
    specials: list[str], roles: list[str], chat_template: str, **tokens: str
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: a character that is read is a character that is
    written.

    The names of the roles are one token each, which shortens every turn.
    """
    vocabulary = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[])
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials]
    )
    bpe.add_tokens([AddedToken(role, normalized=False) for role in roles])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, additional_special_tokens=specials, **tokens
    )
    tokenizer.chat_template = chat_template
    tokenizer.model_max_length = 8192
    return tokenizer


def text_sizes(vocabulary_size: int, intermediate_size: int) -> dict:
    return dict(
        vocab_size=vocabulary_size,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=NUM_QO_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
    )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [..., S, D] with cos, sin [S, D], halves convention."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def decoder_layer(
    layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """One Llama or Qwen2 decoder layer, causal, x [B, S, hidden]."""
    batch, length, _ = x.shape
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    q, k, v = (
        project(normed).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = F.scaled_dot_product_attention(
        rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
    )
    x = x + attention.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def vision_block(
    block: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """One Qwen2.5-VL vision block, x [B, S, D]: every row attends to all of itself."""
    batch, length, width = x.shape
    qkv = block.attn.qkv(block.norm1(x)).view(batch, length, 3, VISION_HEADS, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + block.attn.proj(out.transpose(1, 2).reshape(batch, length, width))
    return x + block.mlp(block.norm2(x))


class Reader:
    """A model with its tokenizer, and the prompt's fixed start: `prefix` comes before the visual
    tokens."""

    backbone: str
    prefix: str
    keeps_positions: bool  # of visual tokens, when others are dropped

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prefix_ids = tokenizer.encode(self.prefix)

    def to(self, *where) -> Reader:
        self.model.to(*where)
        self.tables.cache_clear()
        return self

    def chat(self, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The text after the visual tokens in pieces (what the user's side says, the answer with
        its end)."""
        raise NotImplementedError

    def image_tokens(self, size: tuple[int, int]) -> ImageTokens:
        """Where the visual tokens of a picture of ``size`` lie."""
        raise NotImplementedError

    def text_tables(
        self, size: tuple[int, int], text_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary cos, sin [prefix + visual + text_length, HEAD_DIM] of the language model."""
        raise NotImplementedError

    def visual_tokens(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [B, 3, H, W], normalised: visual tokens in prompt order [B, N, hidden], and the
        token of every 28 px square [B, H / 28, W / 28, hidden]."""
        raise NotImplementedError

    def text_parts(self) -> tuple[torch.nn.Embedding, torch.nn.ModuleList, torch.nn.Module]:
        language_model = self.model.model.language_model
        return language_model.embed_tokens, language_model.layers, language_model.norm

    def forward(
        self, pictures: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [B, H, W, 3] uint8 and text ids [B, T]: logits [B, T, vocabulary] that predict
        ids[:, 1:] and one more, and the visual token of every 28 px square."""
        visual, squares = self.visual_tokens(self.normalised(pictures))
        cos, sin = self.tables((pictures.shape[2], pictures.shape[1]), ids.shape[1])
        return self.decode(visual, ids, cos, sin), squares

    def normalised(self, pictures: torch.Tensor) -> torch.Tensor:
        """What visual_tokens takes of pictures [B, H, W, 3] uint8."""
        pixels = (pictures.permute(0, 3, 1, 2).float() / 255 - IMAGE_MEAN) / IMAGE_STD
        return pixels.to(self.text_parts()[0].weight.dtype)

    def decode(
        self, visual: torch.Tensor, ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, T, vocabulary] of text ids [B, T] behind visual tokens [B, K, hidden]; cos,
        sin [S, D] or, where rows differ, [B, 1, S, D]."""
        embed, layers, norm = self.text_parts()
        start = embed(torch.tensor(self.prefix_ids, device=ids.device)).expand(len(ids), -1, -1)
        x = torch.cat((start, visual, embed(ids)), dim=1)
        for layer in layers:
            x = decoder_layer(layer, x, cos, sin)
        return F.linear(norm(x[:, -ids.shape[1] :]), embed.weight)

    @functools.cache
    def tables(self, size: tuple[int, int], text_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.text_parts()[0].weight
        return tuple(
            table.to(weight.device, weight.dtype) for table in self.text_tables(size, text_length)
        )


class QwenReader(Reader):
    backbone = "qwen2_5_vl"
    prefix = "<|im_start|>user\n<|vision_start|>"
    keeps_positions = True

    @classmethod
    def build(cls) -> QwenReader:
        """Random weights; the caller seeds."""
        roles = ["user", "assistant", "system"]
        tokenizer = make_tokenizer(QWEN_SPECIALS, roles, QWEN_CHAT_TEMPLATE, **QWEN_ROLES)
        text = text_sizes(len(tokenizer), 384) | mrope(ROPE_BASE)
        text |= dict(model_type="qwen2_5_vl_text")
        vision = QWEN2_5_VISION | dict(
            depth=5,
            hidden_size=160,
            intermediate_size=320,
            num_heads=VISION_HEADS,
            patch_size=TOKEN // 2,
            window_size=WINDOW_TOKENS * TOKEN,
            fullatt_block_indexes=[2, 4],
            out_hidden_size=HIDDEN_SIZE,
        )
        config = qwen_config(tokenizer, text, vision, tie_word_embeddings=True)
        return cls(Qwen2_5_VLForConditionalGeneration(config), tokenizer)

    def processor_files(self) -> dict[str, dict]:
        return {
            "preprocessor_config.json": qwen_processor(
                "Qwen2_5_VLProcessor",
                56 * 56,
                2048 * TOKEN * TOKEN,
                mean=[IMAGE_MEAN] * 3,
                std=[IMAGE_STD] * 3,
                patch_size=TOKEN // 2,
            )
        }

    def chat(self, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
        pieces = []
        for index, (question, answer) in enumerate(turns):
            start = "\n<|im_start|>user\n" if index else "<|vision_end|>"
            pieces.append(
                (f"{start}{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>")
            )
        return pieces

    def image_tokens(self, size: tuple[int, int]) -> ImageTokens:
        return grid_tokens(size[1] // TOKEN, size[0] // TOKEN)

    def text_tables(
        self, size: tuple[int, int], text_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns, rows = size[0] // TOKEN, size[1] // TOKEN
        start = len(self.prefix_ids)
        before = torch.arange(start).expand(3, -1)
        row = torch.arange(rows).repeat_interleave(columns)
        column = torch.arange(columns).repeat(rows)
        image = start + torch.stack((torch.zeros_like(row), row, column))
        after = start + max(rows, columns) + torch.arange(text_length).expand(3, -1)
        positions = torch.cat((before, image, after), dim=1).float()  # [3, S]: time, row, column
        frequencies = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(MROPE_SECTION))
        angles = (positions[axis] * frequencies[:, None]).T.repeat(1, 2)
        return angles.cos(), angles.sin()

    @functools.cache
    def vision_tables(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary cos, sin [rows * columns * 4, head_dim] of the patches of a picture, in window
        order."""
        visual = self.model.model.visual
        weight = visual.patch_embed.proj.weight
        frequencies = 10000.0 ** (-torch.arange(0, 16, 2).float() / 16)
        # [2 rows, 2 columns, 2]
        places = torch.stack(
            torch.meshgrid(torch.arange(2 * rows), torch.arange(2 * columns), indexing="ij"), dim=-1
        )
        places = places.view(rows, 2, columns, 2, 2).transpose(1, 2).reshape(1, rows, columns, -1)
        places = self.to_windows(places).reshape(-1, 2).float()
        angles = (places[:, :, None] * frequencies).flatten(1).repeat(1, 2)
        return angles.cos().to(weight), angles.sin().to(weight)

    @staticmethod
    def to_windows(x: torch.Tensor) -> torch.Tensor:
        """[B, rows, columns, C] -> [B, windows, WINDOW_TOKENS^2, C]."""
        batch, rows, columns, width = x.shape
        side = WINDOW_TOKENS
        x = x.view(batch, rows // side, side, columns // side, side, width).transpose(2, 3)
        return x.reshape(batch, -1, side * side, width)

    def visual_tokens(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        visual = self.model.model.visual
        batch, _, height, width = pictures.shape
        rows, columns, patch = height // TOKEN, width // TOKEN, TOKEN // 2
        # A still picture fills both frames of the temporal patch.
        kernel = visual.patch_embed.proj.weight.sum(dim=2).flatten(1)
        x = pictures.view(batch, 3, rows, 2, patch, columns, 2, patch).permute(
            0, 2, 5, 3, 6, 1, 4, 7
        )
        x = F.linear(x.reshape(batch, rows, columns, 4, -1), kernel)
        dim = x.shape[-1]
        x = self.to_windows(x.flatten(3))  # [B, windows, side^2, 4 dim]
        windows = x.shape[1]
        cos, sin = self.vision_tables(rows, columns)
        in_window = 4 * WINDOW_TOKENS**2
        for index, block in enumerate(visual.blocks):
            if index in visual.fullatt_block_indexes:
                x = vision_block(block, x.reshape(batch, -1, dim), cos, sin)
            else:
                tables = (
                    table.view(windows, 1, in_window, -1).repeat(batch, 1, 1, 1)
                    for table in (cos, sin)
                )
                x = vision_block(block, x.reshape(batch * windows, in_window, dim), *tables)
        x = visual.merger.mlp(visual.merger.ln_q(x.reshape(-1, dim)).view(batch, -1, 4 * dim))
        side = WINDOW_TOKENS
        x = x.view(batch, rows // side, columns // side, side, side, -1).transpose(2, 3)
        x = x.reshape(batch, rows, columns, -1)
        return x.flatten(1, 2), x


class LlavaReader(Reader):
    backbone = "llava_next"
    prefix = "USER: "
    keeps_positions = False

    @classmethod
    def build(cls) -> LlavaReader:
        """Random weights; the caller seeds."""
        roles = ["USER", "ASSISTANT"]
        tokenizer = make_tokenizer(LLAVA_SPECIALS, roles, LLAVA_CHAT_TEMPLATE, **LLAVA_ROLES)
        text = text_sizes(len(tokenizer), 448) | dict(rope_theta=10000.0)
        text_config = llava_text_config(tokenizer, LlamaConfig, text, tie_word_embeddings=True)
        vision_config = CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=6,
            image_size=TILE,
            patch_size=TOKEN,
            projection_dim=192,
        )
        config = llava_next_config(tokenizer, text_config, vision_config, PINPOINTS)
        return cls(LlavaNextForConditionalGeneration(config), tokenizer)

    def processor_files(self) -> dict[str, dict]:
        return {
            "preprocessor_config.json": {
                "processor_class": "LlavaNextProcessor",
                "image_processor_type": "LlavaNextImageProcessor",
                "size": {"shortest_edge": TILE},
                "crop_size": {"height": TILE, "width": TILE},
                "image_grid_pinpoints": PINPOINTS,
                "image_mean": [IMAGE_MEAN] * 3,
                "image_std": [IMAGE_STD] * 3,
            },
            "processor_config.json": llava_processor("LlavaNextProcessor", TOKEN),
        }

    def chat(self, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [
            (f"{'USER: ' if index else chr(10)}{question} ASSISTANT:", f"{answer}</s>")
            for index, (question, answer) in enumerate(turns)
        ]

    def image_tokens(self, size: tuple[int, int]) -> ImageTokens:
        columns, rows = size[0] // TILE, size[1] // TILE
        tile_of = 1 + torch.arange(rows * columns).view(rows, 1, columns, 1)
        lines = tile_of.expand(-1, TILE_TOKENS, -1, TILE_TOKENS).reshape(rows * TILE_TOKENS, -1)
        lines = F.pad(lines, (0, 1), value=NEWLINE)
        return tiled_tokens(
            torch.cat((torch.zeros(TILE_TOKENS**2, dtype=torch.int64), lines.flatten()))
        )

    def text_tables(
        self, size: tuple[int, int], text_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns, rows = size[0] // TOKEN, size[1] // TOKEN
        length = len(self.prefix_ids) + TILE_TOKENS**2 + rows * (columns + 1) + text_length
        frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angles = (torch.arange(length).float()[:, None] * frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()

    def visual_tokens(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, _, height, width = pictures.shape
        rows, columns = height // TILE, width // TILE
        whole = F.interpolate(pictures.float(), (TILE, TILE), mode="bicubic", antialias=True)
        # The processor scales bytes to bytes.
        whole = (
            ((whole * IMAGE_STD + IMAGE_MEAN) * 255).round().clamp(0, 255) / 255 - IMAGE_MEAN
        ) / IMAGE_STD
        tiles = pictures.view(batch, 3, rows, TILE, columns, TILE).permute(0, 2, 4, 1, 3, 5)
        pixels = torch.cat((whole.to(pictures)[:, None], tiles.flatten(1, 2)), dim=1).flatten(0, 1)
        states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        x = self.model.model.multi_modal_projector(states[:, 1:]).view(
            batch, 1 + rows * columns, TILE_TOKENS**2, -1
        )
        squares = (
            x[:, 1:].reshape(batch, rows, columns, TILE_TOKENS, TILE_TOKENS, -1).transpose(2, 3)
        )
        squares = squares.reshape(batch, rows * TILE_TOKENS, columns * TILE_TOKENS, -1)
        newline = self.model.model.image_newline.expand(batch, squares.shape[1], 1, -1)
        lines = torch.cat((squares, newline.to(squares)), dim=2)
        return torch.cat((x[:, 0], lines.flatten(1, 2)), dim=1), squares


READERS: dict[str, type[Reader]] = {"qwen2_5_vl": QwenReader, "llava_next": LlavaReader}


def save_checkpoint(reader: Reader, out: Path) -> None:
    """Write the Hugging Face directory: bf16 safetensors in shards below 8 MiB, tokenizer,
    processor."""
    out.mkdir(parents=True, exist_ok=True)
    reader.model.generation_config.do_sample = False
    reader.model.generation_config.eos_token_id = reader.tokenizer.eos_token_id
    reader.model.to(torch.bfloat16).save_pretrained(out, max_shard_size="7900KB")
    reader.tokenizer.save_pretrained(out)
    for name, content in reader.processor_files().items():
        write_json(out / name, content)


def load_weights(reader: Reader, directory: Path) -> None:
    """Copy the weights of a checkpoint directory of the same architecture into the reader's
    model."""
    trained = type(reader.model).from_pretrained(directory)
    reader.model.load_state_dict(trained.state_dict())
