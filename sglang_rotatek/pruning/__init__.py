"""Fewer tokens an image, chosen by the image alone, so that every question may read them from the
cache."""
