"""The replay: real copies and real kernels of the machine that the tests run on. Structure is tested, never speed."""
