"""How a job is seen dead, whatever is lacking then."""

from __future__ import annotations

import os
import resource
import subprocess

import pytest

from crcli.job.relay import Relay
from crcli.pipeline import run
from crcli.process.identity import identify


def test_a_job_is_reaped_without_a_descriptor_to_be_had() -> None:
    """Its warden is waited for, and what told of its end is closed, when no more files may be open."""
    reader, writer = os.pipe()
    warden = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL)
    job = run._Running(identify(warden.pid), warden.pid, reader, Relay(), run.Event("fresh", "begun"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        run._end_it(job)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(writer)
        warden.kill()
        warden.wait()
    with pytest.raises(ChildProcessError):
        os.waitpid(job.child, os.WNOHANG)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
