"""crcli beside raw CRIU and beside the script that a user would write: `python -m tests.bench`."""
