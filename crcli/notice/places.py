"""Which kinds of notice apply here, told from the environment and the firmware; nothing is asked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crcli.notice.base import Surroundings

AWS_ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
GCE_HOST = "GCE_METADATA_HOST"
AZURE_ENDPOINT = "CRCLI_AZURE_METADATA_ENDPOINT"

_AZURE_CHASSIS = "7783-7084-3265-9085-8269-3286-77"
"""The asset tag of every Azure VM; other machines under Hyper-V do not have it."""


def in_kubernetes(here: Surroundings) -> bool:
    """Whether this is a container of a pod."""
    return "KUBERNETES_SERVICE_HOST" in here.environ


def in_slurm(here: Surroundings) -> bool:
    """Whether this is part of a Slurm job."""
    return "SLURM_JOB_ID" in here.environ


def is_systemd_service(here: Surroundings) -> bool:
    """Whether systemd started this very process; what it starts inherits the variables."""
    return here.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())


def on_aws(here: Surroundings) -> bool:
    """Whether this is an EC2 instance whose metadata may be asked for."""
    if here.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    names = " ".join(map(here.machine, ("sys_vendor", "bios_vendor", "bios_version")))
    return AWS_ENDPOINT in here.environ or "amazon" in names.lower()


def on_gcp(here: Surroundings) -> bool:
    """Whether this is a VM of Google's; not one of its laptops, whose vendor is the same."""
    return GCE_HOST in here.environ or here.machine("product_name") in ("Google", "Google Compute Engine")


def on_azure(here: Surroundings) -> bool:
    """Whether this is an Azure VM."""
    return AZURE_ENDPOINT in here.environ or here.machine("chassis_asset_tag") == _AZURE_CHASSIS
