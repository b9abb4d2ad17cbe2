"""`python -m sasa_bench.worker FD`: the stable name by which a worker process is started, whatever its revision."""

import random
import sys

from sasa_bench.timing.child import main

if __name__ == "__main__":
    random.seed()
    main(int(sys.argv[1]))
