"""Command lines in shell scripts: the flags of the command that trains, with the script's own variables."""

import pytest

from madpo.launch.convert.read import read
from madpo.trainer.errors import UserError

SCRIPTS = [
    ("deepspeed --num_gpus 8 --module openrlhf.cli.train_dpo --beta 0.1", "openrlhf.cli.train_dpo", 8),
    ("RATE=0.1\ntrl dpo --beta $RATE", "dpo", None),
    ("accelerate launch --num_processes 2 trl/scripts/dpo.py \\\n  --beta=0.1", "dpo", 2),
    ("# trl sft --beta 3\ntrl dpo --beta ${RATE:-0.1} && echo done", "dpo", None),
    (
        "read -r c <<EOF\nopenrlhf.cli.train_dpo \\\n --beta 0.1\nEOF\ndeepspeed $c",
        "openrlhf.cli.train_dpo",
        None,
    ),
]


@pytest.mark.parametrize(("text", "program", "gpus"), SCRIPTS)
def test_the_command_of_a_script(text, program, gpus, tmp_path):
    path = tmp_path / "run.sh"
    path.write_text(text)
    source = read(path)
    assert (source.keys, source.program, source.gpus) == ({"beta": 0.1}, program, gpus)


def test_flags_without_a_value_with_several_and_of_unknown_variables(tmp_path):
    path = tmp_path / "run.sh"
    path.write_text("trl sft --packing --bf16 False --lora_target_modules q_proj v_proj --output_dir $OUT\n")
    source = read(path)
    modules = ["q_proj", "v_proj"]
    assert source.keys == {
        "packing": True,
        "bf16": False,
        "lora_target_modules": modules,
        "output_dir": "$OUT",
    }
    assert source.by_hand == ["output_dir: $OUT is a variable of the shell"]


def test_a_config_file_that_a_command_names_is_read_first(tmp_path):
    (tmp_path / "dpo.yaml").write_text("beta: 0.5\nlearning_rate: 1e-6\n")
    (tmp_path / "run.sh").write_text("trl dpo --config dpo.yaml --beta 0.1\n")
    assert read(tmp_path / "run.sh").keys == {"beta": 0.1, "learning_rate": 1e-6}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.sh", "echo hello", "no command that trains"),
        ("c.json", "{", "c.json:1: Expecting property name"),
        ("c.yaml", "a: [", "c.yaml:"),
    ],
)
def test_files_that_say_nothing_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)
