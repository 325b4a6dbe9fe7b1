"""A process that runs a command from start to end on request, for `peers.py`: its time and memory."""

import json
import resource
import subprocess
import sys

from against.served import Server


def main() -> None:
    spec = json.loads(sys.argv[1])
    server = Server(
        memory=lambda: resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        cpu=lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]),
    )
    server.answer(ready=True)
    server.serve(lambda: subprocess.run(spec["command"], stdin=subprocess.DEVNULL, check=True))


if __name__ == "__main__":
    main()
