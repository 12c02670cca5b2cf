"""foretoken: train language models that predict the next n tokens, and decode with them, faster and unchanged."""

__version__ = "0.1.0"
