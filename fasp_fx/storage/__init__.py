"""Folders, tensors and graphs as files, read as untrusted data; knows no results."""
