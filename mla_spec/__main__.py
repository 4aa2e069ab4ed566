"""``python -m mla_spec``: the command ``mla-spec``."""

import sys

from mla_spec.front.cli import main

if __name__ == "__main__":
    sys.exit(main())
