"""Model zoos: what the coverage benchmark runs over."""
