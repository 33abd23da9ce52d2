"""Stand-in for the video decoder decord: reads the frames of an animated PNG, all shown equally
long, with Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageSequence


class Frames(np.ndarray):
    """uint8 [height, width, 3], or [frames, height, width, 3] of a batch."""

    def asnumpy(self) -> np.ndarray:
        return np.asarray(self)


class VideoReader:
    def __init__(self, path: str, ctx: None) -> None:
        with Image.open(path) as video:
            self._milliseconds = video.info["duration"]
            self._frames = [
                np.array(frame.convert("RGB")).view(Frames)
                for frame in ImageSequence.Iterator(video)
            ]

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> Frames:
        return self._frames[index]

    def get_batch(self, indices: list[int]) -> Frames:
        return np.stack([self._frames[index] for index in indices]).view(Frames)

    def get_avg_fps(self) -> float:
        return 1000 / self._milliseconds


def cpu(index: int) -> None:
    return None
