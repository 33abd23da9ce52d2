"""What users send: pictures, their keys in the caches, their places in a prompt."""
