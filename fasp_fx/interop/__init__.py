"""Results elsewhere: in torch.compile, as a page."""
