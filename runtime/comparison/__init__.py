"""Where artifacts went wrong: distances from the unmerged model, and evidence in weights, positions and files."""
