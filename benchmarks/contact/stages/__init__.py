"""The stages, each a module with a function ``run`` that takes a `Task`; and the programs that NVIDIA's tools watch."""
