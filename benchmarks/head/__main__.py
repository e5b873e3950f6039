"""`python -m madpo.benchmarks.head`: the benchmark of the loss head, without the trainer's packages."""

from madpo.benchmarks.head.run import main

main()
