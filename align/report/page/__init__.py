"""The report of a run: one HTML file with pictures, tables and samples, which needs no network."""
