"""Trials on record, and what is made from them: tables, heat maps, tuned entries."""
