"""Examples to tokens, with a mask of what is trained."""
