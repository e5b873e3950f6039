"""`madpo demo`: train on real data, with the commands that a user would type."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from madpo.trainer.run_folder import last_evaluation

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FOLDER = Path("runs/demo")
COMMANDS = (
    ("train", "demo_sft.yaml"),
    ("evaluate", "demo.yaml", "output_dir=runs/demo/warm-up", "--base"),
    ("train", "demo.yaml"),
    ("train", "demo.yaml", "output_dir=runs/demo/dpo", "objective={loss_type: dpo, beta: 0.1}"),
)
RUNS = {"warm-up": "warm-up", "MADPO": "madpo", "DPO": "dpo"}
TABLE_ROWS = (
    "eval_rewards/accuracies",
    "eval_rewards/margins",
    "eval_kl",
    "eval_logps/accuracies",
    "eval_logps/accuracies_per_token",
)


def run_demo() -> int:
    """Prepare the data, warm up a language model, train MADPO and DPO from it, compare them, report.

    Runs of an earlier demo are replaced, its data is kept. Returns the exit status of the first command that
    fails, or 0. Raises UserError if the data cannot be fetched.
    """
    from madpo.trainer.data.rated_sentences import prepare

    started = time.monotonic()
    if not (FOLDER / "data" / "tokenizer" / "tokenizer.json").is_file():
        print(f"fetching the rated sentences into {FOLDER / 'data'}", flush=True)
        prepare(FOLDER / "data")
    for name in ("sft", *RUNS.values()):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    for task, config, *overrides in COMMANDS:
        print(f"\n$ madpo {shlex.join([task, f'configs/{config}', *overrides])}", flush=True)
        command = [
            sys.executable,
            "-m",
            "madpo.launch.cli",
            task,
            str(CONFIGS / config),
            *overrides,
        ]
        status = subprocess.run(command, check=False).returncode
        if status:
            return status
    _summarise(time.monotonic() - started)
    return 0


def _summarise(seconds: float) -> None:
    from madpo.trainer.pair_margins import STDERR
    from madpo.trainer.reports.progress import metrics_table
    from madpo.trainer.reports.run_report import write_report

    columns = {}
    for title, name in RUNS.items():
        record = last_evaluation(FOLDER / name)
        names = [name for row in TABLE_ROWS for name in (row, f"{row}{STDERR}")]
        columns[title] = {name: record[name] for name in names if name in record}
    print("\nHeld-out pairs, of sentences that no run has trained on; MADPO and DPO after as many steps:\n")
    print(metrics_table(columns))
    report = write_report([FOLDER / RUNS[name] for name in ("MADPO", "DPO")], FOLDER / "report.html")
    print(f"\nmodel   {FOLDER / RUNS['MADPO'] / 'model'}")
    print(f"report  {report}")
    print(f"took    {int(seconds) // 60}:{int(seconds) % 60:02d} minutes")
