"""A mutation test of the tests: `python -m tests.mutation --help`."""
