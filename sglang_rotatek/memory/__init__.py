"""The KV memory: which row holds which token, who owns it, and what fits."""
