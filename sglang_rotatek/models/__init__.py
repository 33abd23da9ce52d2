"""Models that SGLang lacks, registered from the plugin."""
