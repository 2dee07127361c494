"""From pictures to codes and back: VQ tokenizers and their networks."""
