"""Data: load, mix, bring to one format, draw batches."""
