"""A plan as a backend of ``torch.compile``."""
