"""Sums and singular values of updates of low rank, without the updates themselves."""
