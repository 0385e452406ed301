"""Batches: the lines of the input file, their answers, and the output file."""
