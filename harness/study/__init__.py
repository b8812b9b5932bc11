"""Studies: a grid of runs, what it measures, and what of a paper's findings holds here."""
