"""A worker without torch, for the life of a job: it counts steps, and obeys the contract of the real one.

What it is to do is said by words in place of a config: `short`, `bad`, `crash`, `crash-once`, `loading`.
Without them it goes on until there is a file `enough`. It saves at every fifth step, and when it is stopped.
"""

import os
import signal
import sys
import time
from pathlib import Path

RANK, RANKS = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
LIFE = os.environ.get("SLURM_RESTART_COUNT", "0")
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *received: asked.append(received))


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


def main(folder: str, *words: str) -> int:
    place = Path(folder)
    place.mkdir(exist_ok=True)
    if "bad" in words:
        say("error: no such key")
        return 2
    checkpoint, crashed = place / "checkpoint", place / "crashed"
    begun = int(checkpoint.read_text()) if checkpoint.exists() else 0
    (place / f"rank-{LIFE}-{RANK}").write_text(
        f"{RANKS} {os.environ.get('CUDA_VISIBLE_DEVICES') or '-'} "
        f"{os.environ['SLURM_CPUS_PER_TASK']} {os.environ['MASTER_ADDR']} {os.environ['MASTER_PORT']}"
    )
    while len(list(place.glob(f"rank-{LIFE}-*"))) < RANKS:
        time.sleep(0.02)
    if "loading" in words:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        say("loads a model")
        time.sleep(100)
    say(f"starts at {begun}")
    for step in range(begun + 1, begun + 2000):
        if (place / "enough").exists() or (step == 4 and "short" in words):
            break
        time.sleep(0.05)
        if RANK == 0 and (asked or step % 5 == 0):
            (place / "partial").write_text(str(step))
            (place / "partial").replace(checkpoint)
        if asked:
            time.sleep(0.2 * (RANK + 1))  # ranks do not leave at one moment
            say(f"stopped at step {step}")
            return 75
        if "crash" in words or ("crash-once" in words and RANK == 1 and not crashed.exists()):
            crashed.touch()
            return 1
        say(f"step {step}")
    say("done")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--task":  # by `madpo submit`, whose config lies in the folder of the run
        sys.exit(main(str(Path(sys.argv[3]).parent), *os.environ["STUB"].split()))
    sys.exit(main(*sys.argv[1:]))
