"""From a captured model to a smaller one: configuration, driver, check, result."""
