"""Hides torchcodec, which may be installed without the FFmpeg libraries that it loads, so that
SGLang takes decord."""

raise ImportError("the tests decode videos with the stand-in for decord")
