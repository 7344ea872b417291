"""InternVL's original layout, translated to transformers' native classes and back; none of its code is run."""
