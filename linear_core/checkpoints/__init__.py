"""From files to models: reading untrusted checkpoints, published releases, downloads, conversion."""
