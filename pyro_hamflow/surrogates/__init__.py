"""Learned energies: the network, the targets made of it, and how it is learned."""
