"""What takes too long for every run of the tests, and the figures docs/reliability.md publishes."""
