"""`python -m madpo.benchmarks.head`: the benchmark of the loss head, without the trainer's packages."""

import sys

from madpo.benchmarks.head.run import main

sys.exit(main())
