"""A driver in virtual time: the same cluster, modelled workers."""
