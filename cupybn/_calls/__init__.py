"""The arguments of a call: what they are, whether they fit together, how they lie in memory."""
