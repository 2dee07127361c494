"""The KV cache of an image that grows line by line: its slots, the policies' view of them, and how victims leave."""
