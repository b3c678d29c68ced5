"""The caller's calling convention around a captured graph."""
