"""Results of a comparison: their schema, statistics, tables and pictures."""
