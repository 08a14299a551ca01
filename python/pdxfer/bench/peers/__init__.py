"""Adapters for other transfer libraries: the same pages, memory, processes and verification as pdxfer's rows."""
