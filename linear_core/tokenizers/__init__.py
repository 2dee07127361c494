"""Pictures to codes and back: the VQ tokenizers and the networks they are made of."""
