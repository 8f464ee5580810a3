"""Run every benchmark."""

from __future__ import annotations

import sys

from benchmarks import kaniko

if __name__ == "__main__":
    sys.exit(kaniko.main())
