"""Results as JSON and safetensors, read as untrusted data (mechanism of :mod:`fasp_fx.store`)."""
