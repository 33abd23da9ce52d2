"""RotateK for SGLang: visual tokens keep rotated, narrow Keys in a second KV pool."""

__version__ = "0.1.0"
SUPPORTED_SGLANG = "0.5.17"
