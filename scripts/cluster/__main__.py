"""`python -m scripts.cluster build` builds Kubernetes' programs; `… run` has a cluster until it is interrupted."""

from __future__ import annotations

import contextlib
import signal
import sys

from scripts.cluster import obstacle, start_cluster
from scripts.cluster.build import programs


def main(words: list[str]) -> None:
    """Do what the command line says."""
    match words:
        case ["build"]:
            why = obstacle()
            print(why or programs())
        case ["run"]:
            with start_cluster() as cluster:
                print(f"export KUBECONFIG={cluster.kubeconfig}", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    signal.pause()
        case _:
            sys.exit("usage: python -m scripts.cluster build | run")


if __name__ == "__main__":
    main(sys.argv[1:])
