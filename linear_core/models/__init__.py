"""The decoders, one file an architecture, from the blocks they share. They know tokens and caches, not the loop."""
