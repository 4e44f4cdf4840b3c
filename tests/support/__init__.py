"""No tests: what several folders share, among it the references that the tests are held against."""
