"""The stages, a module each, with a function ``run`` that takes a `Task`; so is the work that a tool watches."""
