"""How long models and their layers take: measured, and predicted by a cost model."""
