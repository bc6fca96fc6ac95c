"""Processes of the topic `modes`: one sampler each, on one target, told by its command."""
