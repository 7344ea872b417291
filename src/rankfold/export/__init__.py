"""An adapter as other programs use it, with a certificate that it says the same there."""
