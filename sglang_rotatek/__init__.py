"""RotateK for SGLang: visual tokens keep rotated, narrow Keys beside full-width text."""

__version__ = "0.3.0"
SUPPORTED_SGLANG = "0.5.23"
