"""Maths as pure functions: no module, no state, no I/O."""
