"""From a model to a picture: prefill, decoding line by line, sampling, CUDA graphs, micro-batches."""
