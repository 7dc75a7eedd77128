"""CRIU's own static test programs, moved by crcli without any option: `python -m tests.zdtm`."""
