"""The line cache: autoregressive image generation that keeps only a few lines of the KV cache.

One word, one meaning, here and in the nodes, the README and the widget:

    line      one row of the token grid, with its end-of-line token if the model has one
    index     a token's number in the sequence, prompt first; the loop owns it
    position  how far RoPE rotates a token; the model's business
    slot      a place in the cache: a key, a value, an index (-1: empty) and a weight, the number of tokens that it
              stands for; attention adds ln(weight) to its score
    budget    lines of image tokens that are kept when a line has ended
    anchors   the first image tokens; recent: the newest whole lines; neither is ever evicted
    policy    a function from the contents of the cache to scores; higher is kept
    release   what happens to victims: strict (gone at once), lazy (visible until overwritten), fold
    fold      to merge a victim into the kept slot with the nearest key
    plan      frozen, checked settings
    prompt    what conditions the image: a class, a caption, chat tokens

Each room imports only from those above it:

    errors grid pyramid sizes plan events  numbers, no torch
    cache/        slots, what a policy sees of them, folding, attention; for lines and for scales
    policies/     one file per policy: which tokens to keep
    prompts/      classes, captions and chats to token ids or features
    models/       the decoders, one file per architecture
    tokenizers/   VQ tokenizers: pictures to codes and back
    loop/         prefill, decoding, sampling, CUDA graphs, micro-batches, memory
    pictures/     previews, heatmaps, contact sheets
    checkpoints/  from files to models: untrusted files, families, releases, downloads, conversion
    hf            the cache for models that run in transformers
    __main__      the command line
    assets/       the bundled model

This package never imports ComfyUI.
"""
