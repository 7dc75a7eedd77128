"""What `crcli run` knows of a job: how it starts, what it reads and writes, and whether it is the same."""
