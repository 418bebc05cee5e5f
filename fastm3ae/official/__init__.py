"""The original's command line, ``python main.py with ...``, understood and translated."""
