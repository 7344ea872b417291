"""Maths as pure functions: no module, and no state but the table of what computes them (``forms``)."""
