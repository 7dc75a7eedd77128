"""crcli on a machine with a real GPU: one command prepares what to carry there, one runs everything there."""
