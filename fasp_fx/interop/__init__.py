"""Results elsewhere: in torch.compile, in quantisers."""
