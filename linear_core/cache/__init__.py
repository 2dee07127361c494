"""The KV cache of an image that grows line by line: its slots, what a policy sees of them, and how victims leave."""
