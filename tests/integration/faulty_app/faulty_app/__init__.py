"""The app of the tests of faults."""
