"""What pruning does to a network's answers, and how it is made up for with samples."""
