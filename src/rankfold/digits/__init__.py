"""The demonstration that a language model can be taught to see: handwritten digits, read on a CPU."""
