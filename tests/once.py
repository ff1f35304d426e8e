"""What takes long is made once, by one of the processes that want it; the others wait."""

import fcntl


def once(folder, make):
    """Have `make` fill a folder, unless it was filled before."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make()
            (folder / "made").touch()
