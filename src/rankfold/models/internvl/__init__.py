"""InternVL's original layout, translated to native classes and back without running its code."""
