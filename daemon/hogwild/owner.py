"""Root acts as whoever owns the state folder, so that what `sudo hogwild rollback` writes is the daemon's.

It also makes the daemon and the command one user, which the arena's socket asks for. Imports no torch.
"""

import os
import pwd
from pathlib import Path


def become(state_dir: Path) -> None:
    """Give up root for the owner of `state_dir`, for the rest of this process. Nothing, if we are not root or it is."""
    if os.geteuid() != 0 or not state_dir.is_dir():
        return
    status = state_dir.stat()
    if status.st_uid == 0:
        return
    try:
        name, group = pwd.getpwuid(status.st_uid).pw_name, pwd.getpwuid(status.st_uid).pw_gid
        os.initgroups(name, group)
    except KeyError:  # a user without an account
        group = status.st_gid
        os.setgroups([])
    os.setgid(group)
    os.setuid(status.st_uid)
