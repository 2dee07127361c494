"""The decoders, one file per architecture, built from shared blocks. They know tokens and caches, not the loop."""
