"""The app of the test of links."""
