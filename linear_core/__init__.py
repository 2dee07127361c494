"""The line cache: autoregressive image generation that keeps only a few lines of the key-value cache.

One word, one meaning, here and in the nodes, the README and the widget:

    line      one row of the token grid, with its end-of-line token where the model has one
    index     which token of the sequence, prompt first; the loop owns it
    position  how far RoPE turns a token; the model's business
    slot      a place in the cache: a key, a value, an index (-1: nothing there) and a weight, how many tokens it
              stands for; attention adds ln(weight) to its score
    budget    how many lines of image tokens survive a line's end
    anchors   the first image tokens; recent: the newest whole lines; neither is ever evicted
    policy    a function from what is held to a score; higher is kept
    plan      frozen, checked settings
    prompt    what conditions the image: a class, a caption, chat tokens

Numbers (no torch):  errors  grid  plan  events
Tensors (no models): view  cache  policies/  attention  sampling  blocks
Models (no loop):    models/  prompts/  vq/  weights
Time:                generate  preview  heatmap
Elsewhere:           hf (the cache for those who stay with transformers)
For people:          library (files to a model)  text (words to a prompt)  published (names, places)  convert
                     download (the only connection)  __main__ (the command line)

This package never imports ComfyUI.
"""
