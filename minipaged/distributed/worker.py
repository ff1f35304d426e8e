"""`python -m minipaged.distributed.worker MODEL OPTIONS`: a rank that `processes.py` starts."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """Be the rank that the environment says, until rank 0 needs no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C ends
    model, options = sys.argv[1:]
    if files := json.loads(os.environ.get("MINIPAGED_SUBSTITUTES", "{}")):
        from minipaged.course.substitution import substitute

        substitute({file: Path(path) for file, path in files.items()})
    from minipaged.distributed.launch import load_parallel_engine
    from minipaged.engine.builder import EngineOptions

    load_parallel_engine(model, EngineOptions(**json.loads(options)))


if __name__ == "__main__":
    main()
