"""`madpo convert`: the config goes to a file or to the output, the list of differences to the screen."""

from __future__ import annotations

import sys
from pathlib import Path

from madpo.launch.convert.convert import convert
from madpo.launch.convert.write import list_text, next_command, summary, tree_of, yaml_text
from madpo.trainer.config.schema import from_tree
from madpo.trainer.errors import UserError
from madpo.trainer.files import check_path, write_named


def run(file: Path, output: Path | None, peer: str | None, task: str | None, gpus: int | None) -> None:
    """Convert, check by the schema, write. Raises UserError for an output that is there already."""
    if output is not None:
        check_path(output)
        if output.exists():
            raise UserError(f"{output}: is there already; name another file")
    draft = convert(file, peer, task, gpus)
    try:
        from_tree(tree_of(draft), "madpo config")
    except UserError as error:
        draft.by_hand.append(str(error))
    text = yaml_text(draft, file.name)
    if output is None:
        print(text, end="")
    else:
        write_named(output, text)
    print(summary(draft, str(file)), file=sys.stderr)
    if output is not None or not sys.stdout.isatty():  # else it is above, at the end of the config
        print(list_text(draft), end="", file=sys.stderr)
    print(f"next: {next_command(draft, str(output or 'FILE'))}", file=sys.stderr)
