"""The real servers of these tests are fixtures of `tests/conftest.py`: all folders share one session of them."""
